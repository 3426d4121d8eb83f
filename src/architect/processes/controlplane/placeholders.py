"""Keeps a placeholder in each Service that has nobody while its pod moves: the leader's work.

Run by :mod:`.controller`, whose copies of the pods and Checkpoints it looks at. Deciding is
:mod:`architect.decisions.placeholders`'s. A leader that starts in the middle of a move finds the
placeholders of the one before by their label, and the moves that they are for by their annotation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any, Final

from architect.adapters.kube import placeholders
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Checkpoint, EndpointSlice, Pod, Service
from architect.decisions import placeholders as decisions

_log: Final = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
"""Seconds between two looks when nothing changes."""
_AGAIN_S: Final = 1.0
"""Seconds until what the API server has not taken is tried again: connections are refused meanwhile."""


class Placeholders:
    """See the module; ``run`` it once."""

    def __init__(
        self,
        kube: Kube,
        pods: Informer[Pod],
        checkpoints: Informer[Checkpoint],
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._kube = kube
        self._pods = pods
        self._checkpoints = checkpoints
        self._may_act = may_act
        self._stale = asyncio.Event()
        self._ending: dict[str, tuple[float, float]] = {}
        """Of those that are no longer needed: seconds that they stay, and since when."""
        self._namespaces: set[str] = set()
        """Where there are Checkpoints or placeholders: what happens elsewhere changes nothing."""
        self.services: Informer[Service] = Informer(kube, Service, keep=placeholders.counts)
        self.slices: Informer[EndpointSlice] = Informer(
            kube, EndpointSlice, labels=placeholders.SELECTOR, keep=placeholders.is_ours
        )
        self.looks = 0
        """Decisions made."""
        checkpoints.add_handler(self._changed)
        self.slices.add_handler(self._changed)
        pods.add_handler(self._changed_beside)
        self.services.add_handler(self._changed_beside)

    async def run(self) -> None:
        """Never returns; cancel it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.services.run())
            tasks.create_task(self.slices.run())
            tasks.create_task(self._keep())

    def _changed(self, _: Change[Any]) -> None:
        self._stale.set()

    def _changed_beside(self, change: Change[Any]) -> None:
        if change.object.metadata.namespace in self._namespaces:
            self._stale.set()

    async def _keep(self) -> None:
        for one in (self._checkpoints, self._pods, self.services, self.slices):
            await one.synced.wait()
        while True:
            self._stale.clear()
            wait_s = _LOOK_S
            if self._may_act():
                wait_s = await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await self._stale.wait()

    async def _look(self) -> float:
        """Returns the seconds until the next look, if nothing changes."""
        moves = placeholders.moves(self._checkpoints.objects.values())
        existing = placeholders.existing(self.slices.objects.values())
        keys = [one.key for one in moves] + [one.key for one in existing]
        self._namespaces = {key.partition("/")[0] for key in keys}
        if not keys:
            self._ending.clear()
            self.looks += 1
            return _LOOK_S
        pods = placeholders.pods(self._pods.objects.values(), self._namespaces)
        services = placeholders.services(self.services.objects.values(), self._namespaces)
        wanted = decisions.wanted(moves, pods, services)
        surplus = decisions.surplus(existing, moves, pods, services)
        wait_s = _LOOK_S
        for key, one in wanted.items():
            if self.slices.get(key) is None and not await self._create(one):
                wait_s = _AGAIN_S
        now = asyncio.get_running_loop().time()
        self._ending = {
            key: before
            if (before := self._ending.get(key)) is not None and before[0] == stays_s
            else (stays_s, now)
            for key, stays_s in surplus.items()
        }
        for key, (stays_s, since) in self._ending.items():
            left_s = since + stays_s - now
            if left_s > 0:
                wait_s = min(wait_s, left_s)
            elif not await self._delete(key):
                wait_s = min(wait_s, _AGAIN_S)
        self.looks += 1
        return wait_s

    async def _create(self, wanted: decisions.Placeholder) -> bool:
        """False if it is to be tried again soon; what was refused has until the next look."""
        try:
            made = await placeholders.create(self._kube, wanted)
        except KubeError as error:
            _log.warning("no placeholder %s: %s", wanted.key, error)
            return not error.temporary
        if made:
            _log.info("%s holds the place of a pod that moves", wanted.key)
        return True

    async def _delete(self, key: str) -> bool:
        """Returns as :meth:`_create`."""
        found = self.slices.get(key)
        if found is None:
            return True
        try:
            await placeholders.delete(self._kube, found)
        except KubeError as error:
            _log.warning("placeholder %s not deleted: %s", key, error)
            return not error.temporary
        _log.info("%s is not needed any more", key)
        return True
