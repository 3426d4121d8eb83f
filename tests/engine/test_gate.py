"""The traffic gate on real interfaces with real sockets, kernel and all.

Each test has its own pod and client, joined by veth: see podnet.
"""

import contextlib
import ctypes
import errno
import fcntl
import functools
import os
import re
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from architect.adapters import bpf, netfilter, netns, nfqueue
from architect.adapters.gate import (
    RULE,
    Activity,
    Gate,
    GateBusyError,
    GateError,
    Mode,
    Port,
    TooManyPortsError,
    Use,
)
from tests.engine.podnet import (
    POD,
    PORT,
    Network,
    command,
    connected,
    failure,
    held,
    readable,
    received,
    until,
)

ROOT = Path(__file__).resolve().parents[2]
OTHER_PORT = 7001

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
paths = pytest.mark.parametrize("through", ["veth", "lo"])


COARSE_NS = 10_000_000
"""How late the gate's clock may be: a tick of the kernel, at its slowest."""


@pytest.fixture(scope="session")
def program() -> Path:
    built = ROOT / "build/native/gate.bpf.o"
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT / "native/bpf")], capture_output=True, text=True, check=False
    )
    assert built.exists(), f"no {built}, and it cannot be built: {done.stderr}"
    return built


@pytest.fixture(scope="session")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bpffs")
    bpf.ensure_bpffs(path)
    bpf.ensure_bpffs(path)  # a second mount on top would need a second umount
    yield path
    command(f"umount {path}")
    assert not bpf.is_bpffs(path)


@pytest.fixture
def network(bpffs: Path, program: Path, request: pytest.FixtureRequest) -> Iterator[Network]:
    name = re.sub(r"\W", "_", request.node.name)
    made = Network(bpffs / name, program)
    yield made
    made.close()
    if made.pin_dir.exists():
        for path in made.pin_dir.iterdir():
            path.unlink()
        made.pin_dir.rmdir()


