"""Requests of hibernated containers: what may be lowered, to what, and that it comes back."""

from __future__ import annotations

from dataclasses import replace
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import quantities
from architect.contract.quantities import InvalidQuantity
from architect.decisions import resources
from architect.decisions.resources import Container, PodResources, Qos, Server

NEW = Server()
OLD = Server(lower_memory_limits=False)

# -- quantities ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("0", 0),
        ("1", 1),
        ("100m", Fraction(1, 10)),
        ("0.1", Fraction(1, 10)),
        (".5", Fraction(1, 2)),
        ("1.", 1),
        ("1e3", 1000),
        ("1E3", 1000),
        ("1E", 10**18),
        ("12e-3", Fraction(12, 1000)),
        ("64Mi", 64 * 2**20),
        ("1.5Gi", 3 * 2**29),
        ("3k", 3000),
        ("5n", Fraction(5, 10**9)),
        ("7u", Fraction(7, 10**6)),
        ("-1", -1),
        ("+2", 2),
        ("2Ei", 2**61),
    ],
)
def test_a_quantity_is_its_number(text: str, number: Any) -> None:
    assert quantities.parse(text) == number


@pytest.mark.parametrize(
    "text", ["", "m", "1 m", "1K", "1mi", "1e", "0x1", "1,5", "1m\n", "--1", "."]
)
def test_what_the_api_would_not_take_is_refused(text: str) -> None:
    with pytest.raises(InvalidQuantity, match="not a Kubernetes quantity"):
        quantities.parse(text)


def test_forms_of_one_number_are_the_same() -> None:
    assert quantities.same("1000m", "1")
    assert quantities.same("1Gi", "1024Mi")
    assert not quantities.same("1G", "1Gi")
    # The API server keeps billionths and rounds up.
    assert quantities.same("0.0000000001", "1n")
    assert quantities.nano("1e-12") == 1


# -- classes of service -------------------------------------------------------------------------------

FULL = {"cpu": "200m", "memory": "128Mi"}


def pod(*containers: Container, **more: Any) -> PodResources:
    return PodResources(containers, **more)


@pytest.mark.parametrize(
    ("containers", "class_"),
    [
        ([Container("a")], Qos.BEST_EFFORT),
        ([Container("a", {"ephemeral-storage": "1Gi"})], Qos.BEST_EFFORT),
        ([Container("a", {"cpu": "0", "memory": "0"})], Qos.BEST_EFFORT),
        ([Container("a", {"cpu": "1m"})], Qos.BURSTABLE),
        ([Container("a", {"memory": "1"})], Qos.BURSTABLE),
        ([Container("a", {}, {"cpu": "1"})], Qos.BURSTABLE),
        ([Container("a", FULL, FULL)], Qos.GUARANTEED),
        ([Container("a", FULL, {"cpu": "0.2", "memory": "131072Ki"})], Qos.GUARANTEED),
        ([Container("a", FULL, FULL), Container("b")], Qos.BURSTABLE),
        ([Container("a", FULL, FULL), Container("i", init=True)], Qos.BURSTABLE),
        ([Container("a", FULL, FULL), Container("i", FULL, FULL, init=True)], Qos.GUARANTEED),
        ([Container("a", {"cpu": "200m"}, FULL)], Qos.BURSTABLE),
        ([Container("a", {"cpu": "100m", "memory": "128Mi"}, FULL)], Qos.BURSTABLE),
    ],
)
def test_the_class_is_the_one_of_kubernetes(containers: list[Container], class_: Qos) -> None:
    assert resources.qos(pod(*containers)) is class_


def test_resources_of_the_pod_itself_decide_its_class() -> None:
    assert resources.qos(pod(Container("a"), requests=FULL, limits=FULL)) is Qos.GUARANTEED
    assert resources.qos(pod(Container("a", FULL, FULL), requests=FULL)) is Qos.BURSTABLE


# -- what is given ------------------------------------------------------------------------------------


def remembered(found: PodResources, names: list[str], server: Server = NEW) -> resources.Originals:
    """The originals of these containers, as they would be annotated."""
    kept: dict[str, dict[str, str]] = {"cpu": {}, "memory": {}}
    for name in names:
        for resource, quantity in resources.to_remember(found, name, server).items():
            kept[resource][name] = quantity
    return kept


def given_away(found: PodResources, names: list[str], server: Server = NEW) -> dict[str, Any]:
    """Requests and limits of the containers after these were hibernated."""
    after = resources.lowered(found, names, remembered(found, names, server))
    return {one.name: (dict(one.requests), dict(one.limits)) for one in after.containers}


