"""The cluster: a wake through a Service, what the API shows of it and when, sixty pods at once, the costs.

Beside the wake, in the same run: the same pod without architect, awake; and a cold start of it (a Deployment
scaled from 0 to 1), which is what scale-to-zero does at the least.

Runs on the cluster in .cluster if one is up with the chart (`make cluster UP=--metrics`, `make
cluster-install`); else on one of its own, which it takes away again.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from architect.adapters.kube.client import Kube
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Event, Pod
from architect.contract.kubernetes import SCALED_DOWN, status_label
from bench import harness
from bench.valkey import Valkey, fill
from common import BUILD, REPOSITORY
from tests.cluster import build, images, install
from tests.cluster.cluster import Cluster
from tests.cluster.settings import Options
from tests.e2e.site import ARCHITECT, IMAGE, PORT, Site, container, managing, pod, service, template

NODE: Final = "k8n1"
HERE: Final[dict[str, Any]] = {"nodeSelector": {"kubernetes.io/hostname": NODE}}
RESOURCES: Final = {"requests": {"cpu": "10m", "memory": "64Mi"}}
TOGETHER: Final = 60
IDLE: Final = 20
"""Managed pods on a node while its daemon's cost is measured."""
SETTLED_S: Final = 1.2
"""Seconds until what follows a hibernation is done (digests, reclaim), as in :mod:`bench.wakes`."""
_SEEN_S: Final = 30.0


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A namespace on a cluster with the chart."""
    running = Cluster(REPOSITORY / ".cluster")
    own = Cluster(BUILD / "bench-cluster")
    with contextlib.ExitStack() as stack:
        if running.env.exists():
            cluster = running
        else:
            cluster = own
            archive = BUILD / "valkey.tar"
            images.saved(IMAGE, archive)
            stack.callback(own.down)
            own.up(Options(nodes=3, images=(str(archive),)), build.programs())
            install.install(own)
        yield stack.enter_context(Site(cluster, "default").within(f"bench-{time.time_ns():x}"))


def _sleep(where: Site, name: str) -> None:
    """Has the pod hibernated now; again if a packet of the last wake came in between."""
    number = int(NODE.removeprefix("k8n"))
    node = where.cluster.node(number)
    for attempt in range(10):
        try:
            node.run(ARCHITECT, "sleep", f"{where.namespace}/{name}", timeout_s=60)
        except Exception:
            if attempt == 9:
                raise
            time.sleep(0.05)
        else:
            return


def _asleep(where: Site, name: str) -> None:
    """The same, and everything that follows a hibernation is done, as in :mod:`bench.wakes`."""
    _sleep(where, name)
    time.sleep(SETTLED_S)


def first_bytes(n: int) -> list[dict[str, Any]]:
    """A client's first byte through a ClusterIP: new and old connection, hibernated, awake, and cold."""
    new = harness.Samples("first byte, ClusterIP, new connection", "architect", "valkey 50 MB")
    old = harness.Samples("first byte, ClusterIP, open connection", "architect", "valkey 50 MB")
    awake = harness.Samples("first byte, ClusterIP, new connection", "awake", "valkey 50 MB")
    cold = harness.Samples("first byte, ClusterIP, scale 0 to 1", "cold start", "valkey, empty")
    with site() as where:
        where.start(
            pod("app", notes=managing(seconds=3600), **HERE), service("app", "app"), app="app"
        )
        address = where.get("service", "app")["spec"]["clusterIP"]
        client = Valkey(address, PORT)
        fill(client, 50)
        for _ in range(n):
            _asleep(where, "app")
            with old.timed():
                client("PING")
        for _ in range(n):
            _asleep(where, "app")
            with new.timed():
                fresh = Valkey(address, PORT)
                fresh("PING")
            fresh.close()
            with awake.timed():
                fresh = Valkey(address, PORT)
                fresh("PING")
            fresh.close()
        client.close()
        _cold(where, cold, max(3, n // 10))
    return [one.record() for one in (new, old, awake, cold)]


def busy(n: int) -> list[dict[str, Any]]:
    """The first byte on a node whose CPUs others use up: a pod with a small request, and one with none."""
    asked = {"small request": {"requests": {"cpu": "10m", "memory": "64Mi"}}, "no request": {}}
    results = []
    with site() as where:
        clients = {}
        for number, (kind, resources) in enumerate(asked.items()):
            name = f"app{number}"
            where.start(
                pod(name, [container(resources=resources)], managing(seconds=3600), **HERE),
                app=name,
            )
            clients[kind] = (name, where.connect(name))
            fill(clients[kind][1], 50)
        loops = "for i in 1 2 3 4 5 6 7 8; do (while :; do :; done) & done; wait"
        neighbour = container(
            "busy", args=["sh", "-c", loops], ports=[], resources={"requests": {"cpu": "300m"}}
        )
        made = pod("busy", [neighbour], notes={}, **HERE)
        del made["spec"]["runtimeClassName"]
        where.start(made, app="busy")
        for kind, (name, client) in clients.items():
            samples = harness.Samples(
                "first byte, CPUs used up", "architect", f"valkey 50 MB, {kind}"
            )
            for _ in range(n):
                _asleep(where, name)
                with samples.timed():
                    client("PING")
            results.append(samples.record())
    return results


def _cold(where: Site, cold: harness.Samples, n: int) -> None:
    """The same pod as a plain one that is scaled from nothing, until it answers."""
    made = template("cold", notes={}, **HERE)
    del made["spec"]["runtimeClassName"]
    spec = {"replicas": 0, "selector": {"matchLabels": {"app": "cold"}}, "template": made}
    where.apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "cold"}, "spec": spec},
        service("cold", "cold"),
    )
    address = where.get("service", "cold")["spec"]["clusterIP"]
    for _ in range(n):
        with cold.timed():
            where.kubectl("scale", "deployment/cold", "--replicas=1")
            _until_answered(address)
        where.kubectl("scale", "deployment/cold", "--replicas=0")
        where.kubectl("wait", "--for=delete", "pod", "--selector=app=cold", "--timeout=60s")