@pytest.fixture(autouse=True, params=["tcx", "clsact"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test once with each way of attaching to an interface."""
    tcx = request.param == "tcx"
    if tcx and not bpf.has_tcx():
        pytest.skip("the kernel has no tcx (Linux 6.6)")
    monkeypatch.setattr(bpf, "has_tcx", lambda: tcx)


@pytest.fixture
def gate(network: Network) -> Gate:
    opened = network.open()
    opened.set_ports(0, [Port("tcp", PORT), Port("udp", PORT)])
    return opened


@families
@paths
def test_activity_is_of_declared_ports_only(
    network: Network, gate: Gate, family: socket.AddressFamily, through: str
) -> None:
    assert gate.activity(0) == Activity(0, 0, 0, 0)
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        before = gate.activity(0)
        start = time.monotonic_ns()
        for port in (OTHER_PORT, PORT):
            server = network.server(family, kind, port)
            caller = network.caller(family, kind, through, port)
            if kind == socket.SOCK_DGRAM:
                caller.send(b"x")
            arrived = functools.partial(readable, server)
            until(arrived, f"traffic to port {port}")
            seen = gate.activity(0)
            if port == OTHER_PORT:
                assert seen == before
        assert start - COARSE_NS <= seen.last_ns <= time.monotonic_ns()
        assert seen.packets > before.packets
    assert gate.activity(1) == Activity(0, 0, 0, 0)
    assert seen.held == seen.dropped == 0


@families
@paths
def test_hold_delays_a_new_connection(
    network: Network, gate: Gate, family: socket.AddressFamily, through: str
) -> None:
    gate.set_mode(0, Mode.HOLD)
    client = network.caller(family, socket.SOCK_STREAM, through)  # nobody listens yet
    held(gate, 1)
    assert not connected(client)
    network.server(family, socket.SOCK_STREAM)
    gate.set_mode(0, Mode.OPEN)
    start = time.monotonic()
    assert gate.release(0, accept=True) == 1
    until(lambda: connected(client), "the held connection")
    # Before the client's first retransmission, which comes after a second.
    assert time.monotonic() - start < 0.5
    assert network.resets() == 0


@families
@paths
def test_hold_delays_data_of_an_established_connection(
    network: Network, gate: Gate, family: socket.AddressFamily, through: str
) -> None:
    client, server = network.connection(family, through)
    gate.set_mode(0, Mode.HOLD)
    client.send(b"hello")
    held(gate, 1)
    assert not readable(server)
    server.send(b"push")  # what the pod sends is not held
    assert received(client) == b"push"
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) >= 1
    assert received(server) == b"hello"
    assert network.resets() == 0


@families
@paths
def test_drop_is_silent(
    network: Network, gate: Gate, family: socket.AddressFamily, through: str
) -> None:
    client, server = network.connection(family, through)
    gate.set_mode(0, Mode.DROP)
    client.send(b"late")
    newcomer = network.caller(family, socket.SOCK_STREAM, through)
    until(lambda: gate.activity(0).dropped >= 2, "both packets to be dropped")
    assert not readable(server)
    assert not connected(newcomer)
    assert failure(client) == failure(newcomer) == 0
    assert gate.receive() == gate.activity(0).held == 0
    gate.set_mode(0, Mode.OPEN)
    assert received(server) == b"late"  # repeated by the client's TCP
    assert network.resets() == 0


def test_without_the_gate_the_pod_would_reset(network: Network, gate: Gate) -> None:
    """The control of all others: resets do happen, and are counted, without hold."""
    client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
    until(lambda: failure(client) == errno.ECONNREFUSED, "the refusal")
    assert network.resets() == 1


def test_packets_of_criu_pass_unseen(network: Network, gate: Gate) -> None:
    """CRIU fakes a peer's FIN or ACK over lo, marked 0xC114, while the gate is closed."""
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0xC114)
    for mode in (Mode.HOLD, Mode.DROP):
        gate.set_mode(0, mode)
        caller.send(b"x")
        assert received(server) == b"x"
    assert gate.activity(0) == Activity(0, 0, 0, 0)


def test_bulk_data_survives_a_hold(network: Network, gate: Gate) -> None:
    client, server = network.connection(socket.AF_INET, "veth")
    gate.set_mode(0, Mode.HOLD)
    data = os.urandom(1 << 20)
    sent = client.send(data)
    held(gate, 1)
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    arrived = b""
    while len(arrived) < sent:
        arrived += received(server, 1 << 20)
    assert arrived == data[:sent]


def test_release_keeps_the_order_of_arrival(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, 33, 4 << 20)  # SO_RCVBUFFORCE: room for all
    gate.set_mode(0, Mode.HOLD)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    messages = [b"%d" % number for number in range(600)]  # more than one receive takes
    for message in messages[:300]:
        caller.send(message)
    gate.receive()
    for message in messages[300:]:
        caller.send(message)
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == len(messages)
    assert [received(server) for _ in messages] == messages
    assert gate.release(0, accept=True) == 0


def test_release_can_drop(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"lost")
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=False) == 1
    caller.send(b"kept")
    assert received(server) == b"kept"


