"""What the tests of moves that go wrong share: clients that need no API server, logs, and what is left.

Used by test_moving_faults.py, test_moving_strangers.py and test_moving_drain.py. A client is a thread of the
test, if need be in the network namespace of a pod: `kubectl exec` would end with the API server. Logs are
read from the nodes' disks, for the same reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from bench.valkey import Valkey
from tests.cluster import cgroups, network
from tests.cluster.base import until
from tests.cluster.settings import SWITCH
from tests.e2e import movers
from tests.e2e.site import COMPONENTS_S, NODES, Site, is_ready, soon

CHECKPOINTS: Final = "checkpoints.architect.loopholelabs.io"
STATE: Final = "var/lib/architect"
STEPS: Final = {
    "offered": '"what": "offered"',
    "claimed": " claimed for ",
    "fetching": '"what": "fetching"',
    "committed": '"what": "committed"',
    "restored": '"what": "migrated"',
}
"""The steps of a move, and by which line of a log each is known."""
OUTCOME_S: Final = 120.0
LEFT_S: Final = 60.0
_CLIENT_S: Final = OUTCOME_S
_PAUSE_S: Final = 0.02
_NEW_NETWORK: Final = 0x40000000
"""CLONE_NEWNET (setns(2))."""


def number(node: str) -> int:
    """Of a node's name."""
    return int(node.removeprefix("k8n"))


def other(node: str) -> str:
    """The other one of the two nodes that run managed pods."""
    (found,) = (one for one in NODES if one != node)
    return found


# ---- processes ------------------------------------------------------------------------------------


def process_of(site: Site, node: str, id_: str) -> int:
    """The host's number of the first process of a container on a node."""
    machine = site.cluster.node(number(node))
    listed = machine.run("/opt/containerd/ctr", "-n", "k8s.io", "tasks", "ls").splitlines()
    (inside,) = (line.split()[1] for line in listed if line.split()[:1] == [id_])
    for pid in cgroups.members(machine.name):
        with contextlib.suppress(OSError):
            status = Path(f"/proc/{pid}/status").read_text()
            (spaces,) = (line for line in status.splitlines() if line.startswith("NSpid:"))
            if spaces.split()[2:3] == [inside]:
                return pid
    raise LookupError(f"process {inside} of {node} is not there")


def container_id(pod: dict[str, Any]) -> str:
    """Of a pod's first container."""
    found: str = pod["status"]["containerStatuses"][0]["containerID"]
    return found.rpartition("/")[2]


def network_of(site: Site, name: str) -> Path:
    """The network namespace of a pod."""
    pod = site.pod(name)
    pid = process_of(site, pod["spec"]["nodeName"], container_id(pod))
    return Path(f"/proc/{pid}/ns/net")


def component(site: Site, app: str, node: str) -> dict[str, Any]:
    """A component's ready pod on a node, made anew if its container was killed before.

    The kubelet waits longer each time before it starts again what was killed again.
    """
    words = ("--namespace=architect", f"--selector=app={app}")

    def ready() -> dict[str, Any] | None:
        found = site.cluster.get("pods", *words, f"--field-selector=spec.nodeName={node}")["items"]
        (one,) = (each for each in found if "deletionTimestamp" not in each["metadata"])
        return one if is_ready(one) else None

    one = soon(f"{app} of {node}", ready, COMPONENTS_S)
    if not one["status"]["containerStatuses"][0]["restartCount"]:
        return one
    name = one["metadata"]["name"]
    site.cluster.kubectl("delete", "pod", "--namespace=architect", name, "--wait=true")

    def fresh() -> dict[str, Any] | None:
        found = ready()
        return found if found and found["metadata"]["uid"] != one["metadata"]["uid"] else None

    return soon(f"a new {app} of {node}", fresh, COMPONENTS_S)


def killer(site: Site, app: str, node: str) -> Callable[[], None]:
    """What kills a component's process with SIGKILL, at once: everything is looked up before."""
    pod = component(site, app, node)
    id_ = container_id(pod)
    pid = process_of(site, node, id_)

    def kill() -> None:
        site.killed.add(id_)
        os.kill(pid, signal.SIGKILL)

    return kill


# ---- logs -----------------------------------------------------------------------------------------


