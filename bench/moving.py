"""Moves between nodes: what clients notice, what a move costs, a drain; beside the peers, in the same run.

A valkey moves to and fro between the two nodes that run managed pods, by deletion of its pod while its node
is cordoned. Clients (movingclients.py) are with it all the time: on the host, and in a pod on the third node.
A window of a move is from the command that deletes the pod until the old pod is gone, the state restored and
a second is over; the figure of a move is a client's longest request that overlaps its window.

Runs on the cluster of ARCHITECT_CLUSTER, or the one in .cluster if it is up with the chart; else on one of
its own, which it takes away again. ARCHITECT_MOVES says how many moves (50), ARCHITECT_MOVE_MB how many
megabytes the valkey has (50). Called by `python -m bench moving`.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import os
import re
import statistics
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE, Popen
from typing import Any, Final, NamedTuple, TypeVar

from architect.adapters.kube.client import Kube
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Checkpoint, Pod
from architect.contract.kubernetes import GROUP, NODE_LABEL
from bench import harness, valkey, wakes
from bench.harness import Samples, figure
from bench.movingclients import last_report, longest
from common import BUILD, REPOSITORY
from tests.cluster import build, images, install
from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.cluster.settings import Options
from tests.e2e import movers
from tests.e2e.site import (
    CRITICAL,
    IMAGE,
    NODES,
    PORT,
    TOOLS,
    Site,
    archive,
    container,
    managing,
    service,
    soon,
)

MOVES: Final = int(os.environ.get("ARCHITECT_MOVES", "50"))
MEGABYTES: Final = int(os.environ.get("ARCHITECT_MOVE_MB", "50"))
TEN: Final = 10
MOST_FAILED: Final = 3
"""Moves that may fail before the rest is not tried."""
LIMIT_S: Final = 1800.0
"""No further move is begun after so long."""
CLIENT_S: Final = LIMIT_S + 300
MOVE_S: Final = 90.0
OVER_S: Final = 60.0
"""Until the Checkpoints of connections that are over are gone."""
SETTLED_S: Final = 1.0
REST: Final = 5
"""Windows of a second in which nothing moves: what the machine itself does to the clients."""
DRAIN_S: Final = 180.0
NODE_PORT: Final = 16700
"""Of Podman's container, on the host's loopback."""
CLIENT: Final = f"client-{CRITICAL}"
"""The pod on the third node from which clients run."""
PROGRAM: Final = Path(__file__).with_name("movingclients.py").read_text()
KINDS: Final = ("refused", "reset", "timed out", "unreachable", "wrong reply")
_WRITES: Final = ("POST", "PUT", "PATCH", "APPLY", "DELETE")
_COUNTER: Final = re.compile(r"apiserver_request_total\{(?P<labels>.*)\} (?P<count>\S+)$")
_LABEL: Final = re.compile(r'(\w+)="([^"]*)"')
_TRY: Final = "import socket, sys; socket.create_connection(sys.argv[1:3], 1).close()"
_SMALL: Final = {"requests": {"cpu": "1m", "memory": "8Mi"}}

T = TypeVar("T")
Window = tuple[float, float]
Results = list[dict[str, Any]]


def api_writes(metrics: str, events: Iterable[dict[str, Any]]) -> dict[str, int]:
    """Writes so far that only architect makes: of Checkpoints, of pods and their requests, of its events.

    Each request counts that reached the API server, also one that lost a compare-and-swap. Pods are
    patched by nobody else; the kubelet patches their status, which is not counted.
    """
    found = {"Checkpoint": 0, "Pod": 0, "Event": 0}
    for line in metrics.splitlines():
        match = _COUNTER.match(line)
        if match is None:
            continue
        labels = dict(_LABEL.findall(match["labels"]))
        if labels.get("verb") not in _WRITES:
            continue
        count = int(float(match["count"]))
        if labels.get("resource") == "checkpoints" and labels.get("group") == GROUP:
            found["Checkpoint"] += count
        elif labels.get("resource") == "pods" and labels["verb"] == "PATCH":
            found["Pod"] += count if labels.get("subresource", "") in ("", "resize") else 0
    for one in events:
        if one.get("source", {}).get("component", "").startswith("architect"):
            found["Event"] += one.get("count") or 1
    return found


def samples(name: str, subject: str, workload: str, ms: Iterable[float | None]) -> Results:
    """A line of the results, or, if there is not one value, none."""
    made = Samples(name, subject, workload, [one for one in ms if one is not None])
    return [made.record()] if made.ms else []


STEPS: Final = (
    "deleted", "Available", "gone", "made", "bound", "Claimed", "Committed", "Restored", "ready",
)  # fmt: skip
"""Of a move of a StatefulSet's pod, in their order: the new one is made only when the old one is gone."""


