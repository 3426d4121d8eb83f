"""Connections that have moved to this node: takes those that are over out of their Checkpoint.

Started by :mod:`.moves`. The routers of all nodes keep rules for them for as long as they are listed.
"""

from __future__ import annotations

import asyncio
from typing import Final

from architect.adapters import home
from architect.adapters.kube import checkpoints
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.resources import Checkpoint
from architect.contract.errors import ArchitectError
from architect.contract.flows import Flow
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log
from architect.processes.architectd.waiters import AWAKE

_LOOK_S: Final = 15.0
"""Seconds between two looks: a rule that nobody needs costs nothing."""


async def keep(site: Site) -> None:
    """Never returns; cancel it."""
    while True:
        await asyncio.sleep(_LOOK_S)
        for checkpoint in list(site.checkpoints.objects.values()):
            claim = checkpoint.status.claimedBy
            if claim is not None and claim.nodeName == site.node:
                try:
                    await _look(site, checkpoint, claim.podUID)
                except (ArchitectError, OSError) as error:
                    log("connections not looked at", checkpoint=checkpoint.key, error=str(error))


async def _look(site: Site, checkpoint: Checkpoint, pod_uid: str) -> None:
    move = checkpoint.status.move
    if move is None or not move.flows or checkpoint.status.phase != "Restored":
        return
    containers = site.registry.of_pod(pod_uid)
    if any(one.state not in AWAKE for one in containers):
        # What sleeps has its connections in its images.
        return
    left: set[Flow] = set()
    if containers:
        keeper = containers[0].record.keeper
        for old in move.oldAddresses:
            found = await asyncio.to_thread(home.open_flows, keeper, old, move.newAddresses)
            left |= set(found)
    flows = tuple(flow for flow in move.flows if Flow.parse(flow) in left)
    if flows == move.flows:
        return
    try:
        site.checkpoints.note(await checkpoints.drop_flows(site.kube, checkpoint, flows))
    except KubeError as error:
        log("connections not dropped", checkpoint=checkpoint.key, error=str(error))
        return
    if not flows and containers:
        await asyncio.to_thread(home.leave, containers[0].record.keeper)
