"""Writes to Checkpoints and the facts about owners, against a stand-in API server: two never both succeed."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from architect.adapters.kube import checkpoints, owners
from architect.adapters.kube.checkpoints import Lost
from architect.adapters.kube.client import Kube, KubeError, decode
from architect.adapters.kube.resources import Checkpoint, Move, Pod
from architect.contract.annotations import MANAGED_CONTAINERS
from architect.contract.kubernetes import MOVE_REQUESTED
from architect.decisions import moving, pairing
from architect.decisions.moving import Verdict
from tests.unit.api_standin import Standin

UID = "12345678-aaaa"
MOVE = Move(("10.0.1.7",), ("10.0.2.9",), ("tcp/80",), ("a", "b", "c"), accepting=True)
RS = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "web", "uid": "rs", "controller": True}
RAN = {"terminated": {"startedAt": "2026-01-01T00:00:00Z", "exitCode": 1, "reason": "Error"}}
NOT_STARTED = {"terminated": {"startedAt": "1970-01-01T00:00:00Z", "reason": "StartError"}}


def in_a_loop(test: Callable[[Path], Coroutine[Any, Any, None]]) -> Callable[[Path], None]:
    """A test that is a coroutine."""

    def run(tmp_path: Path) -> None:
        asyncio.run(test(tmp_path))

    run.__name__ = test.__name__
    return run


class Server(Standin):
    """With what Checkpoints need besides: the status apart."""

    silent: bool = False
    """The next write is made, and not answered."""

    async def _do(self, method: str, path: str, parts: list[str], *rest: Any) -> tuple[int, Any]:
        namespace, _, body = rest
        if not parts:
            found = self.objects.get("namespaces", {}).get(f"/{namespace}")
            return (200, found) if found else (404, {"kind": "Status", "code": 404})
        if method == "POST":
            new = json.loads(body)
            new.pop("status", None)
            rest = (*rest[:2], json.dumps(new).encode())
        answer = await super()._do(method, path, parts, *rest)
        if self.silent and method == "PATCH":
            self.silent = False
            return 504, {"kind": "Status", "code": 504, "message": "timeout"}
        return answer


@contextlib.asynccontextmanager
async def serving(directory: Path) -> AsyncIterator[tuple[Server, Kube]]:
    """A server and a client of it."""
    server = Server()
    await server.start()
    kube = server.kube(directory)
    try:
        yield server, kube
    finally:
        await kube.close()
        await server.stop()


def body(name: str = "web-a", uid: str = UID, node: str = "s", **more: Any) -> dict[str, Any]:
    """A managed pod of the ReplicaSet, as JSON."""
    state = more.pop("state", {"running": {"startedAt": "2026-01-01T00:00:00Z"}})
    metadata = {
        "name": name,
        "namespace": "default",
        "uid": uid,
        "creationTimestamp": "2026-01-01T00:00:00Z",
        "labels": {"pod-template-hash": "1"},
        "annotations": {MANAGED_CONTAINERS: '["main"]'},
        "ownerReferences": [RS],
        **more.pop("metadata", {}),
    }
    return {
        "metadata": metadata,
        "spec": {"nodeName": node, "containers": [{"name": "main"}, {"name": "side"}]},
        "status": {
            "phase": "Running",
            "containerStatuses": [
                {"name": "main", "state": state, **more},
                {"name": "side", "state": {"running": {}}},
            ],
        },
    }


def pod(*args: Any, **more: Any) -> Pod:
    """A managed pod of the ReplicaSet."""
    return decode(Pod, json.dumps(body(*args, **more)).encode())


OLD = pod()
NEW = pod("web-b", "new", "d", state={"waiting": {}})


async def offered(kube: Kube) -> Checkpoint:
    """The old pod's."""
    return await checkpoints.offer(kube, owners.spec(OLD, "s"), "10.0.0.2:9443")


async def claimed(kube: Kube) -> Checkpoint:
    """It, claimed by the new pod."""
    found = await checkpoints.claim(kube, await offered(kube), NEW)
    assert found is not None
    return found


