"""What becomes of pods of this node that are being deleted: they end, or leave for another node.

Called by :mod:`.moves` for each change of a pod or of a Checkpoint and for each stop signal of the kubelet.
One task sees one pod off. What is true of the move is what its Checkpoint says: a daemon that starts in the
middle of one reads that, and goes on from there.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import functools
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any, Final

from architect.adapters.cgroup import Cgroup
from architect.adapters.kube import checkpoints, owners
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.events import NORMAL, WARNING, Reference
from architect.adapters.kube.informer import Backoff, Change, Timing
from architect.adapters.kube.resources import Checkpoint, Pod
from architect.contract.errors import ArchitectError
from architect.contract.flows import Flow
from architect.contract.kubernetes import TERMINATION_GRACE_PERIOD
from architect.contract.states import State
from architect.decisions import moving
from architect.processes.architectd import lifecycle
from architect.processes.architectd.cluster.departing import Departure
from architect.processes.architectd.cluster.patience import insist, within
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer

_LOOK_S: Final = 2.0
"""Seconds between two looks whether a pod that waits for its successor is still to move."""
_LOST: Final = "its node was restarted before another one had its state"
_LAST_S: Final = 20.0
"""Seconds before the end of the grace at which what has found no other node goes to the disk."""
_DEFAULT_GRACE_S: Final = 30.0
"""The API server's."""
_SUCCEEDED_S: Final = 120.0
"""Seconds for which a pod that has moved stays until its successor is Ready."""
_ROUTED_S: Final = 2.0
"""Seconds after that in which each node's kube-proxy learns of it: it gathers changes for one."""
_POLL_S: Final = 0.5
_SAME_NAME: Final = ("StatefulSet", "Pod")
"""Owners whose pod's successor has its name, and is made only when the pod is gone."""


