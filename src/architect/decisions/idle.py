"""When an idle container may hibernate: the idle clock, as a pure function of what is known.

Called by the daemon whenever the clock may have run out; it either says that the time has come, or when to
look again. All times are nanoseconds of CLOCK_MONOTONIC. The table of what starts the clock anew is in
docs/reference.md; tests/unit/test_idle_table.py holds this function to it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

_SECOND: Final = 10**9
_PROBE: Final = _SECOND // 10
"""How long a probe's command is given until the next look."""
_LOOKS: Final = 4
"""Looks in one idle time, but one a second at most, while something keeps the container awake. What ends
without a packet (an exec session, a pause, a connection whose peer has vanished) is noticed by looking only,
and counts from then on: so the container hibernates as much later as two looks are apart at most, and never
early."""


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a running container at ``now``."""

    now: int
    last_activity: int
    """Last packet to a declared port, wake or start, end of an engine's call, or look that counted as
    activity (:attr:`Wait.counts`): the latest of them."""
    scaledown: int
    """Idle time before hibernation."""
    not_before: int = 0
    """End of the initial delay."""
    sessions: int = 0
    """Open exec sessions."""
    connections: int = 0
    """Open connections that keep it awake (network-monitor "connections")."""
    paused: bool = False
    unready: bool = False
    """Whoever probes it has not seen it healthy yet, or does not any more."""
    probing: bool = False
    """A probe's command runs in it: no activity, but nothing can be checkpointed meanwhile."""
    held_before: bool = False
    """Whether the last look found it held (:attr:`Wait.held`)."""


@dataclass(frozen=True, slots=True)
class Sleep:
    """The time has come."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again at ``until``; ``why`` is for the log."""

    until: int
    why: str
    held: bool = False
    """Something keeps it awake without a packet."""
    counts: bool = False
    """This look counts as activity: it is held, or was until some moment since the last look."""


def judge(seen: Observed) -> Sleep | Wait:
    """Says whether the container may hibernate now, and if not, when to look again."""
    for holds, why in (
        (seen.sessions > 0, "exec session open"),
        (seen.connections > 0, "connection open"),
        (seen.paused, "paused"),
        (seen.unready, "not healthy"),
    ):
        if holds:
            again = max(seen.scaledown // _LOOKS, min(seen.scaledown, _SECOND))
            return Wait(seen.now + again, why, held=True, counts=True)
    last = seen.now if seen.held_before else seen.last_activity
    due = max(last + seen.scaledown, seen.not_before)
    if seen.now < due:
        why = "active" if due > seen.not_before else "initial delay"
        return Wait(due, why, counts=seen.held_before)
    if seen.probing:
        return Wait(seen.now + _PROBE, "probe")
    return Sleep()
