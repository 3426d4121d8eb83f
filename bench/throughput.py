"""What being managed costs a running container: valkey-benchmark against plain runc, in turns.

Two containers under plain runc take part. What is shown is the share of their mean; how far the second of
them is from it is the noise of the machine.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

from bench import harness

PORTS: Final = {"architect": 16700, "runc": 16701, "runc, a second one": 16702}
_CLIENT: Final = "bench-client"
_SETTLED_S: Final = 3.0
"""Seconds after its start until a container is what it is for the rest of its life."""


def requests_per_second(port: int, requests: int) -> dict[str, float]:
    """GET and SET rates of one run of the client."""
    words = ["podman", "exec", _CLIENT, "valkey-benchmark", "-p", str(port), "-n", str(requests)]
    rates = {}
    for line in harness.run([*words, "-c", "20", "-t", "get,set", "--csv"]).splitlines()[1:]:
        name, rate = line.split(",")[:2]
        rates[name.strip('"')] = float(rate.strip('"'))
    return rates


@contextlib.contextmanager
def client() -> Iterator[None]:
    """The container that the client runs in, on the host's network."""
    words = ["podman", "--runtime", "runc", "run", "-d", "--name", _CLIENT, "--network", "host"]
    harness.run([*words, "--entrypoint", "sleep", harness.IMAGE, "3600"])
    try:
        yield
    finally:
        harness.run(["podman", "rm", "-f", "-t", "0", _CLIENT])


def compare(rounds: int, requests: int) -> list[dict[str, Any]]:
    """Rates of all in turns, so that whatever else the machine does hits each; shares within a round."""
    seen: dict[tuple[str, str], list[float]] = {}
    shares: dict[tuple[str, str], list[float]] = {}
    with (
        client(),
        harness.container("bench-managed", PORTS["architect"], idle="10m"),
        harness.container("bench-plain", PORTS["runc"], managed=False),
        harness.container("bench-plain-2", PORTS["runc, a second one"], managed=False),
    ):
        for port in PORTS.values():
            harness.connect(port).close()
            requests_per_second(port, requests)
        time.sleep(_SETTLED_S)
        subjects = list(PORTS)
        for number in range(rounds):
            turn = number % len(subjects)
            order = subjects[turn:] + subjects[:turn]
            rates = {subject: requests_per_second(PORTS[subject], requests) for subject in order}
            for subject, by_test in rates.items():
                for test, rate in by_test.items():
                    seen.setdefault((subject, test), []).append(rate)
                    plain = (rates["runc"][test] + rates["runc, a second one"][test]) / 2
                    share = rate / plain * 100
                    shares.setdefault((subject, test), []).append(share)
    results = [
        harness.figure(
            "throughput",
            subject,
            f"valkey-benchmark {test}",
            statistics.median(rates),
            "req/s",
            rounds,
        )
        for (subject, test), rates in sorted(seen.items())
    ]
    return results + [
        harness.figure(
            "throughput, share of runc's",
            subject,
            f"valkey-benchmark {test}",
            statistics.median(found),
            "%",
            rounds,
        )
        for (subject, test), found in sorted(shares.items())
        if subject != "runc"
    ]


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """The benchmarks of this module."""
    return [lambda: compare(3 if quick else 45, 20_000)]
