"""Which Services get an endpoint that holds the place of a pod while it moves, and for how long.

A Service without an endpoint refuses new connections: kube-proxy does so in its name. While the only pod of a
StatefulSet moves it has none, since the new pod is made only when the old one is gone. So the control plane
gives it an EndpointSlice with one address, which drops what it is sent
(:data:`architect.contract.kubernetes.HOLDING_ADDRESSES`): the client's kernel asks again until the new pod is
there. The slice says of its endpoint that it is terminating and serving. kube-proxy takes such ones only
where none is ready (KEP-1669), so that it never takes a connection from a pod that is ready.

From a pod that is leaving and still serves it would. So it is there only for pods that cannot serve any more:
one of a StatefulSet is frozen as soon as it has a Checkpoint; one that is replaced while it runs serves as
long as it is Ready, and in most such moves no placeholder is ever made.

Called by the control plane; :mod:`architect.adapters.kube.placeholders` makes these views and carries it out.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from architect.decisions.pairing import Phase

SETTLE_S: Final = 5.0
"""Seconds that a placeholder stays when a pod of its Service is Ready again: that this one is an endpoint is
for Kubernetes to write, and nobody may see the end of ours before it."""
PATIENCE_S: Final = 60.0
"""Seconds that it stays after the end of its move while no pod of its Service is Ready: a probe may take so
long to see that the restored one is. After that the Service says again what is true, and refuses."""

_UNDER_WAY: Final = (Phase.AVAILABLE, Phase.CLAIMED, Phase.COMMITTED)
_OVERLAPPING: Final = ("ReplicaSet", "Job")
"""Controllers that make the new pod while the old one is leaving."""
_NAME: Final = 253
_DIGEST: Final = 10


@dataclass(frozen=True, slots=True)
class Move:
    """A Checkpoint. ``owner`` is the kind of its pod's controller."""

    key: str
    phase: Phase
    pod_uid: str
    owner: str


@dataclass(frozen=True, slots=True)
class Pod:
    """A managed pod; ``ports`` by name and protocol. It may be ``ready`` and on its way out."""

    uid: str
    namespace: str
    labels: Mapping[str, str]
    ports: Mapping[tuple[str, str], int]
    ready: bool


@dataclass(frozen=True, slots=True)
class ServicePort:
    """A port of a Service. ``target``: a number, the name of a container's port, or None for the same."""

    name: str
    protocol: str
    port: int
    target: int | str | None = None


@dataclass(frozen=True, slots=True)
class Service:
    """A Service that kube-proxy carries and whose endpoints Kubernetes finds by a selector."""

    namespace: str
    name: str
    uid: str
    selector: Mapping[str, str]
    families: tuple[str, ...]
    ports: tuple[ServicePort, ...]

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def selects(self, pod: Pod) -> bool:
        """Whether the pod is one of its endpoints."""
        return pod.namespace == self.namespace and self.selector.items() <= pod.labels.items()


@dataclass(frozen=True, slots=True)
class Port:
    """A port of a placeholder."""

    name: str
    protocol: str
    number: int


@dataclass(frozen=True, slots=True)
class Placeholder:
    """An EndpointSlice to be made."""

    namespace: str
    name: str
    checkpoint: str
    """Key of the Checkpoint for whose sake it is there."""
    service: str
    service_uid: str
    family: str
    ports: tuple[Port, ...]

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class Existing:
    """A placeholder that is there. ``checkpoint`` and ``service`` are keys."""

    key: str
    checkpoint: str
    service: str


def wanted(
    moves: Iterable[Move], pods: Collection[Pod], services: Collection[Service]
) -> dict[str, Placeholder]:
    """The placeholders that there should be, as far as the pods that leave can still be seen; by key."""
    by_uid = {one.uid: one for one in pods}
    found = {}
    for move in moves:
        pod = by_uid.get(move.pod_uid)
        if pod is None:
            continue
        for service in services:
            if service.selects(pod) and _lacks(move, service, pods):
                for one in _placeholders(move, pod, service):
                    found[one.key] = one
    return found


def surplus(
    existing: Iterable[Existing],
    moves: Iterable[Move],
    pods: Collection[Pod],
    services: Collection[Service],
) -> dict[str, float]:
    """Keys of placeholders that are no longer needed, and for how many seconds more each is to stay.

    They count from when they were first said of it. What there is for a move that is under way stays when its
    pod is gone: nobody knows the labels of that any more.
    """
    moves = list(moves)
    needed = wanted(moves, pods, services)
    uids = {one.uid for one in pods}
    kept = {one.key for one in moves if one.phase in _UNDER_WAY and one.pod_uid not in uids}
    by_key = {one.key: one for one in services}
    found = {}
    for one in existing:
        if one.key not in needed and one.checkpoint not in kept:
            service = by_key.get(one.service)
            is_served = service is None or _is_served(service, pods)
            found[one.key] = SETTLE_S if is_served else PATIENCE_S
    return found


def _lacks(move: Move, service: Service, pods: Iterable[Pod]) -> bool:
    """Whether the Service needs a placeholder while its pod is seen to leave."""
    if move.owner not in _OVERLAPPING:
        # Frozen, and others of the Service may be so in a moment: there has to be no gap then.
        return move.phase in _UNDER_WAY
    # Its successor may be restored, and not be Ready yet.
    leaves = move.phase in _UNDER_WAY or move.phase is Phase.RESTORED
    return leaves and not _is_served(service, pods)


def _is_served(service: Service, pods: Iterable[Pod]) -> bool:
    return any(one.ready and service.selects(one) for one in pods)


def _placeholders(move: Move, pod: Pod, service: Service) -> Iterator[Placeholder]:
    ports = tuple(Port(one.name, one.protocol, _number(one, pod)) for one in service.ports)
    checkpoint = move.key.rpartition("/")[2]
    for family in service.families:
        name = _named(f"{checkpoint}-{service.name}-hold-{family.lower()}")
        yield Placeholder(pod.namespace, name, move.key, service.name, service.uid, family, ports)


def _number(port: ServicePort, pod: Pod) -> int:
    """Any number does, as nothing arrives there; but who looks at it is to find what it would be."""
    if isinstance(port.target, int):
        return port.target
    return pod.ports.get((port.target or "", port.protocol), port.port)


def _named(text: str) -> str:
    if len(text) <= _NAME:
        return text
    digest = hashlib.sha256(text.encode()).hexdigest()[:_DIGEST]
    return text[: _NAME - len(digest) - 1].rstrip(".-") + "-" + digest
