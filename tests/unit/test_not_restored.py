"""CRIU fails after the commit of a move: the pod waits visibly, or starts fresh; its state is kept.

What the kubelet does in between, a container anew for each try, the tests do by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import pytest
from msgspec.structs import replace

from architect.adapters import home, mounts, runc_state, silence
from architect.adapters.keeper import KeeperError, KeeperStatus
from architect.adapters.kube import checkpoints
from architect.adapters.kube.client import Kube
from architect.adapters.kube.resources import Checkpoint, CheckpointContainer
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.moving import Manifest, MovedContainer, OnRestoreFailure
from architect.contract.records import ContainerRecord
from architect.contract.states import Action, Happening, State
from architect.processes.architectd.cluster import files
from architect.processes.architectd.cluster.arriving import Arriving
from architect.processes.architectd.cluster.leaving import Leaving
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.moving import MovableContainer, NotRestored
from architect.processes.architectd.waiters import Waiters
from architect.processes.router.main import wanted
from tests.unit.test_checkpoints import MOVE, NEW, claimed, in_a_loop, serving

FLOW = "tcp|10.0.1.7|80|10.0.3.4|41234"
LOG = "CRIU's status 1: Can't open file /data/x"


class Container:
    """A container that the kubelet has made, and is about to start."""

    def __init__(self, name: str = "main", *, fails: bool = True, awake: bool = True) -> None:
        self.name = f"web-b/{name}"
        self.fails = fails
        self.arrivable, self.expecting = True, False
        self.laid_in: Path | None = None
        self.landed: list[dict[str, Any]] = []
        self.record = SimpleNamespace(
            container=name, pod="web-b", namespace="default", pod_uid="new", keeper=1, mounts=()
        )
        self.settings = SimpleNamespace(
            rewrite_established=False,
            rewrite_listeners=False,
            autoscaleup_after_migration=not awake,
            scaleup_timeout_ns=0,
        )

    async def prepare(self) -> None:
        """Nothing to be done."""

    async def expect(self) -> None:
        """Waits for its checkpoint."""
        self.arrivable, self.expecting = False, True

    def expect_ports(self, quiet: object) -> None:
        """Nothing to be done."""

    async def lay_in(self, place: Path, pipes: object) -> None:
        """From where."""
        self.laid_in = place

    async def not_coming(self) -> None:
        """As new."""
        self.arrivable, self.expecting = True, False

    async def land(self, **how: Any) -> None:
        """Restored, or not."""
        self.landed.append(how)
        if self.fails:
            raise NotRestored(
                f"{self.name} could not be restored after its move", LOG, how["advice"]
            )


class Node:
    """The node that the pod has come to."""

    def __init__(self, kube: Kube, chosen: OnRestoreFailure) -> None:
        self.events: list[tuple[str, str, str]] = []
        self.left: list[int] = []
        self.objects: dict[str, Checkpoint] = {}
        self.copy = SimpleNamespace(objects=self.objects, synced=asyncio.Event(), note=self.note)
        self.copy.synced.set()
        self.kube = kube
        self.chosen = chosen
        self.begin_anew()

    def begin_anew(self) -> None:
        """Another daemon."""
        site = SimpleNamespace(
            kube=self.kube,
            node="d",
            pods=SimpleNamespace(get=lambda _key: NEW),
            checkpoints=self.copy,
            recorder=SimpleNamespace(
                record=lambda about, *what: self.events.append((what[0], what[1], what[2]))
            ),
            on_restore_failure=self.chosen,
        )
        self.arriving = Arriving(cast(Site, site))

    def note(self, one: Checkpoint) -> None:
        """The copy has it now."""
        self.objects[one.key] = one

    @property
    def checkpoint(self) -> Checkpoint:
        """The one there is."""
        (one,) = self.objects.values()
        return one

    async def start(self, container: Container) -> bool:
        """As the kubelet does it."""
        try:
            return await self.arriving.arrives(cast(MovableContainer, container))
        finally:
            await self.settle()

    async def settle(self) -> None:
        """Returns when what was begun behind a start is done."""
        mine = asyncio.current_task()
        names = ("_write_not_restored", "_write_restored")
        for task in asyncio.all_tasks() - {mine}:
            if getattr(task.get_coro(), "__name__", "") in names:
                with contextlib.suppress(asyncio.CancelledError):
                    await task


@contextlib.asynccontextmanager
async def committed(
    directory: Path, chosen: OnRestoreFailure, *names: str, awake: bool = True
) -> AsyncIterator[Node]:
    """A move that is committed, its files here."""
    async with serving(directory) as (_, kube):
        one = await checkpoints.commit(kube, await claimed(kube), replace(MOVE, flows=(FLOW,)))
        place = paths.ARRIVALS / one.metadata.uid
        place.mkdir(parents=True)
        moved = [
            MovedContainer(name=name, awake=awake, age_s=1.0, pipes={}, quiet=[], files=[])
            for name in names or ("main",)
        ]
        manifest = Manifest(
            checkpoint=one.key,
            pod_uid=one.spec.podUID,
            addresses=["10.0.1.7"],
            flows=[FLOW],
            ports=["tcp/80"],
            containers=moved,
        )
        (place / "manifest.json").write_bytes(msgspec.json.encode(manifest))
        node = Node(kube, chosen)
        node.note(one)
        yield node


@pytest.fixture(autouse=True)
def machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """A node without namespaces: what would be done to the pod's."""
    done: list[str] = []
    monkeypatch.setattr(paths, "ARRIVALS", tmp_path / "arrivals")
    monkeypatch.setattr(paths, "DEPARTURES", tmp_path / "departures")
    monkeypatch.setattr(home, "addresses", lambda _pid: ["10.0.2.9"])
    monkeypatch.setattr(home, "settle", lambda *_: done.append("settle"))
    monkeypatch.setattr(home, "leave", lambda _pid: done.append("leave"))
    monkeypatch.setattr(silence, "end", lambda _pid: done.append("heard"))
    monkeypatch.setattr(files, "unpack", lambda *_: None)
    return done


