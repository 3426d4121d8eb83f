"""Watches pods and nodes and mends what architectd has left undone: the leader's work.

Called by :mod:`architect.processes.controlplane.main` when this replica leads. Each change puts the pod's
key into a queue; a look at it takes microseconds and reads only memory. Writes are rare and go through
:func:`architect.adapters.kube.pods.settle`, like architectd's.
"""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import Callable
from typing import Final

from architect.adapters.kube import pods
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import NORMAL, WARNING, Recorder, Reference
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Node, Pod
from architect.adapters.kube.workqueue import Pace, WorkQueue
from architect.contract.annotations import STATUS_LABEL_PREFIX
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import DAEMON, RUNC_CLASS
from architect.decisions import podstatus, reconcile
from architect.decisions.reconcile import Finding, NodeState, Suspicion
from architect.decisions.resources import Server
from architect.processes.controlplane.identities import Identities
from architect.processes.controlplane.pairing import Pairing
from architect.processes.controlplane.placeholders import Placeholders

_log: Final = logging.getLogger(__name__)

WORKERS: Final = 8
"""Pods that are mended at the same time. Looking takes no time; a repair is two or three calls."""
_PACE: Final = Pace(first_s=1.0, longest_s=300.0)
"""After a refusal or a failure of a pod's repair: the API server has other things to do."""


def is_ours(pod: Pod) -> bool:
    """Whether a pod is worth keeping in memory: it is managed, shows a state, or is an architectd."""
    return (
        pod.spec.runtimeClassName == RUNC_CLASS
        or any(name.startswith(STATUS_LABEL_PREFIX) for name in pod.labels)
        or podstatus.remembered(pod.annotations)
        or is_daemon(pod)
    )


def is_daemon(pod: Pod) -> bool:
    """Whether a pod is labelled as an architectd."""
    return pod.labels.get("app") == DAEMON


def is_ready(pod: Pod) -> bool:
    """Whether a pod is Ready and not on its way out."""
    return pod.ready and pod.metadata.deletionTimestamp is None


