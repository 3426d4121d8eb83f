"""Faults around held packets: a namespace, a rule, a filter or the daemon goes away, and nobody is reset."""

import contextlib
import json
import os
import select
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from architect.adapters import bpf, netfilter, netns
from architect.adapters.gate import RULE
from architect.contract import paths
from architect.contract.annotations import MANAGED_CONTAINERS, NETWORK_MONITOR, SCALEDOWN_DURATIONS
from tests.engine.servers.capture import Capture, Packet
from tests.engine.servers.machine import Machine
from tests.engine.support import (
    PORT,
    VALKEY_IMAGE,
    Client,
    Container,
    Lab,
    must,
    podman,
    run,
    unique,
    wait_until,
)
from tests.engine.test_faults import daemon_pid

pytestmark = pytest.mark.engine

VALKEY_PORT: Final = 6379
SHADOW: Final = 7009
NOTICED_S: Final = 8.0
"""Gates are looked after every 5 s."""
AWAY_S: Final = float(os.environ.get("ARCHITECT_DAEMON_AWAY_S", "10"))
"""For how long the daemon is away while clients ask; 60 for the whole minute."""
PATIENCE_S: Final = 2 * AWAY_S + 30
"""A client's kernel waits twice as long each time before it sends again."""
KEPT: Final = "192.0.2.1"
"""Of documentation (RFC 5737): somebody else's filter looks for it."""
CLSACT: Final = ["tc", "qdisc", "add", "dev", "eth0", "clsact"]
OTHERS_FILTER: Final = (
    f"tc filter add dev eth0 ingress protocol ip pref 7 u32 match ip dst {KEPT}/32 classid 1:1"
).split()


@pytest.fixture(scope="module")
def client(shared_lab: Lab) -> Iterator[Machine]:
    """Where the clients are: a container of plain runc."""
    container = shared_lab.start("asking", "sleep", "infinity", runtime="runc", annotations={})
    with contextlib.closing(Machine(container)) as machine:
        yield machine


@pytest.fixture
def wire(client: Machine) -> Iterator[Capture]:
    """Capture at the client during a test: no reset comes."""
    with client.capture() as capture:
        yield capture
        assert capture.resets() == []


def begin(client: Machine, address: str, port: int = PORT) -> Client:
    """A connection on its way, which its kernel goes on asking for."""
    with client.inside():
        made = socket.socket()
    made.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        made.connect((address, port))
    return Client(made)


def finish(one: Client, line: str) -> str:
    """The server's answer, on the connection that was begun."""
    one.socket.settimeout(PATIENCE_S)
    return one.ask(line)


def call(client: Machine, container: Container, port: int = PORT) -> Client:
    return begin(client, container.address, port)


def from_server(capture: Capture) -> list[Packet]:
    return [one for one in capture.packets if not one.outgoing]


# ---- the namespace goes away ------------------------------------------------------------------------


def strand(container: Container) -> None:
    """Hibernate it for good: what wants it awake is held, and goes on being held."""
    container.sleep()
    images = container.checkpoint()
    assert images is not None
    (images / "core-1.img").unlink()


def hold_one(client: Machine, container: Container, address: str, port: int = PORT) -> None:
    """Have a SYN held for a stranded container."""
    begin(client, address, port)
    wait_until(lambda: container.events("RestoreFailed"), "a wake to fail")
    row = container.row()
    assert row is not None
    assert row["state"] == "SCALED_DOWN"
    assert row["held_packets"] > 0


def gate_of(container: Container) -> Path:
    inode = Path(f"/proc/{container.keeper}/ns/net").stat().st_ino
    return paths.BPF / f"{inode:x}"


def nothing_is_left(container: Container, gate: Path) -> None:
    wait_until(lambda: not gate.exists(), "the gate's pins to go")
    assert not (paths.CONTAINERS / container.id).exists()
    assert not (paths.CHECKPOINTS / container.id).exists()


def test_container_is_removed_while_packets_are_held(lab: Lab, client: Machine) -> None:
    pid, other, container = daemon_pid(), lab.subject("other"), lab.subject("removed")
    other.sleep()
    strand(container)
    gate = gate_of(container)
    assert gate.exists()
    hold_one(client, container, container.address)
    podman("rm", "-f", "-t", "0", container.name)
    nothing_is_left(container, gate)
    assert finish(call(client, other), "hello") == "hello"
    assert daemon_pid() == pid


