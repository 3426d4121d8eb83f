"""`architect-control-plane remove`: wakes all that sleeps before an uninstall takes its means away.

Called by the chart's pre-delete hook. Asks the architectd of each node, by an annotation on the node, to
wake everything and to hibernate nothing any more, and waits until all have. If it cannot be done, the
requests are withdrawn, so that hibernation goes on as before, and the uninstall fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Final

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.resources import Node, Pod
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import (
    NODE_LABEL,
    REMOVAL_ANNOTATION,
    REMOVAL_DONE,
    REMOVAL_REQUESTED,
    REMOVAL_WITHDRAWN,
    SCALED_DOWN,
)
from architect.decisions import podstatus, removal
from architect.decisions.removal import NodeView, Standing
from architect.processes.controlplane.controller import is_daemon, is_ours, is_ready

_log: Final = logging.getLogger(__name__)

DEADLINE_S: Final = 270.0
"""Less than the 5 min after which helm gives a hook up, so that the reason is still told."""
LOOK_S: Final = 1.0
"""Between two looks at the cluster."""


class NotRemoved(ArchitectError):
    """Something still sleeps, or a node does not answer."""


async def look(kube: Kube, namespace: str) -> list[NodeView]:
    """All nodes that are ours. Raises KubeError."""
    nodes = {one.metadata.name: one for one in await kube.listed(Node)}
    asleep: dict[str, list[str]] = {}
    daemons: set[str] = set()
    served: set[str] = set()
    after = ""
    while True:
        pods, _, after = await kube.page(Pod, after=after)
        for pod in pods:
            if is_daemon(pod) and pod.metadata.namespace == namespace:
                daemons.add(pod.spec.nodeName)
                if is_ready(pod):
                    served.add(pod.spec.nodeName)
            elif is_ours(pod) and pod.spec.nodeName and _waits(pod):
                asleep.setdefault(pod.spec.nodeName, []).append(pod.key)
        if not after:
            break
    found = []
    for name in sorted(nodes):
        node = nodes[name]
        if node.labels.get(NODE_LABEL) == "true" or name in asleep or name in daemons:
            found.append(
                NodeView(
                    name,
                    node.annotations.get(REMOVAL_ANNOTATION),
                    name in daemons,
                    name in served,
                    node.condition("Ready") == "True",
                    tuple(sorted(asleep.get(name, ()))),
                )
            )
    return found


def _waits(pod: Pod) -> bool:
    if pod.status.phase in ("Succeeded", "Failed"):
        return False
    shown = podstatus.labelled(pod.labels)
    return SCALED_DOWN in shown.values() or podstatus.remembered(pod.annotations)


async def remove(
    kube: Kube,
    namespace: str,
    *,
    deadline_s: float,
    force_after_s: float | None,
    stop: asyncio.Event,
) -> None:
    """Returns when nothing sleeps any more and every architectd has stopped hibernating.

    ``force_after_s``: nodes that have not answered for that long are left as they are, with a warning.

    Raises:
        NotRemoved: not by the deadline, or it was told to stop.
        KubeError: the API server refuses what has to be asked.
    """
    loop = asyncio.get_running_loop()
    begun = loop.time()
    asked: set[str] = set()
    silent: dict[str, float] = {}
    told = ""
    waiting = ["the API server"]
    try:
        while True:
            try:
                nodes = await look(kube, namespace)
                for node in nodes:
                    is_asked = node.removal in (REMOVAL_REQUESTED, REMOVAL_DONE)
                    if not is_asked and removal.standing(node) is not Standing.NOTHING:
                        await _annotate(kube, node.name, REMOVAL_REQUESTED)
                        asked.add(node.name)
                now = loop.time()
                answering = []
                for node in nodes:
                    if removal.standing(node) is not Standing.SILENT:
                        silent.pop(node.name, None)
                    elif (
                        force_after_s is not None
                        and now - silent.setdefault(node.name, now) >= force_after_s
                    ):
                        continue
                    answering.append(node)
                waiting = removal.waits_for(answering)
                if not waiting:
                    for node in nodes:
                        if node.removal == REMOVAL_DONE:
                            # architectd knows by a mark of its own: nothing of ours stays on the node.
                            await _annotate(kube, node.name, None)
                    _warn(nodes)
                    return
            except KubeError as error:
                if not error.temporary:
                    raise
                waiting = [str(error)]
            text = "; ".join(waiting)
            if text != told:
                told = text
                _log.info("waiting for %s", text)
            left = begun + deadline_s - loop.time()
            if left <= 0 or stop.is_set():
                why = "told to stop" if stop.is_set() else f"not done after {deadline_s:.0f} s"
                raise NotRemoved(
                    f"removal: {why}",
                    text,
                    "nothing was lost and hibernation goes on; see to these nodes (`kubectl get nodes`,"
                    f" `kubectl -n {namespace} get pods -o wide`), or go on without nodes that do not"
                    " answer with --force-after",
                )
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(LOOK_S, left)):
                    await stop.wait()
    except BaseException:
        await asyncio.shield(_withdraw(kube, asked))
        raise


def _warn(nodes: list[NodeView]) -> None:
    for node in nodes:
        how = removal.standing(node)
        if how is Standing.SILENT:
            _log.warning(
                "node %s was left: it does not answer; asleep there until Architect is installed again: %s",
                node.name,
                ", ".join(node.asleep) or "nothing",
            )
        elif how is Standing.NOTHING:
            _log.warning(
                "node %s was left: no architectd is ready on it, and nothing sleeps there",
                node.name,
            )
    _log.info("nothing sleeps any more on %d nodes", len(nodes))


async def _annotate(kube: Kube, node: str, value: str | None) -> None:
    body = {"metadata": {"annotations": {REMOVAL_ANNOTATION: value}}}
    try:
        await kube.patch(Node, node, body)
    except KubeError as error:
        if error.status != 404:
            raise


async def _withdraw(kube: Kube, nodes: set[str]) -> None:
    for node in nodes:
        try:
            await _annotate(kube, node, REMOVAL_WITHDRAWN)
        except KubeError as error:
            _log.warning("node %s still is asked to stop hibernating: %s", node, error)
