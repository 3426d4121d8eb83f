"""What the benchmark of the gate says about its own certainty, and the frames that it sends."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import tracking


@pytest.mark.parametrize(
    ("count", "lowest"), [(1, 1), (5, 1), (6, 1), (10, 2), (20, 6), (60, 22), (100, 40)]
)
def test_the_intervals_ranks_are_those_of_the_tables(count: int, lowest: int) -> None:
    values = [float(number) for number in range(1, count + 1)]
    random.Random(count).shuffle(values)
    assert tracking.median_interval(values) == (lowest, count + 1 - lowest)


def test_the_interval_has_the_median_as_often_as_it_says() -> None:
    chance = random.Random(3)
    runs = 2000
    hits = 0
    for _ in range(runs):
        low, high = tracking.median_interval([chance.gauss(0, 1) for _ in range(31)])
        hits += low <= 0 <= high
    assert hits / runs == pytest.approx(0.95, abs=0.03)


@given(st.binary(min_size=20, max_size=20))
def test_a_header_with_its_checksum_sums_to_nothing(header: bytes) -> None:
    blank = header[:10] + b"\0\0" + header[12:]
    whole = blank[:10] + tracking._checksum(blank).to_bytes(2, "big") + blank[12:]
    assert tracking._checksum(whole) == 0
