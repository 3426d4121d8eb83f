"""Durations as users write them in annotations: Go's notation, in whole nanoseconds.

Kubernetes users know ``time.ParseDuration``; anything it takes is taken here with the same result,
anything it refuses is refused. Called by ``contract.annotations`` and the command line.
Source: the Go standard library, ``time/format.go`` (ParseDuration) and ``time/time.go`` (String).
"""

from __future__ import annotations

import re

from architect.contract.errors import InvalidDuration

NANOSECOND = 1
MICROSECOND = 1_000
MILLISECOND = 1_000_000
SECOND = 1_000_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE

_UNITS = {
    "ns": NANOSECOND,
    "us": MICROSECOND,
    "\u00b5s": MICROSECOND,  # micro sign
    "\u03bcs": MICROSECOND,  # Greek letter mu
    "ms": MILLISECOND,
    "s": SECOND,
    "m": MINUTE,
    "h": HOUR,
}
_LIMIT = 1 << 63
"""Go counts in int64; the most negative value is one further from zero than the most positive."""

_TERM = re.compile(r"([0-9]*)(\.([0-9]*))?([^0-9.]*)")


def _fraction(digits: str) -> tuple[int, float]:
    """Return the digits after the point as (number, scale), dropping those beyond int64."""
    number = 0
    scale = 1.0
    for digit in digits:
        if number > (_LIMIT - 1) // 10 or number * 10 + int(digit) > _LIMIT:
            break
        number = number * 10 + int(digit)
        scale *= 10
    return number, scale


def parse(text: str) -> int:
    """Return the nanoseconds of a Go duration such as ``1h2m3.5s``, ``-1.5h``, ``100ms`` or ``0``.

    Raises InvalidDuration for anything else, a value beyond ±2**63 ns (292 years) included.
    """
    rest = text
    negative = rest[:1] == "-"
    if rest[:1] in ("-", "+"):
        rest = rest[1:]
    if rest == "0":
        return 0
    if not rest:
        raise InvalidDuration(text, "is empty")
    total = 0
    while rest:
        match = _TERM.match(rest)
        assert match is not None  # every part of the pattern may be empty
        whole, point, decimals, unit_name = match.groups()
        if not whole and not decimals:
            raise InvalidDuration(text, "has a unit or a sign where a number is expected")
        if not unit_name:
            raise InvalidDuration(text, f"has no unit after {whole}{point or ''}")
        unit = _UNITS.get(unit_name)
        if unit is None:
            raise InvalidDuration(text, "has an unknown unit (known: ns, us, µs, ms, s, m, h)")
        # A number of more than 19 significant digits is out of range; int() of thousands is slow.
        digits = whole.lstrip("0")
        value = int(digits or "0") * unit if len(digits) <= 19 else _LIMIT + 1
        if value <= _LIMIT and decimals:
            number, scale = _fraction(decimals)
            # Go rounds through float64 here; exact arithmetic would differ in the last digits.
            value += int(float(number) * (float(unit) / scale))
        total += value
        if total > _LIMIT:
            raise InvalidDuration(text, "is out of range")
        rest = rest[match.end() :]
    if negative:
        return -total
    if total > _LIMIT - 1:
        raise InvalidDuration(text, "is out of range")
    return total


def _decimal(value: int, unit: int) -> str:
    whole, part = divmod(value, unit)
    if not part:
        return str(whole)
    width = len(str(unit)) - 1
    return f"{whole}.{part:0{width}d}".rstrip("0")


def render(nanoseconds: int) -> str:
    """Return ``nanoseconds`` as Go's ``Duration.String`` prints them: ``1h2m3.5s``, ``1.5ms``."""
    if nanoseconds == 0:
        return "0s"
    sign = "-" if nanoseconds < 0 else ""
    size = abs(nanoseconds)
    if size < MICROSECOND:
        return f"{sign}{size}ns"
    if size < MILLISECOND:
        return f"{sign}{_decimal(size, MICROSECOND)}µs"
    if size < SECOND:
        return f"{sign}{_decimal(size, MILLISECOND)}ms"
    minutes, rest = divmod(size, MINUTE)
    text = f"{_decimal(rest, SECOND)}s"
    if minutes:
        hours, minutes = divmod(minutes, 60)
        text = f"{minutes}m{text}"
        if hours:
            text = f"{hours}h{text}"
    return sign + text
