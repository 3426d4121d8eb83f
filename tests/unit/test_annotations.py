"""Every annotation of the contract: good values, bad values, and what is only warned about."""

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import annotations as a
from architect.contract.annotations import (
    CheckpointName,
    ContainerSettings,
    Defaults,
    Monitor,
    PodSettings,
    PortMapping,
    parse,
)
from architect.contract.durations import HOUR, SECOND
from architect.contract.errors import InvalidAnnotation

MANAGED = {a.MANAGED_CONTAINERS: '["app"]'}
MONITORED = {**MANAGED, a.NETWORK_MONITOR: '{"app":"packets"}'}


def app(annotations: dict[str, str], **more: Any) -> ContainerSettings:
    """The settings of the container "app", which must come without a warning."""
    settings = parse({**MANAGED, **annotations}, ["app"], **more)
    assert settings.warnings == ()
    return settings.container("app")


def refusal(annotations: dict[str, str], known: list[str] | None = None) -> InvalidAnnotation:
    with pytest.raises(InvalidAnnotation) as caught:
        parse({**MONITORED, **annotations}, known)
    assert len(str(caught.value).splitlines()) == 1
    assert caught.value.fix
    assert caught.value.annotation in str(caught.value)
    return caught.value


def test_the_names_are_those_of_the_contract() -> None:
    assert {name.removeprefix("architect.loopholelabs.io/") for name in a.USER_ANNOTATIONS} == {
        "managed-containers",
        "scaledown-durations",
        "initial-scaledown-delays",
        "network-monitor",
        "health-check-proxy",
        "shadow-ports",
        "ignore-activity-ports",
        "postmigration-autoscaleup-containers",
        "disable-autoscaledown-containers",
        "scaleup-timeout-containers",
        "migrate-emptydir-containers",
        "sparse-files-containers",
        "rewrite-listener-addresses-containers",
        "rewrite-established-addresses-containers",
        "managed-pod",
        "start-from-persistent-checkpoint",
    }


def test_the_promised_defaults() -> None:
    assert app({}) == ContainerSettings(
        name="app",
        managed=True,
        scaledown_ns=60 * SECOND,
        initial_delay_ns=0,
        monitor=Monitor.NONE,
        autoscaledown=True,
        ignored_ports=frozenset(),
        shadow_ports=(),
        health_ports=(),
        autoscaleup_after_migration=False,
        scaleup_timeout_ns=30 * SECOND,
        migrate_emptydir=False,
        sparse_files=(),
        rewrite_listeners=False,
        rewrite_established=False,
    )


def test_the_chart_can_set_other_defaults() -> None:
    defaults = Defaults(scaledown_ns=SECOND, scaleup_timeout_ns=0, monitor=Monitor.CONNECTIONS)
    found = app({}, defaults=defaults)
    assert (found.scaledown_ns, found.scaleup_timeout_ns) == (SECOND, 0)
    assert found.monitor is Monitor.CONNECTIONS


def test_no_annotation_of_ours_means_nothing() -> None:
    assert parse({"other.io/x": "["}, ["app"]) == PodSettings()
    assert parse({}).container("app") == ContainerSettings("app", managed=False)


def test_managed_containers_may_be_empty_or_repeat_a_name() -> None:
    assert parse({a.MANAGED_CONTAINERS: "[]"}).managed_containers == ()
    settings = parse({a.MANAGED_CONTAINERS: '["b","a","b"]'})
    assert settings.managed_containers == ("b", "a")
    assert settings.container("a").managed
    assert not settings.container("c").managed


