"""What it costs that the gate looks at packets: the program alone, and packets a second into a pod.

The load is pktgen's kind: one frame, sent as fast as one CPU can through a packet socket into a veth, to a
socket in the pod's namespace that a program on another CPU reads (bench/native/load.c). The CPU that sends
does all of a packet's way to that socket, so what the gate adds to the way is missing in packets a second.
No container takes part: namespace, veth and gate are what a pod has.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import shutil
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Self

from architect.adapters import bpf, netns
from architect.adapters.gate import Gate
from architect.contract import paths
from architect.decisions import rest
from architect.decisions.ports import Port
from bench import harness, programs
from tests.engine.gate.podnet import CLIENT, POD, Network, command

SOURCE: Final = Path(__file__).with_name("native") / "load.c"
DECLARED: Final = 7000
UNDECLARED: Final = 7001
OWNER: Final = 0
_NONE: Final = "no gate"
SCALEDOWN_S: Final = 60.0
"""The idle time of the contract's default, from which follows how long the filters rest."""
BURST_S: Final = 0.05
"""Short: the speed of a machine wanders within seconds, so what is compared must lie close together."""
_SWITCHING_S: Final = 0.1
"""More than it takes to put the filters to the interfaces and to take them off again."""
CHECKSUM_BYTES: Final = 4
"""Of a frame's size as it is named: the check sequence of Ethernet, which a veth does not have."""
SIZES: Final = {"64 B": 64 - CHECKSUM_BYTES, "MTU": 1514}
_MOST_LOST: Final = 0.05
"""Of the packets of a burst: with more that the reader did not take there is no figure."""
_REPEAT: Final = 1_000_000
_SO_RCVBUFFORCE: Final = 33
_RECEIVE_BYTES: Final = 128 << 20
_ETHERNET: Final = struct.Struct("!6s6sH")
_ETHER_TYPE: Final = {socket.AF_INET: 0x0800, socket.AF_INET6: 0x86DD}
_IPV4: Final = struct.Struct("!BBHHHBBH4s4s")
_IPV6: Final = struct.Struct("!IHBB16s16s")
_TCP: Final = struct.Struct("!HHIIBBHHH")
_UDP: Final = struct.Struct("!HHHH")
_CLIENT_PORT: Final = 40000
_ACK: Final = 0x10


@dataclass(frozen=True, slots=True)
class Pod:
    """A pod's namespace with its gate, and a client's namespace at the other end of its veth."""

    network: Network
    gate: Gate
    program: int
    """Descriptor of the gate's program for Ethernet."""
    empty: int
    """Descriptor of a program that does nothing."""

    @property
    def interface(self) -> int:
        """The number of the pod's eth0."""
        with netns.entered(self.network.pod):
            return int(socket.if_nametoindex("eth0"))

    def frame(
        self, size: int, port: int, *, kind: int = socket.SOCK_DGRAM, family: int = socket.AF_INET
    ) -> bytes:
        """A frame from the client to a port of the pod, of that many bytes or as few as it takes."""
        tcp = kind == socket.SOCK_STREAM
        protocol, header = (6, _TCP.size) if tcp else (17, _UDP.size)
        ip = _IPV4.size if family == socket.AF_INET else _IPV6.size
        payload = bytes(max(0, size - _ETHERNET.size - ip - header))
        if tcp:
            segment = _TCP.pack(_CLIENT_PORT, port, 1, 1, header << 2, _ACK, 65535, 0, 0) + payload
        else:  # No checksum (RFC 768): what it costs is not what is measured.
            segment = _UDP.pack(_CLIENT_PORT, port, header + len(payload), 0) + payload
        version = socket.AF_INET if family == socket.AF_INET else socket.AF_INET6
        ends = (socket.inet_pton(version, place[version]) for place in (CLIENT, POD))
        if version == socket.AF_INET:
            words = (0x45, 0, ip + len(segment), 1, 0, 64, protocol)
            source, destination = ends
            blank = _IPV4.pack(*words, 0, source, destination)
            packet = _IPV4.pack(*words, _checksum(blank), source, destination)
        else:
            packet = _IPV6.pack(6 << 28, len(segment), protocol, 64, *ends)
        places = (self.network.pod, self.network.client)
        ethernet = _ETHERNET.pack(*map(_hardware_address, places), _ETHER_TYPE[version])
        return ethernet + packet + segment

    def place(self, pin: Path) -> bpf.TcxFilter | bpf.IngressFilter:
        """Where the empty program is put: the way in which the gate is attached on this kernel."""
        if bpf.has_tcx():
            return bpf.TcxFilter(self.interface, pin)
        return bpf.IngressFilter(self.interface, handle=1, priority=1)


def _hardware_address(namespace: int) -> bytes:
    with netns.entered(namespace):
        link = json.loads(command("ip -j link show dev eth0"))[0]
    return bytes.fromhex(str(link["address"]).replace(":", ""))


