"""Packets that a queue has held reach the socket anyway, with the bytes that were copied of them."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest

from architect.adapters import home, netfilter, netns, resending
from architect.adapters.nfqueue import Queue
from architect.contract.flows import Flow

OLD, NEW, CLIENT = "10.1.0.7", "10.2.0.9", "10.3.0.4"
RULE = netfilter.Rule(mark=0x51, mask=0xFF, queue=77)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with netns.scratch():
        home.settle(os.getpid(), OLD, NEW, [])
        home.settle(os.getpid(), CLIENT, "10.2.0.10", [])
        yield


@contextlib.contextmanager
def held(client: socket.socket) -> Iterator[Queue]:
    """What a client sends waits, with its bytes; at the end it is lost, and the way is open again."""
    backend = netfilter.probe(netfilter.Family.IPV4, RULE).backend
    queue = Queue(RULE.queue, capacity=64, buffer_bytes=1 << 20)
    queue.copy(on=True)
    netfilter.install(backend, netfilter.Family.IPV4, RULE)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, RULE.mark)
    try:
        yield queue
    finally:
        queue.close()
        netfilter.remove(backend, netfilter.Family.IPV4, RULE)


def retransmissions(connection: socket.socket) -> int:
    """tcpi_total_retrans of struct tcp_info (tcp(7))."""
    raw = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)
    (count,) = struct.unpack_from("I", raw, 100)
    return int(count)


@pytest.mark.parametrize("size", [1, 30_000])
def test_a_tcp_client_need_not_send_again(size: int) -> None:
    with (
        socket.create_server((OLD, 0)) as listener,
        socket.create_connection(listener.getsockname(), source_address=(CLIENT, 0)) as client,
    ):
        server, (_, peer_port) = listener.accept()
        port = listener.getsockname()[1]
        with server:
            server.settimeout(5.0)
            with held(client) as queue:
                client.sendall(b"x" * size)
                packets = [one.data for one in queue.receive(64)]
            flow = Flow("tcp", OLD, port, CLIENT, peer_port)
            assert resending.resend(os.getpid(), packets, {flow: OLD}) == len(packets) > 0
            found = b""
            while len(found) < size:
                found += server.recv(1 << 16)
            assert found == b"x" * size
            assert retransmissions(client) == 0


def test_a_datagram_finds_the_socket() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((OLD, 0))
        server.settimeout(5.0)
        client.bind((CLIENT, 0))
        client.connect(server.getsockname())
        with held(client) as queue:
            client.send(b"one")
            packets = [one.data for one in queue.receive(64)]
        flow = Flow("udp", *server.getsockname(), *client.getsockname())
        assert resending.resend(os.getpid(), packets, {flow: OLD}) == 1
        assert server.recvfrom(10) == (b"one", client.getsockname())


def test_packets_without_copies_have_no_bytes() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client,
    ):
        server.bind((OLD, 0))
        with held(client) as queue:
            queue.copy(on=False)
            client.sendto(b"one", server.getsockname())
            queue.copy(on=True)
            client.sendto(b"two", server.getsockname())
            first, second = queue.receive(64)
        assert first.data == b""
        assert second.data.endswith(b"two")


def test_a_process_that_has_ended_is_an_error() -> None:
    flow = Flow("udp", OLD, 1, CLIENT, 2)
    body = struct.pack("!HHHH", 2, 1, 8, 0)
    head = struct.pack("!BBHHHBBH", 0x45, 0, 28, 1, 0, 64, socket.IPPROTO_UDP, 0)
    packet = head + socket.inet_aton(CLIENT) + socket.inet_aton(OLD) + body
    with pytest.raises(resending.NotResent):
        resending.resend(2**22 - 1, [packet], {flow: OLD})
