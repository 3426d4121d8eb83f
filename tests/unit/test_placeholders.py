"""Placeholders of pods that move: who gets one, when it goes, and what the leader writes for it."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters.kube import placeholders as adapter
from architect.adapters.kube import resources as api
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import Recorder
from architect.contract.annotations import MANAGED_CONTAINERS
from architect.contract.kubernetes import HOLDING_ADDRESSES
from architect.decisions import placeholders
from architect.decisions.pairing import Phase
from architect.decisions.placeholders import (
    PATIENCE_S,
    SETTLE_S,
    Existing,
    Move,
    Placeholder,
    Pod,
    Port,
    Service,
    ServicePort,
    surplus,
    wanted,
)
from architect.processes.controlplane.controller import Controller
from tests.unit.api_standin import Standin
from tests.unit.test_controlplane import run
from tests.unit.test_informer import until

WEB = {"app": "web"}
OLD = Pod("old", "ns", WEB, {("http", "TCP"): 8080, ("dns", "UDP"): 5353}, ready=True)
NEW = replace(OLD, uid="new")
MOVE = Move("ns/web-0-old", Phase.AVAILABLE, "old", "StatefulSet")
REPLACED = replace(MOVE, owner="ReplicaSet")
SERVICE = Service("ns", "web", "uid-web", WEB, ("IPv4",), (ServicePort("", "TCP", 80, 8080),))
THERE = Existing("ns/web-0-old-web-hold-ipv4", MOVE.key, SERVICE.key)
UNDER_WAY = [Phase.AVAILABLE, Phase.CLAIMED, Phase.COMMITTED]
OVER = [one for one in Phase if one not in UNDER_WAY]

# -- decisions ----------------------------------------------------------------------------------------


def test_a_service_of_a_pod_that_leaves_gets_one() -> None:
    assert wanted([MOVE], [OLD], [SERVICE]) == {
        THERE.key: Placeholder(
            "ns",
            "web-0-old-web-hold-ipv4",
            MOVE.key,
            "web",
            "uid-web",
            "IPv4",
            (Port("", "TCP", 8080),),
        )
    }


def test_each_service_and_each_family_has_its_own() -> None:
    other = replace(SERVICE, name="web-2", families=("IPv6", "IPv4"))
    found = wanted([MOVE], [OLD], [SERVICE, other])
    assert [(one.service, one.family) for one in found.values()] == [
        ("web", "IPv4"),
        ("web-2", "IPv6"),
        ("web-2", "IPv4"),
    ]


@pytest.mark.parametrize(
    ("target", "protocol", "number"),
    [
        (9090, "TCP", 9090),
        ("http", "TCP", 8080),
        ("dns", "UDP", 5353),
        ("http", "UDP", 80),
        ("unknown", "TCP", 80),
        (None, "TCP", 80),
    ],
)
def test_a_port_is_the_pods(target: int | str | None, protocol: str, number: int) -> None:
    ports = (ServicePort("p", protocol, 80, target),)
    (one,) = wanted([MOVE], [OLD], [replace(SERVICE, ports=ports)]).values()
    assert one.ports == (Port("p", protocol, number),)


@pytest.mark.parametrize(
    "service",
    [
        replace(SERVICE, selector={"app": "another"}),
        replace(SERVICE, selector={**WEB, "tier": "front"}),
        replace(SERVICE, namespace="another"),
        replace(SERVICE, families=()),
    ],
    ids=["other label", "more labels", "other namespace", "no family"],
)
def test_a_service_of_others_gets_none(service: Service) -> None:
    assert wanted([MOVE], [OLD], [service]) == {}


@pytest.mark.parametrize("phase", Phase)
def test_a_frozen_pod_has_one_until_its_state_is_restored(phase: Phase) -> None:
    found = wanted([replace(MOVE, phase=phase)], [OLD, NEW], [SERVICE])
    assert bool(found) is (phase in UNDER_WAY)


@pytest.mark.parametrize("phase", Phase)
@pytest.mark.parametrize("owner", ["ReplicaSet", "Job"])
def test_a_pod_that_still_serves_has_none(phase: Phase, owner: str) -> None:
    move = replace(MOVE, phase=phase, owner=owner)
    silent = replace(OLD, ready=False)
    assert wanted([move], [OLD], [SERVICE]) == {}
    assert wanted([move], [silent, NEW], [SERVICE]) == {}
    elsewhere = replace(NEW, labels={"app": "another"})
    # Also when it is restored: its successor is not an endpoint before it is Ready.
    lacks = phase in (*UNDER_WAY, Phase.RESTORED)
    for others in ([], [replace(NEW, ready=False)], [elsewhere]):
        assert bool(wanted([move], [silent, *others], [SERVICE])) is lacks


@pytest.mark.parametrize("phase", UNDER_WAY)
@pytest.mark.parametrize("move", [MOVE, REPLACED], ids=["StatefulSet", "ReplicaSet"])
def test_it_stays_when_the_pod_is_gone(move: Move, phase: Phase) -> None:
    move = replace(move, phase=phase)
    assert wanted([move], [], [SERVICE]) == {}
    assert surplus([THERE], [move], [], [SERVICE]) == {}
    assert surplus([THERE], [move], [NEW], [SERVICE]) == {}


@pytest.mark.parametrize("phase", OVER)
def test_it_goes_when_the_move_is_over_and_the_new_pod_has_had_time(phase: Phase) -> None:
    move = replace(MOVE, phase=phase)
    for moves in ([move], []):
        waits = surplus([THERE], moves, [replace(NEW, ready=False)], [SERVICE])
        assert waits == surplus([THERE], moves, [], [SERVICE]) == {THERE.key: PATIENCE_S}
        assert surplus([THERE], moves, [NEW], [SERVICE]) == {THERE.key: SETTLE_S}
        assert surplus([THERE], moves, [], []) == {THERE.key: SETTLE_S}


def test_it_goes_when_the_old_pod_serves_again() -> None:
    silent = replace(OLD, ready=False)
    assert surplus([THERE], [REPLACED], [silent], [SERVICE]) == {}
    assert surplus([THERE], [REPLACED], [OLD], [SERVICE]) == {THERE.key: SETTLE_S}


def test_a_long_name_is_cut_and_still_its_own() -> None:
    names = set()
    for service in ("a" * 62 + "b", "a" * 62 + "c"):
        move = replace(MOVE, key=f"ns/{'p' * 180}.{'q' * 60}-12345678")
        (one,) = wanted([move], [OLD], [replace(SERVICE, name=service)]).values()
        assert len(one.name) <= 253
        names.add(one.name)
    assert len(names) == 2
    # Never cut behind a dot.
    dotted = replace(MOVE, key=f"ns/{'p' * 241}.{'q' * 10}")
    (one,) = wanted([dotted], [OLD], [SERVICE]).values()
    assert re.fullmatch("p{241}-[0-9a-f]{10}", one.name)


LABELS = st.sampled_from([{"a": "x"}, {"a": "y"}, {"b": "x"}, {"a": "x", "b": "x"}])
PODS = st.lists(
    st.builds(
        Pod,
        uid=st.sampled_from(["1", "2", "3"]),
        namespace=st.sampled_from(["ns", "other"]),
        labels=LABELS,
        ports=st.just({}),
        ready=st.booleans(),
    ),
    unique_by=lambda one: one.uid,
)
SERVICES = st.lists(
    st.builds(
        Service,
        namespace=st.sampled_from(["ns", "other"]),
        name=st.sampled_from(["s", "t"]),
        uid=st.just("u"),
        selector=LABELS,
        families=st.sampled_from([("IPv4",), ("IPv6",), ("IPv4", "IPv6")]),
        ports=st.just((ServicePort("", "TCP", 80),)),
    ),
    unique_by=lambda one: one.key,
)
MOVES = st.lists(
    st.builds(
        Move,
        key=st.sampled_from(["ns/m", "ns/n", "other/m"]),
        phase=st.sampled_from(Phase),
        pod_uid=st.sampled_from(["1", "2", "3"]),
        owner=st.sampled_from(["StatefulSet", "ReplicaSet", "Job", ""]),
    ),
    unique_by=lambda one: one.key,
)


def made(found: dict[str, Placeholder]) -> list[Existing]:
    return [
        Existing(one.key, one.checkpoint, f"{one.namespace}/{one.service}")
        for one in found.values()
    ]


@given(MOVES, PODS, SERVICES)
def test_what_is_wanted_is_not_surplus_and_nothing_stays_for_ever(
    moves: list[Move], pods: list[Pod], services: list[Service]
) -> None:
    existing = made(wanted(moves, pods, services))
    assert surplus(existing, moves, pods, services) == {}
    assert surplus(existing, [], pods, services).keys() == {one.key for one in existing}
    # Nor does anything that is there stay for what is neither under way nor to be seen any more.
    over = [replace(one, phase=Phase.RESTORED) for one in moves]
    assert surplus(existing, over, [], services).keys() == {one.key for one in existing}
    # A pod that goes takes nothing away.
    under_way = [one for one in moves if one.phase in UNDER_WAY]
    existing = made(wanted(under_way, pods, services))
    assert surplus(existing, under_way, [], services) == {}


# -- as the API has it --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "counts"),
    [
        ({}, True),
        ({"clusterIP": "None"}, False),
        ({"clusterIP": ""}, False),
        ({"selector": {}}, False),
        ({"selector": None}, False),
        ({"ports": None}, False),
    ],
)
def test_which_services_count(change: dict[str, Any], counts: bool) -> None:
    whole = {
        "clusterIP": "10.96.0.9",
        "selector": WEB,
        "ports": ({"port": 80},),
    }
    spec = api.ServiceSpec(**{**whole, **change})
    found = api.Service(metadata=api.Metadata(name="web", namespace="ns"), spec=spec)
    assert adapter.counts(found) is counts


def test_only_a_running_pod_is_ready() -> None:
    def ready(phase: str, status: str) -> bool:
        conditions = (api.Condition("Ready", status),)
        found = api.Pod(
            metadata=api.Metadata(
                name="p", namespace="ns", deletionTimestamp="2026-01-01T00:00:00Z"
            ),
            status=api.PodStatus(phase=phase, conditions=conditions),
        )
        (one,) = adapter.pods([found], {"ns"})
        assert adapter.pods([found], {"another"}) == []
        return one.ready

    assert ready("Running", "True")
    assert not ready("Running", "False")
    assert not ready("Failed", "True")


# -- the leader ---------------------------------------------------------------------------------------

SLICE = "ns/web-0-old-web-hold-ipv4"


async def service(server: Standin, name: str = "web", **more: Any) -> None:
    """A Service of the pods."""
    spec = {
        "type": "ClusterIP",
        "clusterIP": "10.96.0.9",
        "selector": WEB,
        "ipFamilies": ["IPv4"],
        "ports": [{"name": "http", "protocol": "TCP", "port": 80, "targetPort": "web"}],
        **more,
    }
    await server.put("services", name, "ns", spec=spec)


async def pod(server: Standin, uid: str = "old", ready: str = "True", **metadata: Any) -> None:
    """The pod web-0."""
    container = {"name": "main", "ports": [{"name": "web", "containerPort": 8080}]}
    annotations = {MANAGED_CONTAINERS: '["main"]'}
    await server.put(
        "pods",
        "web-0",
        "ns",
        metadata={"uid": uid, "labels": WEB, "annotations": annotations, **metadata},
        spec={"nodeName": "n1", "runtimeClassName": "runc-architect", "containers": [container]},
        status={"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    )


CLAIMANT = {"podName": "web-0", "podUID": "new", "nodeName": "n1"}


async def checkpoint(server: Standin, phase: str = "Available", kind: str = "StatefulSet") -> None:
    """That of the old pod."""
    await server.put(
        "checkpoints",
        "web-0-old",
        "ns",
        spec={"podName": "web-0", "podUID": "old", "nodeName": "n1", "owner": {"kind": kind}},
        status={"phase": phase, **({} if phase == "Available" else {"claimedBy": CLAIMANT})},
    )


@contextlib.asynccontextmanager
async def leading(server: Standin, kube: Kube, **more: Any) -> AsyncIterator[Controller]:
    """A control plane that leads."""
    await server.put("nodes", "n1")
    controller = Controller(kube, "architect", Recorder(kube, "it"), **more)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(placeholders, "SETTLE_S", 0.05)
        task = asyncio.create_task(controller.run())
        try:
            await until("synced", lambda: controller.synced)
            yield controller
            assert not task.done()
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


def slices(server: Standin) -> set[str]:
    """Those that are there."""
    return set(server.objects.get("endpointslices", {}))


def test_a_placeholder_from_the_offer_until_the_new_pod_is_ready() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await service(server)
        await service(server, "headless", clusterIP="None")
        await pod(server)
        async with leading(server, kube) as controller:
            watched = controller.placeholders
            await checkpoint(server)
            await until("made", lambda: bool(slices(server)))
            assert slices(server) == {SLICE}
            found = server.objects["endpointslices"][SLICE]
            metadata = found["metadata"]
            assert metadata["labels"] == {
                "kubernetes.io/service-name": "web",
                "endpointslice.kubernetes.io/managed-by": "architect.loopholelabs.io",
            }
            (owner,) = metadata["ownerReferences"]
            assert (owner["kind"], owner["name"], owner["uid"]) == ("Service", "web", "uid-web")
            assert found["addressType"] == "IPv4"
            assert found["endpoints"] == [
                {
                    "addresses": [HOLDING_ADDRESSES["IPv4"]],
                    "conditions": {"ready": False, "serving": True, "terminating": True},
                }
            ]
            assert found["ports"] == [{"name": "http", "protocol": "TCP", "port": 8080}]
            await server.drop("pods", "web-0", "ns")
            await until("the pod is gone", lambda: not controller.pods.objects)
            await pod(server, "new", "False")
            await until("the new pod is known", lambda: bool(controller.pods.objects))
            for phase in ("Claimed", "Committed", "Restored"):
                await checkpoint(server, phase)
            await until("the Checkpoint is deleted", lambda: not server.objects["checkpoints"])
            known = controller.pairing.checkpoints.objects
            await until("and that is known", lambda: not known)
            looks = watched.looks
            await service(server)
            await until("another look", lambda: watched.looks > looks)
            # The new pod is no endpoint yet.
            assert slices(server) == {SLICE}
            await pod(server, "new", "True")
            await until("deleted", lambda: not slices(server))
        assert sum(one[:2] == ("POST", PATH) for one in server.requests) == 1

    run(test)


PATH = "/apis/discovery.k8s.io/v1/namespaces/ns/endpointslices"


def test_a_leader_that_starts_meanwhile_keeps_what_is_needed() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await service(server)
        (one,) = wanted([MOVE], [OLD], [SERVICE]).values()
        assert await adapter.create(kube, one)
        assert not await adapter.create(kube, one)
        stale = replace(one, name="stale", checkpoint="ns/web-0-gone")
        assert await adapter.create(kube, stale)
        # Kubernetes' own, of a Service of the same pods.
        labels = {"endpointslice.kubernetes.io/managed-by": "endpointslice-controller.k8s.io"}
        await server.put("endpointslices", "web-x7k2p", "ns", metadata={"labels": labels})
        await checkpoint(server, "Claimed")
        await pod(server, "new")
        async with leading(server, kube):
            await until("the stale one deleted", lambda: "ns/stale" not in slices(server))
            assert slices(server) == {SLICE, "ns/web-x7k2p"}
            await checkpoint(server, "Restored")
            await until("deleted", lambda: slices(server) == {"ns/web-x7k2p"})

    run(test)


def test_a_replaced_pod_gets_one_when_it_is_no_longer_ready() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await service(server)
        await pod(server)
        await checkpoint(server, kind="ReplicaSet")
        async with leading(server, kube) as controller:
            watched = controller.placeholders
            await until("Services known", lambda: bool(watched.services.objects))
            looks = watched.looks
            await checkpoint(server, "Committed", kind="ReplicaSet")
            await until("a look", lambda: watched.looks > looks)
            assert not slices(server)
            await pod(server, "old", "False")
            await until("made", lambda: slices(server) == {SLICE})
            await pod(server, "old", "True")
            await until("deleted", lambda: not slices(server))

    run(test)


def test_what_the_server_does_not_take_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    async def refused_once(kube: Kube, kind: type[Any], *rest: Any, **more: Any) -> Any:
        if kind is api.EndpointSlice and not told:
            told.append("no")
            raise KubeError("POST", "told to", status=500)
        return await create(kube, kind, *rest, **more)

    create = Kube.create
    monkeypatch.setattr(Kube, "create", refused_once)

    async def test(server: Standin, kube: Kube) -> None:
        await service(server)
        await pod(server)
        async with leading(server, kube):
            await checkpoint(server)
            await until("made", lambda: slices(server) == {SLICE})
        assert told

    run(test)


def test_one_that_may_not_act_writes_nothing() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        asked: list[bool] = []

        def may_act() -> bool:
            asked.append(True)
            return False

        await service(server)
        await pod(server)
        await checkpoint(server)
        async with leading(server, kube, may_act=may_act) as controller:
            await until("Services known", lambda: bool(controller.placeholders.services.objects))
            before = len(asked)
            await checkpoint(server, "Claimed")
            await until("asked whether it may", lambda: len(asked) > before + 1)
        assert not slices(server)

    run(test)
