"""One dump of a container: everything from what CRIU must be told to CRIU's end.

Made by :class:`.container.ManagedContainer` for each hibernation and for each move. Whether the program is
ended is the container's decision, given by :meth:`Dump.answer` while CRIU waits for it.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from architect.adapters import criu
from architect.adapters.gate import GateError
from architect.adapters.keeper import Keeper, KeeperError
from architect.adapters.store import Store
from architect.contract.errors import ArchitectError, as_error
from architect.contract.records import ContainerRecord
from architect.processes.architectd import subject as subjects
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.subject import NotAsleep
from architect.processes.architectd.traffic import Traffic


class Dump:
    """See the module."""

    def __init__(
        self,
        record: ContainerRecord,
        run: Path,
        store: Store,
        clock: IdleClock,
        traffic: Traffic,
        subject: criu.Subject | None,
    ) -> None:
        """``subject`` is what CRIU must be told, if that is known already."""
        self.failure: ArchitectError | None = None
        """Why it was not begun, or could not be."""
        self.images: Path | None = None
        """Where CRIU writes, once that is known."""
        self._record = record
        self._run = run
        self._store = store
        self._clock = clock
        self._traffic = traffic
        self._subject = subject
        self._hook: criu.DumpHook | None = None

    async def carry_out(
        self,
        keeper: Keeper | None,
        retire: Callable[[], None],
        save: Callable[[], None],
        images_written: Callable[[], None],
    ) -> int:
        """Returns CRIU's exit status; -1 if it was not started.

        ``retire`` gives up what is left of an earlier checkpoint, ``save`` writes the record;
        ``images_written`` is called when CRIU waits for the answer.
        """
        status = -1
        record, clock = self._record, self._clock
        generation = record.generation + 1
        try:
            if keeper is None or clock.cgroup is None:
                raise KeeperError(what="no keeper", why="not attached", fix="restart architectd")
            if clock.place is None or not clock.place.holds():
                raise NotAsleep(
                    what=f"{record.pod}/{record.container} stays awake",
                    why="packets for it cannot be held, and would be answered with resets",
                    fix="see `architect events` for the reason",
                )
            retire()
            record.quiet = []
            record.quiet = await subjects.other_ports(record, clock.cgroup)
            await self._traffic.settle_ports(clock.cgroup)
            subject = self._subject or await subjects.prepare(
                record, self._run, clock.init, clock.cgroup
            )
            await keeper.ask(f"dump-begin {record.container}")
            self.images = self._store.begin(generation)
            record.generation = generation
            words = criu.restore_words(
                subject, self._store.images(generation), self._run / "restored.pid"
            )
            criu.write_recipe(self._run, words)
            save()
            self._hook = criu.DumpHook(self._run / "hook", images_written)
            words = criu.dump_words(subject, self.images)
            status = await criu.run(words, self._hook.environment, self._run / "dump.pid")
        except (ArchitectError, GateError, OSError) as error:
            name = f"{record.pod}/{record.container}"
            self.failure = as_error(error, f"{name} could not be hibernated")
        finally:
            self.close()
        return status

    def answer(self, *, end_it: bool) -> None:
        """Tells CRIU to end the program, or to thaw it."""
        if self._hook is not None:
            self._hook.answer(end_it=end_it)

    def close(self) -> None:
        """The daemon ends, or CRIU has ended. Unanswered, CRIU thaws the program."""
        if self._hook is not None:
            self._hook.close()
            self._hook = None
