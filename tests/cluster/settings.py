"""What is fixed about the cluster (names, addresses) and what a caller may choose (`Options`).

Names and addresses are fixed, so there is one cluster at a time on a machine, and whatever is left
of one can be found without its record. Called by every module beside it.
"""

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final, Self

from common import REPOSITORY

HOME: Final = REPOSITORY / ".cluster"
"""Where all state is unless the caller says otherwise."""

NODE_NET: Final = "10.77.0"
POD_NET: Final = "10.78"
SERVICE_NET: Final = "10.79"
NETWORKS: Final = (f"{NODE_NET}.0/24", f"{POD_NET}.0.0/16", f"{SERVICE_NET}.0.0/16")
HOST_ADDRESS: Final = f"{NODE_NET}.1"
DNS_ADDRESS: Final = f"{SERVICE_NET}.0.10"
API_PORT: Final = 6443
API: Final = f"https://{HOST_ADDRESS}:{API_PORT}"

SWITCH: Final = "k8sw"
"""The network namespace with the bridge that the host and all nodes are plugged into."""

HOST_LINK: Final = "k8s0"
"""The host's device on that bridge."""

NODE_NAME: Final = re.compile(r"k8n([1-9][0-9]?)")
MAXIMUM_NODES: Final = 99

PAUSE_IMAGE: Final = "localhost/architect-pause:1"
DNS_IMAGE: Final = "localhost/architect-coredns:1"
METRICS_IMAGE: Final = "localhost/architect-metrics-server:1"

_KUBE: Final = Path(__file__).resolve().parent / "kube"
DNS_MANIFEST: Final = _KUBE / "coredns" / "dns.yaml"
METRICS_MANIFEST: Final = _KUBE / "metrics-server" / "metrics.yaml"


def node_name(number: int) -> str:
    """The node's name in Kubernetes, of its namespace, its cgroup and its port on the bridge."""
    return f"k8n{number}"


def node_address(number: int) -> str:
    """The node's address on the bridge."""
    return f"{NODE_NET}.{10 + number}"


def pod_subnet(number: int) -> str:
    """The addresses of the node's pods."""
    return f"{POD_NET}.{number}.0/24"


@dataclass(frozen=True, slots=True)
class Handler:
    """A runtime of containerd's beside runc, which a RuntimeClass names as its handler."""

    binary: str
    """An OCI runtime's path, as the node sees it."""
    pod_annotations: tuple[str, ...] = ()
    """Patterns of the pod's annotations that are copied to config.json of each container."""
    container_annotations: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """What `up` is told; kept with the cluster's state for the commands after it."""

    nodes: int = 3
    images: tuple[str, ...] = ()
    """Archives that every node gets, also one that is added later."""
    share: tuple[str, ...] = ()
    """Folders of the host that every node sees at the same path."""
    dns: bool = True
    """Whether CoreDNS is deployed."""
    metrics: bool = False
    """Whether metrics-server is: `kubectl top` and the autoscaler ask it."""
    old_containerd: tuple[int, ...] = ()
    """Numbers of the nodes that run containerd 1.7, also of such as are added later."""
    handlers: Mapping[str, Handler] = field(default_factory=dict)
    reserved: Mapping[str, str] = field(default_factory=lambda: {"memory": "1Gi"})
    """The kubelet's systemReserved. Each node sees the whole machine: this makes it smaller."""
    kubelet: Mapping[str, Any] = field(default_factory=dict)
    """Added to the KubeletConfiguration."""

    def as_json(self) -> dict[str, Any]:
        """What `from_json` takes."""
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Read what `as_json` gave or a user wrote; missing fields have their defaults.

        Raises TypeError for a field that there is not.
        """
        values = dict(found)
        for name in ("images", "share", "old_containerd"):
            values[name] = tuple(values.get(name, ()))
        values["handlers"] = {
            name: Handler(
                binary=one["binary"],
                pod_annotations=tuple(one.get("pod_annotations", ())),
                container_annotations=tuple(one.get("container_annotations", ())),
            )
            for name, one in values.get("handlers", {}).items()
        }
        return cls(**values)


@dataclass(frozen=True, slots=True)
class Programs:
    """Folders with what the cluster runs; each is a build in the cache."""

    kubernetes: Path
    containerd: Path
    runc: Path
    cni: Path
    helm: Path
    coredns: Path
    pause: Path
    old_containerd: Path | None = None
    """containerd 1.7; None where no node runs it."""

    @property
    def kubectl(self) -> Path:
        """The client of this very version."""
        return self.kubernetes / "kubectl"
