"""Ends a container as the kubelet and runc would have done, and runs its hooks.

Called by :mod:`.cluster.leaving` once it is clear that a container ends here rather than moves, and after a
fresh start. The kubelet can do neither: its hooks and its grace would run for a pod that moves, too, so
admission has taken them out of the pod (:mod:`architect.adapters.hooks`).
"""

from __future__ import annotations

import asyncio
import signal as signals
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, Protocol

from architect.adapters import hooks
from architect.contract.annotations import POST_START, PRE_STOP
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord
from architect.contract.states import State

FAILED_PRE_STOP: Final = "FailedPreStopHook"
FAILED_POST_START: Final = "FailedPostStartHook"
FAILED_KILL: Final = "FailedKillPod"
"""The kubelet's reasons."""

_LEAST_GRACE_S: Final = 2.0
"""Seconds between the stop signal and SIGKILL at the least, however long preStop took: the kubelet's."""
_AGAIN_S: Final = 10.0
"""Seconds until SIGKILL is tried again on what does not end."""
_NEVER_RAN: Final = (State.CREATED, State.ARRIVING)

Report = Callable[[str, str], None]
"""Makes an event of a reason and a message."""


class Clock(Protocol):
    """Of the container's idle clock: see :class:`.clock.IdleClock`."""

    leases: int

    def release(self) -> None:
        """Gives one lease back."""


class Container(Protocol):
    """What must be known of a container: see :class:`.container.ManagedContainer`."""

    @property
    def state(self) -> State:
        """Where it is in its life."""

    @property
    def name(self) -> str:
        """pod/container."""

    @property
    def record(self) -> ContainerRecord:
        """What is written down of it."""

    @property
    def ended(self) -> asyncio.Event:
        """Set when it has ended."""

    @property
    def clock(self) -> Clock:
        """Its idle clock."""

    async def wake(self, why: str) -> None:
        """Returns when the program runs. Raises ArchitectError."""

    async def deliver(self, number: int) -> None:
        """Gives the program a signal. Raises ArchitectError."""

    def save(self) -> None:
        """Writes its record down."""


_ending: Final[set[str]] = set()
"""Ids of containers that are being ended: nobody begins that twice."""


async def end(
    managed: Container,
    annotations: Mapping[str, str],
    *,
    pod_ip: str,
    ports: Mapping[str, int],
    signal: int,
    grace_s: float,
    report: Report,
) -> None:
    """preStop, the stop signal, and SIGKILL after the user's grace. Returns when it has ended.

    Called once more meanwhile, it only waits. Failures are events; it raises none.
    """
    if managed.record.id in _ending:
        await managed.ended.wait()
        return
    _ending.add(managed.record.id)
    try:
        # On the way to its end it may be idle for long, and hibernated it would never get there.
        with _kept_awake(managed):
            began = time.monotonic()
            if grace_s > 0:
                await _pre_stop(managed, annotations, pod_ip, ports, grace_s, report)
            left = max(_LEAST_GRACE_S, began + grace_s - time.monotonic())
            await _stop(managed, signal, left, report)
    finally:
        _ending.discard(managed.record.id)


async def started(
    managed: Container,
    annotations: Mapping[str, str],
    *,
    pod_ip: str,
    ports: Mapping[str, int],
    grace_s: float,
    report: Report,
    signal: int = signals.SIGTERM,
) -> None:
    """postStart, after a fresh start, once. A container whose hook fails is ended: the kubelet restarts it.

    Failures are events; it raises none.
    """
    if managed.record.post_started:
        return
    # Before it has run: what an exec has begun goes on without the daemon, and must not begin twice.
    managed.record.post_started = True
    managed.save()
    with _kept_awake(managed):
        try:
            handler = _handler(managed, annotations, POST_START)
            if handler is None:
                return
            target = _target(managed, pod_ip, ports)
            await _while_it_lives(managed, _awake_run(managed, handler, target, None, "postStart"))
            return
        except ArchitectError as error:
            if managed.record.id in _ending or managed.ended.is_set():
                return
            report(FAILED_POST_START, f"{managed.name}: postStart: {error}")
    await end(
        managed,
        annotations,
        pod_ip=pod_ip,
        ports=ports,
        signal=signal,
        grace_s=grace_s,
        report=report,
    )


