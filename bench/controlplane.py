"""The control plane: from an event to a decision in a large cluster, and what it uses in a small one.

Large is a simulation: a stand-in of the API server on the loopback, in a process of its own, that lists and
watches 5,000 nodes and 150,000 pods of ours (the limits of one Kubernetes cluster) as JSON of usual size.
The client, the informers, the queue and the decisions are the control plane's own, in a second process whose
memory is measured. Small is the program itself against a real API server with 200 pods, if KUBECONFIG names
one (`make cluster`).

The time of an event is that at which the API server sends it; both processes read CLOCK_MONOTONIC.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar, Final
from urllib.parse import parse_qs, urlsplit

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import Recorder
from architect.adapters.kube.resources import Object, Pod
from architect.contract.annotations import CPU_REQUESTS, MANAGED_CONTAINERS, MEMORY_REQUESTS
from architect.contract.kubernetes import CONTROL_PLANE, RUNNING, SCALED_DOWN, status_label
from architect.decisions.reconcile import Finding
from architect.processes.controlplane.controller import Controller
from bench import harness

SENT: Final = "bench/sent"
"""Annotation: CLOCK_MONOTONIC nanoseconds at which the event was sent."""
REAL_PODS: Final = 200
_PAGE: Final = 500
_TICK_S: Final = 0.01
_LOOK_S: Final = 0.1
_QUIET: Final = 20
"""Looks at which nothing more had been decided: everything has been."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much the simulation has."""

    nodes: int = 5000
    pods_a_node: int = 30
    rate: int = 1000
    """Events a second: each pod hibernates and wakes every ten minutes, four writes each."""
    seconds: int = 30
    burst: int = 10_000
    """Events at once, as when a large part of a cluster hibernates together."""

    @property
    def pods(self) -> int:
        """Pods in all."""
        return self.nodes * self.pods_a_node


QUICK: Final = Scale(nodes=200, seconds=3, burst=1000)


# -- the stand-in of the API server -------------------------------------------------------------------


def _filler() -> dict[str, Any]:
    """What real pods have besides, and the control plane does not read: some 4 KB."""
    environment = [{"name": f"VARIABLE_{n}", "value": f"value-of-variable-{n}"} for n in range(12)]
    return {
        "env": environment,
        "image": "registry.example/team/application:v1.2.3",
        "volumeMounts": [{"name": f"volume-{n}", "mountPath": f"/data/{n}"} for n in range(4)],
        "readinessProbe": {"httpGet": {"path": "/healthz", "port": 8080}, "periodSeconds": 5},
        "terminationMessagePath": "/dev/termination-log",
    }


