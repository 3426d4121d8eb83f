"""Sessions of real protocols outlive drains of their server: valkey, postgres, gRPC, websockets over TLS.

From a pod on each node, each by another way: the pod's address, the Service's, a port of a node. None of them
pauses for a move. ARCHITECT_DRAINS says how often all servers are drained from node to node.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import datetime as dt
import functools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from tests.cluster import images
from tests.cluster.base import until
from tests.cluster.cluster import Cluster
from tests.cluster.settings import node_address
from tests.e2e import draining, movers, movingfaults
from tests.e2e.site import NODES, Site, archive, is_ready, managing, service, soon, template
from tests.engine.servers.machine import Session, program
from tests.engine.servers.serving import SERVERS_IMAGE
from tests.engine.support import Unmet

pytestmark = pytest.mark.cluster

TALK: Final = (Path(__file__).parent / "programs" / "talk.py").read_text()
POSTGRES: Final = "/usr/lib/postgresql/15/bin/postgres"
PAUSE_S: Final = 0.05
ANSWERED_S: Final = 60.0


@pytest.fixture(scope="module")
def servers(installed: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The image with the servers and their clients, in all nodes."""
    folder = tmp_path_factory.mktemp("servers")
    installed.load(images.saved(SERVERS_IMAGE, archive(folder, SERVERS_IMAGE)))
    return SERVERS_IMAGE


def certificate() -> str:
    """A PEM with a key and what it signed itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "talk")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return (pem + made.public_bytes(serialization.Encoding.PEM)).decode()


def deployment(app: str, image: str, port: int, *command: str) -> list[dict[str, Any]]:
    """A Deployment of one container of that name, and its Service with a port on each node."""
    container = {
        "name": app,
        "image": image,
        "imagePullPolicy": "Never",
        "command": list(command),
        "ports": [{"containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
    }
    pod = template(app, [container], managing([app], seconds=300))
    spec = {"replicas": 1, "selector": {"matchLabels": {"app": app}}, "template": pod}
    made = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": app}, "spec": spec}
    return [made, service(app, app, type="NodePort", ports=[{"port": port}])]


def clients(site: Site, image: str) -> dict[str, str]:
    """The pod on each node from which the clients run; of a DaemonSet, which drains leave alone."""
    labels = {"app": "clients"}
    container = {
        "name": "client",
        "image": image,
        "imagePullPolicy": "Never",
        "command": ["sleep", "infinity"],
    }
    pod = {
        "metadata": {"labels": labels},
        "spec": {
            "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [container],
        },
    }
    spec = {"selector": {"matchLabels": labels}, "template": pod}
    site.apply(
        {
            "apiVersion": "apps/v1",
            "kind": "DaemonSet",
            "metadata": {"name": "clients"},
            "spec": spec,
        }
    )

    def there() -> dict[str, str] | None:
        running = {
            one["spec"]["nodeName"]: one["metadata"]["name"]
            for one in site.of("clients")
            if is_ready(one)
        }
        return running if running.keys() == set(movers.ALL_NODES) else None

    return soon("a client pod on each node", there)


class Place:
    """Where a client runs, and how it reaches a server."""

    def __init__(self, site: Site, pod: str, app: str, way: str) -> None:
        self._site, self._pod = site, pod
        server = site.ready(app)
        assert server is not None
        port = site.get("service", app)["spec"]["ports"][0]
        if way == "pod":
            self.host, self.port = server["status"]["podIP"], port["port"]
        elif way == "service":
            self.host, self.port = site.get("service", app)["spec"]["clusterIP"], port["port"]
        else:
            self.host = node_address(movers.ALL_NODES.index(way) + 1)
            self.port = port["nodePort"]

    def session(self, *words: str) -> Session:
        """A program there that reads lines and prints lines."""
        plane = self._site.cluster.control_plane
        return Session(
            str(plane.programs.kubectl), "--kubeconfig", str(plane.admin),
            "--namespace", self._site.namespace, "exec", "-i", self._pod, "--",
            "env", "PATH=/usr/lib/postgresql/15/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/tmp", *words,
        )  # fmt: skip


WAYS: Final = (("k8n1", "pod"), ("k8n2", "service"), ("k8n3", "k8n1"), ("k8n1", "k8n2"))
"""On which node the client is, and how it comes."""


class Talks:
    """All sessions with one server, which take turns without an end, in a thread of their own.

    Each kind says how it starts and what is exchanged in a turn.
    """

    APP: str

    def __init__(self, site: Site, pods: dict[str, str], stack: contextlib.ExitStack) -> None:
        self._sessions = []
        for node, way in WAYS:
            place = Place(site, pods[node], self.APP, way)
            session = functools.partial(self._open, place)
            self._sessions.append(
                stack.enter_context(soon(f"{self.APP} by {way} from {node}", session))
            )
        self.turns = 0
        self._over = threading.Event()
        thread = stack.enter_context(concurrent.futures.ThreadPoolExecutor(1))
        stack.callback(self._over.set)
        self._talking = thread.submit(self._talk)

    def _open(self, place: Place) -> Session | None:
        """None while that node does not know the Service yet."""
        session = place.session(*self.words(place))
        try:
            self.greet(session)
        except (Unmet, BrokenPipeError):
            session.close()
            return None
        return session

    def _talk(self) -> None:
        while not self._over.is_set():
            for mine, session in enumerate(self._sessions):
                self.turn(session, self.turns, mine)
            self.turns += 1
            self._over.wait(PAUSE_S)

    def words(self, place: Place) -> tuple[str, ...]:
        """The client's command."""
        raise NotImplementedError

    def greet(self, session: Session) -> None:
        """The first words, after which it is connected."""

    def turn(self, session: Session, number: int, mine: int) -> None:
        """One exchange, the ``number``-th of session ``mine``. Fails if a reply is not the right one."""
        raise NotImplementedError

    def go_on(self) -> None:
        """Waits until each session has had its turn after this; raises what was wrong with a reply."""
        wanted = self.turns + 2

        def more() -> bool:
            if self._talking.done():
                self._talking.result()
            return self.turns >= wanted

        until(f"all sessions of {self.APP} to go on", more, ANSWERED_S)

    def finish(self) -> None:
        """After the last turn."""
        self._over.set()
        self._talking.result(ANSWERED_S)
        print(f"{self.APP}: {self.turns} turns of {len(self._sessions)} sessions")


