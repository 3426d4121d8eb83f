"""Whether a container's limits may be changed now: asked by the daemon before runc changes them.

When a Guaranteed pod hibernates, its limits go down with its requests, by the API. The kubelet carries that
out when it gets to it, which may be after the container has woken: a memory limit of a few megabytes would
then kill it, and its state would be lost. So lower limits never reach a sleeper's cgroup (they would limit
nothing there), and are refused for a container that has just woken: the kubelet tries again, and by then
the API has the old limits again.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from typing import Any


class Verdict(enum.Enum):
    """What is done about an update."""

    APPLY = "ok apply"  # runc writes the limits
    SKIP = "ok skip"  # accepted, but not written: it would only lower a sleeper's
    REFUSE = "error"  # the engine is told that it failed


def judge(resources: str, *, remembered: float | None, asleep: bool, settled: bool) -> Verdict:
    """Say what to do with an update.

    ``resources`` is the OCI specification's LinuxResources as JSON; ``remembered`` the memory limit in
    bytes as of the last hibernation (infinite without one, None if it never hibernated); ``asleep`` and
    ``settled`` tell whether the container is hibernated, and whether it has run for so long that no update
    meant for the sleeper can be under way.
    """
    limit = _memory_limit(resources)
    if limit is None or remembered is None or limit >= remembered:
        return Verdict.APPLY
    if asleep:
        return Verdict.SKIP
    return Verdict.APPLY if settled else Verdict.REFUSE


def _memory_limit(resources: str) -> float | None:
    try:
        found = json.loads(resources)
    except ValueError:
        return None
    memory: Any = found.get("memory") if isinstance(found, Mapping) else None
    limit = memory.get("limit") if isinstance(memory, Mapping) else None
    if not isinstance(limit, int) or limit == 0:
        return None
    return float("inf") if limit < 0 else limit