@pytest.mark.parametrize(
    ("annotation", "value", "field", "expected"),
    [
        (a.SCALEDOWN_DURATIONS, '{"app":"1s"}', "scaledown_ns", SECOND),
        (a.SCALEDOWN_DURATIONS, '{"app":"1m30s"}', "scaledown_ns", 90 * SECOND),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"app":"90s"}', "initial_delay_ns", 90 * SECOND),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"app":"0"}', "initial_delay_ns", 0),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"app":"24h"}', "initial_delay_ns", 24 * HOUR),
        (a.NETWORK_MONITOR, '{"app":"packets"}', "monitor", Monitor.PACKETS),
        (a.NETWORK_MONITOR, '{"app":"connections"}', "monitor", Monitor.CONNECTIONS),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[1,65535]}', "ignored_ports", frozenset({1, 65535})),
        (a.DISABLE_AUTOSCALEDOWN_CONTAINERS, '["app"]', "autoscaledown", False),
        (a.POSTMIGRATION_AUTOSCALEUP_CONTAINERS, '["app"]', "autoscaleup_after_migration", True),
        (a.MIGRATE_EMPTYDIR_CONTAINERS, '["app"]', "migrate_emptydir", True),
        (a.REWRITE_LISTENER_ADDRESSES_CONTAINERS, '["app"]', "rewrite_listeners", True),
        (a.REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS, '["app"]', "rewrite_established", True),
        (a.SCALEUP_TIMEOUT_CONTAINERS, '{"app":"0s"}', "scaleup_timeout_ns", 0),
        (a.SPARSE_FILES_CONTAINERS, '{"app":["/a/b","/a/b"]}', "sparse_files", ("/a/b",)),
    ],
)
def test_good_values(annotation: str, value: str, field: str, expected: object) -> None:
    assert getattr(app({annotation: value}), field) == expected
    assert getattr(app({}), field) != expected or expected == 0


@pytest.mark.parametrize(
    ("annotation", "value", "key", "part"),
    [
        (a.MANAGED_CONTAINERS, "app", None, "not JSON"),
        (a.MANAGED_CONTAINERS, '{"app":1}', None, "not a JSON list"),
        (a.MANAGED_CONTAINERS, '["nope"]', "[0]", "no such container"),
        (a.MANAGED_CONTAINERS, "[1]", "[0]", "not the name of a container"),
        (a.MANAGED_CONTAINERS, '[""]', "[0]", "not the name of a container"),
        (a.MANAGED_CONTAINERS, '["../x"]', "[0]", "not the name of a container"),
        (a.MANAGED_CONTAINERS, "[" * 100_000, None, ""),
        (a.SCALEDOWN_DURATIONS, "[]", None, "not a JSON object"),
        (a.SCALEDOWN_DURATIONS, '{"app":"0.999s"}', "app", "below the minimum of 1s"),
        (a.SCALEDOWN_DURATIONS, '{"app":"-5s"}', "app", "negative"),
        (a.SCALEDOWN_DURATIONS, '{"app":"30"}', "app", "no unit"),
        (a.SCALEDOWN_DURATIONS, '{"app":30}', "app", "not a duration"),
        (a.SCALEDOWN_DURATIONS, '{"ap":"30s"}', "ap", "no such container"),
        (a.SCALEDOWN_DURATIONS, '{"app":"30s","app":"40s"}', None, "twice"),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"app":"-1s"}', "app", "negative"),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"app":null}', "app", "not a duration"),
        (a.NETWORK_MONITOR, '{"app":"packet"}', "app", "not a mode"),
        (a.NETWORK_MONITOR, '{"app":"none"}', "app", "not a mode"),
        (a.NETWORK_MONITOR, '{"app":true}', "app", "not a mode"),
        (a.NETWORK_MONITOR, '"packets"', None, "not a JSON object"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":9090}', "app", "not a list"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[0]}', "app[0]", "not a port"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[65536]}', "app[0]", "not a port"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[1,true]}', "app[1]", "not a port"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":["80"]}', "app[0]", "not a port"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[80.0]}', "app[0]", "not a port"),
        (a.DISABLE_AUTOSCALEDOWN_CONTAINERS, '["nope"]', "[0]", "no such container"),
        (a.POSTMIGRATION_AUTOSCALEUP_CONTAINERS, '"app"', None, "not a JSON list"),
        (a.MIGRATE_EMPTYDIR_CONTAINERS, "true", None, "not a JSON list"),
        (a.REWRITE_LISTENER_ADDRESSES_CONTAINERS, "null", None, "not a JSON list"),
        (a.REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS, "", None, "not JSON"),
        (a.SCALEUP_TIMEOUT_CONTAINERS, '{"app":"-1ns"}', "app", "negative"),
        (a.SPARSE_FILES_CONTAINERS, '{"app":"/a"}', "app", "not a list"),
        (a.SPARSE_FILES_CONTAINERS, '{"app":["a"]}', "app[0]", "not an absolute path"),
        (a.SPARSE_FILES_CONTAINERS, '{"app":["/a/../b"]}', "app[0]", "not the plain path"),
        (a.SPARSE_FILES_CONTAINERS, '{"app":["/"]}', "app[0]", "not the plain path"),
        (a.SPARSE_FILES_CONTAINERS, '{"app":["/a\\u0000"]}', "app[0]", "not an absolute path"),
        (a.SHADOW_PORTS, "[]", None, "not a JSON object"),
        (a.SHADOW_PORTS, "{}", "mappings", "not a list"),
        (a.SHADOW_PORTS, '{"mappings":[1]}', "mappings[0]", "not a JSON object"),
        (a.HEALTH_CHECK_PROXY, '{"mappings":[{"appPort":1}]}', "mappings[0]", "containerName is"),
        (a.MANAGED_POD, "yes", None, "neither true nor false"),
        (a.START_FROM_PERSISTENT_CHECKPOINT, "", None, "not the name"),
        (a.START_FROM_PERSISTENT_CHECKPOINT, "Snapshot", None, "not the name"),
        (a.START_FROM_PERSISTENT_CHECKPOINT, "a/b/c", None, "namespace"),
        (a.START_FROM_PERSISTENT_CHECKPOINT, "/c", None, "namespace"),
        (a.START_FROM_PERSISTENT_CHECKPOINT, "a/", None, "not the name"),
    ],
)
def test_bad_values(annotation: str, value: str, key: str | None, part: str) -> None:
    error = refusal({annotation: value}, ["app", "sidecar"])
    assert (error.annotation, error.key) == (annotation, key)
    assert part in error.why


