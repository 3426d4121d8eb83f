"""What a container's traffic does in each moment of its life, by its network-monitor."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest

from architect.adapters.gate import GateError
from architect.contract.annotations import ContainerSettings, Monitor
from architect.contract.records import ContainerRecord
from architect.processes.architectd import traffic
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.context import Context
from architect.processes.architectd.gates import Place
from architect.processes.architectd.reporter import Reporter
from architect.processes.architectd.traffic import Traffic


class Recorder:
    """A place at a gate: remembers what is asked of it."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.repaired: list[str] = []
        self.refuses = ""

    def repair(self) -> list[str]:
        return self.repaired

    def hold(self) -> None:
        if self.refuses:
            raise GateError(self.refuses)
        self.asked.append("hold")

    def drop(self) -> None:
        self.asked.append("drop")

    def open(self) -> int:
        self.asked.append("open")
        return 0

    def present(self) -> None:
        self.asked.append("present")

    def absent(self, *, only_opening: bool | None) -> None:
        self.asked.append(
            {None: "absent, as before", True: "opening", False: "absent"}[only_opening]
        )

    def answer_keep_alives(self, connections: object) -> int:
        return 0


class Bench:
    """Traffic of a container, and what it did."""

    def __init__(
        self, monitor: Monitor, connections: int = 0, *, pod_uid: str = "", in_cluster: bool = False
    ) -> None:
        self.place = Recorder()
        self.told: list[str] = []
        clock = SimpleNamespace(place=cast(Place, self.place), connections=lambda: connections)
        report = SimpleNamespace(
            name="pod/app", event=lambda _, text: self.told.append(text), log=lambda *_, **__: None
        )
        settings = ContainerSettings("app", managed=True, monitor=monitor)
        record = cast(
            ContainerRecord, SimpleNamespace(id="x", pod_uid=pod_uid, ports=[("tcp", 80)])
        )
        context = cast(
            Context, SimpleNamespace(gates=None, answers_keep_alives=False, in_cluster=in_cluster)
        )
        self.traffic = Traffic(
            record,
            settings,
            context,
            cast(IdleClock, clock),
            cast(Reporter, report),
            lambda: None,
        )

    def does(self, *acts: Callable[[Traffic], Any]) -> list[str]:
        """Plays them; returns what was asked of the gate."""

        async def body() -> None:
            for act in acts:
                act(self.traffic)
                await asyncio.sleep(0)

        asyncio.run(body())
        return self.place.asked


def dump(traffic: Traffic) -> None:
    traffic.hold(wakes=False)


def restore(traffic: Traffic) -> None:
    traffic.hold(wakes=True)


CYCLE = (dump, Traffic.sleep, restore, Traffic.open)


@pytest.mark.parametrize(
    ("monitor", "connections", "asked"),
    [
        (Monitor.NONE, 0, ["hold", "drop", "absent", "hold", "present", "open"]),
        (Monitor.PACKETS, 0, ["hold", "hold", "absent", "hold", "present", "open"]),
        (Monitor.CONNECTIONS, 0, ["hold", "hold", "opening", "hold", "present", "open"]),
        # Hibernated by command: nothing of theirs may be lost.
        (Monitor.CONNECTIONS, 2, ["hold", "hold", "absent", "hold", "present", "open"]),
    ],
)
def test_a_cycle(monitor: Monitor, connections: int, asked: list[str]) -> None:
    """While a transition runs packets wait in every mode; asleep it is the mode that says."""
    bench = Bench(monitor, connections)
    assert bench.does(*CYCLE) == asked
    assert bench.told == []


@pytest.mark.parametrize("monitor", list(Monitor))
def test_one_that_is_given_up_loses_nothing(monitor: Monitor) -> None:
    assert Bench(monitor).does(dump, Traffic.open) == ["hold", "open"]


@pytest.mark.parametrize("monitor", [Monitor.PACKETS, Monitor.CONNECTIONS])
def test_what_an_earlier_daemon_has_told_the_gate_of_connections_stays(monitor: Monitor) -> None:
    assert Bench(monitor).does(Traffic.sleep) == ["hold", "absent, as before"]


def test_what_was_taken_from_the_gate_is_put_back_before_it_closes_and_told() -> None:
    bench = Bench(Monitor.PACKETS)
    bench.place.repaired = ["filter on eth0", "IPv4 rule"]
    assert bench.does(dump) == ["hold"]
    assert bench.told == [
        "pod/app: put back what was taken from its gate: filter on eth0, IPv4 rule"
    ]


def test_a_gate_that_cannot_hold_is_told() -> None:
    bench = Bench(Monitor.PACKETS)
    bench.place.refuses = "the kernel refuses"
    assert bench.does(dump) == []
    assert bench.told == ["pod/app: the kernel refuses"]


def test_without_a_gate_nothing_is_asked_of_it() -> None:
    bench = Bench(Monitor.PACKETS)
    bench.traffic._clock.place = None
    assert bench.does(*CYCLE) == []


@pytest.mark.parametrize(
    ("pod_uid", "in_cluster", "sidecar"),
    [("", False, False), ("a-uid", False, False), ("a-uid", True, True), ("", True, False)],
    ids=["podman", "lone containerd", "cluster", "podman on a cluster's node"],
)
def test_who_answers_probes(
    pod_uid: str, in_cluster: bool, sidecar: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[bool] = []
    monkeypatch.setattr(traffic, "Proxy", lambda *_, sidecar: made.append(sidecar))
    Bench(Monitor.PACKETS, pod_uid=pod_uid, in_cluster=in_cluster)
    assert made == [sidecar]
