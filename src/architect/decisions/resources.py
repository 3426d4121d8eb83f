"""What a pod asks for while containers of it are hibernated, and how that is undone.

Called by :mod:`architect.decisions.podstatus` for architectd and for the control plane: which requests a
hibernated container can give to other pods, which quantities stand for "given", and what the requests
must be for a set of hibernated containers. What the API and the kubelet accept was measured
(tests/cluster/test_resize.py) and differs by QoS class:

=============  ==================================================================================
Burstable      requests only, limits stay: cpu 0 (a thousandth if the pod would become BestEffort
               otherwise), memory one byte, because a memory request of 0 is never reported by the
               kubelet and frees nothing
Guaranteed     requests and limits together, which must stay above zero: cpu a thousandth, memory
               :data:`MEMORY_WITH_LIMIT`
BestEffort     nothing to give
=============  ==================================================================================

Never touched: containers that are not hibernated, plain init containers, resources other than cpu and
memory, a resource whose resize policy restarts the container (its checkpoint would be lost), and pods with
pod-level resources (the scheduler then counts those, so a container's frees nothing).
"""

from __future__ import annotations

import enum
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from architect.contract import quantities

CPU: Final = "cpu"
MEMORY: Final = "memory"
GIVEN: Final = (CPU, MEMORY)
"""Resources that can be resized in place."""

CPU_NONE: Final = "0"
CPU_LEAST: Final = "1m"
"""The least that is not zero: the API takes no finer quantity of CPU."""
MEMORY_LEAST: Final = "1"
"""One byte. Reported by the kubelet within a second, which a zero never is."""
MEMORY_WITH_LIMIT: Final = "4Mi"
"""Memory of a hibernated container in a Guaranteed pod, where the limit goes down with the request.

The kubelet refuses a limit below what is in use, and the kernel charges in batches of 64 pages to each CPU
(mm/memcontrol.c, MEMCG_CHARGE_BATCH). A hibernated container uses its keeper's some 130 KB and as much
again of the kernel's, and must be able to start an exec's process before the wake has raised the limit.
"""

Originals = Mapping[str, Mapping[str, str]]
"""Resource ("cpu", "memory") -> container -> quantity before hibernation: the two annotations."""


class Qos(enum.StrEnum):
    """Kubernetes' classes of service; a pod's never changes."""

    GUARANTEED = "Guaranteed"
    BURSTABLE = "Burstable"
    BEST_EFFORT = "BestEffort"


@dataclass(frozen=True, slots=True)
class Server:
    """What the API server can do about resources of running pods."""

    resize: bool = True
    """It has the subresource pods/resize (Kubernetes 1.33)."""
    lower_memory_limits: bool = True
    """Memory limits may be lowered without a restart (Kubernetes 1.34)."""


@dataclass(frozen=True, slots=True)
class Container:
    """A container of the pod's spec, as far as resources go."""

    name: str
    requests: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, str] = field(default_factory=dict)
    init: bool = False
    """It is among the init containers."""
    sidecar: bool = False
    """An init container that keeps running (restartPolicy Always): it can be resized, others cannot."""
    restarts: frozenset[str] = frozenset()
    """Resources whose resize restarts the container (resizePolicy RestartContainer)."""


@dataclass(frozen=True, slots=True)
class PodResources:
    """All containers of a pod, init containers included, and whether the pod itself has resources."""

    containers: tuple[Container, ...]
    requests: Mapping[str, str] = field(default_factory=dict)
    """Pod-level requests."""
    limits: Mapping[str, str] = field(default_factory=dict)
    """Pod-level limits."""

    @property
    def pod_level(self) -> bool:
        """Whether the scheduler counts the pod's own resources instead of its containers'."""
        return any(name in self.requests or name in self.limits for name in GIVEN)

    def get(self, name: str) -> Container | None:
        """The container of that name."""
        return next((one for one in self.containers if one.name == name), None)


_number = quantities.nano
_CPU_LOWERED: Final = (_number(CPU_NONE), _number(CPU_LEAST))


def qos(pod: PodResources) -> Qos:
    """The pod's class by its spec, as ComputePodQOS of pkg/apis/core/v1/helper/qos/qos.go.

    Raises:
        InvalidQuantity: the spec has one that the API server would not have taken.
    """
    parts: Iterable[Container] = pod.containers
    if pod.pod_level:
        parts = (Container("", pod.requests, pod.limits),)
    requests: dict[str, int] = {}
    limits: dict[str, int] = {}
    guaranteed = True
    for part in parts:
        _add(part.requests, requests)
        guaranteed = _add(part.limits, limits) == len(GIVEN) and guaranteed
    if not requests and not limits:
        return Qos.BEST_EFFORT
    if guaranteed and requests == limits:
        return Qos.GUARANTEED
    return Qos.BURSTABLE


def _add(asked: Mapping[str, str], sums: dict[str, int]) -> int:
    """Adds what is asked of CPU and memory; returns how many of the two are above zero."""
    positive = 0
    for name in GIVEN:
        number = _number(asked[name]) if name in asked else 0
        if number > 0:
            sums[name] = sums.get(name, 0) + number
            positive += 1
    return positive


