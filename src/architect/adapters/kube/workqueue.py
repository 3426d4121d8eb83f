"""A queue of keys to look at: each at most once at a time, failures again later and ever later.

Used by the control plane between its informers, which only say that something changed, and its workers,
which take as long as the API server does. As k8s.io/client-go/util/workqueue: a key that is added while it
is waiting is there once; added while it is worked on, it comes again afterwards.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, slots=True)
class Pace:
    """Delays after failures of one key; seconds."""

    first_s: float = 0.05
    longest_s: float = 60.0
    """client-go has 1000 s; a repair of ours should not wait that long once the API server is back."""


class WorkQueue:
    """Keys to look at. All calls from one event loop."""

    def __init__(self, pace: Pace | None = None, chance: random.Random | None = None) -> None:
        self._pace: Final = pace or Pace()
        self._random = chance or random.Random()
        self._ready: asyncio.Queue[str] = asyncio.Queue()
        self._waiting: set[str] = set()
        self._busy: set[str] = set()
        self._again: set[str] = set()
        self._failures: dict[str, int] = {}
        self._due: dict[str, float] = {}
        self._heap: list[tuple[float, int, str]] = []
        self._count = itertools.count()
        self._timer: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        """Keys that are ready to be worked on."""
        return self._ready.qsize()

    @property
    def delayed(self) -> int:
        """Keys that will be ready later."""
        return len(self._due)

    def add(self, key: str) -> None:
        """Has a key looked at as soon as a worker is free."""
        if key in self._busy:
            self._again.add(key)
        elif key not in self._waiting:
            self._waiting.add(key)
            self._ready.put_nowait(key)

    def add_after(self, key: str, delay_s: float) -> None:
        """Has a key looked at in ``delay_s``, or earlier if that has been asked for before."""
        if delay_s <= 0:
            self.add(key)
            return
        due = asyncio.get_running_loop().time() + delay_s
        known = self._due.get(key)
        if known is not None and known <= due:
            return
        self._due[key] = due
        heapq.heappush(self._heap, (due, next(self._count), key))
        self._arm()

    def failed(self, key: str) -> float:
        """Has a key looked at again after a delay that doubles with each failure. Returns the seconds."""
        failures = self._failures.get(key, 0)
        self._failures[key] = failures + 1
        bound = min(self._pace.first_s * 2.0 ** min(failures, 30), self._pace.longest_s)
        delay = bound * self._random.uniform(0.5, 1.0)
        self.add_after(key, delay)
        return delay

    def succeeded(self, key: str) -> None:
        """The next failure of this key is the first again."""
        self._failures.pop(key, None)

    async def get(self) -> str:
        """Waits for a key and takes it. Call :meth:`done` with it afterwards, whatever happened."""
        key = await self._ready.get()
        self._waiting.discard(key)
        self._busy.add(key)
        return key

    def done(self, key: str) -> None:
        """A key is no longer being worked on."""
        self._busy.discard(key)
        if key in self._again:
            self._again.discard(key)
            self.add(key)

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)
        if self._heap:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._heap[0][0], self._ripe)

    def _ripe(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        while self._heap and self._heap[0][0] <= now:
            due, _, key = heapq.heappop(self._heap)
            if self._due.get(key) == due:
                del self._due[key]
                self.add(key)
        self._arm()
