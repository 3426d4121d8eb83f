"""What the API says of a pod that is being deleted: its owner and its siblings, read anew each time.

:func:`facts` is what :mod:`architect.decisions.moving` judges by. No copy of an informer is asked: a
scale-down is written to the owner before the first pod is deleted, but a copy may see these in another order.
Called by architectd.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Iterable

from architect.adapters.kube import checkpoints
from architect.adapters.kube import resources as api
from architect.adapters.kube.client import Kube, KubeError
from architect.contract.kubernetes import MOVE_REQUESTED
from architect.decisions.moving import Leaving, Owner, Sibling
from architect.decisions.pairing import Phase
from architect.decisions.reconcile import managed

_NAME = 253
_HASH = "pod-template-hash"


def is_to_move(pod: api.Pod) -> bool:
    """Whether somebody makes a successor of this pod, which no controller replaces."""
    return pod.annotations.get(MOVE_REQUESTED) == pod.metadata.uid


def checkpoint_name(pod: api.Pod) -> str:
    """The name of a pod's Checkpoint: its own, and the beginning of its UID."""
    tail = f"-{pod.metadata.uid[:8]}"
    return pod.metadata.name[: _NAME - len(tail)].rstrip(".-") + tail


def spec(pod: api.Pod, node: str) -> api.Checkpoint:
    """The Checkpoint of a pod of ``node``, to be offered: its name, namespace and spec."""
    owner = checkpoints.controller(pod)
    if owner is None and is_to_move(pod):
        # Nobody else stands for it: `kubectl architect move` makes its successor.
        name, uid = pod.metadata.name, pod.metadata.uid
        owner = api.OwnerReference(apiVersion="v1", kind="Pod", name=name, uid=uid)
    what = checkpoints.template(pod)
    names = managed(pod.annotations)
    every = (*pod.spec.containers, *(pod.spec.initContainers or ()))
    numbered = bool(what.revision) and what.ordinal is not None
    return api.Checkpoint(
        metadata=api.Metadata(name=checkpoint_name(pod), namespace=pod.metadata.namespace),
        spec=api.CheckpointSpec(
            podName=pod.metadata.name,
            podUID=pod.metadata.uid,
            nodeName=node,
            owner=api.CheckpointOwner(
                apiVersion=owner.apiVersion, kind=owner.kind, name=owner.name, uid=owner.uid
            )
            if owner
            else None,
            templateHash=what.template_hash or None,
            controllerRevision=what.revision if numbered else None,
            ordinal=what.ordinal if numbered else None,
            containers=tuple(
                api.CheckpointContainer(one.name)
                for one in every
                if names is None or one.name in names
            ),
        ),
    )


async def facts(kube: Kube, pod: api.Pod) -> tuple[Leaving, Owner | None, tuple[Sibling, ...]]:
    """What :func:`architect.decisions.moving.judge` takes.

    Raises:
        KubeError: the API does not say; nothing may be decided.
    """
    reference = checkpoints.controller(pod)
    what = checkpoints.template(pod)
    leaving = Leaving(
        name=pod.metadata.name,
        uid=pod.metadata.uid,
        owner_kind=reference.kind if reference else "",
        owner_uid=reference.uid if reference else "",
        template_hash=what.template_hash,
        revision=what.revision,
        ordinal=what.ordinal,
        created=_seconds(pod.metadata.creationTimestamp),
        deleted_at=_deleted_at(pod) if pod.metadata.deletionTimestamp else None,
        started=checkpoints.started(pod),
        finished=checkpoints.finished(pod),
        is_to_move=reference is None and is_to_move(pod),
    )
    if reference is None:
        return leaving, None, ()
    owner = await _owner(kube, reference, pod.metadata.namespace)
    if reference.kind != "ReplicaSet" or not owner.exists or not what.template_hash:
        return leaving, owner, ()
    known = await kube.listed(api.Checkpoint, namespace=pod.metadata.namespace)
    return leaving, owner, await _siblings(kube, pod, known)


