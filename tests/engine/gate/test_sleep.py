"""Who sleeps, in the kernel: what of probes, strays and new connections passes; a restart keeps it."""

import errno
import os
import socket
import struct
from pathlib import Path

import pytest

from architect.adapters import netns
from architect.adapters.gate import Activity, Gate, Mode
from architect.decisions.ports import Port, Use
from tests.engine.gate.podnet import (
    PORT,
    Network,
    connected,
    failure,
    held,
    readable,
    received,
    until,
)

OTHER_PORT = 7001
PROBE_CLASS = 0x5C
"""As health-check-proxy sets it, and as native/bpf/gate.bpf.c knows it."""
ECN_ON = "1"
"""net.ipv4.tcp_ecn: asked for by clients, too; the value 2, the usual one, only answers."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
closed = pytest.mark.parametrize("mode", [Mode.HOLD, Mode.DROP])


def prober(
    network: Network,
    family: socket.AddressFamily,
    kind: int,
    through: str = "lo",
    traffic_class: int = PROBE_CLASS,
) -> socket.socket:
    """A socket on its way to the pod's port, whose packets have the traffic class from the first on."""
    made = network.make_socket(network.client if through == "veth" else network.pod, family, kind)
    if family == socket.AF_INET:
        made.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, traffic_class)
    else:
        made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_TCLASS, traffic_class)
    server = {
        ("veth", socket.AF_INET): "10.98.7.2",
        ("veth", socket.AF_INET6): "fd98:7::2",
        ("lo", socket.AF_INET): "127.0.0.1",
        ("lo", socket.AF_INET6): "::1",
    }
    made.connect_ex((server[through, family], PORT))
    return made


def probe(network: Network, family: socket.AddressFamily, through: str = "lo") -> None:
    """A whole probe's connection: opened, used both ways, closed by the prober; and a datagram."""
    server = network.server(family, socket.SOCK_STREAM)
    client = prober(network, family, socket.SOCK_STREAM, through)
    accepted = network.accept(server)
    client.send(b"healthy?")
    assert received(accepted) == b"healthy?"
    accepted.send(b"yes")
    assert received(client) == b"yes"
    client.close()
    until(lambda: readable(accepted) and accepted.recv(1) == b"", "the probe's end")
    accepted.close()
    server.close()
    datagrams = network.server(family, socket.SOCK_DGRAM)
    prober(network, family, socket.SOCK_DGRAM, through).send(b"x")
    assert received(datagrams) == b"x"
    datagrams.close()


