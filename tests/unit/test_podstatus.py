"""Labels, annotations and resizes on a pod: order, recovery from any line, and how many writes they take."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.annotations import CPU_REQUESTS, MEMORY_REQUESTS
from architect.contract.kubernetes import RUNNING, SCALED_DOWN, status_label
from architect.decisions import podstatus
from architect.decisions.podstatus import Condition, Meta, Resize, Seen
from architect.decisions.resources import Container, PodResources, Server, is_lowered, qos
from tests.unit.test_resources import pods, servers

NEW = Server()
REQUESTS = {"cpu": "200m", "memory": "128Mi"}
DOWN = {"app": SCALED_DOWN}
UP = {"app": RUNNING}


def awake(*containers: Container) -> Seen:
    """A pod all of whose containers are labelled RUNNING; one container unless told otherwise."""
    found = containers or (Container("app", REQUESTS),)
    return Seen(PodResources(found), {status_label(one.name): RUNNING for one in found})


def settled(seen: Seen, truth: podstatus.Truth, server: Server = NEW) -> Seen:
    """The pod after all writes."""
    for write in podstatus.writes(seen, truth, server):
        seen = podstatus.applied(seen, write)
    return seen


def changed(seen: Seen, name: str, **requests: str) -> Seen:
    """The pod after somebody else has set requests of a container."""
    found = [
        replace(one, requests={**one.requests, **requests}) if one.name == name else one
        for one in seen.resources.containers
    ]
    return replace(seen, resources=PodResources(tuple(found)))


def requests(seen: Seen, name: str = "app") -> dict[str, str]:
    """A container's requests."""
    container = seen.resources.get(name)
    assert container is not None
    return dict(container.requests)


def test_hibernation_is_two_writes_annotations_first() -> None:
    first, second = podstatus.writes(awake(), DOWN, NEW)
    assert isinstance(first, Meta)
    assert first.body() == {
        "metadata": {
            "labels": {status_label("app"): SCALED_DOWN},
            "annotations": {CPU_REQUESTS: '{"app":"200m"}', MEMORY_REQUESTS: '{"app":"128Mi"}'},
        }
    }
    assert isinstance(second, Resize)
    assert second.body() == {
        "spec": {
            "containers": [{"name": "app", "resources": {"requests": {"cpu": "0", "memory": "1"}}}]
        }
    }


def test_a_wake_is_two_writes_requests_first() -> None:
    first, second = podstatus.writes(settled(awake(), DOWN), UP, NEW)
    assert isinstance(first, Resize)
    assert first.body()["spec"]["containers"][0]["resources"]["requests"] == REQUESTS
    assert isinstance(second, Meta)
    assert second.body() == {
        "metadata": {
            "labels": {status_label("app"): RUNNING},
            "annotations": {CPU_REQUESTS: None, MEMORY_REQUESTS: None},
        }
    }
    assert settled(settled(awake(), DOWN), UP) == awake()


def test_a_cycle_costs_six_writes_with_its_two_events() -> None:
    down = list(podstatus.writes(awake(), DOWN, NEW))
    up = list(podstatus.writes(settled(awake(), DOWN), UP, NEW))
    assert len(down) + len(up) + 2 <= 6


def test_a_best_effort_pod_gets_labels_only() -> None:
    (write,) = podstatus.writes(awake(Container("app")), DOWN, NEW)
    assert write == Meta({status_label("app"): SCALED_DOWN}, {})


def test_without_the_subresource_there_are_labels_only() -> None:
    (write,) = podstatus.writes(awake(), DOWN, Server(resize=False))
    assert write == Meta({status_label("app"): SCALED_DOWN}, {})


def test_a_refused_raise_does_not_hold_up_the_label_and_keeps_the_originals() -> None:
    asleep = settled(awake(), DOWN)
    write = podstatus.next_write(asleep, UP, NEW, refused=True)
    assert write == Meta({status_label("app"): RUNNING}, {})
    labelled = podstatus.applied(asleep, write)
    assert podstatus.next_write(labelled, UP, NEW, refused=True) is None
    # Tried again later, it goes on where it was.
    assert settled(labelled, UP) == awake()


def test_a_refused_lowering_is_not_tried_again_in_that_round() -> None:
    seen = podstatus.applied(awake(), next(podstatus.writes(awake(), DOWN, NEW)))
    assert podstatus.next_write(seen, DOWN, NEW, refused=True) is None
    assert settled(seen, UP) == awake()


