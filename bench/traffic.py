"""What clients notice: first byte by protocol and way, and many clients at the moment of hibernation.

The packets of all are captured on the pods' bridge: no reset and no SYN sent twice may be among them, else
there is no figure. Every reply is checked: none may be lost, doubled or another's.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from architect.contract.records import Request
from architect.processes.cli import client as daemon
from bench import harness, valkey, wakes
from bench.harness import Samples
from tests.engine.servers.capture import Capture

PORT: Final = 16600
INSIDE: Final = 6379
CLIENTS: Final = 20
MEGABYTES: Final = 5
TEST_IMAGE: Final = "localhost/architect-test:1"
SETTLED_S: Final = 0.3
"""Seconds between a hibernation and the packet: what follows a hibernation is mostly done by then."""
_MOMENT_S: Final = 0.3
"""When the clients of a round ask: so late at the most, counted from the command. A dump takes half of it."""
_SPREAD_S: Final = 0.03
"""How far apart they are then."""
_MOST_ROUNDS: Final = 10
"""For each hibernation that succeeds."""
_ATTEMPTS: Final = 5
_ECHO: Final = f"""
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", {INSIDE}))
while True:
    data, peer = s.recvfrom(2048)
    s.sendto(data, peer)
"""
_PUBLISHED_UDP: Final = ("-p", f"127.0.0.1:{PORT}:{INSIDE}/udp")
Place = tuple[str, int]
Kinds = dict[str, Callable[[int], None]]


def _ways(name: str) -> dict[str, Place]:
    """How a client on this machine can reach a container: what it is called, address and port."""
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    address = harness.run(["podman", "inspect", "-f", form, name]).strip()
    return {"pod address": (address, INSIDE), "published port": ("127.0.0.1", PORT)}


@contextlib.contextmanager
def _unnoticed() -> Iterator[Callable[[], object]]:
    """Captures what passes the pods' bridge; fails if a client could have noticed something.

    What it gives is to be called now and then: it takes the packets out of the socket's buffer.
    """
    found = json.loads(harness.run(["podman", "network", "inspect", "podman"]))[0]
    bridge = str(found.get("network_interface") or found["plugins"][0]["bridge"])
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        capture = Capture(own, bridge)
    finally:
        os.close(own)
    with capture:
        yield lambda: capture.packets
        if not capture.packets:
            raise RuntimeError(f"no packet was seen on {bridge}")
        complaints = capture.complaints()
        if complaints:
            raise RuntimeError(f"clients noticed {len(complaints)} times, first {complaints[:3]}")


def _hibernate(name: str) -> None:
    """As `architect sleep` does, without a start of Python each time; again if a packet came in between."""
    for attempt in range(1, _ATTEMPTS + 1):
        try:
            daemon.ask(Request(verb="sleep", pod=name))
            break
        except daemon.Refused:
            if attempt == _ATTEMPTS:
                raise


def _samples(name: str, n: int, ask: Callable[[int], None], samples: Samples) -> None:
    """Hibernates, waits, and has the client ask; so often."""
    for number in range(n):
        _hibernate(name)
        time.sleep(SETTLED_S)
        with samples.timed():
            ask(number)


def tcp(n: int) -> list[dict[str, Any]]:
    """A valkey of 5 MB: open and new connections, by the pod's address and by a published port."""
    name = "bench-tcp"
    results = []
    with harness.container(name, PORT):
        first = harness.connect(PORT)
        valkey.fill(first, MEGABYTES)
        first.close()
        for way, place in _ways(name).items():
            with _unnoticed() as drain:
                held = valkey.Valkey(*place)

                def ask_on_open(_: int, held: valkey.Valkey = held) -> None:
                    _expect(b"PONG", held("PING"))

                def ask_anew(_: int, place: Place = place) -> None:
                    fresh = valkey.Valkey(*place)
                    _expect(b"PONG", fresh("PING"))
                    fresh.close()

                kinds: Kinds = {"open": ask_on_open, "new": ask_anew}
                for kind, ask in kinds.items():
                    workload = f"valkey {MEGABYTES} MB, {way}"
                    samples = Samples(f"first byte, TCP, {kind} connection", "architect", workload)
                    _samples(name, n, ask, samples)
                    drain()
                    results.append(samples.record())
                held.close()
    return results