class Logs:
    """What the components write from now on about the pods of one namespace."""

    def __init__(self, site: Site) -> None:
        self._site = site
        self._read: dict[Path, int] = {}
        for path in self._paths():
            # A component that is being replaced takes its own along.
            with contextlib.suppress(FileNotFoundError):
                self._read[path] = path.stat().st_size
        self.lines: list[str] = []

    def _paths(self) -> Iterator[Path]:
        places = "nodes/*/root/var/log/pods/architect_architect*/*/*.log"
        return self._site.cluster.home.glob(places)

    def look(self) -> list[str]:
        """All lines until now."""
        for path in self._paths():
            with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                whole, newline, _ = file.read().rpartition(b"\n")
                self._read[path] = self._read.get(path, 0) + len(whole) + len(newline)
                self.lines += whole.decode(errors="replace").splitlines()
        return self.lines

    def about(self, marker: str) -> list[str]:
        """The lines with that, and with the namespace of the test."""
        mine = f"{self._site.namespace}/"
        return [line for line in self.look() if marker in line and mine in line]

    def wait(self, marker: str, seconds: float = OUTCOME_S) -> str:
        """Returns the first line with that as soon as it is there."""
        return until(f"{marker!r} in a log", lambda: self.about(marker), seconds, poll_s=0.003)[0]


# ---- clients --------------------------------------------------------------------------------------


class Client(threading.Thread):
    """Increments a key of its own over one connection until it is stopped, and checks each reply."""

    def __init__(self, key: str, address: str, port: int, space: Path | None = None) -> None:
        super().__init__(name=key, daemon=True)
        self.key = key
        self.count = 0
        self.error = ""
        self.longest_s = 0.0
        self.connected = threading.Event()
        self._peer = (address, port)
        self._space = space
        self._ended = threading.Event()

    def run(self) -> None:
        """Until :meth:`stop`, or an error."""
        try:
            if self._space is not None:
                # Of this thread alone; the socket stays where it was made.
                _enter(self._space)
            link = Valkey(*self._peer, timeout_s=_CLIENT_S)
            try:
                self._ask(link)
            finally:
                link.close()
        except (OSError, ValueError) as error:
            self.error = f"{self.key} after {self.count}: {error!r}"
        finally:
            self.connected.set()

    def _ask(self, link: Valkey) -> None:
        while not self._ended.is_set():
            began = time.monotonic()
            reply = link("INCR", self.key)
            self.longest_s = max(self.longest_s, time.monotonic() - began)
            if reply != self.count + 1:
                raise ValueError(f"came {reply!r}")
            self.count += 1
            self.connected.set()
            self._ended.wait(_PAUSE_S)

    def stop(self) -> None:
        """Ends it after the reply that it waits for."""
        self._ended.set()


def _enter(space: Path) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with space.open("rb") as file:
        if libc.setns(file.fileno(), _NEW_NETWORK):
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(space))


