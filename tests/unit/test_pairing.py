"""Which checkpoint goes to which pod: to one of its kind and to nobody else, once, the oldest first."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.moving import OnRestoreFailure
from architect.decisions.pairing import (
    Checkpoint,
    Phase,
    Pod,
    Template,
    done,
    gives_up,
    pair,
    release,
    starts_fresh,
)

WEB = Template("default", "rs", "1")
HELD = Checkpoint("default/old-1", WEB, Phase.AVAILABLE, "old", "s", created="2026-01-01T00:00:01Z")
NEW = Pod("default/new", "new", WEB, "d", created="2026-01-01T00:00:02Z")
CLAIMED = dataclasses.replace(HELD, phase=Phase.CLAIMED, claimed_uid="new", claimed_node="d")
GIVEN = [("default/old-1", "default/new")]


def test_a_checkpoint_goes_to_the_replacement() -> None:
    assert pair([HELD], [NEW]) == GIVEN
    assert pair([HELD], [dataclasses.replace(NEW, node="s")]) == GIVEN


@pytest.mark.parametrize(
    "change",
    [
        {"node": ""},
        {"leaving": True},
        {"finished": True},
        {"started": True},
        {"uid": "old"},
        {"template": Template("other", "rs", "1")},
        {"template": Template("default", "another", "1")},
        {"template": Template("default", "rs", "2")},
        {"template": Template("default", "rs")},
        {"template": Template("default")},
    ],
)
def test_it_does_not_go_to(change: dict[str, object]) -> None:
    assert pair([HELD], [dataclasses.replace(NEW, **change)]) == []  # type: ignore[arg-type]


def test_numbered_pods_are_paired_by_revision_and_number() -> None:
    def of(revision: str, ordinal: int | None) -> Template:
        return Template("default", "sts", "", revision, ordinal)

    held = dataclasses.replace(HELD, template=of("r1", 0))
    for what, paired in [
        (of("r1", 0), True),
        (of("r1", 1), False),
        (of("r2", 0), False),
        (of("", 0), False),
    ]:
        assert bool(pair([held], [dataclasses.replace(NEW, template=what)])) is paired
    # Not by what both lack.
    for nothing in (of("", 0), of("r1", None), Template("default"), Template("default", "", "1")):
        lone = dataclasses.replace(HELD, template=nothing)
        assert pair([lone], [dataclasses.replace(NEW, template=nothing)]) == []


def test_a_pod_that_has_a_checkpoint_gets_no_second_one() -> None:
    for phase in (Phase.CLAIMED, Phase.COMMITTED, Phase.RESTORED, Phase.FAILED):
        taken = dataclasses.replace(CLAIMED, key="default/x", phase=phase)
        assert pair([HELD, taken], [NEW]) == []


@pytest.mark.parametrize("phase", [one for one in Phase if one is not Phase.AVAILABLE])
def test_only_what_is_available_is_given(phase: Phase) -> None:
    assert pair([dataclasses.replace(HELD, phase=phase)], [NEW]) == []


def test_the_oldest_first() -> None:
    later = dataclasses.replace(HELD, key="default/a", created="2026-01-01T00:00:05Z")
    assert pair([later, HELD], [NEW]) == GIVEN
    newer = dataclasses.replace(NEW, key="default/a", uid="x", created="2026-01-01T00:00:03Z")
    assert pair([HELD], [newer, NEW]) == GIVEN
    assert pair([HELD, later], [newer, NEW]) == [*GIVEN, ("default/a", "default/a")]


def test_a_claim_is_given_up_when_its_pod_will_not_come() -> None:
    assert release([CLAIMED], [NEW]) == []
    for change in ({"leaving": True}, {"started": True}, {"finished": True}, {"uid": "another"}):
        pod = dataclasses.replace(NEW, **change)
        assert release([CLAIMED], [pod]) == [CLAIMED.key]
    assert release([CLAIMED], []) == [CLAIMED.key]
    for phase in Phase:
        if phase is not Phase.CLAIMED:
            assert release([dataclasses.replace(CLAIMED, phase=phase)], []) == []


OLD = dataclasses.replace(NEW, key="default/old", uid="old", leaving=True)


@pytest.mark.parametrize(
    ("change", "pods", "nodes", "over"),
    [
        ({"phase": Phase.RESTORED}, [OLD, NEW], "sd", False),
        ({"phase": Phase.RESTORED}, [NEW], "sd", True),
        ({"phase": Phase.RESTORED, "flows": True}, [NEW], "sd", False),
        ({"phase": Phase.RESTORED, "flows": True}, [], "sd", True),
        ({"phase": Phase.RESTORED, "flows": True}, [OLD], "sd", False),
        ({"phase": Phase.COMMITTED, "committed": True}, [], "sd", False),
        ({"phase": Phase.COMMITTED, "committed": True}, [], "d", False),
        ({"phase": Phase.COMMITTED, "committed": True}, [], "s", True),
        ({"phase": Phase.COMMITTED, "committed": True}, [NEW], "s", False),
        ({"phase": Phase.FAILED, "committed": True}, [], "d", False),
        ({"phase": Phase.FAILED, "claimed_uid": ""}, [OLD], "sd", False),
        ({"phase": Phase.FAILED, "claimed_uid": ""}, [], "sd", True),
        ({"phase": Phase.AVAILABLE, "claimed_uid": ""}, [], "sd", False),
        ({"phase": Phase.AVAILABLE, "claimed_uid": ""}, [], "d", True),
        ({"phase": Phase.AVAILABLE, "claimed_uid": ""}, [OLD], "d", False),
        ({}, [], "s", False),
    ],
)
def test_when_it_is_needed_no_more(
    change: dict[str, object], pods: list[Pod], nodes: str, over: bool
) -> None:
    checkpoint = dataclasses.replace(CLAIMED, **change)  # type: ignore[arg-type]
    assert done([checkpoint], pods, set(nodes)) == [checkpoint.key] * over


TEMPLATES = st.builds(
    Template,
    namespace=st.sampled_from(["n", "m"]),
    owner=st.sampled_from(["", "o", "p"]),
    template_hash=st.sampled_from(["", "1", "2"]),
    revision=st.sampled_from(["", "r"]),
    ordinal=st.sampled_from([None, 0, 1]),
)
UIDS = st.sampled_from([f"u{n}" for n in range(8)])


@given(
    st.lists(
        st.builds(
            Checkpoint,
            key=st.uuids().map(str),
            template=TEMPLATES,
            phase=st.sampled_from(Phase),
            pod_uid=UIDS,
            node=st.just("s"),
            created=st.sampled_from(["1", "2"]),
            claimed_uid=st.one_of(st.just(""), UIDS),
        ),
        max_size=8,
    ),
    st.lists(
        st.builds(
            Pod,
            key=UIDS,
            uid=UIDS,
            template=TEMPLATES,
            node=st.sampled_from(["", "d", "s"]),
            created=st.sampled_from(["1", "2"]),
            leaving=st.booleans(),
            started=st.booleans(),
        ),
        max_size=8,
        unique_by=(lambda one: one.key, lambda one: one.uid),
    ),
)
def test_never_between_strangers_and_never_twice(held: list[Checkpoint], pods: list[Pod]) -> None:
    found = pair(held, pods)
    assert found == pair(held[::-1], pods[::-1])
    by_key = {one.key: one for one in held}
    pod_by_key = {one.key: one for one in pods}
    claimed = {one.claimed_uid for one in held}
    for key, pod_key in found:
        one, pod = by_key[key], pod_by_key[pod_key]
        assert one.phase is Phase.AVAILABLE
        assert not one.claimed_uid
        assert pod.uid not in claimed
        assert pod.waiting
        assert one.template.owner
        assert (one.template.namespace, one.template.owner) == (
            pod.template.namespace,
            pod.template.owner,
        )
        assert one.template.template_hash == pod.template.template_hash
        if not one.template.template_hash:
            assert one.template.revision
            assert one.template.ordinal is not None
            assert (one.template.revision, one.template.ordinal) == (
                pod.template.revision,
                pod.template.ordinal,
            )
    assert len({key for key, _ in found}) == len(found) == len({key for _, key in found})


@pytest.mark.parametrize(
    ("chosen", "failures", "verdict"),
    [
        (OnRestoreFailure.WAIT, 1, False),
        (OnRestoreFailure.WAIT, 1000, False),
        (OnRestoreFailure.FRESH, 1, False),
        (OnRestoreFailure.FRESH, 2, True),
        (OnRestoreFailure.FRESH, 3, True),
    ],
)
def test_one_failed_restore_is_never_the_last(
    chosen: OnRestoreFailure, failures: int, verdict: bool
) -> None:
    assert gives_up(chosen, failures) is verdict


GIVEN_UP = dataclasses.replace(CLAIMED, phase=Phase.FAILED, committed=True)


@pytest.mark.parametrize(
    ("change", "fresh"),
    [
        ({}, True),
        ({"phase": Phase.COMMITTED}, False),
        ({"phase": Phase.RESTORED}, False),
        ({"claimed_uid": "another"}, False),
        # Nothing was to be had: another one may come.
        ({"committed": False}, False),
    ],
)
def test_only_the_pod_whose_own_state_was_given_up_starts_fresh(
    change: dict[str, object], fresh: bool
) -> None:
    assert starts_fresh(dataclasses.replace(GIVEN_UP, **change), "new") is fresh  # type: ignore[arg-type]


def test_a_state_that_was_given_up_is_kept_until_somebody_deletes_it() -> None:
    """Also when its pod is gone; not when the node is, and the disk with it."""
    for pods in ([NEW], []):
        assert done([GIVEN_UP], pods, {"s", "d"}) == []
        assert done([GIVEN_UP], pods, {"d"}) == []
    assert done([GIVEN_UP], [], {"s"}) == [GIVEN_UP.key]