class Leaving:
    """See the module."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._tasks: dict[str, asyncio.Task[None]] = {}
        """By the pod's uid."""
        self._ending: set[str] = set()
        """Uids of pods that end as under runc."""
        self._groups: dict[str, tuple[Cgroup, tuple[str, ...]]] = {}
        """By the uid of a pod that goes: the cgroup of a container, and the ids of what is seen off."""
        self._departures: dict[str, Departure] = {}
        """By the Checkpoint's key."""
        self._news: dict[str, asyncio.Event] = {}
        self._others: set[asyncio.Task[None]] = set()

    # ---- what happens ----------------------------------------------------------------------------

    def pod_changed(self, change: Change[Pod]) -> None:
        """A pod of this node."""
        pod = change.object
        uid = pod.metadata.uid
        if change.new is None:
            self._gone(pod)
        elif pod.metadata.deletionTimestamp is not None and self._containers(uid):
            self._see_off(uid)

    def checkpoint_changed(self, change: Change[Checkpoint]) -> None:
        """Any Checkpoint."""
        checkpoint = change.object
        if checkpoint.spec.nodeName != self._site.node:
            return
        news = self._news.get(checkpoint.key)
        if news is not None:
            news.set()
        departure = self._departures.get(checkpoint.key)
        phase = checkpoint.status.phase
        if departure is not None and (change.new is None or phase == "Restored"):
            if not departure.containers_left():
                self._departures.pop(checkpoint.key, None)
                departure.forget()
        elif departure is not None and _is_taken(checkpoint) and departure.frozen:
            self._spawn(self._depart(departure))

    def stopped(self, managed: MovableContainer) -> None:
        """The kubelet wants a container to end; its signal is in the record."""
        uid = managed.record.pod_uid
        if uid in self._ending:
            self._spawn(self._end(managed))
        elif uid not in self._tasks:
            self._spawn(self._was_stopped(managed))

    def started(self, managed: MovableContainer) -> None:
        """A container was started as new: what its manifest has for that is done now, and only then."""
        self._spawn(self._after_start(managed))

    async def _after_start(self, managed: MovableContainer) -> None:
        pod = self._pod(managed.record.pod_uid)
        if pod is None:
            namespace, name = managed.record.namespace, managed.record.pod
            try:
                pod = await insist(lambda: self._site.kube.get(Pod, name, namespace))
            except KubeError:
                return
        await lifecycle.started(
            managed,
            pod.annotations,
            pod_ip=pod.status.podIP or "",
            ports=_named_ports(pod, managed.record.container),
            grace_s=_grace_s(pod),
            report=self._reporter(pod, managed),
        )

    def _reporter(self, pod: Pod | None, managed: MovableContainer) -> Callable[[str, str], None]:
        def report(reason: str, message: str) -> None:
            if pod is not None:
                about = Reference.pod(pod.metadata, managed.record.container)
                self._site.recorder.record(about, reason, message, WARNING)

        return report

    def found(self) -> None:
        """The daemon has started: goes on with what it finds."""
        for departure in Departure.found(self._site.registry):
            self._departures[departure.key] = departure
            self._spawn(self._in_doubt(departure))
        for managed in self._site.registry.all():
            if managed.take_stop() and managed.record.pod_uid not in self._tasks:
                self._spawn(self._was_stopped(managed))

    async def disown(self) -> None:
        """Once at the start: what this node has offered and has no more, as after a power failure, is lost.

        Nobody is to wait for it: who has claimed it starts fresh. And what is here and has been taken in the
        meantime is thrown away.
        """
        site = self._site
        await site.checkpoints.synced.wait()
        for key, departure in list(self._departures.items()):
            known = site.checkpoints.get(key)
            taken = departure.fleeting if known is None else known.status.phase == "Restored"
            if taken and not departure.containers_left():
                self._departures.pop(key)
                departure.forget()
        for checkpoint in list(site.checkpoints.objects.values()):
            if checkpoint.spec.nodeName != site.node or checkpoint.key in self._departures:
                continue
            if checkpoint.status.phase not in ("", "Available", "Claimed"):
                continue
            if site.registry.of_pod(checkpoint.spec.podUID):
                continue
            log("lost", checkpoint=checkpoint.key, phase=checkpoint.status.phase)
            with contextlib.suppress(checkpoints.Lost):
                await insist(functools.partial(checkpoints.failed, site.kube, checkpoint, _LOST))

    def departure(self, key: str) -> Departure | None:
        """Whom another node may ask for under the key of a Checkpoint."""
        return self._departures.get(key)

    def _containers(self, uid: str) -> list[MovableContainer]:
        return [one for one in self._site.registry.of_pod(uid) if one.settings.managed]

    def _gone(self, pod: Pod) -> None:
        """It has left the API: nobody is sent to its address any more."""
        self._ending.discard(pod.metadata.uid)
        self._groups.pop(pod.metadata.uid, None)
        for key, departure in self._departures.items():
            if departure.pod_uid == pod.metadata.uid:
                self._spawn(self._stop_accepting(key))

    async def _stop_accepting(self, key: str) -> None:
        backoff = Backoff(Timing())
        while (checkpoint := self._site.checkpoints.get(key)) is not None:
            if checkpoint.status.move is None:
                await asyncio.sleep(_LOOK_S)
                continue
            if not checkpoint.status.move.accepting:
                return
            try:
                with contextlib.suppress(checkpoints.Lost):
                    # Else it is over already.
                    await checkpoints.stop_accepting(self._site.kube, checkpoint)
                return
            except KubeError as error:
                await asyncio.sleep(backoff.next(error.retry_after))

    # ---- one pod ---------------------------------------------------------------------------------

    def _see_off(self, uid: str) -> None:
        if uid in self._tasks or uid in self._ending:
            return
        taken_in = self._site.registry.of_pod(uid)
        for one in taken_in:
            if one.clock.cgroup is not None and one.record.sandbox:
                # Now: when these have ended nobody knows it any more.
                spared = (one.record.sandbox, *(each.record.id for each in taken_in))
                self._groups[uid] = (one.clock.cgroup, spared)
        task = asyncio.create_task(self._decide(uid))
        self._tasks[uid] = task

        def done(_: asyncio.Task[None]) -> None:
            self._tasks.pop(uid, None)
            if not task.cancelled() and task.exception() is not None:
                log("internal error", error=repr(task.exception()), pod=uid)

        task.add_done_callback(done)

    async def _was_stopped(self, managed: MovableContainer) -> None:
        """A stop signal for a pod that nobody is known to have deleted: asks the API, not the copy."""
        backoff = Backoff(Timing())
        while managed.state is not State.ENDED:
            try:
                record = managed.record
                pod = await self._site.kube.get(Pod, record.pod, record.namespace)
            except KubeError as error:
                if error.status == 404:
                    pod = None
                else:
                    # Unknown: it runs on to the end of its grace.
                    await asyncio.sleep(backoff.next(error.retry_after))
                    continue
            if pod is None or pod.metadata.uid != managed.record.pod_uid:
                await self._end(managed)
            elif pod.metadata.deletionTimestamp is None:
                # The kubelet restarts the container: a failed liveness probe, or a crash of another.
                await self._end(managed, pod)
            else:
                self._site.pods.note(pod)
                self._see_off(pod.metadata.uid)
            return

    async def _decide(self, uid: str) -> None:
        backoff = Backoff(Timing())
        while True:
            pod = self._pod(uid)
            if pod is None or not self._containers(uid):
                return
            try:
                facts = await owners.facts(self._site.kube, pod)
            except KubeError as error:
                if _left_s(pod) < _LAST_S:
                    await self._to_disk(pod, f"nobody could say what becomes of the pod: {error}")
                    await self._offer_late(pod)
                    return
                await asyncio.sleep(backoff.next(error.retry_after))
                continue
            judgement = moving.judge(*facts)
            log("decided", pod=pod.key, verdict=judgement.verdict.value, why=judgement.why)
            if judgement.verdict is moving.Verdict.END:
                self._end_all(pod)
                return
            if await self._move(pod):
                return

    def _end_all(self, pod: Pod) -> None:
        """As under runc: each container when the kubelet stops it."""
        self._ending.add(pod.metadata.uid)
        self._spawn(self._end_others(pod))
        for managed in self._containers(pod.metadata.uid):
            if managed.record.stop_signal:
                self._spawn(self._end(managed, pod))

    async def _end_others(self, pod: Pod) -> None:
        """The containers that are not managed have the user's grace, too.

        The kubelet has asked them to stop, and knows the grace alone that admission has raised.
        """
        group, spared = self._groups.get(pod.metadata.uid, (None, ()))
        if TERMINATION_GRACE_PERIOD not in pod.annotations or group is None:
            return
        asked_s = pod.metadata.deletionGracePeriodSeconds or 0
        await asyncio.sleep(max(0.0, _left_s(pod) - asked_s + _grace_s(pod)))
        ended = await asyncio.to_thread(group.end_neighbours, spared)
        if ended:
            log("grace is over", pod=pod.key, ended=ended)

    async def _end(self, managed: MovableContainer, pod: Pod | None = None) -> None:
        pod = pod or self._pod(managed.record.pod_uid)
        signal = managed.record.stop_signal or 15
        await lifecycle.end(
            managed,
            pod.annotations if pod else {},
            pod_ip=(pod.status.podIP or "") if pod else "",
            ports=_named_ports(pod, managed.record.container),
            signal=signal,
            grace_s=_grace_s(pod),
            report=self._reporter(pod, managed),
        )

    # ---- a move ----------------------------------------------------------------------------------

    async def _move(self, pod: Pod) -> bool:
        """Offers the pod until another node has it; False if it is to be judged anew."""
        site = self._site
        backoff = Backoff(Timing())
        while True:
            try:
                checkpoint = await checkpoints.offer(
                    site.kube, owners.spec(pod, site.node), site.endpoint
                )
                break
            except KubeError as error:
                if _left_s(pod) < _LAST_S:
                    await self._to_disk(pod, f"its checkpoint could not be offered: {error}")
                    await self._offer_late(pod)
                    return True
                await asyncio.sleep(backoff.next(error.retry_after))
        key = checkpoint.key
        news = self._news[key] = asyncio.Event()
        departure = self._departures.get(key)
        if departure is None:
            departure = self._departure(key, pod)
        site.checkpoints.note(checkpoint)
        log("offered", pod=pod.key, checkpoint=key)
        if checkpoint.spec.owner is not None and checkpoint.spec.owner.kind in _SAME_NAME:
            await self._to_disk(pod, "", departure)
            return True
        judged = time.monotonic()
        while True:
            found = site.checkpoints.get(key) or checkpoint
            if _is_taken(found):
                await self._depart(departure)
                self._spawn(self._end_others(pod))
                return True
            if departure.refused:
                self._report(pod, "CannotMove", departure.refused, WARNING)
                await checkpoints.failed(site.kube, found, departure.refused)
                self._end_all(pod)
                return True
            if _left_s(pod) < _LAST_S and not departure.frozen:
                await self._to_disk(
                    pod, "no other node has taken it before the end of its grace", departure
                )
                return True
            if found.status.phase == "Available" and time.monotonic() - judged > _LOOK_S:
                judged = time.monotonic()
                if await self._is_over(pod, found):
                    self._departures.pop(key, None)
                    return False
            news.clear()
            await within(_LOOK_S, news.wait())

    async def _depart(self, departure: Departure) -> None:
        """Ends what has moved, once its Services have another endpoint.

        Till then they have this one, which is leaving and still serves (KEP-1669): its address is the way to
        the new pod. Without any, new connections would be refused.
        """
        await within(_SUCCEEDED_S, self._succeeded(departure))
        await departure.depart()

    async def _succeeded(self, departure: Departure) -> None:
        """Returns when the pod that has it is Ready, for all to know, or never will be.

        Nor is a pod waited for whose predecessor is not Ready itself: nobody is sent there.
        """
        while (checkpoint := self._site.checkpoints.get(departure.key)) is not None:
            claim, mine = checkpoint.status.claimedBy, self._pod(departure.pod_uid)
            if claim is None or mine is None or not mine.ready:
                return
            try:
                namespace = checkpoint.metadata.namespace
                pod = await self._site.kube.get(Pod, claim.podName, namespace)
            except KubeError as error:
                if error.status == 404:
                    return
            else:
                if pod.metadata.uid != claim.podUID or pod.metadata.deletionTimestamp is not None:
                    return
                if pod.ready:
                    await asyncio.sleep(_ROUTED_S)
                    return
            await asyncio.sleep(_POLL_S)

    async def _is_over(self, pod: Pod, checkpoint: Checkpoint) -> bool:
        """Whether it is to end after all, as far as is known, and its offer is taken back."""
        try:
            facts = await owners.facts(self._site.kube, pod)
            if moving.judge(*facts).verdict is not moving.Verdict.END:
                return False
            return await checkpoints.withdraw(self._site.kube, checkpoint)
        except KubeError as error:
            log("not judged again", pod=pod.key, error=str(error))
            return False

    async def _to_disk(self, pod: Pod, why: str, departure: Departure | None = None) -> None:
        """Its checkpoint outlives it here, until another node's pod takes it."""
        if departure is None:
            key = f"{pod.metadata.namespace}/{owners.checkpoint_name(pod)}"
            departure = self._departures.get(key) or self._departure(key, pod)
        try:
            await departure.freeze(durable=True)
        except ArchitectError as error:
            self._report(
                pod, "CannotMove", f"{error}; it ends, and its successor starts fresh", WARNING
            )
            self._end_all(pod)
            return
        if why:
            message = f"its state is on the disk of {self._site.node}: {why}"
            self._report(pod, "CheckpointKept", message, NORMAL)
        await departure.depart()
        self._spawn(self._end_others(pod))

    async def _offer_late(self, pod: Pod) -> None:
        """What went to the disk while the API was away is offered once it answers, if the pod is to move.

        Not if its place is taken by then: its replacement has not waited for ever.
        """
        key = f"{pod.metadata.namespace}/{owners.checkpoint_name(pod)}"
        departure = self._departures.get(key)
        if departure is None or not departure.frozen:
            return
        site = self._site
        judgement = moving.judge(*await insist(lambda: owners.facts(site.kube, pod)))
        log("decided", pod=pod.key, verdict=judgement.verdict.value, why=judgement.why)
        if judgement.verdict is moving.Verdict.END:
            self._departures.pop(key)
            departure.forget()
            why = f"its state was on the disk of {site.node}, and is not needed: {judgement.why}"
            self._report(pod, "CannotMove", why, WARNING)
            return
        offered = await insist(
            lambda: checkpoints.offer(site.kube, owners.spec(pod, site.node), site.endpoint)
        )
        site.checkpoints.note(offered)
        log("offered", pod=pod.key, checkpoint=key)

    def fell_silent(self, departure: Departure) -> None:
        """The node that was taking it is not connected any more."""
        self._spawn(self._in_doubt(departure))

    async def _in_doubt(self, departure: Departure) -> None:
        """The other node has fallen silent: the move is given up, unless it was committed.

        A write makes sure that it will not be: a commit is a compare-and-swap.
        """
        backoff = Backoff(Timing())
        while departure.frozen and departure.containers_left():
            namespace, _, name = departure.key.partition("/")
            try:
                checkpoint = await self._site.kube.get(Checkpoint, name, namespace)
                self._site.checkpoints.note(checkpoint)
                if _is_taken(checkpoint):
                    await self._depart(departure)
                    return
                if departure.in_use:
                    return
                await checkpoints.release(self._site.kube, checkpoint)
            except KubeError as error:
                if error.status != 404:
                    await asyncio.sleep(backoff.next(error.retry_after))
                    continue
            await departure.thaw()

    # ---- helpers ---------------------------------------------------------------------------------

    def _departure(self, key: str, pod: Pod) -> Departure:
        uid = pod.metadata.uid
        brought = list(self._brought(uid))
        # Not those at which it only was: a pod that moves often would have more and more.
        addresses = [*pod.status.addresses, *sorted({one.local for one in brought})]
        one = Departure(key, uid, addresses, self._containers(uid), brought)
        self._departures[key] = one
        return one

    def _brought(self, uid: str) -> Iterator[Flow]:
        """Connections that the pod has from where it was before."""
        for one in self._site.checkpoints.objects.values():
            claim, move = one.status.claimedBy, one.status.move
            if claim is not None and claim.podUID == uid and move is not None:
                yield from map(Flow.parse, move.flows)

    def _pod(self, uid: str) -> Pod | None:
        found = (one for one in self._site.pods.objects.values() if one.metadata.uid == uid)
        return next(found, None)

    def _report(self, pod: Pod, reason: str, message: str, kind: str) -> None:
        log(reason, pod=pod.key, message=message)
        self._site.recorder.record(Reference.pod(pod.metadata), reason, message, kind)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._others.add(task)

        def done(_: asyncio.Task[None]) -> None:
            self._others.discard(task)
            if not task.cancelled() and task.exception() is not None:
                log("internal error", error=repr(task.exception()))

        task.add_done_callback(done)


def _is_taken(checkpoint: Checkpoint) -> bool:
    """Whether another node has it, even if it could not restore it: nothing goes on here any more."""
    return checkpoint.status.move is not None


def _left_s(pod: Pod) -> float:
    """Seconds until the kubelet kills it."""
    end = dt.datetime.fromisoformat(pod.metadata.deletionTimestamp or "9999-01-01T00:00:00Z")
    return end.timestamp() - time.time()


def _grace_s(pod: Pod | None) -> float:
    """The user's own, which admission has raised."""
    given = pod.annotations.get(TERMINATION_GRACE_PERIOD) if pod else None
    if given is None and pod is not None:
        given = str(pod.spec.terminationGracePeriodSeconds or "")
    try:
        return float(given or _DEFAULT_GRACE_S)
    except ValueError:
        return _DEFAULT_GRACE_S


def _named_ports(pod: Pod | None, container: str) -> dict[str, int]:
    found = pod.spec.containers if pod else ()
    return {
        port.name: port.containerPort
        for one in found
        if one.name == container
        for port in one.ports or ()
        if port.name
    }
