"""One managed container: carries out what the table of its life says (:mod:`architect.decisions.life`).

Made by :mod:`.registry`, for a new container or one found at the daemon's start. Every change of state goes
through :meth:`ManagedContainer.happen`; slow actions run as tasks and report back as happenings.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import shutil
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from architect.adapters import (
    bindable,
    cgroup,
    criu,
    listeners,
    mounts,
    podman,
    runc_state,
    sysvipc,
)
from architect.adapters.events import EventLog
from architect.adapters.gate import GateError
from architect.adapters.keeper import Keeper, KeeperError, KeeperStatus, PagerState
from architect.adapters.store import Store
from architect.contract import paths
from architect.contract.annotations import ContainerSettings, Monitor
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord, Event, Row
from architect.contract.states import Action, Happening, State
from architect.decisions import idle, life
from architect.processes.architectd.gates import Gates, Place

_RETRY_S: Final = 10.0
"""Seconds after a failed restore until the next try, and after a failed dump at least until the next."""
_SECOND_NS: Final = 10**9
_AWAKE: Final = (State.RUNNING, State.FILLING)


class NotAwake(ArchitectError):
    """The container could not be woken."""


class NotAsleep(ArchitectError):
    """The container could not be hibernated."""


@dataclass(slots=True)
class Context:
    """What all containers of the daemon share."""

    gates: Gates
    events: EventLog
    criu_version: str


class ManagedContainer:
    """See the module."""

    def __init__(
        self, record: ContainerRecord, settings: ContainerSettings, context: Context, state: State
    ) -> None:
        self.record = record
        self.settings = settings
        self.state = state
        self.leases = 0
        """Engine calls under way that need it awake."""
        self._context = context
        self._run = paths.CONTAINERS / record.id
        self._store = Store(paths.CHECKPOINTS, self._run / "checkpoint", record.id)
        self._keeper: Keeper | None = None
        self._place: Place | None = None
        self._cgroup: cgroup.Cgroup | None = None
        self._hook: criu.DumpHook | None = None
        self._clock: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._awake: list[asyncio.Future[None]] = []
        self._asleep: list[asyncio.Future[None]] = []
        self._changed: list[asyncio.Future[None]] = []
        self._touched = 0
        self._began = 0.0
        self._failure: ArchitectError | None = None
        self._why = ""
        self._init = 0
        self._checkpoint_bytes = 0

    # ---- what others ask of it -------------------------------------------------------------------

    def happen(self, happening: Happening) -> None:
        """The only way its state changes."""
        before, step = self.state, life.step(self.state, happening)
        if step.state is not before:
            self.state = step.state
            self.record.since = time.time()
        for action in step.actions:
            self._do(action)
        if step.state is not before:
            self._log("transition", was=before.value, because=happening.value, why=self._why)
            if self.state is not State.ENDED:
                self.save()
            self._settle_waiters()

    async def wake(self, why: str) -> None:
        """Returns when the program runs.

        Raises:
            NotAwake: its restore failed, or the container ended; its checkpoint is kept.
        """
        self.touch()
        if self.state in _AWAKE or self.state is State.CREATED:
            return
        waiter = asyncio.get_running_loop().create_future()
        self._awake.append(waiter)
        self._why = why
        self.happen(Happening.WANTED)
        await waiter

    async def sleep(self, why: str) -> None:
        """Returns when the container is hibernated.

        Raises:
            NotAsleep: it could not be, or somebody wanted it awake meanwhile.
        """
        while self.state is State.FILLING:
            await self._next_state()
        if self.state is State.RUNNING:
            sessions = self._sessions()
            if sessions:
                raise NotAsleep(
                    what=f"{self.name} stays awake",
                    why=f"{sessions} exec session(s) are open",
                    fix="end them first",
                )
            if self._cgroup is not None and self._cgroup.frozen():
                raise NotAsleep(
                    what=f"{self.name} stays", why="it is paused", fix="unpause it first"
                )
        if self.state is State.CREATED:
            raise NotAsleep(
                what=f"{self.name} stays", why="it is not started", fix="start it first"
            )
        if self.state in (State.SCALED_DOWN, State.STRANDED):
            return
        waiter = asyncio.get_running_loop().create_future()
        self._asleep.append(waiter)
        self._why = why
        self.happen(Happening.IDLE)
        await waiter

    @property
    def name(self) -> str:
        """pod/container, for messages."""
        return f"{self.record.pod}/{self.record.container}"

    def row(self) -> Row:
        """Its line in `architect ps`."""
        idle_s = None
        if self.state in _AWAKE:
            idle_s = round(max(0, time.monotonic_ns() - self._last_activity()) / _SECOND_NS, 1)
        since = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.record.since))
        return Row(
            namespace=self.record.namespace,
            pod=self.record.pod,
            container=self.record.container,
            id=self.record.id,
            state=self.state.shown,
            since=since,
            idle_s=idle_s,
            hibernations=self.record.hibernations,
            last_scale_down_ms=self.record.last_scale_down_ms,
            last_scale_up_ms=self.record.last_scale_up_ms,
            checkpoint_bytes=self._store.size(),
            memory_bytes=self._cgroup.memory_bytes() if self._cgroup else 0,
            error=self.record.error,
        )

    def save(self) -> None:
        """Writes meta.json, atomically."""
        file = self._run / "meta.json"
        fresh = self._run / "meta.json.new"
        try:
            fresh.write_bytes(msgspec.json.encode(self.record))
            fresh.rename(file)
        except OSError as error:
            # A full disk must not end a transition half way; the record is only a help.
            self._log("record not written", error=str(error))

    # ---- beginning and end ---------------------------------------------------------------------------

    async def attach(self) -> KeeperStatus:
        """Connects to the keeper and the gate.

        Raises:
            KeeperError: the keeper is gone.
        """
        self._keeper = Keeper(self._run / "ctl")
        status = await self._keeper.ask("status")
        self.record.keeper, self._init = status.keeper, status.init
        self._cgroup = cgroup.Cgroup.of(status.keeper)
        cgroup.return_limits(self.record.lifted)
        self.record.lifted = {}
        await self._join_gate()
        self._keeper.watch(self._news)
        self.save()
        return status

    async def _join_gate(self) -> None:
        netns = Path(f"/proc/{self.record.keeper}/ns/net")
        try:
            self._place = await self._context.gates.join(netns, self.record.owner, self._packets)
        except ArchitectError as error:
            self.record.error = str(error)
            self._event("Warning", str(error))
            return
        self.record.owner = self._place.owner
        if self.record.ports is not None:
            self._place.set_ports(self.record.ports, self.settings.ignored_ports)

    def started(self) -> None:
        """The engine has started the program."""
        if not self.record.first_started:
            self.record.first_started = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.touch()
        self.happen(Happening.STARTED)
        self.begin_clock()

    def begin_clock(self) -> None:
        """Learns what the idle clock needs, then lets it run."""
        if self.record.ports is None:
            self._task(self._learn_ports())
        elif self.state is State.RUNNING:
            self._look_in(0.0)

    def resume(self, status: KeeperStatus, state: State) -> None:
        """Goes on from where another daemon left it; ``state`` is what was found to be true."""
        self.state = state
        self.touch()
        if self._place is not None:
            if state in (State.SCALED_DOWN, State.STRANDED):
                self._gate_sleep()
            else:
                self._place.open()
        if state is State.SCALED_DOWN:
            self._checkpoint_bytes = self._store.size()
        elif state is State.RUNNING:
            self._retire()
        elif state is State.FILLING:
            self._mend_runtime()
            self._news(status)
        self.save()
        if state is not State.CREATED:
            self.begin_clock()

    async def order(self, words: str) -> KeeperStatus:
        """Passes an order to the keeper, for the daemon's start only.

        Raises:
            KeeperError: it refused, or is gone.
        """
        if self._keeper is None:
            raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
        return await self._keeper.ask(words, timeout_s=120.0)

    def let_go(self) -> None:
        """The daemon ends; the container stays as it is."""
        self._stop_clock()
        if self._keeper is not None:
            self._keeper.close()

    def forget(self) -> None:
        """The container has ended, or was never made: leaves nothing of it."""
        self._stop_clock()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._hook is not None:
            self._hook.close()
            self._hook = None
        if self._keeper is not None:
            self._keeper.close()
        if self._place is not None:
            self._place.leave()
            self._place = None
        mounts.release(self._run / "mnt")
        self._store.drop()
        for name in os.listdir(self._run) if self._run.exists() else ():
            with contextlib.suppress(OSError):
                (self._run / name).unlink()
        with contextlib.suppress(OSError):
            self._run.rmdir()

    # ---- carrying out ------------------------------------------------------------------------------------

    def _do(self, action: Action) -> None:
        match action:
            case Action.GATE_HOLD:
                self._gate_hold()
            case Action.GATE_OPEN:
                self._gate_open()
            case Action.GATE_SLEEP:
                self._gate_sleep()
            case Action.START_DUMP:
                self._began = time.monotonic()
                self._task(self._dump())
            case Action.KEEP_IMAGES:
                self._task(self._keep_images())
            case Action.CONFIRM:
                self._confirm()
            case Action.REFUSE:
                if self._hook is not None:
                    self._hook.answer(end_it=False)
            case Action.SETTLE:
                self._task(self._settle())
            case Action.START_RESTORE:
                self._began = time.monotonic()
                self._task(self._restore())
            case Action.MEND_RUNTIME:
                self._mend_runtime()
            case Action.START_IDLE_CLOCK:
                self.touch()
                self._look_in(self.settings.scaledown_ns / _SECOND_NS)
            case Action.STOP_IDLE_CLOCK:
                self._stop_clock()
            case Action.DROP_IMAGES:
                self._retire()
            case Action.SCHEDULE_RETRY:
                self._clock = asyncio.get_running_loop().call_later(_RETRY_S, self._retry)
            case Action.CLEAN_UP:
                self.forget()
            case _:
                self._report(action)

    def _gate_hold(self) -> None:
        if self._place is not None:
            repaired = self._place.repair()
            if repaired:
                self._event(
                    "Warning", f"put back what was taken from its gate: {', '.join(repaired)}"
                )
            self._place.hold()

    def _gate_open(self) -> None:
        if self._place is not None:
            self._place.open()

    def _gate_sleep(self) -> None:
        if self._place is None:
            return
        if self.settings.monitor is Monitor.NONE:
            self._place.drop()
        else:
            self._place.hold()

    def _packets(self) -> None:
        """Packets for its ports are held."""
        self._why = "packet"
        self.happen(Happening.WANTED)

    def _retry(self) -> None:
        self._why = "retry"
        if self.state is State.STRANDED and self._awake_is_wanted():
            self.happen(Happening.WANTED)

    def _awake_is_wanted(self) -> bool:
        return bool(self._awake) or self._place is None or self._place.activity().held > 0

    def _mend_runtime(self) -> None:
        try:
            runc_state.point_to(self.record.runtime_root, self.record.id, self._init)
        except (OSError, ValueError, KeyError) as error:
            self._event("Warning", f"runc does not know the new init, exec will fail: {error}")

    # ---- hibernation -----------------------------------------------------------------------------------

    async def _dump(self) -> None:
        self._failure = None
        status = -1
        generation = self.record.generation + 1
        images: Path | None = None
        try:
            if self._keeper is None:
                raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
            self._retire()
            subject = await self._subject()
            await self._keeper.ask("dump-begin")
            images = self._store.begin(generation)
            self.record.generation = generation
            words = criu.restore_words(
                subject, self._store.images(generation), self._run / "restored.pid"
            )
            (self._run / "restore.argv").write_bytes(b"\0".join(w.encode() for w in words) + b"\0")
            self.save()
            self._hook = criu.DumpHook(self._run / "hook", self._images_written)
            words = criu.dump_words(subject, images)
            status = await criu.run(words, self._hook.environment, self._run / "dump.pid")
        except (ArchitectError, OSError) as error:
            self._failure = _as_error(error, f"{self.name} could not be hibernated")
        finally:
            if self._hook is not None:
                self._hook.close()
                self._hook = None
        await self._end_dump(status, images)

    async def _end_dump(self, status: int, images: Path | None) -> None:
        """CRIU has ended: finds out what is true now."""
        if self.state is State.ENDED or self._keeper is None:
            return
        try:
            if status != 0:
                if self._failure is None and images is not None:
                    place = self._store.committed() or images
                    with contextlib.suppress(OSError):
                        shutil.copyfile(place / "dump.log", self._run / "dump.log")
                    self._failure = criu.CriuError(
                        what=f"{self.name} could not be hibernated, it runs on",
                        why=criu.reason(self._run / "dump.log"),
                        fix="see docs/troubleshooting.md, 'dump failed'",
                    )
                self._store.retire()
            found = await self._keeper.ask("dump-end")
        except KeeperError:
            return  # Its end arrives by the watch.
        if found.phase == "hibernated":
            if self.record.shared_ipc is False:
                sysvipc.remove_all(self.record.keeper)
            self.happen(Happening.DUMPED)
        else:
            self.happen(Happening.DUMP_FAILED)

    async def _subject(self) -> criu.Subject:
        """Everything CRIU must be told.

        Raises:
            ArchitectError: the container has something that would be lost.
        """
        record, init = self.record, self._init
        if record.shared_ipc and sysvipc.objects(record.keeper):
            raise NotAsleep(
                what=f"{self.name} cannot be hibernated",
                why="its pod shares System V IPC objects between containers",
                fix="give it a pod of its own, or list it in disable-autoscaledown-containers",
            )
        self._make_bindable()
        if record.mounts is None:
            record.mounts = await mounts.keep(init, self._run / "mnt")
        record.pipes = criu.stdio(init, record.keeper)
        return criu.Subject(
            init=init,
            keeper=record.keeper,
            rootfs=record.rootfs,
            netns_inode=os.stat(f"/proc/{record.keeper}/ns/net").st_ino,  # noqa: PTH116
            mounts=record.mounts,
            pipes=record.pipes,
            join=[kind for kind in ("ipc", "uts") if not _is_host_namespace(init, kind)],
        )

    def _make_bindable(self) -> None:
        """See :mod:`architect.adapters.bindable`.

        Raises:
            NotAsleep: connections that the program has closed still have data on the way.
        """
        pids = [] if self._cgroup is None else self._cgroup.processes()
        keeper = self.record.keeper
        listened = listeners.listening(keeper, [pid for pid in pids if pid != keeper])
        tcp = {number for protocol, number in listened if protocol == "tcp"}
        bindable.reserve(keeper, {number for _, number in listened})
        if bindable.allow_reuse(pids):
            if bindable.unfinished(keeper, tcp):
                raise NotAsleep(
                    what=f"{self.name} is not hibernated yet",
                    why="connections that it has closed still have data on the way",
                    fix="none needed: it is tried again",
                )
            bindable.clear_finished(keeper, tcp)

    def _images_written(self) -> None:
        self.happen(Happening.IMAGES_WRITTEN)

    async def _keep_images(self) -> None:
        try:
            self._checkpoint_bytes = await asyncio.to_thread(
                self._store.secure, self.record.generation, self._context.criu_version
            )
        except ArchitectError as error:
            if self.state is State.SECURING:
                self._failure = error
            self.happen(Happening.IMAGES_LOST)
            return
        self.happen(Happening.IMAGES_KEPT)

    def _confirm(self) -> None:
        try:
            self._store.commit(self.record.generation)
        except OSError as error:
            self._failure = _as_error(error, f"{self.name} could not be hibernated, it runs on")
            if self._hook is not None:
                self._hook.answer(end_it=False)
            return
        if self._hook is not None:
            self._hook.answer(end_it=True)

    async def _settle(self) -> None:
        """Frees what the program used and makes the digests; of no concern to a wake that comes now."""
        if self._cgroup is not None:
            self._cgroup.reclaim()
        try:
            await asyncio.to_thread(self._store.digest_pages)
            self._store.drop_page_cache()
        except OSError as error:
            if self.state is State.SCALED_DOWN:
                self._event("Warning", f"page data has no digests: {error}")

    # ---- wake ------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        self._failure = None
        try:
            if self._keeper is None:
                raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
            self._store.verify()
            if not self.record.shared_ipc:
                sysvipc.remove_all(self.record.keeper)
            if self._cgroup is not None:
                self.record.lifted = self._cgroup.lift_limits()
                if self.record.lifted:
                    self.save()
            status = await self._keeper.ask("wake", timeout_s=120.0)
        except (ArchitectError, OSError) as error:
            if self.state is State.ENDED:
                return
            self._failure = _as_error(error, f"{self.name} could not be woken")
            if isinstance(error, KeeperError):
                place = self._store.committed()
                why = criu.reason(place / "restore.log") if place else error.why
                self._failure = criu.CriuError(
                    what=f"{self.name} could not be woken, its checkpoint is kept",
                    why=f"{error.why}: {why}",
                    fix="see docs/troubleshooting.md, 'restore failed'",
                )
            self._return_limits()
            self.happen(Happening.RESTORE_FAILED)
            return
        self._init = status.init
        self.record.last_scale_up_ms = _since(self._began)
        self.touch()
        self.happen(Happening.RESTORED)
        self._return_limits()
        self._news(status)

    def _return_limits(self) -> None:
        if self.record.lifted:
            cgroup.return_limits(self.record.lifted)
            self.record.lifted = {}
            self.save()

    def _news(self, status: KeeperStatus | None) -> None:
        """The keeper's status has changed, or (None) it has ended."""
        if status is None:
            self.happen(Happening.EXITED)
            return
        if status.phase == "running" and self.state in (State.SCALED_DOWN, State.STRANDED):
            self._init = status.init
            self.record.last_scale_up_ms = None
            self._why = "signal"
            self.happen(Happening.RESTORED)
        if self.state is not State.FILLING:
            return
        if status.pager_state is PagerState.STALLED and self.record.error is None:
            self.record.error = "page data cannot be read; the program is stalled"
            self._event(
                "RestoreFailed", f"{self.name}: {self.record.error}; look at the disk's health"
            )
        if status.pager_state not in (PagerState.RESTORING, PagerState.FILLING, PagerState.STALLED):
            self.happen(Happening.FILLED)

    def _retire(self) -> None:
        """The checkpoint is of no more use: checks its page data once more, then deletes it."""
        place = self._store.retire()
        if place is not None:
            self._task(self._check_and_discard(place))
        else:
            self._store.abandon()

    async def _check_and_discard(self, place: Path) -> None:
        with contextlib.suppress(OSError):
            damaged = await asyncio.to_thread(self._store.damaged_pages, place)
            if damaged:
                self._event(
                    "CheckpointDamaged",
                    f"{self.name} was woken from page data that differs from what was written "
                    f"({', '.join(damaged[:3])}); restart it, and look at the disk's health",
                )
        await asyncio.to_thread(self._store.discard, place)

    # ---- the idle clock ------------------------------------------------------------------------------

    def touch(self) -> None:
        """Something counts as activity now."""
        self._touched = time.monotonic_ns()

    def _last_activity(self) -> int:
        seen = 0
        if self._place is not None:
            with contextlib.suppress(GateError, OSError):
                seen = self._place.activity().last_ns
        return max(self._touched, seen)

    def _sessions(self) -> int:
        """Open exec sessions, and engine calls under way that may become one."""
        if self._cgroup is None:
            return self.leases
        pids = self._cgroup.processes()
        return self.leases + len(cgroup.outsiders(pids, self._init, self.record.keeper))

    def _look_in(self, seconds: float) -> None:
        self._stop_clock()
        if self.settings.autoscaledown and self.record.ports is not None:
            self._clock = asyncio.get_running_loop().call_later(seconds, self._look)

    def _stop_clock(self) -> None:
        if self._clock is not None:
            self._clock.cancel()
            self._clock = None

    def _look(self) -> None:
        """The idle clock has run out: may it hibernate?"""
        if self.state is not State.RUNNING or self._cgroup is None or self._place is None:
            return
        now = time.monotonic_ns()
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - self.record.first_started
        delay = self.settings.initial_delay_ns
        connections = 0
        if self.settings.monitor is Monitor.CONNECTIONS:
            ports = {number for protocol, number in self.record.ports or () if protocol == "tcp"}
            connections = listeners.established(
                self.record.keeper, ports - self.settings.ignored_ports
            )
        verdict = idle.judge(
            idle.Observed(
                now=now,
                last_activity=self._last_activity(),
                scaledown=self.settings.scaledown_ns,
                not_before=now + delay - int(age * _SECOND_NS) if delay else 0,
                sessions=self._sessions(),
                connections=connections,
                paused=self._cgroup.frozen(),
            )
        )
        if isinstance(verdict, idle.Wait):
            self._look_in(max(0.05, (verdict.until - now) / _SECOND_NS))
        else:
            self._why = "idle"
            self.happen(Happening.IDLE)

    async def _learn_ports(self) -> None:
        """Asks the engine for the declared ports; tries again until it answers."""
        delay = 0.5
        while self.record.ports is None:
            try:
                ports = await podman.declared_ports(self.record.engine, self.record.id)
                self.record.ports = self._own(ports)
            except (ArchitectError, OSError) as error:
                self._log("ports unknown", error=str(error))
                await asyncio.sleep(delay)
                delay = min(delay * 2, 30.0)
        if self._place is not None:
            try:
                self._place.set_ports(self.record.ports, self.settings.ignored_ports)
            except GateError as error:
                self.record.error = str(error)
                self._event("Warning", f"{self.name}: {error}; the container stays awake")
                self._place.leave()
                self._place = None
        if not self.record.ports and self.settings.monitor is not Monitor.NONE:
            self._event(
                "Warning",
                f"{self.name} declares no ports, so no traffic wakes it; publish or expose the ports",
            )
        self.save()
        if self.state is State.RUNNING:
            self._look_in(0.0)

    def _own(self, ports: list[tuple[str, int]]) -> list[tuple[str, int]]:
        """Of a pod's ports, those that are this container's: all but the ones others listen on."""
        if self._cgroup is None or self.record.pod == self.record.container:
            return ports
        own = listeners.listening(self.record.keeper, self._cgroup.processes())
        every = listeners.listening(self.record.keeper)
        return [port for port in ports if port in own or port not in every]

    # ---- reports -----------------------------------------------------------------------------------------

    def _report(self, action: Action) -> None:
        if action is Action.REPORT_DOWN:
            self.record.hibernations += 1
            self.record.error = None
            self.record.last_scale_down_ms = _since(self._began)
            self._event(
                "ScaledDown",
                f"{self.name} hibernated: {self._why}",
                self.record.last_scale_down_ms,
                self._checkpoint_bytes,
            )
        elif action is Action.REPORT_UP:
            self.record.error = None
            message = f"{self.name} woke: {self._why}"
            self._event("ScaledUp", message, self.record.last_scale_up_ms)
        elif action is Action.REPORT_CANCELLED:
            self._log("dump cancelled", because=self._why, ms=_since(self._began))
        elif action in (Action.REPORT_DUMP_FAILED, Action.REPORT_RESTORE_FAILED):
            self.record.error = str(self._failure or "unknown")
            down = action is Action.REPORT_DUMP_FAILED
            self._event("CheckpointFailed" if down else "RestoreFailed", self.record.error)

    def _event(
        self, reason: str, message: str, duration_ms: float | None = None, size: int | None = None
    ) -> None:
        self._context.events.append(
            Event(
                time="",
                reason=reason,
                namespace=self.record.namespace,
                pod=self.record.pod,
                container=self.record.container,
                id=self.record.id,
                message=message,
                duration_ms=duration_ms,
                bytes=size,
            )
        )

    def _log(self, what: str, **details: Any) -> None:
        line = {
            "time": round(time.time(), 3),
            "what": what,
            "pod": self.record.pod,
            "container": self.record.container,
            "id": self.record.id[:12],
            "state": self.state.value,
            **details,
        }
        if what == "transition":
            line["down_ms"] = self.record.last_scale_down_ms
            line["up_ms"] = self.record.last_scale_up_ms
            line["bytes"] = self._checkpoint_bytes
        print(json.dumps(line), file=sys.stderr, flush=True)

    def _settle_waiters(self) -> None:
        """Tells those who wait for a state that it is there, or will not come."""
        _resolve(self._changed, None)
        if self.state in _AWAKE:
            _resolve(self._awake, None)
            why = str(self._failure) if self._failure else f"it was wanted: {self._why}"
            _resolve(self._asleep, NotAsleep(f"{self.name} stays awake", why, "try again later"))
        elif self.state is State.SCALED_DOWN:
            _resolve(self._asleep, None)
        elif self.state is State.STRANDED:
            _resolve(self._awake, self._failure)
        elif self.state is State.ENDED:
            gone = NotAwake(f"{self.name} is gone", "the container has ended", "start it again")
            _resolve(self._awake, gone)
            _resolve(self._asleep, gone)

    async def _next_state(self) -> None:
        """Returns at the next change of state."""
        waiter = asyncio.get_running_loop().create_future()
        self._changed.append(waiter)
        await waiter

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._log("internal error", error=repr(task.exception()))


def _resolve(waiters: list[asyncio.Future[None]], error: ArchitectError | None) -> None:
    for waiter in waiters:
        if not waiter.done():
            if error is None:
                waiter.set_result(None)
            else:
                waiter.set_exception(error)
    waiters.clear()


def _as_error(error: Exception, what: str) -> ArchitectError:
    if isinstance(error, ArchitectError):
        return error
    return ArchitectError(what=what, why=str(error), fix="see docs/troubleshooting.md")


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)


def _is_host_namespace(pid: int, kind: str) -> bool:
    mine = os.stat(f"/proc/self/ns/{kind}").st_ino  # noqa: PTH116
    return os.stat(f"/proc/{pid}/ns/{kind}").st_ino == mine  # noqa: PTH116
