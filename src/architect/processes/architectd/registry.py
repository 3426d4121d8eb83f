"""All managed containers of this machine, and how a new daemon finds them again.

Called by :mod:`.server`. What is true is asked of the keepers; the records only add what no process knows.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import select
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from architect.adapters import mounts, runc_state, store
from architect.adapters.keeper import Keeper, KeeperError, KeeperStatus, PagerState
from architect.contract import paths
from architect.contract.annotations import USER_ANNOTATIONS, ContainerSettings, parse
from architect.contract.errors import ArchitectError
from architect.contract.records import RECORD_FORMAT, ContainerRecord, Event
from architect.contract.states import State
from architect.processes import door
from architect.processes.architectd.context import Context
from architect.processes.architectd.moving import MovableContainer

_CREATION_S: Final = 30.0
"""Seconds for which a container is taken to be under creation at the most."""
_LOOK_S: Final = 0.02
"""Seconds between two looks."""


class NoSuchContainer(ArchitectError):
    """A user named a pod or container that is not managed here."""


class Registry:
    """Managed containers by id."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self._containers: dict[str, MovableContainer] = {}
        self._retired = False
        self._ending: set[asyncio.Task[None]] = set()
        self._looks: dict[str, asyncio.Task[None]] = {}
        """Looks at containers that this daemon was not told of."""
        self._left_alone: set[str] = set()
        """Those whose record cannot be read."""

    def all(self) -> list[MovableContainer]:
        """Those that have not ended, in order of their names."""
        for container, managed in list(self._containers.items()):
            if managed.state is State.ENDED:
                del self._containers[container]
        return sorted(self._containers.values(), key=lambda one: one.name)

    def get(self, container: str) -> MovableContainer | None:
        """The container with that id, unless it has ended."""
        managed = self._containers.get(container)
        return None if managed is None or managed.state is State.ENDED else managed

    async def find(self, container: str) -> MovableContainer | None:
        """The same; one that was created while no daemon answered is taken in first.

        An engine that found none may be at creating it still when this one has begun to answer.
        """
        run = paths.CONTAINERS / container
        known = container in self._containers or container in self._left_alone
        if not known and run.exists():
            look = self._looks.get(container)
            if look is None:
                look = self._looks[container] = asyncio.create_task(self._look_at(run))
                look.add_done_callback(lambda _: self._looks.pop(container, None))
            # Shared: who asked may be gone before it is over.
            await asyncio.shield(look)
        return self.get(container)

    def named(self, pod: str, container: str) -> list[MovableContainer]:
        """The managed containers of a pod (``NAME`` or ``NAMESPACE/NAME``), or one of them.

        Raises:
            NoSuchContainer: there is none, or there are some in several namespaces.
        """
        namespace, _, name = pod.rpartition("/")
        found = [
            one
            for one in self.all()
            if one.record.pod == name
            and namespace in ("", one.record.namespace)
            and container in ("", one.record.container)
        ]
        namespaces = sorted({one.record.namespace for one in found})
        if len(namespaces) > 1:
            raise NoSuchContainer(
                what=f"pod {pod}",
                why=f"there is one in each of the namespaces {', '.join(namespaces)}",
                fix=f"write for example {namespaces[0]}/{name}",
            )
        if not found:
            what = f"pod {pod}" + (f", container {container}" if container else "")
            raise NoSuchContainer(
                what=what,
                why="no such managed container on this machine",
                fix="`architect ps` lists them",
            )
        return found

    # ---- beginning and end of a container --------------------------------------------------------------

    def create(self, container: str, bundle: str, root: str, engine_pid: int) -> bool:
        """A container is being created: whether it is managed.

        Raises:
            ArchitectError: it is refused.
        """
        if self._retired:
            return False
        answer = door.admit(container, bundle, root, engine_pid)
        for warning in answer.warnings:
            self._context.events.append(
                Event(time="", reason="Warning", id=container, message=warning)
            )
        if answer.record is None:
            return False
        self._end_predecessors(answer.record)
        self._containers[container] = self._make(answer.record, State.CREATED)
        return True

    def _end_predecessors(self, record: ContainerRecord) -> None:
        """Ends what the kubelet takes for dead: no pod has two containers of one name.

        When a shim is killed, containerd forgets its containers without deleting them (as of 2.1).
        """
        for other in self.of_pod(record.pod_uid) if record.pod_uid else ():
            if other.record.container == record.container and other.record.id != record.id:
                self._complain(
                    other.record.id, "it is ended: its pod has a new container of that name"
                )
                task = asyncio.create_task(_end(other))
                self._ending.add(task)
                task.add_done_callback(self._ending.discard)

    def deleted(self, container: str) -> None:
        """The engine has deleted it, or its creation failed."""
        managed = self._containers.pop(container, None)
        if managed is not None and managed.state is not State.ENDED:
            managed.forget()

    def follow(self, pod_uid: str, annotations: Mapping[str, str]) -> None:
        """A pod's annotations may have been edited: what differs takes effect now.

        Values that admission would refuse change nothing but are reported.
        """
        ours = {key: value for key, value in annotations.items() if key in USER_ANNOTATIONS}
        for managed in self.of_pod(pod_uid):
            record = managed.record
            if self._retired or record.annotations == ours:
                continue
            try:
                settings = parse(ours, None, self._context.defaults).container(record.container)
            except ArchitectError as error:
                self._complain(record.id, f"an edited annotation has no effect: {error}")
                continue
            managed.follow(ours, settings)

    def of_pod(self, pod_uid: str) -> list[MovableContainer]:
        """The containers of a Kubernetes pod that have not ended."""
        return [one for one in self.all() if one.record.pod_uid == pod_uid]

    def lists(self, annotations: Mapping[str, str], container: str) -> bool:
        """Whether a pod's annotations list a container as managed."""
        if self._retired:
            return False
        ours = {key: value for key, value in annotations.items() if key in USER_ANNOTATIONS}
        try:
            return parse(ours, None, self._context.defaults).container(container).managed
        except ArchitectError:
            return False

    def retire(self) -> None:
        """architect leaves this machine: everything is woken, and nothing is managed from now on."""
        self._retired = True
        for managed in self.all():
            managed.follow(managed.record.annotations, ContainerSettings(managed.record.container))

    def resume(self) -> None:
        """architect stays after all: what was managed before is again."""
        self._retired = False
        for managed in self.all():
            managed.follow(managed.record.annotations, self._settings(managed.record))

    def busy(self) -> list[MovableContainer]:
        """After :meth:`retire`: what is not awake with all its memory yet."""
        return [one for one in self.all() if one.state not in (State.RUNNING, State.CREATED)]

    def _make(self, record: ContainerRecord, state: State) -> MovableContainer:
        settings = self._settings(record)
        return MovableContainer(record, settings, self._context, state)

    def _settings(self, record: ContainerRecord) -> ContainerSettings:
        """What its pod's annotations say; nothing is managed whose annotations cannot be read any more."""
        try:
            pod = parse(record.annotations, None, self._context.defaults)
        except ArchitectError as error:
            self._complain(record.id, f"it is woken and no longer managed: {error}")
            return ContainerSettings(record.container)
        return pod.container(record.container)

    # ---- after a start of the daemon -----------------------------------------------------------------

    async def recover(self) -> None:
        """Finds every container that lives, and clears away what is left of those that do not."""
        paths.CONTAINERS.mkdir(parents=True, mode=0o700, exist_ok=True)
        await self.catch_up()
        self._context.gates.tidy()
        known = {run.name for run in paths.CONTAINERS.iterdir()}
        for place in store.stray(paths.CHECKPOINTS, known):
            shutil.rmtree(place, ignore_errors=True)

    async def catch_up(self) -> None:
        """Finds the containers that are not known yet: once more when this daemon answers.

        Till then engines create without it, also while it looks.
        """
        runs = sorted(run for run in paths.CONTAINERS.iterdir() if run.name not in self._containers)
        # What may be under creation comes last: it takes a moment, and the others wait to be woken.
        runs.sort(key=lambda run: not (run / "init.pid").exists())
        for run in runs:
            await self.find(run.name)

    async def _look_at(self, run: Path) -> None:
        """Takes a container in that lives, and clears away what is left of one that does not."""
        try:
            record = _read(run / "meta.json")
        except (OSError, msgspec.MsgspecError, ArchitectError) as error:
            if runc_state.is_being_created(run.name):
                return  # Its record is not written yet; who creates it says when it is there.
            self._complain(run.name, f"its record cannot be read, it is left alone: {error}")
            self._left_alone.add(run.name)
            return
        managed = self._make(record, State.CREATED)
        try:
            await self._take_over(managed, run)
        except (KeeperError, FileNotFoundError, ProcessLookupError):
            managed.forget()
        except ArchitectError as error:
            self._complain(run.name, str(error))
        else:
            self._containers[record.id] = managed
            if self._retired:
                managed.follow(record.annotations, ContainerSettings(record.container))

    async def _take_over(self, managed: MovableContainer, run: Path) -> None:
        await _await_creation(run)
        await _await_exit(run / "dump.pid")
        (run / "hook").unlink(missing_ok=True)
        status = await managed.attach()
        if status.phase == "dumping":
            status = await self._end_dump(managed, run)
        elif status.phase == "restoring":
            with contextlib.suppress(KeeperError):
                status = await managed.order("wake")
        managed.resume(status, self._state(status, managed))

    async def _end_dump(self, managed: MovableContainer, run: Path) -> KeeperStatus:
        """The last daemon died in mid-dump and CRIU has ended: either it committed, or it thawed."""
        for _ in range(100):
            status = await managed.order("status")
            if status.phase != "dumping" or not (run / "checkpoint").is_symlink():
                break
            # Committed: the program's end only takes its time.
            await asyncio.sleep(0.05)
        else:
            (run / "checkpoint").unlink(missing_ok=True)
        return await managed.order("dump-end") if status.phase == "dumping" else status

    def _state(self, status: KeeperStatus, managed: MovableContainer) -> State:
        if status.phase in ("hibernated", "restoring"):
            return State.SCALED_DOWN
        fifo = Path(managed.record.runtime_root) / managed.record.id / "exec.fifo"
        if fifo.exists():
            return State.CREATED
        filling = (PagerState.RESTORING, PagerState.FILLING, PagerState.STALLED)
        return State.FILLING if status.pager_state in filling else State.RUNNING

    def _complain(self, container: str, message: str) -> None:
        self._context.events.append(Event(time="", reason="Warning", id=container, message=message))

    def close(self) -> None:
        """The daemon ends: every container stays as it is."""
        for managed in self._containers.values():
            managed.let_go()


