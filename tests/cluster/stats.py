"""What the cluster's programs use: memory, and CPU over some seconds. Called by the command line."""

import os
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster import cgroups, machine
from tests.cluster.cluster import Cluster
from tests.cluster.settings import node_name

_TICK_HZ: Final = os.sysconf("SC_CLK_TCK")
_PAGE: Final = os.sysconf("SC_PAGE_SIZE")


@dataclass(frozen=True, slots=True)
class Usage:
    """What all processes of one program of one node (or of the control plane) use."""

    name: str
    processes: int
    rss: int
    """Bytes; pages that several processes share count for each (proc_pid_statm(5))."""
    cpu: float
    """Share of one processor."""


def _ticks(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            total += int(fields[11]) + int(fields[12])
    return total


def _resident(pids: list[int]) -> int:
    total = 0
    for pid in pids:
        with suppress(OSError):
            total += int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * _PAGE
    return total


def _processes(cluster: Cluster) -> Iterator[tuple[str, int]]:
    inside = set()
    for number in cluster.nodes_up():
        for pid in cgroups.members(node_name(number)):
            inside.add(pid)
            with suppress(OSError):
                name = Path(f"/proc/{pid}/comm").read_text().strip()
                yield f"{node_name(number)} {name}", pid
    for pid, name in machine.marked(cluster.home).items():
        if pid not in inside:
            yield name, pid


def measure(cluster: Cluster, seconds: float) -> list[Usage]:
    """What is used now, CPU as the mean of that many seconds from now on."""
    watched: dict[str, list[int]] = {}
    for name, pid in _processes(cluster):
        watched.setdefault(name, []).append(pid)
    before = {name: _ticks(pids) for name, pids in watched.items()}
    begin = time.monotonic()
    time.sleep(seconds)
    passed = time.monotonic() - begin
    return [
        Usage(name, len(pids), _resident(pids), (_ticks(pids) - before[name]) / _TICK_HZ / passed)
        for name, pids in sorted(watched.items())
    ]


def table(found: list[Usage]) -> str:
    """The usages as lines, with their sum."""
    total = Usage(
        "all",
        sum(one.processes for one in found),
        sum(one.rss for one in found),
        sum(one.cpu for one in found),
    )
    return "\n".join(
        f"{one.name:30} {one.processes:4} processes {one.rss / 2**20:8.1f} MiB"
        f" {one.cpu * 100:6.2f} % of a processor"
        for one in (*found, total)
    )
