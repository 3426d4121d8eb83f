"""Shows on each pod of the node what is true of its containers, and takes edited annotations from it.

One task for each pod that does not show the truth yet; it ends when it does. What is to be written is
decided by :mod:`architect.decisions.podstatus`, one write after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Final

from architect.adapters.kube import pods
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import NORMAL, WARNING, Recorder, Reference
from architect.adapters.kube.informer import Backoff, Change, Informer, Timing
from architect.adapters.kube.resources import Pod
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import (
    RUNC_CLASS,
    RUNNING,
    SCALED_DOWN,
    WAKE_REQUESTED,
)
from architect.contract.records import Event
from architect.contract.states import State
from architect.decisions import podstatus
from architect.decisions.resources import Server
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.log import log
from architect.processes.architectd.registry import Registry

_AT_ONCE: Final = 8
"""Pods written at the same time: sixty that hibernate together must not keep a wake's packets waiting."""
_REFUSED_S: Final = 15.0
"""Seconds until a resize that the API refused is tried again."""
_USUAL: Final = frozenset({"ScaledDown", "ScaledUp", "CheckpointCreated", "Migrated"})
"""Reasons of events that are no trouble."""


class Pods:
    """See the module."""

    def __init__(self, kube: Kube, node: str, registry: Registry, recorder: Recorder) -> None:
        self._kube = kube
        self._registry = registry
        self._recorder = recorder
        self._server: Server | None = None
        self._by_uid: dict[str, str] = {}
        self._stale: set[str] = set()
        self._writing: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, asyncio.Event] = {}
        """Set when one that is being written has become stale once more."""
        self._slots = asyncio.Semaphore(_AT_ONCE)
        self._troubles: dict[str, podstatus.Trouble] = {}
        self._asked: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self.informer = Informer(
            kube, Pod, fields=f"spec.nodeName={node}", keep=lambda pod: _is_ours(pod)
        )
        self.informer.add_handler(self._changed)

    @property
    def settled(self) -> bool:
        """Whether every pod shows the truth, as far as is known."""
        return not self._writing

    # ---- from the API -----------------------------------------------------------------------------

    def _changed(self, change: Change[Pod]) -> None:
        pod = change.object
        uid = pod.metadata.uid
        if change.new is None:
            self._by_uid.pop(uid, None)
            self._troubles.pop(uid, None)
            self._asked.pop(uid, None)
            return
        self._by_uid[uid] = pod.key
        if change.old is None or change.old.annotations != pod.annotations:
            self._registry.follow(uid, pod.annotations)
            self._asked_to_wake(pod, is_new=change.old is None)
        self._watch_health(pod)
        self._watch_resize(pod)
        self.stale(uid)

    def _asked_to_wake(self, pod: Pod, *, is_new: bool) -> None:
        """`kubectl attach` does not reach the runtime: the webhook leaves a mark on the pod for it."""
        mark = pod.annotations.get(WAKE_REQUESTED, "")
        before, self._asked[pod.metadata.uid] = self._asked.get(pod.metadata.uid, ""), mark
        if not mark or mark == before or is_new:
            return
        for managed in self._registry.of_pod(pod.metadata.uid):
            task = asyncio.create_task(_wake(managed))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _watch_health(self, pod: Pod) -> None:
        """One that was never ready, or is not any more, stays awake: a sleeper's probes are answered."""
        ready = {one.name: one.ready for one in pod.status.containerStatuses or ()}
        for managed in self._registry.of_pod(pod.metadata.uid):
            probed = managed.record.probes or managed.settings.health_ports
            name = managed.record.container
            # The kubelet tells it of the pod's own containers; sidecars are taken for healthy.
            managed.clock.unready = bool(probed) and not ready.get(name, True)

    def _watch_resize(self, pod: Pod) -> None:
        """Says once if the kubelet cannot give a woken pod its requests back."""
        uid = pod.metadata.uid
        trouble = podstatus.trouble(pods.seen(pod))
        if trouble is None:
            self._troubles.pop(uid, None)
        elif self._troubles.get(uid, None) is None or self._troubles[uid].reason != trouble.reason:
            self._troubles[uid] = trouble
            about = Reference.pod(pod.metadata)
            self._recorder.record(about, f"Resize{trouble.reason}", trouble.message, WARNING)

    # ---- to the API --------------------------------------------------------------------------------

    def stale(self, uid: str) -> None:
        """A pod may not show the truth: it is looked at soon."""
        self._stale.add(uid)
        if uid in self._writing:
            self._news[uid].set()
        else:
            self._news[uid] = asyncio.Event()
            task = asyncio.create_task(self._settle(uid))
            self._writing[uid] = task
            task.add_done_callback(lambda _: self._written(uid))

    def _written(self, uid: str) -> None:
        del self._writing[uid], self._news[uid]
        if uid in self._stale:
            self.stale(uid)

    def truth(self, pod: Pod) -> dict[str, str | None]:
        """State of each managed container by name; None for one whose label must go."""
        found: dict[str, str | None] = {}
        for managed in self._registry.of_pod(pod.metadata.uid):
            name = managed.record.container
            if not managed.settings.managed:
                found[name] = None if managed.state in (State.RUNNING, State.CREATED) else RUNNING
            else:
                found[name] = (
                    SCALED_DOWN if managed.state in (State.SCALED_DOWN, State.STRANDED) else RUNNING
                )
        for name in podstatus.labelled(pod.labels):
            if name not in found:
                # Between two lives of the container, or left by one that is not managed any more.
                found[name] = RUNNING if self._registry.lists(pod.annotations, name) else None
        return found

    async def _settle(self, uid: str) -> None:
        backoff = Backoff(Timing())
        while uid in self._stale:
            pod = self._pod(uid)
            if pod is None:
                self._stale.discard(uid)
                return
            delay, refused = 0.0, None
            async with self._slots:
                self._stale.discard(uid)
                self._news[uid].clear()
                try:
                    server = await self._abilities()
                    outcome = await pods.settle(self._kube, pod, self.truth(pod), server)
                except KubeError as error:
                    delay = backoff.next(error.retry_after)
                    log("pod not written", pod=pod.key, error=str(error), again_s=round(delay, 1))
                    self._stale.add(uid)
                else:
                    refused = outcome.refused
                    if outcome.pod is not None:
                        self.informer.note(outcome.pod)
            if refused is not None:
                self._refused(pod, refused)
                # Other news are shown at once: a label must not wait for what is refused.
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_REFUSED_S):
                        await self._news[uid].wait()
                self._stale.add(uid)
            elif delay:
                await asyncio.sleep(delay)

    def _refused(self, pod: Pod, error: KubeError) -> None:
        log("resize refused", pod=pod.key, error=str(error))
        if self._troubles.get(pod.metadata.uid) is None:
            self._troubles[pod.metadata.uid] = podstatus.Trouble("Refused", str(error))
            self._recorder.record(
                Reference.pod(pod.metadata),
                "ResizeRefused",
                f"the API server refused other requests for the pod: {error}; its containers hibernate "
                "and wake all the same; a ResourceQuota or LimitRange of the namespace may forbid it",
                WARNING,
            )

    async def _abilities(self) -> Server:
        if self._server is None:
            self._server = await self._kube.abilities()
        return self._server

    def _pod(self, uid: str) -> Pod | None:
        return self.informer.get(self._by_uid.get(uid, ""))

    # ---- events -------------------------------------------------------------------------------------

    def report(self, event: Event) -> None:
        """Passes on what a container has reported, as an event of its pod."""
        pod = self.informer.get(f"{event.namespace}/{event.pod}") if event.pod else None
        if pod is None:
            return
        message = event.message
        if event.duration_ms is not None:
            message += f" ({event.duration_ms:.0f} ms)"
        kind = NORMAL if event.reason in _USUAL else WARNING
        about = Reference.pod(pod.metadata, event.container)
        self._recorder.record(about, event.reason, message, kind)


async def _wake(managed: ManagedContainer) -> None:
    try:
        await managed.wake("attach")
    except ArchitectError as error:
        log("not woken for attach", pod=managed.name, error=str(error))


def _is_ours(pod: Pod) -> bool:
    return pod.spec.runtimeClassName == RUNC_CLASS