@pytest.mark.parametrize("annotation", [a.SHADOW_PORTS, a.HEALTH_CHECK_PROXY])
@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"containerName": "nope"}, "mappings[0].containerName"),
        ({"containerName": 1}, "mappings[0].containerName"),
        ({"appPort": 0}, "mappings[0].appPort"),
        ({"shadowPort": 65536}, "mappings[0].shadowPort"),
        ({"shadowPort": "9080"}, "mappings[0].shadowPort"),
        ({"shadowPort": 8080}, "mappings[0].shadowPort"),
    ],
)
def test_bad_mappings(annotation: str, change: dict[str, object], key: str) -> None:
    entry = {"containerName": "app", "appPort": 8080, "shadowPort": 9080, **change}
    error = refusal({annotation: json.dumps({"mappings": [entry]})}, ["app"])
    assert (error.annotation, error.key) == (annotation, key)


def test_a_refusal_is_one_line_that_names_everything() -> None:
    error = refusal({a.SCALEDOWN_DURATIONS: '{"app":"10\\nms"}'})
    assert str(error) == (
        'annotation architect.loopholelabs.io/scaledown-durations, key "app", '
        r'value "10\x0ams": has an unknown unit (known: ns, us, µs, ms, s, m, h); '
        'write for example "90s", "1m30s" or "1.5h"'
    )


def test_a_refusal_shows_the_beginning_of_a_long_value_only() -> None:
    assert len(str(refusal({a.MANAGED_CONTAINERS: "x" * 10_000}))) < 400


