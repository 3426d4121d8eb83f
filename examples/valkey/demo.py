"""The demo: a valkey full of data, with a client connected, vanishes and comes back.

Run by `make demo`, as root, after `make install image-valkey`. Plays pod.yaml with Podman, watches it
hibernate by itself, asks on the connection that stayed open, compares all data, prints what was measured,
and leaves nothing behind. Exit status 0 only if every step was seen to hold.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bench import valkey

POD = Path(__file__).with_name("pod.yaml")
PORT = 6379
MEGABYTES = 100
CYCLES = 10
ARCHITECT = "/usr/local/bin/architect"


class Failed(Exception):
    """A step did not hold."""


def run(*words: str, timeout_s: float = 120) -> str:
    """A command's output."""
    done = subprocess.run(words, capture_output=True, text=True, timeout=timeout_s, check=False)
    if done.returncode:
        raise Failed(f"{' '.join(words)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def row() -> dict[str, Any]:
    """The pod's line in `architect ps`."""
    rows = [row for row in json.loads(run(ARCHITECT, "ps", "-o", "json")) if row["pod"] == "valkey"]
    if not rows:
        raise Failed("architect ps does not list the pod")
    return dict(rows[0])


def cgroup(container: str) -> Path:
    """The container's cgroup directory (memory, under version 1)."""
    pid = run("podman", "inspect", "-f", "{{.State.Pid}}", container).strip()
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            return Path("/sys/fs/cgroup/memory") / path.lstrip("/")
        if not controllers and Path("/sys/fs/cgroup/cgroup.controllers").exists():
            return Path("/sys/fs/cgroup") / path.lstrip("/")
    raise Failed("the container has no memory cgroup")


def memory(group: Path) -> int:
    """Bytes charged to the container."""
    for name in ("memory.current", "memory.usage_in_bytes"):
        if (group / name).exists():
            return int((group / name).read_text())
    raise Failed(f"{group} says nothing of memory")


def programs(group: Path) -> list[str]:
    """Names of the processes in the container, without the keeper."""
    names = []
    for pid in (group / "cgroup.procs").read_text().split():
        try:
            names.append(Path(f"/proc/{pid}/comm").read_text().strip())
        except OSError:
            continue
    return [name for name in names if not name.startswith("architect-keep")]


def wait_for_state(state: str, deadline_s: float) -> dict[str, Any]:
    """Waits until the container is in that state."""
    end = time.monotonic() + deadline_s
    while time.monotonic() < end:
        found = row()
        if found["state"] == state:
            return found
        time.sleep(0.2)
    raise Failed(f"the container was not {state} within {deadline_s:.0f} s; it is {found['state']}")


def say(text: str) -> None:
    """A step, with the time since the beginning."""
    print(f"[{time.monotonic() - BEGAN:5.1f} s] {text}", flush=True)


def show(rows: list[tuple[str, str, str, str]]) -> None:
    """A table of four columns."""
    widths = [max(len(line[column]) for line in rows) for column in range(4)]
    print()
    for number, line in enumerate(rows):
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  " + "   ".join(cells))
        if number == 0:
            print("  " + "-" * (sum(widths) + 9))
    print()


def timed(client: valkey.Valkey, *words: str | int) -> tuple[float, valkey.Reply]:
    """Milliseconds until the reply, and the reply."""
    start = time.perf_counter()
    reply = client(*words)
    return (time.perf_counter() - start) * 1000, reply


def demo() -> None:
    """The steps; raises Failed at the first that does not hold."""
    say("podman --runtime runc-architect kube play examples/valkey/pod.yaml")
    run("podman", "--runtime", "runc-architect", "kube", "play", str(POD))
    client = connect()
    say(f"a client connects and writes {MEGABYTES} MB")
    keys = valkey.fill(client, MEGABYTES)
    group = cgroup("valkey-valkey")
    before, running = memory(group), programs(group)
    warm = statistics.median(timed(client, "GET", f"key:{key}")[0] for key in range(200))
    if not running:
        raise Failed("no program was seen in the container's cgroup")

    say("nothing is asked for ten seconds; the client stays connected")
    asleep = wait_for_state("SCALED_DOWN", 60)
    while_asleep, left = memory(group), programs(group)
    if left:
        raise Failed(f"still running while hibernated: {', '.join(left)}")
    status = run(
        "podman", "ps", "--filter", "name=valkey-valkey", "--format", "{{.Status}}"
    ).strip()
    if not status.startswith("Up"):
        raise Failed(f"podman says {status!r} of the hibernated container")
    say(f"it has vanished: no process, {while_asleep / 1000:.0f} KB; podman says: {status}")

    first, reply = timed(client, "GET", "key:7")
    if reply != valkey.value(7):
        raise Failed("the first answer after the wake is wrong")
    say(f"the client asks on the connection it had, and is answered in {first:.1f} ms")
    bad = valkey.wrong(client, keys)
    if bad:
        raise Failed(f"{bad} of {keys} values are not what was written")
    say(f"all {keys} values are what was written")
    after = memory(group)

    say(f"{CYCLES} times more, hibernated by command")
    answers, downs = [], [asleep["last_scale_down_ms"]]
    for count in range(1, CYCLES + 1):
        run(ARCHITECT, "sleep", "valkey")
        took, reply = timed(client, "INCR", "count")
        if reply != count:
            raise Failed(f"the counter is {reply!r} after {count} increments")
        answers.append(took)
        downs.append(wait_for_state("RUNNING", 10)["last_scale_down_ms"])
    client.close()
    slow = max([first, *answers])
    middle = statistics.median([first, *answers])
    disk = asleep["checkpoint_bytes"]
    show(
        [
            ("", "before", "hibernated", "after"),
            ("processes", str(len(running)), str(len(left)), str(len(programs(group)))),
            ("memory (cgroup)", mega(before), mega(while_asleep), mega(after)),
            ("checkpoint on disk", "-", mega(disk), "-"),
            ("answer, awake (median)", f"{warm:.2f} ms", "", ""),
            ("answer that wakes (median)", "", f"{middle:.1f} ms", ""),
            ("answer that wakes (slowest)", "", f"{slow:.1f} ms", ""),
            ("hibernation (median)", "", f"{statistics.median(downs):.0f} ms", ""),
            ("wakes / connections lost / wrong values", "", f"{len(answers) + 1} / 0 / 0", ""),
        ]
    )


def mega(size: int) -> str:
    """A size as people read it."""
    return f"{size / 1e6:.1f} MB" if size >= 1e6 else f"{size / 1e3:.0f} KB"


def connect() -> valkey.Valkey:
    """A connection, once the server answers."""
    end = time.monotonic() + 20
    while True:
        try:
            client = valkey.Valkey("127.0.0.1", PORT)
            client("PING")
        except (OSError, ValueError) as error:
            if time.monotonic() > end:
                raise Failed(f"valkey does not answer at port {PORT}: {error}") from error
            time.sleep(0.05)
        else:
            return client


def main() -> int:
    """Program."""
    if "valkey" in run("podman", "pod", "ls", "--format", "{{.Name}}").split():
        print("demo: there is a pod named valkey already; remove it first", file=sys.stderr)
        return 1
    ours = subprocess.run([ARCHITECT, "ps"], capture_output=True, check=False).returncode != 0
    try:
        if ours:
            say("architect up")
            run(ARCHITECT, "up")
        demo()
    except (Failed, OSError, subprocess.TimeoutExpired) as error:
        print(f"demo: FAILED: {error}", file=sys.stderr)
        return 1
    finally:
        subprocess.run(
            ["podman", "kube", "down", str(POD)], capture_output=True, check=False, timeout=60
        )
        if ours:
            subprocess.run([ARCHITECT, "down"], capture_output=True, check=False, timeout=60)
    say("everything held; the pod is removed")
    return 0


BEGAN = time.monotonic()

if __name__ == "__main__":
    sys.exit(main())