def _until_answered(address: str) -> None:
    end = time.monotonic() + 60
    while True:
        try:
            client = Valkey(address, PORT, timeout_s=1)
            client("PING")
        except (OSError, ValueError):
            if time.monotonic() > end:
                raise
            time.sleep(0.01)
        else:
            client.close()
            return


class Watched:
    """When the API first showed what: watches of the pods and events of a namespace, in a thread."""

    def __init__(self, where: Site) -> None:
        self._where = where
        self._seen: dict[str, float] = {}
        self._wanted: dict[str, Callable[[Pod], bool]] = {}
        self._some = threading.Condition()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        self._ready.wait(30)
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    def want(self, **wanted: Callable[[Pod], bool]) -> None:
        """From now on, note when a pod first fulfils each of these, and when an event comes."""
        with self._some:
            self._seen, self._wanted = {}, wanted

    def when(self, name: str) -> float:
        """When (time.perf_counter) it was first so; waits for it."""
        with self._some:
            if not self._some.wait_for(lambda: name in self._seen, _SEEN_S):
                raise TimeoutError(f"{name} was not seen within {_SEEN_S:.0f} s")
            return self._seen[name]

    async def _run(self) -> None:
        async with Kube.from_kubeconfig(self._where.cluster.control_plane.admin) as kube:
            pods = Informer(kube, Pod, namespace=self._where.namespace)
            events = Informer(kube, Event, namespace=self._where.namespace)
            pods.add_handler(self._pod)
            events.add_handler(self._event)
            tasks = [asyncio.create_task(one.run()) for one in (pods, events)]
            await pods.synced.wait()
            await events.synced.wait()
            self._ready.set()
            await asyncio.to_thread(self._stop.wait)
            for task in tasks:
                task.cancel()

    def _pod(self, change: Change[Pod]) -> None:
        now = time.perf_counter()
        with self._some:
            for name, wanted in self._wanted.items():
                if change.new is not None and name not in self._seen and wanted(change.new):
                    self._seen[name] = now
            self._some.notify_all()

    def _event(self, change: Change[Event]) -> None:
        now = time.perf_counter()
        with self._some:
            self._seen.setdefault(change.object.reason, now)
            self._some.notify_all()


def _requests(pod_: Pod) -> dict[str, str]:
    return {k: str(v) for k, v in (pod_.spec.containers[0].resources.requests or {}).items()}


def shown(n: int) -> list[dict[str, Any]]:
    """From the packet to label, resize and event, as a watcher of the API server sees them."""
    names = {
        "label": "packet to label",
        "resize": "packet to resize",
        "ScaledUp": "packet to event",
    }
    samples = {key: harness.Samples(name, "architect", "valkey") for key, name in names.items()}
    label = status_label("valkey")
    with site() as where, Watched(where) as watched:
        where.start(pod("app", [container(resources=RESOURCES)], managing(seconds=3600), **HERE))
        client = where.connect("app")
        before = _writes(where)
        for _ in range(n):
            watched.want(down=lambda one: _requests(one) == {"cpu": "0", "memory": "1"})
            _sleep(where, "app")
            watched.when("down")
            watched.when("ScaledDown")
            # The label comes first, the kubelet's own work after: let it end.
            where.settled("app", "0", "1")
            watched.want(
                label=lambda one: one.labels.get(label) == "RUNNING",
                resize=lambda one: _requests(one) == RESOURCES["requests"],
            )
            began = time.perf_counter()
            client("PING")
            for key, each in samples.items():
                each.ms.append((watched.when(key) - began) * 1000)
            where.settled("app", "10m", "64Mi")
        writes = {kind: count - before[kind] for kind, count in _writes(where).items()}
        client.close()
    return [
        *(one.record() for one in samples.values()),
        harness.figure(
            "API writes a cycle", "architect", "one pod", sum(writes.values()) / n, "writes", n
        ),
    ]