async def _pre_stop(
    managed: Container,
    annotations: Mapping[str, str],
    pod_ip: str,
    ports: Mapping[str, int],
    grace_s: float,
    report: Report,
) -> None:
    try:
        handler = _handler(managed, annotations, PRE_STOP)
        if handler is None or managed.state in _NEVER_RAN:
            return
        target = _target(managed, pod_ip, ports)
        await _while_it_lives(managed, _awake_run(managed, handler, target, grace_s, "preStop"))
    except ArchitectError as error:
        if not managed.ended.is_set():
            report(FAILED_PRE_STOP, f"{managed.name}: preStop: {error}")


async def _stop(managed: Container, signal: int, grace_s: float, report: Report) -> None:
    """The stop signal, then SIGKILL until it has ended."""
    deadline = time.monotonic() + grace_s
    if managed.state is State.SCALED_DOWN and signal != signals.SIGKILL:
        # The keeper would wake it by itself, and does so if this fails. The daemon checks the checkpoint
        # before, lifts limits, and reports.
        waking = _while_it_lives(managed, managed.wake("stop signal"))
        await _within(waking, grace_s)
    await _deliver(managed, signal, report)
    while not await _within(managed.ended.wait(), deadline - time.monotonic()):
        await _deliver(managed, signals.SIGKILL, report)
        deadline = time.monotonic() + _AGAIN_S


async def _deliver(managed: Container, signal: int, report: Report) -> None:
    try:
        await _while_it_lives(managed, managed.deliver(int(signal)))
    except ArchitectError as error:
        # The keeper of one that has just ended is gone, too.
        if not managed.ended.is_set():
            report(FAILED_KILL, f"{managed.name}: signal {int(signal)} was not delivered: {error}")


def _handler(
    managed: Container, annotations: Mapping[str, str], annotation: str
) -> hooks.Handler | None:
    """Its hook; None if it has none. Raises HookError."""
    text = annotations.get(annotation)
    return None if text is None else hooks.parse(text).get(managed.record.container)


def _target(managed: Container, pod_ip: str, ports: Mapping[str, int]) -> hooks.Target:
    return hooks.Target(managed.record.runtime_root, managed.record.id, pod_ip, ports)


async def _awake_run(
    managed: Container,
    handler: hooks.Handler,
    target: hooks.Target,
    timeout_s: float | None,
    why: str,
) -> None:
    """Runs a hook in a container that is woken for it. Raises ArchitectError."""
    began = time.monotonic()
    try:
        async with asyncio.timeout(timeout_s):
            await managed.wake(why)
    except TimeoutError as error:
        raise hooks.HookError("wake", "it took longer than the grace", "see its events") from error
    left = None if timeout_s is None else max(0.0, began + timeout_s - time.monotonic())
    await hooks.run(handler, target, left)


async def _while_it_lives(managed: Container, work: Coroutine[Any, Any, Any]) -> None:
    """Awaits some work, but not beyond the container's end. Raises what the work raises."""
    task = asyncio.ensure_future(work)
    over = asyncio.ensure_future(managed.ended.wait())
    try:
        await asyncio.wait({task, over}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            task.result()
    finally:
        for one in (task, over):
            one.cancel()
        # Seen to its end: it may have a process to end.
        await asyncio.gather(task, over, return_exceptions=True)


async def _within(work: Coroutine[Any, Any, Any], seconds: float) -> bool:
    """Whether the work was done in time; its failures do not matter."""
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            await work
    except (TimeoutError, ArchitectError):
        return False
    return True


@contextmanager
def _kept_awake(managed: Container) -> Iterator[None]:
    managed.clock.leases += 1
    try:
        yield
    finally:
        managed.clock.release()
