"""One managed container: carries out what the table of its life says (:mod:`architect.decisions.life`).

Made by :mod:`.registry`, for a new container or one found at the daemon's start. Every change of state goes
through :meth:`ManagedContainer.happen`; slow actions run as tasks and report back as happenings.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, Final

import msgspec

from architect.adapters import cgroup, criu, mounts, runc_state, sysvipc, warm
from architect.adapters.gate import GateError
from architect.adapters.keeper import Keeper, KeeperError, KeeperStatus, PagerState
from architect.adapters.store import Store
from architect.contract import paths
from architect.contract.annotations import MANAGED_CONTAINERS, ContainerSettings
from architect.contract.errors import ArchitectError, as_error
from architect.contract.records import ContainerRecord, Moving, Row
from architect.contract.states import Action, Happening, State
from architect.decisions import life
from architect.decisions.limits import Verdict
from architect.processes.architectd import subject as subjects
from architect.processes.architectd.checkpointing import Dump
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.context import Context
from architect.processes.architectd.limits import Limits
from architect.processes.architectd.reporter import Reporter
from architect.processes.architectd.subject import NotAsleep
from architect.processes.architectd.traffic import Traffic
from architect.processes.architectd.waiters import AWAKE, Waiters

_RETRY_S: Final = 10.0
"""Seconds after a failed restore until the next try."""
_SIGNAL_FAILED: Final = ("hibernated", "restoring", State.SCALED_DOWN)
"""The keeper's phase, its last one, and our state, when a wake that it began by itself has failed."""
_RECLAIMS: Final = 3
_RECLAIM_S: Final = 0.7
"""How often, and how many seconds apart, a hibernated container's cgroup is emptied."""


