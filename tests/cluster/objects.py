"""Kubernetes objects as the tests write them, and questions about them. Called by the tests."""

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Final, TypeVar

from tests.cluster.base import ClusterError, until
from tests.cluster.cluster import Cluster
from tests.cluster.node import Node

IMAGE: Final = "localhost/valkey:8"
PORT: Final = 6379
RECORDER: Final = "/usr/local/bin/runc-recorder"
"""The binary of the runtime handler that the cluster of these tests has."""
_TCP: Final = {"tcpSocket": {"port": PORT}}
_PING: Final = (
    "import socket, sys; s = socket.create_connection((sys.argv[1], int(sys.argv[2])), 5); "
    's.sendall(b"PING\\r\\n"); print(s.recv(64).decode().strip(" +\\r\\n"))'
)


T = TypeVar("T")


def soon(what: str, condition: Callable[[], T], seconds: float = 30.0) -> T:
    """Wait for a condition whose questions may fail meanwhile; return its first true value."""

    def tried() -> T | None:
        with contextlib.suppress(ClusterError, OSError):
            return condition()
        return None

    found = until(what, tried, seconds, poll_s=0.2)
    assert found is not None
    return found


def container(**more: Any) -> dict[str, Any]:
    """A valkey."""
    return {"name": "valkey", "image": IMAGE, "imagePullPolicy": "Never", **more}


def named(kind: str, name: str, version: str = "v1", **more: Any) -> dict[str, Any]:
    """An object; `more` are its fields, and `labels` its labels."""
    metadata = {"name": name, "labels": more.pop("labels", {})}
    return {"apiVersion": version, "kind": kind, "metadata": metadata, **more}


def pod(name: str, labels: Mapping[str, str], on: str, **more: Any) -> dict[str, Any]:
    """A pod with one valkey on a node; `more` are fields of the container, `runtime` its class."""
    spec: dict[str, Any] = {
        "terminationGracePeriodSeconds": 1,
        "nodeSelector": {"kubernetes.io/hostname": on},
    }
    if "runtime" in more:
        spec["runtimeClassName"] = more.pop("runtime")
    spec["containers"] = [container(**more)]
    return named("Pod", name, labels=dict(labels), spec=spec)


def deployment(name: str, replicas: int) -> list[dict[str, Any]]:
    """A Deployment of valkeys, each on another node, and its Service."""
    labels = {"app": name}
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": labels},
    }
    ready = {"readinessProbe": {**_TCP, "periodSeconds": 1}}
    alive = {"livenessProbe": {**_TCP, "periodSeconds": 2}}
    template = {
        "metadata": {"labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 2,
            "topologySpreadConstraints": [spread],
            "containers": [container(**ready, **alive)],
        },
    }
    spec = {"replicas": replicas, "selector": {"matchLabels": labels}, "template": template}
    ports = {"selector": labels, "ports": [{"port": PORT}]}
    return [
        named("Deployment", name, "apps/v1", spec=spec),
        named("Service", name, spec=ports),
    ]


def stateful_set(name: str, node: str, folder: str) -> list[dict[str, Any]]:
    """A StatefulSet of one valkey that keeps its data in a local volume: a folder of the node."""
    storage = f"{name}-local"
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    volume = {
        "capacity": {"storage": "1Gi"},
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage,
        "local": {"path": folder},
        "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
    }
    claim = {
        "accessModes": ["ReadWriteOnce"],
        "storageClassName": storage,
        "resources": {"requests": {"storage": "1Gi"}},
    }
    subject = container(
        args=["valkey-server", "--dir", "/data", "--appendonly", "yes", "--protected-mode", "no"],
        volumeMounts=[{"name": "data", "mountPath": "/data"}],
        readinessProbe={**_TCP, "periodSeconds": 1},
    )
    labels = {"app": name}
    spec = {
        "serviceName": name,
        "selector": {"matchLabels": labels},
        "template": {
            "metadata": {"labels": labels},
            "spec": {"terminationGracePeriodSeconds": 2, "containers": [subject]},
        },
        "volumeClaimTemplates": [{"metadata": {"name": "data"}, "spec": claim}],
    }
    return [
        named(
            "StorageClass",
            storage,
            "storage.k8s.io/v1",
            provisioner="kubernetes.io/no-provisioner",
            volumeBindingMode="WaitForFirstConsumer",
        ),
        named("PersistentVolume", f"{name}-0", spec=volume),
        named("StatefulSet", name, "apps/v1", spec=spec),
    ]


def pods(cluster: Cluster, selector: str) -> list[dict[str, Any]]:
    """The pods that a label selector finds and that are not being deleted."""
    found: list[dict[str, Any]] = cluster.get("pods", f"--selector={selector}")["items"]
    return [one for one in found if "deletionTimestamp" not in one["metadata"]]


def cli(cluster: Cluster, name: str, *words: str) -> str:
    """Run valkey-cli in a pod; return its answer."""
    return cluster.kubectl("exec", name, "--", "valkey-cli", *words, timeout_s=20).strip()


def ping_from(node: Node, address: str) -> str:
    """Ask a valkey for a sign of life from within a node; return its answer."""
    return node.run("/usr/bin/python3", "-c", _PING, address, str(PORT)).strip()
