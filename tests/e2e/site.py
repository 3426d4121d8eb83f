"""A cluster with the chart installed, and the questions that the tests ask about its pods.

`Site` is made once by conftest.py. Everything that a test makes is in a namespace of its own, which goes
with it. What is asked is what users see: labels, annotations, events, endpoints, kubectl's output.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, TypeVar

from bench.valkey import Valkey
from tests.cluster import machine
from tests.cluster.base import ClusterError, until
from tests.cluster.cluster import Cluster

PREFIX: Final = "architect.loopholelabs.io/"
STATUS: Final = "status.architect.loopholelabs.io/"
IMAGE: Final = "localhost/valkey:8"
TOOLS: Final = "localhost/architect-test:1"
"""With python, busybox and tar."""
PORT: Final = 6379
NODES: Final = ("k8n1", "k8n2")
"""Run managed pods; k8n3 has the manager and the control plane."""
CRITICAL: Final = "k8n3"
SOON_S: Final = 40.0
COMPONENTS_S: Final = 120.0

T = TypeVar("T")


def soon(what: str, condition: Callable[[], T | None], seconds: float = SOON_S) -> T:
    """Waits for a condition whose questions may fail meanwhile; returns its first true value."""

    def tried() -> T | None:
        with contextlib.suppress(ClusterError, OSError, KeyError, IndexError, ValueError):
            return condition()
        return None

    found = until(what, tried, seconds, poll_s=0.1)
    assert found is not None
    return found


def container(name: str = "valkey", **more: Any) -> dict[str, Any]:
    """A valkey with its port declared; `more` are fields of the container."""
    return {
        "name": name,
        "image": IMAGE,
        "imagePullPolicy": "Never",
        "ports": [{"containerPort": PORT}],
        **more,
    }


def managing(
    managed: Sequence[str] = ("valkey",), seconds: float = 2, monitor: str | None = "packets"
) -> dict[str, str]:
    """What makes these containers managed ones."""
    found = {
        PREFIX + "managed-containers": json.dumps(list(managed)),
        PREFIX + "scaledown-durations": json.dumps(dict.fromkeys(managed, f"{seconds:g}s")),
    }
    if monitor:
        found[PREFIX + "network-monitor"] = json.dumps(dict.fromkeys(managed, monitor))
    return found


def template(
    app: str,
    containers: Sequence[Mapping[str, Any]] = (),
    notes: Mapping[str, str] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A pod's metadata and spec; `spec` are further fields of the latter."""
    return {
        "metadata": {
            "labels": {"app": app},
            "annotations": dict(managing() if notes is None else notes),
        },
        "spec": {
            "runtimeClassName": "runc-architect",
            "terminationGracePeriodSeconds": 2,
            "containers": list(containers) or [container()],
            **spec,
        },
    }


def pod(name: str, *rest: Any, **more: Any) -> dict[str, Any]:
    """A bare pod: `template` with a name."""
    made = template(name, *rest, **more)
    made["metadata"]["name"] = name
    return {"apiVersion": "v1", "kind": "Pod", **made}


def service(name: str, app: str, **spec: Any) -> dict[str, Any]:
    """A Service of the pods with that label."""
    spec = {"selector": {"app": app}, "ports": [{"port": PORT}], **spec}
    return {"apiVersion": "v1", "kind": "Service", "metadata": {"name": name}, "spec": spec}