def test_a_misspelt_container_is_guessed() -> None:
    assert refusal({a.MANAGED_CONTAINERS: '["appp"]'}, ["app", "db"]).fix == "did you mean app?"


def test_names_are_not_checked_where_the_containers_are_unknown() -> None:
    assert parse({a.MANAGED_CONTAINERS: '["nope"]'}).container("nope").managed


def test_a_long_initial_delay_is_clamped_with_a_warning() -> None:
    settings = parse({**MANAGED, a.INITIAL_SCALEDOWN_DELAYS: '{"app":"25h"}'})
    assert settings.container("app").initial_delay_ns == 24 * HOUR
    assert len(settings.warnings) == 1
    assert "24h" in settings.warnings[0]


def mappings(*entries: tuple[str, int, int]) -> str:
    keys = ("containerName", "appPort", "shadowPort")
    return json.dumps({"mappings": [dict(zip(keys, entry, strict=True)) for entry in entries]})


def test_mappings_reach_their_container() -> None:
    settings = parse(
        {
            **MONITORED,
            a.SHADOW_PORTS: mappings(("app", 9090, 29090)),
            a.HEALTH_CHECK_PROXY: mappings(("app", 8080, 9080)),
        }
    )
    assert settings.warnings == ()
    assert settings.container("app").shadow_ports == (PortMapping("app", 9090, 29090),)
    assert settings.container("app").health_ports == (PortMapping("app", 8080, 9080),)


def test_a_repeated_shadow_port_is_dropped_with_a_warning() -> None:
    settings = parse(
        {
            **MONITORED,
            a.SHADOW_PORTS: mappings(("app", 1, 9), ("app", 2, 9), ("app", 3, 8)),
            a.HEALTH_CHECK_PROXY: mappings(("app", 4, 8)),
        }
    )
    found = settings.container("app")
    assert [m.app_port for m in (*found.health_ports, *found.shadow_ports)] == [4, 1]
    assert len(settings.warnings) == 2
    assert all("is taken by another mapping" in warning for warning in settings.warnings)


@pytest.mark.parametrize("annotation", [a.SHADOW_PORTS, a.HEALTH_CHECK_PROXY])
@pytest.mark.parametrize(
    ("others", "missing"),
    [
        ({}, a.MANAGED_CONTAINERS),
        (MANAGED, a.NETWORK_MONITOR),
        ({a.MANAGED_CONTAINERS: '["db"]', a.NETWORK_MONITOR: '{"db":"packets"}'}, "managed"),
    ],
)
def test_mappings_need_management_and_a_monitor(
    annotation: str, others: dict[str, str], missing: str
) -> None:
    settings = parse({**others, annotation: mappings(("app", 1, 2))})
    assert len(settings.warnings) == 1
    assert annotation in settings.warnings[0]
    assert missing in settings.warnings[0]
    found = settings.container("app")
    assert not found.shadow_ports
    assert not found.health_ports


def test_a_default_monitor_is_enough_for_mappings() -> None:
    annotations = {a.SHADOW_PORTS: mappings(("app", 1, 2))}
    assert app(annotations, defaults=Defaults(monitor=Monitor.PACKETS)).shadow_ports


def test_an_unknown_member_of_a_mapping_is_warned_about() -> None:
    entry = {"containerName": "app", "appPort": 1, "shadowPort": 2, "shadowport": 3}
    settings = parse({**MONITORED, a.SHADOW_PORTS: json.dumps({"mappings": [entry]})})
    assert len(settings.warnings) == 1
    assert "mappings[0].shadowport" in settings.warnings[0]
    assert "did you mean shadowPort?" in settings.warnings[0]


