"""A container of this node is to be started: whether a checkpoint of another node takes its place, and how.

Called by :mod:`.moves` when runc-architect asks at `start`: the container exists then, with its mounts, its
cgroup and the pod's network, and its program has not run. The source goes on until this node is ready, and
again if anything fails here before the commit. What was fetched stays in ``ARRIVALS/<checkpoint uid>/`` until
the pod runs, so that a container that the kubelet makes anew finds it. A pod whose restore was given up, and
which starts fresh, is known by its Checkpoint: phase Failed after the commit.
"""

from __future__ import annotations

import asyncio
import math
import shutil
import time
from typing import Final

from architect.adapters import silence
from architect.adapters.kube import checkpoints, owners
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.events import NORMAL, WARNING, Reference
from architect.adapters.kube.informer import Change
from architect.adapters.kube.resources import Checkpoint, Pod
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import CANNOT_MOVE, MIGRATED, STARTED_FRESH
from architect.decisions import pairing
from architect.processes.architectd.cluster.arrival import Arrival, NotHere, leave_home
from architect.processes.architectd.cluster.patience import insist, within
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer

_BLOCK_S: Final = 90.0
"""Seconds that a start waits at the most: the kubelet gives up after two minutes."""
_AGAIN_S: Final = 1.0
_MOST_AGAIN_S: Final = 8.0
"""Seconds between two tries of a move, twice as many each time: each may freeze the pod for nothing."""


class StillOnItsWay(ArchitectError):
    """The checkpoint is claimed and not here yet."""