class Site:
    """See the module. The methods are those of one namespace: `within` gives another one's."""

    def __init__(self, cluster: Cluster, namespace: str) -> None:
        self.cluster = cluster
        self.namespace = namespace
        self.killed: set[str] = set()
        """Ids of the chart's containers that the test has killed."""
        self._clients: list[Valkey] = []

    @contextlib.contextmanager
    def within(self, namespace: str) -> Iterator[Site]:
        """A namespace that is there for as long as the context."""
        self.cluster.kubectl("create", "namespace", namespace)
        site = Site(self.cluster, namespace)
        soon("the default service account", lambda: site.get("serviceaccount", "default"))
        try:
            yield site
        finally:
            for client in site._clients:
                client.close()
            self.cluster.kubectl("delete", "namespace", namespace, "--wait=false")

    def await_components(self) -> None:
        """Waits until every pod of the chart is ready, none with a container that a test has killed.

        The kubelet waits longer each time before it starts again what was killed again.
        """
        soon("all components to be ready", self._components_ready, COMPONENTS_S)

    def _components_ready(self) -> bool:
        pods = self.cluster.get("pods", "--namespace=architect")["items"]
        ids = {
            status.get("containerID", "").rpartition("/")[2]
            for one in pods
            for status in one["status"]["containerStatuses"]
        }
        return all(map(is_ready, pods)) and not ids & self.killed

    # ---- kubectl ----------------------------------------------------------------------------------

    def kubectl(self, *words: str, stdin: str | None = None, timeout_s: float = 60) -> str:
        """Runs kubectl in the namespace; returns what it printed. Raises ClusterError."""
        return self.cluster.kubectl(
            "--namespace", self.namespace, *words, stdin=stdin, timeout_s=timeout_s
        )

    def get(self, *words: str) -> dict[str, Any]:
        """`kubectl get` of one object or a list."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "--output=json", *words))
        return found

    def apply(self, *objects: Mapping[str, Any]) -> str:
        """`kubectl apply`; returns what it printed, warnings not among it."""
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        return self.kubectl("apply", "--filename=-", stdin=json.dumps(listed))

    def refused(self, *objects: Mapping[str, Any]) -> str:
        """What kubectl says of objects that the API server must not take."""
        try:
            self.apply(*objects)
        except ClusterError as error:
            return str(error)
        raise AssertionError("it was not refused")

    @contextlib.contextmanager
    def running(self, *words: str) -> Iterator[subprocess.Popen[str]]:
        """A kubectl command that goes on, such as port-forward; ended with the context."""
        client = self.cluster.control_plane
        command = [str(client.programs.kubectl), "--kubeconfig", str(client.admin)]
        env = machine.environment(self.cluster.home)
        env["KUBECACHEDIR"] = str(self.cluster.home / "kubectl-cache")
        with subprocess.Popen(
            [*command, "--namespace", self.namespace, *words],
            env=env,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        ) as process:
            try:
                yield process
            finally:
                process.kill()

    # ---- pods --------------------------------------------------------------------------------------

    def start(self, *objects: Mapping[str, Any], app: str = "") -> dict[str, Any]:
        """Applies them and returns the pod (of that app, or the first object) once it is ready."""
        self.apply(*objects)
        app = app or objects[0]["metadata"]["name"]
        return soon(f"a pod of {app} to be ready", lambda: self.ready(app))

    def of(self, app: str) -> list[dict[str, Any]]:
        """The pods with that label that are not being deleted."""
        found: list[dict[str, Any]] = self.get("pods", f"--selector=app={app}")["items"]
        return [one for one in found if "deletionTimestamp" not in one["metadata"]]

    def ready(self, app: str) -> dict[str, Any] | None:
        """The one pod with that label, if it is ready."""
        (one,) = self.of(app)
        return one if is_ready(one) else None

    def pod(self, name: str) -> dict[str, Any]:
        """A pod as it is now."""
        return self.get("pod", name)

    def state(self, name: str, container: str = "valkey") -> str | None:
        """The status label of a container."""
        found: str | None = self.pod(name)["metadata"]["labels"].get(STATUS + container)
        return found

    def asleep(self, name: str, container: str = "valkey") -> dict[str, Any]:
        """Waits until a container is hibernated; returns its pod."""
        soon(
            f"{name}/{container} to hibernate",
            lambda: self.state(name, container) == "SCALED_DOWN",
        )
        return self.pod(name)

    def awake(self, name: str, container: str = "valkey") -> dict[str, Any]:
        """Waits until the label says that a container runs; returns its pod."""
        soon(f"{name}/{container} to wake", lambda: self.state(name, container) == "RUNNING")
        return self.pod(name)

    def settled(
        self,
        name: str,
        cpu: str,
        memory: str,
        container: str = "valkey",
        *,
        client: Valkey | None = None,
    ) -> None:
        """Waits until the kubelet reports these requests of a container; a ``client`` keeps it awake."""
        wanted = {"cpu": cpu, "memory": memory}

        def shown() -> bool:
            if client is not None:
                client("PING")
            statuses = self.pod(name)["status"]["containerStatuses"]
            (one,) = (each for each in statuses if each["name"] == container)
            requests: dict[str, str] = one["resources"].get("requests", {})
            return requests == wanted

        soon(f"the requests of {name} to be {wanted}", shown)

    def restarts(self, name: str) -> int:
        """How often its containers were started again."""
        return sum(one["restartCount"] for one in self.pod(name)["status"]["containerStatuses"])

    def events(self, name: str, reason: str) -> list[str]:
        """The messages of a pod's events of that reason, oldest first."""
        fields = f"involvedObject.name={name},reason={reason}"
        items = self.get("events", f"--field-selector={fields}")["items"]
        return [one["message"] for one in sorted(items, key=lambda one: str(one["lastTimestamp"]))]

    def exec(self, name: str, *words: str, container: str = "valkey") -> str:
        """Runs a command in a container."""
        return self.kubectl("exec", name, "--container", container, "--", *words).strip()

    def connect(self, name: str) -> Valkey:
        """A connection to the valkey of a pod, by its address; closed with the namespace at the latest."""
        client = Valkey(self.pod(name)["status"]["podIP"], PORT)
        self._clients.append(client)
        return client

    def rows(self, node: str) -> list[dict[str, Any]]:
        """`architect ps` on a node: our own containers of this namespace."""
        number = int(node.removeprefix("k8n"))
        found = self.cluster.node(number).run(ARCHITECT, "ps", "-o", "json")
        return [row for row in json.loads(found) if row["namespace"] == self.namespace]


ARCHITECT: Final = "/usr/local/lib/architect/venv/bin/architect"


def is_ready(one: Mapping[str, Any]) -> bool:
    """Whether a pod's Ready condition is true."""
    conditions = one["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def taken(seconds: Callable[[], object]) -> float:
    """How long it takes to call something, in seconds."""
    began = time.monotonic()
    seconds()
    return time.monotonic() - began


def archive(folder: Path, image: str) -> Path:
    """Where an image's archive is put."""
    return folder / (image.rpartition("/")[2].replace(":", "-") + ".tar")