def test_late_packets_of_an_open_owner_pass_at_once(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo").send(b"late")
    until(lambda: readable(gate), "the held packet")
    gate.set_mode(0, Mode.OPEN)
    assert gate.receive() == 0
    assert received(server) == b"late"


def test_late_packets_do_not_overtake_held_ones(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"first")
    held(gate, 1)
    caller.send(b"second")
    gate.set_mode(0, Mode.OPEN)
    assert gate.receive() == 0
    assert not readable(server)
    assert gate.release(0, accept=True) == 2
    assert [received(server), received(server)] == [b"first", b"second"]


def test_held_packets_are_bounded_in_number_and_bytes(network: Network, gate: Gate) -> None:
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    gate.limit(5, 1 << 20)
    gate.set_mode(0, Mode.HOLD)
    for _ in range(20):
        caller.send(b"x")
    seen = gate.activity(0)
    assert (seen.packets, seen.held, seen.dropped) == (20, 5, 15)
    assert gate.release(0, accept=False) == 5
    caller.send(b"x")  # released or not: the allowance is for one closing
    assert gate.activity(0).dropped == 16
    gate.set_mode(0, Mode.OPEN)
    gate.set_mode(0, Mode.HOLD)
    for _ in range(6):
        caller.send(b"x")
    assert gate.release(0, accept=False) == 5

    gate.set_mode(0, Mode.OPEN)
    gate.limit(1000, 30_000)
    gate.set_mode(0, Mode.HOLD)
    for _ in range(10):
        caller.send(bytes(10_000))
    assert gate.release(0, accept=False) == 3


def test_shared_port_waits_for_every_owner(network: Network, gate: Gate) -> None:
    gate.set_ports(1, [Port("udp", PORT)])
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.set_mode(1, Mode.HOLD)
    caller.send(b"first")
    until(lambda: readable(gate), "the held packet")
    assert gate.receive() == 0b10  # owner 0 is awake and need not be told
    gate.set_mode(0, Mode.HOLD)
    gate.set_mode(1, Mode.OPEN)
    assert gate.release(1, accept=True) == 0
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 1
    assert received(server) == b"first"
    assert gate.activity(0).packets == gate.activity(1).packets == 1

    gate.set_mode(0, Mode.HOLD)
    gate.set_mode(1, Mode.DROP)
    caller.send(b"second")
    assert gate.activity(1).dropped == 1
    assert gate.receive() == 0


def test_ignored_and_shadow_ports_do_not_count(network: Network, gate: Gate) -> None:
    gate.set_ports(0, [Port("tcp", PORT, Use.IGNORED), Port("tcp", OTHER_PORT, Use.SHADOW)])
    client, server = network.connection(socket.AF_INET, "veth")
    shadow_server = network.server(socket.AF_INET, socket.SOCK_STREAM, OTHER_PORT)
    shadow_client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    shadow = network.accept(shadow_server)
    shadow_server.close()
    gate.set_mode(0, Mode.HOLD)
    client.send(b"x")
    shadow_client.send(b"x")
    until(lambda: gate.activity(0).dropped >= 2, "both packets to be dropped")
    assert not readable(server)
    assert not readable(shadow)
    assert network.resets() == 0
    refused = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: failure(refused) == errno.ECONNREFUSED, "the refusal")
    seen = gate.activity(0)
    assert seen.last_ns == seen.packets == seen.held == 0


def test_ports_can_change_and_are_bounded(network: Network, gate: Gate) -> None:
    gate.set_ports(0, [Port("udp", OTHER_PORT)])
    assert gate.ports(0) == [Port("udp", OTHER_PORT)]
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    caller.send(b"x")
    assert gate.activity(0).packets == 0
    with pytest.raises(TooManyPortsError, match="declare fewer"):
        gate.set_ports(1, [Port("tcp", number) for number in range(1, 1100)])
    with pytest.raises(ValueError, match="owner 16"):
        gate.set_ports(16, [])
    with pytest.raises(ValueError, match="port 65536"):
        gate.set_ports(0, [Port("tcp", 65536)])
    with pytest.raises(ValueError, match="two uses"):
        gate.set_ports(0, [Port("tcp", 1), Port("tcp", 1, Use.IGNORED)])


def test_ended_owner_leaves_nothing(network: Network, gate: Gate) -> None:
    gate.set_ports(1, [Port("udp", PORT)])
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"shared")
    gate.set_ports(1, [])
    caller.send(b"alone")
    gate.receive()
    gate.drop_owner(0)
    assert received(server) == b"shared"
    assert not readable(server)
    assert gate.activity(0) == Activity(0, 0, 0, 0)
    assert gate.mode(0) is Mode.OPEN
    assert gate.ports(0) == []
    caller.send(b"x")
    assert gate.activity(0).packets == 0


DAEMON = """
import pathlib, signal, sys
from architect.adapters.gate import Gate, Mode, Port
gate = Gate.open(*map(pathlib.Path, sys.argv[1:4]))
gate.set_ports(3, [Port("tcp", {port})])
gate.set_mode(3, Mode.HOLD)
print("ready", flush=True)
signal.pause()
"""


