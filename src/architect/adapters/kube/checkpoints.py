"""Checkpoints in the API: every write that is made to one, and how the decisions see it.

Called by architectd of the node that a pod leaves (offer, withdraw, release, failed, stop_accepting), by that
of the node it comes to (commit, restored, not_restored, given_up, drop_flows), and by the control plane
(claim, release, delete). Each write is a compare-and-swap: who has the state is what the last one says. Two
that race never both succeed, and one without an answer is settled by reading, or by writing again.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

from architect.adapters.kube import resources as api
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.resources import Checkpoint
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import GROUP, MOVE_REQUESTED, VERSION
from architect.decisions import pairing
from architect.decisions.pairing import Phase, Template
from architect.decisions.reconcile import managed

_ATTEMPTS: Final = 8
"""Conflicts with other writers that a change survives which does not depend on theirs."""
_CONFLICTS: Final = (404, 409, 422)
"""Another version, another object of that name, none at all, or a rule of the CRD: somebody was quicker."""
_INDEX: Final = "batch.kubernetes.io/job-completion-index"
_HASH: Final = "pod-template-hash"
_BY_HAND: Final = "move"
"""In the place of a revision, for pods without a controller. No controller's pods have it."""
_REVISION: Final = "controller-revision-hash"


class Lost(ArchitectError):
    """Another state is there than the one that a write was to follow; nothing was written."""


# -- how the decisions see them -------------------------------------------------------------------------


def controller(pod: api.Pod) -> api.OwnerReference | None:
    """Who made the pod, and replaces it."""
    return next((one for one in pod.metadata.ownerReferences or () if one.controller), None)


def template(pod: api.Pod) -> Template:
    """What a pod and its replacement have in common."""
    owner = controller(pod)
    if owner is None:
        # Whose state it leaves, or is to have: the pod with that UID stands for the controller.
        moves = pod.annotations.get(MOVE_REQUESTED)
        if not moves:
            return Template(pod.metadata.namespace)
        return Template(pod.metadata.namespace, moves, revision=_BY_HAND, ordinal=0)
    number: int | None = None
    revision = ""
    if owner.kind == "StatefulSet":
        revision = pod.labels.get(_REVISION, "")
        last = pod.metadata.name.rpartition("-")[2]
        number = int(last) if last.isdecimal() else None
    if owner.kind == "Job":
        # Those of a Job that counts its pods have a number; of another one each is as good as the other.
        index = pod.labels.get(_INDEX, "0")
        revision, number = owner.uid, int(index) if index.isdecimal() else 0
    hashed = pod.labels.get(_HASH, "") if owner.kind == "ReplicaSet" else ""
    return Template(pod.metadata.namespace, owner.uid, hashed, revision, number)


def started(pod: api.Pod) -> bool:
    """Whether a managed container of the pod has been started."""
    names = managed(pod.annotations)
    all_of_it = (*(pod.status.containerStatuses or ()), *(pod.status.initContainerStatuses or ()))
    return any(one.begun for one in all_of_it if names is None or one.name in names)


def has_begun(pod: api.Pod, container: str) -> bool:
    """Whether the kubelet says that a container of the pod has run, now or before."""
    all_of_it = (*(pod.status.containerStatuses or ()), *(pod.status.initContainerStatuses or ()))
    return any(one.begun for one in all_of_it if one.name == container)


def finished(pod: api.Pod) -> bool:
    """Whether the pod has come to its end, whatever is left of it in the API."""
    return pod.status.phase in ("Succeeded", "Failed")


def seen(checkpoint: Checkpoint) -> pairing.Checkpoint:
    """A Checkpoint as :mod:`architect.decisions.pairing` looks at it."""
    spec, status = checkpoint.spec, checkpoint.status
    claim = status.claimedBy or api.Claimant()
    return pairing.Checkpoint(
        key=checkpoint.key,
        template=Template(
            checkpoint.metadata.namespace,
            spec.owner.uid if spec.owner else "",
            spec.templateHash or "",
            spec.controllerRevision or "",
            spec.ordinal,
        ),
        phase=Phase(status.phase),
        pod_uid=spec.podUID,
        node=spec.nodeName,
        created=checkpoint.metadata.creationTimestamp or "",
        claimed_uid=claim.podUID,
        claimed_node=claim.nodeName,
        committed=status.move is not None,
        flows=status.move is not None and bool(status.move.flows),
    )


