"""The run directory: a file system of its own, made when it is first needed, gone when nothing needs it.

Why: kept mounts, pinned maps and CRIU in memory are mounted below it, and must not spread into the mount
namespaces of others, nor into copies of the whole tree that pods with a hostPath volume of / get: these
would keep busy what is unmounted here. And what a wake writes there must not wait for a disk, which /run
is on some machines.

Called by the daemon at its start and end, and by the door before it writes a container's record.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from architect.contract import paths
from architect.contract.errors import ArchitectError

_MS_BIND: Final = 1 << 12
_MS_UNBINDABLE: Final = 1 << 17
_OPTIONS: Final = "size=64m,mode=0755"
_MOUNTED: Final = (paths.HOT, paths.BPF, paths.RUN)
"""What this program mounts, innermost first."""

_libc = ctypes.CDLL(None, use_errno=True)


class RunError(ArchitectError):
    """The run directory cannot be made."""


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Makes the run directory if it is not there, and keeps it from being taken away meanwhile.

    Raises:
        RunError: a mount failed.
        OSError: a folder cannot be made.
    """
    with _lock():
        paths.RUN.mkdir(mode=0o755, parents=True, exist_ok=True)
        if not is_mount_point(paths.RUN):
            if paths.CONTAINERS.exists():
                # Containers of an earlier version, whose records a new file system would hide.
                _mount(str(paths.RUN), paths.RUN, "", _MS_BIND, "")
            else:
                _mount("tmpfs", paths.RUN, "tmpfs", 0, _OPTIONS)
            _mount("none", paths.RUN, "", _MS_UNBINDABLE, "")
        paths.CONTAINERS.mkdir(mode=0o700, exist_ok=True)
        yield


def release() -> bool:
    """Takes the run directory away unless a daemon runs or a container is managed; whether it did."""
    with _lock(), contextlib.suppress(OSError), paths.DAEMON_LOCK.open("a") as daemon:
        fcntl.flock(daemon, fcntl.LOCK_EX | fcntl.LOCK_NB)
        paths.CONTAINERS.rmdir()  # Refused while a container's folder is in it.
        for place in _MOUNTED:
            if is_mount_point(place):
                _libc.umount2(os.fsencode(place), 0)
        if is_mount_point(paths.RUN):
            paths.CONTAINERS.mkdir(mode=0o700, exist_ok=True)
            return False
        with contextlib.suppress(OSError):
            paths.RUN.rmdir()
        return True
    return False


def mount_tmpfs(place: Path, options: str) -> None:
    """Mounts a tmpfs (tmpfs(5)) on ``place``, made if needed.

    Raises:
        RunError: the kernel refused.
    """
    place.mkdir(parents=True, exist_ok=True)
    _mount("tmpfs", place, "tmpfs", 0, options)


def is_mount_point(place: Path) -> bool:
    """Path.is_mount compares devices and does not see a bind mount of the same file system."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(place) for line in lines)


@contextlib.contextmanager
def _lock() -> Iterator[None]:
    paths.STATE.mkdir(mode=0o755, parents=True, exist_ok=True)
    with paths.RUN_LOCK.open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mount(source: str, place: Path, kind: str, flags: int, options: str) -> None:
    words = (os.fsencode(word) or None for word in (source, place, kind))
    if _libc.mount(*words, ctypes.c_ulong(flags), options.encode() or None):
        code = ctypes.get_errno()
        raise RunError(f"{place} cannot be mounted", os.strerror(code), "run as root")
