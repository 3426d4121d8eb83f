"""What another node's architectd may ask of a pod that leaves: the server side of a move.

Called by the transfer server (:mod:`architect.adapters.transfer`) for each connection, after it has made sure
which node is speaking. Nobody is told anything but the node to which the control plane has given the claim.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec

from architect.adapters.kube.client import KubeError
from architect.adapters.kube.resources import Checkpoint
from architect.adapters.transfer.wire import Hello
from architect.contract.errors import ArchitectError
from architect.contract.moving import ABORT, HELD, LEAVE, LOOK, REFUSE
from architect.contract.records import CHECKPOINT_FORMAT
from architect.processes.architectd.cluster.departing import Departure
from architect.processes.architectd.cluster.leaving import Leaving
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log


class Stranger(ArchitectError):
    """Somebody asks for what is not theirs."""


class Handing:
    """Says who may ask for what; see the module."""

    def __init__(self, site: Site, leaving: Leaving) -> None:
        self._site = site
        self._leaving = leaving

    async def authorize(self, node: str, hello: Hello) -> Session:
        """The session of a node that asks for a checkpoint.

        Raises:
            Stranger: the checkpoint is not claimed by a pod of that node, or not here.
        """
        departure = self._leaving.departure(hello.checkpoint)
        if departure is None or departure.pod_uid != hello.uid:
            raise self._refused(node, hello, "no such pod leaves this node")
        namespace, _, name = hello.checkpoint.partition("/")
        try:
            # Asked anew: a claim counts from the moment that it is written.
            checkpoint = await self._site.kube.get(Checkpoint, name, namespace)
        except KubeError as error:
            raise self._refused(node, hello, f"its claim cannot be looked at: {error}") from error
        claim = checkpoint.status.claimedBy
        if (
            claim is None
            or checkpoint.status.phase != "Claimed"
            or claim.podUID != hello.claimant
            or claim.nodeName != node
        ):
            raise self._refused(node, hello, "it is not claimed by that pod on that node")
        self._site.checkpoints.note(checkpoint)
        if hello.format != CHECKPOINT_FORMAT:
            raise self._refused(node, hello, f"it reads checkpoints of format {hello.format} only")
        return Session(departure, self._leaving.fell_silent, node)

    def _refused(self, node: str, hello: Hello, why: str) -> Stranger:
        log("stranger refused", node=node, checkpoint=hello.checkpoint, why=why)
        return Stranger(
            f"node {node} may not have checkpoint {hello.checkpoint}",
            why,
            "only the node of the pod that has claimed it may",
        )


class Session:
    """One connection of the node that takes the pod."""

    def __init__(
        self,
        departure: Departure,
        fell_silent: Callable[[Departure], None],
        node: str,
    ) -> None:
        self._departure = departure
        self._fell_silent = fell_silent
        self._node = node
        departure.connected(1)

    async def call(self, verb: str, body: bytes) -> bytes:
        """Answers one of the verbs of contract/moving.py.

        Raises:
            ArchitectError: what is asked for cannot be done; the pod goes on.
        """
        departure = self._departure
        if verb == LOOK:
            return msgspec.json.encode(await departure.needs())
        if verb == LEAVE:
            return msgspec.json.encode(await departure.freeze(durable=False))
        if verb == HELD:
            return msgspec.msgpack.encode(departure.held())
        if verb == ABORT:
            log("move given up by the other node", node=self._node, why=body.decode())
            await departure.thaw()
            return b""
        if verb == REFUSE:
            departure.refused = body.decode()
            return b""
        raise ArchitectError(
            f"unknown verb {verb}", "it is of another version", "update both nodes"
        )

    def open(self, name: str) -> Path | None:
        """The file of that name, if it is to be fetched."""
        return self._departure.open(name)

    def closed(self) -> None:
        """Its last connection is gone."""
        self._departure.connected(-1)
        self._fell_silent(self._departure)
