"""Keeps a copy of a kind of objects in memory and says what changes: list, watch, and again.

Used by architectd (its node's pods) and the control plane (all pods of ours, and nodes). What is built in
because clusters do it: watches end by themselves every few minutes; the version that a watch goes on from
is compacted away (410: list again and report the differences, and never use that version again); the API
server restarts and refuses connections (exponential delay with jitter, so that 5,000 nodes do not come
back together); a connection stalls without an end (a deadline on each watch); a server restored from a
backup knows only older versions.

Handlers are called in the event loop, one change after the other, in the order of the server for each
object. They must be quick and not raise; slow work belongs into a queue (workqueue.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from architect.adapters.kube.client import Changed, Kube, KubeError
from architect.adapters.kube.resources import Object

T = TypeVar("T", bound=Object)

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Timing:
    """When to give up and when to try again; seconds."""

    watch_s: int = 240
    """Server's end of a watch. Each is ended at a random time between this and half of it, so that watches
    do not end together. client-go has 5 to 10 min; shorter finds a stalled connection sooner."""
    stall_s: float = 10.0
    """After that end without having been ended, the connection is taken for dead."""
    first_delay_s: float = 0.2
    """Before the second try."""
    longest_delay_s: float = 30.0
    """As in client-go's reflector."""
    quiet_s: float = 5.0
    """A watch that has lasted so long was a success even if nothing came: delays begin anew."""


class What(enum.StrEnum):
    """What has changed about an object."""

    ADDED = "added"
    UPDATED = "updated"
    DELETED = "deleted"


@dataclass(frozen=True, slots=True)
class Change(Generic[T]):
    """A change. ``old`` is None for ADDED, ``new`` for DELETED."""

    what: What
    old: T | None
    new: T | None

    @property
    def object(self) -> T:
        """The newest there is: for DELETED the last known."""
        found = self.new if self.new is not None else self.old
        assert found is not None
        return found


Handler = Callable[[Change[T]], None]


class Backoff:
    """Growing delays: each is random between half of a bound and the bound, and the bound doubles."""

    def __init__(self, timing: Timing, chance: random.Random | None = None) -> None:
        self._timing = timing
        self._random = chance or random.Random()
        self._bound = timing.first_delay_s

    def reset(self) -> None:
        """The next delay is the first again."""
        self._bound = self._timing.first_delay_s

    def next(self, at_least: float | None = None) -> float:
        """Seconds to wait now; ``at_least`` is what the server asked for."""
        delay = self._bound * self._random.uniform(0.5, 1.0)
        self._bound = min(self._bound * 2, self._timing.longest_delay_s)
        return max(delay, at_least or 0.0)


class Informer(Generic[T]):
    """A kind of objects, by namespace and selectors (empty: all), as the API server has them.

    ``keep`` decides which are kept and reported; the others leave no trace in memory. An object that
    comes to be kept is ADDED, one that no longer is DELETED.
    """

    def __init__(
        self,
        kube: Kube,
        kind: type[T],
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        keep: Callable[[T], bool] | None = None,
        timing: Timing = Timing(),
    ) -> None:
        self.objects: dict[str, T] = {}
        """By key (``namespace/name``). For reading only."""
        self.synced = asyncio.Event()
        """Set once the first list is in and has been reported."""
        self.lists = 0
        """How often everything was listed."""
        self.watches = 0
        """How often a watch was begun."""
        self.last_error: KubeError | None = None
        """Why there is no watch at the moment; None while there is one."""
        self._kube = kube
        self._kind = kind
        self._where = {"namespace": namespace, "labels": labels, "fields": fields}
        self._keep = keep
        self._timing = timing
        self._handlers: list[Handler[T]] = []
        self._random = random.Random()
        self._backoff = Backoff(timing, self._random)
        self._version = ""

    def add_handler(self, handler: Handler[T]) -> None:
        """Has ``handler`` called for each change from now on; objects already there come as ADDED."""
        self._handlers.append(handler)
        for one in list(self.objects.values()):
            self._call(handler, Change(What.ADDED, None, one))

    def get(self, key: str) -> T | None:
        """The object of that key as last seen."""
        return self.objects.get(key)

    def note(self, newer: T) -> None:
        """Takes in what the API server returned for a write of ours, ahead of the watch.

        So that the next decision does not see the object as it was before. Handlers are told, because the
        answer may carry what somebody else changed; what the watch still brings of before is left out.
        """
        old = self.objects.get(newer.key)
        if old is not None and old.metadata.uid == newer.metadata.uid:
            self._set(newer.key, newer)

    async def run(self) -> None:
        """Never returns; cancel it."""
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                if not self._version:
                    self._version = await self._list()
                await self._watch()
            except KubeError as error:
                self.last_error = error
                if error.gone or not error.temporary:
                    # Whatever it is (410, a selector or a right that is refused): not with this version.
                    self._version = ""
                if loop.time() - begun > self._timing.quiet_s:
                    self._backoff.reset()
                delay = self._backoff.next(error.retry_after)
                _log.warning("%s; again in %.1f s", error, delay)
                await asyncio.sleep(delay)
            else:
                self._backoff.reset()

    async def _list(self) -> str:
        found: dict[str, T] = {}
        after = version = ""
        while True:
            objects, version, after = await self._kube.page(self._kind, **self._where, after=after)
            for one in objects:
                if self._keep is None or self._keep(one):
                    found[one.key] = one
            if not after:
                break
        self.lists += 1
        self.last_error = None
        for key in [key for key in self.objects if key not in found]:
            self._set(key, None)
        for key, one in found.items():
            self._set(key, one, listed=True)
        self.synced.set()
        return version

    async def _watch(self) -> None:
        seconds = self._random.randint(max(self._timing.watch_s // 2, 1), self._timing.watch_s)
        lines = self._kube.watch(
            self._kind,
            self._version,
            **self._where,
            seconds=seconds,
            stall_s=self._timing.stall_s,
        )
        self.watches += 1
        async with contextlib.aclosing(lines):
            async for line in lines:
                self.last_error = None
                self._version = line.version
                if line.object is not None:
                    gone = line.change is Changed.DELETED
                    out = gone or (self._keep is not None and not self._keep(line.object))
                    # The last state of a deleted object is worth having: it says why it ended.
                    self._set(line.object.key, None if out else line.object, last=line.object)

    def _set(self, key: str, new: T | None, *, last: T | None = None, listed: bool = False) -> None:
        old = self.objects.get(key)
        if new is None:
            if old is not None:
                del self.objects[key]
                self._report(Change(What.DELETED, last or old, None))
            return
        if old is not None and old.metadata.uid != new.metadata.uid:
            # Deleted and made again while we did not look.
            self._report(Change(What.DELETED, old, None))
            old = None
        if old is None:
            self.objects[key] = new
            self._report(Change(What.ADDED, None, new))
        elif old.metadata.resourceVersion != new.metadata.resourceVersion:
            if not listed and not _newer(new, old):
                return
            self.objects[key] = new
            self._report(Change(What.UPDATED, old, new))

    def _report(self, change: Change[T]) -> None:
        for handler in self._handlers:
            self._call(handler, change)

    def _call(self, handler: Handler[T], change: Change[T]) -> None:
        try:
            handler(change)
        except Exception:
            # One handler's fault must not end the copy that all others live on.
            _log.exception("handler failed for %s", change.object.key)


def _newer(one: Object, other: Object) -> bool:
    """Whether ``one`` is the newer version. True where versions are no numbers and cannot be compared."""
    try:
        return int(one.metadata.resourceVersion) > int(other.metadata.resourceVersion)
    except ValueError:
        return True