class Grpc(Talks):
    """One stream of messages in both directions."""

    APP = "grpc"

    def words(self, place: Place) -> tuple[str, ...]:
        return "python3", "-c", program("grpc_client.py"), f"{place.host}:{place.port}", "Chat"

    def greet(self, session: Session) -> None:
        assert session.ask("hello") == "0 hello"

    def turn(self, session: Session, number: int, mine: int) -> None:
        assert session.ask(f"from {mine}") == f"{number + 1} from {mine}"


class Websockets(Talks):
    """Over TLS, with pings of the server's own."""

    APP = "talk"

    def words(self, place: Place) -> tuple[str, ...]:
        return "python3", "-c", TALK, "call", place.host, str(place.port)

    def greet(self, session: Session) -> None:
        assert session.line() == "open"

    def turn(self, session: Session, number: int, mine: int) -> None:
        assert session.ask(f"from {mine}") == f"{number} from {mine}"


class Postgres(Talks):
    """Each session in a transaction that ends only with the test."""

    APP = "postgres"

    def words(self, place: Place) -> tuple[str, ...]:
        where = ("-h", place.host, "-p", str(place.port), "-U", "postgres")
        return "stdbuf", "-oL", "psql", *where, "-XqAt"

    def greet(self, session: Session) -> None:
        session.send("create temporary table kept (number int);")
        session.send("begin;")
        assert session.ask("select 'begun';") == "begun"

    def turn(self, session: Session, number: int, mine: int) -> None:
        session.send(f"insert into kept values ({mine} + {number});")
        assert session.ask("select sum(number) from kept;") == self._sum(mine, number + 1)

    def _sum(self, mine: int, turns: int) -> str:
        return str(turns * mine + turns * (turns - 1) // 2)

    def finish(self) -> None:
        super().finish()
        for mine, session in enumerate(self._sessions):
            session.send("commit;")
            assert session.ask("select sum(number) from kept;") == self._sum(mine, self.turns)


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def counters(site: Site, pods: dict[str, str], crowd: movingfaults.Crowd) -> None:
    """Clients of valkey, from the same places by the same ways."""
    for node, way in WAYS:
        place = Place(site, pods[node], "valkey", way)
        key = f"{way} from {node}"
        at = movers.Way(way, place.host, place.port)
        space = movingfaults.network_of(site, pods[node])
        crowd.start(key, at, space)


def test_sessions_go_on(site: Site, servers: str, stack: contextlib.ExitStack) -> None:
    pods = clients(site, servers)
    # As another user, which postgres insists on.
    as_postgres = ("chroot", "--userspec=postgres", "/", POSTGRES, "-D", "/srv/postgres")
    source, destination = NODES
    draining.start(
        site,
        source,
        *deployment("grpc", servers, 50051, "python3", "-c", program("grpc_server.py")),
        *deployment("talk", servers, 8443, "python3", "-c", TALK, "serve", certificate()),
        *deployment("postgres", servers, 5432, *as_postgres, "-c", "listen_addresses=*"),
        movers.deployment("valkey"),
        movers.node_port("valkey", "valkey"),
    )
    pod = site.ready("valkey")
    assert pod is not None
    movers.ways(site, "valkey", pod)
    kinds = (Grpc, Websockets, Postgres)
    apps = {"valkey": 1} | {kind.APP: 1 for kind in kinds}
    talks = [kind(site, pods, stack) for kind in kinds]
    crowd = stack.enter_context(movingfaults.Crowd())
    counters(site, pods, crowd)
    for number in range(draining.DRAINS):
        with draining.drained(site, source) as began:
            draining.elsewhere(site, apps, destination, began)
            for each in (*talks, crowd):
                each.go_on()
        draining.migrated(site, apps)
        print(f"drain {number + 1}: {time.monotonic() - began:.1f} s", flush=True)
        source, destination = destination, source
    for talk in talks:
        talk.finish()
    last = site.ready("valkey")
    assert last is not None
    movingfaults.consistent(site, last, crowd.finish())
    soon(
        "no Checkpoint but restored ones",
        lambda: not set(movingfaults.phases(site).values()) - {"Restored"},
        movingfaults.LEFT_S,
    )
