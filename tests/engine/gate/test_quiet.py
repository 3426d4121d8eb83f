"""Packets that count for nothing wait while a transition runs, wake nobody, and are delivered after it."""

import os
import socket

import pytest

from architect.adapters.gate import Gate, Mode
from architect.adapters.holding import QUIET_PACKETS
from architect.decisions.ports import Port, Use
from tests.engine.gate.podnet import PORT, Network, held, readable, received, until

OTHER_PORT = 7001

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)


@pytest.fixture
def quiet(gate: Gate) -> Gate:
    """A gate whose owner has a quiet port, PORT, and one that counts, OTHER_PORT."""
    gate.set_ports(
        0,
        [
            Port("tcp", PORT, Use.IGNORED),
            Port("udp", PORT, Use.IGNORED),
            Port("udp", OTHER_PORT),
        ],
    )
    return gate


def waits(gate: Gate, packets: int) -> None:
    """Wait until so many packets are held, none of which wants anybody."""

    def seen() -> bool:
        assert gate.receive() == 0
        waiting = gate.waiting(0)
        assert (waiting.packets, waiting.oldest_s) == (0, 0.0)
        return waiting.quiet == packets

    until(seen, f"{packets} packets to wait")


@pytest.mark.parametrize("through", ["veth", "lo"])
@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_quiet_packets_wait_in_a_transition_and_want_nobody(
    network: Network, quiet: Gate, family: socket.AddressFamily, through: str
) -> None:
    client, server = network.connection(family, through)
    quiet.set_mode(0, Mode.HOLD)
    client.send(b"an answer to the program")
    waits(quiet, 1)
    assert not readable(server)
    quiet.set_mode(0, Mode.OPEN)
    assert quiet.release(0, accept=True) == 1
    assert server.recv(100) == b"an answer to the program"  # at once, without a repetition
    assert quiet.activity(0) == (0, 0, 0, 0)


@pytest.mark.parametrize("sleep", [Mode.HOLD, Mode.DROP])
def test_quiet_packets_of_the_transitions_outlive_the_sleep(
    network: Network, quiet: Gate, sleep: Mode
) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    quiet.set_mode(0, Mode.HOLD)
    caller.send(b"during the dump")
    waits(quiet, 1)
    caller.send(b"not taken notice of yet")
    if sleep is Mode.DROP:  # as the daemon does without a monitor
        quiet.set_mode(0, Mode.DROP)
        quiet.release(0, accept=False)
    quiet.set_absent(0)
    caller.send(b"while it sleeps")
    until(lambda: quiet.activity(0).dropped == 1, "the packet to be dropped")
    assert quiet.expire(0.0) == 0
    waits(quiet, 2)
    quiet.set_mode(0, Mode.HOLD)
    quiet.set_present(0)
    caller.send(b"during the restore")
    waits(quiet, 3)
    quiet.set_mode(0, Mode.OPEN)
    assert quiet.release(0, accept=True) == 3
    expected = (b"during the dump", b"not taken notice of yet", b"during the restore")
    assert tuple(received(server) for _ in expected) == expected
    assert not readable(server)


def test_a_sleeper_keeps_few_quiet_packets(network: Network, quiet: Gate) -> None:
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    wanting = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth", OTHER_PORT)
    quiet.limit(QUIET_PACKETS + 20, 1 << 20)
    quiet.set_mode(0, Mode.HOLD)
    for _ in range(QUIET_PACKETS + 20):
        caller.send(b"x")
    waits(quiet, QUIET_PACKETS + 20)
    quiet.set_absent(0)
    waits(quiet, QUIET_PACKETS)
    for _ in range(30):  # what went has given its place in the allowance back
        wanting.send(b"wake up")
    held(quiet, 20)
    assert quiet.activity(0)[2:] == (20, 10)


def test_quiet_packets_are_dropped_where_all_are(network: Network, quiet: Gate) -> None:
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    quiet.set_mode(0, Mode.DROP)
    caller.send(b"x")
    until(lambda: quiet.activity(0).dropped == 1, "the packet to be dropped")
    assert quiet.waiting(0).quiet == 0


def test_wanting_packet_of_another_owner_is_not_missed(network: Network, quiet: Gate) -> None:
    """Opening one owner reads the queue, in which another's packet may be."""
    quiet.set_ports(1, [Port("udp", OTHER_PORT + 1)])
    for owner in (0, 1):
        quiet.set_mode(owner, Mode.HOLD)
    other = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth", OTHER_PORT + 1)
    other.send(b"x")
    until(lambda: quiet.activity(1).held == 1, "the packet to be held")
    quiet.set_mode(0, Mode.OPEN)
    quiet.release(0, accept=True)
    assert quiet.waiting(1).packets == 1
    assert not readable(quiet)
    assert quiet.receive() == 0b10


def test_port_that_counts_for_one_and_not_for_another(network: Network, quiet: Gate) -> None:
    """One mark cannot say both: the packet is dropped, and repeated by who cares."""
    quiet.set_ports(1, [Port("udp", PORT)])
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    for owner in (0, 1):
        quiet.set_mode(owner, Mode.HOLD)
    caller.send(b"x")
    until(lambda: quiet.activity(0).dropped == 1, "the packet to be dropped")
    quiet.set_mode(1, Mode.OPEN)
    caller.send(b"y")
    waits(quiet, 1)
