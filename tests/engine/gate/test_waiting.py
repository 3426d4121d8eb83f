"""What waits at a gate: how much and how long is known, both are bounded, and what is dropped makes room."""

import os
import socket
import time

import pytest

from architect.adapters.gate import Gate, Mode
from architect.adapters.holding import Waiting
from architect.decisions.ports import Port
from tests.engine.gate.podnet import PORT, Network, held, readable, received, until

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)


def test_what_waits_is_known_and_not_for_ever(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.limit(3, 1 << 20)
    gate.set_mode(0, Mode.HOLD)
    assert gate.waiting(0) == Waiting(0, 0.0)
    for _ in range(5):
        caller.send(b"old")
    held(gate, 3)
    assert gate.waiting(0).packets == 3
    until(lambda: gate.waiting(0).oldest_s > 0.05, "the packets to grow old")
    assert gate.expire(60.0) == 0
    assert gate.waiting(0).packets == 3
    assert gate.expire(0.05) == 1
    assert gate.waiting(0) == Waiting(0, 0.0)
    for number in range(5):  # the allowance is whole again
        caller.send(b"new %d" % number)
    held(gate, 6)
    assert gate.activity(0)[2:] == (6, 4)
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 3
    assert [received(server) for _ in range(3)] == [b"new 0", b"new 1", b"new 2"]
    assert not readable(server)


def test_younger_packets_stay_and_use_their_part_of_the_allowance(
    network: Network, gate: Gate
) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.limit(3, 1 << 20)
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"old")
    caller.send(b"old")
    held(gate, 2)
    until(lambda: gate.waiting(0).oldest_s > 0.2, "the packets to grow old")
    begin = time.monotonic()
    caller.send(b"young")
    held(gate, 3)
    assert gate.expire(max(0.1, time.monotonic() - begin + 0.05)) == 1
    assert gate.waiting(0).packets == 1
    for _ in range(3):
        caller.send(b"younger")
    held(gate, 5)
    assert gate.activity(0).dropped == 1
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 3
    assert [received(server) for _ in range(3)] == [b"young", b"younger", b"younger"]


def test_expired_packets_of_several_owners_are_gone_for_all(network: Network, gate: Gate) -> None:
    gate.set_ports(1, [Port("udp", PORT)])
    for owner in (0, 1):
        gate.set_mode(owner, Mode.HOLD)
    network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth").send(b"x")
    held(gate, 1, owner=1)
    assert gate.waiting(0).packets == gate.waiting(1).packets == 1
    assert gate.expire(0.0) == 0b11
    assert gate.waiting(0).packets == gate.waiting(1).packets == 0
    assert gate.release(0, accept=True) == 0


def test_room_in_bytes_is_whole_again(network: Network, gate: Gate) -> None:
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    gate.limit(1000, 30_000)
    gate.set_mode(0, Mode.HOLD)
    for expected in (3, 6):
        for _ in range(5):
            caller.send(bytes(10_000))
        held(gate, expected)
        assert gate.activity(0).held == expected
        assert gate.waiting(0).packets == 3
        assert gate.expire(0.0) == 1


def test_what_waits_can_be_copied_once_and_is_still_delivered(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"before")
    held(gate, 1)
    gate.copy(on=True)
    caller.send(b"first")
    held(gate, 2)
    (first,) = gate.copies(0)
    assert first.endswith(b"first")
    caller.send(b"second")
    held(gate, 3)
    (second,) = gate.copies(0)
    assert second.endswith(b"second")
    assert gate.copies(0) == gate.copies(1) == []
    gate.copy(on=False)
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 3
    assert [received(server) for _ in range(3)] == [b"before", b"first", b"second"]
