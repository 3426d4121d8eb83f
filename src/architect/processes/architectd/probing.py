"""Probes that an engine makes by exec: no activity while the container is awake, answered while it is not.

Called by the server for each exec. A sleeper that is probed was healthy when it fell asleep: one that was
not is kept awake (:attr:`.clock.IdleClock.unready`), so "succeeded" is its last real health.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from architect.contract.states import State
from architect.decisions.probes import is_probe
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.waiters import AWAKE


def is_one(managed: ManagedContainer, process: str) -> bool:
    """Whether an exec's process, described in a file, is one of the container's probes."""
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return bool(process) and is_probe(Path(process).read_text(), managed.record.probes)
    return False


def is_answered(managed: ManagedContainer) -> bool:
    """Whether a probe is answered without the program: while it sleeps, or is about to."""
    return managed.state not in (*AWAKE, State.CREATED, State.SCALING_UP, State.ENDED)


@contextlib.contextmanager
def under_way(managed: ManagedContainer) -> Iterator[None]:
    """While an engine starts a probe: the container is not hibernated, and nothing counts."""
    managed.clock.probe_begins()
    try:
        yield
    finally:
        managed.clock.probe_started()
