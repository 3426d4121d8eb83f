"""What clients notice: first byte by protocol and way, and many clients at the moment of hibernation.

The packets of the first are captured on the pods' bridge: no reset and no SYN sent twice may be among them,
else there is no figure. In the second every client counts, and every reply is checked.
"""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from bench import harness, valkey
from bench.harness import Samples
from tests.engine.servers.capture import Capture

PORT: Final = 16600
CLIENTS: Final = 20
TEST_IMAGE: Final = "localhost/architect-test:1"
SETTLED_S: Final = 0.6
"""Seconds between a hibernation and the packet: what follows a hibernation is mostly done by then."""
_SPREAD_S: Final = 0.25
"""The clients of a round ask at random moments within so long: a dump of this server takes about as long."""
_ECHO: Final = """
import socket
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
s.bind(("0.0.0.0", 6379))
while True:
    data, peer = s.recvfrom(2048)
    s.sendto(data, peer)
"""


def _address(name: str) -> str:
    form = "{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}"
    return harness.run(["podman", "inspect", "-f", form, name]).strip()


def _bridge() -> str:
    found = json.loads(harness.run(["podman", "network", "inspect", "podman"]))[0]
    return str(found.get("network_interface") or found["plugins"][0]["bridge"])


def _capture() -> Capture:
    own = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return Capture(own, _bridge())
    finally:
        os.close(own)


def _seen(capture: Capture) -> None:
    complaints = capture.complaints()
    if complaints:
        raise RuntimeError(f"clients noticed: {complaints[:3]}")


def tcp(n: int) -> list[dict[str, Any]]:
    """A valkey of 5 MB: new and open connections, by the pod's address and by a published port."""
    name = "bench-tcp"
    results = []
    with harness.container(name, PORT):
        first = harness.connect(PORT)
        valkey.fill(first, 5)
        first.close()
        ways = {"pod address": (_address(name), 6379), "published port": ("127.0.0.1", PORT)}
        with _capture() as capture:
            for way, place in ways.items():
                held = valkey.Valkey(*place)
                old = Samples("first byte, TCP, open connection", "architect", f"valkey, {way}")
                new = Samples("first byte, TCP, new connection", "architect", f"valkey, {way}")
                for _ in range(n):
                    _asleep(name)
                    with old.timed():
                        held("PING")
                for _ in range(n):
                    _asleep(name)
                    with new.timed():
                        fresh = valkey.Valkey(*place)
                        fresh("PING")
                    fresh.close()
                held.close()
                results += [old.record(), new.record()]
            _seen(capture)
    return results


def udp(n: int) -> list[dict[str, Any]]:
    """An echo server in Python: the first datagram is answered, none is sent twice."""
    name = "bench-udp"
    results = []
    flags = ("-p", f"127.0.0.1:{PORT + 1}:6379/udp")
    command = ("python3", "-c", _ECHO)
    with harness.container(name, PORT, image=TEST_IMAGE, command=command, flags=flags):
        ways = {"pod address": (_address(name), 6379), "published port": ("127.0.0.1", PORT + 1)}
        for way, place in ways.items():
            samples = Samples("first byte, UDP", "architect", f"echo server in Python, {way}")
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
                client.connect(place)
                _until_echoed(client)
                for number in range(n):
                    _asleep(name)
                    datagram = b"%d" % number
                    with samples.timed():
                        client.send(datagram)
                        answer = client.recv(2048)
                    if answer != datagram:
                        raise RuntimeError(f"datagram {number} was answered with {answer!r}")
            results.append(samples.record())
    return results


def _until_echoed(client: socket.socket) -> None:
    client.settimeout(0.2)
    end = time.monotonic() + 20
    while True:
        try:
            client.send(b"there?")
            client.recv(2048)
            break
        except OSError:
            if time.monotonic() > end:
                raise
    client.settimeout(10)


def _asleep(name: str) -> None:
    harness.sleep(name)
    time.sleep(SETTLED_S)


def crowd(rounds: int) -> list[dict[str, Any]]:
    """Twenty clients, each with a connection and a counter, ask around the moment of a hibernation."""
    name = "bench-crowd"
    answered = Samples(
        "answer around a hibernation", "architect", f"valkey 5 MB, {CLIENTS} clients"
    )
    wrong: list[str] = []
    lock = threading.Lock()
    chance = random.Random(1)
    with (
        harness.container(name, PORT) as _,
        ThreadPoolExecutor(CLIENTS) as pool,
        _capture() as seen,
    ):
        first = harness.connect(PORT)
        valkey.fill(first, 5)
        address = _address(name)
        clients = [valkey.Valkey(address, 6379) for _ in range(CLIENTS)]
        before = harness.row(name)["hibernations"]
        for count in range(1, rounds + 1):
            words = [harness.ARCHITECT, "sleep", name]
            command = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            start = time.perf_counter()

            def ask(number: int, delay: float, count: int = count, start: float = start) -> None:
                time.sleep(max(0.0, start + delay - time.perf_counter()))
                began = time.perf_counter()
                try:
                    reply = clients[number]("INCR", f"counter-{number}")
                except OSError as error:
                    reply = None
                    wrong.append(f"client {number}, round {count}: {error}")
                took = (time.perf_counter() - began) * 1000
                with lock:
                    answered.ms.append(took)
                if reply != count:
                    wrong.append(f"client {number}, round {count}: {reply!r}")

            delays = [chance.uniform(0, _SPREAD_S) for _ in clients]
            list(pool.map(ask, range(CLIENTS), delays))
            command.wait()
            if wrong:
                raise RuntimeError(f"lost or doubled: {wrong[:3]}")
        down = harness.row(name)["hibernations"] - before
        _seen(seen)
        for client in (*clients, first):
            client.close()
    subject, crowd_ = "architect", f"{CLIENTS} clients"
    return [
        answered.record(),
        harness.figure(
            "lost, doubled or reset", subject, crowd_, len(wrong), "replies", len(answered.ms)
        ),
        harness.figure("hibernated amid requests", subject, crowd_, down, "rounds", rounds),
    ]


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """What `python -m bench traffic` runs."""
    n = 5 if quick else 200
    return [lambda: tcp(n), lambda: udp(n), lambda: crowd(10 if quick else 1000)]