def _checksum(header: bytes) -> int:
    total: int = sum(struct.unpack(f"!{len(header) // 2}H", header))
    total = (total & 0xFFFF) + (total >> 16)
    return ~(total + (total >> 16)) & 0xFFFF


@contextlib.contextmanager
def pod() -> Iterator[Pod]:
    """A pod with a gate that watches, for one container with two ports; leaves nothing behind."""
    with contextlib.ExitStack() as closing:
        folder = Path(tempfile.mkdtemp(prefix="architect-bench-"))
        closing.callback(shutil.rmtree, folder)
        pins = folder / "bpf"
        bpf.ensure_bpffs(pins)
        closing.callback(command, f"umount {pins}")
        network = Network(pins / "pod", paths.GATE_PROGRAM)
        closing.callback(network.close)
        gate = network.open()
        closing.callback(gate.close, remove=True)
        gate.set_ports(OWNER, [Port("tcp", DECLARED), Port("udp", DECLARED)])
        (pinned,) = network.pin_dir.glob("gate_ethernet-*")
        program = bpf.open_pinned(pinned)
        closing.callback(os.close, program)
        empty = programs.empty()
        closing.callback(os.close, empty)
        yield Pod(network, gate, program, empty)


def alone(n: int) -> list[dict[str, Any]]:
    """Nanoseconds that the program takes for a packet, n times a million runs of each, in turns."""
    seen: dict[tuple[str, str], list[float]] = {}
    with pod() as made:
        least = SIZES["64 B"]
        tcp = socket.SOCK_STREAM
        frames = {
            "declared TCP port, 64 B": made.frame(least, DECLARED, kind=tcp),
            "declared TCP port, MTU": made.frame(SIZES["MTU"], DECLARED, kind=tcp),
            "undeclared TCP port, 64 B": made.frame(least, UNDECLARED, kind=tcp),
            "declared TCP port, IPv6, 78 B": made.frame(
                least, DECLARED, kind=tcp, family=socket.AF_INET6
            ),
        }
        interface = made.interface
        with netns.entered(made.network.pod):
            for _ in range(n):
                for workload, frame in frames.items():
                    before = made.gate.activity(OWNER).packets
                    ran = programs.run(made.program, frame, interface, _REPEAT)
                    counted = made.gate.activity(OWNER).packets - before
                    expected = 0 if "undeclared" in workload else _REPEAT
                    if (ran.verdict, counted) != (programs.PASS, expected):
                        raise RuntimeError(
                            f"{workload}: {counted} of {expected} packets counted, verdict {ran.verdict}"
                        )
                    seen.setdefault(("gate", workload), []).append(ran.ns)
                    nothing = programs.run(made.empty, frame, interface, _REPEAT)
                    seen.setdefault(("empty program", workload), []).append(nothing.ns)
    return [
        harness.figure(
            "eBPF program, a packet", subject, workload, statistics.median(took), "ns", n
        )
        for (subject, workload), took in seen.items()
    ]


class Load:
    """The program that sends and receives, for one frame."""

    def __init__(self, program: Path, made: Pod, frame: bytes) -> None:
        self._made = made
        with contextlib.ExitStack() as closing:
            with netns.entered(made.network.client):
                # Protocol 0: it takes no packets.
                sender = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
                closing.callback(sender.close)
                sender.bind(("eth0", 0))
                bypass = 20  # PACKET_QDISC_BYPASS of <linux/if_packet.h>, as pktgen does
                sender.setsockopt(263, bypass, 1)  # SOL_PACKET
            with netns.entered(made.network.pod):
                sink = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                closing.callback(sink.close)
                sink.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _RECEIVE_BYTES)
                sink.bind(("0.0.0.0", DECLARED))
            places = (sender.fileno(), sink.fileno())
            self._process = subprocess.Popen(
                [program, *map(str, places), frame.hex()],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
                pass_fds=places,
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.communicate(timeout=30)

    def burst(self, seconds: float) -> Burst:
        """Sends for so long; returns once all has arrived."""
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        before = self._made.gate.activity(OWNER).packets
        stdin.write(f"{seconds * 1000:.0f}\n")
        stdin.flush()
        answer = stdout.readline().split()
        if len(answer) != 3:
            raise RuntimeError(f"the load ended with {self._process.wait(10)}")
        sent, received, ns = map(int, answer)
        counted = self._made.gate.activity(OWNER).packets - before
        if received < sent * (1 - _MOST_LOST):
            raise RuntimeError(f"only {received} of {sent} packets arrived: is the machine busy?")
        return Burst(sent, received, counted, ns / 1e9)


@dataclass(frozen=True, slots=True)
class Burst:
    """What was sent, what arrived, what the gate counted, in how many seconds."""

    sent: int
    received: int
    counted: int
    seconds: float

    @property
    def rate(self) -> float:
        """Packets a second that arrived."""
        return self.received / self.seconds


Subject = Callable[[Load], Burst]


def _subjects(made: Pod) -> dict[str, Subject]:
    """Ways in which a packet can come into the pod, by name; each leaves no filter behind."""
    gate = made.gate
    attached = made.place(made.network.pin_dir.with_name("empty"))

    def none(load: Load) -> Burst:
        return load.burst(BURST_S)

    def empty(load: Load) -> Burst:
        with netns.entered(made.network.pod):
            attached.attach(made.empty)
        try:
            return load.burst(BURST_S)
        finally:
            with netns.entered(made.network.pod):
                attached.detach()

    def each(load: Load) -> Burst:
        gate.watch()
        try:
            return load.burst(BURST_S)
        finally:
            gate.rest()

    return {
        _NONE: none,
        "empty program": empty,
        "gate, each packet": each,
    }


def _counts_right(subject: str, burst: Burst) -> bool:
    """Whether the gate saw what it was to see: a figure of something else would be none."""
    if subject == "gate, each packet":
        return burst.counted == burst.sent
    return burst.counted == 0


def median_interval(values: Sequence[float], confidence: float = 0.95) -> tuple[float, float]:
    """A confidence interval of the median, by the ranks of a binomial: no distribution is assumed.

    Of few values it is as wide as they are.
    """
    ordered = sorted(values)
    n = len(ordered)
    rank, below = 0, 0.5**n  # the chance that at most `rank` values lie below the median
    while rank < (n - 1) // 2 and below <= (1 - confidence) / 2:
        rank += 1
        below += math.comb(n, rank) * 0.5**n
    rank = max(0, rank - 1)
    return ordered[rank], ordered[n - 1 - rank]


@contextlib.contextmanager
def _loaded(size: str) -> Iterator[tuple[Pod, Load]]:
    """A pod whose gate rests, and a load for it."""
    with contextlib.ExitStack() as closing:
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="architect-bench-")))
        made = closing.enter_context(pod())
        frame = made.frame(SIZES[size], DECLARED)
        load = closing.enter_context(Load(_compiled(folder), made, frame))
        made.gate.rest()
        load.burst(1.0)  # warm
        yield made, load