def test_a_first_failure_is_tried_again_from_the_same_files(tmp_path: Path) -> None:
    @in_a_loop
    async def scene(directory: Path) -> None:
        for chosen in OnRestoreFailure:
            async with committed(directory / chosen, chosen) as node:
                first, second = Container(), Container(fails=False)
                with pytest.raises(NotRestored):
                    await node.start(first)
                assert node.checkpoint.status.phase == "Committed"
                assert node.checkpoint.status.move is not None
                assert node.checkpoint.status.move.flows == (FLOW,)
                assert await node.start(second)
                assert first.laid_in == second.laid_in
                assert (len(first.landed), len(second.landed)) == (1, 1)
                assert node.checkpoint.status.phase == "Restored"
                assert node.checkpoint.status.message is None
                assert [reason for reason, _, _ in node.events] == ["Migrated"]

    for chosen in OnRestoreFailure:
        (tmp_path / chosen).mkdir()
    scene(tmp_path)


@in_a_loop
async def test_who_waits_is_tried_again_for_ever_and_says_so(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.WAIT) as node:
        place = paths.ARRIVALS / node.checkpoint.metadata.uid
        for _ in range(4):
            with pytest.raises(NotRestored) as told:
                await node.start(Container())
            for part in (LOG, str(place), "node d", "kept", "delete the pod", "tries again"):
                assert part in str(told.value)
            status = node.checkpoint.status
            # `kubectl get ckpt` has a column for it.
            assert (status.phase, status.message) == ("Committed", str(told.value))
        assert (place / "manifest.json").exists()
        assert node.events == []  # The container has its own: test_the_event_says_what_to_do.


@in_a_loop
async def test_what_left_asleep_and_is_to_wake_counts_as_well(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.WAIT, awake=False) as node:
        container = Container(awake=False)
        with pytest.raises(NotRestored):
            await node.start(container)
        assert [(how["awake"], how["wake"]) for how in container.landed] == [(False, True)]
        # Not taken for landed: it would start as new, and nobody would know.
        again = Container(awake=False, fails=False)
        assert await node.start(again)
        assert len(again.landed) == 1


def test_after_a_second_failure_it_starts_fresh(tmp_path: Path, machine: list[str]) -> None:
    @in_a_loop
    async def scene(directory: Path) -> None:
        async with committed(directory, OnRestoreFailure.FRESH) as node:
            place = paths.ARRIVALS / node.checkpoint.metadata.uid
            with pytest.raises(NotRestored, match="once more"):
                await node.start(Container())
            with pytest.raises(NotRestored, match="starts fresh"):
                await node.start(Container())
            status = node.checkpoint.status
            assert status.phase == "Failed"
            assert list(wanted([node.checkpoint])) == []
            assert status.move is not None
            assert status.move.flows == ()
            ((reason, message, kind),) = node.events
            assert (reason, kind) == ("StartedFresh", "Warning")
            name = node.checkpoint.metadata.name
            for part in (LOG, str(place), "node d", "2 times", f"{name} is deleted"):
                assert part in message
            assert status.message == message
            machine.clear()
            fresh = Container()
            assert not await node.start(fresh)
            assert fresh.landed == []
            assert machine == ["leave", "heard"]
            assert (place / "manifest.json").exists()
            # Nor is it held, where its checkpoint was expected when that was given up.
            expecting = Container()
            await expecting.expect()
            assert not await node.start(expecting)
            assert expecting.arrivable
            # And when the program crashes.
            assert not await node.start(Container())
            assert len(node.events) == 1

    scene(tmp_path)


