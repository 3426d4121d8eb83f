"""What the traffic gate counts, holds, drops and lets through, with real sockets, kernel and all."""

import errno
import fcntl
import functools
import os
import socket
import struct
import subprocess
import time
from pathlib import Path

import pytest

from architect.adapters import netns
from architect.adapters.gate import Activity, Gate, Mode, TooManyPortsError
from architect.decisions.ports import Port, Use
from tests.engine.gate.podnet import (
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

OTHER_PORT = 7001
COARSE_NS = 10_000_000
"""How late the gate's clock may be: a tick of the kernel, at its slowest."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
paths = pytest.mark.parametrize("through", ["veth", "lo"])


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
    shadow_client.send(b"x")
    until(lambda: gate.activity(0).dropped >= 1, "the packet to be dropped")
    gate.set_absent(0)
    client.send(b"x")
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
