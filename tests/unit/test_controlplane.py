"""The control plane: what it mends and what it leaves, who leads, and what an uninstall waits for."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import logging
import socket
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters.kube import pods
from architect.adapters.kube.client import Kube
from architect.adapters.kube.events import Recorder
from architect.adapters.kube.lease import Election, LostLease, Terms
from architect.adapters.kube.resources import Event, Lease, Node, Pod
from architect.contract.annotations import CPU_REQUESTS, MANAGED_CONTAINERS, MEMORY_REQUESTS
from architect.contract.kubernetes import (
    NODE_LABEL,
    REMOVAL_ANNOTATION,
    RUNNING,
    SCALED_DOWN,
    status_label,
)
from architect.decisions import podstatus, reconcile, removal
from architect.decisions.podstatus import Seen
from architect.decisions.reconcile import NodeState, Repair, Suspicion
from architect.decisions.removal import NodeView, Standing
from architect.decisions.resources import Container, PodResources, Server
from architect.processes.controlplane import main
from architect.processes.controlplane.controller import Controller
from architect.processes.controlplane.log import JsonFormatter
from architect.processes.controlplane.remove import NotRemoved, remove
from tests.unit.api_standin import Standin, standin
from tests.unit.test_informer import until

NEW = Server()
REQUESTS = {"cpu": "200m", "memory": "128Mi"}
LEAST = {"cpu": "0", "memory": "1"}
ORIGINALS = {CPU_REQUESTS: '{"app":"200m"}', MEMORY_REQUESTS: '{"app":"128Mi"}'}
MANAGED = {MANAGED_CONTAINERS: '["app"]'}


def seen(state: str, requests: dict[str, str], annotations: dict[str, str], **more: Any) -> Seen:
    """A pod of one container that shows a state."""
    found = PodResources((Container("app", requests),))
    return Seen(found, {status_label("app"): state}, {**MANAGED, **annotations}, **more)


FORGOTTEN = seen(RUNNING, LEAST, ORIGINALS)
UNLOWERED = seen(SCALED_DOWN, REQUESTS, ORIGINALS)

# -- decisions ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pod", "repair"),
    [
        (FORGOTTEN, Repair.RESTORED),
        (seen(RUNNING, REQUESTS, ORIGINALS), Repair.RESTORED),
        (UNLOWERED, Repair.LOWERED),
        (seen(SCALED_DOWN, LEAST, ORIGINALS), None),
        (seen(RUNNING, REQUESTS, {}), None),
        (seen(SCALED_DOWN, REQUESTS, {}), None),
        (replace(FORGOTTEN, ending=True), None),
    ],
    ids=["raise", "annotations left", "lower", "asleep", "awake", "nothing remembered", "ending"],
)
def test_what_architectd_left_undone_is_found(pod: Seen, repair: Repair | None) -> None:
    found = reconcile.find(pod, NodeState.SERVED, NEW)
    assert (found.repair if found else None) == repair
    assert reconcile.find(pod, NodeState.AWAY, NEW) is None


@pytest.mark.parametrize(
    ("ready", "served", "state"),
    [
        ("True", True, NodeState.SERVED),
        ("True", False, NodeState.UNSERVED),
        ("False", True, NodeState.AWAY),
        ("Unknown", False, NodeState.AWAY),
        (None, True, NodeState.AWAY),
    ],
)
def test_a_node_that_is_not_ready_is_away(
    ready: str | None, served: bool, state: NodeState
) -> None:
    assert reconcile.node_state(ready, served) is state


def test_a_label_of_what_is_no_longer_managed_goes_only_without_architectd() -> None:
    pod = seen(RUNNING, REQUESTS, {MANAGED_CONTAINERS: "[]"})
    assert reconcile.find(pod, NodeState.SERVED, NEW) is None
    found = reconcile.find(pod, NodeState.UNSERVED, NEW)
    assert found is not None
    assert found.repair is Repair.FORGOTTEN
    assert podstatus.applied(pod, found.writes[0]).labels == {}


def test_a_sleeper_keeps_its_label_whatever_the_annotations_say() -> None:
    pod = seen(SCALED_DOWN, LEAST, {**ORIGINALS, MANAGED_CONTAINERS: "[]"})
    assert reconcile.find(pod, NodeState.UNSERVED, NEW) is None


def test_an_annotation_that_cannot_be_read_removes_nothing() -> None:
    for text in ("", "{", "5", "[1]"):
        pod = seen(RUNNING, REQUESTS, {MANAGED_CONTAINERS: text})
        assert reconcile.find(pod, NodeState.UNSERVED, NEW) is None


def test_the_clock_of_a_suspicion_starts_anew_with_another_finding() -> None:
    one = reconcile.find(FORGOTTEN, NodeState.SERVED, NEW)
    other = reconcile.find(UNLOWERED, NodeState.SERVED, NEW)
    assert one is not None
    assert other is not None
    first = reconcile.suspect(one, 5.0, None)
    assert first == Suspicion(one, 5.0)
    assert reconcile.suspect(one, 9.0, first) is first
    assert reconcile.suspect(other, 9.0, first) == Suspicion(other, 9.0)
    assert reconcile.suspect(None, 9.0, first) is None


@given(
    st.sampled_from([FORGOTTEN, UNLOWERED, seen(RUNNING, REQUESTS, ORIGINALS)]),
    st.sampled_from(list(NodeState)),
)
def test_what_was_mended_is_not_found_again(pod: Seen, node: NodeState) -> None:
    found = reconcile.find(pod, node, NEW)
    for write in found.writes if found else ():
        pod = podstatus.applied(pod, write)
    assert (reconcile.find(pod, node, NEW) is None) or node is NodeState.AWAY


VIEW = NodeView("n", "requested", True, True, True, ())


@pytest.mark.parametrize(
    ("node", "standing", "text"),
    [
        (VIEW, Standing.WAKING, "has not said"),
        (replace(VIEW, asleep=("ns/p",)), Standing.WAKING, "ns/p asleep"),
        (replace(VIEW, removal="done"), Standing.DONE, None),
        (replace(VIEW, removal="done", asleep=("a/b", "a/c")), Standing.WAKING, "2 pods asleep"),
        (replace(VIEW, served=False), Standing.SILENT, "does not answer: no architectd is ready"),
        (
            replace(VIEW, ready=False, asleep=("a/b",)),
            Standing.SILENT,
            "it is not ready, and it has a/b",
        ),
        (replace(VIEW, served=False, daemon=False), Standing.NOTHING, None),
    ],
)
def test_what_an_uninstall_waits_for(node: NodeView, standing: Standing, text: str | None) -> None:
    assert removal.standing(node) is standing
    found = removal.waits_for([node])
    assert (text in found[0]) if text else found == []


# -- the controller -----------------------------------------------------------------------------------


async def node(server: Standin, name: str, ready: str = "True", **annotations: str | None) -> None:
    """A node of ours."""
    metadata = {"labels": {NODE_LABEL: "true"}, "annotations": annotations}
    conditions = [{"type": "Ready", "status": ready}]
    await server.put("nodes", name, metadata=metadata, status={"conditions": conditions})


async def daemon(server: Standin, on: str, ready: str = "True") -> None:
    """An architectd's pod."""
    await server.put(
        "pods",
        f"architectd-{on}",
        "architect",
        metadata={"labels": {"app": "architectd"}},
        spec={"nodeName": on, "containers": [{"name": "architectd"}]},
        status={"phase": "Running", "conditions": [{"type": "Ready", "status": ready}]},
    )


