"""Keeps the daemon's memory small: glibc's heap gives back what it would keep (mallopt(3), malloc_trim(3)).

Why: sixty containers that hibernate together leave a heap that is twice as large as what is used, and one
heap for each thread. Called by the daemon. Another C library has neither function: then nothing is done.
"""

from __future__ import annotations

import ctypes
from typing import Final

_M_ARENA_MAX: Final = -8

_libc = ctypes.CDLL(None)


def share_one() -> None:
    """All threads allocate from one heap: they take turns anyway. To be called before there are any."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(_M_ARENA_MAX, 1)


def trim() -> None:
    """Gives unused pages back; takes a millisecond or two."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
