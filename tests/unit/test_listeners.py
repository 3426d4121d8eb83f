"""Which connections are open: as the kernel says it of sockets of this process, on loopback."""

from __future__ import annotations

import os
import select
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress

import pytest

from architect.adapters.listeners import (
    Connection,
    _address,
    _translation,
    connections,
    translated,
)

PID = os.getpid()
DEADLINE_S = 5.0

families = pytest.mark.parametrize("address", ["127.0.0.1", "::1"], ids=["ipv4", "ipv6"])


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, or fail saying what was waited for."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {DEADLINE_S} s still waiting for {what}")
        select.select([], [], [], 0.002)


class Pair:
    """A listener, a client that has connected, and its accepted end."""

    def __init__(self, address: str, stack: ExitStack) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = stack.enter_context(socket.create_server((address, 0), family=family))
        self.port: int = self.listener.getsockname()[1]
        self.client = stack.enter_context(socket.create_connection((address, self.port)))
        self.expected = {Connection(self.port, address, self.client.getsockname()[1])}
        self._stack = stack

    def accept(self) -> socket.socket:
        return self._stack.enter_context(self.listener.accept()[0])

    def open(self) -> set[Connection]:
        """What the kernel has of the listener's port."""
        return connections(PID, {self.port})


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as closing:
        yield closing


def state(end: socket.socket) -> int:
    """The TCP state by its number in <net/tcp_states.h>: the first byte of struct tcp_info, tcp(7)."""
    return end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


@families
def test_established(address: str, stack: ExitStack) -> None:
    pair = Pair(address, stack)
    _accepted = pair.accept()
    assert pair.open() == pair.expected
    outgoing = pair.client.getsockname()[1]
    assert connections(PID, {outgoing}) == {Connection(outgoing, address, pair.port)}
    assert connections(PID, {pair.port, outgoing}) == pair.open() | connections(PID, {outgoing})
    assert connections(PID, ()) == set()


@families
def test_waiting_for_accept(address: str, stack: ExitStack) -> None:
    pair = Pair(address, stack)
    assert pair.open() == pair.expected
    pair.client.shutdown(socket.SHUT_WR)
    assert pair.open() == pair.expected


@families
def test_listener_alone_is_no_connection(address: str, stack: ExitStack) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = stack.enter_context(socket.create_server((address, 0), family=family))
    assert connections(PID, {listener.getsockname()[1]}) == set()


@families
def test_half_closed_by_the_peer(address: str, stack: ExitStack) -> None:
    pair = Pair(address, stack)
    accepted = pair.accept()
    pair.client.shutdown(socket.SHUT_WR)
    until(lambda: state(accepted) == 8, "CLOSE_WAIT")
    assert pair.open() == pair.expected
    pair.client.close()  # unseen by the program until it writes
    assert pair.open() == pair.expected
    accepted.close()
    until(lambda: pair.open() == set(), "the end")


@families
def test_half_closed_by_the_program_which_still_reads(address: str, stack: ExitStack) -> None:
    pair = Pair(address, stack)
    accepted = pair.accept()
    accepted.shutdown(socket.SHUT_WR)
    until(lambda: state(accepted) == 5, "FIN_WAIT2")
    assert pair.open() == pair.expected
    pair.client.close()
    until(lambda: pair.open() == set(), "the end")


@families
def test_closed_by_the_program(address: str, stack: ExitStack) -> None:
    """What is left is the kernel's: FIN_WAIT2, and then TIME_WAIT for a minute."""
    pair = Pair(address, stack)
    accepted = pair.accept()
    accepted.close()
    until(lambda: state(pair.client) == 8, "the client to learn of it")
    # The client knows before its acknowledgement is back: until then the kernel still delivers.
    until(lambda: pair.open() == set(), "the client's acknowledgement")
    outgoing = pair.client.getsockname()[1]
    assert len(connections(PID, {outgoing})) == 1  # the client's end is half open as ever
    pair.client.close()
    until(lambda: pair.open() == connections(PID, {outgoing}) == set(), "the end of both")


@families
def test_closed_before_the_peer_has_got_everything(address: str, stack: ExitStack) -> None:
    """The kernel still delivers: FIN_WAIT1, of which no program has a socket any more."""
    pair = Pair(address, stack)
    accepted = pair.accept()
    accepted.setblocking(False)
    with suppress(BlockingIOError):
        while True:
            accepted.send(bytes(1 << 16))
    accepted.close()
    assert pair.open() == pair.expected
    while pair.client.recv(1 << 20):
        pass
    until(lambda: pair.open() == set(), "everything to be delivered")