class Crowd:
    """Clients under way; use it as a context."""

    def __init__(self) -> None:
        self._clients: list[Client] = []

    def __enter__(self) -> Crowd:
        return self

    def __exit__(self, *_: object) -> None:
        for one in self._clients:
            one.stop()

    def start(self, key: str, way: movers.Way, space: Path | None = None) -> str:
        """Starts one; returns its key once it has its first reply."""
        one = Client(key, way.address, way.port, space)
        one.start()
        self._clients.append(one)
        assert one.connected.wait(_CLIENT_S), f"{key} has no reply"
        assert not one.error, one.error
        return key

    def check(self) -> None:
        """None has failed until now."""
        assert not (errors := [one.error for one in self._clients if one.error]), errors

    def go_on(self) -> None:
        """Waits until each has had further replies."""
        before = {one.key: one.count for one in self._clients}

        def all_more() -> bool:
            self.check()
            return all(one.count > before[one.key] + 1 for one in self._clients)

        until("each client to go on", all_more, _CLIENT_S)

    def served(self, seconds: float) -> None:
        """For so long none fails, nor waits for more than a few seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            began = time.monotonic()
            self.go_on()
            assert time.monotonic() - began < 5
        self.check()

    def finish(self) -> dict[str, int]:
        """Ends all; how often each has incremented its key. Fails if one had an error."""
        self.go_on()
        for one in self._clients:
            one.stop()
        for one in self._clients:
            one.join(_CLIENT_S + 5)
            assert not one.is_alive(), f"{one.key} still waits"
            print(f"{one.key}: {one.count} replies, the slowest after {one.longest_s:.2f} s")
        self.check()
        return {one.key: one.count for one in self._clients}


def consistent(site: Site, pod: dict[str, Any], counts: dict[str, int]) -> None:
    """A pod has just what its clients were told: no copy of it has answered, and no reply was lost."""
    client = site.connect(pod["metadata"]["name"])
    for key, count in counts.items():
        assert client("GET", key) == str(count).encode(), key
    client.close()


# ---- a move and its outcome -----------------------------------------------------------------------


def left(site: Site) -> set[str]:
    """What the nodes keep of pods that leave or come."""
    roots = {node: site.cluster.node(number(node)).root for node in NODES}
    return {
        f"{node}: {path.relative_to(root)}"
        for node, root in roots.items()
        for name in ("departures", "arrivals")
        for path in (root / STATE / name).glob("*")
    }


def checkpoints(site: Site) -> list[dict[str, Any]]:
    """All of the namespace."""
    found: list[dict[str, Any]] = site.get(CHECKPOINTS)["items"]
    return found


def phases(site: Site) -> dict[str, str]:
    """Of each Checkpoint of the namespace."""
    return {one["metadata"]["name"]: one["status"]["phase"] for one in checkpoints(site)}


class Scene(NamedTuple):
    """A pod with clients everywhere, before it is to leave its node, which is cordoned."""

    site: Site
    app: str
    pod: dict[str, Any]
    logs: Logs
    crowd: Crowd
    known: set[str]
    """What the nodes had before."""

    @property
    def source(self) -> str:
        """The node that the pod is to leave."""
        found: str = self.pod["spec"]["nodeName"]
        return found

    @property
    def destination(self) -> str:
        """The only node that can take it."""
        return other(self.source)

    def leave(self) -> None:
        """Deletes the pod."""
        self.site.kubectl("delete", "pod", self.pod["metadata"]["name"], "--wait=false")

    def arrived(self, seconds: float = OUTCOME_S) -> dict[str, Any]:
        """Waits until another pod is the only ready one; returns it."""

        def there() -> dict[str, Any] | None:
            found = self.site.ready(self.app)
            mine = self.pod["metadata"]["uid"]
            return found if found and found["metadata"]["uid"] != mine else None

        return soon(f"one pod of {self.app} to be ready", there, seconds)

    def outcome(self) -> dict[str, Any]:
        """What is to be whatever went wrong: one pod, all data, every client served, nothing left."""
        pod = self.arrived()
        assert pod["spec"]["nodeName"] == self.destination
        consistent(self.site, pod, self.crowd.finish())
        movers.gone(self.site, self.pod)
        self.nothing_left()
        return pod

    def nothing_left(self) -> None:
        """Waits until neither the API nor a node has anything of the move."""
        soon(
            "no Checkpoint but restored ones",
            lambda: not set(phases(self.site).values()) - {"Restored"},
            LEFT_S,
        )
        soon("nothing on the disks", lambda: not left(self.site) - self.known, LEFT_S)


@contextlib.contextmanager
def scene(
    site: Site,
    app: str,
    case: str,
    places: Sequence[str] = (movers.HOST, "k8n3"),
) -> Iterator[Scene]:
    """A scene with clients by the pod's address and the Service's; needs pods of movers.client_pods."""
    pod = soon(f"{app} to be ready", lambda: site.ready(app), OUTCOME_S)
    source = pod["spec"]["nodeName"]
    spaces = {
        place: None if place == movers.HOST else network_of(site, f"client-{place}")
        for place in places
    }
    with movers.cordoned(site, source), Crowd() as crowd:
        for place, space in spaces.items():
            for way in movers.ways(site, app, pod)[:2]:
                crowd.start(f"{case}-{place}-{way.name}", way, space)
        yield Scene(site, app, pod, Logs(site), crowd, left(site))


def holds(seconds: float, check: Callable[[], object]) -> None:
    """For so long a check does not fail."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        check()
        time.sleep(0.1)


# ---- what goes wrong ------------------------------------------------------------------------------


def unplug(node: str) -> None:
    """Takes a node off the network."""
    network.ip("link", "set", node, "down", netns=SWITCH)


def plug(node: str) -> None:
    """Puts it back."""
    network.ip("link", "set", node, "up", netns=SWITCH)


@contextlib.contextmanager
def full(site: Site, node: str, folder: str) -> Iterator[None]:
    """Puts a small file system, with room for next to nothing, over a folder of architectd's."""
    machine = site.cluster.node(number(node))
    place = f"/{STATE}/{folder}"
    machine.run("mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", place)
    try:
        yield
    finally:
        # A file of it may be open yet.
        machine.run("umount", "--lazy", place)
