"""Keeps a hibernated container's mounts alive on the host, so that CRIU need not save them.

Why: a mount namespace dies with its last process, and CRIU would pack each tmpfs into the image as a tar
archive. A clone of every mount (open_tree(2), move_mount(2)), made once before the first dump, keeps
contents and identity; CRIU then treats each as an external bind mount.

open_tree works in the caller's mount namespace only, and setns(2) to another one is for processes with
no threads: so this module runs as a program of its own (``python -m architect.adapters.mounts PID
DIRECTORY``), started by :func:`keep`.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import os
import socket
import stat
import sys
from pathlib import Path
from typing import Final

from architect.contract.errors import ArchitectError

_SYS_OPEN_TREE: Final = 428
_SYS_MOVE_MOUNT: Final = 429
_OPEN_TREE_CLONE: Final = 1
_MOVE_MOUNT_F_EMPTY_PATH: Final = 4
_CLONE_NEWNS: Final = 0x20000
_MNT_DETACH: Final = 2
_AT_FDCWD: Final = -100

_COPIED: Final = 1 << 20
"""Bytes of a bind-mounted file up to which its contents are copied, in case it is deleted."""

_MADE_BY_CRIU: Final = frozenset({"proc", "sysfs", "devpts", "mqueue"})
"""File systems that belong to the container's own namespaces; CRIU mounts them anew."""


class MountError(ArchitectError):
    """A mount of the container could not be kept."""


async def keep(pid: int, directory: Path) -> list[tuple[str, str]]:
    """Clones the mounts of ``pid`` below ``directory`` on the host.

    Returns (mount point in the container, path on the host) in mount order.

    Raises:
        MountError: the kernel refused one.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-m", "architect.adapters.mounts", str(pid), str(directory),
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    if process.returncode:
        raise MountError(
            what="the container's mounts cannot be kept",
            why=errors.decode(errors="replace").strip().rpartition("\n")[2],
            fix="see docs/troubleshooting.md, 'mounts'",
        )
    return [(point, kept) for point, kept in json.loads(output)]


def uncover_deleted(directory: Path) -> int:
    """Replaces kept files that were deleted on the host by copies; returns how many there were.

    Podman writes a pod's /etc/hosts and the like anew when the pod restarts. A mount of a deleted file
    cannot be mounted anywhere again, so the program gets the contents that it knew.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    uncovered = 0
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        words = line.split()
        if words[4].startswith(f"{directory}/") and words[3].endswith("//deleted"):
            uncovered += libc.umount2(words[4].encode(), _MNT_DETACH) == 0
    return uncovered


def release(directory: Path) -> None:
    """Unmounts and removes everything below ``directory``."""
    libc = ctypes.CDLL(None, use_errno=True)
    with contextlib.suppress(FileNotFoundError):
        # Backwards: a mount may lie on another's mount point.
        for place in sorted(directory.iterdir(), key=lambda path: int(path.name), reverse=True):
            libc.umount2(str(place).encode(), _MNT_DETACH)
            if place.is_dir():
                place.rmdir()
            else:
                place.unlink()
        directory.rmdir()


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _points(pid: int) -> list[str]:
    """Mount points of a process, without its root and what CRIU makes (proc(5), mountinfo)."""
    points = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        if point != "/" and right.split()[0] not in _MADE_BY_CRIU:
            points.append(point)
    return points


def _send_clones(pid: int, points: list[str], peer: socket.socket) -> None:
    """In a child, inside the container: opens a clone of each mount and passes it to the parent."""
    libc = ctypes.CDLL(None, use_errno=True)
    namespace = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY)
    root = os.open(f"/proc/{pid}/root", os.O_RDONLY)
    _check(libc.setns(namespace, _CLONE_NEWNS), "setns")
    os.fchdir(root)
    os.chroot(".")
    for point in points:
        flags = _OPEN_TREE_CLONE | os.O_CLOEXEC
        tree = libc.syscall(_SYS_OPEN_TREE, _AT_FDCWD, point.encode(), flags)
        _check(tree, f"open_tree {point}")
        socket.send_fds(peer, [b"t"], [tree])
        os.close(tree)
        peer.recv(1)


def _receive_clones(points: list[str], directory: Path, peer: socket.socket) -> list[list[str]]:
    libc = ctypes.CDLL(None, use_errno=True)
    kept = []
    directory.mkdir(parents=True, exist_ok=True)
    for number, point in enumerate(points):
        _, trees, _, _ = socket.recv_fds(peer, 1, 1)
        if not trees:
            raise OSError(f"no clone of {point} arrived")
        place = directory / str(number)
        found = os.fstat(trees[0])
        if stat.S_ISDIR(found.st_mode):
            place.mkdir(exist_ok=True)
        else:
            place.touch()
            if stat.S_ISREG(found.st_mode) and found.st_size <= _COPIED:
                # Beneath the mount, for uncover_deleted.
                place.write_bytes(Path(f"/proc/self/fd/{trees[0]}").read_bytes())
        moved = libc.syscall(
            _SYS_MOVE_MOUNT, trees[0], b"", _AT_FDCWD, str(place).encode(), _MOVE_MOUNT_F_EMPTY_PATH
        )
        _check(moved, f"move_mount {point}")
        os.close(trees[0])
        peer.send(b"k")
        kept.append([point, str(place)])
    return kept


def main() -> None:
    """Program: keeps the mounts of the pid in argv[1] below argv[2], prints them as JSON."""
    pid, directory = int(sys.argv[1]), Path(sys.argv[2])
    release(directory)
    points = _points(pid)
    ours, theirs = socket.socketpair()
    child = os.fork()
    if child == 0:
        ours.close()
        try:
            _send_clones(pid, points, theirs)
        except OSError as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    theirs.close()
    try:
        kept = _receive_clones(points, directory, ours)
    finally:
        os.waitpid(child, 0)
    print(json.dumps(kept))


if __name__ == "__main__":
    main()