async def pod(server: Standin, name: str, like: Seen, on: str = "n1") -> None:
    """A managed pod that shows what is given."""
    containers = [
        {
            "name": one.name,
            "resources": {"requests": dict(one.requests), "limits": dict(one.limits)},
        }
        for one in like.resources.containers
    ]
    await server.put(
        "pods",
        name,
        "ns",
        metadata={"labels": dict(like.labels), "annotations": dict(like.annotations)},
        spec={"nodeName": on, "runtimeClassName": "runc-architect", "containers": containers},
        status={"phase": "Running"},
    )


@contextlib.asynccontextmanager
async def controlling(
    server: Standin, kube: Kube, patience_s: float = 0.05, **more: Any
) -> AsyncIterator[Controller]:
    """A running controller of a cluster that has node n1 with its architectd."""
    await node(server, "n1")
    await daemon(server, "n1")
    recorder = Recorder(kube, "architect-control-plane")
    controller = Controller(kube, "architect", recorder, patience_s=patience_s, **more)
    tasks = [asyncio.create_task(controller.run()), asyncio.create_task(recorder.run())]
    try:
        await until("synced", lambda: controller.synced)
        yield controller
        assert not tasks[0].done()
        await asyncio.wait_for(recorder.flushed(), 10)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def shown(server: Standin, name: str) -> tuple[dict[str, str], dict[str, str], dict[str, str]]:
    """Labels, annotations and requests of a pod's first container."""
    found = server.objects["pods"][f"ns/{name}"]
    requests = found["spec"]["containers"][0]["resources"]["requests"]
    return found["metadata"]["labels"], found["metadata"]["annotations"], requests


