"""What all benchmarks share: containers, the command line, statistics, results.

Results go to bench/results/*.jsonl, one object a line: ``name``, ``subject``, ``workload``, ``n`` and either
``p50_ms`` and ``p99_ms`` or ``value`` and ``unit``.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.valkey import Valkey

PREFIX = "architect.loopholelabs.io"
ARCHITECT = "/usr/local/bin/architect"
IMAGE = "localhost/valkey:8"
RESULTS = Path(__file__).with_name("results")
SERVER = ("valkey-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no")


def run(words: Sequence[str], timeout_s: float = 300, env: dict[str, str] | None = None) -> str:
    """A command's output; its error output is in the exception if it fails."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        timeout=timeout_s,
        check=False,
        stdin=subprocess.DEVNULL,
        env={**os.environ, **(env or {})},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def row(pod: str) -> dict[str, Any]:
    """The pod's line of `architect ps`."""
    rows = json.loads(run([ARCHITECT, "ps", "-o", "json"]))
    return next(row for row in rows if row["pod"] == pod)


def sleep(pod: str) -> dict[str, Any]:
    """Hibernates a pod's container; again if a packet of the last wake came in between."""
    for attempt in range(5):
        try:
            rows = json.loads(run([ARCHITECT, "sleep", pod, "-o", "json"]))
            return dict(rows[0])
        except RuntimeError:
            if attempt == 4:
                raise
    raise AssertionError


@contextlib.contextmanager
def container(
    name: str,
    port: int,
    *,
    managed: bool = True,
    idle: str = "1h",
    image: str = IMAGE,
    command: Sequence[str] = SERVER,
    flags: Sequence[str] = (),
) -> Iterator[str]:
    """A container with a published port; managed by architect or plain runc's. Gives its id."""
    words = ["podman", "--runtime", "runc-architect" if managed else "runc", "run", "-d"]
    words += ["--name", name, "-p", f"127.0.0.1:{port}:6379", *flags]
    if managed:
        annotations = {
            "managed-containers": json.dumps([name]),
            "scaledown-durations": json.dumps({name: idle}),
            "network-monitor": json.dumps({name: "packets"}),
        }
        for key, value in annotations.items():
            words += ["--annotation", podman_value(f"{PREFIX}/{key}={value}")]
    try:
        yield run([*words, image, *command]).strip()
    finally:
        subprocess.run(
            ["podman", "rm", "-f", "-t", "0", name], capture_output=True, check=False, timeout=60
        )


@functools.cache
def podman_major() -> int:
    """The major version of Podman."""
    return int(run(["podman", "version", "-f", "{{.Client.Version}}"]).split(".")[0])


def podman_value(text: str) -> str:
    """An option's value as this Podman wants it: before version 5 it is read as a line of CSV."""
    if podman_major() >= 5:
        return text
    quoted = text.replace('"', '""')
    return f'"{quoted}"'


def connect(port: int, deadline_s: float = 20) -> Valkey:
    """A connection to a server that may still be starting."""
    end = time.monotonic() + deadline_s
    while True:
        try:
            client = Valkey("127.0.0.1", port)
            client("PING")
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(0.002)
        else:
            return client


def memory_cgroup(container_id: str) -> Path:
    """The container's memory cgroup, or its only one."""
    pid = run(["podman", "inspect", "-f", "{{.State.Pid}}", container_id]).strip()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
    return Path("/sys/fs/cgroup") / path.lstrip("/")


def memory_bytes(group: Path) -> int:
    """Bytes charged to a cgroup."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        if (group / name).exists():
            return int((group / name).read_text())
    raise RuntimeError(f"{group} says nothing of memory")


def drop_caches() -> None:
    """Takes everything clean out of the page cache (proc(5))."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("3")


@dataclass
class Samples:
    """Durations of one subject doing one thing."""

    name: str
    subject: str
    workload: str
    ms: list[float] = field(default_factory=list)

    @contextlib.contextmanager
    def timed(self) -> Iterator[None]:
        """Adds the duration of its body."""
        start = time.perf_counter()
        yield
        self.ms.append((time.perf_counter() - start) * 1000)

    def percentile(self, share: float) -> float:
        """The sample below which that share of them lies (nearest rank)."""
        ordered = sorted(self.ms)
        return ordered[min(len(ordered) - 1, int(len(ordered) * share))]

    def record(self) -> dict[str, Any]:
        """A line of the results."""
        return {
            "name": self.name,
            "subject": self.subject,
            "workload": self.workload,
            "n": len(self.ms),
            "p50_ms": round(statistics.median(self.ms), 2),
            "p99_ms": round(self.percentile(0.99), 2),
            "min_ms": round(min(self.ms), 2),
            "max_ms": round(max(self.ms), 2),
        }


def figure(
    name: str, subject: str, workload: str, value: float, unit: str, n: int
) -> dict[str, Any]:
    """A line of the results that is not a duration."""
    return {
        "name": name,
        "subject": subject,
        "workload": workload,
        "n": n,
        "value": round(value, 3),
        "unit": unit,
    }
