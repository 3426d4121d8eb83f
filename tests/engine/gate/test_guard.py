"""What a pod's kernel must not say for a program that is away, when its gate lacks a rule or a filter."""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from architect.adapters import bpf, netfilter, netns
from architect.adapters.gate import RULE, Gate, Mode
from architect.decisions.ports import Port
from tests.engine.gate.podnet import (
    Network,
    connected,
    failure,
    held,
    received,
    until,
)

OTHER_PORT = 7001
TCP_REPAIR = 19
"""Of <linux/tcp.h>: a socket in repair is closed without a word, as when CRIU ends its program."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)


def take_rules(network: Network) -> None:
    with netns.entered(network.pod):
        for family in netfilter.Family:
            netfilter.remove(netfilter.probe(family, RULE).backend, family, RULE)


def take_filters(network: Network) -> None:
    """On the way in; `tc qdisc del` would take those on the way out too, where there is no tcx."""
    if bpf.has_tcx():
        for link in network.pin_dir.glob("ingress-*"):
            link.unlink()
        return
    for device in ("lo", "eth0"):
        network.in_pod(f"tc filter del dev {device} ingress")


def refusals(network: Network) -> int:
    """How often the pod's kernel has refused something: resets, and ICMP of both families."""
    with netns.entered(network.pod):
        place = Path("/proc/thread-self/net")
        lines = (place / "snmp").read_text().splitlines()
        six = dict(line.split() for line in (place / "snmp6").read_text().splitlines())
    names, values = (line.split() for line in lines if line.startswith("Icmp:"))
    unreachable = int(values[names.index("OutDestUnreachs")])
    return network.resets() + unreachable + int(six["Icmp6OutDestUnreachs"])


def guards(network: Network) -> int:
    """Filters on the way out."""
    if bpf.has_tcx():
        return len(list(network.pin_dir.glob("egress-*")))
    shown = (network.in_pod(f"tc filter show dev {device} egress") for device in ("lo", "eth0"))
    return sum("guard" in one for one in shown)


@families
@pytest.mark.parametrize("through", ["veth", "lo"])
@pytest.mark.parametrize(
    ("take", "mode"),
    [(take_rules, Mode.HOLD), (take_filters, Mode.HOLD), (take_filters, Mode.DROP)],
    ids=["rules", "filters", "filters of one that drops"],
)
def test_kernel_does_not_answer_for_a_sleeper(
    network: Network,
    gate: Gate,
    family: socket.AddressFamily,
    through: str,
    take: Callable[[Network], None],
    mode: Mode,
) -> None:
    listener = network.server(family, socket.SOCK_STREAM)
    client = network.caller(family, socket.SOCK_STREAM, through)
    accepted = network.accept(listener)
    gate.set_mode(0, mode)
    gate.set_absent(0)
    listener.close()
    accepted.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    accepted.close()
    take(network)
    client.send(b"late")
    newcomer = network.caller(family, socket.SOCK_STREAM, through)
    caller = network.caller(family, socket.SOCK_DGRAM, through)
    caller.send(b"lost")
    until(lambda: refusals(network) >= 3, "the kernel to refuse all three")
    assert not connected(newcomer)
    assert failure(client) == failure(newcomer) == failure(caller) == 0


def test_who_was_not_answered_asks_again_and_wakes(network: Network, gate: Gate) -> None:
    gate.set_mode(0, Mode.HOLD)
    take_rules(network)
    client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
    until(lambda: network.resets() == 1, "the reset")
    count = gate.activity(0).held
    assert gate.repair() == ["IPv4 rule", "IPv6 rule"]
    held(gate, count + 1)
    server = network.server(socket.AF_INET, socket.SOCK_STREAM)
    gate.set_mode(0, Mode.OPEN)
    gate.release(0, accept=True)
    accepted = network.accept(server)
    client.send(b"ping")
    assert received(accepted) == b"ping"


@families
def test_what_is_awake_refuses_for_itself(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    gate.set_ports(1, [Port("tcp", OTHER_PORT), Port("udp", OTHER_PORT)])
    gate.set_mode(0, Mode.HOLD)
    assert guards(network) == 2
    client = network.caller(family, socket.SOCK_STREAM, "veth", OTHER_PORT)
    until(lambda: failure(client) == errno.ECONNREFUSED, "the reset")
    caller = network.caller(family, socket.SOCK_DGRAM, "veth", OTHER_PORT)
    caller.send(b"x")
    until(lambda: failure(caller) == errno.ECONNREFUSED, "the ICMP message")


def test_guard_is_there_only_while_somebody_is_away(network: Network, gate: Gate) -> None:
    assert guards(network) == 0
    gate.set_mode(0, Mode.HOLD)
    gate.set_mode(1, Mode.DROP)
    assert guards(network) == 2
    gate.set_mode(0, Mode.OPEN)
    assert gate.withdraw()
    assert guards(network) == 2
    gate.close(remove=False)
    successor = network.open()
    assert guards(network) == 2
    successor.set_mode(1, Mode.OPEN)
    assert successor.withdraw()
    assert guards(network) == 0
    successor.set_mode(1, Mode.HOLD)
    successor.set_mode(1, Mode.OPEN)
    successor.close(remove=False)  # killed before it has withdrawn
    assert guards(network) == 2
    last = network.open()
    assert guards(network) == 0
    last.set_mode(0, Mode.HOLD)
    if bpf.has_tcx():
        (link,) = set(network.pin_dir.glob("egress-*")) - {network.pin_dir / "egress-1"}
        link.unlink()
    else:
        network.in_pod("tc qdisc del dev eth0 clsact")
    assert last.repair() == ["filter on eth0"]
    assert guards(network) == 2
    last.close(remove=True)
    for device in ("lo", "eth0"):
        assert network.in_pod(f"tc filter show dev {device} egress") == ""