def test_killed_daemon_drops_and_its_successor_takes_over(network: Network) -> None:
    arguments = [f"/proc/{os.getpid()}/fd/{network.pod}", network.pin_dir, network.program]
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON.format(port=PORT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with daemon, contextlib.ExitStack() as closing:
        closing.callback(daemon.kill)
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        with pytest.raises(GateBusyError, match="another process reads it"):
            network.open()
        client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
        counters = bpf.PerCpuMap(
            bpf.open_pinned(network.pin_dir / "traffic"), struct.Struct("=I"), struct.Struct("=4Q")
        )
        until(lambda: sum(seen[2] for seen in counters[3]) == 1, "the SYN to be held")
        daemon.send_signal(signal.SIGKILL)
    orphan = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")  # nobody reads
    until(lambda: sum(seen[2] for seen in counters[3]) == 2, "the second SYN to be marked")
    os.close(counters.descriptor)
    assert failure(client) == failure(orphan) == 0
    assert network.resets() == 0

    gate = network.open()
    assert gate.mode(3) is Mode.HOLD
    assert gate.mode(0) is Mode.OPEN
    assert gate.ports(3) == [Port("tcp", PORT)]
    assert gate.activity(3).packets == 2
    network.server(socket.AF_INET, socket.SOCK_STREAM)
    held(gate, 4, owner=3)  # both clients repeat their SYN
    gate.set_mode(3, Mode.OPEN)
    gate.release(3, accept=True)
    until(lambda: connected(client) and connected(orphan), "both connections")
    assert network.resets() == 0


def program_pins(network: Network) -> set[str]:
    """Names of all pins but those of links to interfaces."""
    names = {path.name for path in network.pin_dir.iterdir()}
    return {name for name in names if not name.startswith("ingress-")}


def test_new_release_takes_over_with_its_own_program(
    network: Network, gate: Gate, tmp_path: Path
) -> None:
    gate.set_mode(0, Mode.DROP)
    gate.close(remove=False)
    before = program_pins(network)
    network.program = tmp_path / "gate.bpf.o"
    (original,) = (ROOT / "build/native").glob("gate.bpf.o")
    network.program.write_bytes(original.read_bytes() + b"\0")
    successor = network.open()
    after = program_pins(network)
    assert len(before) == len(after) == 7
    assert len(before & after) == 5  # the maps
    assert successor.mode(0) is Mode.DROP
    network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo").send(b"x")
    assert successor.activity(0).dropped == 1


def rules_are_there(network: Network) -> bool:
    """Whether anything in the pod queues packets, whichever backend put it there."""
    tools = ("nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save")
    return any("queue" in network.in_pod(tool).lower() for tool in tools)


def test_rules_are_there_only_while_an_owner_holds(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    assert not rules_are_there(network)
    for _ in range(2):
        gate.set_mode(0, Mode.HOLD)
        gate.set_mode(1, Mode.HOLD)
        gate.set_mode(1, Mode.OPEN)
        assert rules_are_there(network)
        caller.send(b"held")
        held(gate, 1)
        assert not gate.withdraw()
        gate.set_mode(0, Mode.OPEN)
        assert not gate.withdraw()  # with the packet, what follows it may still be on its way
        assert gate.release(0, accept=True) == 1
        assert gate.withdraw()
        assert not rules_are_there(network)
        assert "chain PREROUTING" not in network.in_pod("nft list ruleset")
        assert received(server) == b"held"
        caller.send(b"passes")
        assert received(server) == b"passes"


def test_successor_knows_whether_the_rules_are_there(network: Network, gate: Gate) -> None:
    gate.set_mode(0, Mode.HOLD)
    gate.close(remove=False)
    holding = network.open()
    assert rules_are_there(network)
    holding.set_mode(0, Mode.OPEN)
    holding.close(remove=False)
    opened = network.open()
    assert rules_are_there(network)
    assert opened.withdraw()
    assert not rules_are_there(network)


def test_resting_filters_are_off_the_way_and_back_in_time(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    for count in range(2):
        assert gate.rest()
        start = time.monotonic_ns()
        caller.send(b"unseen")
        assert received(server) == b"unseen"
        seen = gate.activity(0)
        assert seen.packets == count
        assert start <= seen.last_ns  # nobody looks, so it is taken for active
        assert gate.repair() == []
        before = time.monotonic_ns()
        gate.watch()
        assert before <= gate.activity(0).last_ns <= time.monotonic_ns()
        caller.send(b"seen")
        assert received(server) == b"seen"
        assert gate.activity(0).packets == count + 1
    for mode in (Mode.HOLD, Mode.DROP):
        assert gate.rest()
        gate.set_mode(0, mode)
        assert not gate.rest()
        caller.send(b"not let through")
        until(lambda: gate.activity(0).packets >= 3, "the packet to be seen")
        assert not readable(server)
        gate.receive()
        gate.set_mode(0, Mode.OPEN)
        gate.release(0, accept=False)
    assert gate.rest()
    gate.close(remove=False)
    successor = network.open()
    caller.send(b"seen by the successor")
    assert received(server) == b"seen by the successor"
    assert successor.activity(0).packets == 5


def test_repair_puts_back_what_is_missing(network: Network, gate: Gate) -> None:
    gate.set_mode(1, Mode.HOLD)
    assert gate.repair() == []
    backends = {family: netfilter.probe(family, RULE).backend for family in netfilter.Family}
    with netns.entered(network.pod):
        for family, backend in backends.items():
            netfilter.remove(backend, family, RULE)
    if bpf.has_tcx():
        for link in network.pin_dir.glob("ingress-*"):
            link.unlink()
    else:
        network.in_pod("tc filter del dev lo ingress")
        network.in_pod("tc qdisc del dev eth0 clsact")
    network.in_pod("ip link add eth1 type veth peer name eth2")
    (network.pin_dir / "ports").unlink()
    expected = {
        "filter on eth0",
        "filter on eth1",
        "filter on eth2",
        "filter on lo",
        "IPv4 rule",
        "IPv6 rule",
        "pin ports",
    }
    assert set(gate.repair()) == expected
    assert gate.repair() == []
    gate.set_mode(0, Mode.HOLD)
    for number, address_family in enumerate(POD):
        network.caller(address_family, socket.SOCK_DGRAM, "veth").send(b"x")
        held(gate, number + 1)


def test_repair_notices_a_flushed_chain(network: Network, gate: Gate) -> None:
    """What `iptables -F` by a user does, whichever backend the rule is in."""
    gate.set_mode(1, Mode.HOLD)
    for family, tool in ((netfilter.Family.IPV4, "iptables"), (netfilter.Family.IPV6, "ip6tables")):
        backend = netfilter.probe(family, RULE).backend
        if backend is netfilter.Backend.NFT:
            network.in_pod("nft flush ruleset")
        else:
            suffix = backend.value.removeprefix("iptables")
            network.in_pod(f"{tool}{suffix} -t mangle -F")
    assert gate.repair() == ["IPv4 rule", "IPv6 rule"]


def test_repair_and_release_keep_other_peoples_packets(network: Network, gate: Gate) -> None:
    """The probe datagram of a repair must not swallow what is being held."""
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"held")
    assert gate.repair() == []
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 1
    assert received(server) == b"held"


def test_removed_gate_leaves_nothing(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    caller.send(b"held")
    gate.close(remove=True)
    gate.close(remove=False)  # harmless
    assert received(server) == b"held"
    assert not network.pin_dir.exists()
    for device in ("lo", "eth0"):
        assert network.in_pod(f"tc filter show dev {device} ingress") == ""
    for tool in ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save"):
        assert "NFQUEUE" not in network.in_pod(tool)
    assert "queue" not in network.in_pod("ip6tables-legacy-save")
    with pytest.raises(GateError, match="is closed"):
        gate.fileno()


def test_other_filters_stay(network: Network) -> None:
    first = network.open()
    with netns.entered(network.pod):
        index = socket.if_nametoindex("eth0")
        other = bpf.IngressFilter(index, handle=5, priority=3)
        (pinned,) = network.pin_dir.glob("gate_raw-*")
        descriptor = bpf.open_pinned(pinned)
        other.attach(descriptor)
        os.close(descriptor)
        number = other.attached()
        assert number is not None
        assert first.repair() == []
        first.close(remove=True)
        assert other.attached() == number
        other.detach()


def test_ipv6_extension_headers_are_skipped(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET6, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET6, socket.SOCK_DGRAM, "veth")
    padding = b"\0\0\1\4\0\0\0\0"  # next header, length, PadN of four bytes
    caller.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, padding)
    caller.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_DSTOPTS, padding)
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"x")
    held(gate, 1)
    gate.release(0, accept=True)
    assert received(server) == b"x"


