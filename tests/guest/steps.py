"""What the programs that run inside a guest share: words, waits, steps, evidence.

Emulated code is some ten times slower: deadlines are for a hung machine, and no time is judged.
Imported by core_path.py and node_path.py in a guest; it has the standard library only.
"""

from __future__ import annotations

import select
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from bench import valkey

DEADLINE_S: Final = 300.0
"""For anything that is waited for."""

HIBERNATED_BYTES: Final = 400 << 10
"""What a hibernated container's cgroup may hold: the keeper, and what the kernel counts late."""

RESULTS: Final = Path("/results")
"""What is left there is handed to the test (guest.py)."""

LIMITS: Final = ("cpu.max", "memory.max", "pids.max")
"""Files of a cgroup that a wake may lift for a moment and must put back."""

SEEN_INSIDE: Final = ("cgroup", "limits", "oom_score_adj", "status", "mountinfo", "attr/current")
"""Files of /proc/1 with what a program sees of itself and a restore must not change."""

_MOMENTARY: Final = ("FDSize", "Hugetlb", "Rss", "SigQ", "State", "Vm", "nonvoluntary", "voluntary")
"""Beginnings of lines in /proc/1/status that tell of a moment (proc_pid_status(5))."""

_FAILURES: Final = (OSError, ValueError, KeyError, subprocess.TimeoutExpired)

T = TypeVar("T")
_BEGAN: Final = time.monotonic()


class Failed(Exception):
    """A step did not hold."""


def say(text: str) -> None:
    """One line on the guest's output."""
    print(f"[{time.monotonic() - _BEGAN:6.1f} s] {text}", flush=True)


def require(holds: object, what: str) -> None:
    """Raise Failed unless a statement holds."""
    if not holds:
        raise Failed(what)


def until(condition: Callable[[], T], what: str) -> T:
    """Wait for a condition's first true value; Failed says what was waited for."""
    end = time.monotonic() + DEADLINE_S
    while not (value := condition()):
        if time.monotonic() > end:
            raise Failed(f"after {DEADLINE_S:.0f} s still waiting for {what}")
        select.select([], [], [], 0.1)
    return value


def run(*words: str | Path) -> str:
    """Run a command that has to succeed; return what it printed."""
    done = subprocess.run(
        words,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=DEADLINE_S,
        check=False,
    )
    if done.returncode:
        said = "\n".join((done.stdout, done.stderr)).strip()
        raise Failed(f"{' '.join(map(str, words))}: exit {done.returncode}: {said}")
    return done.stdout.strip()


def connect(port: int, host: str = "127.0.0.1") -> valkey.Valkey:
    """Connect, once the server answers."""

    def answers() -> valkey.Valkey | None:
        try:
            client = valkey.Valkey(host, port, DEADLINE_S)
            client("PING")
        except (OSError, ValueError):
            return None
        return client

    return until(answers, f"valkey at {host}:{port}")  # type: ignore[return-value]


class Kept:
    """A managed container as its cgroup shows it; who inherits says which that is."""

    __slots__ = ()

    keeper: int
    """Its keeper's pid."""
    group: Path
    """Directory of its cgroup."""

    def processes(self) -> list[int]:
        """Host pids of what runs in it."""
        return [int(pid) for pid in (self.group / "cgroup.procs").read_text().split()]

    def vanished(self) -> bool:
        """Whether nothing runs in it but the keeper."""
        return self.processes() == [self.keeper]

    def memory(self) -> int:
        """Bytes charged to it."""
        return int((self.group / "memory.current").read_text())


def lasting(seen: Mapping[str, str], group: Path) -> dict[str, list[str]]:
    """Of the texts of SEEN_INSIDE, and of a cgroup's limits, what a wake must not change."""
    lines = {name: text.splitlines() for name, text in seen.items()}
    lines["status"] = [line for line in lines["status"] if not line.startswith(_MOMENTARY)]
    lines["its limits"] = [f"{name}: {(group / name).read_text().strip()}" for name in LIMITS]
    # Without the ids, which each new mount gets: proc_pid_mountinfo(5).
    lines["mountinfo"] = sorted(
        " ".join([*line.split()[3:6], line.partition(" - ")[2].split()[0]])
        for line in lines["mountinfo"]
    )
    return lines


@contextmanager
def step(what: str) -> Iterator[None]:
    """Announce a step, and say in a failure which it was."""
    say(what)
    try:
        yield
    except (Failed, *_FAILURES) as error:
        raise Failed(f"{what}: {type(error).__name__}: {error}") from error


def _leave_evidence(commands: Mapping[str, Sequence[str]], roots: Sequence[Path]) -> None:
    for name, words in commands.items():
        with (RESULTS / name).open("wb") as file:
            subprocess.run(words, stdout=file, stderr=file, timeout=DEADLINE_S, check=False)
    for root in roots:
        logs = [*root.rglob("*.log"), *root.rglob("*.json"), *root.rglob("events.jsonl")]
        for log in logs:
            if log.is_file() and "/mnt/" not in str(log):
                shutil.copyfile(log, RESULTS / str(log).strip("/").replace("/", "_"))


def judged(
    path: Callable[[], Any], commands: Mapping[str, Sequence[str]], roots: Sequence[Path]
) -> int:
    """Go a path; the program's exit status.

    If it fails, what is needed to find out why is left: what the commands say, by file name, who is
    where, and the logs below the folders.
    """
    common = {
        "dmesg": ["dmesg"],
        "processes": ["ps", "-eo", "pid,ppid,stat,wchan:20,cgroup:90,args"],
        "rules": ["nft", "list", "ruleset"],
    }
    try:
        path()
    except Exception as error:
        traceback.print_exc(file=sys.stdout)
        say(f"FAILED: {error}")
        _leave_evidence({**common, **commands}, roots)
        return 1
    say("everything held")
    return 0