def test_a_new_daemon_knows_who_starts_fresh(tmp_path: Path, machine: list[str]) -> None:
    @in_a_loop
    async def scene(directory: Path) -> None:
        async with committed(directory, OnRestoreFailure.FRESH) as node:
            for _ in range(2):
                with pytest.raises(NotRestored):
                    await node.start(Container())
            # Whatever it is told to do with others.
            node.chosen = OnRestoreFailure.WAIT
            node.begin_anew()
            machine.clear()
            fresh = Container(fails=False)
            assert not await node.start(fresh)
            assert fresh.landed == []
            assert machine == ["leave", "heard"]

    scene(tmp_path)


@in_a_loop
async def test_a_new_daemon_tries_once_more(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.FRESH) as node:
        with pytest.raises(NotRestored):
            await node.start(Container())
        node.begin_anew()
        with pytest.raises(NotRestored):
            await node.start(Container())
        assert node.checkpoint.status.phase == "Committed"


@in_a_loop
async def test_each_container_is_tried_twice(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.FRESH, "main", "side") as node:
        spec = replace(
            node.checkpoint.spec,
            containers=(CheckpointContainer("main"), CheckpointContainer("side")),
        )
        node.note(replace(node.checkpoint, spec=spec))
        for name in ("main", "side"):
            with pytest.raises(NotRestored):
                await node.start(Container(name))
        assert node.checkpoint.status.phase == "Committed"
        with pytest.raises(NotRestored):
            await node.start(Container("side"))
        assert node.checkpoint.status.phase == "Failed"


@in_a_loop
async def test_a_start_that_waited_meanwhile_restores_nothing(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.FRESH) as node:
        for _ in range(2):
            with pytest.raises(NotRestored):
                await node.start(Container())
        (arrival,) = node.arriving._arrivals.values()
        late = Container(fails=False)
        with pytest.raises(ArchitectError, match="the pod starts fresh"):
            await arrival.take(cast(MovableContainer, late))
        assert late.landed == []


@in_a_loop
async def test_nobody_says_fresh_before_that_is_written(tmp_path: Path) -> None:
    async with committed(tmp_path, OnRestoreFailure.FRESH) as node:
        with pytest.raises(NotRestored):
            await node.start(Container())
        # Somebody has deleted it by hand meanwhile.
        await checkpoints.delete(node.kube, node.checkpoint)
        with pytest.raises(NotRestored):
            await node.start(Container())
        assert node.checkpoint.status.phase == "Committed"
        assert node.events == []


# ---- the container ---------------------------------------------------------------------------------


def container(advice: str) -> tuple[MovableContainer, list[tuple[str, ArchitectError]]]:
    """One whose restore has failed, and what it reports."""
    told: list[tuple[str, ArchitectError]] = []
    made = MovableContainer.__new__(MovableContainer)
    made.state = State.STRANDED
    made._failure = ArchitectError("p/main could not be woken", LOG, "as a sleeper")
    made._advice = advice
    report = SimpleNamespace(name="p/main", failed=lambda *what: told.append(what))
    made._report = cast(Any, report)
    return made, told


def test_the_event_says_what_to_do() -> None:
    made, told = container("delete the pod")
    made._tell(Action.REPORT_RESTORE_FAILED)
    ((reason, error),) = told
    assert reason == "RestoreFailed"
    assert isinstance(error, NotRestored)
    assert str(error) == f"p/main could not be restored after its move: {LOG}; delete the pod"
    # The start fails with the same words.
    assert made._failure is error


def test_a_sleeper_is_told_of_as_ever() -> None:
    made, told = container("")
    made._tell(Action.REPORT_RESTORE_FAILED)
    assert [str(error) for _, error in told] == [f"p/main could not be woken: {LOG}; as a sleeper"]


@pytest.mark.parametrize(("advice", "woken"), [("delete the pod", 0), ("", 2)])
def test_nothing_wakes_what_the_runtime_is_about_to_end(
    monkeypatch: pytest.MonkeyPatch, advice: str, woken: int
) -> None:
    made, _ = container(advice)
    happened: list[Happening] = []
    monkeypatch.setattr(ManagedContainer, "happen", lambda _, what: happened.append(what))
    monkeypatch.setattr(ManagedContainer, "_awake_is_wanted", lambda _: True)
    made._packets()
    made._retry()
    assert len(happened) == woken


class Keeper:
    """Restores, or says that CRIU could not."""

    def __init__(self, *, fails: bool) -> None:
        self.fails = fails
        self.asked: list[str] = []

    async def ask(self, order: str, timeout_s: float = 0.0) -> KeeperStatus:
        """An order."""
        self.asked.append(order)
        if order == "wake" and self.fails:
            raise KeeperError("the keeper refused", "restore failed, CRIU's status 1", "")
        return cast(KeeperStatus, SimpleNamespace(init=2, phase="running", pager_state=None))


