"""`kubectl architect move`: what it does in which order, and that whatever comes in between loses no pod.

A cluster of one pod stands in: what kubectl would have done to it, and what it would have said.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import pytest

from architect.contract import annotations as a
from architect.contract.kubernetes import MOVE_REQUESTED, READY_CONDITION
from architect.decisions.successor import NotMoved
from architect.processes.cli import move
from architect.processes.cli.cluster import ClusterError

Json = dict[str, Any]
OLD = "5d3f0a91-77c2-4d5e-9f10-0123456789ab"
NEW = "aaaaaaaa-77c2-4d5e-9f10-0123456789ab"
QUOTA = 'pods "tool" is forbidden: exceeded quota: one'


class Cluster:
    """One pod, and what becomes of it; ``fails`` are the calls that go wrong, and how."""

    def __init__(self) -> None:
        self.pods: dict[str, Json] = {"tool": pod(OLD, "node-1")}
        self.did: list[str] = []
        self.fails: dict[str, list[Exception]] = {}
        self.checkpoint = True
        self.lasts = 2
        """Looks at a pod that is being deleted until it is gone."""
        self.events: dict[str, list[tuple[str, str]]] = {NEW: [("Migrated", "3 MiB")]}
        self.pending = 0
        """Looks at the successor until it is scheduled."""
        self.trial: Json = {}

    def kubectl(self, *words: str, given: str | None = None) -> str:
        what = self._what(words)
        self.did.append(what)
        if self.fails.get(what):
            raise self.fails[what].pop(0)
        match what:
            case "read":
                return self._read()
            case "nodes":
                return json.dumps({"items": [node("node-1"), node("node-2")]})
            case "try":
                self.trial = json.loads(given or "")
            case "mark":
                (patch,) = [word for word in words if word.startswith("--patch=")]
                metadata = json.loads(patch.removeprefix("--patch="))["metadata"]
                notes = self.pods["tool"]["metadata"]["annotations"]
                assert metadata["uid"] == self.pods["tool"]["metadata"]["uid"]
                notes.update(metadata["annotations"])
            case "delete":
                assert json.loads(given or "")["preconditions"] == {"uid": OLD}
                assert self.pods["tool"]["metadata"]["annotations"][MOVE_REQUESTED] == OLD
                self.pods["tool"]["metadata"]["deletionTimestamp"] = "2026-01-01T00:00:00Z"
            case "checkpoint":
                found = {"metadata": {"name": "tool-5d3f0a91", "namespace": "web"}}
                return json.dumps(found) if self.checkpoint else ""
            case "make":
                made = json.loads(Path(words[words.index("-f") + 1]).read_text())
                made["metadata"]["uid"] = NEW
                made["status"] = {"phase": "Pending"}
                self.pods["tool"] = made
                return json.dumps(made)
            case "events":
                uid = next(word for word in words if "involvedObject" in word).rpartition("=")[2]
                told = self.events.get(uid, [])
                return json.dumps({"items": [{"reason": r, "message": m} for r, m in told]})
        return ""

    def _what(self, words: tuple[str, ...]) -> str:
        if "--dry-run=server" in words:
            return "try"
        names = {"patch": "mark", "delete": "delete", "create": "make"}
        if words[0] != "get":
            return names[words[0]]
        kinds = {"pod": "read", "nodes": "nodes", "events": "events"}
        return kinds.get(words[1], "checkpoint")

    def _read(self) -> str:
        one = self.pods.get("tool")
        if one is not None and one["metadata"].get("deletionTimestamp"):
            self.lasts -= 1
            if self.lasts <= 0:
                del self.pods["tool"]
                return ""
        if one is not None and one["metadata"]["uid"] == NEW:
            self.pending -= 1
            full = {"type": "PodScheduled", "status": "False", "message": "0/2 nodes fit"}
            one["status"] = {"phase": "Pending", "conditions": [full]}
            if self.pending < 0:
                one["status"] = {"phase": "Running"}
                one["spec"]["nodeName"] = "node-2"
        return json.dumps(one) if one is not None else ""


def pod(uid: str, where: str) -> Json:
    return {
        "metadata": {
            "name": "tool",
            "namespace": "web",
            "uid": uid,
            "annotations": {
                a.MANAGED_CONTAINERS: '["main"]',
                a.CPU_REQUESTS: '{"main":"2"}',
            },
        },
        "spec": {
            "nodeName": where,
            "runtimeClassName": "runc-architect",
            "containers": [{"name": "main", "resources": {"requests": {"cpu": "1m"}}}],
        },
        "status": {"phase": "Running"},
    }


def node(name: str) -> Json:
    up = [{"type": one, "status": "True"} for one in ("Ready", READY_CONDITION)]
    return {"metadata": {"name": name}, "status": {"conditions": up}}


@pytest.fixture
def cluster(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Cluster:
    found = Cluster()
    monkeypatch.setattr(move, "kubectl", found.kubectl)
    monkeypatch.setattr(move, "_POLL_S", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return found


def kept() -> list[Path]:
    return list(Path(tempfile.gettempdir()).glob("architect-move-*"))


def test_a_pod_goes_and_its_successor_has_its_state(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    move.move("tool", "web", "node-2")
    assert cluster.did[:5] == ["read", "nodes", "try", "mark", "delete"]
    rest = [one for one in cluster.did[5:] if one not in ("read", "events")]
    assert rest == ["checkpoint", "make"]
    assert capsys.readouterr().out == "pod/tool runs on node-2: 3 MiB\n"
    made = cluster.pods["tool"]
    assert made["metadata"]["annotations"][MOVE_REQUESTED] == OLD
    # What it had asked for before it went to sleep.
    assert made["spec"]["containers"][0]["resources"]["requests"] == {"cpu": "2"}
    assert not kept()


def test_what_it_waits_for_is_said_once(
    cluster: Cluster, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.pending = 4
    cluster.events = {}

    def later(*words: str, given: str | None = None) -> str:
        if cluster.pending < 0:
            cluster.events = {NEW: [("Migrated", "3 MiB")]}
        return Cluster.kubectl(cluster, *words, given=given)

    monkeypatch.setattr(move, "kubectl", later)
    move.move("tool", "web", "")
    assert capsys.readouterr().err == "pod web/tool waits: 0/2 nodes fit\n"


@pytest.mark.parametrize("step", ["read", "nodes", "try"])
def test_before_the_deletion_nothing_is_changed(cluster: Cluster, step: str) -> None:
    cluster.fails[step] = [ClusterError("kubectl", "the server is away")]
    with pytest.raises((ClusterError, NotMoved), match="the server is away"):
        move.move("tool", "web", "")
    assert "mark" not in cluster.did
    assert not kept()


@pytest.mark.parametrize("error", [ClusterError("kubectl", "forbidden"), KeyboardInterrupt()])
def test_a_deletion_that_is_refused_leaves_no_mark(cluster: Cluster, error: Exception) -> None:
    cluster.fails["delete"] = [error]
    with pytest.raises(type(error)):
        move.move("tool", "web", "")
    assert cluster.did[-3:] == ["mark", "delete", "mark"]
    assert cluster.pods["tool"]["metadata"]["annotations"][MOVE_REQUESTED] is None
    assert not kept()


def test_who_may_not_see_nodes_may_move(cluster: Cluster) -> None:
    cluster.fails["nodes"] = [ClusterError("kubectl", "Error from server (Forbidden): nodes")]
    move.move("tool", "web", "")
    assert cluster.pods["tool"]["metadata"]["uid"] == NEW


def test_a_quota_for_one_pod_is_no_obstacle(cluster: Cluster) -> None:
    cluster.fails["try"] = [ClusterError("kubectl", QUOTA)]
    cluster.fails["make"] = [ClusterError("kubectl", QUOTA)]
    move.move("tool", "web", "")
    assert cluster.did.count("make") == 2


@pytest.mark.parametrize("step", ["checkpoint", "make"])
def test_after_the_deletion_the_successor_is_in_a_file(cluster: Cluster, step: str) -> None:
    cluster.fails[step] = [ClusterError("kubectl", "the server is away")]
    with pytest.raises(ClusterError) as error:
        move.move("tool", "web", "")
    (file,) = kept()
    assert f"`kubectl create -f {file}`" in error.value.fix
    written = json.loads(file.read_text())
    assert written["metadata"]["name"] == "tool"
    assert file.stat().st_mode & 0o077 == 0


def test_an_interrupt_after_the_deletion_says_the_file(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.fails["make"] = [KeyboardInterrupt()]  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        move.move("tool", "web", "")
    (file,) = kept()
    assert str(file) in capsys.readouterr().err


def test_a_pod_that_does_not_end_is_said(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    cluster.lasts = 1 << 60
    monkeypatch.setattr(move, "_ENDS_S", 0.05)
    with pytest.raises(ClusterError, match="has not come to its end within") as error:
        move.move("tool", "web", "")
    assert "kubectl create -f" in error.value.fix


@pytest.mark.parametrize(
    ("state", "events", "why"),
    [
        (False, {OLD: [("CannotMove", "a file is open")]}, "without its state: a file is open"),
        (False, {}, "without its state: its state could not be kept"),
        (True, {NEW: [("StartedFresh", "too late")]}, "without its state: too late"),
    ],
)
def test_a_fresh_start_is_a_failure(
    cluster: Cluster, state: bool, events: dict[str, list[tuple[str, str]]], why: str
) -> None:
    cluster.checkpoint, cluster.events = state, events
    with pytest.raises(NotMoved, match=why):
        move.move("tool", "web", "")


def test_a_successor_that_does_not_begin_is_said(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster.pending, cluster.events = 1 << 60, {}
    monkeypatch.setattr(move, "_ARRIVES_S", 0.05)
    with pytest.raises(ClusterError, match="0/2 nodes fit") as error:
        move.move("tool", "web", "")
    assert error.value.fix.startswith("nothing is lost")
