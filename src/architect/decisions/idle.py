"""When an idle container may hibernate: the idle clock, as a pure function of what is known.

Called by the daemon whenever the clock runs out; it either says that the time has come, or when to look
again. All times are nanoseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Observed:
    """What is known of a running container at ``now``."""

    now: int
    last_activity: int
    """Last packet to a declared port, end of the last exec session, wake or start: the latest of them."""
    scaledown: int
    """Idle time before hibernation."""
    not_before: int = 0
    """End of the initial delay."""
    sessions: int = 0
    """Open exec sessions."""
    connections: int = 0
    """Open connections that keep it awake (network-monitor "connections")."""
    paused: bool = False


@dataclass(frozen=True, slots=True)
class Sleep:
    """The time has come."""


@dataclass(frozen=True, slots=True)
class Wait:
    """Look again at ``until``; ``why`` is for the log."""

    until: int
    why: str


def judge(seen: Observed) -> Sleep | Wait:
    """Says whether the container may hibernate now, and if not, when to look again.

    Things that keep it awake without a packet (sessions, connections, a pause) are looked at again after a
    whole idle time, as if they were activity at ``now``.
    """
    for holds, why in (
        (seen.sessions > 0, "exec session open"),
        (seen.connections > 0, "connection open"),
        (seen.paused, "paused"),
    ):
        if holds:
            return Wait(seen.now + seen.scaledown, why)
    due = max(seen.last_activity + seen.scaledown, seen.not_before)
    if seen.now < due:
        return Wait(due, "active" if due > seen.not_before else "initial delay")
    return Sleep()
