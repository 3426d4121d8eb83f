"""Move or end: each row of the table, and that as many move as their owner lacks, whoever they are."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.decisions.moving import Leaving, Owner, Sibling, Verdict, judge, lacking

SET = Owner("ReplicaSet", "web-1", "rs", replicas=3)
POD = Leaving("web-1-a", "a", "ReplicaSet", "rs", template_hash="1", deleted_at=100.0)


def alive(name: str, **more: object) -> Sibling:
    """A pod that stays."""
    stays = Sibling(f"web-1-{name}", name, template_hash="1", created=10.0, started=True)
    return dataclasses.replace(stays, **more)  # type: ignore[arg-type]


def new(name: str, **more: object) -> Sibling:
    """A replacement that has not been started."""
    return alive(name, **{"started": False, "created": 100.0, **more})


def gone(name: str, at: float, **more: object) -> Sibling:
    """Another pod that leaves."""
    return alive(name, leaving=True, deleted_at=at, **more)


TWO = (alive("b"), alive("c"))


@pytest.mark.parametrize(
    ("siblings", "verdict"),
    [
        pytest.param(TWO, Verdict.MOVE, id="drained, no replacement yet"),
        pytest.param((*TWO, new("d")), Verdict.MOVE, id="drained, its replacement waits"),
        pytest.param((*TWO, new("d", created=99.0)), Verdict.MOVE, id="one that never started"),
        pytest.param((*TWO, alive("d")), Verdict.END, id="scaled down, or a rollout"),
        pytest.param((*TWO, alive("d", created=100.0)), Verdict.END, id="replaced by a fresh pod"),
        pytest.param((*TWO, alive("d", finished=True)), Verdict.MOVE, id="another was evicted"),
        pytest.param((*TWO, alive("d", template_hash="2")), Verdict.MOVE, id="of another template"),
        pytest.param((alive("b"), new("c"), new("d")), Verdict.MOVE, id="while scaled up"),
        pytest.param((*TWO, gone("d", 90.0)), Verdict.END, id="one place, another was first"),
        pytest.param((*TWO, gone("d", 110.0)), Verdict.MOVE, id="one place, another was later"),
        pytest.param((alive("b"), gone("c", 90.0)), Verdict.MOVE, id="two drained, two places"),
        pytest.param(
            (*TWO, gone("d", 90.0, moved=True)), Verdict.MOVE, id="another has moved already"
        ),
        pytest.param(
            (alive("b"), gone("c", 90.0, moved=True), new("d", arrived=True), alive("e")),
            Verdict.END,
            id="the place of one that has moved is taken",
        ),
        pytest.param(
            (*TWO, gone("d", 90.0, started=False)), Verdict.MOVE, id="another never started"
        ),
        pytest.param(
            (alive("c"), gone("d", 50.0), alive("e", created=51.0)),
            Verdict.MOVE,
            id="a dead node's pod was replaced long ago",
        ),
    ],
)
def test_a_pod_of_a_replica_set(siblings: tuple[Sibling, ...], verdict: Verdict) -> None:
    found = judge(POD, SET, siblings)
    assert found.verdict is verdict, found.why


@pytest.mark.parametrize(
    ("pod", "owner", "why"),
    [
        pytest.param({"deleted_at": None}, SET, "only a container", id="restarted by the kubelet"),
        pytest.param({"started": False}, SET, "no program", id="never started"),
        pytest.param({"finished": True}, SET, "no program", id="ended by itself"),
        pytest.param({}, None, "without an owner", id="bare"),
        pytest.param({}, {"exists": False}, "is gone", id="owner deleted"),
        pytest.param({}, {"leaving": True}, "being deleted", id="owner being deleted"),
        pytest.param({}, {"replicas": 0}, "wants no pods", id="scaled to zero"),
        pytest.param({"template_hash": ""}, SET, "no Deployment", id="a bare ReplicaSet"),
        *(
            pytest.param({}, {"kind": kind}, "do not move by themselves", id=kind)
            for kind in ("DaemonSet", "Machine")
        ),
        pytest.param({}, {"api_version": "apps.example.com/v1"}, "do not move", id="a namesake"),
    ],
)
def test_what_ends(
    pod: dict[str, object], owner: Owner | dict[str, object] | None, why: str
) -> None:
    if isinstance(owner, dict):
        owner = dataclasses.replace(SET, **owner)  # type: ignore[arg-type]
    found = judge(dataclasses.replace(POD, **pod), owner, TWO)  # type: ignore[arg-type]
    assert found.verdict is Verdict.END
    assert why in found.why


@pytest.mark.parametrize(
    ("more", "verdict"),
    [
        pytest.param({}, Verdict.MOVE, id="deleted by `kubectl architect move`"),
        pytest.param({"deleted_at": None}, Verdict.END, id="only its container is restarted"),
        pytest.param({"finished": True}, Verdict.END, id="it has ended"),
    ],
)
def test_a_bare_pod_with_a_successor(more: dict[str, object], verdict: Verdict) -> None:
    bare = Leaving("tool", "u", "", "", deleted_at=100.0, is_to_move=True)
    found = judge(dataclasses.replace(bare, **more), None, ())  # type: ignore[arg-type]
    assert found.verdict is verdict, found.why


def test_an_owner_that_says_no_number_wants_one() -> None:
    owner = dataclasses.replace(SET, replicas=None)
    assert judge(POD, owner, ()).verdict is Verdict.MOVE
    assert judge(POD, owner, (alive("b"),)).verdict is Verdict.END


TIMES = st.integers(0, 6).map(float)
PODS = st.lists(
    st.builds(
        Sibling,
        name=st.sampled_from("abc"),
        uid=st.uuids().map(str),
        template_hash=st.sampled_from(["1", "1", "1", "2"]),
        created=TIMES,
        leaving=st.booleans(),
        deleted_at=TIMES,
        started=st.booleans(),
        finished=st.sampled_from([False, False, False, True]),
        moved=st.sampled_from([False, False, True]),
        arrived=st.booleans(),
    ),
    max_size=9,
    unique_by=lambda one: one.uid,
)


@given(pods=PODS, replicas=st.integers(0, 6))
def test_as_many_move_as_are_lacking(pods: list[Sibling], replicas: int) -> None:
    owner = dataclasses.replace(SET, replicas=replicas)
    kin = [one for one in pods if one.template_hash == "1"]
    asking = [
        one for one in kin if one.leaving and one.started and not one.finished and not one.moved
    ]
    verdicts = []
    for one in asking:
        pod = dataclasses.replace(POD, name=one.name, uid=one.uid, deleted_at=one.deleted_at)
        verdicts.append(judge(pod, owner, pods[::-1]).verdict)
        assert verdicts[-1] is judge(pod, owner, pods).verdict
    assert verdicts.count(Verdict.MOVE) == min(len(asking), lacking(replicas, kin))


@pytest.mark.parametrize(
    ("pod", "owner", "verdict"),
    [
        pytest.param({}, {}, Verdict.MOVE, id="drained"),
        pytest.param({"ordinal": 3}, {}, Verdict.END, id="scaled down"),
        pytest.param({"ordinal": 3}, {"first": 1}, Verdict.MOVE, id="numbers begin at one"),
        pytest.param({"ordinal": 0}, {"first": 1}, Verdict.END, id="below the first number"),
        pytest.param({}, {"revision": "r2"}, Verdict.END, id="rollout"),
        pytest.param({}, {"replicas": 0}, Verdict.END, id="scaled to zero"),
    ],
)
def test_a_pod_of_a_stateful_set(
    pod: dict[str, object], owner: dict[str, object], verdict: Verdict
) -> None:
    stateful = Owner("StatefulSet", "db", "ss", replicas=3, revision="r1")
    leaving = Leaving("db-2", "a", "StatefulSet", "ss", revision="r1", ordinal=2, deleted_at=100.0)
    found = judge(
        dataclasses.replace(leaving, **pod),  # type: ignore[arg-type]
        dataclasses.replace(stateful, **owner),  # type: ignore[arg-type]
        (),
    )
    assert found.verdict is verdict, found.why


@pytest.mark.parametrize(
    ("job", "verdict"),
    [
        pytest.param({}, Verdict.MOVE, id="not finished"),
        pytest.param({"finished": True}, Verdict.END, id="finished"),
        pytest.param({"suspended": True}, Verdict.END, id="suspended"),
        pytest.param({"leaving": True}, Verdict.END, id="deleted"),
    ],
)
def test_a_pod_of_a_job(job: dict[str, object], verdict: Verdict) -> None:
    owner = dataclasses.replace(Owner("Job", "sum", "j", "batch/v1"), **job)  # type: ignore[arg-type]
    found = judge(Leaving("sum-x", "a", "Job", "j", deleted_at=100.0), owner, ())
    assert found.verdict is verdict, found.why