def play(lab: Lab, name: str) -> tuple[Container, str]:
    """Start a pod of one managed container; return it and the id of the pod's infra container."""
    settings: dict[str, object] = {
        MANAGED_CONTAINERS: ["main"],
        NETWORK_MONITOR: {"main": "packets"},
        SCALEDOWN_DURATIONS: {"main": "10m"},
    }
    main = {"name": "main", "image": VALKEY_IMAGE, "ports": [{"containerPort": VALKEY_PORT}]}
    annotations = {key: json.dumps(value) for key, value in settings.items()}
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name, "annotations": annotations},
        "spec": {"restartPolicy": "Never", "containers": [main]},
    }
    lab.closing.callback(run, "podman", "pod", "rm", "-f", "-i", "-t", "0", name)
    podman("--runtime", "runc-architect", "kube", "play", "-", stdin=json.dumps(pod))
    full = f"{name}-main"
    lab.footprint.add(full)
    infra = podman("pod", "inspect", "-f", "{{.InfraContainerID}}", name)
    identity = podman("container", "inspect", "-f", "{{.Id}}", full)
    return Container(full, identity, pod=name), infra


def test_infra_container_is_killed_while_packets_are_held(lab: Lab, client: Machine) -> None:
    pid, other = daemon_pid(), lab.subject("other")
    name = unique("infra")
    container, infra = play(lab, name)
    inspect = ("container", "inspect", "-f")
    address = podman(*inspect, "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}", infra)
    wait_until(lambda: "Ready to accept" in "".join(container.logs()), "the program to listen")
    other.sleep()
    strand(container)
    gate = gate_of(container)
    hold_one(client, container, address, VALKEY_PORT)
    os.kill(int(podman(*inspect, "{{.State.Pid}}", infra)), signal.SIGKILL)
    wait_until(lambda: podman(*inspect, "{{.State.Running}}", infra) == "false", "Podman to notice")
    assert finish(call(client, other), "hello") == "hello"
    assert container.state() == "SCALED_DOWN"
    podman("pod", "rm", "-f", "-t", "0", name)
    nothing_is_left(container, gate)
    other.sleep()
    assert finish(call(client, other), "again") == "again"
    assert daemon_pid() == pid


# ---- rules and filters go away ---------------------------------------------------------------------


def in_pod(container: Container, *words: str) -> str:
    return must("nsenter", "-t", str(container.keeper), "-n", "--", *words)


def put_back(container: Container) -> str:
    """What its events say was taken from its gate."""
    events = container.events("Warning")
    return " ".join(one["message"] for one in events if "put back" in one["message"])


def flush(container: Container) -> None:
    """Do to its namespace what a firewall does that is loaded anew."""
    in_pod(container, "nft", "flush", "ruleset")
    tools = {netfilter.Family.IPV4: "iptables-legacy", netfilter.Family.IPV6: "ip6tables-legacy"}
    for family, tool in tools.items():
        if netfilter.probe(family, RULE).backend is netfilter.Backend.IPTABLES_LEGACY:
            for table in ("mangle", "nat"):
                in_pod(container, tool, "-w", "-t", table, "-F")


def take_filter(container: Container) -> None:
    """Take the gate's filter off eth0, by whichever way it is attached."""
    if not bpf.has_tcx():
        in_pod(container, "tc", "qdisc", "del", "dev", "eth0", "clsact")
        return
    place = netns.open_netns(Path(f"/proc/{container.keeper}/ns/net"))
    try:
        with netns.entered(place):
            number = socket.if_nametoindex("eth0")
            taken = bpf.TcxFilter(number, gate_of(container) / f"ingress-{number}")
            assert taken.attached() is not None
            taken.detach()
    finally:
        os.close(place)


def wakes_after_repair(client: Machine, container: Container, begun: Client, what: str) -> None:
    """Whoever asked in the meantime gets the answer, once it is put back what was taken."""
    wait_until(lambda: what in put_back(container), f"an event that names {what}", NOTICED_S)
    assert finish(begun, "asked meanwhile") == "asked meanwhile"
    container.sleep()
    assert finish(call(client, container), "hello") == "hello"


def test_flushed_ruleset_of_a_sleeper_is_put_back(lab: Lab, client: Machine, wire: Capture) -> None:
    container = lab.subject("flushed")
    container.sleep()
    flush(container)
    begun = call(client, container)
    wakes_after_repair(client, container, begun, "IPv4 rule")
    assert wire.unanswered_openings() == []


def test_filter_of_a_sleeper_is_put_back(lab: Lab, client: Machine, wire: Capture) -> None:
    container = lab.subject("unfiltered")
    container.sleep()
    take_filter(container)
    begun = call(client, container)
    wakes_after_repair(client, container, begun, "filter on eth0")
    assert wire.unanswered_openings() == []