def run(test: Callable[[Standin, Kube], Any]) -> None:
    """Runs a test with a server."""

    async def whole() -> None:
        async with asyncio.timeout(30), standin() as (server, kube):
            await test(server, kube)

    asyncio.run(whole())


def test_requests_that_were_not_given_back_are_given_back_and_an_event_says_so() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with controlling(server, kube) as controller:
            await pod(server, "p", FORGOTTEN)
            await until("mended", lambda: controller.repairs == 1)
            assert shown(server, "p") == ({status_label("app"): RUNNING}, MANAGED, REQUESTS)
        (event,) = await kube.listed(Event)
        assert event.reason == "RequestsRestored"
        assert server.asked("PATCH") == 2

    run(test)


def test_requests_that_were_not_lowered_are_lowered() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "p", UNLOWERED)
        async with controlling(server, kube) as controller:
            await until("mended", lambda: controller.repairs == 1)
            assert shown(server, "p")[2] == LEAST
            assert shown(server, "p")[1] == {**MANAGED, **ORIGINALS}

    run(test)


def test_architectd_has_its_time() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with controlling(server, kube, patience_s=0.4) as controller:
            await pod(server, "p", FORGOTTEN)
            await until("looked at", lambda: controller.looks >= 2)
            await pod(server, "p", seen(RUNNING, REQUESTS, {}))
            server.objects["pods"]["ns/p"]["metadata"]["annotations"] = dict(MANAGED)
            await pod(server, "q", FORGOTTEN)
            await until("q mended", lambda: controller.repairs == 1)
            assert shown(server, "q")[2] == REQUESTS
        assert [
            one.involvedObject["name"] for one in await kube.listed(Event) if one.involvedObject
        ] == ["q"]

    run(test)


def test_pods_of_a_node_that_is_away_are_left_until_it_is_back() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n2", "Unknown")
        await pod(server, "p", FORGOTTEN, on="n2")
        await pod(server, "elsewhere", FORGOTTEN, on="n3")
        async with controlling(server, kube) as controller:
            await pod(server, "q", FORGOTTEN)
            await until("q mended", lambda: controller.repairs == 1)
            assert shown(server, "p")[2] == LEAST
            assert shown(server, "elsewhere")[2] == LEAST
            await node(server, "n2", "True")
            await until("p mended", lambda: controller.repairs == 2)
            assert shown(server, "p")[2] == REQUESTS

    run(test)


def test_the_label_of_what_is_no_longer_managed_goes_when_architectd_does() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "p", seen(RUNNING, REQUESTS, {MANAGED_CONTAINERS: "[]"}))
        async with controlling(server, kube) as controller:
            await pod(server, "q", FORGOTTEN)
            await until("q mended", lambda: controller.repairs == 1)
            assert status_label("app") in shown(server, "p")[0]
            await daemon(server, "n1", "False")
            await until("p mended", lambda: controller.repairs == 2)
            assert status_label("app") not in shown(server, "p")[0]

    run(test)


@pytest.mark.parametrize("ready", ["True", "False"])
def test_a_refusal_is_told_once_and_by_one(ready: str) -> None:
    async def test(server: Standin, kube: Kube) -> None:
        server.refuse_resize = "exceeded quota: memory"
        await pod(server, "p", FORGOTTEN)
        async with controlling(server, kube) as controller:
            await daemon(server, "n1", ready)
            await until("two tries", lambda: server.asked("PATCH") >= 2)
            assert shown(server, "p")[1] == {**MANAGED, **ORIGINALS}
            server.refuse_resize = None
            await until("mended", lambda: controller.repairs == 1)
        told = {one.reason: one.message or "" for one in await kube.listed(Event)}
        if ready == "True":
            assert list(told) == ["RequestsRestored"]
        else:
            assert sorted(told) == ["RequestsRestored", "ResizeRefused"]
            assert "exceeded quota" in told["ResizeRefused"]

    run(test)


