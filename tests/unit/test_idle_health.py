"""Health, probes, failed hibernations and edited annotations, and what the idle clock makes of them.

The lines of the reference's table that test_idle_table.py does not play; in virtual time, as
test_idle_clock.py, whose stand-ins are used here.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import socket
import time
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters import cgroup, healthproxy, listeners, netns
from architect.contract.annotations import ContainerSettings, Monitor, PortMapping
from architect.contract.records import ContainerRecord
from architect.decisions.idle import Observed, Sleep, Wait, judge
from architect.processes.architectd.gates import Place
from tests.unit.probed import fresh_name
from tests.unit.test_idle_clock import SECOND, Clock, Group, Quiet, Time, expired

IDLE_S = 60
MAPPING = PortMapping("app", 80, 18080)
PROBE = ["pg_isready", "-q"]


class Gated(Quiet):
    """A place that remembers what it was told of probes."""

    def __init__(self) -> None:
        self.told: list[bool] = []

    def probed(self, *, now: bool) -> None:
        self.told.append(now)


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(time, "monotonic_ns", lambda: found.now)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: found)
    return found


@pytest.fixture
def clock(virtual: Time, monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a container that has just started."""
    record = ContainerRecord(
        id="x",
        namespace="default",
        pod="p",
        container="app",
        bundle="/x",
        runtime_root="/x",
        annotations={},
        engine=[],
        rootfs="/x",
        shared_ipc=False,
        ports=[("tcp", 80), ("udp", 80), ("tcp", 81)],
        probes=[PROBE],
    )
    settings = ContainerSettings("app", managed=True, scaledown_ns=IDLE_S * SECOND)
    ends: list[int] = []
    made = Clock(record, settings, lambda: ends.append(virtual.now))
    made.__dict__["expired"] = ends
    made.cgroup = cast(cgroup.Cgroup, Group())
    made.place = cast(Place, Gated())
    made.touch()
    made.start()
    return made


# ---- health ---------------------------------------------------------------------------------------


def test_one_that_is_not_ready_stays_awake_until_it_is(virtual: Time, clock: Clock) -> None:
    start = virtual.now
    clock.unready = True
    virtual.passes(10_000)
    assert expired(clock, start) == []
    clock.unready = False
    virtual.passes(200)
    # Looked for each quarter of the idle time; never early.
    (slept,) = expired(clock, start)
    assert 10_000 + IDLE_S <= slept <= 10_000 + IDLE_S * 1.25


