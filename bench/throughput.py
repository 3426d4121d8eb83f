"""What being managed costs a running container: valkey-benchmark against plain runc, in turns."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

from bench import harness

PORTS = {"architect": 16700, "runc": 16701}


def requests_per_second(port: int, requests: int) -> dict[str, float]:
    """GET and SET rates of one run."""
    words = ["podman", "--runtime", "runc", "run", "--rm", "--network", "host", harness.IMAGE]
    words += [
        "valkey-benchmark",
        "-p",
        str(port),
        "-n",
        str(requests),
        "-c",
        "20",
        "-t",
        "get,set",
        "--csv",
    ]
    rates = {}
    for line in harness.run(words).splitlines()[1:]:
        name, rate = line.split(",")[:2]
        rates[name.strip('"')] = float(rate.strip('"'))
    return rates


def compare(rounds: int, requests: int) -> list[dict[str, Any]]:
    """Rates of both in turns, so that whatever else the machine does hits both; ratio of each pair."""
    seen: dict[tuple[str, str], list[float]] = {}
    ratios: dict[str, list[float]] = {}
    with (
        harness.container("bench-managed", PORTS["architect"], idle="10m"),
        harness.container("bench-plain", PORTS["runc"], managed=False),
    ):
        for port in PORTS.values():
            harness.connect(port).close()
            requests_per_second(port, requests // 4)
        for number in range(rounds):
            order = sorted(PORTS, reverse=bool(number % 2))
            rates = {subject: requests_per_second(PORTS[subject], requests) for subject in order}
            for subject, by_test in rates.items():
                for test, rate in by_test.items():
                    seen.setdefault((subject, test), []).append(rate)
            for test in rates["runc"]:
                share = rates["architect"][test] / rates["runc"][test] * 100
                ratios.setdefault(test, []).append(share)
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
    results += [
        harness.figure(
            "throughput, share of runc's",
            "architect",
            f"valkey-benchmark {test}",
            statistics.median(shares),
            "%",
            rounds,
        )
        for test, shares in sorted(ratios.items())
    ]
    return results


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """The benchmarks of this module."""
    return [lambda: compare(2 if quick else 6, 20_000 if quick else 100_000)]
