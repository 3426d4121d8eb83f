"""The daemon's idle clock in virtual time: it looks when it was told to, and remembers what it saw."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any, cast

import pytest

from architect.adapters.cgroup import Cgroup
from architect.contract.annotations import ContainerSettings
from architect.contract.records import ContainerRecord
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.gates import Place

SECOND = 10**9


class Timer:
    def __init__(self, due: int, call: Callable[[], None]) -> None:
        self.due, self.call, self.cancelled = due, call, False

    def cancel(self) -> None:
        self.cancelled = True


class Time:
    """A loop's clock and its timers."""

    def __init__(self) -> None:
        self.now = 1000 * SECOND
        self.timers: list[Timer] = []

    def call_later(self, delay: float, call: Callable[[], None]) -> Timer:
        self.timers.append(Timer(self.now + round(delay * SECOND), call))
        return self.timers[-1]

    def passes(self, seconds: float) -> None:
        end = self.now + round(seconds * SECOND)
        while True:
            due = [one for one in self.timers if not one.cancelled and one.due <= end]
            if not due:
                break
            first = min(due, key=lambda one: one.due)
            self.timers.remove(first)
            self.now = max(self.now, first.due)
            first.call()
        self.now = end


class Group:
    """A cgroup of which only this is asked."""

    paused = False

    def frozen(self) -> bool:
        return self.paused


class Quiet:
    """A place at a gate to which no packet comes."""

    last_ns = 0

    def activity(self) -> Any:
        return self


class Clock(IdleClock):
    """Counts a session as /proc would show it."""

    session = False

    def _outsiders(self, group: Cgroup) -> dict[int, int]:
        return {-1: 0} if self.session else {}


@pytest.fixture
def virtual(monkeypatch: pytest.MonkeyPatch) -> Time:
    found = Time()
    monkeypatch.setattr(time, "monotonic_ns", lambda: found.now)
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: found)
    return found


@pytest.fixture
def clock(virtual: Time) -> Clock:
    """Of a container that has just started; `expired` is when its time had come."""
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
        ports=[("tcp", 80)],
    )
    settings = ContainerSettings("app", managed=True, scaledown_ns=60 * SECOND)
    expired: list[int] = []
    made = Clock(record, settings, lambda: expired.append(virtual.now))
    made.__dict__["expired"] = expired
    made.cgroup = cast(Cgroup, Group())
    made.place = cast(Place, Quiet())
    made.touch()
    made.start()
    return made


def expired(clock: Clock, since: int) -> list[float]:
    """Seconds after ``since`` at which it said that the container is idle."""
    return [(at - since) / SECOND for at in clock.__dict__["expired"]]


def test_it_runs_out_once(virtual: Time, clock: Clock) -> None:
    start = virtual.now
    virtual.passes(300)
    assert expired(clock, start) == [60]


def test_a_session_that_ends_unseen_counts_until_it_was_looked_for(
    virtual: Time, clock: Clock
) -> None:
    start = virtual.now
    virtual.passes(10)
    clock.leases += 1
    clock.session = True
    clock.release()
    virtual.passes(44)
    clock.session = False
    virtual.passes(300)
    assert expired(clock, start) == [55 + 60]


def test_a_pause_counts_until_it_was_looked_for(virtual: Time, clock: Clock) -> None:
    start = virtual.now
    group = cast(Group, clock.cgroup)
    clock.leases += 1
    group.paused = True
    clock.release()
    virtual.passes(1000)
    assert expired(clock, start) == []
    group.paused = False
    virtual.passes(300)
    assert expired(clock, start) == [1005 + 60]


def test_after_a_wake_nothing_is_remembered(virtual: Time, clock: Clock) -> None:
    group = cast(Group, clock.cgroup)
    group.paused = True
    virtual.passes(61)
    group.paused = False
    clock.stop()
    virtual.passes(100)
    start = virtual.now
    clock.touch()
    clock.start()
    virtual.passes(300)
    assert expired(clock, start) == [60]


def test_the_end_of_a_call_does_not_start_a_clock_that_is_stopped(
    virtual: Time, clock: Clock
) -> None:
    clock.stop()
    clock.leases += 1
    clock.release()
    virtual.passes(300)
    assert expired(clock, 0) == []
