"""Keeps at hand what a program's own files must have in the page cache when it wakes.

Why: a hibernated container's cgroup is emptied, and with it goes the page cache of the program's binary and
libraries, which that cgroup was charged with. A wake then waits for the disk, a page fault at a time. So the
pages that were cached before are noted, read back once the cgroup is empty (as ordinary page cache, which
the kernel takes away first when it needs memory, and which all containers of an image share), and asked for
once more when a wake begins, in case they are gone. Called by the daemon.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

_PAGE: Final = 4096
_GAP: Final = 16
"""Pages between two cached ones that are cheaper to read than to ask for separately."""
_MOST: Final = 32 << 20
"""Bytes noted for one container at the most."""
_MAP_FAILED: Final = ctypes.c_void_p(-1).value

Extents = list[tuple[str, list[tuple[int, int]]]]
"""(path on the host, [(offset, length in bytes)])."""


def cached_extents(pid: int, rootfs: str) -> Extents:
    """What the page cache has of the files that ``pid`` has mapped, by their paths below ``rootfs``.

    Files that are not there (volumes, deleted ones) are left out: they are merely read when needed.
    """
    found: Extents = []
    room = _MOST
    for name in _mapped_files(pid):
        path = f"{rootfs}{name}"
        with contextlib.suppress(OSError):
            extents = list(_cached(path))
            size = sum(length for _, length in extents)
            if extents and size <= room:
                room -= size
                found.append((path, extents))
    return found


def read_back(files: Sequence[tuple[str, Sequence[tuple[int, int]]]]) -> None:
    """Has the kernel read the extents into the page cache; does not wait for the disk."""
    for path, extents in files:
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                for offset, length in extents:
                    os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_WILLNEED)
            finally:
                os.close(descriptor)


def _mapped_files(pid: int) -> list[str]:
    """Paths, in the container, of the regular files that a process has mapped (proc(5), maps)."""
    names: dict[str, None] = {}
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
            words = line.split(maxsplit=5)
            if len(words) == 6 and words[5].startswith("/") and not words[5].endswith(" (deleted)"):
                names[words[5]] = None
    return list(names)


def _cached(path: str) -> Iterator[tuple[int, int]]:
    """Extents of a file that the page cache has (mincore(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    words = [ctypes.c_int] * 3
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *words, ctypes.c_long]
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        size = os.fstat(descriptor).st_size
        if not size:
            return
        # PROT_READ is 1, MAP_SHARED is 1.
        address = libc.mmap(None, size, 1, 1, descriptor, 0)
    finally:
        os.close(descriptor)
    if address == _MAP_FAILED:
        return
    pages = -(-size // _PAGE)
    resident = (ctypes.c_ubyte * pages)()
    where = ctypes.c_void_p(address)
    failed = libc.mincore(where, ctypes.c_size_t(size), resident)
    libc.munmap(where, ctypes.c_size_t(size))
    if not failed:
        yield from _runs(bytes(resident))


def _runs(resident: bytes) -> Iterator[tuple[int, int]]:
    """Extents of resident pages, small gaps included."""
    start = last = -1
    for page, state in enumerate(resident):
        if not state & 1:
            continue
        if start >= 0 and page - last > _GAP:
            yield start * _PAGE, (last - start + 1) * _PAGE
            start = page
        elif start < 0:
            start = page
        last = page
    if start >= 0:
        yield start * _PAGE, (last - start + 1) * _PAGE