@pytest.mark.parametrize(
    ("annotation", "value"),
    [
        (a.SCALEDOWN_DURATIONS, '{"sidecar":"30s"}'),
        (a.INITIAL_SCALEDOWN_DELAYS, '{"sidecar":"30s"}'),
        (a.NETWORK_MONITOR, '{"sidecar":"packets"}'),
        (a.IGNORE_ACTIVITY_PORTS, '{"sidecar":[1]}'),
        (a.DISABLE_AUTOSCALEDOWN_CONTAINERS, '["sidecar"]'),
        (a.POSTMIGRATION_AUTOSCALEUP_CONTAINERS, '["sidecar"]'),
        (a.SCALEUP_TIMEOUT_CONTAINERS, '{"sidecar":"30s"}'),
        (a.MIGRATE_EMPTYDIR_CONTAINERS, '["sidecar"]'),
        (a.SPARSE_FILES_CONTAINERS, '{"sidecar":["/a"]}'),
        (a.REWRITE_LISTENER_ADDRESSES_CONTAINERS, '["sidecar"]'),
        (a.REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS, '["sidecar"]'),
    ],
)
def test_settings_of_an_unmanaged_container_are_warned_about(annotation: str, value: str) -> None:
    settings = parse({**MANAGED, annotation: value}, ["app", "sidecar"])
    assert len(settings.warnings) == 1
    assert annotation in settings.warnings[0]
    assert '"sidecar": has no effect' in settings.warnings[0]


def test_an_unknown_annotation_of_ours_is_warned_about() -> None:
    settings = parse({a.PREFIX + "scaledown-duration": "{}", "other.io/scaledown": "{}"})
    assert len(settings.warnings) == 1
    assert "did you mean architect.loopholelabs.io/scaledown-durations?" in settings.warnings[0]


def test_what_we_write_ourselves_is_no_surprise() -> None:
    own = {a.CPU_REQUESTS: "{}", a.MEMORY_REQUESTS: "{}", a.STATUS_LABEL_PREFIX + "app": "RUNNING"}
    assert parse({**MANAGED, **own}).warnings == ()


def test_managed_pod() -> None:
    assert parse({a.MANAGED_POD: "true"}).managed_pod
    assert not parse({a.MANAGED_POD: "false"}).managed_pod


def test_start_from_persistent_checkpoint() -> None:
    key = a.START_FROM_PERSISTENT_CHECKPOINT
    assert parse({key: "snap.1"}).start_from == CheckpointName(None, "snap.1")
    assert parse({key: "prod/snap-1"}).start_from == CheckpointName("prod", "snap-1")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["app", "mappings", "appPort", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(
        st.sampled_from(a.USER_ANNOTATIONS) | st.text(max_size=8).map(lambda t: a.PREFIX + t),
        json_values.map(json.dumps) | st.text(max_size=20),
        max_size=5,
    ),
    st.none() | st.just(["app"]),
)
def test_any_annotations_are_taken_or_refused_in_one_line(
    annotations: dict[str, str], containers: list[str] | None
) -> None:
    settings, refused = PodSettings(), ""
    try:
        settings = parse(annotations, containers)
    except InvalidAnnotation as error:
        refused = str(error)
    assert all(len(line.splitlines()) == 1 for line in (*settings.warnings, refused or "-"))
    assert all(settings.container(name).managed for name in settings.managed_containers or ())


@given(
    st.dictionaries(st.sampled_from(["app", "db", "x.y_z-1"]), st.integers(1, 10**6), min_size=1),
    st.lists(st.integers(1, 65535), max_size=4),
)
def test_what_is_written_is_read(seconds: dict[str, int], ports: list[int]) -> None:
    settings = parse(
        {
            a.MANAGED_CONTAINERS: json.dumps(list(seconds)),
            a.SCALEDOWN_DURATIONS: json.dumps({name: f"{s}s" for name, s in seconds.items()}),
            a.IGNORE_ACTIVITY_PORTS: json.dumps(dict.fromkeys(seconds, ports)),
        },
        list(seconds),
    )
    assert settings.warnings == ()
    assert settings.managed_containers == tuple(seconds)
    for name, number in seconds.items():
        assert settings.container(name).scaledown_ns == number * SECOND
        assert settings.container(name).ignored_ports == frozenset(ports)