def veth(size: str, rounds: int) -> list[dict[str, Any]]:
    """Packets a second into a pod: all subjects in each round, in a new order; shares within a round."""
    seen: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    chance = random.Random(size)
    with _loaded(size) as (made, load):
        subjects = _subjects(made)
        for _ in range(rounds):
            order = list(subjects)
            chance.shuffle(order)
            bursts = {subject: subjects[subject](load) for subject in order}
            for subject, burst in bursts.items():
                if not _counts_right(subject, burst):
                    raise RuntimeError(f"{subject}: {burst}")
                seen.setdefault(subject, []).append(burst.rate)
                share = burst.rate / bursts[_NONE].rate * 100
                shares.setdefault(subject, []).append(share)
    return [
        record
        for subject in subjects
        for record in _records(subject, size, seen[subject], shares[subject])
    ]


def resting(size: str, turns: int) -> list[dict[str, Any]]:
    """Packets a second into a pod whose gate does as the daemon has it do for a busy program.

    A turn is all from one look at the packets to the next. It is compared with its own part without filters.
    """
    idle = rest.rest_s(SCALEDOWN_S)
    window = rest.window_s(idle)
    seen, shares = [], []
    with _loaded(size) as (made, load):

        def look() -> None:
            made.gate.watch()
            time.sleep(window)
            made.gate.rest()

        for _ in range(turns):
            daemon = threading.Thread(target=look)
            daemon.start()
            watched = load.burst(window + _SWITCHING_S)
            daemon.join()
            rested = load.burst(idle - _SWITCHING_S)
            if not 0 < watched.counted < watched.sent or rested.counted:
                raise RuntimeError(f"the gate counted otherwise: {watched}, {rested}")
            rate = (watched.received + rested.received) / (watched.seconds + rested.seconds)
            seen.append(rate)
            shares.append(rate / rested.rate * 100)
    return _records("gate, resting", size, seen, shares)


def _records(
    subject: str, size: str, rates: Sequence[float], shares: Sequence[float]
) -> list[dict[str, Any]]:
    workload = f"UDP, {size} frames, veth"
    rate, n = statistics.median(rates), len(rates)
    records = [harness.figure("packets/s", subject, workload, rate, "packets/s", n)]
    if subject != _NONE:
        low, high = median_interval(shares)
        share = harness.figure(
            "packets/s, share of no gate's", subject, workload, statistics.median(shares), "%", n
        )
        records.append({**share, "low": round(low, 3), "high": round(high, 3)})
    return records


def _compiled(folder: Path) -> Path:
    program = folder / "load"
    words = ["cc", "-std=gnu11", "-O2", "-Wall", "-Wextra", "-Werror", "-pthread"]
    harness.run([*words, "-o", str(program), str(SOURCE)])
    return program


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """What `python -m bench tracking` runs."""
    rounds, turns = (20, 2) if quick else (400, 20)
    return [
        lambda: alone(3 if quick else 20),
        lambda: veth("64 B", rounds),
        lambda: resting("64 B", turns),
        lambda: veth("MTU", rounds),
        lambda: resting("MTU", turns),
    ]
