"""The traffic gate over time: taken over, repaired, rested, taken away, and what its parts refuse."""

import contextlib
import ctypes
import os
import signal
import socket
import statistics
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from architect.adapters import bpf, filters, gatemaps, netfilter, netns, nfqueue
from architect.adapters.gate import RULE, Gate, GateBusyError, GateError, Mode
from architect.decisions.ports import Port
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

ROOT = Path(__file__).resolve().parents[3]

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)


DAEMON = """
import pathlib, signal, sys
from architect.adapters.gate import Gate, Mode, Port
gate = Gate.open(*map(pathlib.Path, sys.argv[1:4]))
gate.set_ports(3, [Port("tcp", {port})])
gate.set_mode(3, Mode.HOLD)
print("ready", flush=True)
signal.pause()
"""


def test_killed_daemon_drops_and_its_successor_takes_over(network: Network) -> None:
    arguments = [f"/proc/{os.getpid()}/fd/{network.pod}", network.pin_dir, network.program]
    daemon = subprocess.Popen(
        [sys.executable, "-c", DAEMON.format(port=PORT), *map(str, arguments)],
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    with daemon, contextlib.ExitStack() as closing:
        closing.callback(daemon.kill)
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == b"ready\n"
        with pytest.raises(GateBusyError, match="another process reads it"):
            network.open()
        client = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")
        counters = bpf.PerCpuMap(
            bpf.open_pinned(network.pin_dir / "traffic"), struct.Struct("=I"), struct.Struct("=4Q")
        )
        until(lambda: sum(seen[2] for seen in counters[3]) == 1, "the SYN to be held")
        daemon.send_signal(signal.SIGKILL)
    orphan = network.caller(socket.AF_INET, socket.SOCK_STREAM, "veth")  # nobody reads
    until(lambda: sum(seen[2] for seen in counters[3]) == 2, "the second SYN to be marked")
    os.close(counters.descriptor)
    assert failure(client) == failure(orphan) == 0
    assert network.resets() == 0

    gate = network.open()
    assert gate.mode(3) is Mode.HOLD
    assert gate.mode(0) is Mode.OPEN
    assert gate.ports(3) == [Port("tcp", PORT)]
    assert gate.activity(3).packets == 2
    network.server(socket.AF_INET, socket.SOCK_STREAM)
    held(gate, 4, owner=3)  # both clients repeat their SYN
    gate.set_mode(3, Mode.OPEN)
    gate.release(3, accept=True)
    until(lambda: connected(client) and connected(orphan), "both connections")
    assert network.resets() == 0


def program_pins(network: Network) -> set[str]:
    """Names of all pins but those of links to interfaces."""
    names = {path.name for path in network.pin_dir.iterdir()}
    return {name for name in names if not name.startswith(filters.PINS)}


def test_new_release_takes_over_with_its_own_program(
    network: Network, gate: Gate, tmp_path: Path
) -> None:
    gate.set_mode(0, Mode.DROP)
    gate.close(remove=False)
    before = program_pins(network)
    network.program = tmp_path / "gate.bpf.o"
    (original,) = (ROOT / "build/native").glob("gate.bpf.o")
    network.program.write_bytes(original.read_bytes() + b"\0")
    successor = network.open()
    after = program_pins(network)
    maps = set(gatemaps.NAMES)
    assert before & after == maps
    assert len(before - maps) == len(after - maps) == 4  # the programs
    assert successor.mode(0) is Mode.DROP
    network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo").send(b"x")
    assert successor.activity(0).dropped == 1


def rules_are_there(network: Network) -> bool:
    """Whether anything in the pod queues packets, whichever backend put it there."""
    tools = ("nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save")
    return any("queue" in network.in_pod(tool).lower() for tool in tools)


def test_rules_are_there_only_while_an_owner_holds(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    assert not rules_are_there(network)
    for _ in range(2):
        gate.set_mode(0, Mode.HOLD)
        gate.set_mode(1, Mode.HOLD)
        gate.set_mode(1, Mode.OPEN)
        assert rules_are_there(network)
        caller.send(b"held")
        held(gate, 1)
        assert not gate.withdraw()
        gate.set_mode(0, Mode.OPEN)
        assert not gate.withdraw()  # with the packet, what follows it may still be on its way
        assert gate.release(0, accept=True) == 1
        assert gate.withdraw()
        assert not rules_are_there(network)
        assert "chain PREROUTING" not in network.in_pod("nft list ruleset")
        assert received(server) == b"held"
        caller.send(b"passes")
        assert received(server) == b"passes"


def test_successor_knows_whether_the_rules_are_there(network: Network, gate: Gate) -> None:
    gate.set_mode(0, Mode.HOLD)
    gate.close(remove=False)
    holding = network.open()
    assert rules_are_there(network)
    holding.set_mode(0, Mode.OPEN)
    holding.close(remove=False)
    opened = network.open()
    assert rules_are_there(network)
    assert opened.withdraw()
    assert not rules_are_there(network)


def test_resting_filters_are_off_the_way_and_back_in_time(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    for count in range(2):
        assert gate.rest()
        start = time.monotonic_ns()
        caller.send(b"unseen")
        assert received(server) == b"unseen"
        seen = gate.activity(0)
        assert seen.packets == count
        assert start <= seen.last_ns  # nobody looks, so it is taken for active
        assert gate.repair() == []
        before = time.monotonic_ns()
        gate.watch()
        assert before <= gate.activity(0).last_ns <= time.monotonic_ns()
        caller.send(b"seen")
        assert received(server) == b"seen"
        assert gate.activity(0).packets == count + 1
    for mode in (Mode.HOLD, Mode.DROP):
        assert gate.rest()
        gate.set_mode(0, mode)
        assert not gate.rest()
        caller.send(b"not let through")
        until(lambda: gate.activity(0).packets >= 3, "the packet to be seen")
        assert not readable(server)
        gate.receive()
        gate.set_mode(0, Mode.OPEN)
        gate.release(0, accept=False)
    assert gate.rest()
    gate.close(remove=False)
    successor = network.open()
    caller.send(b"seen by the successor")
    assert received(server) == b"seen by the successor"
    assert successor.activity(0).packets == 5


def test_repair_puts_back_what_is_missing(network: Network, gate: Gate) -> None:
    gate.set_mode(1, Mode.HOLD)
    assert gate.repair() == []
    backends = {family: netfilter.probe(family, RULE).backend for family in netfilter.Family}
    with netns.entered(network.pod):
        for family, backend in backends.items():
            netfilter.remove(backend, family, RULE)
    if bpf.has_tcx():
        for link in network.pin_dir.glob("ingress-*"):
            link.unlink()
    else:
        network.in_pod("tc filter del dev lo ingress")
        network.in_pod("tc qdisc del dev eth0 clsact")
    network.in_pod("ip link add eth1 type veth peer name eth2")
    (network.pin_dir / "ports").unlink()
    expected = {
        "filter on eth0",
        "filter on eth1",
        "filter on eth2",
        "filter on lo",
        "IPv4 rule",
        "IPv6 rule",
        "pin ports",
    }
    assert set(gate.repair()) == expected
    assert gate.repair() == []
    gate.set_mode(0, Mode.HOLD)
    for number, address_family in enumerate(POD):
        network.caller(address_family, socket.SOCK_DGRAM, "veth").send(b"x")
        held(gate, number + 1)


def test_repair_notices_a_flushed_chain(network: Network, gate: Gate) -> None:
    """What `iptables -F` by a user does, whichever backend the rule is in."""
    gate.set_mode(1, Mode.HOLD)
    for family, tool in ((netfilter.Family.IPV4, "iptables"), (netfilter.Family.IPV6, "ip6tables")):
        backend = netfilter.probe(family, RULE).backend
        if backend is netfilter.Backend.NFT:
            network.in_pod("nft flush ruleset")
        else:
            suffix = backend.value.removeprefix("iptables")
            network.in_pod(f"{tool}{suffix} -t mangle -F")
    assert gate.repair() == ["IPv4 rule", "IPv6 rule"]


def test_repair_and_release_keep_other_peoples_packets(network: Network, gate: Gate) -> None:
    """The probe datagram of a repair must not swallow what is being held."""
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "veth")
    gate.set_mode(0, Mode.HOLD)
    caller.send(b"held")
    assert gate.repair() == []
    gate.set_mode(0, Mode.OPEN)
    assert gate.release(0, accept=True) == 1
    assert received(server) == b"held"


def test_removed_gate_leaves_nothing(network: Network, gate: Gate) -> None:
    server = network.server(socket.AF_INET, socket.SOCK_DGRAM)
    gate.set_mode(0, Mode.HOLD)
    caller = network.caller(socket.AF_INET, socket.SOCK_DGRAM, "lo")
    caller.send(b"held")
    gate.close(remove=True)
    gate.close(remove=False)  # harmless
    assert received(server) == b"held"
    assert not network.pin_dir.exists()
    for device in ("lo", "eth0"):
        assert network.in_pod(f"tc filter show dev {device} ingress") == ""
    for tool in ("iptables-nft-save", "ip6tables-nft-save", "iptables-legacy-save"):
        assert "NFQUEUE" not in network.in_pod(tool)
    assert "queue" not in network.in_pod("ip6tables-legacy-save")
    with pytest.raises(GateError, match="is closed"):
        gate.fileno()


def test_other_filters_stay(network: Network) -> None:
    first = network.open()
    with netns.entered(network.pod):
        index = socket.if_nametoindex("eth0")
        other = bpf.IngressFilter(index, handle=5, priority=3)
        (pinned,) = network.pin_dir.glob("gate_raw-*")
        descriptor = bpf.open_pinned(pinned)
        other.attach(descriptor)
        os.close(descriptor)
        number = other.attached()
        assert number is not None
        assert first.repair() == []
        first.close(remove=True)
        assert other.attached() == number
        other.detach()


def test_changing_the_mode_takes_microseconds(gate: Gate) -> None:
    times = []
    for number in range(200):
        start = time.perf_counter()
        gate.set_mode(0, Mode(1 + number % 2))
        times.append(time.perf_counter() - start)
    assert statistics.median(times) < 0.0001


def test_every_reported_backend_works() -> None:
    for family in netfilter.Family:
        support = netfilter.probe(family, RULE)
        assert support.backend in support.backends
        assert {*support.backends, *support.reasons} == set(netfilter.Backend)
        for backend in support.backends:
            with netns.scratch():
                queue = nfqueue.Queue(RULE.queue, capacity=8, buffer_bytes=1 << 16)

                def arrived(queue: nfqueue.Queue = queue) -> bool:
                    packets = queue.receive(8)
                    queue.decide([packet.id for packet in packets], accept=False)
                    return any(packet.mark == RULE.mark for packet in packets)

                for rule_is_there in (False, True, False):
                    if rule_is_there:
                        netfilter.install(backend, family, RULE)
                    else:
                        netfilter.remove(backend, family, RULE)
                    assert netfilter.present(backend, family, RULE) is rule_is_there
                    reached = netfilter.reach(family, RULE, queue.fileno(), arrived)
                    assert (reached is netfilter.Reach.QUEUED) is rule_is_there
                queue.close()


def test_machine_without_any_backend_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(netfilter, "_find", lambda program: None)
    support = netfilter.probe.__wrapped__(netfilter.Family.IPV4, RULE)
    with pytest.raises(netfilter.NoBackendError, match=r"nft is not installed.*install iptables"):
        _ = support.backend


def test_errors_say_what_to_do(network: Network, bpffs: Path, tmp_path: Path) -> None:
    with pytest.raises(GateError, match="not on a bpf file system"):
        Gate.open(network.pod, tmp_path, network.program)
    with pytest.raises(GateError, match="has the pod ended"):
        Gate.open(Path("/proc/0/ns/net"), network.pin_dir, network.program)
    broken = tmp_path / "broken.o"
    broken.write_bytes(b"not an object")
    with pytest.raises(GateError, match=r"cannot read .*rebuild it"):
        Gate.open(network.pod, network.pin_dir, broken)


def test_thread_is_back_home_after_an_error(network: Network) -> None:
    visited = []

    def fail() -> None:
        visited.append(Path("/proc/thread-self/ns/net").readlink())
        raise RuntimeError

    home = Path("/proc/thread-self/ns/net").readlink()
    with pytest.raises(RuntimeError), netns.entered(network.pod):
        fail()
    assert visited != [home]
    assert Path("/proc/thread-self/ns/net").readlink() == home


def test_structures_have_the_sizes_that_libbpf_knows() -> None:
    assert ctypes.sizeof(bpf._TcHook) == 24
    assert ctypes.sizeof(bpf._TcOptions) == 32
