"""One limit on the rate of all moves to a node, shared fairly between them. Made once by the daemon."""

from __future__ import annotations

import threading
import time
from typing import Final

_SLACK_S: Final = 0.05
"""Seconds of the rate that may be used up at once after a pause."""
_LARGEST: Final = 256 << 10
_SMALLEST: Final = 16 << 10
_STEP_S: Final = 0.02


class RateLimit:
    """At most ``rate`` bytes a second over all members; each that is busy gets as much as another."""

    def __init__(self, rate: int) -> None:
        if rate <= 0:
            raise ValueError("a rate is more than 0 bytes/s")
        self.rate = rate
        self.piece = max(_SMALLEST, min(_LARGEST, int(rate * _STEP_S)))
        """Bytes a member takes at a time: equal pieces make equal shares."""
        self._lock = threading.Lock()
        self._free = 0.0
        """When (time.monotonic) all that was taken is paid for."""

    def reserve(self, count: int) -> float:
        """Takes ``count`` bytes; gives the seconds to wait before they may be used."""
        with self._lock:
            now = time.monotonic()
            begin = max(self._free, now - _SLACK_S)
            self._free = begin + count / self.rate
            return max(0.0, begin - now)


class Member:
    """A move under a limit. Its threads wait one after the other, so more of them get no more."""

    def __init__(self, limit: RateLimit, ended: threading.Event) -> None:
        self._limit = limit
        self._ended = ended
        self._turn = threading.Lock()

    @property
    def piece(self) -> int:
        """Bytes to take at a time."""
        return self._limit.piece

    def take(self, count: int) -> None:
        """Waits until ``count`` bytes may be received, or the move is ended."""
        with self._turn:
            if wait := self._limit.reserve(count):
                self._ended.wait(wait)