def landing(root: Path, monkeypatch: pytest.MonkeyPatch, keeper: Keeper) -> MovableContainer:
    """A container in whose place a checkpoint is laid in."""

    def nothing(*_: object, **__: object) -> None:
        """Done."""

    monkeypatch.setattr(os, "kill", nothing)
    monkeypatch.setattr(runc_state, "forget_start", nothing)
    monkeypatch.setattr(mounts, "uncover_deleted", lambda _: False)
    monkeypatch.setattr(MovableContainer, "_mend_runtime", nothing)
    monkeypatch.setattr(MovableContainer, "_news", nothing)
    made = MovableContainer.__new__(MovableContainer)
    made.record = cast(
        ContainerRecord,
        SimpleNamespace(
            id="1",
            runtime_root=str(root),
            generation=1,
            pod_uid="new",
            ports=[],
            lifted={},
            warm=[],
        ),
    )
    made.state = State.ARRIVING
    made._run = root
    made._keeper = cast(Any, keeper)
    made._store = cast(
        Any,
        SimpleNamespace(commit=nothing, verify=nothing, size=int, committed=lambda: root),
    )
    made._limits = cast(Any, SimpleNamespace(put_back=bool))
    made._traffic = cast(Any, SimpleNamespace(open=nothing, sleep=nothing, hold=nothing))
    made.clock = cast(Any, SimpleNamespace(init=2, cgroup=None, touch=nothing, place=None))
    made._context = cast(Any, SimpleNamespace(changed=nothing))
    made._waiters, made._tasks, made._timer = Waiters(), set(), None
    made._failure, made._unfit, made._why, made._checkpoint_bytes = None, False, "", 0
    made._report = cast(
        Any,
        SimpleNamespace(name="p/main", up=nothing, log=nothing, transition=nothing, failed=nothing),
    )
    monkeypatch.setattr(MovableContainer, "save", nothing)
    return made


@pytest.mark.parametrize("awake", [True, False])
def test_what_cannot_be_restored_is_not_landed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, awake: bool
) -> None:
    async def scene() -> None:
        keeper = Keeper(fails=True)
        made = landing(tmp_path, monkeypatch, keeper)
        with pytest.raises(NotRestored, match=r"CRIU's status 1.*delete the pod"):
            await made.land(awake=awake, wake=not awake, age=1.0, advice="delete the pod")
        assert made.state is State.STRANDED
        tries = keeper.asked.count("wake")
        # A packet that waits, in the moment until the runtime ends it.
        made._packets()
        assert made.state is State.STRANDED
        assert keeper.asked.count("wake") == tries
        assert made._timer is not None
        made._timer.cancel()

    asyncio.run(scene())


@pytest.mark.parametrize("awake", [True, False])
def test_what_has_landed_is_a_container_like_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, awake: bool
) -> None:
    async def scene() -> None:
        made = landing(tmp_path, monkeypatch, Keeper(fails=False))
        await made.land(awake=awake, wake=not awake, age=1.0, advice="delete the pod")
        assert made.state is State.FILLING
        await asyncio.gather(*made._tasks)
        # When it has gone to sleep and fails to wake, that is no matter of the move any more.
        assert made._advice == ""
        assert not made._is_over

    asyncio.run(scene())


# ---- the node that it has left ---------------------------------------------------------------------


def in_doubt(one: Checkpoint) -> list[str]:
    """What a source does that reads this."""
    done: list[str] = []

    async def does(what: str) -> None:
        done.append(what)

    async def get(*_: object) -> Checkpoint:
        return one

    departure = SimpleNamespace(
        key=one.key,
        frozen=True,
        in_use=False,
        containers_left=lambda: not done,
        depart=lambda: does("depart"),
        thaw=lambda: does("thaw"),
    )
    site = SimpleNamespace(
        kube=SimpleNamespace(get=get),
        checkpoints=SimpleNamespace(note=lambda _: None, get=lambda _: None),
    )
    leaving = Leaving(cast(Site, site))
    asyncio.run(leaving._in_doubt(cast(Any, departure)))
    return done


@pytest.mark.parametrize("phase", ["Committed", "Restored", "Failed"])
def test_the_old_pod_does_not_come_back_after_the_commit(phase: str) -> None:
    """Not even when the new one has started fresh meanwhile: there would be two."""
    status = replace(Checkpoint().status, phase=phase, move=MOVE)
    assert in_doubt(replace(Checkpoint(), status=status)) == ["depart"]
    status = replace(Checkpoint().status, phase="Available")
    assert in_doubt(replace(Checkpoint(), status=status)) == ["thaw"]
