"""Holding what is no plain packet: super-packets, SYNs with cookies or data, fragmented datagrams."""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from architect.adapters import netns
from architect.adapters.gate import Gate, Mode
from tests.engine.gate.podnet import (
    POD,
    PORT,
    Network,
    connected,
    failure,
    held,
    readable,
    received,
    until,
)

MTU = 1500
MEGABYTE = 1 << 20
WARM_BYTES = PORTION_BYTES = 2 * MEGABYTE
FLIGHT_BYTES = 128 * 1024
"""Less than a congestion window that has been opened."""
HOLDS = 3
"""How often a stream is held: within a window, and as often within more than that."""
SEGMENT = 1200
"""Bytes of a datagram of QUIC, which sends several as one packet (udp(7), UDP_SEGMENT)."""

SO_RCVBUFFORCE = 33
UDP_SEGMENT = 103
HEADERS = {socket.AF_INET: 20, socket.AF_INET6: 40}
EVERY_PROTOCOL = 0x0003
"""ETH_P_ALL of <linux/if_ether.h>: a look before the gate's."""
OUTGOING = 4
"""PACKET_OUTGOING of <linux/if_packet.h>."""
SIOCETHTOOL = 0x8946
STSO, SGSO, SGRO = 0x1F, 0x24, 0x2C
"""ETHTOOL_STSO and its like, of <linux/ethtool.h>."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)


def sysctl(namespace: int, name: str, value: int) -> None:
    with netns.entered(namespace):
        Path("/proc/sys/net/ipv4", name).write_text(str(value))


def counters(namespace: int) -> dict[str, int]:
    """What the kernel has counted of a namespace's TCP (proc(5), /proc/net/netstat)."""
    with netns.entered(namespace):
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split()[1:] for line in lines if line.startswith("TcpExt:"))
    return dict(zip(names, map(int, values), strict=True))


def queue_losses(network: Network) -> int:
    """Packets that the kernel could not queue, or not tell us of (nfqnl_rcv_dev_event and its like)."""
    with netns.entered(network.pod):
        queues = Path("/proc/thread-self/net/netfilter/nfnetlink_queue").read_text()
    return sum(int(words[5]) + int(words[6]) for words in map(str.split, queues.splitlines()))


def open_gate(gate: Gate) -> int:
    """Let the owner's packets pass; return how many waited."""
    gate.set_mode(0, Mode.OPEN)
    return gate.release(0, accept=True)


# ---- super-packets ------------------------------------------------------------------------------------


def set_offload(namespace: int, which: int, *, on: bool) -> None:
    """Set one offload of eth0, as ethtool(8) does (ETHTOOL_STSO and its like take struct ethtool_value)."""
    value = ctypes.create_string_buffer(struct.pack("=II", which, on), 8)
    request = struct.pack("16sP16x", b"eth0", ctypes.addressof(value))
    with netns.entered(namespace), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCETHTOOL, request)


class Lengths:
    """Looks at how long the packets are that reach the pod."""

    def __init__(self, network: Network) -> None:
        with netns.entered(network.pod):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
        network.sockets.append(self._socket)
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, 8 * MEGABYTE)
        self._socket.setblocking(False)
        with netns.entered(network.pod):
            self._socket.bind(("eth0", EVERY_PROTOCOL))
        self._seen: list[int] = []

    def seen(self) -> list[int]:
        """Return those of all that have come since the last `forget`."""
        buffer = bytearray(64)
        while readable(self._socket):
            size, sender = self._socket.recvfrom_into(buffer, 0, socket.MSG_TRUNC)
            if sender[2] != OUTGOING:
                self._seen.append(size)
        return self._seen

    def forget(self) -> None:
        """Begin anew."""
        self.seen().clear()


class Stream:
    """A long stream from a client to the pod, of which the test has both ends."""

    def __init__(self, client: socket.socket, server: socket.socket) -> None:
        self.data = os.urandom(WARM_BYTES + HOLDS * (FLIGHT_BYTES + PORTION_BYTES))
        self.arrived = bytearray()
        self._client, self._server = client, server
        self._sent = 0

    def push(self, end: int) -> None:
        """Send up to this place, as far as the client's kernel takes it."""
        with contextlib.suppress(BlockingIOError):
            while self._sent < end:
                self._sent += self._client.send(memoryview(self.data)[self._sent : end])

    def reaches(self, end: int) -> Callable[[], bool]:
        """A condition: all up to this place has arrived, for which both sides do what they can."""

        def there() -> bool:
            self.push(end)
            while readable(self._server):
                self.arrived += self._server.recv(MEGABYTE)
            return len(self.arrived) == end

        return there