class ManagedContainer:
    """See the module."""

    def __init__(
        self, record: ContainerRecord, settings: ContainerSettings, context: Context, state: State
    ) -> None:
        self.record = record
        self.settings = settings
        self.state = state
        self.ended = asyncio.Event()
        """Set when it has ended."""
        self.clock = IdleClock(record, settings, self._expired)
        self._context = context
        self._run = paths.CONTAINERS / record.id
        self._store = Store(paths.CHECKPOINTS, self._run / "checkpoint", record.id)
        self._keeper: Keeper | None = None
        self._dumping: Dump | None = None
        self._report = Reporter(record, context.events)
        self._limits = Limits(record, context.boosts)
        self._traffic = Traffic(
            record, settings, context, self.clock, self._report, self._store.committed
        )
        self._timer: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._waiters = Waiters()
        self._began = 0.0
        self._failure: ArchitectError | None = None
        self._why = ""
        self._checkpoint_bytes = 0
        self._durable = True
        """Whether a dump is to outlive a power failure."""
        self._subject: criu.Subject | None = None
        """Of the dump that is about to begin, where it was prepared before packets wait."""
        self._phase = ""
        """The keeper's, as it last told."""
        self._unfit = False
        """The last restore failed: what is in the checkpoint now may be another file than then."""

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
            self._report.transition(
                before, self.state, happening, self._why, self._checkpoint_bytes
            )
            if self.state not in (State.ENDED, State.SCALING_UP):
                self.save()  # Not on the way of a wake, which changes nothing that is recorded.
            self._waiters.settle(self.state, self.name, self._failure, self._why)
            if self.state is not State.SCALING_UP:
                # Nor is what the API is told, which takes some milliseconds of CPU.
                self._context.changed(self.record.pod_uid)

    async def wake(self, why: str) -> None:
        """Returns when the program runs.

        Raises:
            NotAwake: its restore failed, or the container ended; its checkpoint is kept.
        """
        self.clock.touch()
        if self.state in AWAKE or self.state is State.CREATED:
            return
        waiter = self._waiters.awake()
        self._why = why
        self.happen(Happening.WANTED)
        await waiter

    async def restored(self) -> None:
        """Returns when no wake is under way."""
        while self.state is State.SCALING_UP:
            await self._waiters.change()

    async def sleep(self, why: str) -> None:
        """Returns when the container is hibernated.

        Raises:
            NotAsleep: it could not be, or somebody wanted it awake meanwhile.
        """
        # Before the fill is awaited: a frozen keeper does not report its end.
        if self.clock.cgroup is not None and self.clock.cgroup.frozen():
            raise NotAsleep(what=f"{self.name} stays", why="it is paused", fix="unpause it first")
        while self.state is State.FILLING:
            await self._waiters.change()
        if not self.settings.managed:
            raise NotAsleep(
                what=f"{self.name} stays awake",
                why="its pod's annotations no longer list it",
                fix=f"add it to {MANAGED_CONTAINERS}",
            )
        if self.state is State.RUNNING:
            sessions = self.clock.sessions()
            if sessions:
                raise NotAsleep(
                    what=f"{self.name} stays awake",
                    why=f"{sessions} exec session(s) are open",
                    fix="end them first",
                )
        if self.state in (State.CREATED, State.ENDED):
            raise NotAsleep(what=f"{self.name} stays", why="it does not run", fix="start it first")
        if self.state in (State.SCALED_DOWN, State.STRANDED):
            return
        waiter = self._waiters.asleep()
        self._why = why
        self.happen(Happening.IDLE)
        await waiter

    @property
    def name(self) -> str:
        """pod/container, for messages."""
        return self._report.name

    def row(self) -> Row:
        """Its line in `architect ps`."""
        return self._report.row(self.state, self.clock, self._store.size())

    def save(self) -> None:
        """Writes meta.json, atomically."""
        file = self._run / "meta.json"
        fresh = self._run / "meta.json.new"
        try:
            fresh.write_bytes(msgspec.json.encode(self.record))
            fresh.rename(file)
        except OSError as error:
            # A full disk must not end a transition half way; the record is only a help.
            self._report.log("record not written", error=str(error))

    # ---- beginning and end ---------------------------------------------------------------------------

    async def attach(self) -> KeeperStatus:
        """Connects to the keeper and the gate.

        Raises:
            KeeperError: the keeper is gone.
        """
        self._keeper = Keeper(self._run / "ctl")
        status = await self._keeper.ask("status")
        self.record.keeper, self.clock.init = status.keeper, status.init
        self.clock.cgroup = cgroup.Cgroup.of(status.keeper)
        self._limits.put_back()
        await self._traffic.join(self._packets)
        self._keeper.watch(self._news)
        self.save()
        return status

    def started(self) -> None:
        """The engine has started the program."""
        if not self.record.first_started:
            self.record.first_started = time.clock_gettime(time.CLOCK_BOOTTIME)
        self.clock.touch()
        self.happen(Happening.STARTED)
        if self.record.ports == []:
            self._traffic.warn_of_no_ports()
        self.begin_clock()

    def begin_clock(self) -> None:
        """Learns what the idle clock needs, then lets it run."""
        if self.record.ports is None:
            self._task(self._learn_ports())
        elif self.state is State.RUNNING:
            self.clock.start(0.0)

    def resume(self, status: KeeperStatus, state: State) -> None:
        """Goes on from where another daemon left it; ``state`` is what was found to be true."""
        self.state = state
        if self.record.moving and state is State.SCALED_DOWN:
            # Another node may have it: .cluster.leaving finds out.
            self.state = state = State.MIGRATING
        elif state is not State.MIGRATING:
            self.record.moving = Moving.NO
        if state is not State.CREATED and not self.record.first_started and self.clock.init:
            # It was started while no daemon ran.
            ticks = runc_state.start_time(self.clock.init)
            self.record.first_started = ticks / os.sysconf("SC_CLK_TCK")
        self.clock.touch()
        if self.clock.place is not None:
            if state in (State.SCALED_DOWN, State.STRANDED):
                self._traffic.sleep()
            elif state is State.MIGRATING:
                self._traffic.hold(wakes=True)
            else:
                self._traffic.open()
        if state is State.SCALED_DOWN:
            self._remove_ipc()
            self._checkpoint_bytes = self._store.size()
        elif state is State.RUNNING:
            self._retire()
        elif state is State.FILLING:
            self._mend_runtime()
            self._news(status)
        self.save()
        if state is not State.CREATED:
            self.begin_clock()
        if not self.settings.managed:
            self._task(self._release())

    def follow(self, annotations: Mapping[str, str], settings: ContainerSettings) -> None:
        """Its pod's annotations are others: they hold from now on, without a restart.

        One that is no longer managed is woken first, and its checkpoint is deleted.
        """
        was, self.settings, self.clock.settings = self.settings, settings, settings
        self.record.annotations = dict(annotations)
        self.save()
        if settings == was:
            return
        if not settings.managed:
            self._task(self._release())
        elif not was.managed:
            self._task(self._take_back())
        else:
            self._follow_traffic()

    def _follow_traffic(self) -> None:
        try:
            self._traffic.follow(self.settings)
        except GateError as error:
            self._report.event("Warning", f"{self.name}: {error}")
        if self.state in (State.SCALED_DOWN, State.STRANDED):
            self._traffic.sleep()
        elif self.state is State.RUNNING:
            self.clock.start(0.0)

    async def _release(self) -> None:
        """It is no longer managed: runs from now on as under runc, though its keeper stays."""
        self.clock.stop()
        try:
            await self.wake("no longer managed")
        except ArchitectError as error:
            self._report.event("Warning", f"{error}; it is woken by the next packet or exec")
            return
        while self.state is State.FILLING:
            await self._waiters.change()
        if not self.settings.managed:
            self.clock.stop()
            self._traffic.leave()
            self.save()
            self._context.changed(self.record.pod_uid)

    async def _take_back(self) -> None:
        """It is managed again."""
        if self.clock.place is None:
            await self._traffic.join(self._packets)
        self.clock.touch()
        self._follow_traffic()
        self.save()
        self._context.changed(self.record.pod_uid)

    async def order(self, words: str) -> KeeperStatus:
        """Passes an order to the keeper; for the registry, at the daemon's start and of an orphan.

        Raises:
            KeeperError: it refused, or is gone.
        """
        if self._keeper is None:
            raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
        return await self._keeper.ask(words, timeout_s=120.0)

    def let_go(self) -> None:
        """The daemon ends; the container stays as it is."""
        self.clock.stop()
        if self._keeper is not None:
            self._keeper.close()

    def forget(self) -> None:
        """The container has ended, or was never made: leaves nothing of it."""
        self.ended.set()
        self.clock.stop()
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            if task is not asyncio.current_task():
                task.cancel()
        if self._dumping is not None:
            self._dumping.close()
            self._dumping = None
        if self._keeper is not None:
            self._keeper.close()
        self._traffic.leave()
        self._limits.cancel()
        # Of the pod, which may live on.
        self._limits.put_back()
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
                dumped = self.state in (State.SCALING_DOWN, State.LEAVING)
                self._traffic.hold(wakes=not dumped)
            case Action.GATE_OPEN:
                self._traffic.open()
            case Action.GATE_SLEEP:
                self._traffic.sleep()
            case Action.START_DUMP:
                self._began = time.monotonic()
                self._task(self._dump())
            case Action.KEEP_IMAGES:
                self._task(self._keep_images())
            case Action.CONFIRM:
                self._confirm()
            case Action.REFUSE:
                self._answer(end_it=False)
            case Action.SETTLE:
                self._task(self._settle())
            case Action.START_RESTORE:
                self._began = time.monotonic()
                self._task(self._restore())
            case Action.MEND_RUNTIME:
                self._mend_runtime()
            case Action.START_IDLE_CLOCK:
                self.clock.touch()
                self.clock.start()
            case Action.STOP_IDLE_CLOCK:
                self.clock.stop()
            case Action.DROP_IMAGES:
                self._retire()
            case Action.SCHEDULE_RETRY:
                loop = asyncio.get_running_loop()
                self._timer = loop.call_later(_RETRY_S, self._retry)
            case Action.CLEAN_UP:
                self.forget()
            case _:
                self._tell(action)

    def _packets(self) -> None:
        """Packets for its ports are held."""
        if self.state is not State.SCALING_UP:
            self._why = "packet"
        self.happen(Happening.WANTED)

    def _retry(self) -> None:
        self._why = "retry"
        if self.state is State.STRANDED and self._awake_is_wanted():
            self.happen(Happening.WANTED)

    def _awake_is_wanted(self) -> bool:
        return (
            self._waiters.want_it_awake
            or self.clock.place is None
            or self.clock.place.activity().held > 0
        )

    def _mend_runtime(self, *, asleep: bool = False) -> None:
        root, container = self.record.runtime_root, self.record.id
        init = self.record.keeper if asleep else self.clock.init
        try:
            runc_state.point_to(root, container, init, enterable=not asleep)
        except (OSError, ValueError, KeyError) as error:
            self._report.event(
                "Warning", f"runc does not know the new init, exec will fail: {error}"
            )

    def update(self, resources: str) -> Verdict:
        """Whether runc may change its limits."""
        return self._limits.judge(resources, self.state)

    def updated(self) -> None:
        """runc has changed its limits, and written back the init that it had read before."""
        if self.state in AWAKE:
            self._mend_runtime()
        elif self.state in (State.SCALED_DOWN, State.STRANDED):
            self._mend_runtime(asleep=True)

    # ---- hibernation -----------------------------------------------------------------------------------

    async def _dump(self) -> None:
        self._failure = None
        subject, self._subject = self._subject, None
        dump = Dump(self.record, self._run, self._store, self.clock, self._traffic, subject)
        self._dumping = dump
        status = await dump.carry_out(self._keeper, self._retire, self.save, self._images_written)
        self._failure = dump.failure
        self._dumping = None
        await self._end_dump(status, dump.images)

    async def _end_dump(self, status: int, images: Path | None) -> None:
        """CRIU has ended: finds out what is true now."""
        if self.state is State.ENDED or self._keeper is None:
            return
        try:
            if status != 0:
                # One that was given up is no failure, though CRIU's log reads like one.
                given_up = self.state is State.CANCELLING
                if self._failure is None and images is not None and not given_up:
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
            self._remove_ipc()
            self._mend_runtime(asleep=True)
            self.happen(Happening.DUMPED)
        else:
            self.happen(Happening.DUMP_FAILED)

    def _remove_ipc(self) -> None:
        """Whatever is left of its own in the IPC namespace is in the checkpoint too."""
        if self.record.own_ipc:
            with contextlib.suppress(OSError):
                sysvipc.remove_all(self.record.keeper)

    def _images_written(self) -> None:
        self._task(self._look_again())

    async def _look_again(self) -> None:
        """Gives the dump up if a connection was opened after its start: it has missed no packet then.

        A move is not given up, nor does it wait for that; from now on the connection's packets wait too,
        which come again anyway.
        """
        group = self.clock.cgroup
        moves = self.state is State.LEAVING
        if moves:
            self.happen(Happening.IMAGES_WRITTEN)
        found = await subjects.other_ports(self.record, group) if group is not None else []
        if moves:
            self.record.quiet += found
            self._traffic.set_ports()
            return
        if found:
            self._why = "new connection"
            self.happen(Happening.WANTED)
        self.happen(Happening.IMAGES_WRITTEN)

    async def _keep_images(self) -> None:
        try:
            self._checkpoint_bytes = await asyncio.to_thread(
                self._store.secure,
                self.record.generation,
                self._context.criu_version,
                durable=self._durable,
            )
        except ArchitectError as error:
            if self.state in (State.SECURING, State.LEAVING):
                self._failure = error
            self.happen(Happening.IMAGES_LOST)
            return
        self.happen(Happening.IMAGES_KEPT)

    def _confirm(self) -> None:
        try:
            self._store.commit(self.record.generation)
        except OSError as error:
            self._failure = as_error(error, f"{self.name} could not be hibernated, it runs on")
            self._answer(end_it=False)
            return
        self._answer(end_it=True)

    def _answer(self, *, end_it: bool) -> None:
        if self._dumping is not None:
            self._dumping.answer(end_it=end_it)

    async def _settle(self) -> None:
        """Frees what the program used and makes the digests; of no concern to a wake that comes now.

        The cgroup is emptied more than once: the kernel uncharges a program a moment after its end.
        """
        try:
            await asyncio.to_thread(self._store.digest_pages)
            self._store.drop_page_cache()
        except (OSError, ValueError) as error:
            if self.state is State.SCALED_DOWN:
                self._report.event("Warning", f"page data has no digests: {error}")
        for _ in range(_RECLAIMS):
            if self.state is not State.SCALED_DOWN or self.clock.cgroup is None:
                return
            # In a thread: it takes the kernel some milliseconds, and other containers may want to wake.
            await asyncio.to_thread(self.clock.cgroup.reclaim)
            warm.read_back(self.record.warm)
            await asyncio.sleep(_RECLAIM_S)

    # ---- wake ------------------------------------------------------------------------------------------

    async def _restore(self) -> None:
        self._failure = None
        try:
            if self._keeper is None:
                raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
            self._store.verify()
            if self._unfit:
                await self._keeper.ask("arm")
                self._unfit = False
                self._remove_ipc()
            if self.clock.cgroup is not None:
                await self._limits.lift(self.clock.cgroup)
                if self.record.lifted:
                    self.save()
            try:
                status = await self._order_wake(self._keeper)
            except KeeperError:
                if not mounts.uncover_deleted(self._run / "mnt"):
                    raise
                status = await self._order_wake(self._keeper)
        except (ArchitectError, OSError) as error:
            if self.state is State.ENDED:
                return
            self._unfit = True
            self._failure = as_error(error, f"{self.name} could not be woken")
            if isinstance(error, KeeperError):
                self._failure = self._restore_failure(error.why)
            self._return_limits()
            self.happen(Happening.RESTORE_FAILED)
            return
        self.clock.init = status.init
        self.record.last_scale_up_ms = _since(self._began)
        self.clock.touch()
        self.happen(Happening.RESTORED)
        self._return_limits()
        # Asked anew: the news that the last page is in may have come before the state was FILLING.
        with contextlib.suppress(KeeperError):
            self._news(await self._keeper.ask("status"))

    async def _order_wake(self, keeper: Keeper) -> KeeperStatus:
        asked = asyncio.create_task(keeper.ask("wake", timeout_s=120.0))
        # Once the order is out: the disk and CRIU then work side by side.
        asyncio.get_running_loop().call_soon(warm.read_back, self.record.warm)
        return await asked

    def _restore_failure(self, why: str) -> ArchitectError:
        there = self._store.committed()
        reason = criu.reason(self._run / criu.RESTORE_LOG) if there else "its checkpoint is gone"
        return criu.CriuError(
            what=f"{self.name} could not be woken, its checkpoint is kept",
            why=f"{why}: {reason}",
            fix="see docs/troubleshooting.md, 'restore failed'",
        )

    def _return_limits(self) -> None:
        if self._limits.put_back():
            self.save()

    def _news(self, status: KeeperStatus | None) -> None:
        """The keeper's status has changed, or (None) it has ended."""
        if status is None:
            self.happen(Happening.EXITED)
            return
        if status.phase == "running" and self.state in (State.SCALED_DOWN, State.STRANDED):
            self.clock.init = status.init
            self.record.last_scale_up_ms = None
            self._why = "signal"
            self.happen(Happening.RESTORED)
        elif (status.phase, self._phase, self.state) == _SIGNAL_FAILED:
            self._failure = self._restore_failure("the keeper tried, for a signal")
            self.happen(Happening.RESTORE_FAILED)
        self._phase = status.phase
        if self.state is not State.FILLING:
            return
        if status.pager_state is PagerState.STALLED and self.record.error is None:
            self.record.error = "page data cannot be read; the program is stalled"
            self._report.event(
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
                self._report.event(
                    "CheckpointDamaged",
                    f"{self.name} was woken from page data that differs from what was written "
                    f"({', '.join(damaged[:3])}); restart it, and look at the disk's health",
                )
        await asyncio.to_thread(self._store.discard, place)

    def _expired(self) -> None:
        """The idle clock has run out."""
        self._task(self._hibernate_if_healthy())

    async def _hibernate_if_healthy(self) -> None:
        if not await subjects.is_healthy(self.record):
            self.clock.touch()
            self.clock.start()
        elif self.state is State.RUNNING:
            self._why = "idle"
            self.happen(Happening.IDLE)

    async def _learn_ports(self) -> None:
        if self.clock.cgroup is None:
            return
        await self._traffic.learn_ports(self.clock.cgroup)
        self.save()
        if self.state is State.RUNNING:
            self.clock.start(0.0)

    # ---- reports -----------------------------------------------------------------------------------------

    def _tell(self, action: Action) -> None:
        match action:
            case Action.REPORT_DOWN:
                self.clock.failures = 0
                if self.clock.cgroup is not None:
                    self._limits.remember(self.clock.cgroup)
                self.record.last_scale_down_ms = _since(self._began)
                self._report.down(self._why, self._checkpoint_bytes)
            case Action.REPORT_UP:
                self._report.up(self._why)
            case Action.REPORT_CANCELLED:
                self._report.log("dump cancelled", because=self._why, ms=_since(self._began))
            case Action.REPORT_DUMP_FAILED:
                self.clock.failures += 1
                self._report.failed("CheckpointFailed", self._failure)
            case Action.REPORT_RESTORE_FAILED:
                self._report.failed("RestoreFailed", self._failure)

    def _task(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            self._report.log("internal error", error=repr(task.exception()))


def _since(began: float) -> float:
    return round((time.monotonic() - began) * 1000, 1)
