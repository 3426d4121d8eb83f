"""The nodes' cgroups, in every hierarchy that the machine has mounted: version 1, 2 or both.

A node's cgroup, named as the node, is the root that its cgroup namespace shows; so the kubelet's
default settings hold in it, and its statistics count one node (cgroup_namespaces(7)). Whoever is
in a cgroup is of that node: that is how a node's processes are found and ended. Called by node.py,
machine.py and stats.py.
"""

import errno
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.base import until
from tests.cluster.settings import NODE_NAME

ROOT: Final = Path("/sys/fs/cgroup")
INIT: Final = "init"
"""The leaf of version 2 for a node's first process: an inner cgroup there may hold none."""

_GONE_S: Final = 20.0


@dataclass(frozen=True, slots=True)
class Hierarchy:
    """One mounted hierarchy."""

    folder: Path
    kind: str
    """cgroup or cgroup2."""
    options: tuple[str, ...]
    """Its controllers and name, as mount(8) wants them; none for version 2."""

    @property
    def is_v2_alone(self) -> bool:
        """Whether it is the only one there is."""
        return self.folder == ROOT

    @property
    def place(self) -> str:
        """Its mount point as a node sees it, relative to the node's root."""
        return str(self.folder).lstrip("/")


def parse(mountinfo: str, controllers: frozenset[str]) -> list[Hierarchy]:
    """The hierarchies below /sys/fs/cgroup in a mountinfo file (proc_pid_mountinfo(5))."""
    found: dict[Path, Hierarchy] = {}
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        folder = Path(left.split()[4])
        kind, _, super_options = right.split()[:3]
        if kind not in ("cgroup", "cgroup2") or ROOT not in (folder, *folder.parents):
            continue
        options = tuple(
            option
            for option in super_options.split(",")
            if kind == "cgroup" and (option in controllers or option.startswith("name="))
        )
        found[folder] = Hierarchy(folder, kind, options)
    return list(found.values())


def hierarchies() -> list[Hierarchy]:
    """Those of this machine."""
    lines = Path("/proc/cgroups").read_text().splitlines()
    controllers = frozenset(line.split()[0] for line in lines if not line.startswith("#"))
    return parse(Path("/proc/self/mountinfo").read_text(), controllers)


def missing_controllers() -> list[str]:
    """Controllers of version 2 that the kubelet needs and the top cgroup does not hand down."""
    for one in hierarchies():
        if one.is_v2_alone:
            there = set((one.folder / "cgroup.controllers").read_text().split())
            handed = (one.folder / "cgroup.subtree_control").read_text().split()
            wanted = {"cpu", "cpuset", "hugetlb", "io", "memory", "pids"}
            return sorted((there & wanted) - set(handed))
    return []


def hand_down(controllers: Sequence[str], sign: str) -> None:
    """Add (`+`) or take back (`-`) controllers of the machine's top cgroup, version 2."""
    for controller in controllers:
        (ROOT / "cgroup.subtree_control").write_text(f"{sign}{controller}")


def create(name: str) -> None:
    """Make a node's cgroup (NAME) or one within it (NAME/PROGRAM)."""
    for one in hierarchies():
        folder = one.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        if "cpuset" in one.options and "/" not in name:
            # A new cpuset is empty, and no process may enter it so.
            for file in ("cpuset.cpus", "cpuset.mems"):
                (folder / file).write_text((one.folder / file).read_text())
            (folder / "cgroup.clone_children").write_text("1")


def joining(name: str, command: Sequence[str | Path]) -> list[str]:
    """A command line that enters the cgroup, in all hierarchies, and becomes the command."""
    files = " ".join(f"{one.folder / name}/cgroup.procs" for one in hierarchies())
    script = f'for file in {files}; do echo 0 >"$file" || exit 1; done; exec "$@"'
    return ["sh", "-c", script, "sh", *map(str, command)]


def settle(name: str) -> None:
    """Version 2: put a node's first processes into a leaf, so that its cgroup may have others."""
    for one in hierarchies():
        if one.kind != "cgroup2" or not one.is_v2_alone:
            continue
        folder = one.folder / name
        (folder / INIT).mkdir(exist_ok=True)

        def moved(folder: Path = folder) -> bool:
            for pid in (folder / "cgroup.procs").read_text().split():
                with suppress(ProcessLookupError):
                    (folder / INIT / "cgroup.procs").write_text(pid)
            return not (folder / "cgroup.procs").read_text()

        until(f"the processes of {name} to be in its leaf", moved, _GONE_S)


def _folders(name: str) -> Iterator[Path]:
    for one in hierarchies():
        for folder, _, _ in os.walk(one.folder / name):
            yield Path(folder)


def _read_pids(folder: Path) -> list[int]:
    try:
        # 0 stands for a process of an outer pid namespace, which there is none of here.
        return [int(pid) for pid in (folder / "cgroup.procs").read_text().split()]
    except OSError:
        return []


def members(name: str) -> list[int]:
    """All processes in a cgroup and those below it."""
    return sorted({pid for folder in _folders(name) for pid in _read_pids(folder)})


def first_process(name: str) -> int | None:
    """The host's number of the node's process 1 once it is the init; None while there is none."""
    for one in hierarchies():
        for folder in (one.folder / name, one.folder / name / INIT):
            for pid in _read_pids(folder):
                with suppress(OSError, StopIteration):
                    status = Path(f"/proc/{pid}/status").read_text().splitlines()
                    spaces = next(line for line in status if line.startswith("NSpid:")).split()[1:]
                    if len(spaces) > 1 and spaces[-1] == "1" and status[0].endswith("\tcatatonit"):
                        return pid
    return None


def end_all(name: str) -> None:
    """End every process in a cgroup, frozen ones too, and wait until they are gone."""

    def ended() -> bool:
        # SIGKILL reaches a process frozen by version 1 only once it thaws.
        for folder in _folders(name):
            for file, word in (("freezer.state", "THAWED"), ("cgroup.freeze", "0")):
                if (folder / file).exists():
                    with suppress(OSError):
                        (folder / file).write_text(word)
        left = members(name)
        for pid in left:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not left

    until(f"the processes of {name} to end", ended, _GONE_S)


def remove(name: str) -> None:
    """Remove an empty cgroup and all below it."""

    def removed() -> bool:
        for folder in sorted(_folders(name), key=lambda one: len(one.parts), reverse=True):
            try:
                folder.rmdir()
            except FileNotFoundError:
                continue
            except OSError as problem:
                # A process that has just ended may still count.
                if problem.errno != errno.EBUSY:
                    raise
                return False
        return True

    until(f"cgroup {name} to be empty", removed, _GONE_S)


def named() -> set[str]:
    """The names of all nodes' cgroups on this machine."""
    return {
        folder.name
        for one in hierarchies()
        for folder in one.folder.iterdir()
        if NODE_NAME.fullmatch(folder.name) and folder.is_dir()
    }