def parts(times: dict[str, float], order: Sequence[str]) -> dict[str, float]:
    """Milliseconds between each two steps that follow each other; of what was not seen, nothing."""
    found = {}
    for before, after in itertools.pairwise(order):
        if before in times and after in times:
            found[f"{before} to {after}"] = (times[after] - times[before]) * 1000
    return found


@dataclass(frozen=True)
class Moved:
    """What is known of one move."""

    window: Window
    times: dict[str, float]
    down_ms: int | None
    sent: int | None

    def between(self, first: str, last: str) -> float | None:
        """Milliseconds from one step to another."""
        if first not in self.times or last not in self.times:
            return None
        return (self.times[last] - self.times[first]) * 1000


def of_checkpoints(moves: Sequence[Moved], workload: str) -> Results:
    """What the Checkpoints and the API's watchers say of the moves."""
    sent = [one.sent for one in moves if one.sent is not None]
    found = samples(
        "stood still (Checkpoint's downtimeMs)", "architect", workload,
        (one.down_ms for one in moves),
    )  # fmt: skip
    found += samples(
        "deletion to ready on the other node", "architect", workload,
        (one.between("deleted", "ready") for one in moves),
    )  # fmt: skip
    if sent:
        mb = statistics.median(sent) / 1e6
        found.append(figure("transferred a move", "architect", workload, mb, "MB", len(sent)))
    return found


# ---- the cluster ----------------------------------------------------------------------------------


@contextlib.contextmanager
def site() -> Iterator[Site]:
    """A namespace on a cluster with the chart; see the module."""
    given = os.environ.get("ARCHITECT_CLUSTER")
    cluster = Cluster(Path(given)) if given else Cluster(REPOSITORY / ".cluster")
    with contextlib.ExitStack() as stack:
        if not given and not cluster.env.exists():
            cluster = Cluster(BUILD / "bench-cluster")
            archives = [images.saved(one, archive(BUILD, one)) for one in (IMAGE, TOOLS)]
            stack.callback(cluster.down)
            cluster.up(Options(nodes=3, images=tuple(map(str, archives))), build.programs())
            install.install(cluster)
        with Site(cluster, "default").within(f"bench-{time.time_ns():x}") as where:
            where.await_components()
            yield where


