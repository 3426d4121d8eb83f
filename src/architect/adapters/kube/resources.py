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
    apiVersion: str = ""  # noqa: N815 - names are those of the API


class Metadata(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What every object has."""

    name: str = ""
    namespace: str = ""
    uid: str = ""
    resourceVersion: str = ""  # noqa: N815 - names are those of the API
    creationTimestamp: str | None = None  # noqa: N815
    deletionTimestamp: str | None = None  # noqa: N815
    """Of a pod: when its grace ends. It was asked to go ``deletionGracePeriodSeconds`` earlier."""
    deletionGracePeriodSeconds: int | None = None  # noqa: N815
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
    name: str | None = None


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
    terminationGracePeriodSeconds: int | None = None  # noqa: N815


class Condition(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A condition of an object."""

    type: str
    status: str
    reason: str | None = None
    message: str | None = None
    lastTransitionTime: str | None = None  # noqa: N815


class StateWaiting(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A container that has not been started, or is about to be started again."""


class StateRunning(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A container that runs."""

    startedAt: str | None = None  # noqa: N815


class StateTerminated(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A container that has ended, or that could not be started."""

    startedAt: str | None = None  # noqa: N815
    exitCode: int = 0  # noqa: N815
    reason: str | None = None

    @property
    def begun(self) -> bool:
        """Whether its program has run: the kubelet says StartError, and 1970, if it has not."""
        return self.reason != "StartError" and not (self.startedAt or "").startswith("1970-")


class ContainerState(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a container does: one of these; none of them stands for waiting."""

    waiting: StateWaiting | None = None
    running: StateRunning | None = None
    terminated: StateTerminated | None = None


class ContainerStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the kubelet says of a container."""

    name: str
    containerID: str | None = None  # noqa: N815
    ready: bool = False
    resources: Requirements | None = None
    started: bool | None = None
    """It runs, and its startup probe, if any, has passed."""
    state: ContainerState | None = None
    lastState: ContainerState | None = None  # noqa: N815

    @property
    def begun(self) -> bool:
        """Whether its program has run, now or before; a start that failed is none."""
        states = [one for one in (self.state, self.lastState) if one is not None]
        return (
            bool(self.started)
            or any(one.running is not None for one in states)
            or any(one.terminated is not None and one.terminated.begun for one in states)
        )


class PodIP(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """An address of a pod, one for each family."""

    ip: str = ""


class PodStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the kubelet says of the pod."""

    phase: str = ""
    qosClass: str | None = None  # noqa: N815
    podIP: str | None = None  # noqa: N815
    podIPs: tuple[PodIP, ...] | None = None  # noqa: N815
    hostIP: str | None = None  # noqa: N815
    conditions: tuple[Condition, ...] | None = None
    containerStatuses: tuple[ContainerStatus, ...] | None = None  # noqa: N815
    initContainerStatuses: tuple[ContainerStatus, ...] | None = None  # noqa: N815

    @property
    def addresses(self) -> tuple[str, ...]:
        """Its addresses, one for each family, that of the cluster's first family first."""
        found = tuple(one.ip for one in self.podIPs or () if one.ip)
        return found or ((self.podIP,) if self.podIP else ())


class Pod(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A pod."""

    plural: ClassVar[str] = "pods"
    spec: PodSpec = PodSpec()
    status: PodStatus = PodStatus()

    @property
    def ready(self) -> bool:
        """Whether its condition Ready is true."""
        found = self.status.conditions or ()
        return any(one.type == "Ready" and one.status == "True" for one in found)


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


class NamespaceStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Active or Terminating."""

    phase: str = ""


class Namespace(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A namespace."""

    plural: ClassVar[str] = "namespaces"
    namespaced: ClassVar[bool] = False
    status: NamespaceStatus = NamespaceStatus()


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


class ReplicaSetSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How many pods it is to have."""

    replicas: int | None = None


class ReplicaSet(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """An apps/v1 ReplicaSet."""

    api: ClassVar[str] = "apis/apps/v1"
    plural: ClassVar[str] = "replicasets"
    spec: ReplicaSetSpec = ReplicaSetSpec()


class Ordinals(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Where the numbers of a StatefulSet begin."""

    start: int = 0


class StatefulSetSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How many pods it is to have."""

    replicas: int | None = None
    ordinals: Ordinals | None = None


class StatefulSetStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Which revision its pods have, and which one they are to get."""

    currentRevision: str = ""  # noqa: N815
    updateRevision: str = ""  # noqa: N815


class StatefulSet(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """An apps/v1 StatefulSet."""

    api: ClassVar[str] = "apis/apps/v1"
    plural: ClassVar[str] = "statefulsets"
    spec: StatefulSetSpec = StatefulSetSpec()
    status: StatefulSetStatus = StatefulSetStatus()


class JobSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What a Job is to do."""

    suspend: bool | None = None
    completions: int | None = None


class JobStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """How far it is."""

    completionTime: str | None = None  # noqa: N815
    conditions: tuple[Condition, ...] | None = None


class Job(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A batch/v1 Job."""

    api: ClassVar[str] = "apis/batch/v1"
    plural: ClassVar[str] = "jobs"
    spec: JobSpec = JobSpec()
    status: JobStatus = JobStatus()

    @property
    def finished(self) -> bool:
        """Whether it has completed or failed, or is about to be said to have."""
        ends = ("Complete", "Failed", "SuccessCriteriaMet", "FailureTarget")
        return self.status.completionTime is not None or any(
            one.type in ends and one.status == "True" for one in self.status.conditions or ()
        )


class ServicePort(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A port of a Service; ``targetPort`` is a number or the name of a container's port."""

    port: int
    name: str = ""
    protocol: str = "TCP"
    targetPort: int | str | None = None  # noqa: N815


class ServiceSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Whom a Service leads to. ``clusterIP`` is the word None of a headless one, empty of an ExternalName."""

    clusterIP: str = ""  # noqa: N815
    selector: dict[str, str] | None = None
    ipFamilies: tuple[str, ...] | None = None  # noqa: N815
    ports: tuple[ServicePort, ...] | None = None


class Service(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A Service."""

    plural: ClassVar[str] = "services"
    spec: ServiceSpec = ServiceSpec()


class EndpointSlice(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A discovery.k8s.io/v1 EndpointSlice: of those that we have made nothing else is read again."""

    api: ClassVar[str] = "apis/discovery.k8s.io/v1"
    plural: ClassVar[str] = "endpointslices"


class SigningSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What is to be signed; ``request`` is PEM in Base64. The server fills in who asked."""

    request: str = ""
    signerName: str = ""  # noqa: N815
    usages: tuple[str, ...] | None = None
    expirationSeconds: int | None = None  # noqa: N815
    username: str | None = None
    uid: str | None = None
    groups: tuple[str, ...] | None = None
    extra: dict[str, tuple[str, ...]] | None = None


class SigningStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What became of it; ``certificate`` is PEM in Base64."""

    certificate: str | None = None
    conditions: tuple[Condition, ...] | None = None


class CertificateSigningRequest(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """A certificates.k8s.io/v1 CertificateSigningRequest."""

    api: ClassVar[str] = "apis/certificates.k8s.io/v1"
    plural: ClassVar[str] = "certificatesigningrequests"
    namespaced: ClassVar[bool] = False
    spec: SigningSpec = SigningSpec()
    status: SigningStatus = SigningStatus()


class CheckpointOwner(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The controller of the pod whose state it is."""

    apiVersion: str = ""  # noqa: N815
    kind: str = ""
    name: str = ""
    uid: str = ""


class CheckpointContainer(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """A container whose state it has."""

    name: str
    bytes: int | None = None


class CheckpointSpec(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Whose state it is and who may have it."""

    podName: str = ""  # noqa: N815
    podUID: str = ""  # noqa: N815
    nodeName: str = ""  # noqa: N815
    owner: CheckpointOwner | None = None
    templateHash: str | None = None  # noqa: N815
    controllerRevision: str | None = None  # noqa: N815
    ordinal: int | None = None
    containers: tuple[CheckpointContainer, ...] = ()


class Claimant(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """The one pod that takes a checkpoint."""

    podName: str = ""  # noqa: N815
    podUID: str = ""  # noqa: N815
    nodeName: str = ""  # noqa: N815


class Move(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """What the routers must know of a pod that has moved.

    A flow is ``protocol|old address|local port|peer's address|peer's port``, as the pod's socket saw it.
    """

    oldAddresses: tuple[str, ...] = ()  # noqa: N815
    newAddresses: tuple[str, ...] = ()  # noqa: N815
    ports: tuple[str, ...] = ()
    flows: tuple[str, ...] = ()
    accepting: bool = False


class CheckpointStatus(msgspec.Struct, frozen=True, gc=False, omit_defaults=True):
    """Where it is on its way; ``phase`` is empty only between its creation and its first status."""

    phase: str = ""
    endpoint: str | None = None
    claimedBy: Claimant | None = None  # noqa: N815
    move: Move | None = None
    transferredBytes: int | None = None  # noqa: N815
    downtimeMs: int | None = None  # noqa: N815
    message: str | None = None
    conditions: tuple[Condition, ...] | None = None


class Checkpoint(Object, frozen=True, gc=False, omit_defaults=True, kw_only=True):
    """An architect.loopholelabs.io/v1 Checkpoint: the state of a pod that goes away."""

    api: ClassVar[str] = "apis/architect.loopholelabs.io/v1"
    plural: ClassVar[str] = "checkpoints"
    spec: CheckpointSpec = CheckpointSpec()
    status: CheckpointStatus = CheckpointStatus()


class WatchBookmark(msgspec.Struct, frozen=True, gc=False):
    """The part of a bookmark, or of any object, that says how far the watch is."""

    metadata: Metadata


class Status(msgspec.Struct, frozen=True, gc=False):
    """How the API server says what went wrong."""

    message: str = ""
    reason: str = ""
    code: int = 0
    details: dict[str, Any] | None = None