class Controller:
    """The leader's work; ``run`` it once."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        recorder: Recorder,
        *,
        patience_s: float = reconcile.PATIENCE_S,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._recorder = recorder
        self._patience_s = patience_s
        self._may_act = may_act
        self._server = Server(resize=False)
        self._queue = WorkQueue(_PACE)
        self._suspicions: dict[str, Suspicion] = {}
        self._told: dict[str, str] = {}
        self._on_node: dict[str, set[str]] = {}
        self._daemons: dict[str, set[str]] = {}
        self.pods: Informer[Pod] = Informer(kube, Pod, keep=is_ours)
        self.nodes: Informer[Node] = Informer(kube, Node)
        self.pods.add_handler(self._pod_changed)
        self.pairing = Pairing(kube, self.pods, self.nodes, may_act)
        self.placeholders = Placeholders(kube, self.pods, self.pairing.checkpoints, may_act)
        self.identities = Identities(kube, namespace, self.nodes, recorder, may_act)
        self.nodes.add_handler(self._node_changed)
        self.looks = 0
        """Decisions made."""
        self.repairs = 0
        """Pods mended."""

    @property
    def synced(self) -> bool:
        """Whether everything has been listed once."""
        return self.pods.synced.is_set() and self.nodes.synced.is_set()

    async def run(self) -> None:
        """Never returns, unless something is wrong with the program itself; cancel it."""
        await self._ask_abilities()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.nodes.run())
            tasks.create_task(self.pods.run())
            tasks.create_task(self.pairing.run())
            tasks.create_task(self.placeholders.run())
            tasks.create_task(self.identities.run())
            await self.nodes.synced.wait()
            await self.pods.synced.wait()
            # What was listed stays: walking it with each full collection would hold decisions up.
            gc.collect()
            gc.freeze()
            _log.info("synced: %d pods, %d nodes", len(self.pods.objects), len(self.nodes.objects))
            for _ in range(WORKERS):
                tasks.create_task(self._work())

    def decide(self, pod: Pod) -> Finding | None:
        """What is to be mended on a pod now, by what is in memory."""
        self.looks += 1
        return reconcile.find(pods.seen(pod), self._node_state(pod.spec.nodeName), self._server)

    async def _ask_abilities(self) -> None:
        while True:
            try:
                self._server = await self._kube.abilities()
                return
            except KubeError as error:
                _log.warning("%s", error)
                await asyncio.sleep(1.0 if error.retry_after is None else error.retry_after)

    # -- what changes -----------------------------------------------------------------------------

    def _pod_changed(self, change: Change[Pod]) -> None:
        pod = change.object
        key, node = pod.key, pod.spec.nodeName
        if is_daemon(pod) and pod.metadata.namespace == self._namespace:
            self._daemon_changed(key, node, change.new is not None and is_ready(pod))
        if change.new is None:
            self._on_node.get(node, set()).discard(key)
            self._forget(key)
            return
        if node:
            self._on_node.setdefault(node, set()).add(key)
        self._queue.add(key)

    def _daemon_changed(self, key: str, node: str, ready: bool) -> None:
        before = self._daemons.setdefault(node, set())
        served = bool(before)
        if ready:
            before.add(key)
        else:
            before.discard(key)
        if bool(before) != served:
            self._look_at_node(node)

    def _node_changed(self, change: Change[Node]) -> None:
        old = change.old.condition("Ready") if change.old else None
        new = change.new.condition("Ready") if change.new else None
        if old != new:
            self._look_at_node(change.object.metadata.name)

    def _look_at_node(self, node: str) -> None:
        for key in self._on_node.get(node, ()):
            self._queue.add(key)

    def _node_state(self, name: str) -> NodeState:
        node = self.nodes.get(name)
        return reconcile.node_state(
            node.condition("Ready") if node else None, bool(self._daemons.get(name))
        )

    def _forget(self, key: str) -> None:
        self._suspicions.pop(key, None)
        self._told.pop(key, None)
        self._queue.succeeded(key)

    # -- what is done about it --------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            key = await self._queue.get()
            try:
                await self._look(key)
            except KubeError as error:
                delay = self._queue.failed(key)
                _log.warning("%s: %s; again in %.0f s", key, error, delay)
            except ArchitectError as error:
                # A pod that the decisions cannot read: nothing to be done until it changes.
                _log.error("%s: %s", key, error)
            except Exception:
                delay = self._queue.failed(key)
                _log.exception("%s: again in %.0f s", key, delay)
            finally:
                self._queue.done(key)
            # A queue that is never empty must not keep the lease from being renewed.
            await asyncio.sleep(0)

    async def _look(self, key: str) -> None:
        pod = self.pods.get(key)
        if pod is None:
            self._forget(key)
            return
        finding = self.decide(pod)
        now = asyncio.get_running_loop().time()
        suspicion = reconcile.suspect(finding, now, self._suspicions.get(key))
        if suspicion is None:
            self._forget(key)
            return
        self._suspicions[key] = suspicion
        due = suspicion.since + self._patience_s
        if now < due:
            self._queue.add_after(key, due - now)
        elif self._may_act():
            await self._mend(pod, suspicion.finding)

    async def _mend(self, pod: Pod, finding: Finding) -> None:
        key = pod.key
        outcome = await pods.settle(self._kube, pod, dict(finding.truth), self._server, alone=True)
        if outcome.pod is not None:
            self.pods.note(outcome.pod)
        about = Reference.pod(pod.metadata)
        if outcome.writes:
            self.repairs += 1
            _log.info("%s: %s", key, finding.message)
            self._recorder.record(about, finding.repair.value, finding.message, NORMAL)
        if outcome.refused is None:
            self._forget(key)
            return
        self._queue.failed(key)
        why = f"the API server refuses to change the pod's requests: {outcome.refused.why}"
        if self._told.get(key) != why:
            self._told[key] = why
            _log.warning("%s: %s", key, why)
            # An architectd that is there is refused just the same, and says so itself.
            if self._node_state(pod.spec.nodeName) is not NodeState.SERVED:
                self._recorder.record(about, "ResizeRefused", why, WARNING)