class Watch:
    """What the API shows of a namespace's pods and Checkpoints, and when it first did; in a thread.

    So nothing has to ask again and again while the time of something is taken.
    """

    def __init__(self, where: Site) -> None:
        self._where = where
        self._some = threading.Condition()
        self._ready = threading.Event()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._run()), daemon=True)
        self.pods: dict[str, Pod] = {}
        """Those that are there, by their uid."""
        self.checkpoints: dict[str, Checkpoint] = {}
        """By the uid of the pod whose state it is; as last seen, also when it is gone."""
        self.present: set[str] = set()
        """Keys of the Checkpoints that are there."""
        self.times: dict[str, dict[str, float]] = {}
        """When (CLOCK_MONOTONIC) what was first so of which pod, or of its Checkpoint."""

    def __enter__(self) -> Watch:
        self._thread.start()
        if not self._ready.wait(30):
            raise ClusterError("watching pods", "the API has not answered", "is the cluster up?")
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(10)

    async def _run(self) -> None:
        async with Kube.from_kubeconfig(self._where.cluster.control_plane.admin) as kube:
            pods = Informer(kube, Pod, namespace=self._where.namespace)
            checkpoints = Informer(kube, Checkpoint, namespace=self._where.namespace)
            pods.add_handler(self.pod)
            checkpoints.add_handler(self.checkpoint)
            tasks = [asyncio.create_task(one.run()) for one in (pods, checkpoints)]
            await pods.synced.wait()
            await checkpoints.synced.wait()
            self._ready.set()
            await asyncio.to_thread(self._stop.wait)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def _note(self, uid: str, what: str) -> None:
        self.times.setdefault(uid, {}).setdefault(what, time.monotonic())

    def pod(self, change: Change[Pod]) -> None:
        """A pod has changed."""
        old, new = change.old, change.new
        with self._some:
            if old is not None and (new is None or new.metadata.uid != old.metadata.uid):
                self._note(old.metadata.uid, "gone")
                self.pods.pop(old.metadata.uid, None)
            if new is not None:
                uid = new.metadata.uid
                self.pods[uid] = new
                self._note(uid, "made")
                if new.spec.nodeName:
                    self._note(uid, "bound")
                if new.metadata.deletionTimestamp is not None:
                    self._note(uid, "deleted")
                if new.ready:
                    self._note(uid, "ready")
            self._some.notify_all()

    def checkpoint(self, change: Change[Checkpoint]) -> None:
        """A Checkpoint has changed."""
        one = change.object
        with self._some:
            self.checkpoints[one.spec.podUID] = one
            if change.new is None:
                self.present.discard(one.key)
            else:
                self.present.add(one.key)
                if one.status.phase:
                    self._note(one.spec.podUID, one.status.phase)
            self._some.notify_all()

    def wait(self, what: str, found: Callable[[], T | None], seconds: float = MOVE_S) -> T:
        """Waits until something is there; returns it. Raises ClusterError."""
        with self._some:
            value = self._some.wait_for(found, seconds)
        if not value:
            why = f"not so after {seconds:g} s"
            raise ClusterError(f"waiting for {what}", why, "see the nodes' logs of architectd")
        return value

    def live(self, app: str) -> list[Pod]:
        """Pods of an app that are ready and not about to go."""
        ready = [one for one in list(self.pods.values()) if one.ready]
        mine = [one for one in ready if one.labels.get("app") == app]
        return [one for one in mine if one.metadata.deletionTimestamp is None]

    def only(self, app: str) -> Pod:
        """Waits until an app has one pod, ready, and none that goes; returns it."""

        def found() -> Pod | None:
            here = [one for one in self.pods.values() if one.labels.get("app") == app]
            return here[0] if len(here) == 1 and self.live(app) else None

        return self.wait(f"one pod of {app}", found)


def _cluster_ip(where: Site, app: str) -> str:
    """Address of a Service that answers on the third node."""
    address: str = where.get("service", app)["spec"]["clusterIP"]
    words = ("exec", CLIENT, "--", "python3", "-c", _TRY, address, str(PORT))

    def answers() -> bool:
        where.kubectl(*words)
        return True

    soon(f"the Service {app} to answer on {CRITICAL}", answers)
    return address


class Asked(NamedTuple):
    """A client that is to run."""

    name: str
    """In the results."""
    place: str
    mode: str
    pause_ms: float
    address: str


