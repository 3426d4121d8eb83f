"""A pod that leaves: how many connections and addresses may go along, and when its containers end."""

import asyncio
import re
from types import SimpleNamespace
from typing import Any, cast

import pytest

from architect.adapters import listeners
from architect.adapters.kube import checkpoints, owners
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.resources import (
    Checkpoint,
    CheckpointStatus,
    Claimant,
    Condition,
    Metadata,
    Move,
    Pod,
    PodStatus,
)
from architect.contract.flows import Flow
from architect.contract.moving import MOST_ADDRESSES, MOST_FLOWS
from architect.decisions import moving
from architect.processes.architectd.cluster import leaving as leaving_module
from architect.processes.architectd.cluster.departing import Departure
from architect.processes.architectd.cluster.leaving import Leaving
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.moving import MovableContainer
from common import REPOSITORY

CRD = REPOSITORY / "charts/architect/templates/crds/checkpoint.yaml"


@pytest.mark.parametrize(
    ("field", "most"), [("flows", MOST_FLOWS), ("oldAddresses", MOST_ADDRESSES)]
)
def test_as_many_as_a_checkpoint_names(field: str, most: int) -> None:
    room = re.search(rf"\n +{field}:.*(?:\n.*?){{0,6}}?\n +maxItems: (\d+)", CRD.read_text())
    assert room is not None
    assert int(room[1]) == most


