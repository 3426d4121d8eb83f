"""A container's cgroup, v1, v2 or hybrid (cgroups(7)): memory, processes, limits.

Called by the daemon. The cgroup is found from the keeper, which stays in it for the container's life.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

ROOT: Final = Path("/sys/fs/cgroup")
"""Where the hierarchies are."""

_UNLIMITED: Final = 1 << 60
"""Values near 2**63 are v1's way to say that there is no memory limit."""
_RESTORE_HEADROOM: Final = 64 << 20
"""Bytes added to a memory limit while CRIU, which is in the cgroup then, restores."""


@dataclass(frozen=True, slots=True)
class Cgroup:
    """The directories that hold a container, by controller; all the same one under v2."""

    memory: Path
    cpu: Path
    freezer: Path
    unified: bool

    @classmethod
    def of(cls, pid: int) -> Cgroup:
        """The cgroup of a process.

        Raises:
            FileNotFoundError: there is no such process.
        """
        found: dict[str, Path] = {}
        for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
            _, controllers, directory = line.split(":", 2)
            for controller in controllers.split(","):
                found[controller] = Path(directory.lstrip("/"))
        if "memory" in found:
            return cls(
                memory=ROOT / "memory" / found["memory"],
                cpu=ROOT / "cpu" / found.get("cpu", found["memory"]),
                freezer=ROOT / "freezer" / found.get("freezer", found["memory"]),
                unified=False,
            )
        own = ROOT / found[""]
        return cls(memory=own, cpu=own, freezer=own, unified=True)

    def memory_bytes(self) -> int:
        """Memory charged to the container now, 0 if it is gone."""
        name = "memory.current" if self.unified else "memory.usage_in_bytes"
        try:
            return int((self.memory / name).read_text())
        except (OSError, ValueError):
            return 0

    def reclaim(self) -> None:
        """Gives back what memory a hibernated container still holds; as far as the kernel can."""
        if not self.unified:
            with contextlib.suppress(OSError):
                (self.memory / "memory.force_empty").write_text("0")
            return
        with contextlib.suppress(OSError):
            # EAGAIN says that less was there to be reclaimed than asked for: the aim.
            (self.memory / "memory.reclaim").write_text(str(max(self.memory_bytes(), 4096)))

    def frozen(self) -> bool:
        """Whether the container is paused."""
        try:
            if self.unified:
                return (self.freezer / "cgroup.freeze").read_text().strip() == "1"
            return (self.freezer / "freezer.state").read_text().strip() != "THAWED"
        except OSError:
            return False

    def processes(self) -> list[int]:
        """Host pids of all its processes, the keeper included."""
        with contextlib.suppress(OSError):
            return [int(pid) for pid in (self.memory / "cgroup.procs").read_text().split()]
        return []

    def end_neighbours(self, spared: Collection[str]) -> list[str]:
        """SIGKILL for the pod's other containers, but those whose ids are spared; returns their cgroups."""
        ended = []
        with contextlib.suppress(OSError):
            for other in self.memory.parent.iterdir():
                if any(one in other.name for one in spared) or not other.is_dir():
                    continue
                pids = (other / "cgroup.procs").read_text().split()
                for pid in map(int, pids):
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                if pids:
                    ended.append(other.name)
        return ended

    def lift_limits(self) -> dict[str, str]:
        """Takes the CPU quota away and adds to the memory limit, for a wake.

        Returns what :func:`return_limits` must write back; write it down before anything else.
        """
        lifted: dict[str, str] = {}
        if self.unified:
            changes = [(self.cpu / "cpu.max", _no_quota), (self.memory / "memory.max", _more)]
        else:
            changes = [
                (self.cpu / "cpu.cfs_quota_us", lambda now: None if int(now) < 0 else "-1"),
                (self.memory / "memory.limit_in_bytes", _more),
            ]
        for file, change in changes:
            with contextlib.suppress(OSError, ValueError):
                now = file.read_text().strip()
                new = change(now)
                if new is not None:
                    file.write_text(new)
                    lifted[str(file)] = now
        return lifted

    def limits(self) -> list[tuple[str, str]]:
        """What a pod's resize changes (file, value), of the pod's cgroup and then of the container's.

        A Kubernetes pod's cgroup is its containers' parent (kubelet, cgroup drivers).
        """
        if self.unified:
            wanted = [(self.cpu, ("cpu.max", "cpu.weight")), (self.memory, ("memory.max",))]
        else:
            wanted = [
                (self.cpu, ("cpu.cfs_quota_us", "cpu.shares")),
                (self.memory, ("memory.limit_in_bytes",)),
            ]
        found = []
        outer = [(folder.parent, names) for folder, names in wanted]
        for file in (folder / name for folder, names in (*outer, *wanted) for name in names):
            with contextlib.suppress(OSError):
                found.append((str(file), file.read_text().strip()))
        return found