class Clients(contextlib.ExitStack):
    """Clients under way; use it as a context."""

    def __init__(self, where: Site) -> None:
        super().__init__()
        self._where = where
        self._running: dict[str, Popen[str]] = {}

    def start(self, asked: Asked) -> None:
        """Starts one; returns once it has its first reply."""
        key = f"bench-{len(self._running)}"
        numbers = (f"{CLIENT_S:g}", f"{asked.pause_ms:g}", asked.address, str(PORT))
        words = ["-c", PROGRAM, asked.mode, key, *numbers]
        if asked.place == movers.HOST:
            command = [sys.executable, *words]
            process = self.enter_context(Popen(command, stdin=PIPE, stdout=PIPE, text=True))
            self.callback(process.kill)
        else:
            command = ["exec", "--stdin", CLIENT, "--", "python3", *words]
            process = self.enter_context(self._where.running(*command))
        self._running[asked.name] = process
        assert process.stdout is not None
        said = []
        for line in process.stdout:
            if line.strip() == "connected":
                return
            said.append(line)
        raise ClusterError(f"client {asked.name}", "".join(said)[-500:], "does the pod serve?")

    def finish(self) -> dict[str, dict[str, Any]]:
        """Ends all of them; returns what each says, by its name."""
        for process in self._running.values():
            assert process.stdin is not None
            # One that has failed has ended by itself.
            with contextlib.suppress(OSError):
                process.stdin.write("end\n")
                process.stdin.flush()
        return {
            name: last_report(process.communicate(timeout=90)[0])
            for name, process in self._running.items()
        }


def _writes(where: Site) -> dict[str, int]:
    metrics = where.cluster.kubectl("get", "--raw", "/metrics")
    return api_writes(metrics, where.get("events")["items"])


def _delete(where: Site, watch: Watch, app: str, *, moves: bool = True) -> Moved:
    """Deletes an app's pod with its node cordoned; returns when another serves and all is over.

    Raises:
        ClusterError: it did not come back in time, or without its state.
    """
    old = watch.only(app)
    uid, node = old.metadata.uid, old.spec.nodeName

    def other() -> Pod | None:
        return next((one for one in watch.live(app) if one.metadata.uid != uid), None)

    with movers.cordoned(where, node):
        began = time.monotonic()
        where.kubectl("delete", "pod", old.metadata.name, "--wait=false")
        new = watch.wait(f"a replacement of {old.key}", other)
        watch.wait(f"{old.key} to be gone", lambda: uid not in watch.pods)
        if moves:
            steps = watch.times[uid]
            watch.wait(f"{old.key} to be restored", lambda: "Restored" in steps)
        time.sleep(SETTLED_S)
    ended = time.monotonic()
    if new.spec.nodeName == node:
        raise ClusterError(f"move of {old.key}", f"it is on {node} again", "see its events")
    fresh = watch.times[new.metadata.uid]
    times = {**watch.times[uid], **{name: fresh[name] for name in ("made", "bound", "ready")}}
    status = watch.checkpoints.get(uid, Checkpoint()).status
    return Moved((began, ended), times, status.downtimeMs, status.transferredBytes)


def _repeat(
    where: Site, watch: Watch, app: str, n: int, *, moves: bool = True
) -> tuple[list[Moved], int]:
    """Deletes an app's pod so often; what is known of each time, and how often it went wrong."""
    done: list[Moved] = []
    failed = 0
    deadline = time.monotonic() + LIMIT_S
    while len(done) + failed < n and failed < MOST_FAILED and time.monotonic() < deadline:
        try:
            done.append(_delete(where, watch, app, moves=moves))
        except ClusterError as error:
            failed += 1
            print(f"moving: {error}", file=sys.stderr, flush=True)
    return done, failed


def _fill(where: Site, pod: Pod, megabytes: int) -> int:
    client = where.connect(pod.metadata.name)
    keys = valkey.fill(client, megabytes)
    client.close()
    return keys


def moving(n: int, megabytes: int, *, new: bool = False) -> Results:
    """A Deployment's pod moves n times, with a counter and a stream, or with ``new`` connections.

    Not both at once: what clients do costs time of the same processors, and a hundred new connections
    a second are far more than a counter.
    """
    made = movers.deployment("mover", notes=managing(seconds=3600))
    asked = _new if new else _open
    results, _ = measured("mover", f"valkey {megabytes} MB", made, n, megabytes, asked)
    return results