@in_a_loop
async def test_a_move_from_offer_to_end(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        one = await offered(kube)
        assert one.key == "default/web-a-12345678"
        assert (one.status.phase, one.status.endpoint) == ("Available", "10.0.0.2:9443")
        assert one.spec.owner is not None
        assert (one.spec.owner.uid, one.spec.owner.apiVersion) == ("rs", "apps/v1")
        assert (one.spec.templateHash, one.spec.ordinal) == ("1", None)
        assert [container.name for container in one.spec.containers] == ["main"]
        seen, found = checkpoints.seen(one), checkpoints.pods([OLD, NEW])
        assert pairing.pair([seen], found) == [(one.key, NEW.key)]
        claim = await checkpoints.claim(kube, one, NEW)
        assert claim is not None
        assert claim.status.claimedBy is not None
        assert claim.status.claimedBy.nodeName == "d"
        assert checkpoints.seen(claim).claimed_uid == "new"
        committed = await checkpoints.commit(kube, claim, MOVE)
        assert (committed.status.phase, committed.status.move) == ("Committed", MOVE)
        # Others write meanwhile; what does not depend on it is written all the same.
        stopped = await checkpoints.stop_accepting(kube, committed)
        assert stopped.status.move == replace(MOVE, accepting=False)
        after = await checkpoints.restored(kube, committed, 1234, 56)
        assert (after.status.phase, after.status.transferredBytes) == ("Restored", 1234)
        assert after.status.downtimeMs == 56
        assert after == await checkpoints.restored(kube, committed, 0, 0)
        left = await checkpoints.drop_flows(kube, committed, ("c", "a"))
        assert left.status.move is not None
        assert left.status.move.flows == ("a", "c")
        assert not left.status.move.accepting
        kinds = [(told.type, told.status) for told in left.status.conditions or ()]
        assert kinds == [
            (kind, "True") for kind in ("Advertised", "Claimed", "Committed", "Restored")
        ]
        assert all(told.lastTransitionTime for told in left.status.conditions or ())
        raw = server.objects["checkpoints"]["default/web-a-12345678"]
        assert all(told["reason"] for told in raw["status"]["conditions"])
        await checkpoints.delete(kube, left)
        assert not server.objects["checkpoints"]


@in_a_loop
async def test_an_offer_of_the_same_pod_is_taken_over(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        claim = await claimed(kube)
        again = await checkpoints.offer(kube, owners.spec(OLD, "s"), "10.0.0.2:1")
        assert (again.status.phase, again.status.endpoint) == ("Claimed", "10.0.0.2:1")
        assert again.status.claimedBy == claim.status.claimedBy
        assert await checkpoints.offer(kube, owners.spec(OLD, "s"), "10.0.0.2:1") == again
        await checkpoints.failed(kube, again, "no room")
        anew = await offered(kube)
        assert (anew.status.phase, anew.status.message) == ("Available", None)
        assert anew.status.claimedBy is None
        server.objects["checkpoints"][f"default/{anew.metadata.name}"]["spec"]["podUID"] = "x"
        with pytest.raises(KubeError) as refused:
            await offered(kube)
        assert refused.value.status == 409


@in_a_loop
async def test_one_checkpoint_goes_to_one_pod(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        one = await offered(kube)
        assert await checkpoints.claim(kube, one, NEW) is not None
        assert await checkpoints.claim(kube, one, pod("web-c", "c", "e")) is None
        assert await checkpoints.claim(kube, await kube.get(Checkpoint, *_name(one)), NEW) is None
        assert not await checkpoints.withdraw(kube, one)


def _name(one: Checkpoint) -> tuple[str, str]:
    return one.metadata.name, one.metadata.namespace


@in_a_loop
async def test_a_release_keeps_a_commit_from_succeeding(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        free = await checkpoints.release(kube, claim)
        assert (free.status.phase, free.status.claimedBy) == ("Available", None)
        assert await checkpoints.release(kube, free) is free
        with pytest.raises(Lost, match="Available"):
            await checkpoints.commit(kube, claim, MOVE)
        # Nor does a claim of the same pod make the old one good.
        assert await checkpoints.claim(kube, free, pod("web-c", "c", "e")) is not None
        with pytest.raises(Lost, match="Claimed"):
            await checkpoints.commit(kube, claim, MOVE)
        with pytest.raises(Lost):
            await checkpoints.restored(kube, claim, 0, 0)


@in_a_loop
async def test_a_commit_keeps_a_release_from_succeeding(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        await checkpoints.commit(kube, claim, MOVE)
        with pytest.raises(KubeError) as conflict:
            await checkpoints.release(kube, claim)
        assert conflict.value.status == 409


@in_a_loop
async def test_a_commit_without_an_answer_is_found_again(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        claim = await claimed(kube)
        server.silent = True
        with pytest.raises(KubeError) as doubt:
            await checkpoints.commit(kube, claim, MOVE)
        assert doubt.value.temporary
        assert (await checkpoints.commit(kube, claim, MOVE)).status.phase == "Committed"
        await checkpoints.restored(kube, await checkpoints.commit(kube, claim, MOVE), 0, 0)
        assert (await checkpoints.commit(kube, claim, MOVE)).status.phase == "Restored"


@in_a_loop
async def test_a_commit_is_lost_if_anything_happened(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        # The source has been started anew: its program may have gone on meanwhile.
        await checkpoints.offer(kube, owners.spec(OLD, "s"), "10.0.0.2:1")
        with pytest.raises(Lost, match="Claimed"):
            await checkpoints.commit(kube, claim, MOVE)


@in_a_loop
async def test_a_namesake_is_not_deleted(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        one = await offered(kube)
        await server.put("checkpoints", one.metadata.name, "default", metadata={"uid": "another"})
        with pytest.raises(KubeError):
            await checkpoints.delete(kube, one)
        with pytest.raises(Lost, match="another one"):
            await checkpoints.stop_accepting(kube, _with_move(one))


@in_a_loop
async def test_a_commit_of_what_is_gone_is_lost(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        await checkpoints.delete(kube, claim)
        with pytest.raises(Lost, match="gone"):
            await checkpoints.commit(kube, claim, MOVE)
        with pytest.raises(Lost, match="gone"):
            await checkpoints.stop_accepting(kube, _with_move(claim))


def _with_move(one: Checkpoint) -> Checkpoint:
    return replace(one, status=replace(one.status, move=MOVE))


@in_a_loop
async def test_an_offer_is_withdrawn(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        one = await offered(kube)
        # Cut off between the two writes, it is done when it is tried again.
        server.silent = True
        with pytest.raises(KubeError):
            await checkpoints.withdraw(kube, one)
        marked = await kube.get(Checkpoint, *_name(one))
        assert await checkpoints.claim(kube, marked, NEW) is None
        assert await checkpoints.withdraw(kube, marked)
        assert not server.objects["checkpoints"]
        assert await checkpoints.withdraw(kube, one)


@in_a_loop
async def test_what_failed_after_the_commit_stays_with_its_node(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        committed = await checkpoints.commit(kube, claim, MOVE)
        # The old node, which has not heard of the commit, has no say any more.
        with pytest.raises(Lost):
            await checkpoints.failed(kube, claim, "lost")
        broken = await checkpoints.given_up(kube, committed, "no memory")
        assert (broken.status.phase, broken.status.message) == ("Failed", "no memory")
        assert broken.status.claimedBy == committed.status.claimedBy
        # Nobody is sent to the pod for connections that it does not have.
        assert broken.status.move == replace(MOVE, flows=(), accepting=False)
        assert _reasons(broken)["Restored"] == ("False", "StartedFresh", "no memory")
        assert await checkpoints.given_up(kube, committed, "again") == broken
        assert not await checkpoints.withdraw(kube, broken)
        assert (await offered(kube)).status.phase == "Failed"
        later = await checkpoints.restored(kube, broken, 1, 2)
        assert (later.status.phase, later.status.message) == ("Restored", None)
        with pytest.raises(Lost):
            await checkpoints.given_up(kube, committed, "too late")


def _reasons(one: Checkpoint) -> dict[str, tuple[str, str | None, str | None]]:
    return {
        told.type: (told.status, told.reason, told.message) for told in one.status.conditions or ()
    }


@in_a_loop
async def test_a_restore_that_is_tried_again_is_shown(tmp_path: Path) -> None:
    async with serving(tmp_path) as (_, kube):
        claim = await claimed(kube)
        # Not committed: nothing to show.
        assert await checkpoints.not_restored(kube, claim, "no memory") == claim
        committed = await checkpoints.commit(kube, claim, MOVE)
        shown = await checkpoints.not_restored(kube, committed, "no memory")
        assert (shown.status.phase, shown.status.message) == ("Committed", "no memory")
        assert shown.status.move == MOVE
        assert _reasons(shown)["Restored"] == ("False", "RestoreFailed", "no memory")
        done = await checkpoints.restored(kube, shown, 1, 2)
        assert (done.status.phase, done.status.message) == ("Restored", None)
        # A write that comes late undoes nothing.
        assert await checkpoints.not_restored(kube, committed, "no memory") == done


@pytest.mark.parametrize(
    ("status", "begun"),
    [
        ({"state": {"waiting": {}}}, False),
        ({"state": {}}, False),
        ({"state": {"running": {}}}, True),
        ({"state": RAN}, True),
        ({"state": {"waiting": {}}, "lastState": RAN}, True),
        ({"state": NOT_STARTED}, False),
        ({"state": {"terminated": {"reason": "StartError"}}}, False),
        ({"state": {"waiting": {}}, "lastState": NOT_STARTED, "restartCount": 2}, False),
    ],
)
def test_whether_a_managed_container_was_started(status: dict[str, Any], begun: bool) -> None:
    assert checkpoints.started(pod(**status)) is begun


def test_a_long_name_is_cut() -> None:
    name = owners.checkpoint_name(pod("a" * 243 + "." + "b" * 9, UID))
    assert name == "a" * 243 + "-12345678"


def test_a_pod_of_a_stateful_set() -> None:
    owner = {**RS, "kind": "StatefulSet"}
    labels = {"controller-revision-hash": "web-5"}
    spec = owners.spec(
        pod("web-12", metadata={"ownerReferences": [owner], "labels": labels}), "s"
    ).spec
    assert (spec.controllerRevision, spec.ordinal, spec.templateHash) == ("web-5", 12, None)


def bare(name: str = "tool", uid: str = UID, moves: str | None = None) -> Pod:
    """A pod without a controller, with the annotation of `kubectl architect move`."""
    notes = {MANAGED_CONTAINERS: '["main"]', **({MOVE_REQUESTED: moves} if moves else {})}
    return pod(name, uid, metadata={"ownerReferences": [], "annotations": notes})


def test_a_bare_pod_is_paired_with_its_successor_alone() -> None:
    checkpoint = checkpoints.seen(owners.spec(bare(moves=UID), "s")).template
    assert checkpoints.template(bare(uid="new", moves=UID)).fits(checkpoint)
    for other in (bare(uid="new"), bare(uid="new", moves="other"), pod("web-b", "new")):
        assert not checkpoints.template(other).fits(checkpoint)
    # Nor is anybody's who has a controller.
    for owner in (RS, {**RS, "kind": "Job"}, {**RS, "kind": "StatefulSet"}):
        labels = {"pod-template-hash": "1", "controller-revision-hash": "web-5"}
        owned = pod("web-0", metadata={"ownerReferences": [owner], "labels": labels})
        theirs = checkpoints.seen(owners.spec(owned, "s")).template
        assert not checkpoints.template(bare(uid="new", moves="rs")).fits(theirs)
    assert owners.spec(bare(), "s").spec.owner is None
    # One that took over before, and leaves now as any bare pod does.
    assert owners.spec(bare(uid="new", moves=UID), "s").spec.owner is None


LEAVES = {"deletionTimestamp": "2026-01-01T01:10:00Z", "deletionGracePeriodSeconds": 600}


async def judged(kube: Kube, **more: Any) -> moving.Judgement:
    return moving.judge(*await owners.facts(kube, pod(metadata={**LEAVES, **more})))


@in_a_loop
async def test_facts_of_a_replica_set(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        assert (await judged(kube)).why == "its ReplicaSet web is gone"
        await server.put(
            "replicasets", "web", "default", metadata={"uid": "rs"}, spec={"replicas": 2}
        )
        old, new = body(metadata=LEAVES), body("web-b", "new", "d", state={"waiting": {}})
        other = body("web-x", "x", metadata={"ownerReferences": [{**RS, "uid": "another"}]})
        for one in (old, new, body("web-c", "c"), other):
            await server.put("pods", one["metadata"]["name"], "default", **one)
        leaving, owner, siblings = await owners.facts(kube, pod(metadata=LEAVES))
        assert leaving.deleted_at == 1767229200.0
        assert owner is not None
        assert owner.replicas == 2
        assert [(one.uid, one.started, one.leaving) for one in siblings] == [
            ("new", False, False),
            ("c", True, False),
        ]
        assert (await judged(kube)).verdict is Verdict.MOVE
        # What another pod has left to the new one takes its place.
        await checkpoints.commit(kube, await _claimed_by_new(kube), MOVE)
        assert (await judged(kube)).verdict is Verdict.END
        await server.put("namespaces", "default", status={"phase": "Terminating"})
        assert "namespace" in (await judged(kube)).why
        await server.put("replicasets", "web", "default", metadata={"uid": "rs-2"})
        assert (await judged(kube)).why == "its ReplicaSet web is gone"
        server.fail = [500]
        with pytest.raises(KubeError):
            await judged(kube)


async def _claimed_by_new(kube: Kube) -> Checkpoint:
    gone = pod("web-d", "87654321", metadata=LEAVES)
    found = await checkpoints.offer(kube, owners.spec(gone, "s"), "10.0.0.2:9443")
    claim = await checkpoints.claim(kube, found, NEW)
    assert claim is not None
    return claim


@in_a_loop
async def test_facts_of_other_owners(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        assert (await owners.facts(kube, pod(metadata={"ownerReferences": []})))[1] is None
        await server.put(
            "statefulsets",
            "web",
            "default",
            metadata={"uid": "rs"},
            spec={"replicas": 2},
            status={"updateRevision": "web-5"},
        )
        done = {"conditions": [{"type": "Complete", "status": "True"}]}
        await server.put("jobs", "web", "default", metadata={"uid": "rs"}, status=done)
        for kind, version in (("StatefulSet", "apps/v1"), ("Job", "batch/v1")):
            references = [{**RS, "kind": kind, "apiVersion": version}]
            _, owner, _ = await owners.facts(kube, pod(metadata={"ownerReferences": references}))
            assert owner is not None
            assert owner.exists
            assert (owner.revision, owner.finished) in (("web-5", False), ("", True))


@in_a_loop
async def test_a_new_pod_waits_only_for_what_may_come(tmp_path: Path) -> None:
    async with serving(tmp_path) as (server, kube):
        assert not await owners.may_come(kube, NEW, [])
        await server.put("pods", "web-c", "default", **body("web-c", "c"))
        assert not await owners.may_come(kube, NEW, [])
        await server.put("pods", "web-a", "default", **body(metadata=LEAVES))
        assert await owners.may_come(kube, NEW, [])
        one = await offered(kube)
        assert await owners.may_come(kube, NEW, [one])
        claim = await checkpoints.claim(kube, one, pod("web-z", "z", "e"))
        assert claim is not None
        assert not await owners.may_come(kube, NEW, [claim])
