"""The Kubernetes side as a whole: connects, starts its parts, and ends them with the daemon."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from architect.adapters.identity import Identity
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import Recorder
from architect.contract.kubernetes import DAEMON
from architect.processes.architectd.cluster.moves import Moves, Route
from architect.processes.architectd.cluster.node import NodeSide
from architect.processes.architectd.cluster.pods import Pods
from architect.processes.architectd.context import Context
from architect.processes.architectd.log import log
from architect.processes.architectd.registry import Registry

_FAREWELL_S = 2.0
"""Seconds that the daemon's end waits for the API server at the most."""


class ClusterSide:
    """See the module. Made before the registry has recovered, started after it."""

    def __init__(
        self, credentials: Path, node: str, registry: Registry, context: Context, route: Route
    ) -> None:
        """Raises KubeError if the credentials cannot be read."""
        self._kube = Kube.in_cluster(credentials)
        self._context = context
        self._recorder = Recorder(self._kube, DAEMON, node)
        self._pods = Pods(self._kube, node, registry, self._recorder)
        self._node = NodeSide(self._kube, node, registry, self._pods)
        identity = Identity(self._kube, node, route.namespace)
        self.moves = Moves(
            self._kube, node, route, registry, self._recorder, identity, self._pods.informer
        )
        self._tasks: set[asyncio.Task[None]] = set()
        # What the libraries say of each request is of no use in the pod's log.
        logging.getLogger("httpx2").setLevel(logging.WARNING)

    def start(self) -> None:
        """Begins; never waits for the API server."""
        self._context.followers.append(self._pods.stale)
        self._keep(self._pods.informer.run())
        self._keep(self._node.informer.run())
        self._keep(self._recorder.run())
        self._keep(self.moves.run())
        self._keep(self._events())
        self._keep(self._node.show())

    async def stop(self) -> None:
        """Says farewell and ends."""
        for task in self._tasks:
            task.cancel()
        with contextlib.suppress(TimeoutError, KubeError):
            async with asyncio.timeout(_FAREWELL_S):
                await self._node.leave()
        with contextlib.suppress(Exception):
            await self._kube.close()

    async def _events(self) -> None:
        with self._context.events.follow() as queue:
            while True:
                self._pods.report(await queue.get())

    def _keep(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log("internal error", error=repr(task.exception()))
