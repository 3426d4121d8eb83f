"""Moving as a whole, on one node: its parts, the server for other nodes, and whose word starts them.

Made by :mod:`.side`; the daemon's server asks it what the starts and stops of containers mean.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Final

from architect.adapters.identity import Identity
from architect.adapters.kube.client import Kube
from architect.adapters.kube.events import Recorder
from architect.adapters.kube.informer import Informer
from architect.adapters.kube.resources import Checkpoint, Pod
from architect.adapters.transfer.limits import RateLimit
from architect.adapters.transfer.serving import Server
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.moving import OnRestoreFailure
from architect.processes.architectd.cluster import upkeep
from architect.processes.architectd.cluster.arriving import Arriving
from architect.processes.architectd.cluster.handing import Handing
from architect.processes.architectd.cluster.leaving import Leaving
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer
from architect.processes.architectd.registry import Registry

_AGAIN_S: Final = 5.0
"""Seconds until a port that somebody else has is tried again."""


@dataclass(frozen=True, slots=True)
class Route:
    """How other nodes reach this one, and how it takes what comes from them."""

    namespace: str
    """Where Architect is installed."""
    address: str
    """The node's."""
    port: int
    """Of the transfer server."""
    bytes_per_s: int | None
    """None: as fast as the link is."""
    on_restore_failure: OnRestoreFailure

    @property
    def endpoint(self) -> str:
        """``address:port``."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


class Moves:
    """See the module."""

    def __init__(
        self,
        kube: Kube,
        node: str,
        route: Route,
        registry: Registry,
        recorder: Recorder,
        identity: Identity,
        pods: Informer[Pod],
    ) -> None:
        self._route = route
        self.checkpoints: Informer[Checkpoint] = Informer(kube, Checkpoint)
        self._site = Site(
            kube=kube,
            node=node,
            endpoint=route.endpoint,
            registry=registry,
            recorder=recorder,
            identity=identity,
            pods=pods,
            checkpoints=self.checkpoints,
            limit=RateLimit(route.bytes_per_s) if route.bytes_per_s else None,
            on_restore_failure=route.on_restore_failure,
        )
        self._leaving = Leaving(self._site)
        self._arriving = Arriving(self._site)

    async def run(self) -> None:
        """Never returns; cancel it."""
        paths.CLUSTER_MARK.touch()
        site = self._site
        self._leaving.found()
        self.checkpoints.add_handler(self._leaving.checkpoint_changed)
        self.checkpoints.add_handler(self._arriving.checkpoint_changed)
        site.pods.add_handler(self._leaving.pod_changed)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(site.identity.run())
            tasks.create_task(self._serve())
            tasks.create_task(upkeep.keep(site))
            tasks.create_task(self._leaving.disown())

    async def _serve(self) -> None:
        await self._site.identity.ready.wait()
        handing = Handing(self._site, self._leaving)
        context = self._site.identity.server_context()
        server = Server(context, self._route.address, self._route.port, handing.authorize)
        while True:
            try:
                await server.start()
                break
            except ArchitectError as error:
                log("not serving", error=str(error))
                await asyncio.sleep(_AGAIN_S)
        try:
            await asyncio.Event().wait()
        finally:
            await server.close()

    async def arrives(self, managed: MovableContainer) -> bool:
        """See :class:`architect.processes.architectd.server.Moves`."""
        return await self._arriving.arrives(managed)

    def started(self, managed: MovableContainer) -> None:
        """See :class:`architect.processes.architectd.server.Moves`."""
        self._leaving.started(managed)

    def stopped(self, managed: MovableContainer) -> None:
        """See :class:`architect.processes.architectd.server.Moves`."""
        self._leaving.stopped(managed)