@pytest.mark.parametrize(("each", "fits"), [(MOST_FLOWS // 2, True), (MOST_FLOWS // 2 + 1, False)])
def test_connections_are_counted_before_the_freeze(
    monkeypatch: pytest.MonkeyPatch, each: int, fits: bool
) -> None:
    monkeypatch.setattr(listeners, "connected", lambda _pid, _address: range(each))
    container = cast(MovableContainer, SimpleNamespace(record=SimpleNamespace(keeper=1)))
    departure = Departure("default/p", "1", ("10.0.0.1", "10.0.0.2"), (container,))
    assert departure._crowd() == (
        [] if fits else ["it has 10,002 open connections, and 10,000 can move"]
    )


def test_addresses_are_counted_before_the_freeze(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listeners, "connected", lambda _pid, _address: ())
    container = cast(MovableContainer, SimpleNamespace(record=SimpleNamespace(keeper=1)))
    addresses = [f"10.0.{number // 250}.{number % 250}" for number in range(MOST_ADDRESSES + 1)]
    departure = Departure("default/p", "1", addresses, (container,))
    assert departure._crowd() == [
        "its connections were made to 257 addresses, and those of 256 can move"
    ]


def test_only_addresses_with_connections_go_along() -> None:
    """However often a pod has moved."""
    move = Move(
        oldAddresses=("10.0.0.9", "10.0.0.1", "10.0.0.2"),
        newAddresses=("10.0.0.10",),
        flows=("tcp|10.0.0.1|80|10.0.0.7|5000", "tcp|10.0.0.1|80|10.0.0.7|5001"),
    )
    taken = Checkpoint(
        status=CheckpointStatus(
            claimedBy=Claimant(podUID="2", podName="q", nodeName="n"), move=move
        )
    )
    other = Checkpoint(
        status=CheckpointStatus(
            claimedBy=Claimant(podUID="3", podName="r", nodeName="n"), move=move
        )
    )
    site = SimpleNamespace(checkpoints=SimpleNamespace(objects={"a": taken, "b": other}))
    leaving = Leaving(cast(Site, site))
    assert {one.local for one in leaving._brought("2")} == {"10.0.0.1"}
    assert list(leaving._brought("4")) == []


def test_connections_are_named_as_their_peers_know_them() -> None:
    """Though their sockets have been given another address, which the pod has now."""
    known = Flow("tcp", "10.0.0.1", 80, "10.0.0.7", 5000)
    departure = Departure("default/p", "1", ("10.0.0.3", "10.0.0.1"), (), [known])
    assert departure._as_peers_know_it(known._replace(local="10.0.0.3")) == known
    assert departure._as_peers_know_it(known) == known
    other = known._replace(peer_port=5001, local="10.0.0.3")
    assert departure._as_peers_know_it(other) == other


SERVES = PodStatus(conditions=(Condition(type="Ready", status="True"),))
OLD = Pod(metadata=Metadata(name="p", uid="1"), status=SERVES)
READY = Pod(metadata=Metadata(name="q", uid="2"), status=SERVES)
UNREADY = Pod(metadata=Metadata(name="q", uid="2"))
GOING = Pod(metadata=Metadata(name="q", uid="2", deletionTimestamp="2026-01-01T00:00:00Z"))
ANOTHER = Pod(metadata=Metadata(name="q", uid="3"))
GONE = KubeError("get pods", "not found", "none", status=404)
AWAY = KubeError("get pods", "no answer", "wait", status=0)


@pytest.mark.parametrize(
    ("old", "answers"),
    [
        (OLD, (UNREADY, AWAY, UNREADY, READY)),
        (OLD, (UNREADY, GOING)),
        (OLD, (UNREADY, ANOTHER)),
        (OLD, (UNREADY, GONE)),
        (Pod(metadata=OLD.metadata), ()),
    ],
    ids=["ready", "leaves too", "is another", "is gone", "old one serves nobody"],
)
def test_a_container_that_has_moved_ends_when_its_successor_serves(
    monkeypatch: pytest.MonkeyPatch, old: Pod, answers: tuple[Pod | KubeError, ...]
) -> None:
    monkeypatch.setattr(leaving_module, "_POLL_S", 0.0)
    monkeypatch.setattr(leaving_module, "_ROUTED_S", 0.0)
    left = list(answers)
    done: list[Any] = []

    async def get(*_: object) -> Pod:
        assert not done
        answer = left.pop(0)
        if isinstance(answer, KubeError):
            raise answer
        return answer

    async def depart() -> None:
        done.append(len(left))

    claim = Claimant(podUID="2", podName="q", nodeName="n")
    checkpoint = Checkpoint(
        metadata=Metadata(name="p", namespace="default"), status=CheckpointStatus(claimedBy=claim)
    )
    site = SimpleNamespace(
        kube=SimpleNamespace(get=get),
        pods=SimpleNamespace(objects={"default/p": old}),
        checkpoints={"default/p": checkpoint},
    )
    departure = SimpleNamespace(key="default/p", pod_uid="1", depart=depart)
    asyncio.run(Leaving(cast(Site, site))._depart(cast(Departure, departure)))
    assert done == [0]


@pytest.mark.parametrize("moves", [True, False])
def test_what_went_to_the_disk_is_offered_when_the_api_is_back(
    monkeypatch: pytest.MonkeyPatch, moves: bool
) -> None:
    """Or forgotten: its place is taken by then."""
    said: list[str] = []
    answers: list[Any] = [AWAY, ("facts",)]

    async def facts(*_: object) -> object:
        answer = answers.pop(0)
        if isinstance(answer, KubeError):
            raise answer
        return answer

    async def offer(_kube: object, _checkpoint: object, endpoint: str) -> str:
        said.append(f"offered at {endpoint}")
        return "checkpoint"

    verdict = moving.Verdict.MOVE if moves else moving.Verdict.END
    monkeypatch.setattr(owners, "facts", facts)
    monkeypatch.setattr(moving, "judge", lambda *_: moving.Judgement(verdict, "why"))
    monkeypatch.setattr(owners, "spec", lambda *_: None)
    monkeypatch.setattr(checkpoints, "offer", offer)
    site = SimpleNamespace(
        kube=None,
        node="n",
        endpoint="10.0.0.1:9443",
        checkpoints=SimpleNamespace(note=said.append),
        recorder=SimpleNamespace(record=lambda _about, reason, *_: said.append(reason)),
    )
    leaving = Leaving(cast(Site, site))
    pod = Pod(metadata=Metadata(name="p", namespace="default", uid="12345678-9"))
    key = "default/p-12345678"
    forgotten = SimpleNamespace(frozen=True, forget=lambda: said.append("forgotten"))
    leaving._departures[key] = cast(Departure, forgotten)
    asyncio.run(leaving._offer_late(pod))
    if moves:
        assert said == ["offered at 10.0.0.1:9443", "checkpoint"]
        assert key in leaving._departures
    else:
        assert said == ["forgotten", "CannotMove"]
        assert key not in leaving._departures


@pytest.mark.parametrize(
    ("phase", "fleeting", "containers", "kept"),
    [
        ("Restored", False, False, False),
        ("Restored", False, True, True),
        ("Committed", True, False, True),
        (None, True, False, False),
        (None, False, False, True),
    ],
)
def test_a_daemon_that_starts_throws_away_what_has_been_taken(
    phase: str | None, fleeting: bool, containers: bool, kept: bool
) -> None:
    """What was never offered, as the API was away, is not among it."""
    status = CheckpointStatus(phase=phase or "")
    key = "default/p"
    found = {} if phase is None else {key: Checkpoint(metadata=OLD.metadata, status=status)}
    gone: list[str] = []
    departure = SimpleNamespace(
        fleeting=fleeting,
        containers_left=lambda: containers,
        forget=lambda: gone.append(key),
    )

    async def check() -> None:
        synced = asyncio.Event()
        synced.set()
        informer = SimpleNamespace(synced=synced, objects=found, get=found.get)
        leaving = Leaving(cast(Site, SimpleNamespace(checkpoints=informer, node="n")))
        leaving._departures[key] = cast(Departure, departure)
        await leaving.disown()
        assert (key in leaving._departures) == kept

    asyncio.run(check())
    assert gone == ([] if kept else [key])