def pods(all_pods: Iterable[api.Pod]) -> list[pairing.Pod]:
    """Those pods that have managed containers, as :mod:`architect.decisions.pairing` looks at them."""
    return [
        pairing.Pod(
            key=one.key,
            uid=one.metadata.uid,
            template=template(one),
            node=one.spec.nodeName,
            created=one.metadata.creationTimestamp or "",
            leaving=one.metadata.deletionTimestamp is not None,
            finished=finished(one),
            started=started(one),
        )
        for one in all_pods
        if managed(one.annotations)
    ]


# -- the node that a pod leaves -------------------------------------------------------------------------


async def offer(kube: Kube, wanted: Checkpoint, endpoint: str) -> Checkpoint:
    """Makes the Checkpoint of a pod (:func:`.owners.spec`), to be had at ``endpoint``.

    One that is there already for the same pod is taken over: its state stays, but what had failed is
    available again.

    Raises:
        KubeError: it could not be written; 409 if another pod's has the name.
    """
    meta = wanted.metadata
    body = {
        "apiVersion": f"{GROUP}/{VERSION}",
        "kind": "Checkpoint",
        "metadata": {"name": meta.name, "namespace": meta.namespace},
        "spec": wanted.spec,
    }
    try:
        made = await kube.create(Checkpoint, body, meta.namespace)
    except KubeError as error:
        if error.status != 409:
            raise
        made = await kube.get(Checkpoint, meta.name, meta.namespace)
        if made.spec.podUID != wanted.spec.podUID:
            raise

    def change(now: Checkpoint) -> dict[str, Any] | None:
        fresh = now.status.phase in ("", Phase.FAILED) and now.status.move is None
        if not fresh and now.status.endpoint == endpoint:
            return None
        if not fresh:
            return {"endpoint": endpoint}
        told = _told(now, "Advertised", True, "Offered", f"at {endpoint}")
        return {
            "phase": Phase.AVAILABLE,
            "endpoint": endpoint,
            "claimedBy": None,
            "message": None,
            "conditions": told,
        }

    return await _change(kube, made, change)


async def withdraw(kube: Kube, checkpoint: Checkpoint) -> bool:
    """Takes an offer back, unless it is claimed by now: then False, and it stays.

    It is marked first, by compare-and-swap, so that nobody claims what is about to be deleted.

    Raises:
        KubeError: no answer; try again.
    """
    try:
        if checkpoint.status.phase != Phase.FAILED:
            if checkpoint.status.phase not in ("", Phase.AVAILABLE):
                return False
            told = _told(checkpoint, "Advertised", False, "Withdrawn", "the pod does not move")
            checkpoint = await _write(
                kube,
                checkpoint,
                {"phase": Phase.FAILED, "message": "withdrawn", "conditions": told},
            )
        elif checkpoint.status.move is not None:
            return False
        await delete(kube, checkpoint)
    except KubeError as error:
        if error.status == 404:
            return True
        if error.status in _CONFLICTS:
            return False
        raise
    return True


async def stop_accepting(kube: Kube, checkpoint: Checkpoint) -> Checkpoint:
    """New connections to the old address are nobody's any more. Raises KubeError, Lost."""

    def change(now: Checkpoint) -> dict[str, Any] | None:
        move = now.status.move
        return {"move": {"accepting": False}} if move is not None and move.accepting else None

    return await _change(kube, checkpoint, change)


# -- claims ---------------------------------------------------------------------------------------------


async def claim(kube: Kube, checkpoint: Checkpoint, pod: api.Pod) -> Checkpoint | None:
    """Gives a checkpoint to a pod; None if anything has happened to it since it was seen.

    Raises:
        KubeError: no answer, or refused.
    """
    if checkpoint.status.phase != Phase.AVAILABLE:
        return None
    by = {"podName": pod.metadata.name, "podUID": pod.metadata.uid, "nodeName": pod.spec.nodeName}
    told = _told(checkpoint, "Claimed", True, "Paired", f"by {by['podName']} on {by['nodeName']}")
    body = {"phase": Phase.CLAIMED, "claimedBy": by, "conditions": told}
    try:
        return await _write(kube, checkpoint, body)
    except KubeError as error:
        if error.status in _CONFLICTS:
            return None
        raise


