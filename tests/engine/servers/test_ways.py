"""Every way to a sleeper: its pod's IPv4 address, a published port of the host, its IPv6 address.

A valkey and an unbound each, woken by somebody new and by somebody whom they know. What the gate does is the
same on each way, but what is before it is not: the host translates a published port's addresses, and IPv6 has
a rule, a reassembly and a neighbour discovery of its own.
"""

import contextlib
import functools
import json
import os
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Final

import pytest

from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine
from tests.engine.servers.serving import SERVERS_IMAGE, serve
from tests.engine.support import (
    TEST_IMAGE,
    Container,
    Lab,
    Valkey,
    free_port,
    must,
    run,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine

ROUNDS: Final = 3
VALKEY: Final = 6379
DNS: Final = 53
ANSWER_S: Final = 3.0
"""When an answer to a datagram is too late."""
INTERFACE: Final = "eth0"

UNBOUND: Final = """
server:
    interface: 0.0.0.0
    interface: ::0
    access-control: 0.0.0.0/0 allow
    access-control: ::/0 allow
    chroot: ""
    username: ""
    directory: "/tmp"
    pidfile: ""
    use-syslog: no
    module-config: "iterator"
    local-zone: "architect.test." static
    local-data: "www.architect.test. A 192.0.2.7"
"""
QUESTION: Final = (
    struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0)
    + b"\x03www\x09architect\x04test\x00"
    + struct.pack("!2H", 1, 1)
)
"""For the address of www.architect.test (RFC 1035, 4.1)."""
ADDRESS: Final = socket.inet_aton("192.0.2.7")


@dataclass(frozen=True, slots=True)
class Servers:
    """One of each."""

    cache: Container
    names: Container
    names_port: int
    """Port of the host that is published to the unbound's, UDP."""


@dataclass(frozen=True, slots=True)
class Way:
    """A way to a pair of servers."""

    family: socket.AddressFamily
    inside: Callable[[], AbstractContextManager[None]]
    """Sockets that are opened meanwhile are the clients'."""
    capture: Callable[[], Capture]
    servers: Servers
    cache_at: tuple[str, int]
    names_at: tuple[str, int]

    def connect(self) -> Valkey:
        """Open a connection to the valkey."""
        with self.inside():
            return Valkey.connect(*self.cache_at)

    @contextlib.contextmanager
    def resolver(self) -> Iterator[Callable[[], bool]]:
        """Yield what asks the unbound, once, and says whether it has answered; all from one port."""
        with self.inside():
            made = socket.socket(self.family, socket.SOCK_DGRAM)
        with made:
            made.settimeout(ANSWER_S)
            made.connect(self.names_at)
            yield functools.partial(answers, made)


def answers(resolver: socket.socket) -> bool:
    """Whether the unbound to which a socket is connected answers a question."""
    try:
        resolver.send(QUESTION)
        return resolver.recv(512).endswith(ADDRESS)
    except (TimeoutError, ConnectionRefusedError):
        return False


def serve_both(lab: Lab, *options: str) -> Servers:
    """Start a valkey and an unbound."""
    cache = lab.valkey("cache", options=options)
    port = free_port(socket.SOCK_DGRAM)

    def ready(_: Container) -> bool:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as resolver:
            resolver.settimeout(0.5)
            resolver.connect(("127.0.0.1", port))
            return answers(resolver)

    names = serve(
        lab,
        "names",
        *("unbound", "-d", "-c", "/tmp/conf"),
        configuration=UNBOUND,
        options=[*options, "-p", f"127.0.0.1:{port}:{DNS}/udp"],
        port=DNS,
        ready=ready,
    )
    return Servers(cache, names, port)


@pytest.fixture(scope="module")
def servers(shared_lab: Lab) -> Servers:
    """A pair in Podman's own network, which has IPv4 only."""
    return serve_both(shared_lab)


@pytest.fixture(scope="module")
def pod_ipv4(servers: Servers, client: Machine) -> Way:
    """From a neighbour on the bridge."""
    ends = (servers.cache.address, VALKEY), (servers.names.address, DNS)
    return Way(socket.AF_INET, client.inside, client.capture, servers, *ends)


@pytest.fixture(scope="module")
def published(servers: Servers) -> Iterator[Way]:
    """From the host: to an address of its own, which it translates to the pod's."""
    bridge = json.loads(must("podman", "network", "inspect", "podman"))[0]["network_interface"]
    here = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    ends = ("127.0.0.1", servers.cache.host_port), ("127.0.0.1", servers.names_port)
    # Captured where the addresses are translated already.
    yield Way(socket.AF_INET, contextlib.nullcontext, lambda: Capture(here, bridge), servers, *ends)
    os.close(here)