def _no_quota(now: str) -> str | None:
    quota, period = now.split()
    return None if quota == "max" else f"max {period}"


def _more(now: str) -> str | None:
    return None if now == "max" or int(now) > _UNLIMITED else str(int(now) + _RESTORE_HEADROOM)


def leave(pid: int) -> None:
    """Moves a process to the root of every hierarchy, as far as the kernel allows.

    For work that must outlive its starter's service or pod, whose end kills whatever is in its cgroup,
    and that must not be charged to its memory limit.
    """
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        controllers = line.split(":", 2)[1].removeprefix("name=")
        hybrid = ROOT / "unified"
        root = ROOT / controllers if controllers else hybrid if hybrid.is_dir() else ROOT
        with contextlib.suppress(OSError):
            (root / "cgroup.procs").write_text(str(pid))


def raise_limits(limits: Sequence[tuple[str, str]]) -> None:
    """Brings what :meth:`Cgroup.limits` found back to where it was, unless it is higher by now.

    In this order, outermost first: a cgroup's limit may not exceed its parent's.
    """
    for name, value in lowered(limits):
        with contextlib.suppress(OSError):
            Path(name).write_text(value)


def lowered(limits: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    """Those of ``limits`` that are lower now."""
    found = []
    for name, value in limits:
        with contextlib.suppress(OSError, ValueError):
            if _amount(Path(name).read_text().strip()) < _amount(value):
                found.append((name, value))
    return found


def memory_limit(limits: Sequence[tuple[str, str]]) -> float | None:
    """The innermost memory limit among ``limits``, in bytes; infinite for none, None if it is not there."""
    found = None
    for name, value in limits:
        if name.endswith(("/memory.max", "/memory.limit_in_bytes")):
            amount = _amount(value)
            found = math.inf if amount > _UNLIMITED else amount
    return found


def _amount(value: str) -> float:
    """A limit's size: "max" and v1's negative quota are without limit; of "QUOTA PERIOD" the ratio."""
    quota, _, period = value.partition(" ")
    if quota == "max" or quota.startswith("-"):
        return math.inf
    return int(quota) / int(period or 1)


def return_limits(lifted: Mapping[str, str]) -> None:
    """Writes lifted limits back; a cgroup that is gone needs none."""
    for file, value in lifted.items():
        with contextlib.suppress(OSError):
            Path(file).write_text(value)


def outsiders(pids: list[int], init: int, keeper: int) -> dict[int, int]:
    """Processes of a container that do not descend from its init, with their parents: open exec sessions.

    CRIU dumps the init's tree only, so a container with outsiders cannot be hibernated.
    """
    parents: dict[int, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError, ValueError, IndexError):
            stat = Path(f"/proc/{pid}/stat").read_text()
            parents[pid] = int(stat.rpartition(")")[2].split()[1])
    found = {}
    for pid in parents:
        ancestor = pid
        while ancestor in parents and ancestor != init:
            ancestor = parents[ancestor]
        if ancestor != init and pid != keeper and parents[pid] != keeper:
            found[pid] = parents[pid]
    return found


def run_by(outsiders: Mapping[int, int], commands: Collection[Sequence[str]]) -> set[int]:
    """Those of a container's outsiders that one of the commands has started, itself included."""
    roots = {pid for pid in outsiders if commands and _is_one_of(pid, commands)}
    found = set()
    for pid in outsiders:
        ancestor = pid
        while ancestor in outsiders and ancestor not in roots:
            ancestor = outsiders[ancestor]
        if ancestor in roots:
            found.add(pid)
    return found


def _is_one_of(pid: int, commands: Collection[Sequence[str]]) -> bool:
    try:
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return False
    words = line.split("\0")[:-1]
    # A script's interpreter comes before it.
    return any(words[-len(command) :] == list(command) for command in commands)
