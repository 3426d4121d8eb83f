"""Whether a managed pod that is being deleted moves to another node or ends: the table of all cases.

Decided from what the API says of the pod, its owner and its siblings, never from a signal: a failed
liveness probe, a scale-down and a drain all send the same one. Called by architectd for the pods of its
node, with the facts of :mod:`architect.adapters.kube.owners`. If the API does not answer there are no
facts, nothing is decided, and the pod keeps running.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Sequence
from dataclasses import dataclass

REPLICA_SET = "ReplicaSet"
STATEFUL_SET = "StatefulSet"
JOB = "Job"
APPS = "apps/v1"
BATCH = "batch/v1"


class Verdict(enum.Enum):
    """What becomes of the pod."""

    MOVE = "its state goes to the pod that replaces it"
    END = "it is stopped as the user asked for"


@dataclass(frozen=True, slots=True)
class Owner:
    """The controller of a pod, as the API has it now."""

    kind: str
    name: str
    uid: str
    api_version: str = APPS
    exists: bool = True
    """One of this UID is there; another one of the same name is not it."""
    leaving: bool = False
    """It, or its namespace, is being deleted."""
    replicas: int | None = None
    """How many pods it wants. Of what has no such number: None."""
    revision: str = ""
    """Of a StatefulSet: the revision that its pods are to get."""
    first: int = 0
    """Of a StatefulSet: its lowest number."""
    suspended: bool = False
    finished: bool = False
    """Of a Job."""


@dataclass(frozen=True, slots=True)
class Sibling:
    """Another pod of the same owner. Times are in seconds since 1970."""

    name: str
    uid: str
    template_hash: str = ""
    created: float = 0.0
    leaving: bool = False
    deleted_at: float = 0.0
    """When its deletion was asked for, if it is leaving."""
    started: bool = False
    """A managed container of it has been started."""
    finished: bool = False
    """It has succeeded or failed, and counts for nothing."""
    moved: bool = False
    """Another pod has its state: a checkpoint of it is committed."""
    arrived: bool = False
    """It has the state of another pod: a checkpoint is committed to it."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """The pod that is judged."""

    name: str
    uid: str
    owner_kind: str = ""
    owner_uid: str = ""
    template_hash: str = ""
    revision: str = ""
    ordinal: int | None = None
    created: float = 0.0
    deleted_at: float | None = None
    """When its deletion was asked for; None if it was not."""
    started: bool = True
    finished: bool = False
    is_to_move: bool = False
    """It has no controller, and somebody makes its successor by hand (`kubectl architect move`)."""


@dataclass(frozen=True, slots=True)
class Judgement:
    """The verdict, and why, in words for an event."""

    verdict: Verdict
    why: str


def _end(why: str) -> Judgement:
    return Judgement(Verdict.END, why)


def judge(pod: Leaving, owner: Owner | None, siblings: Sequence[Sibling]) -> Judgement:
    """Whether a pod moves or ends. ``owner`` is its controller, None if it has none.

    The first line that fits decides.
    """
    if pod.deleted_at is None:
        return _end("the pod stays: only a container of it is stopped")
    if pod.finished or not pod.started:
        return _end("no program of it runs")
    if owner is None:
        if pod.is_to_move:
            return Judgement(Verdict.MOVE, "`kubectl architect move` makes its successor")
        return _end("nothing replaces a pod without an owner")
    whose = f"its {owner.kind} {owner.name}"
    if not owner.exists:
        return _end(f"{whose} is gone")
    if owner.leaving:
        return _end(f"{whose}, or its namespace, is being deleted")
    kind = (owner.kind, owner.api_version)
    if kind == (REPLICA_SET, APPS):
        return _of_replica_set(pod, owner, siblings, whose)
    if kind == (STATEFUL_SET, APPS):
        return _of_stateful_set(pod, owner, whose)
    if kind == (JOB, BATCH):
        return _of_job(owner, whose)
    return _end(f"pods of {whose} do not move by themselves")


def _of_stateful_set(pod: Leaving, owner: Owner, whose: str) -> Judgement:
    """Its successor has its name and its volumes, if the number is still wanted."""
    wanted = 1 if owner.replicas is None else owner.replicas
    if pod.ordinal is None or not owner.first <= pod.ordinal < owner.first + wanted:
        return _end(f"{whose} wants {wanted} pods, and not number {pod.ordinal}")
    if pod.revision != owner.revision:
        return _end(f"{whose} replaces it by another revision")
    return Judgement(Verdict.MOVE, f"{whose} wants number {pod.ordinal}")


def _of_job(owner: Owner, whose: str) -> Judgement:
    if owner.finished or owner.suspended:
        return _end(f"{whose} is {'finished' if owner.finished else 'suspended'}")
    return Judgement(Verdict.MOVE, f"{whose} is not finished")


def _of_replica_set(
    pod: Leaving, owner: Owner, siblings: Sequence[Sibling], whose: str
) -> Judgement:
    if owner.replicas == 0:
        return _end(f"{whose} wants no pods: scaled down, or replaced by another template")
    if not pod.template_hash:
        return _end(
            f"{whose} belongs to no Deployment: its replacement could be of another template"
        )
    return _replica(pod, owner, siblings, whose)


def lacking(replicas: int, siblings: Collection[Sibling]) -> int:
    """How many pods with a state a ReplicaSet lacks: those that leave may fill these places.

    A pod that has not been started yet is a replacement: a place, and nobody in it.
    """
    alive = sum(
        not one.leaving and not one.finished and (one.started or one.arrived) for one in siblings
    )
    return max(0, replicas - alive)


def _replica(pod: Leaving, owner: Owner, siblings: Sequence[Sibling], whose: str) -> Judgement:
    assert pod.deleted_at is not None
    kin = [one for one in siblings if one.template_hash == pod.template_hash and one.uid != pod.uid]
    wanted = 1 if owner.replicas is None else owner.replicas
    missing = lacking(wanted, kin)
    if not missing:
        return _end(f"{whose} wants {wanted} and has as many without it")
    leaving = [
        (one.deleted_at, one.name, one.uid)
        for one in kin
        if one.leaving and one.started and not one.finished and not one.moved
    ]
    leaving.append((pod.deleted_at, pod.name, pod.uid))
    place = _order(leaving, kin).index(pod.uid)
    if place >= missing:
        return _end(f"{whose} lacks {missing}, and {place} that left before it take the places")
    return Judgement(Verdict.MOVE, f"{whose} wants {wanted} and lacks {missing}")


def _order(leaving: list[tuple[float, str, str]], kin: Collection[Sibling]) -> list[str]:
    """UIDs of those that leave, first come, first served.

    Last are those whose replacement has been started as new: such as a pod of a dead node, which is in the
    API long after its place is taken. It must not take that of a pod whose program still runs.
    """
    fresh = sorted(
        one.created
        for one in kin
        if not one.leaving and not one.finished and one.started and not one.arrived
    )
    first: list[str] = []
    replaced: list[str] = []
    for deleted_at, _, uid in sorted(leaving):
        while fresh and fresh[0] < deleted_at:
            fresh.pop(0)
        if fresh:
            fresh.pop(0)
            replaced.append(uid)
        else:
            first.append(uid)
    return first + replaced