@pytest.fixture(scope="module")
def network(shared_lab: Lab) -> str:
    """A network of Podman's with IPv6; empty where it cannot have one, and says why."""
    name = unique("six")
    shared_lab.closing.callback(run, "podman", "network", "rm", "-f", name)
    subnet = f"fd41:7263:{os.getpid() & 0xFFFF:x}::/64"
    made = run("podman", "network", "create", "--ipv6", "--subnet", subnet, name)
    if not made.code:
        words = ["podman", "--runtime", "runc", "run", "--rm", "--network", name]
        made = run(*words, TEST_IMAGE, "true")
    if made.code:
        print(f"Podman has no network with IPv6 here, so addresses are added by hand: {made.err}")
    return "" if made.code else name


def ipv6_of(container: Container, number: int) -> str:
    """Return a container's IPv6 address; a new one if its network has given it none."""
    found = container.inspect("{{range .NetworkSettings.Networks}}{{.GlobalIPv6Address}}{{end}}")
    if not found:
        found = f"fd41:7263:{os.getpid() & 0xFFFF:x}::{number:x}"
        words = ["nsenter", "-t", str(container.keeper), "-n", "ip", "-6", "address", "add"]
        # It goes with the interface. Nobody else has it: no detection of duplicates.
        must(*words, f"{found}/64", "dev", INTERFACE, "nodad")
    return found


@pytest.fixture(scope="module")
def ipv6(shared_lab: Lab, network: str) -> Iterator[Way]:
    """From a neighbour on the bridge, too."""
    options = ["--network", network] if network else []
    neighbour = shared_lab.start(
        "six",
        *("sleep", "infinity"),
        image=SERVERS_IMAGE,
        runtime="runc",
        annotations={},
        options=options,
    )
    with contextlib.closing(Machine(neighbour)) as client:
        pair = serve_both(shared_lab, *options)
        ipv6_of(neighbour, 1)
        ends = (ipv6_of(pair.cache, 2), VALKEY), (ipv6_of(pair.names, 3), DNS)
        way = Way(socket.AF_INET6, client.inside, client.capture, pair, *ends)
        with way.resolver() as ask:
            wait_until(ask, "the way over IPv6")
        yield way


@pytest.fixture(params=["pod_ipv4", "published", "ipv6"])
def way(request: pytest.FixtureRequest) -> Way:
    """One after the other."""
    found: Way = request.getfixturevalue(request.param)
    return found


@pytest.fixture
def watched(way: Way) -> Iterator[Capture]:
    """Capture at the client: no reset, and every SYN answered, the first time."""
    with way.capture() as capture:
        yield capture
        complaints = capture.complaints()
    if complaints:
        pytest.fail("the client could notice:\n" + "\n".join(complaints))


def test_new_connection_wakes(way: Way, watched: Capture) -> None:
    for _ in range(ROUNDS):
        way.servers.cache.sleep()
        connection = way.connect()
        assert connection.command("PING") == "PONG"
        assert way.servers.cache.state() == "RUNNING"
        connection.close()
    assert len(watched.exchanges("tcp", VALKEY)) == ROUNDS


def test_open_connection_wakes_and_goes_on(way: Way, watched: Capture) -> None:
    connection = way.connect()
    for number in range(ROUNDS):
        assert connection.command("SET", "key", number) == "OK"
        way.servers.cache.sleep()
        assert connection.command("GET", "key") == str(number)
        assert way.servers.cache.state() == "RUNNING"
    assert len(watched.exchanges("tcp", VALKEY)) == 1


def test_datagram_of_somebody_new_wakes_and_is_answered(way: Way, watched: Capture) -> None:
    for _ in range(ROUNDS):
        way.servers.names.sleep()
        with way.resolver() as ask:
            assert ask()
        assert way.servers.names.state() == "RUNNING"
    assert watched.exchanges("udp", DNS) == ["><"] * ROUNDS


def test_datagram_of_somebody_known_wakes_and_is_answered(way: Way, watched: Capture) -> None:
    with way.resolver() as ask:
        for _ in range(ROUNDS):
            assert ask()
            way.servers.names.sleep()
        assert ask()
    assert watched.exchanges("udp", DNS) == ["><" * (ROUNDS + 1)]


def test_all_of_a_burst_is_answered(way: Way, watched: Capture) -> None:
    """Clients that come together, while it sleeps and while it wakes."""
    way.servers.cache.sleep()
    connections = [way.connect() for _ in range(20)]
    assert {one.command("PING") for one in connections} == {"PONG"}
    assert len(watched.exchanges("tcp", VALKEY)) == len(connections)
