"""Which pod takes which checkpoint: the leader claims, releases and clears away.

Called by :mod:`.controller`, whose copy of the pods it looks at. Deciding is
:mod:`architect.decisions.pairing`'s; a claim is a compare-and-swap, so that a second leader cannot give away
what the first has given.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable
from typing import Final

from architect.adapters.kube import checkpoints
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Checkpoint, Node, Pod
from architect.decisions import pairing

_log: Final = logging.getLogger(__name__)

_LOOK_S: Final = 10.0
"""Seconds between two looks when nothing changes: what failed is tried again."""


class Pairing:
    """See the module; ``run`` it once."""

    def __init__(
        self,
        kube: Kube,
        pods: Informer[Pod],
        nodes: Informer[Node],
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self.checkpoints: Informer[Checkpoint] = Informer(kube, Checkpoint)
        self._kube = kube
        self._pods = pods
        self._nodes = nodes
        self._may_act = may_act
        self._stale = asyncio.Event()
        self.checkpoints.add_handler(self._checkpoint_changed)
        pods.add_handler(self._pod_changed)

    async def run(self) -> None:
        """Never returns; cancel it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(self._keep())

    def _checkpoint_changed(self, _: Change[Checkpoint]) -> None:
        self._stale.set()

    def _pod_changed(self, _: Change[Pod]) -> None:
        if self.checkpoints.objects:
            self._stale.set()

    async def _keep(self) -> None:
        await self.checkpoints.synced.wait()
        await self._pods.synced.wait()
        await self._nodes.synced.wait()
        while True:
            self._stale.clear()
            if self._may_act() and self.checkpoints.objects:
                await self._look()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._stale.wait()

    async def _look(self) -> None:
        offered = {key: checkpoints.seen(one) for key, one in self.checkpoints.objects.items()}
        found = checkpoints.pods(self._pods.objects.values())
        nodes = frozenset(self._nodes.objects)
        for key in pairing.release(offered.values(), found):
            await self._carry_out("released", key, checkpoints.release)
        for key, pod in pairing.pair(offered.values(), found):
            claimant = self._pods.get(pod)
            if claimant is not None:
                await self._claim(key, claimant)
        for key in pairing.done(offered.values(), found, nodes):
            await self._carry_out("deleted", key, checkpoints.delete)

    async def _claim(self, key: str, pod: Pod) -> None:
        checkpoint = self.checkpoints.get(key)
        if checkpoint is None:
            return
        try:
            claimed = await checkpoints.claim(self._kube, checkpoint, pod)
        except KubeError as error:
            _log.warning("%s not claimed for %s: %s", key, pod.key, error)
            return
        if claimed is None:
            _log.info("%s is another's, not %s's", key, pod.key)
            return
        self.checkpoints.note(claimed)
        _log.info("%s claimed for %s on %s", key, pod.key, pod.spec.nodeName)

    async def _carry_out(
        self, done: str, key: str, write: Callable[[Kube, Checkpoint], Awaitable[object]]
    ) -> None:
        checkpoint = self.checkpoints.get(key)
        if checkpoint is None:
            return
        try:
            newer = await write(self._kube, checkpoint)
        except KubeError as error:
            _log.warning("%s not %s: %s", key, done, error)
            return
        if isinstance(newer, Checkpoint):
            self.checkpoints.note(newer)
        _log.info("%s %s", key, done)