def can_give(pod: PodResources, container: Container, resource: str, server: Server) -> bool:
    """Whether the container's request of a resource may be lowered at all."""
    return (
        server.resize
        and resource in GIVEN
        and not pod.pod_level
        and (container.sidecar or not container.init)
        and resource not in container.restarts
        and resource in container.requests
        and (resource == CPU or server.lower_memory_limits or qos(pod) is not Qos.GUARANTEED)
    )


def _lowest(class_: Qos, resource: str) -> str:
    if class_ is Qos.GUARANTEED:
        return CPU_LEAST if resource == CPU else MEMORY_WITH_LIMIT
    return CPU_NONE if resource == CPU else MEMORY_LEAST


def is_lowered(class_: Qos, resource: str, quantity: str) -> bool:
    """Whether a request is one that we would set for a hibernated container."""
    if resource == CPU:
        return _number(quantity) in _CPU_LOWERED
    return quantities.same(quantity, _lowest(class_, resource))


def to_remember(pod: PodResources, name: str, server: Server) -> dict[str, str]:
    """What is to be kept of a container that has just been hibernated: resource -> original quantity.

    Empty for what cannot be given or is no more than what it would be lowered to.
    """
    container = pod.get(name)
    class_ = qos(pod)
    if container is None or class_ is Qos.BEST_EFFORT:
        return {}
    return {
        resource: container.requests[resource]
        for resource in GIVEN
        if can_give(pod, container, resource, server)
        and _number(container.requests[resource]) > _number(_lowest(class_, resource))
    }


def belongs_to_user(pod: PodResources, name: str, resource: str, original: str) -> bool:
    """Whether somebody else set the request meanwhile: it is neither the original nor a lowered one."""
    container = pod.get(name)
    if container is None or resource not in container.requests:
        return True
    request = container.requests[resource]
    return not quantities.same(request, original) and not is_lowered(qos(pod), resource, request)


def _set(container: Container, resource: str, quantity: str, class_: Qos) -> Container:
    requests = {**container.requests, resource: quantity}
    if class_ is not Qos.GUARANTEED:
        return replace(container, requests=requests)
    return replace(container, requests=requests, limits={**container.limits, resource: quantity})


def _lower(container: Container, originals: Originals, class_: Qos, cpu: str) -> Container:
    for resource in GIVEN:
        original = originals.get(resource, {}).get(container.name)
        if original is None or resource not in container.requests:
            continue
        least = (
            cpu if resource == CPU and class_ is not Qos.GUARANTEED else _lowest(class_, resource)
        )
        # A value that somebody else set stays; so does one that is lowered already, in whatever way.
        if quantities.same(container.requests[resource], original) and (
            _number(original) > _number(least)
        ):
            container = _set(container, resource, least, class_)
    return container


def _raise(container: Container, originals: Originals, class_: Qos) -> Container:
    for resource in GIVEN:
        original = originals.get(resource, {}).get(container.name)
        if original is None or resource not in container.requests:
            continue
        if not is_lowered(class_, resource, container.requests[resource]):
            continue
        limit = container.limits.get(resource)
        # Somebody lowered the limit meanwhile: a request above it would be refused.
        if (
            class_ is not Qos.GUARANTEED
            and limit is not None
            and _number(limit) < _number(original)
        ):
            original = limit
        if not quantities.same(container.requests[resource], original):
            container = _set(container, resource, original, class_)
    return container


def lowered(pod: PodResources, asleep: Collection[str], originals: Originals) -> PodResources:
    """The pod with the remembered requests of the hibernated containers as low as they may be.

    What is not in ``originals`` stays as it is: nothing is lowered that could not be given back.
    """
    class_ = qos(pod)
    for cpu in (CPU_NONE, CPU_LEAST):
        found = replace(
            pod,
            containers=tuple(
                _lower(one, originals, class_, cpu) if one.name in asleep else one
                for one in pod.containers
            ),
        )
        if qos(found) is class_:
            return found
    return pod


def raised(pod: PodResources, awake: Collection[str], originals: Originals) -> PodResources:
    """The pod with the remembered requests of these containers back."""
    class_ = qos(pod)
    return replace(
        pod,
        containers=tuple(
            _raise(one, originals, class_) if one.name in awake else one for one in pod.containers
        ),
    )


def patch(before: PodResources, after: PodResources) -> dict[str, Any] | None:
    """The strategic merge patch for the subresource ``resize``; None if nothing differs.

    It names only the quantities that change, so it cannot undo what somebody else changed meanwhile.
    """
    spec: dict[str, list[dict[str, Any]]] = {}
    for old, new in zip(before.containers, after.containers, strict=True):
        resources: dict[str, dict[str, str]] = {}
        for kind, was, now in (
            ("requests", old.requests, new.requests),
            ("limits", old.limits, new.limits),
        ):
            changed = {name: now[name] for name in GIVEN if now.get(name) != was.get(name)}
            if changed:
                resources[kind] = changed
        if resources:
            where = "initContainers" if new.init else "containers"
            spec.setdefault(where, []).append({"name": new.name, "resources": resources})
    return {"spec": spec} if spec else None