def test_one_wakes_while_the_other_goes_to_sleep() -> None:
    both = awake(Container("a", REQUESTS), Container("b", REQUESTS))
    asleep = settled(both, {"a": SCALED_DOWN, "b": RUNNING})
    plan = list(podstatus.writes(asleep, {"a": RUNNING, "b": SCALED_DOWN}, NEW))
    assert [type(one) for one in plan] == [Resize, Meta, Resize]
    found = settled(asleep, {"a": RUNNING, "b": SCALED_DOWN})
    assert requests(found, "a") == REQUESTS
    assert requests(found, "b") == {"cpu": "0", "memory": "1"}
    assert podstatus.originals(found.annotations) == {
        "cpu": {"b": "200m"},
        "memory": {"b": "128Mi"},
    }


@pytest.mark.parametrize("truth", [UP, {"app": None}], ids=["wake", "unmanaged"])
def test_a_value_set_while_asleep_wins(truth: podstatus.Truth) -> None:
    asleep = changed(settled(awake(), DOWN), "app", cpu="300m")
    still = settled(asleep, DOWN)
    assert requests(still) == {"cpu": "300m", "memory": "1"}
    assert podstatus.originals(still.annotations) == {"cpu": {}, "memory": {"app": "128Mi"}}
    assert CPU_REQUESTS not in still.annotations
    for before in (asleep, still):
        found = settled(before, truth)
        assert requests(found) == {"cpu": "300m", "memory": "128Mi"}
        assert not podstatus.remembered(found.annotations)


def test_a_value_set_while_asleep_is_given_at_the_next_hibernation() -> None:
    asleep = changed(settled(awake(), DOWN), "app", cpu="300m")
    again = settled(settled(asleep, UP), DOWN)
    assert requests(again) == {"cpu": "0", "memory": "1"}
    assert podstatus.originals(again.annotations)["cpu"] == {"app": "300m"}


def test_a_container_that_is_no_longer_managed_loses_its_label_and_gets_its_requests() -> None:
    found = settled(settled(awake(), DOWN), {"app": None})
    assert requests(found) == REQUESTS
    assert found.labels == {}
    assert found.annotations == {}


def test_what_the_truth_does_not_name_stays() -> None:
    asleep = settled(awake(), DOWN)
    assert list(podstatus.writes(asleep, {}, NEW)) == []
    assert list(podstatus.writes(asleep, {"stranger": RUNNING}, NEW)) == []


def test_a_label_of_a_container_that_does_not_exist_can_be_removed() -> None:
    seen = replace(awake(), labels={**awake().labels, status_label("gone"): RUNNING})
    assert settled(seen, {"gone": None}) == awake()


def test_nothing_is_written_on_a_pod_that_ends() -> None:
    assert podstatus.next_write(replace(awake(), ending=True), DOWN, NEW) is None


@pytest.mark.parametrize("text", ["", "[]", "{", '{"app": 5}', '{"app": "much"}', "null"])
def test_an_annotation_that_is_none_of_ours_is_replaced(text: str) -> None:
    seen = replace(awake(), annotations={CPU_REQUESTS: text})
    assert settled(settled(seen, DOWN), UP) == awake()


def test_what_was_lowered_before_a_crash_is_not_taken_for_the_original() -> None:
    # architectd died after the raise was decided but before it was sent; the container sleeps again.
    asleep = settled(awake(), DOWN)
    relabelled = replace(asleep, labels=awake().labels)
    again = settled(relabelled, DOWN)
    assert podstatus.originals(again.annotations) == podstatus.originals(asleep.annotations)


def test_trouble_is_told_with_what_becomes_of_it() -> None:
    def told(*conditions: Condition) -> podstatus.Trouble | None:
        return podstatus.trouble(replace(awake(), conditions=conditions))

    assert told() is None
    assert told(Condition("Ready"), Condition("PodResizeInProgress")) is None
    deferred = told(Condition("PodResizePending", "Deferred", "Node didn't have enough memory"))
    assert deferred is not None
    assert deferred.reason == "Deferred"
    assert "enough memory" in deferred.message
    infeasible = told(Condition("PodResizePending", "Infeasible"))
    assert infeasible is not None
    assert infeasible.reason == "Infeasible"
    failed = told(Condition("PodResizeInProgress", "Error", "limit below usage"))
    assert failed is not None
    assert failed.reason == "Error"


# -- properties ---------------------------------------------------------------------------------------