def test_one_whose_proxy_has_not_seen_it_healthy_stays_awake(
    virtual: Time, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = {MAPPING}
    asked: list[PortMapping] = []

    def is_failing(namespace: Path, mapping: PortMapping) -> bool:
        asked.append(mapping)
        return mapping in failing

    monkeypatch.setattr(healthproxy, "is_failing", is_failing)
    healthy = PortMapping("app", 81, 18081)
    clock.settings = dataclasses.replace(clock.settings, health_ports=(healthy, MAPPING))
    start = virtual.now
    virtual.passes(1000)
    assert expired(clock, start) == []
    assert set(asked) == {healthy, MAPPING}
    failing.clear()
    virtual.passes(200)
    (slept,) = expired(clock, start)
    assert 1000 + IDLE_S <= slept <= 1000 + IDLE_S * 1.25


@pytest.mark.skipif(os.geteuid() != 0, reason="entering a network namespace takes root")
def test_the_proxys_sign_is_seen_from_outside_its_namespace() -> None:
    mapping = PortMapping(fresh_name(), 80, 18080)
    name = f"\0architect/failing/{mapping.container}/{mapping.shadow_port}"
    with netns.scratch():
        space = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        sign = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        sign.bind(name)
    place = Path(f"/proc/self/fd/{space}")
    try:
        assert healthproxy.is_failing(place, mapping)
        assert not healthproxy.is_failing(place, dataclasses.replace(mapping, shadow_port=1))
        assert not healthproxy.is_failing(Path("/proc/self/ns/net"), mapping)
        sign.close()
        assert not healthproxy.is_failing(place, mapping)
        assert not healthproxy.is_failing(Path("/proc/self/ns/gone"), mapping)
    finally:
        sign.close()
        os.close(space)


# ---- probes ---------------------------------------------------------------------------------------


def test_a_probe_is_no_activity_but_its_end_is_waited_for(
    virtual: Time, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = cast(Gated, clock.place)
    running: set[int] = set()
    monkeypatch.setattr(cgroup, "run_by", lambda outsiders, probes: running & outsiders.keys())
    start = virtual.now
    virtual.passes(59)
    clock.probe_begins()
    assert gate.told == [True], "what it does over lo would count"
    virtual.passes(0.5)
    clock.session = True  # its process, as /proc shows it
    running.add(-1)
    clock.probe_started()
    virtual.passes(40)
    assert expired(clock, start) == []
    assert gate.told == [True]
    clock.session = False
    running.clear()
    virtual.passes(1)
    assert gate.told == [True, False]
    (slept,) = expired(clock, start)
    assert 99.5 <= slept <= 100, "it hibernates as soon as the probe has ended"


def test_any_other_exec_is_a_session(
    virtual: Time, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroup, "run_by", lambda outsiders, probes: set())
    start = virtual.now
    clock.session = True
    virtual.passes(1000)
    assert (expired(clock, start), clock.sessions()) == ([], 1)


# ---- failures, edits ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "after"),
    [(0, 1.0), (1, 10.0), (2, 20.0), (3, 40.0), (6, 320.0), (7, 600.0), (40, 600.0)],
)
def test_after_failures_in_a_row_it_waits_longer_and_longer(
    virtual: Time, clock: Clock, failures: int, after: float
) -> None:
    clock.settings = dataclasses.replace(clock.settings, scaledown_ns=SECOND)
    clock.failures = failures
    start = virtual.now
    clock.touch()
    clock.start()
    virtual.passes(2000)
    assert expired(clock, start) == [after]


def test_failures_do_not_shorten_the_idle_time(virtual: Time, clock: Clock) -> None:
    clock.failures = 1
    start = virtual.now
    clock.start()
    virtual.passes(2000)
    assert expired(clock, start) == [IDLE_S]


@pytest.mark.parametrize(("fresh_s", "at"), [(30, 50), (50, 50), (600, 600)])
def test_another_duration_holds_from_the_last_activity_on(
    virtual: Time, clock: Clock, fresh_s: int, at: int
) -> None:
    start = virtual.now
    virtual.passes(50)
    clock.settings = dataclasses.replace(clock.settings, scaledown_ns=fresh_s * SECOND)
    clock.start(0.0)
    virtual.passes(2000)
    assert expired(clock, start) == [pytest.approx(at, abs=0.1)]


@pytest.mark.parametrize(
    "edited",
    [
        ContainerSettings("app", managed=True, autoscaledown=False, scaledown_ns=SECOND),
        ContainerSettings("app", managed=False, scaledown_ns=SECOND),
    ],
    ids=["disabled", "unmanaged"],
)
def test_it_is_off_for_those_that_are_not_to_hibernate_by_themselves(
    virtual: Time, clock: Clock, edited: ContainerSettings
) -> None:
    start = virtual.now
    clock.settings = edited
    clock.start()
    virtual.passes(2000)
    assert expired(clock, start) == []


# ---- connections ----------------------------------------------------------------------------------


def test_connections_are_those_to_ports_that_count(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = listeners.Connection(80, "192.0.2.1", 1)
    scrape = listeners.Connection(80, "192.0.2.1", 2)
    asked: list[set[int]] = []

    def connections(pid: int, ports: set[int]) -> set[listeners.Connection]:
        asked.append(ports)
        return {one, scrape}

    monkeypatch.setattr(listeners, "connections", connections)
    monkeypatch.setattr(listeners, "translated", lambda pid, ports: {scrape})
    assert clock.connections() == 0, "without the mode they do not keep it awake"
    clock.settings = dataclasses.replace(
        clock.settings, monitor=Monitor.CONNECTIONS, ignored_ports=frozenset({81})
    )
    assert (clock.connections(), asked) == (2, [{80}])
    clock.settings = dataclasses.replace(clock.settings, shadow_ports=(MAPPING,))
    assert clock.connections() == 1


# ---- the function ---------------------------------------------------------------------------------

times = st.integers(0, 10**12)


@given(times, times, st.integers(1, 10**11), st.booleans())
def test_unhealthy_ones_never_sleep_and_probes_are_waited_for_briefly(
    now: int, last: int, scaledown: int, probing: bool
) -> None:
    seen = Observed(now=now, last_activity=min(now, last), scaledown=scaledown, probing=probing)
    unhealthy = judge(dataclasses.replace(seen, unready=True))
    assert isinstance(unhealthy, Wait)
    assert unhealthy.counts
    without = judge(dataclasses.replace(seen, probing=False))
    verdict = judge(seen)
    if probing and isinstance(without, Sleep):
        assert verdict == Wait(now + SECOND // 10, "probe")
    else:
        assert verdict == without
