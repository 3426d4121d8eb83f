"""Points runc's state.json to a restored init, so that runc exec, kill, ps and update reach it.

Called by the daemon after each wake, and after each hibernation, when the keeper stands in for the init so
that limits can be updated. runc has no command for this; the format is its libcontainer state, of which
only the init's pid, its start time and the namespace paths name the process.
"""

from __future__ import annotations

import contextlib
import json
from pathlib import Path


def start_time(pid: int) -> int:
    """Field 22 of /proc/PID/stat (proc(5)): clock ticks after boot at which the process started."""
    stat = Path(f"/proc/{pid}/stat").read_text()
    return int(stat.rpartition(")")[2].split()[19])


def point_to(runtime_root: str, container: str, init: int, *, enterable: bool = True) -> None:
    """Rewrites the state file, atomically.

    A process that is not ``enterable`` stands in for the init where only its being alive counts: the
    namespaces stay those of the init that is gone, so that nobody can enter the stand-in's, the host's.

    Raises:
        OSError: the runtime has no such container, or the init has ended.
        ValueError: the file is not runc's.
    """
    file = Path(runtime_root) / container / "state.json"
    state = json.loads(file.read_text())
    state["init_process_pid"] = init
    state["init_process_start"] = start_time(init)
    spaces = state["namespace_paths"]
    for kind, path in spaces.items():
        if enterable and path.startswith("/proc/"):
            spaces[kind] = f"/proc/{init}/{path.split('/', 3)[3]}"
    fresh = file.with_suffix(".new")
    fresh.write_text(json.dumps(state, separators=(",", ":")))
    fresh.chmod(0o600)
    fresh.rename(file)


def is_being_created(container: str) -> bool:
    """Whether somebody is at creating it: runc, or who has started that (proc_pid_cmdline(5))."""
    name = container.encode()
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            words = file.read_bytes().split(b"\0")
            if b"create" in words and any(name in word for word in words):
                return True
    return False


def forget_start(runtime_root: str, container: str) -> None:
    """The container counts as started: takes away what its init would have waited for (exec.fifo)."""
    (Path(runtime_root) / container / "exec.fifo").unlink(missing_ok=True)