def test_nothing_is_written_by_one_that_may_not_act() -> None:
    asked: list[bool] = []

    def may_act() -> bool:
        asked.append(True)
        return False

    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "p", FORGOTTEN)
        async with controlling(server, kube, may_act=may_act) as controller:
            await until("asked whether it may", lambda: bool(asked))
            before = controller.looks
            await pod(server, "q", seen(RUNNING, REQUESTS, {}))
            await until("another look", lambda: controller.looks > before)
        assert server.asked("PATCH") == 0

    run(test)


def test_an_unreadable_pod_harms_no_other(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "bad", seen(RUNNING, {"cpu": "much"}, ORIGINALS))
        await pod(server, "p", FORGOTTEN)
        async with controlling(server, kube) as controller:
            await until("mended", lambda: controller.repairs == 1)

    run(test)
    assert 'quantity "much"' in caplog.text


# -- settle -------------------------------------------------------------------------------------------


def test_another_pod_of_that_name_is_never_written() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "p", UNLOWERED)
        old = await kube.get(Pod, "p", "ns")
        await server.put("pods", "p", "ns", metadata={"uid": "another"})
        before = shown(server, "p")
        outcome = await pods.settle(kube, old, {"app": RUNNING}, NEW)
        assert outcome.pod is None
        assert outcome.writes == ()
        assert shown(server, "p") == before

    run(test)


def test_a_conflict_is_decided_anew() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await pod(server, "p", UNLOWERED)
        old = await kube.get(Pod, "p", "ns")
        await server.put("pods", "p", "ns", status={"phase": "Running", "podIP": "10.0.0.1"})
        outcome = await pods.settle(kube, old, {"app": RUNNING}, NEW, alone=True)
        assert outcome.pod is not None
        assert outcome.pod.status.podIP == "10.0.0.1"
        assert shown(server, "p") == ({status_label("app"): RUNNING}, MANAGED, REQUESTS)

    run(test)


# -- the lease ----------------------------------------------------------------------------------------

TERMS = Terms(duration_s=6.0, renew_deadline_s=4.0, retry_s=0.05)
"""Long, because a busy machine may stand still for a second or two: a leader that it keeps from
renewing for longer than the deadline rightly stops."""


class Contender:
    """One that leads whenever it can, and says when."""

    leaders: set[str]

    def __init__(self, kube: Kube, name: str, leaders: set[str]) -> None:
        self.name = name
        self.leaders = leaders
        self.clashed = False
        self.election = Election(kube, "it", "architect", name, TERMS)
        self.task = asyncio.create_task(self.election.lead(self._work))

    async def _work(self) -> None:
        self.clashed = bool(self.leaders)
        self.leaders.add(self.name)
        try:
            await asyncio.Event().wait()
        finally:
            self.leaders.discard(self.name)

    async def end(self) -> None:
        """As on SIGTERM."""
        self.task.cancel()
        await asyncio.gather(self.task, return_exceptions=True)


def test_one_of_three_leads_and_the_next_follows_at_once() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        leaders: set[str] = set()
        contenders = {name: Contender(kube, name, leaders) for name in "abc"}
        loop = asyncio.get_running_loop()
        for turn in range(3):
            await until("a leader", lambda: len(leaders) == 1)
            (name,) = leaders
            lease = await kube.get(Lease, "it", "architect")
            assert (lease.spec.holderIdentity, lease.spec.leaseTransitions or 0) == (name, turn)
            # It keeps it: once for longer than the lease lasts without being renewed.
            end = loop.time() + (1.2 * TERMS.duration_s if turn == 0 else 0.5)
            while loop.time() < end:
                assert leaders == {name}
                await asyncio.sleep(0.02)
            begun = loop.time()
            await contenders.pop(name).end()
            assert (await kube.get(Lease, "it", "architect")).spec.holderIdentity == ""
            if contenders:
                await until("another leader", lambda: len(leaders) == 1)
                assert loop.time() - begun < TERMS.duration_s

    run(test)


