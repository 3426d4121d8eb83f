"""What the tests of moving share: a deployment that moves, and clients everywhere that count.

A client is tests/e2e/counting.py, on the host or in a pod on a node, by one of the ways to a Service's pod.
"""

from __future__ import annotations

import contextlib
import functools
import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from tests.cluster.settings import node_address
from tests.e2e.site import NODES, PORT, TOOLS, Site, managing, service, soon, template

ALL_NODES: Final = (*NODES, "k8n3")
HOST: Final = "host"
PROGRAM: Final = Path(__file__).with_name("counting.py").read_text()
MOVE_S: Final = 60.0


class Way(NamedTuple):
    """How a client reaches the pod."""

    name: str
    address: str
    port: int


def deployment(name: str, replicas: int = 1, **rest: Any) -> dict[str, Any]:
    """A Deployment of valkeys that do not go to sleep by themselves within a test."""
    notes = rest.pop("notes", None) or managing(seconds=300)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {
            "replicas": replicas,
            "selector": {"matchLabels": {"app": name}},
            "template": template(name, notes=notes, **rest),
        },
    }


def node_port(name: str, app: str) -> dict[str, Any]:
    """A Service that every node answers for."""
    return service(name, app, type="NodePort")


def ways(site: Site, app: str, pod: dict[str, Any]) -> list[Way]:
    """By the pod's address, the Service's, and a port of each node."""
    spec = site.get("service", app)["spec"]
    port = spec["ports"][0]["nodePort"]
    found = [
        Way("pod", pod["status"]["podIP"], PORT),
        Way("service", spec["clusterIP"], PORT),
        *(Way(name, node_address(number), port) for number, name in enumerate(ALL_NODES, 1)),
    ]
    for way in found:
        soon(f"{way.name} to answer", functools.partial(_answers, way))
    there = site.kubectl("get", "pods", "-o", "name")
    # Of each node's kube-proxy it is not known when it has heard of a Service.
    for node in ALL_NODES:
        words = (
            "exec",
            f"client-{node}",
            "--",
            "python3",
            "-c",
            _TRY,
            spec["clusterIP"],
            str(PORT),
        )
        if f"client-{node}" in there:
            soon(f"the Service to answer on {node}", functools.partial(site.kubectl, *words))
    return found


_TRY: Final = "import socket, sys; socket.create_connection(sys.argv[1:3], 1); print('yes')"


def _answers(way: Way) -> bool:
    """A new connection for each try: a node remembers those that it has once sent nowhere."""
    with socket.create_connection((way.address, way.port), 1):
        return True


@contextlib.contextmanager
def cordoned(site: Site, node: str) -> Iterator[None]:
    """Nothing new is scheduled on a node."""
    site.kubectl("cordon", node)
    try:
        yield
    finally:
        site.kubectl("uncordon", node)


def client_pods(site: Site) -> None:
    """A pod with python on each node, from which clients run."""
    pods = [
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": f"client-{node}", "labels": {"app": "client"}},
            "spec": {
                "nodeName": node,
                "terminationGracePeriodSeconds": 0,
                "tolerations": [{"operator": "Exists"}],
                "containers": [{"name": "client", "image": TOOLS, "imagePullPolicy": "Never"}],
            },
        }
        for node in ALL_NODES
    ]
    site.apply(*pods)
    for node in ALL_NODES:
        name = f"client-{node}"
        soon(f"{name} to run", functools.partial(_runs, site, name))


def _runs(site: Site, name: str) -> bool:
    return bool(site.pod(name)["status"]["phase"] == "Running")


class Clients:
    """Clients under way; use it as a context."""

    def __init__(self, site: Site, seconds: float, pause_ms: float = 10) -> None:
        self._site = site
        self._seconds = seconds
        self._pause_ms = pause_ms
        self._stack = contextlib.ExitStack()
        self._running: dict[str, subprocess.Popen[str]] = {}

    def __enter__(self) -> Clients:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def start(self, place: str, way: Way) -> str:
        """Starts one on the host or in the pod of a node; returns its key, once it is connected."""
        key = f"{place}-{way.name}"
        words = [key, str(self._seconds), str(self._pause_ms), way.address, str(way.port)]
        if place == HOST:
            process = self._stack.enter_context(
                subprocess.Popen(
                    [sys.executable, "-c", PROGRAM, *words], stdout=subprocess.PIPE, text=True
                )
            )
            self._stack.callback(process.kill)
        else:
            command = ("exec", f"client-{place}", "--", "python3", "-c", PROGRAM, *words)
            process = self._stack.enter_context(self._site.running(*command))
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.strip() == "connected", f"{key}: {line}{process.stdout.read()}"
        self._running[key] = process
        return key

    def finish(self) -> dict[str, dict[str, Any]]:
        """Waits for all of them; returns what each says, by its key."""
        said: dict[str, dict[str, Any]] = {}
        for key, process in self._running.items():
            output, _ = process.communicate(timeout=self._seconds + 90)
            said[key] = json.loads(output.strip().rpartition("\n")[2])
        return said


def moved(site: Site, app: str, before: dict[str, Any]) -> dict[str, Any]:
    """Waits until another pod than ``before`` is the app's only one, ready; returns it."""

    def there() -> dict[str, Any] | None:
        found = site.ready(app)
        return found if found and found["metadata"]["uid"] != before["metadata"]["uid"] else None

    return soon(f"{app} to have moved", there, MOVE_S)


def gone(site: Site, pod: dict[str, Any]) -> None:
    """Waits until the API has a pod no more; another one may have its name by then."""
    name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]

    def over() -> bool:
        return all(one["metadata"]["uid"] != uid for one in site.get("pods")["items"])

    soon(f"{name} to be gone", over, MOVE_S)