@families
def test_reset(address: str, stack: ExitStack) -> None:
    pair = Pair(address, stack)
    accepted = pair.accept()
    accepted.send(b"unread")
    until(lambda: bool(select.select([pair.client], [], [], 0)[0]), "the data")
    pair.client.close()  # with unread data: a reset
    until(lambda: state(accepted) == 7, "CLOSE")
    assert pair.open() == set()


def test_ipv4_at_a_socket_of_both_families(stack: ExitStack) -> None:
    listener = stack.enter_context(
        socket.create_server(("::", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    )
    port = listener.getsockname()[1]
    client = stack.enter_context(socket.create_connection(("127.0.0.1", port)))
    accepted = stack.enter_context(listener.accept()[0])
    assert accepted.getpeername()[0] == "::ffff:127.0.0.1"
    assert connections(PID, {port}) == {Connection(port, "127.0.0.1", client.getsockname()[1])}


def test_process_that_is_gone_has_none() -> None:
    assert connections(0, {80}) == translated(0, {80}) == set()


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("0100007F:1F90", "127.0.0.1"),
        ("0262620A:0050", "10.98.98.2"),
        ("00000000000000000000000001000000:0050", "::1"),
        ("B80D01200000000067452301EFCDAB89:0050", "2001:db8::123:4567:89ab:cdef"),
        ("0000000000000000FFFF00000100007F:0050", "127.0.0.1"),
    ],
)
def test_addresses(text: str, address: str) -> None:
    """As /proc/net/tcp and tcp6 show them where the machine's order is the little-endian one."""
    assert _address(text) == address


OPEN = (
    "ipv4     2 tcp      6 431999 ESTABLISHED src=10.98.7.1 dst=10.98.7.2 sport=40000 dport=9700 "
    "src=10.98.7.2 dst=10.98.7.1 sport=7000 dport=40000 [ASSURED] mark=0 zone=0 use=2"
)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (OPEN, Connection(7000, "10.98.7.1", 40000)),
        (
            OPEN.replace("dport=40000", "dport=61234"),  # both 7000 and 9700 asked from port 40000
            Connection(7000, "10.98.7.1", 61234),
        ),
        (
            "ipv6     10 tcp      6 300 CLOSE_WAIT "
            "src=fd98:0007:0000:0000:0000:0000:0000:0001 dst=fd98:0007:0000:0000:0000:0000:0000:0002 "
            "sport=40000 dport=9700 src=fd98:0007:0000:0000:0000:0000:0000:0002 "
            "dst=fd98:0007:0000:0000:0000:0000:0000:0001 sport=7000 dport=40000 [ASSURED] mark=0 use=2",
            Connection(7000, "fd98:7::1", 40000),
        ),
        (
            # With accounting, and before the first answer.
            "ipv4     2 tcp      6 117 SYN_SENT src=127.0.0.1 dst=127.0.0.1 sport=40000 dport=9700 "
            "packets=1 bytes=60 [UNREPLIED] src=127.0.0.1 dst=127.0.0.1 sport=7000 dport=40000 "
            "packets=0 bytes=0 mark=0 use=2",
            Connection(7000, "127.0.0.1", 40000),
        ),
        (OPEN.replace("dport=9700", "dport=7000"), None),
        (OPEN.replace("sport=40000 dport=9700", "sport=9700 dport=40000"), None),
        (OPEN.replace("tcp      6", "udp      17"), None),
        (
            "ipv4     2 icmp     1 29 src=10.0.0.1 dst=10.0.0.2 type=8 code=0 id=3 src=10.0.0.2 "
            "dst=10.0.0.1 type=0 code=0 id=3 mark=0 use=2",
            None,
        ),
        ("", None),
    ],
    ids=[
        "open",
        "client's port changed",
        "ipv6",
        "unanswered",
        "not translated",
        "outgoing",
        "udp",
        "icmp",
        "empty",
    ],
)
def test_tracked_connections(line: str, expected: Connection | None) -> None:
    """Lines as nf_conntrack_standalone.c prints them."""
    assert _translation(line, {9700}) == expected