def test_of_those_that_find_the_lease_free_at_once_one_wins() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("leases", "it", "architect", spec={"holderIdentity": ""})
        leaders: set[str] = set()
        contenders = [Contender(kube, name, leaders) for name in "abcdef"]
        # All have read it before the first has written, and each has its answer when it reads again.
        await until("each to have tried", lambda: server.asked("PUT") >= len(contenders))
        await until("each to try again", lambda: server.asked("GET") >= 2 * len(contenders))
        await until("a leader", lambda: len(leaders) == 1)
        assert not any(one.clashed for one in contenders)
        for one in contenders:
            await one.end()

    run(test)


def test_a_leader_that_cannot_renew_stops_before_another_may_begin() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        leaders: set[str] = set()
        first = Contender(kube, "a", leaders)
        await until("a leader", lambda: leaders == {"a"})
        await server.stop()
        loop = asyncio.get_running_loop()
        begun = loop.time()
        with pytest.raises(LostLease):
            await first.task
        assert loop.time() - begun < TERMS.duration_s
        assert not first.election.leading
        assert leaders == set()

    run(test)


def test_times_in_the_lease_mean_nothing() -> None:
    """A holder whose clock is a year behind, or ahead, is waited for all the same, and no longer."""

    async def test(server: Standin, kube: Kube) -> None:
        for year in ("2001", "2099"):
            when = f"{year}-01-01T00:00:00.000000Z"
            spec = {"holderIdentity": "far", "renewTime": when, "leaseDurationSeconds": 1}
            await server.put("leases", "it", "architect", spec=spec)
            leaders: set[str] = set()
            loop = asyncio.get_running_loop()
            begun = loop.time()
            contender = Contender(kube, "a", leaders)
            await until("the leader", lambda leaders=leaders: leaders == {"a"})  # type: ignore[misc]
            assert 1.0 <= loop.time() - begun < TERMS.duration_s
            await contender.end()

    run(test)


def test_who_finds_somebody_else_in_the_lease_stops() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        leaders: set[str] = set()
        contender = Contender(kube, "a", leaders)
        await until("a leader", lambda: leaders == {"a"})
        spec = {"holderIdentity": "b", "renewTime": "x", "leaseDurationSeconds": 15}
        await server.put("leases", "it", "architect", spec=spec)
        with pytest.raises(LostLease, match="b has it"):
            await contender.task
        # And it does not give away what is another's.
        assert (await kube.get(Lease, "it", "architect")).spec.holderIdentity == "b"

    run(test)


# -- remove -------------------------------------------------------------------------------------------


async def obeys(server: Standin, name: str) -> None:
    """An architectd that wakes everything on its node when it is asked to, and says so."""
    while True:
        annotations = server.objects["nodes"][f"/{name}"]["metadata"].get("annotations", {})
        if annotations.get(REMOVAL_ANNOTATION) == "requested":
            for key, one in list(server.objects["pods"].items()):
                if one["spec"]["nodeName"] == name and key.startswith("ns/"):
                    metadata = one["metadata"]
                    metadata["annotations"] = dict(MANAGED)
                    metadata["labels"] = {status_label("app"): RUNNING}
                    await server.put("pods", metadata["name"], "ns")
            await server.put("nodes", name, metadata={"annotations": {REMOVAL_ANNOTATION: "done"}})
            return
        await asyncio.sleep(0.01)


ASLEEP = seen(SCALED_DOWN, LEAST, ORIGINALS)


def annotation(server: Standin, name: str) -> str | None:
    """The removal annotation of a node."""
    found: dict[str, str] = server.objects["nodes"][f"/{name}"]["metadata"].get("annotations", {})
    return found.get(REMOVAL_ANNOTATION)


def test_an_uninstall_waits_until_all_is_awake() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        for name in ("n1", "n2"):
            await node(server, name)
            await daemon(server, name)
            await pod(server, f"on-{name}", ASLEEP, on=name)
        await server.put("nodes", "stranger", status={})
        tasks = [asyncio.create_task(obeys(server, name)) for name in ("n1", "n2")]
        stop = asyncio.Event()
        await remove(kube, "architect", deadline_s=10, force_after_s=None, stop=stop)
        assert all(task.done() for task in tasks)
        # And nothing of ours stays on the nodes.
        assert {annotation(server, name) for name in ("n1", "n2", "stranger")} == {None}

    run(test)