def test_a_burstable_container_gives_all_but_a_byte_and_keeps_its_limits() -> None:
    limits = {"cpu": "1", "memory": "1Gi"}
    requests = {**FULL, "ephemeral-storage": "1Gi", "hugepages-2Mi": "4Mi"}
    found = given_away(pod(Container("a", requests, limits)), ["a"])
    assert found["a"] == (
        {"cpu": "0", "memory": "1", "ephemeral-storage": "1Gi", "hugepages-2Mi": "4Mi"},
        limits,
    )


def test_cpu_alone_stays_above_nothing_where_the_class_hangs_on_it() -> None:
    assert given_away(pod(Container("a", {"cpu": "1"})), ["a"])["a"][0] == {"cpu": "1m"}
    with_limit = pod(Container("a", {"cpu": "1"}, {"cpu": "1"}))
    assert given_away(with_limit, ["a"])["a"][0] == {"cpu": "0"}


def test_the_last_of_two_to_sleep_keeps_the_class() -> None:
    both = pod(Container("a", {"cpu": "1"}), Container("b", {"cpu": "1"}))
    first = resources.lowered(both, ["a"], remembered(both, ["a"]))
    assert first.containers[0].requests == {"cpu": "0"}
    kept = remembered(both, ["a", "b"])
    second = resources.lowered(first, ["a", "b"], kept)
    assert [one.requests for one in second.containers] == [{"cpu": "0"}, {"cpu": "1m"}]
    # And nothing changes when it is looked at again.
    assert resources.lowered(second, ["a", "b"], kept) == second


def test_a_guaranteed_container_gives_its_limits_too() -> None:
    found = given_away(pod(Container("a", FULL, FULL), Container("b", FULL, FULL)), ["a"])
    least = {"cpu": "1m", "memory": "4Mi"}
    assert found == {"a": (least, least), "b": (FULL, FULL)}


def test_before_kubernetes_1_34_a_guaranteed_pod_keeps_its_memory() -> None:
    found = given_away(pod(Container("a", FULL, FULL)), ["a"], OLD)
    least = {"cpu": "1m", "memory": "128Mi"}
    assert found == {"a": (least, least)}
    burstable = pod(Container("a", FULL, {"memory": "1Gi"}))
    assert given_away(burstable, ["a"], OLD)["a"][0] == {"cpu": "0", "memory": "1"}


@pytest.mark.parametrize(
    "one",
    [
        pod(Container("a")),
        pod(Container("a", {"cpu": "0"}, {"cpu": "1"})),
        pod(Container("a", FULL, {}, init=True)),
        pod(Container("a", FULL, {}, restarts=frozenset({"cpu", "memory"}))),
        pod(Container("a", FULL), requests=FULL),
        pod(Container("a", {"cpu": "1m", "memory": "4Mi"}, {"cpu": "1m", "memory": "4Mi"})),
        pod(Container("other", FULL)),
    ],
    ids=["nothing asked", "nothing to give", "init", "restarts", "pod level", "least", "unknown"],
)
def test_what_has_nothing_to_give_is_left_alone(one: PodResources) -> None:
    assert remembered(one, ["a"]) == {"cpu": {}, "memory": {}}
    assert resources.lowered(one, ["a"], remembered(one, ["a"])) == one


def test_a_resource_whose_resize_restarts_the_container_is_left_alone() -> None:
    found = given_away(pod(Container("a", FULL, FULL, restarts=frozenset({"memory"}))), ["a"])
    assert found["a"][0] == {"cpu": "1m", "memory": "128Mi"}


def test_without_the_subresource_nothing_is_remembered() -> None:
    assert resources.to_remember(pod(Container("a", FULL)), "a", Server(resize=False)) == {}


def test_a_sidecar_is_patched_where_it_is() -> None:
    before = pod(Container("a", FULL), Container("s", FULL, init=True, sidecar=True))
    after = resources.lowered(before, ["s"], remembered(before, ["s"]))
    assert resources.patch(before, after) == {
        "spec": {
            "initContainers": [
                {"name": "s", "resources": {"requests": {"cpu": "0", "memory": "1"}}}
            ]
        }
    }
    assert resources.patch(after, after) is None


def test_a_request_comes_back_no_higher_than_a_limit_set_meanwhile() -> None:
    before = pod(Container("a", {"cpu": "500m"}, {"cpu": "1"}))
    kept = remembered(before, ["a"])
    down = resources.lowered(before, ["a"], kept)
    limited = pod(replace(down.containers[0], limits={"cpu": "100m"}))
    assert resources.raised(limited, ["a"], kept).containers[0].requests == {"cpu": "100m"}


def test_a_value_that_somebody_else_set_stays() -> None:
    before = pod(Container("a", FULL))
    kept = remembered(before, ["a"])
    changed = pod(Container("a", {"cpu": "300m", "memory": "1"}))
    assert resources.belongs_to_user(changed, "a", "cpu", "200m")
    assert not resources.belongs_to_user(changed, "a", "memory", "128Mi")
    assert resources.raised(changed, ["a"], kept).containers[0].requests == {
        "cpu": "300m",
        "memory": "128Mi",
    }
    assert resources.lowered(changed, ["a"], kept) == changed


