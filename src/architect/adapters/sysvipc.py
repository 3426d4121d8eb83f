"""System V IPC objects of a hibernated container (sysvipc(7)).

Why: the IPC namespace outlives the program (the keeper holds it), and CRIU makes every object in it anew at
restore, which fails with "File exists" as long as the old ones are there. Their contents are in the
checkpoint. Called by the daemon after a dump, at its start, and before it tries a failed wake again.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Final

_CLONE_NEWIPC: Final = 0x08000000
_IPC_RMID: Final = 0


@contextlib.contextmanager
def _inside(pid: int) -> Iterator[ctypes.CDLL]:
    """In the IPC namespace of ``pid``, with the calling thread only (setns(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    own = os.open("/proc/self/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    other = os.open(f"/proc/{pid}/ns/ipc", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(other, _CLONE_NEWIPC):
            raise OSError(ctypes.get_errno(), "setns to the container's IPC namespace")
        try:
            yield libc
        finally:
            libc.setns(own, _CLONE_NEWIPC)
    finally:
        os.close(own)
        os.close(other)


def _ids(kind: str) -> list[int]:
    """Identifiers of the present namespace's objects of one kind: shm, sem or msg."""
    rows = Path(f"/proc/sysvipc/{kind}").read_text().splitlines()[1:]
    return [int(row.split()[1]) for row in rows]


def objects(pid: int) -> int:
    """How many objects the IPC namespace of ``pid`` has."""
    with _inside(pid):
        return sum(len(_ids(kind)) for kind in ("shm", "sem", "msg"))


def neighbours(pid: int, own: Collection[int], sandbox: str) -> list[int]:
    """Processes of the same IPC namespace that are neither ``own`` nor the pod's sandbox container.

    The sandbox is known by its id, which is part of its cgroup's name; it makes no objects.
    """
    namespace = Path(f"/proc/{pid}/ns/ipc").readlink()
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (folder / "ns/ipc").readlink() != namespace or int(folder.name) in own:
                continue
            if not sandbox or sandbox not in (folder / "cgroup").read_text():
                found.append(int(folder.name))
    return found


def remove_all(pid: int) -> int:
    """Removes every object of the IPC namespace of ``pid``; returns how many there were."""
    removed = 0
    with _inside(pid) as libc:
        for number in _ids("shm"):
            removed += libc.shmctl(number, _IPC_RMID, None) == 0
        for number in _ids("sem"):
            removed += libc.semctl(number, 0, _IPC_RMID, 0) == 0
        for number in _ids("msg"):
            removed += libc.msgctl(number, _IPC_RMID, None) == 0
    return removed