def test_an_uninstall_fails_for_a_node_that_does_not_answer_and_lets_hibernation_go_on() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n1")
        await daemon(server, "n1")
        await node(server, "n2")
        await daemon(server, "n2", "False")
        await pod(server, "p", ASLEEP, on="n2")
        with pytest.raises(NotRemoved) as caught:
            await remove(
                kube, "architect", deadline_s=0.2, force_after_s=None, stop=asyncio.Event()
            )
        text = str(caught.value)
        assert (
            "node n2 does not answer: no architectd is ready on it, and it has ns/p asleep" in text
        )
        assert "--force-after" in text
        assert {annotation(server, name) for name in ("n1", "n2")} == {"withdrawn"}

    run(test)


def test_force_goes_on_without_those_that_do_not_answer(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n1")
        await daemon(server, "n1")
        await node(server, "n2", "Unknown")
        await pod(server, "p", ASLEEP, on="n2")
        task = asyncio.create_task(obeys(server, "n1"))
        await remove(kube, "architect", deadline_s=10, force_after_s=0.1, stop=asyncio.Event())
        await task

    with caplog.at_level("INFO"):
        run(test)
    assert "node n2 was left: it does not answer; asleep there" in caplog.text


def test_nodes_without_anything_of_ours_hold_nothing_up() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n1")
        await node(server, "n2", "Unknown")
        await remove(kube, "architect", deadline_s=1, force_after_s=None, stop=asyncio.Event())
        assert annotation(server, "n1") is None

    run(test)


def test_done_is_not_believed_while_something_sleeps() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n1", **{REMOVAL_ANNOTATION: "done"})
        await daemon(server, "n1")
        await pod(server, "p", ASLEEP)
        with pytest.raises(NotRemoved, match="node n1: ns/p asleep"):
            await remove(
                kube, "architect", deadline_s=0.1, force_after_s=None, stop=asyncio.Event()
            )

    run(test)


# -- the program --------------------------------------------------------------------------------------


def options(*words: str) -> argparse.Namespace:
    """The program's options."""
    return main._arguments(list(words))


def test_run_is_the_default_command() -> None:
    assert options().command == "run"
    assert options("--patience", "3").patience == 3
    assert options("remove", "--force-after", "5").force_after == 5
    assert (options().lease_duration, options().renew_deadline, options().retry_period) == (
        15,
        10,
        2,
    )


def test_times_of_the_lease_that_make_no_sense_are_wrong_usage() -> None:
    with pytest.raises(SystemExit) as caught:
        options("run", "--renew-deadline", "20")
    assert caught.value.code == 2


def test_the_program_leads_answers_probes_and_gives_the_lease_up() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await node(server, "n1")
        await pod(server, "p", FORGOTTEN)
        stop = asyncio.Event()
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        words = ["--host", "127.0.0.1", "--port", str(port), "--patience", "0.05"]
        task = asyncio.create_task(main.run(kube, options(*words), stop))
        await until("mended", lambda: shown(server, "p")[2] == REQUESTS)
        async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{port}", trust_env=False) as http:
            for path, status in (("/healthz", 200), ("/readyz", 200), ("/else", 404)):
                assert (await http.get(path)).status_code == status
        stop.set()
        await asyncio.wait_for(task, 10)
        lease = server.objects["leases"]["architect/architect-control-plane"]
        assert lease["spec"]["holderIdentity"] == ""
        assert [one.reason for one in await kube.listed(Event)] == ["RequestsRestored"]

    run(test)


def test_log_lines_are_json() -> None:
    record = logging.LogRecord("architect.x", logging.WARNING, "", 0, "a %s\n", ("b",), None)
    line = json.loads(JsonFormatter().format(record))
    assert (line["level"], line["logger"], line["message"]) == ("warning", "architect.x", "a b\n")
    assert line["time"].endswith("Z")


def test_nodes_have_conditions() -> None:
    assert Node().condition("Ready") is None
