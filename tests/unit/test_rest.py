"""When a gate rests (architect.decisions.rest)."""

from hypothesis import given
from hypothesis import strategies as st

from architect.decisions import rest


@given(st.floats(0, 1e9))
def test_a_rest_is_never_felt(scaledown_s: float) -> None:
    resting = rest.rest_s(scaledown_s)
    assert resting <= scaledown_s / 20
    assert resting == 0 or 1 <= resting <= 10


@given(st.floats(20.0, 1e9), st.floats(20.0, 1e9))
def test_longer_idle_times_allow_longer_rests(one: float, other: float) -> None:
    shorter, longer = sorted((one, other))
    assert 0 < rest.rest_s(shorter) <= rest.rest_s(longer)


def test_short_idle_times_allow_none() -> None:
    assert rest.rest_s(19.9) == 0
    assert rest.rest_s(20.0) == 1
    assert rest.rest_s(600.0) == 10


@given(st.floats(1.0, 10.0))
def test_packets_are_counted_for_a_small_part_of_the_time(resting: float) -> None:
    assert 0 < rest.window_s(resting) <= resting / 10


@given(st.integers(0, 10**9), st.floats(0.01, 1e3))
def test_only_a_flood_is_busy(packets: int, seconds: float) -> None:
    assert rest.is_busy(packets, seconds) == (
        packets / seconds >= 1000 or packets >= 1000 * seconds
    )
