"""The pod that `kubectl architect move` makes: which pods may have one, and what of the old pod is in it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from architect.contract import annotations as a
from architect.contract.kubernetes import MOVE_REQUESTED, READY_CONDITION
from architect.decisions import successor
from architect.decisions.resources import Container, PodResources
from architect.decisions.successor import NotMoved

Json = dict[str, Any]
UID = "5d3f0a91-77c2-4d5e-9f10-0123456789ab"
NONE = PodResources(())


def pod(**spec: Any) -> Json:
    """A bare pod that runs on node-1."""
    return {
        "metadata": {
            "name": "tool",
            "namespace": "web",
            "uid": UID,
            "resourceVersion": "7",
            "labels": {"app": "tool", "status.architect.loopholelabs.io/main": "SCALED_DOWN"},
            "annotations": {
                a.MANAGED_CONTAINERS: '["main"]',
                a.CPU_REQUESTS: '{"main":"2"}',
                "team": "blue",
            },
        },
        "spec": {
            "nodeName": "node-1",
            "runtimeClassName": "runc-architect",
            "containers": [{"name": "main", "image": "x", "resources": {"limits": {"cpu": "4"}}}],
            **spec,
        },
        "status": {"phase": "Running"},
    }


def node(name: str, *, cordoned: bool = False, ready: bool = True, daemon: bool = True) -> Json:
    status = {True: "True", False: "False"}
    return {
        "metadata": {"name": name},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "conditions": [
                {"type": "Ready", "status": status[ready]},
                {"type": READY_CONDITION, "status": status[daemon]},
            ]
        },
    }


NODES = [
    node("node-1", cordoned=True),
    node("node-2"),
    node("node-3", cordoned=True),
    node("node-4", ready=False),
    node("node-5", daemon=False),
]


def test_a_bare_managed_pod_that_runs_is_moved() -> None:
    successor.refuse(pod())
    successor.refuse_nodes(pod(), NODES, "")
    successor.refuse_nodes(pod(), NODES, "node-2")


@pytest.mark.parametrize(
    ("metadata", "spec", "phase", "why", "fix"),
    [
        (
            {"ownerReferences": [{"kind": "ReplicaSet", "name": "web-1", "controller": True}]},
            {},
            "Running",
            "its ReplicaSet web-1 replaces it",
            "drain its node",
        ),
        (
            {"annotations": {"kubernetes.io/config.mirror": "x"}},
            {},
            "Running",
            "a static pod",
            "manifest",
        ),
        ({}, {"runtimeClassName": "runc"}, "Running", "none of its containers", "runc-architect"),
        ({"annotations": {}}, {}, "Running", "none of its containers", a.MANAGED_CONTAINERS),
        ({"deletionTimestamp": "2026-01-01T00:00:00Z"}, {}, "Running", "being deleted", "wait"),
        ({}, {}, "Pending", "it is Pending", "until it runs"),
        ({}, {}, "Succeeded", "it is Succeeded", ""),
        (
            {},
            {"nodeSelector": {"kubernetes.io/hostname": "node-1"}},
            "Running",
            "kubernetes.io/hostname: node-1",
            "without that",
        ),
    ],
)
def test_what_has_no_successor(metadata: Json, spec: Json, phase: str, why: str, fix: str) -> None:
    one = pod(**spec)
    one["metadata"].update(metadata)
    one["status"]["phase"] = phase
    with pytest.raises(NotMoved) as error:
        successor.refuse(one)
    assert error.value.what == "pod web/tool is not moved"
    assert why in error.value.why
    assert fix in error.value.fix


@pytest.mark.parametrize(
    ("nodes", "to", "why", "fix"),
    [
        (NODES, "node-1", "it runs there already", "nodes that can take it: node-2"),
        (NODES, "node-9", "--to node-9: there is no such node", "node-2"),
        (NODES, "node-3", "--to node-3: it is cordoned", "node-2"),
        (NODES, "node-4", "it is not Ready", "node-2"),
        (NODES, "node-5", "no architectd is ready there", "node-2"),
        (NODES[2:], "node-3", "it is cordoned", "no node can take it"),
        (NODES[2:], "", "no other node can take it", "uncordon a node"),
        ([node("node-1", daemon=False), NODES[1]], "", "its node node-1: no architectd", "kept"),
    ],
)
def test_nodes_that_cannot_take_it(nodes: list[Json], to: str, why: str, fix: str) -> None:
    with pytest.raises(NotMoved) as error:
        successor.refuse_nodes(pod(), nodes, to)
    assert why in error.value.why
    assert fix in error.value.fix


def test_only_the_node_and_the_uid_are_new() -> None:
    old = pod(ephemeralContainers=[{"name": "debug"}], tolerations=[{"operator": "Exists"}])
    before = copy.deepcopy(old)
    asleep = Container("main", requests={"cpu": "2"}, limits={"cpu": "4"})
    new = successor.successor(old, "", PodResources((asleep,)))
    assert old == before
    assert new == {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": "tool",
            "namespace": "web",
            "labels": {"app": "tool"},
            "annotations": {
                a.MANAGED_CONTAINERS: '["main"]',
                "team": "blue",
                MOVE_REQUESTED: UID,
            },
        },
        "spec": {
            "runtimeClassName": "runc-architect",
            "tolerations": [{"operator": "Exists"}],
            "containers": [
                {
                    "name": "main",
                    "image": "x",
                    "resources": {"limits": {"cpu": "4"}, "requests": {"cpu": "2"}},
                }
            ],
            "affinity": affinity({"matchFields": [field("NotIn", "node-1")]}),
        },
    }


def field(operator: str, name: str) -> Json:
    return {"key": "metadata.name", "operator": operator, "values": [name]}


def affinity(*terms: Json) -> Json:
    required = {"nodeSelectorTerms": list(terms)}
    return {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}


def test_the_users_own_affinity_still_counts() -> None:
    zone = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    disk = {"matchExpressions": [{"key": "disk", "operator": "Exists"}]}
    wished = successor.successor(pod(affinity=affinity(zone, disk)), "node-2", NONE)
    here = {"matchFields": [field("In", "node-2")]}
    assert wished["spec"]["affinity"] == affinity({**zone, **here}, {**disk, **here})


def test_the_node_of_an_earlier_move_is_forgotten() -> None:
    once = successor.successor(pod(), "node-2", NONE)
    moved = pod(affinity=once["spec"]["affinity"], nodeName="node-2")
    again = successor.successor(moved, "", NONE)
    assert again["spec"]["affinity"] == affinity({"matchFields": [field("NotIn", "node-2")]})


def test_a_trial_is_the_same_under_a_name_that_is_free() -> None:
    new = successor.successor(pod(), "", NONE)
    new["metadata"]["name"] = "t" * 253
    trial = successor.trial(new)
    assert trial["metadata"].pop("generateName") == "t" * 40 + "-"
    assert "name" not in trial["metadata"]
    assert trial["spec"] is new["spec"]
    assert new["metadata"]["name"] == "t" * 253