def _open(service: str, pod: str) -> list[Asked]:
    """Those that keep their connection."""
    return [
        Asked("counter, ClusterIP", CRITICAL, "count", 1, service),
        Asked("stream of 64 KiB values, ClusterIP", CRITICAL, "stream", 5, service),
    ]


def _new(service: str, pod: str) -> list[Asked]:
    """Those that make new ones, and one that came by the pod's address."""
    return [
        Asked("new connections, ClusterIP", CRITICAL, "connect", 10, service),
        Asked("counter beside, pod address", movers.HOST, "count", 1, pod),
    ]


def stateful(n: int, megabytes: int) -> Results:
    """The same of a StatefulSet, with its parts. Without a volume: the cluster has none for two nodes."""
    made = movers.deployment("db", notes=managing(seconds=3600))
    made["kind"] = "StatefulSet"
    made["spec"]["serviceName"] = "db"
    work = f"StatefulSet without a volume, valkey {megabytes} MB"
    results, moves = measured(
        "db", work, made, n, megabytes, lambda *where: [*_open(*where), *_new(*where)]
    )
    each = [parts(one.times, STEPS) for one in moves]
    for name in parts(dict.fromkeys(STEPS, 0.0), STEPS):
        results += samples(name, "architect", work, (one.get(name) for one in each))
    return results


def measured(
    app: str,
    work: str,
    made: dict[str, Any],
    n: int,
    megabytes: int,
    asked: Callable[[str, str], Iterable[Asked]],
) -> tuple[Results, list[Moved]]:
    """Moves what is made n times, with clients everywhere; what they and the API say, and the moves."""
    with site() as where, Watch(where) as watch:
        movers.client_pods(where)
        where.start(made, service(app, app), app=app)
        pod = watch.only(app)
        keys = _fill(where, pod, megabytes)
        address = _cluster_ip(where, app)
        with Clients(where) as clients:
            for one in asked(address, pod.status.podIP or ""):
                clients.start(one)
            time.sleep(SETTLED_S)
            began = time.monotonic()
            time.sleep(REST)
            rest = [(began + second, began + second + 1) for second in range(REST)]
            before = _writes(where)
            moves, failed = _repeat(where, watch, app, n)
            # A window is whole once a request has ended after it.
            time.sleep(SETTLED_S)
            said = clients.finish()
        # Of the connections that are over, too.
        with contextlib.suppress(ClusterError):
            watch.wait("no Checkpoint", lambda: not watch.present, OVER_S)
        writes = {kind: count - before[kind] for kind, count in _writes(where).items()}
        client = where.connect(watch.only(app).metadata.name)
        bad = valkey.wrong(client, keys)
        counters = {one["key"]: client("GET", one["key"]) for one in said.values()}
        client.close()
    found = of_clients(said, counters, moves, rest, work)
    found += of_checkpoints(moves, work)
    for kind, count in writes.items() if moves else ():
        name = f"API writes a move, of {kind}s"
        found.append(figure(name, "architect", work, count / len(moves), "writes", len(moves)))
    found.append(figure("moves that failed", "architect", work, failed, "moves", n))
    found.append(figure("values that are wrong in the end", "architect", work, bad, "values", keys))
    each_move(said, moves)
    return found, moves


def of_clients(
    said: dict[str, dict[str, Any]],
    counters: dict[str, valkey.Reply],
    moves: Sequence[Moved],
    rest: Sequence[Window],
    work: str,
) -> Results:
    """What the clients say. ``counters`` is what the server has of each client's key in the end."""
    found: Results = []
    windows = [one.window for one in moves]
    for name, one in said.items():
        spans, kinds = one["spans"], one["kinds"]
        workload = f"{work}, {name}"
        found += samples(
            "longest request around a move",
            "architect",
            workload,
            (longest(spans, one) for one in windows),
        )
        found += samples(
            "longest request in a second without a move", "architect", workload,
            (longest(spans, one) for one in rest),
        )  # fmt: skip
        if one["connects"]:
            connects = [longest(one["connects"], each) for each in windows]
            found += samples("longest connect around a move", "architect", workload, connects)
            found += [
                figure(f"connects {kind}", "architect", workload, kinds.get(kind, 0), "connects",
                       one["count"] + sum(kinds.values()))
                for kind in KINDS
            ]  # fmt: skip
            continue
        wrong = sum(kinds.values())
        counter = counters.get(one["key"])
        if counter is not None and counter != str(one["count"]).encode():
            wrong += 1
        found.append(
            figure("lost, doubled or reset", "architect", workload, wrong, "replies", one["count"])
        )
        for trouble in one["troubles"]:
            print(f"moving: {name}: {trouble}", file=sys.stderr, flush=True)
    return found


