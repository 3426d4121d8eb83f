"""The capture sees what the tests beside it say is not there: resets, and SYNs that nobody answers."""

import contextlib
import os
import socket
from collections.abc import Iterator

import pytest

from architect.adapters import netns
from tests.engine.servers.capture import Capture
from tests.engine.support import must, wait_until

PEER = "10.98.8.2"
PORT = 7000

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")


@pytest.fixture
def place() -> Iterator[int]:
    """A network namespace whose one interface leads nowhere."""
    with netns.scratch():
        made = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        must("ip", "link", "add", "d0", "type", "veth", "peer", "name", "d1")
        must("ip", "address", "add", "10.98.8.1/24", "dev", "d0")
        for interface in ("d0", "d1"):
            netns.bring_up(interface)
        # Nobody has this address, so what is sent to it gets lost on d1.
        must("ip", "neighbour", "add", PEER, "lladdr", "02:00:00:00:00:01", "dev", "d0")
        yield made
        os.close(made)


def test_reset_is_seen(place: int) -> None:
    with Capture(place, "lo") as capture:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", PORT))
        assert len(capture.resets()) == 1
        assert len(capture.unanswered_openings()) == 1
        assert len(capture.complaints()) == 2


def test_repeated_and_unanswered_syn_is_seen(place: int) -> None:
    with Capture(place, "d0") as capture, socket.socket() as caller:
        caller.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            caller.connect((PEER, PORT))
        wait_until(capture.repeated_openings, "the kernel to send its SYN again", 3)
        assert capture.unanswered_openings()
        assert capture.resets() == []
        assert capture.exchanges("tcp", PORT) == [">" * len(capture.packets)]


def test_what_is_answered_is_no_complaint(place: int) -> None:
    with (
        Capture(place, "lo") as capture,
        socket.create_server(("127.0.0.1", PORT)) as server,
        socket.create_connection(("127.0.0.1", PORT)) as caller,
    ):
        server.accept()[0].close()
        assert caller.recv(1) == b""
        assert capture.complaints() == []
        # On lo each packet passes twice: as it is sent, and as it arrives.
        assert capture.exchanges("tcp", PORT)


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"])
def test_datagrams_are_seen_in_their_order(place: int, family: socket.AddressFamily) -> None:
    host = "127.0.0.1" if family == socket.AF_INET else "::1"
    with Capture(place, "lo") as capture, socket.socket(family, socket.SOCK_DGRAM) as server:
        server.bind((host, 0))
        with socket.socket(family, socket.SOCK_DGRAM) as caller:
            caller.connect(server.getsockname())
            caller.send(b"question")
            server.sendto(b"answer", server.recvfrom(100)[1])
            assert caller.recv(100) == b"answer"
            port, own = server.getsockname()[1], caller.getsockname()[1]
        ends = [(one.outgoing, one.peer_port, one.own_port) for one in capture.packets]
        assert (True, port, own) in ends
        assert (False, port, own) in ends
