"""What is not for a pod's declared ports counts for nothing, wants nobody, and passes in every mode."""

import errno
import os
import socket
import struct

import pytest

from architect.adapters import netns
from architect.adapters.gate import Activity, Gate, Mode
from tests.engine.gate.podnet import (
    CLIENT,
    POD,
    Network,
    command,
    connected,
    failure,
    readable,
    received,
    until,
)

OTHER_PORT = 7001
DNS = 53
NOTHING = Activity(0, 0, 0, 0)
REPLY = {socket.AF_INET: (20, 0), socket.AF_INET6: (0, 129)}
"""Where in a message of a raw socket (raw(7)) the type is, and which is an echo reply's."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)
families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
modes = pytest.mark.parametrize("mode", list(Mode), ids=[mode.name.lower() for mode in Mode])


def ping(network: Network, family: socket.AddressFamily) -> None:
    """Send an echo request (RFC 792, RFC 4443) to the pod and wait for its reply."""
    protocol = socket.IPPROTO_ICMP if family == socket.AF_INET else socket.IPPROTO_ICMPV6
    with netns.entered(network.client):
        raw = socket.socket(family, socket.SOCK_RAW, protocol)
    network.sockets.append(raw)
    raw.setblocking(False)
    # IPv4's checksum is what is left to all ones; of IPv6 the kernel makes it.
    request = (8, 0xF7FF) if family == socket.AF_INET else (128, 0)
    raw.sendto(struct.pack("!BBHHH", request[0], 0, request[1], 0, 0), (POD[family], 0))
    place, reply = REPLY[family]
    # Neighbour discovery is of ICMPv6, so it is heard here, too.
    while received(raw)[place] != reply:
        pass


def check(gate: Gate) -> None:
    """Nothing was seen, and nobody is wanted."""
    assert gate.receive() == 0
    assert gate.activity(0) == NOTHING


@families
@modes
def test_neighbours_find_each_other_and_pings_are_answered(
    network: Network, gate: Gate, family: socket.AddressFamily, mode: Mode
) -> None:
    gate.set_mode(0, mode)
    if mode is not Mode.OPEN:
        gate.set_absent(0)
    for _ in range(3):
        for place in (network.pod, network.client):
            with netns.entered(place):
                command("ip neighbour flush dev eth0")
        ping(network, family)
    check(gate)


@families
@modes
def test_answers_to_what_the_pod_asks_count_for_nothing(
    network: Network, gate: Gate, family: socket.AddressFamily, mode: Mode
) -> None:
    """As those of a name server, and of whoever it has called over TCP."""
    names = network.make_socket(network.client, family, socket.SOCK_DGRAM)
    names.bind((CLIENT[family], DNS))
    called = network.make_socket(network.client, family, socket.SOCK_STREAM)
    called.bind((CLIENT[family], OTHER_PORT))
    called.listen()
    gate.set_mode(0, mode)
    resolver = network.make_socket(network.pod, family, socket.SOCK_DGRAM)
    resolver.sendto(b"question", (CLIENT[family], DNS))
    until(lambda: readable(names), "the question")
    names.sendto(b"answer", names.recvfrom(100)[1])
    assert received(resolver) == b"answer"
    caller = network.make_socket(network.pod, family, socket.SOCK_STREAM)
    assert caller.connect_ex((CLIENT[family], OTHER_PORT)) != 0
    accepted = network.accept(called)
    until(lambda: connected(caller), "the pod's own connection")
    for words in (b"one", b"two"):
        accepted.send(words)
        assert received(caller) == words
    check(gate)


@families
@modes
def test_others_of_the_pod_are_reached(
    network: Network, gate: Gate, family: socket.AddressFamily, mode: Mode
) -> None:
    """A sidecar's port, and one at which nobody listens: refused by the pod's own kernel, as ever."""
    gate.set_mode(0, mode)
    server = network.server(family, socket.SOCK_STREAM, OTHER_PORT)
    client = network.caller(family, socket.SOCK_STREAM, "veth", OTHER_PORT)
    accepted = network.accept(server)
    client.send(b"words")
    assert received(accepted) == b"words"
    nobody = network.caller(family, socket.SOCK_STREAM, "veth", OTHER_PORT + 1)
    until(lambda: failure(nobody) == errno.ECONNREFUSED, "the refusal")
    check(gate)


@families
def test_what_comes_over_lo_while_a_probe_runs_counts_for_nothing(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    gate.set_probed(0, probed=True)
    server = network.server(family, socket.SOCK_DGRAM)
    local = network.caller(family, socket.SOCK_DGRAM, "lo")
    distant = network.caller(family, socket.SOCK_DGRAM, "veth")
    local.send(b"probe")
    assert received(server) == b"probe"
    check(gate)
    distant.send(b"client")
    assert received(server) == b"client"
    assert gate.activity(0).packets == 1, "from outside it is a client, probe or not"
    gate.set_probed(0, probed=False)
    local.send(b"sidecar")
    assert received(server) == b"sidecar"
    assert gate.activity(0).packets == 2
