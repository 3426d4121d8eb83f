"""Which checkpoint goes to which pod, when a claim is given up, and when a checkpoint is no longer needed.

A checkpoint goes to a pod of the same owner and the same template (ReplicaSet), or of the same owner,
revision and number (StatefulSet), or made for it by `kubectl architect move`; to nobody else, ever. Called
by the control plane with the Checkpoints and pods that it watches; the adapter of that name makes these views
and carries it out. The node that has got one asks :func:`gives_up` and :func:`starts_fresh`.
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Final

from architect.contract.moving import OnRestoreFailure

_TRIES: Final = 2
"""Restores of one container that fail in a row until its pod starts fresh, where it is to."""


class Phase(enum.StrEnum):
    """How far a checkpoint is."""

    NEW = ""
    """Its first status is still to be written."""
    AVAILABLE = "Available"
    """The old pod's node has the state; the program may still run there."""
    CLAIMED = "Claimed"
    """One pod is to have it; the old pod's node still has it."""
    COMMITTED = "Committed"
    """The new pod's node has it."""
    RESTORED = "Restored"
    """The new pod runs."""
    FAILED = "Failed"
    """Before a commit: there is nothing to have. After it: it could not be restored, its pod starts fresh."""


@dataclass(frozen=True, slots=True)
class Template:
    """What a pod and its replacement have in common. ``namespace`` and ``owner`` (a UID) always count."""

    namespace: str
    owner: str = ""
    template_hash: str = ""
    revision: str = ""
    ordinal: int | None = None

    def fits(self, other: Template) -> bool:
        """Whether one may have the other's state."""
        if not self.owner or (self.namespace, self.owner) != (other.namespace, other.owner):
            return False
        if self.template_hash or other.template_hash:
            return self.template_hash == other.template_hash
        if not self.revision or self.ordinal is None:
            return False
        return (self.revision, self.ordinal) == (other.revision, other.ordinal)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A Checkpoint. ``created`` is RFC 3339 in UTC: its order is that of the time."""

    key: str
    template: Template
    phase: Phase
    pod_uid: str
    node: str
    created: str = ""
    claimed_uid: str = ""
    """UID of the pod that has claimed it; empty for none."""
    claimed_node: str = ""
    committed: bool = False
    """The new pod's node has the state, whatever came after."""
    flows: bool = False
    """Connections of clients are still rerouted."""


@dataclass(frozen=True, slots=True)
class Pod:
    """A managed pod."""

    key: str
    uid: str
    template: Template
    node: str = ""
    """Empty as long as it is not bound."""
    created: str = ""
    leaving: bool = False
    finished: bool = False
    started: bool = False
    """A managed container of it has been started."""

    @property
    def waiting(self) -> bool:
        """Whether a state could still come to it."""
        return bool(self.node) and not (self.leaving or self.finished or self.started)


def pair(checkpoints: Iterable[Checkpoint], pods: Iterable[Pod]) -> list[tuple[str, str]]:
    """Keys of checkpoints and of the pods that are to claim them: the oldest of both first."""
    checkpoints = list(checkpoints)
    taken = {one.claimed_uid for one in checkpoints if one.claimed_uid}
    free = sorted(
        (one for one in pods if one.waiting and one.uid not in taken),
        key=lambda one: (one.created, one.key, one.uid),
    )
    found: list[tuple[str, str]] = []
    for checkpoint in sorted(checkpoints, key=lambda one: (one.created, one.key)):
        if checkpoint.phase is not Phase.AVAILABLE or checkpoint.claimed_uid:
            continue
        for pod in free:
            if pod.uid != checkpoint.pod_uid and pod.template.fits(checkpoint.template):
                found.append((checkpoint.key, pod.key))
                free.remove(pod)
                break
    return found


def release(checkpoints: Iterable[Checkpoint], pods: Iterable[Pod]) -> list[str]:
    """Keys of checkpoints whose claim is to be given up: its pod is gone, or was started as new.

    A claim that is committed meanwhile is not lost: the release is a compare-and-swap too.
    """
    waiting = {one.uid for one in pods if one.waiting}
    return sorted(
        one.key
        for one in checkpoints
        if one.phase is Phase.CLAIMED and one.claimed_uid not in waiting
    )


def done(
    checkpoints: Iterable[Checkpoint], pods: Iterable[Pod], nodes: Collection[str]
) -> list[str]:
    """Keys of checkpoints that nobody needs any more; ``nodes`` are the names of those that exist."""
    uids = {one.uid for one in pods}
    return sorted(one.key for one in checkpoints if _is_done(one, uids, nodes))


def _is_done(checkpoint: Checkpoint, pods: Collection[str], nodes: Collection[str]) -> bool:
    if checkpoint.pod_uid in pods:
        return False
    claimed = checkpoint.claimed_uid in pods
    if checkpoint.phase is Phase.RESTORED:
        return not (checkpoint.flows and claimed)
    if checkpoint.phase is Phase.FAILED and not checkpoint.committed:
        return True
    # The state is on a node's disk, even if no pod is there to have it.
    if checkpoint.committed:
        return not claimed and checkpoint.claimed_node not in nodes
    # Nobody can fetch it any more: whoever waits for it starts fresh.
    return checkpoint.node not in nodes


def gives_up(chosen: OnRestoreFailure, failures: int) -> bool:
    """After so many restores of a container that failed in a row: whether its pod is to start fresh."""
    return chosen is OnRestoreFailure.FRESH and failures >= _TRIES


def starts_fresh(checkpoint: Checkpoint, pod_uid: str) -> bool:
    """Whether the pod starts as new because this state of it, which is its own, was given up."""
    return (
        checkpoint.phase is Phase.FAILED
        and checkpoint.committed
        and checkpoint.claimed_uid == pod_uid
    )