@families
def test_probes_over_lo_count_nothing(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    probe(network, family)
    assert gate.activity(0) == Activity(0, 0, 0, 0)


@families
def test_probes_count_nothing_with_congestion_notification(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """ECN uses the two low bits of the same byte (RFC 3168)."""
    with netns.entered(network.pod):
        Path("/proc/sys/net/ipv4/tcp_ecn").write_text(ECN_ON)
    probe(network, family)
    assert gate.activity(0) == Activity(0, 0, 0, 0)


def test_probes_are_known_behind_extension_headers(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET6, socket.SOCK_DGRAM)
    caller = prober(network, socket.AF_INET6, socket.SOCK_DGRAM)
    padding = b"\0\0\1\4\0\0\0\0"  # next header, length, PadN of four bytes
    caller.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_HOPOPTS, padding)
    caller.send(b"x")
    assert received(server) == b"x"
    assert gate.activity(0) == Activity(0, 0, 0, 0)


@families
def test_late_answers_to_a_probe_count_nothing(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """A banner that comes after the probe's end: its kernel's reset has the class of the banner."""
    server = network.server(family, socket.SOCK_STREAM)
    client = prober(network, family, socket.SOCK_STREAM)
    accepted = network.accept(server)
    client.close()
    accepted.send(b"220 mail.example.org")
    until(lambda: failure(accepted) == errno.EPIPE, "the reset")
    assert gate.activity(0) == Activity(0, 0, 0, 0)


def test_aborted_connection_over_lo_wakes(network: Network, gate: Gate) -> None:
    """Its reset must not be lost, or the program would wait for that client for ever."""
    client, server = network.connection(socket.AF_INET, "lo")
    gate.set_mode(0, Mode.HOLD)
    abort(client)
    held(gate, 1)
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    until(lambda: failure(server) == errno.ECONNRESET, "the reset")


@families
def test_other_classes_over_lo_count(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    for count, other in enumerate((0, PROBE_CLASS - 4, PROBE_CLASS + 4, 0xFC), 1):
        prober(network, family, socket.SOCK_DGRAM, traffic_class=other).send(b"x")
        assert gate.activity(0).packets == count


@families
def test_probes_from_outside_are_not_believed(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    probe(network, family, "veth")
    seen = gate.activity(0)
    assert seen.packets >= 5
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0)
    client = prober(network, family, socket.SOCK_STREAM, "veth")
    held(gate, 1)
    assert not connected(client)
    assert failure(client) == 0


@families
@closed
def test_probes_of_a_sleeper(
    network: Network, gate: Gate, family: socket.AddressFamily, mode: Mode
) -> None:
    """Dropped while the program is dumped, refused at once when it is away; nobody is woken."""
    server = network.server(family, socket.SOCK_STREAM)
    before = prober(network, family, socket.SOCK_STREAM)
    accepted = network.accept(server)
    gate.set_mode(0, mode)
    during = prober(network, family, socket.SOCK_STREAM)
    until(lambda: gate.activity(0).dropped >= 1, "the SYN to be dropped")
    assert not connected(during)
    assert failure(during) == 0
    server.close()
    gate.set_absent(0)
    after = prober(network, family, socket.SOCK_STREAM)
    until(lambda: failure(after) == errno.ECONNREFUSED, "the refusal")
    dropped = gate.activity(0).dropped
    before.send(b"late")
    prober(network, family, socket.SOCK_DGRAM).send(b"lost")
    until(lambda: gate.activity(0).dropped >= dropped + 2, "both packets to be dropped")
    assert not readable(accepted)
    assert gate.receive() == 0
    assert gate.activity(0)[:3] == (0, 0, 0)
    gate.set_mode(0, Mode.OPEN)
    assert received(accepted) == b"late"


def abort(client: socket.socket) -> None:
    """Close a connection with a reset (socket(7), SO_LINGER of zero)."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


def more_are_dropped(gate: Gate, before: int) -> None:
    until(lambda: gate.activity(0).dropped > before, "the stray to be dropped")


def test_sleeper_without_connections_is_woken_by_new_ones_only(
    network: Network, gate: Gate
) -> None:
    listener = network.server(socket.AF_INET, socket.SOCK_STREAM)
    pairs = []
    for _ in range(4):
        client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
        pairs.append((client, network.accept(listener)))
    (data, writer), (fin, _), (reset, _), (ack, talker) = pairs
    listener.close()
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0, only_opening=True)

    strays = (
        lambda: data.send(b"late"),
        lambda: fin.shutdown(socket.SHUT_WR),
        lambda: abort(reset),
        lambda: talker.send(b"what the client acknowledges"),
    )
    for stray in strays:
        dropped = gate.activity(0).dropped
        stray()
        more_are_dropped(gate, dropped)
    assert received(ack) == b"what the client acknowledges"
    assert gate.receive() == gate.activity(0).held == 0
    assert not readable(writer)

    network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth").send(b"x")
    held(gate, 1)
    newcomer = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
    held(gate, 2)
    assert failure(newcomer) == failure(data) == 0
    assert network.resets() == 0
    network.server(socket.AF_INET, socket.SOCK_STREAM)
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 2
    until(lambda: connected(newcomer), "the held connection")
    assert received(writer) == b"late"  # repeated by the client's TCP


def test_what_a_sleeper_holds_can_change(network: Network, gate: Gate) -> None:
    client, server = network.connection(socket.AF_INET, "lo")
    with pytest.raises(ValueError, match="owner 0 is open"):
        gate.set_absent(0, only_opening=True)
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0, only_opening=True)
    gate.set_absent(0, only_opening=None)  # as it was
    dropped = gate.activity(0).dropped
    client.send(b"one ")
    more_are_dropped(gate, dropped)
    assert gate.activity(0).held == 0
    gate.set_absent(0, only_opening=False)
    held(gate, 1)  # its repetition
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    assert received(server) == b"one "
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0, only_opening=True)
    gate.set_mode(0, Mode.OPEN)
    gate.set_mode(0, Mode.HOLD)  # the next dump: of the sleep before nothing is left
    count = gate.activity(0).held
    client.send(b"two")
    held(gate, count + 1)
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    assert received(server) == b"two"


def test_strays_are_held_if_another_owner_wants_them(network: Network, gate: Gate) -> None:
    gate.set_ports(1, [Port("tcp", PORT)])
    client, server = network.connection(socket.AF_INET, "veth")
    for owner in (0, 1):
        gate.set_mode(owner, Mode.HOLD)
        gate.set_absent(owner, only_opening=owner == 0)
    client.send(b"for one of them")
    held(gate, 1, owner=1)
    for owner in (0, 1):
        gate.set_mode(owner, Mode.OPEN)
        gate.release(owner, accept=True)
    assert received(server) == b"for one of them"


def asleep(network: Network, gate: Gate) -> None:
    """Owner 0 sleeps without a connection; its shadow port is OTHER_PORT, not translated here."""
    held_before = gate.activity(0).held
    refused = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: failure(refused) == errno.ECONNREFUSED, "the refusal")
    network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
    held(gate, held_before + 1)


@closed
def test_restart_of_the_daemon_keeps_who_sleeps(network: Network, gate: Gate, mode: Mode) -> None:
    gate.set_ports(0, [Port("tcp", PORT), Port("tcp", OTHER_PORT, Use.SHADOW)])
    client, server = network.connection(socket.AF_INET, "veth")
    gate.set_mode(0, mode)
    gate.set_absent(0, only_opening=True)
    gate.close(remove=False)
    orphan = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: failure(orphan) == errno.ECONNREFUSED, "the refusal without a daemon")
    successor = network.open()
    assert successor.mode(0) is mode
    successor.set_mode(0, Mode.HOLD)
    client.send(b"stray")
    until(lambda: successor.activity(0).dropped >= 1, "the stray to be dropped")
    asleep(network, successor)
    assert not readable(server)
    successor.close(remove=False)
    awake = network.open()
    awake.set_mode(0, Mode.OPEN)
    assert received(server) == b"stray"
    awake.set_mode(0, Mode.HOLD)  # the next dump
    before = awake.activity(0)
    client.send(b"waits")
    held(awake, before.held + 1)
    silent = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    more_are_dropped(awake, before.dropped)
    assert failure(silent) == 0


def test_gate_of_an_older_release_is_taken_over(network: Network, gate: Gate) -> None:
    """It has no map `sleeps`; what it knew of modes and ports stays."""
    gate.set_ports(0, [Port("tcp", PORT), Port("tcp", OTHER_PORT, Use.SHADOW)])
    gate.set_mode(0, Mode.HOLD)
    gate.close(remove=False)
    (network.pin_dir / "sleeps").unlink()
    successor = network.open()
    assert (network.pin_dir / "sleeps").exists()
    assert successor.mode(0) is Mode.HOLD
    assert len(successor.ports(0)) == 2
    silent = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: successor.activity(0).dropped == 1, "the SYN to be dropped")
    assert failure(silent) == 0
    successor.set_absent(0, only_opening=True)
    asleep(network, successor)
    successor.close(remove=False)
    asleep(network, network.open())


def test_ended_owner_leaves_no_sleep_to_the_next(network: Network, gate: Gate) -> None:
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0, only_opening=True)
    gate.drop_owner(0)
    gate.set_ports(0, [Port("tcp", PORT), Port("tcp", OTHER_PORT, Use.SHADOW)])
    gate.set_mode(0, Mode.HOLD)
    network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: gate.activity(0).dropped == 1, "the SYN to be dropped")
    assert network.resets() == 0