async def release(kube: Kube, checkpoint: Checkpoint) -> Checkpoint:
    """Gives a claim up. Once it is written, a commit that is under way can no longer succeed.

    What is not claimed is returned as it is.

    Raises:
        KubeError: no answer; 409 if anything has happened since it was seen: read it again.
    """
    if checkpoint.status.phase != Phase.CLAIMED:
        return checkpoint
    told = _told(checkpoint, "Claimed", False, "Released", "its pod did not take it")
    body = {"phase": Phase.AVAILABLE, "claimedBy": None, "conditions": told}
    return await _write(kube, checkpoint, body)


async def delete(kube: Kube, checkpoint: Checkpoint) -> None:
    """Deletes this Checkpoint, and not another one of its name. Raises KubeError."""
    meta = checkpoint.metadata
    await kube.delete(Checkpoint, meta.name, meta.namespace, uid=meta.uid)


# -- the node that a pod comes to -----------------------------------------------------------------------


async def commit(kube: Kube, checkpoint: Checkpoint, move: api.Move) -> Checkpoint:
    """The switch: from this write on the claiming pod's node has the state.

    Nothing may have happened to the Checkpoint since ``checkpoint`` was read. Without an answer it may be
    written or not, and even be on its way still: call it again with the same, it then finds its own commit
    or makes it.

    Raises:
        Lost: the claim was released, or anything else has happened; the source has the state.
        KubeError: in doubt.
    """
    if checkpoint.status.phase != Phase.CLAIMED or checkpoint.status.claimedBy is None:
        raise Lost(f"commit of {checkpoint.key}", f"it is {checkpoint.status.phase or 'new'}")
    body = {
        "phase": Phase.COMMITTED,
        "move": {
            "oldAddresses": move.oldAddresses,
            "newAddresses": move.newAddresses,
            "ports": move.ports,
            "flows": move.flows,
            "accepting": move.accepting,
        },
        "conditions": _told(checkpoint, "Committed", True, "Moved", "its new node has the state"),
    }
    try:
        return await _write(kube, checkpoint, body)
    except KubeError as error:
        if error.status not in _CONFLICTS:
            raise
        why = error.why
    meta = checkpoint.metadata
    try:
        now = await kube.get(Checkpoint, meta.name, meta.namespace)
    except KubeError as error:
        if error.status == 404:
            raise Lost(f"commit of {checkpoint.key}", "it is gone") from error
        raise
    mine = now.metadata.uid == meta.uid and now.status.claimedBy == checkpoint.status.claimedBy
    if mine and now.status.move is not None:
        return now
    raise Lost(f"commit of {checkpoint.key}", f"it is {now.status.phase} now: {why}")


async def restored(kube: Kube, checkpoint: Checkpoint, sent: int, ms: int) -> Checkpoint:
    """The pod runs at its new place; ``sent`` bytes crossed the network, it stood still for ``ms``.

    Raises:
        Lost: it is not committed to the pod that ``checkpoint`` says.
        KubeError: no answer; call it again.
    """

    def change(now: Checkpoint) -> dict[str, Any] | None:
        if now.status.move is None or now.status.claimedBy != checkpoint.status.claimedBy:
            raise Lost(f"{now.key} as restored", f"it is {now.status.phase}")
        if now.status.phase == Phase.RESTORED:
            return None
        return {
            "phase": Phase.RESTORED,
            "transferredBytes": sent,
            "downtimeMs": ms,
            "message": None,
            "conditions": _told(now, "Restored", True, "Running", f"after {ms} ms"),
        }

    return await _change(kube, checkpoint, change)


async def failed(kube: Kube, checkpoint: Checkpoint, message: str) -> Checkpoint:
    """There is nothing to be had from the pod's old node, which says so.

    Raises:
        Lost: it is committed, and so no longer that node's; or gone.
        KubeError: no answer; call it again.
    """

    def change(now: Checkpoint) -> dict[str, Any] | None:
        if now.status.move is not None:
            raise Lost(f"{now.key} as failed", f"it is {now.status.phase}")
        if now.status.phase == Phase.FAILED and now.status.message == message[:4096]:
            return None
        told = _told(now, "Advertised", False, "Failed", message)
        body = {"phase": Phase.FAILED, "message": message[:4096], "conditions": told}
        return {**body, "claimedBy": None}

    return await _change(kube, checkpoint, change)