async def _end(managed: MovableContainer) -> None:
    with contextlib.suppress(KeeperError):
        await managed.order("exit 137")


def clear(run: Path) -> None:
    """Removes the run directory of a container whose keeper is gone."""
    mounts.release(run / "mnt")
    shutil.rmtree(run, ignore_errors=True)


def _read(file: Path) -> ContainerRecord:
    raw = file.read_bytes()
    version = msgspec.json.decode(raw).get("format")
    if version != RECORD_FORMAT:
        raise ArchitectError(
            what=f"{file} is of another version",
            why=f"its format is {version!r}, this daemon reads {RECORD_FORMAT}",
            fix="start the version that wrote it",
        )
    return msgspec.json.decode(raw, type=ContainerRecord)


async def _await_creation(run: Path) -> None:
    """Waits while a container is being created, which goes on without a daemon.

    Whoever has no keeper yet is not to be taken for one whose keeper is gone.
    """
    end = time.monotonic() + _CREATION_S
    while time.monotonic() < end:
        try:
            keeper = Keeper(run / "ctl")
        except KeeperError:
            if not runc_state.is_being_created(run.name):
                return
        else:
            try:
                if (await keeper.ask("status")).phase != "creating":
                    return
            finally:
                keeper.close()
        await asyncio.sleep(_LOOK_S)


async def _await_exit(pid_file: Path) -> None:
    """Waits until the CRIU of an earlier daemon has ended, if one runs."""
    with contextlib.suppress(OSError, ValueError):
        pid = int(pid_file.read_text())
        if "criu" in Path(f"/proc/{pid}/cmdline").read_text():
            process = os.pidfd_open(pid)
            try:
                await asyncio.to_thread(select.select, [process], [], [], 60.0)
            finally:
                os.close(process)
    pid_file.unlink(missing_ok=True)