class Arriving:
    """See the module."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._arrivals: dict[str, Arrival] = {}
        """By the Checkpoint's uid."""
        self._news = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    def checkpoint_changed(self, change: Change[Checkpoint]) -> None:
        """Any Checkpoint."""
        self._news.set()
        checkpoint = change.object
        uid = checkpoint.metadata.uid
        if change.new is None:
            self._arrivals.pop(uid, None)
            shutil.rmtree(paths.ARRIVALS / uid, ignore_errors=True)
        elif change.old is None and checkpoint.status.phase == "Committed":
            claim = checkpoint.status.claimedBy
            if (
                claim is not None
                and claim.nodeName == self._site.node
                and uid not in self._arrivals
            ):
                # An earlier daemon may have had nothing left to do but to say so.
                task = asyncio.create_task(self._finish(checkpoint, claim.podUID))
                self._tasks.add(task)
                task.add_done_callback(self._tasks.discard)

    async def _finish(self, checkpoint: Checkpoint, pod_uid: str) -> None:
        mine = self._site.registry.of_pod(pod_uid)
        names = {one.name for one in checkpoint.spec.containers}
        if not names <= {one.record.container for one in mine if not one.arrivable}:
            return
        try:
            for managed in mine:
                await managed.settled()
            await asyncio.to_thread(silence.end, mine[0].record.keeper)
            pod = await self._pod(mine[0], math.inf)
            if pod is not None:
                message = (
                    f"moved from node {checkpoint.spec.nodeName}; architectd began anew meanwhile"
                )
                self._report(pod, MIGRATED, message)
                log("migrated", pod=pod.key, checkpoint=checkpoint.key)
            written = await insist(lambda: checkpoints.restored(self._site.kube, checkpoint, 0, 0))
            self._site.checkpoints.note(written)
        except ArchitectError as error:
            log("arrival not finished", checkpoint=checkpoint.key, error=str(error))

    async def arrives(self, managed: MovableContainer) -> bool:
        """Whether a checkpoint has taken the container's place; see :class:`..server.Moves`.

        Raises:
            ArchitectError: it is on its way; the kubelet is to try again.
        """
        if (paths.DEPARTURES / managed.record.pod_uid).exists():
            raise StillOnItsWay(
                f"{managed.name} is not started",
                "its pod has left this node, and its state with it",
                "none needed: the pod is being deleted",
            )
        if not (managed.arrivable or managed.expecting):
            # It landed, and the daemon that was asked did not live to say so.
            await managed.settled()
            return True
        deadline = time.monotonic() + _BLOCK_S
        pod = await self._pod(managed, deadline)
        if pod is None:
            return False
        checkpoint = await self._claimed(managed, pod, deadline)
        if checkpoint is None:
            return False
        if pairing.starts_fresh(checkpoints.seen(checkpoint), pod.metadata.uid):
            await self._start_fresh(managed, checkpoint)
            return False
        arrival = self._arrivals.get(checkpoint.metadata.uid)
        if arrival is None:
            arrival = Arrival(self._site, pod, checkpoint)
            self._arrivals[checkpoint.metadata.uid] = arrival
        if not arrival.has(managed.record.container):
            return False
        pause = _AGAIN_S
        while True:
            try:
                taking = asyncio.create_task(arrival.take(managed))
                self._tasks.add(taking)
                taking.add_done_callback(self._taken)
                # Not cancelled in the middle of a commit: it goes on, for the next try to find its outcome.
                await asyncio.wait_for(asyncio.shield(taking), deadline - time.monotonic())
                return True
            except NotHere as error:
                # Found before the source stopped: it ends there, as without us, and starts here.
                self._report(pod, CANNOT_MOVE, str(error), WARNING)
                return False
            except TimeoutError as error:
                raise StillOnItsWay(
                    f"{managed.name} waits for its checkpoint",
                    f"it was not here within {_BLOCK_S:.0f} s; the claim is kept",
                    "none needed: the kubelet tries again",
                ) from error
            except (ArchitectError, OSError) as error:
                log("not arrived", pod=pod.key, error=str(error))
                if arrival.committed or time.monotonic() + pause > deadline:
                    raise
                await asyncio.sleep(pause)
                pause = min(2 * pause, _MOST_AGAIN_S)
                found = self._mine(pod)
                if found is None:
                    checkpoint = await self._claimed(managed, pod, deadline)
                    if checkpoint is None:
                        return False
                else:
                    checkpoint = found
                arrival.checkpoint = checkpoint

    async def _start_fresh(self, managed: MovableContainer, checkpoint: Checkpoint) -> None:
        """Takes away what the pod has of a state that was given up, but for the state itself."""
        log("starts fresh", pod=managed.name, checkpoint=checkpoint.key)
        self._arrivals.pop(checkpoint.metadata.uid, None)
        await managed.not_coming()
        await asyncio.to_thread(leave_home, managed)

    def _taken(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log("taking ended", error=str(task.exception()))

    async def _pod(self, managed: MovableContainer, deadline: float) -> Pod | None:
        """The container's pod, as the API has it: the copy may not have it yet.

        Raises StillOnItsWay: the API has not said by ``deadline``; a state may have been given to it.
        """
        record = managed.record
        found = self._site.pods.get(f"{record.namespace}/{record.pod}")
        while found is None or found.metadata.uid != record.pod_uid:
            try:
                found = await self._site.kube.get(Pod, record.pod, record.namespace)
            except KubeError as error:
                if error.status == 404:
                    return None
                log("pod unknown", pod=managed.name, error=str(error))
                if time.monotonic() + _AGAIN_S > deadline:
                    raise _unanswered(managed) from error
                await asyncio.sleep(_AGAIN_S)
        return found

    def _mine(self, pod: Pod) -> Checkpoint | None:
        """The Checkpoint that decides how the pod starts."""
        uid = pod.metadata.uid
        return next(
            (
                one
                for one in self._site.checkpoints.objects.values()
                if (_claimant(one) == uid and one.status.phase in ("Claimed", "Committed"))
                or pairing.starts_fresh(checkpoints.seen(one), uid)
            ),
            None,
        )

    async def _claimed(
        self, managed: MovableContainer, pod: Pod, deadline: float
    ) -> Checkpoint | None:
        """The pod's checkpoint, waited for while one may come.

        Raises StillOnItsWay: by ``deadline`` the API has not said which Checkpoints there are.
        """
        synced = self._site.checkpoints.synced
        await within(deadline - time.monotonic(), synced.wait())
        if not synced.is_set():
            raise _unanswered(managed)
        began = time.monotonic()
        patience = managed.settings.scaleup_timeout_ns / 1e9
        waited = False
        while True:
            self._news.clear()
            found = self._mine(pod)
            if found is not None:
                return found
            left = began + patience - time.monotonic()
            # What has run in this pod and begins again is offered none.
            began_before = checkpoints.has_begun(pod, managed.record.container)
            if left <= 0 or began_before or not await self._may_come(pod):
                if waited and left <= 0:
                    message = (
                        f"{managed.name} starts fresh: no checkpoint was there for it within "
                        f"{patience:g} s (scaleup-timeout-containers)"
                    )
                    self._report(pod, STARTED_FRESH, message, WARNING)
                return None
            waited = True
            await within(min(left, _AGAIN_S), self._news.wait())

    async def _may_come(self, pod: Pod) -> bool:
        """Whether a sibling is leaving, or its checkpoint waits for a pod such as this."""
        try:
            return await owners.may_come(
                self._site.kube, pod, self._site.checkpoints.objects.values()
            )
        except KubeError as error:
            log("siblings unknown", pod=pod.key, error=str(error))
            return True

    def _report(self, pod: Pod, reason: str, message: str, kind: str = NORMAL) -> None:
        self._site.recorder.record(Reference.pod(pod.metadata), reason, message, kind)


def _unanswered(managed: MovableContainer) -> StillOnItsWay:
    return StillOnItsWay(
        f"{managed.name} is not started",
        "the API does not answer, and the pod's state may be on its way",
        "see whether the API server can be reached from this node; the kubelet tries again",
    )


def _claimant(checkpoint: Checkpoint) -> str:
    claim = checkpoint.status.claimedBy
    return claim.podUID if claim else ""
