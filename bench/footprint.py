"""What hibernation leaves, and what the daemon costs."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench import harness, valkey

PORT = 16600
CONTAINERS = 20


def left_in_cgroup(n: int) -> list[dict[str, Any]]:
    """Memory charged to a hibernated container, its keeper included; and what it was awake."""
    asleep, awake = [], 0
    with harness.container("bench-left", PORT) as container:
        client = harness.connect(PORT)
        valkey.fill(client, 50)
        group = harness.memory_cgroup(container)
        awake = harness.memory_bytes(group)
        for _ in range(n):
            harness.sleep("bench-left")
            asleep.append(settled(group))
            client("PING")
        client.close()
    asleep.sort()
    workload = "valkey 50 MB"
    return [
        harness.figure("memory awake", "architect", workload, awake / 1e6, "MB", 1),
        harness.figure(
            "memory hibernated", "architect", workload, asleep[len(asleep) // 2] / 1e3, "KB", n
        ),
    ]


def settled(group: Path) -> int:
    """The cgroup's memory once it no longer falls: the kernel uncharges behind a program's end."""
    lowest = harness.memory_bytes(group)
    end = time.monotonic() + 2
    while time.monotonic() < end:
        time.sleep(0.05)
        lowest = min(lowest, harness.memory_bytes(group))
    return lowest


def daemon(seconds: float) -> list[dict[str, Any]]:
    """architectd's memory and CPU with managed idle containers, awake and then hibernated."""
    pid = daemon_pid()
    results = []
    with contextlib.ExitStack() as stack:
        names = [f"bench-idle-{number}" for number in range(CONTAINERS)]
        for number, name in enumerate(names):
            stack.enter_context(harness.container(name, PORT + 1 + number, idle="5m"))
        for what in ("awake, idle clocks running", "hibernated"):
            if what == "hibernated":
                for name in names:
                    harness.sleep(name)
            time.sleep(3)  # what starting and hibernating them left to do
            before = cpu_s(pid)
            time.sleep(seconds)
            share = (cpu_s(pid) - before) / seconds * 100
            workload = f"{CONTAINERS} containers {what}"
            results.append(harness.figure("daemon CPU", "architectd", workload, share, "%", 1))
            results.append(
                harness.figure("daemon RSS", "architectd", workload, rss_mb(pid), "MB", 1)
            )
    return results


def daemon_pid() -> int:
    """The pid of architectd."""
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                words = (entry / "cmdline").read_bytes().split(b"\0")
                if any(b"architectd" in word for word in words[1:4]) and b"python" in words[0]:
                    return int(entry.name)
    raise RuntimeError("architectd does not run")


def cpu_s(pid: int) -> float:
    """Seconds of CPU that a process has used (proc(5), utime and stime)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1000
    raise RuntimeError(f"no such process: {pid}")


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """The benchmarks of this module."""
    return [lambda: left_in_cgroup(3 if quick else 7), lambda: daemon(10 if quick else 20)]