async def may_come(kube: Kube, pod: api.Pod, known: Iterable[api.Checkpoint]) -> bool:
    """Whether a state may still be offered to a pod that waits: worth its while.

    An unclaimed checkpoint fits it, or a sibling is leaving of which nothing is known yet.

    Raises:
        KubeError: the API does not say.
    """
    known = list(known)
    what = checkpoints.template(pod)
    for one in map(checkpoints.seen, known):
        if one.phase in (Phase.NEW, Phase.AVAILABLE) and what.fits(one.template):
            return True
    if not what.template_hash:
        return False
    settled = {one.spec.podUID for one in known}
    return any(
        one.leaving and one.started and not one.finished and one.uid not in settled
        for one in await _siblings(kube, pod, known)
    )


async def _siblings(
    kube: Kube, pod: api.Pod, known: Iterable[api.Checkpoint]
) -> tuple[Sibling, ...]:
    """The other pods of its owner and template."""
    committed = [one for one in known if one.status.move is not None]
    moved = {one.spec.podUID for one in committed}
    arrived = {one.status.claimedBy.podUID for one in committed if one.status.claimedBy}
    what = checkpoints.template(pod)
    found = await kube.listed(
        api.Pod, namespace=pod.metadata.namespace, labels=f"{_HASH}={what.template_hash}"
    )
    return tuple(
        Sibling(
            name=one.metadata.name,
            uid=one.metadata.uid,
            template_hash=what.template_hash,
            created=_seconds(one.metadata.creationTimestamp),
            leaving=one.metadata.deletionTimestamp is not None,
            deleted_at=_deleted_at(one),
            started=checkpoints.started(one),
            finished=checkpoints.finished(one),
            moved=one.metadata.uid in moved,
            arrived=one.metadata.uid in arrived,
        )
        for one in found
        if one.metadata.uid != pod.metadata.uid and checkpoints.template(one) == what
    )


async def _owner(kube: Kube, reference: api.OwnerReference, namespace: str) -> Owner:
    """The controller as it is now. Of kinds that nothing is decided by, what the pod says."""
    kinds: dict[str, type[api.ReplicaSet | api.StatefulSet | api.Job]] = {
        "ReplicaSet": api.ReplicaSet,
        "StatefulSet": api.StatefulSet,
        "Job": api.Job,
    }
    kind = kinds.get(reference.kind)
    version = reference.apiVersion or "apps/v1"
    stated = Owner(reference.kind, reference.name, reference.uid, api_version=version)
    if kind is None or kind.api != f"apis/{version}":
        return stated
    try:
        found = await kube.get(kind, reference.name, namespace)
    except KubeError as error:
        if error.status != 404:
            raise
        return Owner(reference.kind, reference.name, reference.uid, version, exists=False)
    leaving = found.metadata.deletionTimestamp is not None or await _ends(kube, namespace)
    replicas: int | None = None
    revision, first, suspended, over = "", 0, False, False
    if isinstance(found, api.Job):
        suspended, over = bool(found.spec.suspend), found.finished
    else:
        replicas = 1 if found.spec.replicas is None else found.spec.replicas
    if isinstance(found, api.StatefulSet):
        revision = found.status.updateRevision
        first = found.spec.ordinals.start if found.spec.ordinals else 0
    return Owner(
        kind=reference.kind,
        name=reference.name,
        uid=reference.uid,
        api_version=version,
        exists=found.metadata.uid == reference.uid,
        leaving=leaving,
        replicas=replicas,
        revision=revision,
        first=first,
        suspended=suspended,
        finished=over,
    )


async def _ends(kube: Kube, namespace: str) -> bool:
    """Whether the namespace is being deleted: its pods go before their owners, and none comes anew."""
    try:
        found = await kube.get(api.Namespace, namespace)
    except KubeError as error:
        if error.status in (403, 404):
            # Without this right the pods wait for the end of their grace; nothing is lost.
            return False
        raise
    return found.status.phase == "Terminating" or found.metadata.deletionTimestamp is not None


def _seconds(time: str | None) -> float:
    return dt.datetime.fromisoformat(time).timestamp() if time else 0.0


def _deleted_at(pod: api.Pod) -> float:
    """When its deletion was asked for: a shorter grace moves its end, not this."""
    end = _seconds(pod.metadata.deletionTimestamp)
    return end - (pod.metadata.deletionGracePeriodSeconds or 0)
