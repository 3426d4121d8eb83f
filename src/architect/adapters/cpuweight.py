"""The share of the CPU that a wake gets on a node whose CPUs are used up.

CRIU restores a program inside the container's cgroup, and a hibernated container has about the least
weight that there is, as its requests went down to nothing. Among busy neighbours a wake of 20 ms would then
take seconds. So the container, its pod and the pod's class of service get the greatest weight for as long as
the restore takes. Called by the daemon around each wake.

Sources: cgroups(7), Documentation/admin-guide/cgroup-v2.rst (cpu.weight, 1 to 10000), cgroup v1's cpu.shares
(2 to 262144); the kubelet's cgroup names, pkg/kubelet/cm/cgroup_manager_linux.go.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from architect.adapters.cgroup import ROOT, Cgroup

_GREATEST_V1: Final = "262144"
_GREATEST_V2: Final = "10000"
_PODS: Final = re.compile(r"(^|-)kubepods(\.slice)?$")
"""The cgroup of all pods of a node: its weight against the node's own services stays as it is."""


@dataclass(slots=True)
class _Raised:
    original: str
    by: int = 1
    """How many wakes under way need it."""


class Boosts:
    """Which weights are raised now; one for a daemon, since pods share the cgroup of their class."""

    def __init__(self) -> None:
        self._raised: dict[Path, _Raised] = {}

    def take(self, group: Cgroup) -> dict[str, str]:
        """Raises a container's weight at every level; returns what it was (file, value).

        What cannot be changed is left out: a wake must not fail for want of speed.
        """
        name, greatest = (
            ("cpu.weight", _GREATEST_V2) if group.unified else ("cpu.shares", _GREATEST_V1)
        )
        taken = {}
        for folder in levels(group):
            file = folder / name
            raised = self._raised.get(file)
            if raised is not None:
                raised.by += 1
            else:
                try:
                    raised = self._raised[file] = _Raised(file.read_text().strip())
                    file.write_text(greatest)
                except OSError:
                    self._raised.pop(file, None)
                    continue
            taken[str(file)] = raised.original
        return taken

    def originals(self, limits: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
        """``limits`` (file, value) without what is raised now: a neighbour of the same pod may be waking."""
        raised = {str(file): one.original for file, one in self._raised.items()}
        return [(file, raised.get(file, value)) for file, value in limits]

    def give_back(self, files: Iterable[str]) -> None:
        """The end of a wake: weights that no other wake needs are what they were."""
        for file in map(Path, files):
            raised = self._raised.get(file)
            if raised is None:
                continue
            raised.by -= 1
            if raised.by == 0:
                del self._raised[file]
                _put(file, raised.original)


def _put(file: Path, original: str) -> None:
    # Somebody else's value, as the kubelet's after a resize, stays.
    with contextlib.suppress(OSError):
        if file.read_text().strip() in (_GREATEST_V1, _GREATEST_V2):
            file.write_text(original)


def levels(group: Cgroup) -> list[Path]:
    """The cgroups from a container's up to, and without, that of all pods, or one right below the root."""
    root = ROOT if group.unified else ROOT / "cpu"
    found = []
    for folder in (group.cpu, *group.cpu.parents):
        if folder.parent == root or not folder.is_relative_to(root) or _PODS.search(folder.name):
            break
        found.append(folder)
    return found