@families
def test_fragments_are_held_by_the_first(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    server = network.server(family, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    # Later fragments begin with what would be the port, were there a header.
    data = struct.pack("!H", PORT) * 2000
    network.caller(family, socket.SOCK_DGRAM, "veth").send(data)
    held(gate, 1)
    assert not readable(server)
    assert gate.activity(0).packets == 1
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    assert received(server) == data


def test_vlan_packets_are_held_once(network: Network, gate: Gate) -> None:
    for namespace, address in ((network.pod, "10.98.8.2"), (network.client, "10.98.8.1")):
        with netns.entered(namespace):
            add = ["ip", "link", "add", "link", "eth0", "name", "vlan5", "type", "vlan", "id", "5"]
            made = subprocess.run(add, check=False, capture_output=True)
            if made.returncode:
                pytest.skip("the kernel has no VLAN devices (CONFIG_VLAN_8021Q)")
            command(f"ip address add {address}/24 dev vlan5")
            netns.bring_up("vlan5")
    assert gate.repair() == ["filter on vlan5"]
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    caller = network.make_socket(network.client, socket.AF_INET, socket.SOCK_DGRAM)
    caller.sendto(b"tagged", ("10.98.8.2", PORT))
    held(gate, 1)
    assert gate.activity(0).held == 1
    assert gate.release(0, accept=True) == 1
    assert received(server) == b"tagged"


def test_interfaces_without_ethernet_header(network: Network, gate: Gate) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("the kernel has no tun devices (/dev/net/tun)")
    with netns.entered(network.pod):
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
        # TUNSETIFF with IFF_TUN | IFF_NO_PI, see <linux/if_tun.h>.
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun0", 0x1001))
        command("ip address add 10.98.9.1/24 dev tun0")
        netns.bring_up("tun0")
    assert gate.repair() == ["filter on tun0"]
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    udp = struct.pack("!HHHH", 4000, PORT, 8 + 3, 0) + b"tun"
    ends = socket.inet_aton("10.98.9.2") + socket.inet_aton("10.98.9.1")
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0) + ends
    total = sum(struct.unpack("!10H", header))
    checksum = ~((total & 0xFFFF) + (total >> 16)) & 0xFFFF
    os.write(tun, header[:10] + struct.pack("!H", checksum) + header[12:] + udp)
    held(gate, 1)
    gate.release(0, accept=True)
    assert received(server) == b"tun"
    os.close(tun)


def test_changing_the_mode_takes_microseconds(gate: Gate) -> None:
    times = []
    for number in range(200):
        start = time.perf_counter()
        gate.set_mode(0, Mode(1 + number % 2))
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.0001


def test_every_reported_backend_works() -> None:
    for family in netfilter.Family:
        support = netfilter.probe(family, RULE)
        assert support.backend in support.backends
        assert {*support.backends, *support.reasons} == set(netfilter.Backend)
        for backend in support.backends:
            with netns.scratch():
                queue = nfqueue.Queue(RULE.queue, capacity=8, buffer_bytes=1 << 16)

                def arrived(queue: nfqueue.Queue = queue) -> bool:
                    packets = queue.receive(8)
                    queue.decide([packet.id for packet in packets], accept=False)
                    return any(packet.mark == RULE.mark for packet in packets)

                for rule_is_there in (False, True, False):
                    if rule_is_there:
                        netfilter.install(backend, family, RULE)
                    else:
                        netfilter.remove(backend, family, RULE)
                    assert netfilter.present(backend, family, RULE) is rule_is_there
                    reached = netfilter.reach(family, RULE, queue.fileno(), arrived)
                    assert (reached is netfilter.Reach.QUEUED) is rule_is_there
                queue.close()


def test_machine_without_any_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netfilter, "_find", lambda program: None)
    support = netfilter.probe.__wrapped__(netfilter.Family.IPV4, RULE)
    with pytest.raises(netfilter.NoBackendError, match=r"nft is not installed.*install iptables"):
        _ = support.backend


def test_errors_say_what_to_do(network: Network, bpffs: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="not on a bpf file system"):
        Gate.open(network.pod, tmp_path, network.program)
    with pytest.raises(GateError, match="has the pod ended"):
        Gate.open(Path("/proc/0/ns/net"), network.pin_dir, network.program)
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"not an object")
    with pytest.raises(GateError, match=r"cannot read .*rebuild it"):
        Gate.open(network.pod, network.pin_dir, broken)


def test_thread_is_back_home_after_an_error(network: Network) -> None:
    visited = []

    def fail() -> None:
        visited.append(Path("/proc/thread-self/ns/net").readlink())
        raise RuntimeError

    home = Path("/proc/thread-self/ns/net").readlink()
    with pytest.raises(RuntimeError), netns.entered(network.pod):
        fail()
    assert visited != [home]
    assert Path("/proc/thread-self/ns/net").readlink() == home


def test_structures_have_the_sizes_that_libbpf_knows() -> None:
    assert ctypes.sizeof(bpf._TcHook) == 24
    assert ctypes.sizeof(bpf._TcOptions) == 32