def each_move(said: dict[str, dict[str, Any]], moves: Sequence[Moved]) -> None:
    """Prints a line of each move: what its clients waited for at the most, and what the Checkpoint says."""
    names = list(said)
    print("move  " + "  ".join(names) + "  downtimeMs  bytes", file=sys.stderr)
    for number, move in enumerate(moves, 1):
        waits = [longest(said[name]["spans"], move.window) for name in names]
        shown = "  ".join("none" if one is None else f"{one:.1f} ms" for one in waits)
        print(f"{number:4}  {shown}  {move.down_ms}  {move.sent}", file=sys.stderr)
    sys.stderr.flush()


# ---- a drain --------------------------------------------------------------------------------------


def drain(n: int) -> Results:
    """`kubectl drain` of a node with ten pods, until all ten answer on the other, with what they had."""
    name = f"bench-ten-{time.time_ns():x}"
    work = f"{TEN} pods, valkey, empty"
    serve = Samples("drain: from the command until all serve elsewhere", "architect", work)
    over = Samples("drain: until kubectl drain has ended", "architect", work)
    source, destination = NODES
    with site() as where, Watch(where) as watch:
        made = movers.deployment(
            name, TEN, notes=managing(seconds=3600), containers=[container(resources=_SMALL)]
        )
        with movers.cordoned(where, destination):
            where.apply(made)
            watch.wait("ten pods", lambda: len(watch.live(name)) == TEN, DRAIN_S)
        names = set()
        for one in watch.live(name):
            names.add(one.metadata.name)
            client = where.connect(one.metadata.name)
            client("SET", "name", one.metadata.name)
            client.close()
        for _ in range(n):
            began = time.monotonic()
            answers = set()
            # Only these: the node's other pods are not what is measured.
            words = ("drain", source, "--ignore-daemonsets", f"--pod-selector=app={name}")
            try:
                with where.running(*words, f"--timeout={DRAIN_S:.0f}s") as process:
                    arrived = functools.partial(_all_on, watch, name, destination)
                    for one in watch.wait("ten pods elsewhere", arrived, DRAIN_S):
                        client = valkey.Valkey(one.status.podIP or "", PORT)
                        answers.add(client("GET", "name"))
                        client.close()
                    serve.ms.append((time.monotonic() - began) * 1000)
                    said, _ = process.communicate(timeout=DRAIN_S)
                    over.ms.append((time.monotonic() - began) * 1000)
            finally:
                where.kubectl("uncordon", source)
            if process.returncode:
                raise ClusterError(f"drain of {source}", said.strip()[-500:], "see above")
            if answers != {one.encode() for one in names}:
                raise ClusterError(f"drain of {source}", f"state was lost: {answers}", "see logs")
            watch.wait("the old pods to be gone", lambda: len(watch.pods) == TEN, DRAIN_S)
            source, destination = destination, source
    return [serve.record(), over.record()]


def _all_on(watch: Watch, app: str, node: str) -> list[Pod] | None:
    found = [one for one in watch.live(app) if one.spec.nodeName == node]
    return found if len(found) == TEN else None


# ---- peers ----------------------------------------------------------------------------------------