def pod_json(number: int, scale: Scale, version: int, state: str, sent: int = 0) -> bytes:
    """A pod of ours. SCALED_DOWN is all in order; RUNNING has not got its requests back."""
    notes = {
        MANAGED_CONTAINERS: '["app"]',
        CPU_REQUESTS: '{"app":"250m"}',
        MEMORY_REQUESTS: '{"app":"512Mi"}',
    }
    if sent:
        notes[SENT] = str(sent)
    name = f"application-{number % 977:04d}-7c5ddbdf54-{number:06d}"
    labels = {"app": name[:16], "pod-template-hash": "7c5ddbdf54", status_label("app"): state}
    container = {
        "name": "app",
        "resources": {
            "requests": {"cpu": "0", "memory": "1"},
            "limits": {"cpu": "1", "memory": "1Gi"},
        },
        **_filler(),
    }
    conditions = [
        {"type": kind, "status": "True", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        for kind in ("PodScheduled", "Initialized", "ContainersReady", "Ready")
    ]
    one = {
        "metadata": {
            "name": name,
            "namespace": f"team-{number % 50}",
            "uid": str(uuid.UUID(int=number + 1)),
            "resourceVersion": str(version),
            "creationTimestamp": "2026-01-01T00:00:00Z",
            "labels": labels,
            "annotations": notes,
            "managedFields": [
                {
                    "manager": "kubelet",
                    "operation": "Update",
                    "fieldsV1": {f"f:{n}": {} for n in range(60)},
                }
            ],
        },
        "spec": {
            "nodeName": f"node-{number % scale.nodes}",
            "runtimeClassName": "runc-architect",
            "containers": [container],
            "tolerations": [{"key": "node.kubernetes.io/not-ready", "operator": "Exists"}],
        },
        "status": {
            "phase": "Running",
            "qosClass": "Burstable",
            "podIP": f"10.{number >> 16 & 255}.{number >> 8 & 255}.{number & 255}",
            "conditions": conditions,
            "containerStatuses": [
                {"name": "app", "ready": True, "containerID": f"containerd://{number:064x}"}
            ],
        },
    }
    return json.dumps(one, separators=(",", ":")).encode()


def node_json(number: int) -> bytes:
    """A node."""
    one = {
        "metadata": {"name": f"node-{number}", "uid": f"node-{number}", "resourceVersion": "1"},
        "status": {"conditions": [{"type": "Ready", "status": "True"}]},
    }
    return json.dumps(one).encode()


class ApiServer:
    """Lists, and watches that are told when to send."""

    def __init__(self, scale: Scale) -> None:
        self._scale = scale
        self._watch: asyncio.StreamWriter | None = None
        self._version = 1000

    async def serve(self) -> None:
        """Prints its port, and then does what is asked on stdin: ``steady``, ``burst``, ``end``."""
        server = await asyncio.start_server(self._one, "127.0.0.1", 0)
        print(server.sockets[0].getsockname()[1], flush=True)
        loop = asyncio.get_running_loop()
        while (word := (await loop.run_in_executor(None, sys.stdin.readline)).strip()) != "end":
            if word == "steady":
                await self._steady()
            elif word == "burst":
                self._send(self._scale.burst)
            print("sent", flush=True)

    async def _steady(self) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        sent = 0
        while sent < self._scale.rate * self._scale.seconds:
            due = min(
                int((loop.time() - begun) * self._scale.rate),
                self._scale.rate * self._scale.seconds,
            )
            self._send(due - sent)
            sent = due
            await asyncio.sleep(_TICK_S)

    def _send(self, count: int) -> None:
        """Events, spread over all pods: half find something to do, half nothing."""
        if self._watch is None:
            raise RuntimeError("nobody watches pods")
        for _ in range(count):
            self._version += 1
            number = self._version * 7919 % self._scale.pods
            state = (RUNNING, SCALED_DOWN)[self._version % 2]
            data = pod_json(number, self._scale, self._version, state, time.monotonic_ns())
            self._watch.write(b'{"type":"MODIFIED","object":' + data + b"}\n")

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                split = urlsplit(head.split(" ", 2)[1])
                query = {name: values[0] for name, values in parse_qs(split.query).items()}
                if "watch" in query:
                    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
                    await writer.drain()
                    if split.path.endswith("/pods"):
                        self._watch = writer
                    await writer.wait_closed()
                    return
                data = self._answer(split.path, query)
                size = f"HTTP/1.1 200 OK\r\nContent-Length: {len(data)}\r\n\r\n"
                writer.write(size.encode() + data)
                await writer.drain()

    def _answer(self, path: str, query: dict[str, str]) -> bytes:
        if path == "/version":
            return b'{"major":"1","minor":"35"}'
        if path == "/api/v1":
            return b'{"resources":[{"name":"pods/resize"}]}'
        pods = path.endswith("/pods")
        at = int(query.get("continue", 0))
        whole = self._scale.pods if pods else self._scale.nodes
        end = min(at + _PAGE, whole)
        if pods:
            items = [pod_json(n, self._scale, 999, SCALED_DOWN) for n in range(at, end)]
        else:
            items = [node_json(n) for n in range(at, end)]
        more = f',"continue":"{end}"' if end < whole else ""
        head = f'{{"metadata":{{"resourceVersion":"1000"{more}}},"items":['
        return head.encode() + b",".join(items) + b"]}"


# -- the control plane of the simulation --------------------------------------------------------------


class Timed(Controller):
    """Notes how long after it was sent each event was decided. Nobody is mended."""

    def __init__(self, *words: Any, **more: Any) -> None:
        super().__init__(*words, **more)
        self.ms: list[float] = []
        self.found = 0

    def decide(self, pod: Pod) -> Finding | None:
        """Decides, and takes the time if the pod comes from an event."""
        finding = super().decide(pod)
        sent = pod.annotations.get(SENT)
        if sent is not None:
            self.ms.append((time.monotonic_ns() - int(sent)) / 1e6)
            self.found += finding is not None
        return finding


def memory_mib(field: str, pid: int | str = "self") -> float:
    """A field of /proc/PID/status (proc(5)) in MiB: VmRSS, VmHWM."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) / 1024
    raise RuntimeError(f"no {field} in /proc/{pid}/status")


async def control(kubeconfig: Path) -> None:
    """The second process: prints a line of JSON when all is in memory, and one for each line of stdin.

    Such a line is the number of events until which to wait.
    """
    async with Kube.from_kubeconfig(kubeconfig) as kube:
        recorder = Recorder(kube, CONTROL_PLANE)
        controller = Timed(kube, "architect", recorder, patience_s=3600.0)
        begun, cpu = time.monotonic(), time.process_time()
        task = asyncio.create_task(controller.run())
        loop = asyncio.get_running_loop()
        while not controller.synced or controller.looks < len(controller.pods.objects):
            if task.done():
                await task
            await asyncio.sleep(0.05)
        while True:
            report = {
                "seconds": time.monotonic() - begun,
                "cpu_s": time.process_time() - cpu,
                "rss_mib": memory_mib("VmRSS"),
                "peak_mib": memory_mib("VmHWM"),
                "pods": len(controller.pods.objects),
                "nodes": len(controller.nodes.objects),
                "found": controller.found,
                "ms": controller.ms,
            }
            print(json.dumps(report), flush=True)
            word = (await loop.run_in_executor(None, sys.stdin.readline)).strip()
            if not word:
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
                return
            controller.ms = []
            controller.found = 0
            begun, cpu = time.monotonic(), time.process_time()
            # Events of one pod that follow each other while it waits are one decision: so look for quiet.
            quiet = 0
            while len(controller.ms) < int(word) and quiet < _QUIET:
                before = len(controller.ms)
                await asyncio.sleep(_LOOK_S)
                quiet = quiet + 1 if before and before == len(controller.ms) else 0


def _child(*words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "bench.controlplane", *words],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )


def _line(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    line = child.stdout.readline()
    if not line:
        raise RuntimeError(f"{child.args!r} ended with {child.wait()}")
    return line


def _tell(child: subprocess.Popen[str], word: str) -> None:
    assert child.stdin is not None
    child.stdin.write(f"{word}\n")
    child.stdin.flush()


def _end(child: subprocess.Popen[str]) -> None:
    for pipe in (child.stdin, child.stdout):
        if pipe is not None:
            pipe.close()
    child.terminate()
    child.wait()


def simulate(scale: Scale) -> list[dict[str, Any]]:
    """Start, a steady stream of events, and a burst of them."""
    workload = f"{scale.nodes} nodes, {scale.pods} pods (simulated)"
    size = f"{scale.nodes},{scale.pods_a_node},{scale.rate},{scale.seconds},{scale.burst}"
    results: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        server = _child("serve", size)
        stack.callback(_end, server)
        path = Path(directory) / "kubeconfig"
        path.write_text(kubeconfig(f"http://127.0.0.1:{_line(server).strip()}"))
        plane = _child("control", str(path))
        stack.callback(_end, plane)
        start = json.loads(_line(plane))
        assert (start["pods"], start["nodes"]) == (scale.pods, scale.nodes), start
        results += [
            _figure("from nothing to all decided", workload, start["seconds"], "s"),
            _figure("memory", workload, start["rss_mib"], "MiB"),
            _figure("memory, highest", workload, start["peak_mib"], "MiB"),
        ]
        for word, count, name in (
            ("steady", scale.rate * scale.seconds, f"{scale.rate} events a second"),
            ("burst", scale.burst, f"{scale.burst} events at once"),
        ):
            _tell(plane, str(count))
            _tell(server, word)
            _line(server)
            report = json.loads(_line(plane))
            assert report["found"], report
            samples = harness.Samples(f"event to decision, {name}", "architect", workload)
            samples.ms = report["ms"]
            results.append(samples.record())
            if word == "steady":
                share = report["cpu_s"] / report["seconds"] * 100
                results.append(_figure(f"CPU, {name}", workload, share, "% of a core"))
        results.append(_figure("memory, highest in the end", workload, report["peak_mib"], "MiB"))
    return results


def _figure(name: str, workload: str, value: float, unit: str) -> dict[str, Any]:
    return harness.figure(f"control plane, {name}", "architect", workload, value, unit, 1)


def kubeconfig(server: str) -> str:
    """A kubeconfig for a server that asks for nothing."""
    return json.dumps(
        {
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": server}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "users": [{"name": "it", "user": {"token": "none"}}],
        }
    )


# -- the program against a real API server ------------------------------------------------------------


class Namespace(Object, frozen=True, kw_only=True):
    """A namespace."""

    plural: ClassVar[str] = "namespaces"
    namespaced: ClassVar[bool] = False


def _real_pod(number: int) -> dict[str, Any]:
    """A pod that shows a state and is never scheduled."""
    container = {
        "name": "app",
        "image": "none",
        "resources": {"requests": {"cpu": "100m", "memory": "64Mi"}},
    }
    labels = {status_label("app"): RUNNING}
    notes = {MANAGED_CONTAINERS: '["app"]'}
    return {
        "metadata": {"name": f"pod-{number}", "labels": labels, "annotations": notes},
        "spec": {"schedulerName": "nobody", "containers": [container]},
    }


def _cpu_s(pid: int) -> float:
    """CPU time of a process so far: fields 14 and 15 of /proc/PID/stat (proc(5))."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def _real(path: Path, quick: bool) -> list[dict[str, Any]]:
    workload = f"{REAL_PODS} pods, a real API server"
    namespace = f"bench-{uuid.uuid4().hex[:8]}"
    idle_s, changes = (5, 100) if quick else (30, 600)
    async with Kube.from_kubeconfig(path) as kube:
        await kube.create(Namespace, {"metadata": {"name": namespace}})
        try:
            for number in range(REAL_PODS):
                await _create(kube, _real_pod(number), namespace)
            return await _measure(kube, path, namespace, workload, idle_s, changes)
        finally:
            for number in range(REAL_PODS):
                with contextlib.suppress(KubeError):
                    await kube.delete(Pod, f"pod-{number}", namespace, grace=0)
            await kube.delete(Namespace, namespace)


async def _create(kube: Kube, body: dict[str, Any], namespace: str) -> None:
    end = time.monotonic() + 30
    while True:
        try:
            await kube.create(Pod, body, namespace)
            return
        except KubeError as error:
            # Pods are refused until the namespace has its service account.
            if error.status != 403 or time.monotonic() > end:
                raise
            await asyncio.sleep(0.1)


async def _measure(
    kube: Kube, path: Path, namespace: str, workload: str, idle_s: float, changes: int
) -> list[dict[str, Any]]:
    # It mends nothing: on a cluster that is up, that is somebody else's work.
    words = ["run", "--namespace", namespace, "--patience", "86400", "--port", "0"]
    program = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "architect.processes.controlplane.main", *words),
        *("--host", "127.0.0.1", "--service-account", str(path.parent / "none")),
        env={**os.environ, "KUBECONFIG": str(path), "PYTHONPATH": os.pathsep.join(sys.path)},
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        assert program.stderr is not None
        async with asyncio.timeout(60):
            while line := await program.stderr.readline():
                if b"synced" in line:
                    break
        before = _cpu_s(program.pid)
        await asyncio.sleep(idle_s)
        idle = (_cpu_s(program.pid) - before) / idle_s * 100
        before, begun = _cpu_s(program.pid), time.monotonic()
        for number in range(changes):
            body = {
                "metadata": {"labels": {status_label("app"): (SCALED_DOWN, RUNNING)[number % 2]}}
            }
            await kube.patch(Pod, f"pod-{number % REAL_PODS}", body, namespace)
            await asyncio.sleep(max(0.0, begun + number / 20 - time.monotonic()))
        busy = (_cpu_s(program.pid) - before) / (time.monotonic() - begun) * 100
        return [
            _figure("memory", workload, memory_mib("VmRSS", program.pid), "MiB"),
            _figure("CPU, nothing happens", workload, idle, "% of a core"),
            _figure("CPU, 20 changes a second", workload, busy, "% of a core"),
        ]
    finally:
        program.send_signal(signal.SIGTERM)
        await program.communicate()


def real(path: Path, quick: bool) -> list[dict[str, Any]]:
    """Memory and CPU of the program itself."""
    return asyncio.run(_real(path, quick))


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """The benchmarks of this module; those on a real API server only where KUBECONFIG names one."""
    runs: list[Callable[[], list[dict[str, Any]]]] = [lambda: simulate(QUICK if quick else Scale())]
    given = os.environ.get("KUBECONFIG")
    if given:
        runs.append(lambda: real(Path(given), quick))
    else:
        print("controlplane: no KUBECONFIG, so no real API server (make cluster)", file=sys.stderr)
    return runs


def main() -> None:
    """The processes of the simulation: ``serve SCALE`` and ``control KUBECONFIG``."""
    word, value = sys.argv[1:3]
    if word == "serve":
        asyncio.run(ApiServer(Scale(*(int(one) for one in value.split(",")))).serve())
    else:
        asyncio.run(control(Path(value)))


if __name__ == "__main__":
    main()