# -- properties ---------------------------------------------------------------------------------------

_cpu = st.sampled_from(["0", "1m", "10m", "0.5", "1", "1500m", "2"])
_memory = st.sampled_from(["0", "1", "4Mi", "4096Ki", "64Mi", "128Mi", "1Gi", "1e9"])
_other = st.dictionaries(st.sampled_from(["ephemeral-storage", "hugepages-2Mi"]), st.just("2Mi"))


@st.composite
def containers(draw: st.DrawFn, name: str) -> Container:
    """A container that the API server would take: no request above its limit."""
    requests: dict[str, str] = draw(_other)
    limits: dict[str, str] = draw(_other)
    for resource, values in (("cpu", _cpu), ("memory", _memory)):
        both = sorted((draw(values), draw(values)), key=quantities.parse)
        shape = draw(st.sampled_from(["none", "request", "limit", "both", "same", "same"]))
        if shape in ("request", "both"):
            requests[resource] = both[0]
        if shape in ("limit", "both", "same"):
            limits[resource] = both[1]
        if shape in ("limit", "same"):
            # The API server sets a request that is missing to the limit.
            requests[resource] = both[1]
    init = draw(st.booleans()) and draw(st.booleans())
    return Container(
        name,
        requests,
        limits,
        init=init,
        sidecar=init and draw(st.booleans()),
        restarts=draw(st.sampled_from([frozenset(), frozenset(), frozenset({"cpu"})])),
    )


@st.composite
def pods(draw: st.DrawFn) -> PodResources:
    """A pod of one to four containers; some are Guaranteed."""
    names = ["a", "b", "c", "d"][: draw(st.integers(1, 4))]
    if draw(st.booleans()):
        drawn = []
        for name in names:
            same = {"cpu": draw(_cpu.filter(lambda one: one != "0"))}
            same["memory"] = draw(_memory.filter(lambda one: one != "0"))
            drawn.append(Container(name, same, dict(same)))
    else:
        drawn = [draw(containers(name)) for name in names]
    return PodResources(tuple(drawn))


some_names = st.lists(st.sampled_from("abcd"), unique=True)
servers = st.builds(Server, resize=st.booleans(), lower_memory_limits=st.booleans())


@given(pods(), some_names, servers)
def test_the_class_never_changes_and_all_comes_back(
    before: PodResources, asleep: list[str], server: Server
) -> None:
    kept = remembered(before, asleep, server)
    down = resources.lowered(before, asleep, kept)
    assert resources.qos(down) is resources.qos(before)
    assert resources.raised(down, asleep, kept) == before


@given(pods(), some_names, servers)
def test_lowering_twice_is_lowering_once(
    before: PodResources, asleep: list[str], server: Server
) -> None:
    kept = remembered(before, asleep, server)
    down = resources.lowered(before, asleep, kept)
    assert resources.lowered(down, asleep, kept) == down


@given(pods(), some_names, servers)
def test_others_and_other_resources_are_never_touched(
    before: PodResources, asleep: list[str], server: Server
) -> None:
    down = resources.lowered(before, asleep, remembered(before, asleep, server))
    for old, new in zip(before.containers, down.containers, strict=True):
        if old.name not in asleep or (old.init and not old.sidecar) or not server.resize:
            assert new == old
        for name in ("ephemeral-storage", "hugepages-2Mi", *old.restarts):
            assert new.requests.get(name) == old.requests.get(name)
            assert new.limits.get(name) == old.limits.get(name)
        # The API takes no resource away and no new one, and no request above its limit.
        assert old.requests.keys() == new.requests.keys()
        assert old.limits.keys() == new.limits.keys()
        for name, limit in new.limits.items():
            if name in new.requests and name in ("cpu", "memory"):
                assert quantities.parse(new.requests[name]) <= quantities.parse(limit)


@given(pods(), some_names, servers)
def test_a_memory_limit_goes_down_only_where_that_is_allowed(
    before: PodResources, asleep: list[str], server: Server
) -> None:
    down = resources.lowered(before, asleep, remembered(before, asleep, server))
    for old, new in zip(before.containers, down.containers, strict=True):
        if not server.lower_memory_limits or resources.qos(before) is not Qos.GUARANTEED:
            assert old.limits.get("memory") == new.limits.get("memory")


@given(pods(), some_names)
def test_no_memory_request_becomes_zero(before: PodResources, asleep: list[str]) -> None:
    down = resources.lowered(before, asleep, remembered(before, asleep))
    for old, new in zip(before.containers, down.containers, strict=True):
        if new.requests != old.requests and "memory" in new.requests:
            assert new.requests["memory"] != "0" or old.requests["memory"] == "0"