def _writes(where: Site) -> dict[str, int]:
    """What architectd has written: patches of pods and of their resize (nobody else does), its events."""
    found = {"patch": 0, "resize": 0, "event": 0}
    for line in where.cluster.kubectl("get", "--raw", "/metrics").splitlines():
        if line.startswith("apiserver_request_total{") and 'resource="pods"' in line:
            count = int(float(line.rpartition(" ")[2]))
            if 'verb="PATCH"' in line and 'code="200"' in line:
                if 'subresource="resize"' in line:
                    found["resize"] += count
                elif 'subresource=""' in line:
                    found["patch"] += count
    for one in where.get("events")["items"]:
        if one.get("source", {}).get("component") == "architectd":
            found["event"] += one.get("count") or 1
    return found


def together(_n: int) -> list[dict[str, Any]]:
    """Sixty pods of one node: hibernated together, then woken together."""
    wake = harness.Samples(f"first byte, {TOGETHER} pods at once", "architect", "valkey, empty")
    results = []
    with site() as where:
        names = [f"app{number}" for number in range(TOGETHER)]
        small = [container(resources={"requests": {"cpu": "1m", "memory": "8Mi"}})]
        where.apply(*(pod(name, small, managing(seconds=3600), **HERE) for name in names))
        ready = functools.partial(_all, where, lambda one: _is_running(one))
        _wait("all pods to run", ready)
        clients = {name: where.connect(name) for name in names}
        for name, client in clients.items():
            client("SET", "name", name)
        began = time.perf_counter()
        patch = {"architect.loopholelabs.io/scaledown-durations": json.dumps({"valkey": "1s"})}
        words = [f"{key}={value}" for key, value in patch.items()]
        where.kubectl("annotate", "--overwrite", "pods", "--all", *words)
        label = status_label("valkey")
        _wait(
            "all to hibernate",
            lambda: _all(where, lambda one: one["metadata"]["labels"].get(label) == SCALED_DOWN),
        )
        took = time.perf_counter() - began
        results.append(
            harness.figure(
                f"{TOGETHER} pods hibernated, from the edit of their annotation to the last label",
                "architect", "valkey, empty", took, "s", 1,
            )
        )  # fmt: skip
        with ThreadPoolExecutor(TOGETHER) as pool:
            start = time.perf_counter()

            def ask(name: str) -> float:
                assert clients[name]("GET", "name") == name.encode()
                return (time.perf_counter() - start) * 1000

            wake.ms += pool.map(ask, names)
    return [*results, wake.record()]


def _all(where: Site, wanted: Callable[[dict[str, Any]], bool]) -> bool:
    return all(map(wanted, where.get("pods")["items"]))


def _is_running(one: dict[str, Any]) -> bool:
    conditions = one["status"].get("conditions", [])
    return any(each["type"] == "Ready" and each["status"] == "True" for each in conditions)


def _wait(what: str, condition: Callable[[], bool], seconds: float = 300) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


def components(seconds: float) -> list[dict[str, Any]]:
    """Memory and CPU of the components, with idle managed pods on a node."""
    results = []
    with site() as where:
        names = [f"app{number}" for number in range(IDLE)]
        small = [container(resources={"requests": {"cpu": "1m", "memory": "8Mi"}})]
        where.apply(*(pod(name, small, managing(seconds=1), **HERE) for name in names))
        label = status_label("valkey")
        _wait(
            "all to hibernate",
            lambda: _all(where, lambda one: one["metadata"]["labels"].get(label) == SCALED_DOWN),
        )
        time.sleep(5)
        programs = {"architectd": 1, "architect-manager": 3, "architect-control-plane": 3}
        pids = {name: _pid(where, name, node) for name, node in programs.items()}
        before = {name: _cpu(pid) for name, pid in pids.items()}
        time.sleep(seconds)
        for name, pid in pids.items():
            status = Path(f"/proc/{pid}/status").read_text().splitlines()
            rss = next(int(line.split()[1]) for line in status if line.startswith("VmRSS:"))
            share = (_cpu(pid) - before[name]) / seconds * 100
            work = f"{IDLE} hibernated pods"
            results.append(harness.figure("memory (RSS)", name, work, rss / 1000, "MB", 1))
            results.append(harness.figure("CPU of one core", name, work, share, "%", 1))
    return results


def _pid(where: Site, program: str, node: int) -> int:
    """The host's number of a component's process on a node."""
    for pid in where.cluster.node(node).processes(program[:15]) or _by_words(where, program, node):
        return pid
    raise RuntimeError(f"{program} does not run on node {node}")


def _by_words(where: Site, program: str, node: int) -> list[int]:
    found = []
    names = where.cluster.node(node).processes("python3") | where.cluster.node(node).processes(
        "python"
    )
    for pid in names:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")
        if any(word.endswith(f"/{program}") for word in words[:4]):
            found.append(pid)
    return found


def _cpu(pid: int) -> float:
    """Seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / 100


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """What `python -m bench cluster` runs."""
    n = 5 if quick else 100
    return [
        lambda: first_bytes(n),
        lambda: components(5 if quick else 60),
        lambda: shown(n),
        lambda: busy(min(n, 30)),
        lambda: together(n),
    ]