async def not_restored(kube: Kube, checkpoint: Checkpoint, message: str) -> Checkpoint:
    """Its restore has failed and is tried again: says so, and nothing if that is over meanwhile.

    Raises:
        Lost: it is gone.
        KubeError: no answer; call it again.
    """

    def change(now: Checkpoint) -> dict[str, Any] | None:
        if now.status.phase != Phase.COMMITTED or now.status.message == message[:4096]:
            return None
        told = _told(now, "Restored", False, "RestoreFailed", message)
        return {"message": message[:4096], "conditions": told}

    return await _change(kube, checkpoint, change)


async def given_up(kube: Kube, checkpoint: Checkpoint, message: str) -> Checkpoint:
    """It could not be restored, and its pod starts fresh. The node that has it keeps it.

    Routers send nobody to a pod for connections that it does not have.

    Raises:
        Lost: it is restored, not committed to the pod that ``checkpoint`` says, or gone.
        KubeError: no answer; call it again.
    """

    def change(now: Checkpoint) -> dict[str, Any] | None:
        if now.status.move is None or now.status.claimedBy != checkpoint.status.claimedBy:
            raise Lost(f"{now.key} as given up", f"it is {now.status.phase}")
        if now.status.phase == Phase.FAILED:
            return None
        if now.status.phase == Phase.RESTORED:
            raise Lost(f"{now.key} as given up", "it is restored")
        return {
            "phase": Phase.FAILED,
            "message": message[:4096],
            "move": {"flows": (), "accepting": False},
            "conditions": _told(now, "Restored", False, "StartedFresh", message),
        }

    return await _change(kube, checkpoint, change)


async def drop_flows(kube: Kube, checkpoint: Checkpoint, left: Sequence[str]) -> Checkpoint:
    """Takes out all flows but those that are ``left``. Raises KubeError, Lost."""

    def change(now: Checkpoint) -> dict[str, Any] | None:
        if now.status.move is None:
            return None
        flows = tuple(one for one in now.status.move.flows if one in keep)
        return {"move": {"flows": flows}} if flows != now.status.move.flows else None

    keep = frozenset(left)
    return await _change(kube, checkpoint, change)


# -- writing --------------------------------------------------------------------------------------------


async def _write(kube: Kube, checkpoint: Checkpoint, status: dict[str, Any]) -> Checkpoint:
    """One compare-and-swap."""
    meta = checkpoint.metadata
    body = {
        "metadata": {"uid": meta.uid, "resourceVersion": meta.resourceVersion},
        "status": status,
    }
    return await kube.patch(Checkpoint, meta.name, body, meta.namespace, subresource="status")


async def _change(
    kube: Kube, checkpoint: Checkpoint, change: Callable[[Checkpoint], dict[str, Any] | None]
) -> Checkpoint:
    """A write that is right whatever others write meanwhile: made anew of what is there, if they did."""
    meta = checkpoint.metadata
    for attempt in range(_ATTEMPTS):
        status = change(checkpoint)
        if status is None:
            return checkpoint
        try:
            return await _write(kube, checkpoint, status)
        except KubeError as error:
            if error.status == 404:
                raise Lost(f"write of {checkpoint.key}", "it is gone") from error
            if error.status != 409 or attempt == _ATTEMPTS - 1:
                raise
        try:
            checkpoint = await kube.get(Checkpoint, meta.name, meta.namespace)
        except KubeError as error:
            if error.status == 404:
                raise Lost(f"write of {meta.name}", "it is gone") from error
            raise
        if checkpoint.metadata.uid != meta.uid:
            raise Lost(f"write of {checkpoint.key}", "it is another one of the same name")
    raise AssertionError("unreachable")


def _told(
    checkpoint: Checkpoint, kind: str, holds: bool, reason: str, message: str
) -> list[dict[str, str]]:
    """All its conditions, one of them set."""
    now = dt.datetime.now(dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    status = "True" if holds else "False"
    others: list[dict[str, str]] = []
    since = now
    for one in checkpoint.status.conditions or ():
        then = one.lastTransitionTime or now
        if one.type == kind:
            since = then if one.status == status else now
            continue
        others.append(_condition(one.type, one.status, one.reason or "", one.message or "", then))
    return [*others, _condition(kind, status, reason, message[:4096], since)]


def _condition(kind: str, status: str, reason: str, message: str, since: str) -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": reason or "Unknown",
        "message": message,
        "lastTransitionTime": since,
    }
