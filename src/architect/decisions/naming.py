"""Which pod and which container a runtime call is for.

The OCI specification carries no such names, so they come from what each engine leaves behind:
containerd's CRI plug-in writes annotations, Podman gives its own name for the container to conmon
(``-n NAME``). Called by ``decisions.admission`` when a container is created.

Podman's names (4.3 to 5): ``podman run --name N`` is N; ``podman kube play`` makes
``<pod>-<container>``. A hyphen is legal in both parts, so the list of managed containers decides
where the name is split. Containers of a Podman pod carry CRI-O's sandbox annotation, lone ones do
not.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass

CRI_CONTAINER_TYPE = "io.kubernetes.cri.container-type"
CRI_CONTAINER_NAME = "io.kubernetes.cri.container-name"
CRI_SANDBOX_NAME = "io.kubernetes.cri.sandbox-name"
CRI_SANDBOX_NAMESPACE = "io.kubernetes.cri.sandbox-namespace"
CRI_SANDBOX_ID = "io.kubernetes.cri.sandbox-id"
CRI_SANDBOX_UID = "io.kubernetes.cri.sandbox-uid"
KUBELET_PORTS = "io.kubernetes.container.ports"
KUBELET_RESTARTS = "io.kubernetes.container.restartCount"
"""Two of the kubelet's own annotations on a container: what its manifest declares, as JSON, absent where
it declares none; and one that is always there, if the handler's ``container_annotations`` let them by."""
CRIO_CONTAINER_TYPE = "io.kubernetes.cri-o.ContainerType"
CRIO_SANDBOX_ID = "io.kubernetes.cri-o.SandboxID"
CONTAINER_MANAGER = "io.container.manager"

DEFAULT_NAMESPACE = "default"
"""Podman has no namespaces; its pods count as being in Kubernetes' default one."""

_INFRA_SUFFIX = "-infra"


@dataclass(frozen=True, slots=True)
class Identity:
    """A container as its user names it."""

    namespace: str
    """Kubernetes namespace of the pod."""
    pod: str
    """Name of the pod."""
    container: str
    """Name of the container in the pod's manifest."""

    def __str__(self) -> str:
        """``namespace/pod/container``, as in log lines."""
        return f"{self.namespace}/{self.pod}/{self.container}"


class Nameless(enum.Enum):
    """Why a call is for no container that could be managed."""

    SANDBOX = "the pod's own infrastructure container"  # pause or infra: it runs no program
    NO_NAME = "the engine does not tell the container's name"  # Docker keeps it to itself
    NOT_LISTED = "not listed in managed-containers"  # a neighbour of managed containers, or none


def is_known_sandbox(annotations: Mapping[str, str]) -> bool:
    """Whether the engine's annotations say that this is a pod's pause or infra container."""
    return _container_type(annotations) in ("sandbox", "podsandbox")


def _container_type(annotations: Mapping[str, str]) -> str | None:
    return annotations.get(CRI_CONTAINER_TYPE) or annotations.get(CRIO_CONTAINER_TYPE)


def lone_container(annotations: Mapping[str, str], engine_name: str | None) -> str | None:
    """The name of a container that is known to be its pod's only one (``podman run --name N``)."""
    if (
        not engine_name
        or engine_name.endswith(_INFRA_SUFFIX)
        or annotations.get(CONTAINER_MANAGER) != "libpod"
        or CRIO_SANDBOX_ID in annotations
        or CRI_CONTAINER_TYPE in annotations
    ):
        return None
    return engine_name


def sandbox_id(annotations: Mapping[str, str]) -> str:
    """Id of the pod's pause or infra container; empty if the engine does not tell or there is none."""
    return annotations.get(CRI_SANDBOX_ID) or annotations.get(CRIO_SANDBOX_ID, "")


def kubelet_ports(annotations: Mapping[str, str]) -> list[tuple[str, int]] | None:
    """The ports (protocol, number) that a pod's manifest declares for this container.

    None if the engine has not passed the kubelet's annotations on. SCTP is left out: no SCTP
    association survives a checkpoint, so its packets neither wake nor count.
    """
    if KUBELET_RESTARTS not in annotations and KUBELET_PORTS not in annotations:
        return None
    found = set()
    for port in json.loads(annotations.get(KUBELET_PORTS, "[]")):
        protocol = port.get("protocol", "TCP").lower()
        if protocol in ("tcp", "udp"):
            found.add((protocol, int(port["containerPort"])))
    return sorted(found)


def resolve(
    annotations: Mapping[str, str], engine_name: str | None, managed: Collection[str]
) -> Identity | Nameless:
    """Return who the container is, or why it is none of the ``managed`` ones.

    ``annotations`` are those of the OCI specification, ``engine_name`` is the engine's own name for
    the container (conmon's ``-n``), ``managed`` the pod's managed-containers list.
    """
    if is_known_sandbox(annotations):
        return Nameless.SANDBOX
    if CRI_CONTAINER_TYPE in annotations:
        container = annotations.get(CRI_CONTAINER_NAME, "")
        pod = annotations.get(CRI_SANDBOX_NAME, "")
        if not container or not pod:
            return Nameless.NO_NAME
        if container not in managed:
            return Nameless.NOT_LISTED
        namespace = annotations.get(CRI_SANDBOX_NAMESPACE) or DEFAULT_NAMESPACE
        return Identity(namespace, pod, container)
    if not engine_name:
        return Nameless.NO_NAME
    if engine_name in managed:
        return Identity(DEFAULT_NAMESPACE, engine_name, engine_name)
    if engine_name.endswith(_INFRA_SUFFIX) and _container_type(annotations) is None:
        # Podman's infra container is told by its name alone.
        return Nameless.SANDBOX
    if lone_container(annotations, engine_name) is not None:
        return Nameless.NOT_LISTED
    # The longest entry wins: of ["db", "user-db"], my-user-db is user-db of the pod "my".
    for entry in sorted(managed, key=len, reverse=True):
        pod = engine_name.removesuffix(f"-{entry}")
        if pod and entry and pod != engine_name:
            return Identity(DEFAULT_NAMESPACE, pod, entry)
    return Nameless.NOT_LISTED
