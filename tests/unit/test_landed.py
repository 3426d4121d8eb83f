"""A daemon died while a pod was landing: the next one has nothing started where a checkpoint has landed.

Only what cannot be hit with certainty from outside: tests/e2e kills daemons at each step of real moves.
"""

import asyncio
from pathlib import Path
from typing import cast

import pytest

from architect.adapters.keeper import KeeperStatus
from architect.contract import paths
from architect.contract.records import ContainerRecord, Moving
from architect.contract.states import State
from architect.processes.architectd.cluster.arriving import Arriving
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.moving import MovableContainer


def record(root: Path, moving: Moving) -> ContainerRecord:
    made = ContainerRecord(
        id="1",
        namespace="default",
        pod="p",
        container="main",
        bundle="",
        runtime_root=str(root),
        annotations={},
        engine=[],
        rootfs="",
        shared_ipc=False,
        pod_uid="2",
    )
    made.moving = moving
    return made


@pytest.mark.parametrize(
    ("moving", "state", "forgotten"),
    [
        (Moving.AWAKE, State.SCALED_DOWN, True),
        (Moving.ASLEEP, State.SCALED_DOWN, True),
        # It has not landed: its start is still to come.
        (Moving.AWAKE, State.CREATED, False),
        (Moving.NO, State.RUNNING, False),
    ],
)
def test_runc_does_not_wait_for_the_start_of_what_landed(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moving: Moving,
    state: State,
    forgotten: bool,
) -> None:
    fifo = tmp_path / "1" / "exec.fifo"
    fifo.parent.mkdir()
    fifo.touch()
    monkeypatch.setattr(ManagedContainer, "resume", lambda *_: None)
    managed = MovableContainer.__new__(MovableContainer)
    managed.record = record(tmp_path, moving)
    managed.resume(cast(KeeperStatus, None), state)
    assert fifo.exists() != forgotten


def test_what_has_landed_is_not_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "DEPARTURES", tmp_path)
    managed = MovableContainer.__new__(MovableContainer)
    managed.record = record(tmp_path, Moving.NO)
    managed.state = State.SCALING_UP
    settled = False

    async def until(_: MovableContainer, *states: State) -> State:
        nonlocal settled
        assert State.RUNNING in states
        settled = True
        return State.RUNNING

    monkeypatch.setattr(MovableContainer, "_until", until)
    # The API is not asked: a Checkpoint that is restored is nobody's to take.
    arriving = Arriving(cast(Site, None))
    assert asyncio.run(arriving.arrives(managed))
    assert settled