states = st.dictionaries(st.sampled_from("abcd"), st.sampled_from([RUNNING, SCALED_DOWN]))


def start(found: PodResources) -> Seen:
    return Seen(found, {status_label(one.name): RUNNING for one in found.containers})


@given(pods(), st.lists(states, max_size=5), servers)
def test_any_history_ends_as_it_began(
    found: PodResources, history: list[dict[str, str]], server: Server
) -> None:
    seen = start(found)
    truth = {one.name: RUNNING for one in found.containers}
    for step in history:
        truth |= {name: state for name, state in step.items() if name in truth}
        seen = settled(seen, truth, server)
        assert podstatus.next_write(seen, truth, server) is None
        assert podstatus.labelled(seen.labels) == truth
        assert qos(seen.resources) is qos(found)
    assert settled(seen, dict.fromkeys(truth, RUNNING), server) == start(found)


@given(pods(), st.data(), servers)
def test_a_crash_after_any_write_loses_nothing(
    found: PodResources, data: st.DataObject, server: Server
) -> None:
    seen = start(found)
    names = [one.name for one in found.containers]
    for _ in range(4):
        truth = {name: data.draw(st.sampled_from([RUNNING, SCALED_DOWN])) for name in names}
        for write in podstatus.writes(seen, truth, server):
            if data.draw(st.booleans(), label="crash"):
                break
            seen = podstatus.applied(seen, write)
            check_nothing_is_lost(seen, found)
    assert settled(seen, dict.fromkeys(names, RUNNING), server) == start(found)


def check_nothing_is_lost(seen: Seen, original: PodResources) -> None:
    """Each request is what it was at first, or that is remembered."""
    noted = podstatus.originals(seen.annotations)
    for before, now in zip(original.containers, seen.resources.containers, strict=True):
        for resource in ("cpu", "memory"):
            quantity = before.requests.get(resource)
            assert now.requests.get(resource) == quantity or noted[resource][now.name] == quantity


@given(pods(), st.lists(states, min_size=1, max_size=3), st.data(), servers)
def test_refusals_at_any_time_lose_nothing(
    found: PodResources, history: list[dict[str, str]], data: st.DataObject, server: Server
) -> None:
    seen = start(found)
    truth: dict[str, str] = {one.name: RUNNING for one in found.containers}
    for step in [*history, dict.fromkeys(truth, RUNNING)]:
        truth |= {name: state for name, state in step.items() if name in truth}
        refused = False
        while (write := podstatus.next_write(seen, truth, server, refused)) is not None:
            if isinstance(write, Resize) and data.draw(st.booleans(), label="refused"):
                refused = True
            else:
                seen = podstatus.applied(seen, write)
            check_nothing_is_lost(seen, found)
        assert podstatus.labelled(seen.labels) == truth
    assert settled(seen, truth, server) == start(found)


@given(pods(), st.data())
def test_a_value_of_the_users_is_never_undone(found: PodResources, data: st.DataObject) -> None:
    """Neither by going on sleeping nor by the wake, unless it looks like one of ours."""
    seen = start(found)
    names = [one.name for one in found.containers]
    asleep = dict.fromkeys(names, SCALED_DOWN)
    seen = settled(seen, asleep)
    name = data.draw(st.sampled_from(names))
    container = seen.resources.get(name)
    assert container is not None
    values: dict[str, Any] = {"cpu": "77m", "memory": "77Mi"}
    ours = {one: values[one] for one in container.requests if one in values}
    if any(one in container.limits for one in ours):
        return  # with a limit, what the user may set depends on it; the cases above have it
    seen = changed(seen, name, **ours)
    for truth in (asleep, dict.fromkeys(names, RUNNING)):
        seen = settled(seen, truth)
        assert {one: requests(seen, name)[one] for one in ours} == ours
    assert not podstatus.remembered(seen.annotations)


@given(pods(), st.lists(states, max_size=4))
def test_a_lowered_request_is_always_remembered(
    found: PodResources, history: list[dict[str, str]]
) -> None:
    seen = start(found)
    for step in history:
        truth = {name: state for name, state in step.items() if found.get(name)}
        seen = settled(seen, truth)
        noted = podstatus.originals(seen.annotations)
        for before, now in zip(found.containers, seen.resources.containers, strict=True):
            for resource, quantity in now.requests.items():
                if quantity != before.requests[resource]:
                    assert is_lowered(qos(found), resource, quantity)
                    assert json.loads(json.dumps(noted))[resource][now.name]
