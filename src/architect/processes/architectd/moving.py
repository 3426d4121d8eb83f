"""A managed container that can move: leaves its node as a checkpoint, or arrives as one.

Made by :mod:`.registry`. Whether and when it moves is decided by :mod:`.cluster.leaving` and
:mod:`.cluster.arriving`; on a lone machine nobody asks.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from architect.adapters import criu, mounts, runc_state
from architect.adapters.gate import GateError
from architect.adapters.keeper import KeeperError, KeeperStatus
from architect.contract.errors import ArchitectError
from architect.contract.records import Moving
from architect.contract.states import Action, Happening, State
from architect.processes.architectd import subject as subjects
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.log import log
from architect.processes.architectd.subject import NotAsleep

_GONE: Final = 143
"""Exit status of a container whose program runs on elsewhere: as if by SIGTERM."""
_LOOK_S: Final = 0.02
"""Seconds between two looks whether the engine has asked."""
_SETTLED: Final = (State.RUNNING, State.SCALED_DOWN, State.STRANDED)
"""States in which nothing is under way."""


class NotRestored(ArchitectError):
    """A checkpoint of another node has taken the container's place, and CRIU could not restore it."""


class MovableContainer(ManagedContainer):
    """See the module."""

    _advice = ""
    """What a user is told to do if its restore fails; empty for what has not just landed."""

    async def told_to_stop(self) -> None:
        """Returns once the engine has asked for its end: it starts nothing anew then."""
        # Whoever hears of it writes it into the record, which an earlier daemon may have done.
        while not self.record.stop_signal and self.state is not State.ENDED:  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)

    @property
    def checkpoint(self) -> Path | None:
        """Where the images are while only they stand for the program."""
        return self._store.committed()

    async def leave(self, why: str, *, durable: bool) -> None:
        """Freezes it for a move. Returns when only its checkpoint is there; nothing wakes it then.

        Not ``durable``, which is faster: its checkpoint is lost with the power, as the program would be.

        Raises:
            NotAsleep: it could not be dumped, and runs on; or it has ended.
        """
        if self.state is State.CREATED:
            raise NotAsleep(f"{self.name} does not move", "it was not started", "none needed")
        found = await self._until(*_SETTLED, State.MIGRATING, State.ENDED)
        group = self.clock.cgroup
        if found is State.RUNNING and group is not None:
            # Before packets wait: a hibernation has nobody who waits.
            self._subject = await subjects.prepare(self.record, self._run, self.clock.init, group)
            found = await self._until(*_SETTLED, State.MIGRATING, State.ENDED)
        if found in _SETTLED:
            self._why = why
            self._durable = durable
            self.record.moving = Moving.AWAKE if found is State.RUNNING else Moving.ASLEEP
            self._copy(on=found is State.RUNNING)
            self.happen(Happening.LEAVE)
            found = await self._until(*_SETTLED, State.MIGRATING, State.ENDED)
        self._durable, self._subject = True, None
        if found is not State.MIGRATING:
            self.record.moving = Moving.NO
            self._copy(on=False)
            reason = str(self._failure or "it was not dumped")
            raise NotAsleep(f"{self.name} stays", reason, "see docs/troubleshooting.md, 'moving'")

    def stay(self) -> None:
        """The move is given up: it becomes what it was before."""
        if self.state is not State.MIGRATING:
            return
        was, self.record.moving = self.record.moving, Moving.NO
        self._copy(on=False)
        self._why = "its move was given up"
        awake = was is Moving.AWAKE
        self.happen(Happening.STAY_AWAKE if awake else Happening.STAY_ASLEEP)

    def held(self) -> list[bytes]:
        """The packets that wait for it and were not returned before, each from its network header on."""
        place = self.clock.place
        try:
            return place.copies() if place is not None else []
        except GateError as error:
            log("held packets are lost", name=self.name, error=str(error))
            return []

    def _copy(self, *, on: bool) -> None:
        try:
            if self.clock.place is not None:
                self.clock.place.copy(on=on)
        except GateError as error:
            # Their senders repeat them: the pause is longer.
            log("packets wait without copies", name=self.name, error=str(error))

    async def depart(self) -> None:
        """Another node has it: ends the container here, without its program.

        Not with zero, which would complete a Job.
        """
        with contextlib.suppress(KeeperError):
            await self._instruct(f"exit {_GONE}")
        await self.ended.wait()

    async def deliver(self, number: int) -> None:
        """Gives the program a signal.

        Raises:
            KeeperError: the keeper is gone, or does not answer.
        """
        await self._instruct(f"kill {number}")

    async def _instruct(self, order: str) -> None:
        if self._keeper is None:
            raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
        await self._keeper.tell(order)

    def resume(self, status: KeeperStatus, state: State) -> None:
        """As :meth:`ManagedContainer.resume`; one that was landing has landed."""
        if self.record.moving and state is State.SCALED_DOWN:
            # runc would wait for ever at what nobody opens.
            runc_state.forget_start(self.record.runtime_root, self.record.id)
        super().resume(status, state)

    @property
    def arrivable(self) -> bool:
        """Whether it was created and not started, so that a checkpoint can take its place."""
        return self.state is State.CREATED

    @property
    def expecting(self) -> bool:
        """Whether everything is ready for its checkpoint to take its place."""
        return self.state is State.ARRIVING

    async def prepare(self) -> None:
        """Does what takes time and can be done before it leaves, or before its checkpoint is there.

        Raises:
            ArchitectError: its mounts cannot be kept.
        """
        if self.record.mounts is None:
            self.record.mounts = await mounts.keep(self.clock.init, self._run / "mnt")

    async def settled(self) -> None:
        """Returns when nothing is under way, such as a landing that an earlier daemon began.

        Raises:
            NotAsleep: it has ended, or its restore failed; the checkpoint is kept.
        """
        found = await self._until(*_SETTLED, State.FILLING, State.ENDED)
        if found in (State.STRANDED, State.ENDED):
            why = str(self._failure or "the container has ended")
            raise NotAsleep(f"{self.name} has not arrived", why, "see `architect events`")

    def take_stop(self) -> bool:
        """Whether the kubelet wants it to end; takes in what it said while no daemon was there."""
        mark = self._run / "stop"
        with contextlib.suppress(OSError, ValueError):
            self.record.stop_signal = int(mark.read_text())
            self.save()
            mark.unlink()
        return self.record.stop_signal != 0

    async def expect(self) -> None:
        """A checkpoint comes for what was created and not started: from now on packets wait.

        Raises:
            ArchitectError: packets cannot be held here.
        """
        self.happen(Happening.EXPECTED)
        if self.clock.place is None or not self.clock.place.holds():
            self.happen(Happening.NOT_COMING)
            raise NotAsleep(
                f"{self.name} cannot take its checkpoint", "packets for it cannot be held", ""
            )

    def expect_ports(self, quiet: Sequence[tuple[str, int]]) -> None:
        """Packets for these local ports of the program, which nobody declared, wait as well.

        Raises:
            GateError: the kernel refuses.
        """
        self.record.quiet = list(quiet)
        self._traffic.set_ports()

    async def not_coming(self) -> None:
        """It does not come: the container can be started as new, or wait for another."""
        if self._keeper is not None and self.state is State.ARRIVING:
            with contextlib.suppress(KeeperError):
                await self._keeper.ask("dump-end")
            await asyncio.to_thread(self._store.abandon)
        self.happen(Happening.NOT_COMING)

    async def lay_in(self, place: Path, pipes: Mapping[str, int]) -> None:
        """Makes the checkpoint in ``place``, with the pipes of its dump, ready to take the container's place.

        Raises:
            ArchitectError: the disk is full, or the container has ended.
        """
        if self._keeper is None or self.state is not State.ARRIVING:
            raise KeeperError("no keeper", "the container has ended", "")
        generation = self.record.generation + 1
        await asyncio.to_thread(self._store.adopt, place, generation, self._context.criu_version)
        self.record.generation = generation
        subject = subjects.arriving(self.record, self.clock.init, pipes)
        images = self._store.images(generation)
        words = criu.restore_words(subject, images, self._run / "restored.pid")
        criu.write_recipe(self._run, [*words, criu.ANY_MODE])
        await self._keeper.ask(f"dump-begin {self.record.container}")

    async def land(self, *, awake: bool, wake: bool, age: float, advice: str) -> None:
        """What was laid in takes the container's place; ``age`` is in seconds since its first start.

        Returns when it runs, or sleeps. What is not ``awake`` sleeps, unless it is to ``wake`` at once.

        Raises:
            NotRestored: the restore failed, and ``advice`` says what follows; the kubelet makes the container
                anew.
            ArchitectError: the container has ended.
        """
        if self._keeper is None or self.state is not State.ARRIVING:
            raise KeeperError("no keeper", "the container has ended", "")
        self.record.moving = Moving.AWAKE if awake else Moving.ASLEEP
        self.record.first_started = time.clock_gettime(time.CLOCK_BOOTTIME) - age
        self.save()
        self._store.commit(self.record.generation)
        # What runc has made and not started: for the keeper its end is now a hibernation.
        with _kept_mounts(self.clock.init):
            os.kill(self.clock.init, signal.SIGKILL)
            await self._keeper.ask("dump-end")
        runc_state.forget_start(self.record.runtime_root, self.record.id)
        self._mend_runtime(asleep=True)
        self._why, self._advice = "moved here", advice
        self._began = time.monotonic()
        self.happen(Happening.LANDED if awake else Happening.LANDED_ASLEEP)
        self.begin_clock()
        if awake:
            await self._waiters.awake()
        elif wake:
            await self.wake("postmigration-autoscaleup-containers")
        self._advice = ""
        self.record.moving = Moving.NO
        self.save()

    def _packets(self) -> None:
        if not self._is_over:
            super()._packets()

    def _retry(self) -> None:
        if not self._is_over:
            super()._retry()

    @property
    def _is_over(self) -> bool:
        """Its start has failed, so the runtime ends it: what it would do until then would be lost."""
        return self.state is State.STRANDED and bool(self._advice)

    def _tell(self, action: Action) -> None:
        failure = self._failure
        if action is Action.REPORT_RESTORE_FAILED and self._advice and failure is not None:
            # A sleeper stays here with its checkpoint; what has just landed is made anew by the kubelet.
            what = f"{self.name} could not be restored after its move"
            self._failure = NotRestored(what, failure.why, self._advice)
        super()._tell(action)

    async def _until(self, *states: State) -> State:
        while self.state not in states:
            await self._waiters.change()
        return self.state


@contextlib.contextmanager
def _kept_mounts(pid: int) -> Iterator[None]:
    """The mount namespace of a process outlives it for so long: its end then waits for no unmounting."""
    try:
        space = os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        yield
        return
    try:
        yield
    finally:
        # In a thread: whoever closes it last unmounts it all.
        asyncio.get_running_loop().run_in_executor(None, os.close, space)
