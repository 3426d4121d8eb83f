"""A pod as the API server sends it: JSON that is trusted in nothing, not even in its shape.

What is not there, or not of its kind, reads as empty, so that the reviews of decisions.podreview and
decisions.podtraffic never fail on what a stranger has written.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from architect.contract.errors import ArchitectError, quoted
from architect.contract.kubernetes import PROXY_CONTAINER, RUNTIME_CLASSES

CONTAINERS: Final = "containers"
INIT_CONTAINERS: Final = "initContainers"

Object = Mapping[str, Any]


class FieldRefused(ArchitectError):
    """A field of a pod that cannot be together with Architect."""

    def __init__(self, name: str, value: object, why: str, fix: str) -> None:
        super().__init__(f"field {name}, value {quoted(value)}", why, fix)


def as_object(value: object) -> Object:
    """The value if it is an object."""
    return value if isinstance(value, Mapping) else {}


def as_objects(value: object) -> list[Object]:
    """The items of a list, an empty object for each that is none: indexes stay."""
    return [as_object(item) for item in value] if isinstance(value, list) else []


def as_text(value: object) -> str:
    """The value if it is text."""
    return value if isinstance(value, str) else ""


def spec_of(owner: Object) -> Object:
    """The spec of a pod or of a workload."""
    return as_object(owner.get("spec"))


def strings(pod: Object, kind: str) -> dict[str, str]:
    """The pod's ``labels`` or ``annotations``."""
    found = as_object(as_object(pod.get("metadata")).get(kind))
    return {k: v for k, v in found.items() if isinstance(v, str)}


def runtime_class(pod: Object) -> str | None:
    """The pod's runtime class if it is one of ours."""
    name = spec_of(pod).get("runtimeClassName")
    return name if isinstance(name, str) and name in RUNTIME_CLASSES else None


def is_sidecar(container: Object) -> bool:
    """Whether an init container is one that runs as long as the pod."""
    return container.get("restartPolicy") == "Always"


def containers(pod: Object) -> dict[str, tuple[str, Object]]:
    """The containers that can be managed by name, each with its place as a JSON pointer."""
    spec = spec_of(pod)
    found: dict[str, tuple[str, Object]] = {}
    for kind in (INIT_CONTAINERS, CONTAINERS):
        for i, container in enumerate(as_objects(spec.get(kind))):
            if kind == CONTAINERS or is_sidecar(container):
                found[as_text(container.get("name"))] = f"/spec/{kind}/{i}", container
    for name in ("", PROXY_CONTAINER):
        found.pop(name, None)
    return found


def ports(container: Object) -> set[tuple[str, int]]:
    """The declared ports; SCTP is left out as on the node (naming.kubelet_ports)."""
    found = set()
    for port in as_objects(container.get("ports")):
        protocol, number = port.get("protocol", "TCP"), port.get("containerPort")
        if protocol in ("TCP", "UDP") and isinstance(number, int):
            found.add((protocol, number))
    return found