def hold_up_to(end: int, gate: Gate, stream: Stream, lengths: Lengths) -> None:
    count = gate.activity(0).held
    arrived = len(stream.arrived)
    lengths.forget()
    gate.set_mode(0, Mode.HOLD)
    stream.push(end)
    held(gate, count + 1)
    assert not stream.reaches(end)()
    assert len(stream.arrived) == arrived
    assert max(lengths.seen()) > 4 * MTU, "no super-packet was held"


@families
@pytest.mark.parametrize("how", ["segmented late", "aggregated on arrival"])
def test_super_packets_of_a_bulk_sender_are_held_whole(
    network: Network, gate: Gate, family: socket.AddressFamily, how: str
) -> None:
    if how == "aggregated on arrival":
        for which in (STSO, SGSO):
            set_offload(network.client, which, on=False)
        try:
            set_offload(network.pod, SGRO, on=True)
        except OSError as error:
            pytest.skip(f"this kernel's veth does not aggregate what arrives: {error}")
    sysctl(network.client, "tcp_slow_start_after_idle", 0)
    client, server = network.connection(family, "veth")
    stream, lengths = Stream(client, server), Lengths(network)
    end = WARM_BYTES
    until(stream.reaches(end), "the congestion window to open")
    before = counters(network.pod)
    for _ in range(HOLDS):
        end += FLIGHT_BYTES
        hold_up_to(end, gate, stream, lengths)
        until(lambda: sum(lengths.seen()) > FLIGHT_BYTES, "the whole flight to be held")
        open_gate(gate)
        until(stream.reaches(end), "what was held")
        assert counters(network.pod)["TCPOFOQueue"] == before["TCPOFOQueue"], "out of order"
    for _ in range(HOLDS):  # and in the midst of more than the window takes
        end += PORTION_BYTES
        hold_up_to(end, gate, stream, lengths)
        open_gate(gate)
        until(stream.reaches(end), "the stream to go on")
    assert stream.arrived == stream.data[:end]
    assert gate.activity(0).dropped == queue_losses(network) == 0
    assert network.resets() == 0


@families
def test_datagrams_that_are_sent_as_one_packet_are_held_as_one(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    server = network.server(family, socket.SOCK_DGRAM)
    caller = network.caller(family, socket.SOCK_DGRAM, "veth")
    try:
        caller.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, SEGMENT)
    except OSError as error:
        pytest.skip(
            f"this kernel cannot send several datagrams as one packet (Linux 4.18): {error}"
        )
    lengths = Lengths(network)
    gate.set_mode(0, Mode.HOLD)
    datagrams = [bytes([number]) * SEGMENT for number in range(10)]
    caller.send(b"".join(datagrams))
    held(gate, 1)
    assert gate.activity(0).held == 1
    assert max(lengths.seen()) > 10 * SEGMENT
    assert not readable(server)
    assert open_gate(gate) == 1
    assert [received(server) for _ in datagrams] == datagrams
    assert not readable(server)


# ---- SYNs that are more than a SYN -----------------------------------------------------------------------