def restart(n: int, megabytes: int) -> Results:
    """The same Deployment as a plain one: deleted, and started anew elsewhere. Its data is lost."""
    work = f"valkey {megabytes} MB, client connects again, data lost"
    with site() as where, Watch(where) as watch:
        movers.client_pods(where)
        made = movers.deployment("plain", nodeSelector={NODE_LABEL: "true"})
        del made["spec"]["template"]["spec"]["runtimeClassName"]
        made["spec"]["template"]["metadata"]["annotations"] = {}
        where.start(made, service("plain", "plain"), app="plain")
        address = _cluster_ip(where, "plain")
        moves: list[Moved] = []
        failed = 0
        with Clients(where) as clients:
            clients.start(Asked("again", CRITICAL, "again", 1, address))
            for _ in range(n):
                _fill(where, watch.only("plain"), megabytes)
                done, wrong = _repeat(where, watch, "plain", 1, moves=False)
                moves += done
                failed += wrong
            said = clients.finish()["again"]
    gaps = [longest(said["spans"], one.window) for one in moves]
    subject = "deletion and restart, without architect"
    found = samples("from the last good reply to the next", subject, work, gaps)
    found += samples(
        "deletion to ready on the other node", subject, work,
        (one.between("deleted", "ready") for one in moves),
    )  # fmt: skip
    lost = sum(said["kinds"].values())
    found.append(figure("connections lost or refused", subject, work, lost, "times", len(moves)))
    found.append(figure("restarts that failed", subject, work, failed, "restarts", n))
    return found


def podman(n: int, megabytes: int) -> Results:
    """podman container checkpoint --export, and restore --import, on this machine, with plain runc.

    The container's connections do not outlive it: the client has none open meanwhile, and makes a new one.
    """
    work = f"valkey {megabytes} MB, one machine, client connects again"
    subject = "podman container checkpoint --export, restore --import"
    gap = Samples("from the last good reply to the next", subject, work)
    sent = 0
    name = "bench-moving"
    with (
        tempfile.TemporaryDirectory(prefix="architect-bench-", dir=BUILD) as folder,
        wakes.criu_on_path() as env,
        harness.container(name, NODE_PORT, managed=False),
    ):
        file = Path(folder) / "checkpoint.tar"
        client = harness.connect(NODE_PORT)
        keys = valkey.fill(client, megabytes)
        client.close()
        checkpoint = ["podman", "container", "checkpoint", "--compress", "none", "--export"]
        for _ in range(n):
            harness.connect(NODE_PORT).close()
            with gap.timed():
                harness.run([*checkpoint, str(file), name], env=env)
                harness.run(["podman", "rm", name])
                harness.run(["podman", "container", "restore", "--import", str(file)], env=env)
                harness.connect(NODE_PORT).close()
            sent = file.stat().st_size
            file.unlink()
        client = harness.connect(NODE_PORT)
        bad = valkey.wrong(client, keys)
        client.close()
    return [
        gap.record(),
        figure("transferred a move", subject, work, sent / 1e6, "MB", n),
        figure("values that are wrong in the end", subject, work, bad, "values", keys),
    ]


def guarded(name: str, run: Callable[[], Results]) -> Results:
    """What a run finds. One that fails says so in the results: those of the others are not lost."""
    try:
        return run()
    except Exception:
        traceback.print_exc()
        return [figure(f"NOT MEASURED: {name} failed", "", "", 1, "failures", 0)]


def all_runs(quick: bool) -> list[Callable[[], Results]]:
    """What `python -m bench moving` runs."""
    n = min(MOVES, 3) if quick else MOVES
    few = min(n, 3) if quick else max(3, n // 5)
    runs: dict[str, Callable[[], Results]] = {
        "moves": lambda: moving(n, MEGABYTES),
        "new connections": lambda: moving(max(few, n // 2), MEGABYTES, new=True),
        "drain": lambda: drain(1 if quick else 3),
        "podman": lambda: podman(few, MEGABYTES),
        "restart": lambda: restart(few, MEGABYTES),
        "StatefulSet": lambda: stateful(few, MEGABYTES),
    }
    return [functools.partial(guarded, name, run) for name, run in runs.items()]
