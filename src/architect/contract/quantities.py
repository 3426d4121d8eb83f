"""Kubernetes quantities ("100m", "64Mi", "1e3") as numbers.

The API server writes a quantity back in its own form ("1000m" becomes "1"), so two of them are the same
only as numbers. Used by the decisions about requests, which compare what is there with what was there.
The grammar is that of k8s.io/apimachinery/pkg/api/resource/quantity.go.
"""

from __future__ import annotations

import functools
import math
import re
from fractions import Fraction
from typing import Final

from architect.contract.errors import ArchitectError, quoted

_SUFFIXES: Final = {
    "n": Fraction(1, 10**9),
    "u": Fraction(1, 10**6),
    "m": Fraction(1, 10**3),
    "": Fraction(1),
    "k": Fraction(10**3),
    "M": Fraction(10**6),
    "G": Fraction(10**9),
    "T": Fraction(10**12),
    "P": Fraction(10**15),
    "E": Fraction(10**18),
    "Ki": Fraction(2**10),
    "Mi": Fraction(2**20),
    "Gi": Fraction(2**30),
    "Ti": Fraction(2**40),
    "Pi": Fraction(2**50),
    "Ei": Fraction(2**60),
}
_FORM: Final = re.compile(
    r"(?P<number>[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+))"
    r"(?:[eE](?P<exponent>[+-]?[0-9]{1,3})|(?P<suffix>[numkMGTPE]|[KMGTPE]i)?)"
)


class InvalidQuantity(ArchitectError):
    """Text that the Kubernetes API would not take as a quantity."""

    def __init__(self, text: str) -> None:
        fix = 'write for example "100m", "0.5", "64Mi" or "1e3"'
        super().__init__(f"quantity {quoted(text)}", "it is not a Kubernetes quantity", fix)
        self.text = text


@functools.lru_cache(maxsize=4096)
def parse(text: str) -> Fraction:
    """The number that a quantity stands for, exactly: cores for cpu, bytes for memory.

    Raises:
        InvalidQuantity: it is none.
    """
    found = _FORM.fullmatch(text)
    if found is None:
        raise InvalidQuantity(text)
    number = Fraction(found["number"])
    if found["exponent"] is not None:
        return number * Fraction(10) ** int(found["exponent"])
    return number * _SUFFIXES[found["suffix"] or ""]


@functools.lru_cache(maxsize=4096)
def nano(text: str) -> int:
    """The number in billionths, rounded up: as finely as the API server keeps it, and quick to compare.

    Raises:
        InvalidQuantity: it is none.
    """
    return math.ceil(parse(text) * 10**9)


def same(one: str, other: str) -> bool:
    """Whether both stand for the same number, as finely as the API server keeps it."""
    return one == other or nano(one) == nano(other)