def test_flushed_shadow_ports_are_put_back(lab: Lab, client: Machine, wire: Capture) -> None:
    name = unique("translated")
    mapping = {"containerName": name, "appPort": PORT, "shadowPort": SHADOW}
    container = lab.subject("", name=name, shadow_ports={"mappings": [mapping]})

    def is_translated() -> bool:
        with client.inside(), contextlib.suppress(OSError):
            socket.create_connection((container.address, SHADOW), 1).close()
            return True
        return False

    wait_until(is_translated, "the shadow port")
    honest = call(client, container)
    assert finish(honest, "before") == "before"
    flush(container)
    assert finish(honest, "meanwhile") == "meanwhile"
    assert finish(call(client, container), "meanwhile, too") == "meanwhile, too"
    what = "IPv4 shadow ports"
    wait_until(lambda: what in put_back(container), f"an event that names {what}", NOTICED_S)
    assert finish(call(client, container, SHADOW), "by its shadow") == "by its shadow"
    container.sleep()
    assert finish(call(client, container), "after") == "after"


def test_filter_of_somebody_else_stays_and_ours_works(
    lab: Lab, client: Machine, wire: Capture
) -> None:
    container = lab.subject("neighbours")
    entered = ("nsenter", "-t", str(container.keeper), "-n", "--")
    run(*entered, *CLSACT)  # unless it is there, where the kernel has no tcx
    if (done := run(*entered, *OTHERS_FILTER)).code:
        pytest.skip(f"tc cannot make a filter here (CONFIG_NET_CLS_U32): {done.err.strip()}")
    for line in ("once", "twice"):
        container.sleep()
        assert finish(call(client, container), line) == line
    shown = in_pod(container, "tc", "filter", "show", "dev", "eth0", "ingress")
    assert socket.inet_aton(KEPT).hex() in shown
    assert put_back(container) == ""


# ---- the daemon goes away ---------------------------------------------------------------------------


def kill(pid: int) -> None:
    """SIGKILL, and wait until it is gone with all its sockets."""
    process = os.pidfd_open(pid)
    try:
        os.kill(pid, signal.SIGKILL)
        assert select.select([process], [], [], 10.0)[0]
    finally:
        os.close(process)


def wait_for(moment: float) -> None:
    wait_until(lambda: time.monotonic() > moment, "the time to pass", AWAY_S + 1)


def test_clients_that_ask_while_the_daemon_is_away_are_answered(
    lab: Lab, client: Machine, wire: Capture
) -> None:
    container = lab.subject("unattended")
    old = call(client, container)
    assert finish(old, "hello") == "hello"
    container.sleep()
    before = len(from_server(wire))
    kill(daemon_pid())
    try:
        begun = time.monotonic()
        old.socket.sendall(b"asked on an open connection\n")
        newcomers = []
        for part in range(3):
            wait_for(begun + AWAY_S * part / 3)
            newcomers.append(call(client, container))
        wait_for(begun + AWAY_S)
        assert len(from_server(wire)) == before
    finally:
        must("architect", "up")
    for number, one in enumerate(newcomers):
        assert finish(one, f"newcomer {number}") == f"newcomer {number}"
    old.socket.settimeout(PATIENCE_S)
    assert old.line() == "asked on an open connection"
    assert wire.unanswered_openings() == []


def queued(container: Container) -> int:
    """Packets that the kernel holds in the namespace (/proc/net/netfilter/nfnetlink_queue)."""
    place = netns.open_netns(Path(f"/proc/{container.keeper}/ns/net"))
    try:
        with netns.entered(place):
            queues = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text()
    finally:
        os.close(place)
    return sum(int(line.split()[2]) for line in queues.splitlines())


def test_daemon_is_killed_while_it_holds_packets(lab: Lab, client: Machine, wire: Capture) -> None:
    container = lab.subject("holding")
    old = call(client, container)
    assert finish(old, "hello") == "hello"
    container.sleep()
    before = len(from_server(wire))
    # It neither reads nor answers, so all of it is held until the end of the daemon.
    pid = daemon_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        newcomer = call(client, container)
        old.socket.sendall(b"asked on an open connection\n")
        wait_until(lambda: queued(container) >= 2, "both packets to be held")
        kill(pid)
        wait_until(lambda: queued(container) == 0, "the kernel to drop them")
        assert len(from_server(wire)) == before
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        must("architect", "up")
    assert finish(newcomer, "newcomer") == "newcomer"
    old.socket.settimeout(PATIENCE_S)
    assert old.line() == "asked on an open connection"
    assert wire.unanswered_openings() == []
    container.sleep()
    assert finish(call(client, container), "again") == "again"
