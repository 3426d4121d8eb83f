"""Narrow views of Kubernetes objects: only the fields that something of ours reads.

A pod of the API server is 5 to 20 KB of JSON; as one of these it is some 2 KB, so that a control plane can
hold a large cluster. msgspec skips the rest while it parses. Used by every module of this package.
"""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec


class OwnerReference(msgspec.Struct, frozen=True, gc=False):
    """Who made an object."""

    kind: str
    name: str
    uid: str
    controller: bool | None = None


class Metadata(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815 - names are those of the API
    creationTimestamp: str | None = None  # noqa: N815
    deletionTimestamp: str | None = None  # noqa: N815
    labels: dict[str, str] | None = None
    annotations: dict[str, str] | None = None
    ownerReferences: tuple[OwnerReference, ...] | None = None  # noqa: N815


class Object(msgspec.Struct, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """Base of all kinds; a kind says where the API server has it."""

    api: ClassVar[str] = "api/v1"
    """Path of its group and version."""
    plural: ClassVar[str]
    namespaced: ClassVar[bool] = True

    metadata: Metadata = Metadata()

    @property
    def key(self) -> str:
        """``namespace/name``, or the name of an object that belongs to no namespace."""
        where = self.metadata.namespace
        return f"{where}/{self.metadata.name}" if where else self.metadata.name

    @property
    def labels(self) -> dict[str, str]:
        """Its labels."""
        return self.metadata.labels or {}

    @property
    def annotations(self) -> dict[str, str]:
        """Its annotations."""
        return self.metadata.annotations or {}


class Requirements(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Requests and limits; quantities are strings, or numbers where somebody wrote them so."""

    requests: dict[str, str | int | float] | None = None
    limits: dict[str, str | int | float] | None = None


class ResizePolicy(msgspec.Struct, frozen=True, gc=False):
    """Whether a resize of a resource restarts the container."""

    resourceName: str  # noqa: N815
    restartPolicy: str  # noqa: N815


class ContainerPort(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A declared port."""

    containerPort: int  # noqa: N815
    protocol: str = "TCP"


class Container(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A container of a pod's spec."""

    name: str
    resources: Requirements = Requirements()
    resizePolicy: tuple[ResizePolicy, ...] | None = None  # noqa: N815
    restartPolicy: str | None = None  # noqa: N815
    ports: tuple[ContainerPort, ...] | None = None


class PodSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the pod is asked to be."""

    nodeName: str = ""  # noqa: N815
    runtimeClassName: str = ""  # noqa: N815
    containers: tuple[Container, ...] = ()
    initContainers: tuple[Container, ...] | None = None  # noqa: N815
    resources: Requirements | None = None
    """Of the pod as a whole (Kubernetes 1.34)."""


class Condition(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A condition of a pod or a node."""

    type: str
    status: str
    reason: str | None = None
    message: str | None = None


class ContainerStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the kubelet says of a container."""

    name: str
    containerID: str | None = None  # noqa: N815
    ready: bool = False
    resources: Requirements | None = None


class PodStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the kubelet says of the pod."""

    phase: str = ""
    qosClass: str | None = None  # noqa: N815
    podIP: str | None = None  # noqa: N815
    conditions: tuple[Condition, ...] | None = None
    containerStatuses: tuple[ContainerStatus, ...] | None = None  # noqa: N815


class Pod(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A pod."""

    plural: ClassVar[str] = "pods"
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()


class NodeStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the kubelet, and architectd, say of a node."""

    conditions: tuple[Condition, ...] | None = None


class Node(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A node."""

    plural: ClassVar[str] = "nodes"
    namespaced: ClassVar[bool] = False
    status: NodeStatus = NodeStatus()

    def condition(self, kind: str) -> str | None:
        """The status ("True", "False", "Unknown") of one of its conditions; None if it has it not."""
        found = (one.status for one in self.status.conditions or () if one.type == kind)
        return next(found, None)


class ConfigMap(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A ConfigMap."""

    plural: ClassVar[str] = "configmaps"
    data: dict[str, str] | None = None


class Secret(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A Secret; values are Base64."""

    plural: ClassVar[str] = "secrets"
    data: dict[str, str] | None = None


class Event(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A core/v1 event."""

    plural: ClassVar[str] = "events"
    reason: str = ""
    message: str | None = None
    type: str | None = None
    count: int | None = None
    involvedObject: dict[str, Any] | None = None  # noqa: N815


class LeaseSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Who leads, and since when; times are RFC 3339 with microseconds."""

    holderIdentity: str | None = None  # noqa: N815
    leaseDurationSeconds: int | None = None  # noqa: N815
    acquireTime: str | None = None  # noqa: N815
    renewTime: str | None = None  # noqa: N815
    leaseTransitions: int | None = None  # noqa: N815


class Lease(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A coordination.k8s.io/v1 Lease."""

    api: ClassVar[str] = "apis/coordination.k8s.io/v1"
    plural: ClassVar[str] = "leases"
    spec: LeaseSpec = LeaseSpec()


class WatchBookmark(msgspec.Struct, frozen=True, gc=False):
    """The part of a bookmark, or of any object, that says how far the watch is."""

    metadata: Metadata


class Status(msgspec.Struct, frozen=True, gc=False):
    """How the API server says what went wrong."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: dict[str, Any] | None = None