@families
def test_held_syn_is_answered_with_a_cookie(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """As by a listener whose backlog has overflown; 2 has the kernel do it for every SYN (ip-sysctl.rst)."""
    sysctl(network.pod, "tcp_syncookies", 2)
    before = counters(network.pod)
    gate.set_mode(0, Mode.HOLD)
    client = network.caller(family, socket.SOCK_STREAM, "veth")
    held(gate, 1)
    assert not connected(client)
    server = network.server(family, socket.SOCK_STREAM)
    assert open_gate(gate) == 1
    until(lambda: connected(client), "the held connection")
    accepted = network.accept(server)
    client.send(b"ping")
    assert received(accepted) == b"ping"
    accepted.send(b"pong")
    assert received(client) == b"pong"
    after = counters(network.pod)
    for name in ("SyncookiesSent", "SyncookiesRecv"):
        assert after[name] == before[name] + 1, name
    assert after["SyncookiesFailed"] == before["SyncookiesFailed"]
    assert counters(network.client)["TCPSynRetrans"] == 0
    assert network.resets() == 0


@families
def test_acknowledgement_of_a_cookie_is_held(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """It is all that there is of its connection: the kernel has kept nothing of the SYN."""
    sysctl(network.pod, "tcp_syncookies", 2)
    server = network.server(family, socket.SOCK_STREAM)
    gate.set_mode(0, Mode.HOLD)
    client = network.caller(family, socket.SOCK_STREAM, "veth")
    held(gate, 1)
    assert gate.release(0, accept=True) == 1  # which passes, though the gate holds on
    until(lambda: connected(client), "the answer with a cookie")
    client.send(b"ping")
    held(gate, 3)
    assert not readable(server)
    assert open_gate(gate) == 2
    assert received(network.accept(server)) == b"ping"
    assert counters(network.pod)["SyncookiesRecv"] == 1
    assert counters(network.client)["TCPSynRetrans"] == 0
    assert network.resets() == 0


def fast_server(network: Network, family: socket.AddressFamily) -> socket.socket:
    server = network.server(family, socket.SOCK_STREAM)
    server.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 16)
    return server


def fast_caller(network: Network, family: socket.AddressFamily, data: bytes) -> socket.socket:
    """A socket that has sent its data along with its SYN, if it has a cookie for that (tcp(7))."""
    caller = network.make_socket(network.client, family, socket.SOCK_STREAM)
    with contextlib.suppress(
        BlockingIOError
    ):  # without a cookie it connects first, and takes no data
        caller.sendto(data, socket.MSG_FASTOPEN, (POD[family], PORT))
    return caller


@families
@pytest.mark.parametrize("syns", [1, 2], ids=["once", "sent again"])
def test_syn_with_data_is_held_and_answered_once(
    network: Network, gate: Gate, family: socket.AddressFamily, syns: int
) -> None:
    for namespace in (network.pod, network.client):
        sysctl(namespace, "tcp_fastopen", 3)
    server = fast_server(network, family)
    first = fast_caller(network, family, b"for a cookie")
    until(lambda: connected(first), "the connection that brings the cookie")
    network.accept(server)
    server.close()

    gate.set_mode(0, Mode.HOLD)
    count = gate.activity(0).held
    client = fast_caller(network, family, b"ask")
    held(gate, count + syns)
    server = fast_server(network, family)
    assert open_gate(gate) == syns
    accepted = network.accept(server)
    assert received(accepted) == b"ask"
    accepted.send(b"answer")
    assert received(client) == b"answer"
    client.send(b"more")
    assert received(accepted) == b"more"
    assert not readable(client)
    assert not readable(server)
    assert counters(network.pod)["TCPFastOpenPassive"] == 1, "the data did not come with the SYN"
    assert counters(network.client)["TCPSynRetrans"] == syns - 1
    assert failure(client) == network.resets() == 0


# ---- long datagrams ---------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("through", ["veth", "lo"])
def test_long_datagrams_are_held_whole(
    network: Network, gate: Gate, family: socket.AddressFamily, through: str
) -> None:
    """Of the MTU's size, in two fragments by one byte, and of 60 KB in over forty."""
    server = network.server(family, socket.SOCK_DGRAM)
    server.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, MEGABYTE)
    caller = network.caller(family, socket.SOCK_DGRAM, through)
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, MEGABYTE)
    full = MTU - HEADERS[family] - 8
    sizes = (full, full + 1, 8 * 1024 + 1, 20_000, 60_000, 1)
    # Later fragments begin with what would be the port, were there a header.
    datagrams = [(struct.pack("!H", PORT) * size)[:size] for size in sizes]
    gate.set_mode(0, Mode.HOLD)
    for datagram in datagrams:
        caller.send(datagram)
    held(gate, len(datagrams))
    assert not readable(server)
    seen = gate.activity(0)
    assert (seen.packets, seen.held, seen.dropped) == (len(sizes), len(sizes), 0)
    assert open_gate(gate) == len(datagrams)
    assert [received(server) for _ in datagrams] == datagrams
    assert failure(caller) == 0
