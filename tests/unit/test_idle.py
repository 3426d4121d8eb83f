"""The idle clock, as a pure function."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from architect.decisions.idle import Observed, Sleep, Wait, judge

SECOND = 10**9
times = st.integers(min_value=0, max_value=10**15)
durations = st.integers(min_value=SECOND, max_value=24 * 3600 * SECOND)


@given(times, times, durations, times)
def test_never_before_it_has_been_idle_long_enough(
    now: int, last: int, scaledown: int, not_before: int
) -> None:
    verdict = judge(Observed(now, last, scaledown, not_before))
    if isinstance(verdict, Sleep):
        assert now - last >= scaledown
        assert now >= not_before
    else:
        assert verdict.until > now


@given(times, times, durations, times)
def test_waiting_as_long_as_it_says_is_enough(
    now: int, last: int, scaledown: int, not_before: int
) -> None:
    verdict = judge(Observed(now, last, scaledown, not_before))
    if isinstance(verdict, Wait):
        later = judge(Observed(verdict.until, last, scaledown, not_before))
        assert isinstance(later, Sleep)


@given(durations, st.integers(min_value=1, max_value=5))
def test_sessions_connections_and_a_pause_keep_it_awake(scaledown: int, count: int) -> None:
    idle = Observed(now=10**16, last_activity=0, scaledown=scaledown)
    assert isinstance(judge(idle), Sleep)
    for seen in (
        Observed(10**16, 0, scaledown, sessions=count),
        Observed(10**16, 0, scaledown, connections=count),
        Observed(10**16, 0, scaledown, paused=True),
    ):
        verdict = judge(seen)
        assert isinstance(verdict, Wait)
        assert verdict.held
        assert verdict.counts
        assert SECOND <= verdict.until - 10**16 <= max(SECOND, scaledown // 4)
    released = judge(Observed(10**16, 0, scaledown, held_before=True))
    assert released == Wait(10**16 + scaledown, "active", counts=True)


def test_the_initial_delay_holds_even_if_it_was_idle_long_before() -> None:
    verdict = judge(
        Observed(now=5 * SECOND, last_activity=0, scaledown=SECOND, not_before=9 * SECOND)
    )
    assert verdict == Wait(9 * SECOND, "initial delay")