def udp(n: int) -> list[dict[str, Any]]:
    """An echo server in Python: the first datagram is answered, none is sent twice."""
    name = "bench-udp"
    results = []
    command = ("python3", "-c", _ECHO)
    with harness.container(name, PORT, image=TEST_IMAGE, command=command, flags=_PUBLISHED_UDP):
        for way, place in _ways(name).items():
            with _unnoticed(), _udp_client(place) as held:
                _until_echoed(held)

                def ask_on_open(number: int, held: socket.socket = held) -> None:
                    _echo(held, b"open %d" % number)

                def ask_anew(number: int, place: Place = place) -> None:
                    with _udp_client(place) as fresh:
                        _echo(fresh, b"new %d" % number)

                kinds: Kinds = {"known": ask_on_open, "new": ask_anew}
                for kind, ask in kinds.items():
                    workload = f"echo server in Python, {way}"
                    samples = Samples(f"first byte, UDP, {kind} socket", "architect", workload)
                    _samples(name, n, ask, samples)
                    results.append(samples.record())
    return results


def _expect(wanted: valkey.Reply, reply: valkey.Reply) -> None:
    if reply != wanted:
        raise RuntimeError(f"the answer is {reply!r}, not {wanted!r}")


def _udp_client(place: Place) -> socket.socket:
    client = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    client.settimeout(10)
    client.connect(place)
    return client


def _echo(client: socket.socket, datagram: bytes) -> None:
    client.send(datagram)
    _expect(datagram, client.recv(2048))


def _until_echoed(client: socket.socket) -> None:
    end = time.monotonic() + 20
    while True:
        try:
            client.settimeout(0.2)
            _echo(client, b"there?")
            break
        except OSError:
            if time.monotonic() > end:
                raise
    # Answers that came too late for their question may not be taken for later ones.
    client.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            client.recv(2048)
    client.settimeout(10)


def crowd(hibernations: int) -> list[dict[str, Any]]:
    """Twenty clients, each with a connection and a counter, ask at once, around a hibernation; so often.

    A hibernation that the first of them prevents is no cycle of these, but counts in every other way.
    """
    name = "bench-crowd"
    workload = f"valkey {MEGABYTES} MB, {CLIENTS} clients"
    answered = Samples("answer around a hibernation", "architect", workload)
    chance = random.Random(1)
    with (
        harness.container(name, PORT),
        ThreadPoolExecutor(CLIENTS + 1) as pool,
        _unnoticed() as drain,
        contextlib.ExitStack() as closing,
    ):
        first = harness.connect(PORT)
        valkey.fill(first, MEGABYTES)
        first.close()
        place = _ways(name)["pod address"]
        clients = [valkey.Valkey(*place) for _ in range(CLIENTS)]
        for client in clients:
            closing.callback(client.close)
        before, done, rounds = _hibernations(name), 0, 0
        while done < hibernations:
            rounds += 1
            if rounds > _MOST_ROUNDS * hibernations:
                raise RuntimeError(f"only {done} hibernations in {rounds} rounds")
            hibernated = pool.submit(_try_to_hibernate, name)
            start = time.perf_counter() + chance.uniform(0, _MOMENT_S)
            moments = [start + chance.uniform(0, _SPREAD_S) for _ in clients]
            answers = pool.map(_increment, clients, range(CLIENTS), moments)
            for number, (reply, took) in enumerate(answers):
                answered.ms.append(took)
                if reply != rounds:
                    raise RuntimeError(f"client {number}, round {rounds}: {reply!r}")
            hibernated.result()
            done = _hibernations(name) - before
            drain()
    subject, crowd_ = "architect", f"{CLIENTS} clients"
    return [
        answered.record(),
        harness.figure("lost, doubled or reset", subject, crowd_, 0, "replies", len(answered.ms)),
        harness.figure("hibernated around requests", subject, crowd_, done, "cycles", rounds),
    ]


def _increment(client: valkey.Valkey, number: int, moment: float) -> tuple[valkey.Reply, float]:
    """Adds one to the client's counter at that moment; the answer, and milliseconds until it came."""
    time.sleep(max(0.0, moment - time.perf_counter()))
    began = time.perf_counter()
    reply = client("INCR", f"counter-{number}")
    return reply, (time.perf_counter() - began) * 1000


def _try_to_hibernate(name: str) -> None:
    # A packet that comes before the checkpoint is complete keeps the program awake.
    with contextlib.suppress(daemon.Refused):
        daemon.ask(Request(verb="sleep", pod=name))


def _hibernations(name: str) -> int:
    rows = json.loads(daemon.ask(Request(verb="ps")))
    return int(next(row["hibernations"] for row in rows if row["pod"] == name))


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """What `python -m bench traffic` runs; with it the peers, which cannot keep a connection."""
    n, few = (5, 3) if quick else (200, 30)
    return [
        lambda: tcp(n),
        lambda: udp(n),
        lambda: crowd(10 if quick else 1000),
        lambda: wakes.podman_checkpoint(MEGABYTES, few),
        lambda: wakes.runc_checkpoint(MEGABYTES, few),
        lambda: wakes.cold_start(few),
    ]
