"""Shadow ports, the probes' sidecar and the exec probes' commands: what a new pod gets, and is told."""

import copy
import json
import re
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import annotations as a
from architect.contract import paths, quantities
from architect.contract.annotations import Defaults, Monitor
from architect.contract.kubernetes import PROXY_CONTAINER
from architect.decisions import resources
from architect.decisions.podreview import (
    CREATE,
    UNTOUCHED,
    UPDATE,
    Policy,
    Request,
    Review,
    complete_pod,
    review_pod,
    review_workload,
)
from architect.decisions.podtraffic import Proxy, exec_probes
from architect.decisions.resources import PodResources, Qos
from tests.unit.json_patch import applied

DAEMON = "system:serviceaccount:architect:architectd"
POLICY = Policy(
    trusted=frozenset({DAEMON}), proxy=Proxy("localhost/architect:1", pull_policy="Never")
)
PROGRAM = "/usr/local/lib/architect/libexec/health-check-proxy"
PORT_NAME = re.compile(r"(?!.*--)(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
"""IANA_SVC_NAME, which the API server asks of a port's name (IsValidPortName)."""
Json = dict[str, Any]


def mappings(*entries: tuple[str, int, int]) -> str:
    """The annotation's value for (container, appPort, shadowPort)."""
    members = ("containerName", "appPort", "shadowPort")
    return json.dumps({"mappings": [dict(zip(members, one, strict=True)) for one in entries]})


def http(port: int | str, **more: Any) -> Json:
    return {"httpGet": {"port": port, **more}}


def container(name: str = "app", *declared: int, **more: Any) -> Json:
    """A container as the API server sends it, its ports TCP."""
    made: Json = {"name": name, "image": "app:1", **more}
    if declared:
        made["ports"] = [{"containerPort": port, "protocol": "TCP"} for port in declared]
    return made


def pod(
    *containers: Json,
    health: str | None = None,
    shadow: str | None = None,
    managed: str = '["app"]',
    monitor: str | None = '{"app":"packets"}',
    **spec: Any,
) -> Json:
    given = {
        a.MANAGED_CONTAINERS: managed,
        a.NETWORK_MONITOR: monitor,
        a.HEALTH_CHECK_PROXY: health,
        a.SHADOW_PORTS: shadow,
    }
    annotations = {key: value for key, value in given.items() if value is not None}
    fields = {
        "runtimeClassName": "runc-architect",
        "containers": list(containers) or [container("app", 8080)],
        **spec,
    }
    return {"kind": "Pod", "metadata": {"name": "p", "annotations": annotations}, "spec": fields}


def completed(made: Json, policy: Policy = POLICY) -> Json:
    """The pod as it is stored; a second look at it changes nothing."""
    before = copy.deepcopy(made)
    review = complete_pod(Request(CREATE, made), policy)
    assert made == before
    after: Json = applied(made, review.patch)
    assert complete_pod(Request(CREATE, after), policy) == UNTOUCHED
    return after


def create(made: Json, policy: Policy = POLICY) -> Review:
    return review_pod(Request(CREATE, made, namespace="shop", username="jane"), policy)


def update(old: Json, new: Json, user: str = "jane") -> Review:
    return review_pod(Request(UPDATE, new, old, "shop", user), POLICY)


def told(made: Json, policy: Policy = POLICY) -> str:
    """What is said of the pod once it is completed; it is allowed."""
    review = create(completed(made, policy), policy)
    assert review.allowed, review.message
    return "\n".join(review.warnings)


def refusal(review: Review) -> str:
    assert not review.allowed
    assert len(review.message.splitlines()) == 1
    return review.message


def own(made: Json) -> list[Json]:
    """The containers of the sidecar's name."""
    spec = made["spec"]
    every = [*spec.get("initContainers", []), *spec["containers"]]
    return [one for one in every if one["name"] == PROXY_CONTAINER]


def declared(made: Json, name: str = "app") -> list[tuple[str | None, str, int]]:
    (found,) = (one for one in made["spec"]["containers"] if one["name"] == name)
    ports = found.get("ports", [])
    return [(one.get("name"), one["protocol"], one["containerPort"]) for one in ports]


# Shadow ports.


def test_a_shadow_port_is_declared_under_a_name_of_its_own() -> None:
    made = completed(pod(shadow=mappings(("app", 8080, 29090))))
    assert declared(made) == [(None, "TCP", 8080), ("shadow-29090", "TCP", 29090)]
    assert own(made) == []


def test_a_shadow_of_udp_is_declared_for_both() -> None:
    dns = container(ports=[{"containerPort": 53, "protocol": "UDP"}])
    made = completed(pod(dns, shadow=mappings(("app", 53, 65535))))
    assert declared(made)[1:] == [
        ("shadow-65535", "TCP", 65535),
        ("shadow-65535-u", "UDP", 65535),
    ]


def test_the_shadow_of_a_shadow_is_no_shadow_of_udp() -> None:
    dns = container(ports=[{"containerPort": 3, "protocol": "UDP"}])
    made = completed(pod(dns, shadow=mappings(("app", 2, 1), ("app", 3, 2))))
    found = [(protocol, number) for _, protocol, number in declared(made)]
    assert found == [("UDP", 3), ("TCP", 1), ("TCP", 2), ("UDP", 2)]


def test_a_port_that_the_user_has_declared_keeps_its_name() -> None:
    metrics = {"name": "metrics", "containerPort": 29090, "protocol": "TCP"}
    made = pod(container(ports=[metrics]), shadow=mappings(("app", 8080, 29090)))
    assert declared(completed(made)) == [("metrics", "TCP", 29090)]


def test_a_name_that_is_taken_is_left_to_its_owner() -> None:
    other = {"name": "shadow-29090", "containerPort": 1, "protocol": "TCP"}
    made = pod(container(), container("b", ports=[other]), shadow=mappings(("app", 80, 29090)))
    assert declared(completed(made)) == [(None, "TCP", 29090)]


@pytest.mark.parametrize(
    ("made", "why"),
    [
        (pod(managed='["b"]', monitor='{"b":"packets"}'), 'needs "app" in'),
        (pod(monitor=None), 'needs "app" in'),
        (pod(monitor='{"b":"packets"}'), 'needs "app" in'),
    ],
)
@pytest.mark.parametrize("annotation", [a.SHADOW_PORTS, a.HEALTH_CHECK_PROXY])
def test_what_needs_more_annotations_is_not_done_and_said(
    made: Json, why: str, annotation: str
) -> None:
    made = copy.deepcopy(made)
    made["spec"]["containers"].append(container("b", 81))
    made["metadata"]["annotations"][annotation] = mappings(("app", 8080, 9080))
    after = completed(made)
    assert declared(after) == [(None, "TCP", 8080)]
    assert own(after) == []
    assert f"annotation {annotation}, mappings[0]: not injected, {why}" in told(made)


def test_a_default_monitor_is_a_monitor() -> None:
    policy = Policy(defaults=Defaults(monitor=Monitor.CONNECTIONS), proxy=POLICY.proxy)
    made = pod(monitor=None, health=mappings(("app", 8080, 9080)))
    assert own(completed(made, policy))
    assert not own(completed(made))


def test_one_shadow_port_has_one_owner() -> None:
    made = pod(
        health=mappings(("app", 8080, 9080), ("app", 81, 9080)),
        shadow=mappings(("app", 8080, 9080)),
    )
    after = completed(made)
    assert declared(after)[1:] == [("probe-9080", "TCP", 9080)]
    assert own(after)[0]["args"] == ["--map", "app:9080:8080"]
    assert told(made).count("is taken by another mapping") == 2


@pytest.mark.parametrize(
    "text", ["x", "[]", '{"mappings":[{"containerName":"app","appPort":0,"shadowPort":1}]}']
)
def test_a_bad_mapping_is_refused_and_nothing_is_added(text: str) -> None:
    for key in ("shadow", "health"):
        made = pod(**{key: text})
        assert completed(made)["spec"]["containers"][0].get("ports") == [
            {"containerPort": 8080, "protocol": "TCP"}
        ]
        assert refusal(create(completed(made))).startswith("annotation architect.loopholelabs.io/")


# The sidecar.


def test_the_sidecar_is_the_first_to_start_and_runs_as_long_as_the_pod() -> None:
    setup = container("setup")
    two = {"managed": '["app","db"]', "monitor": '{"app":"packets","db":"connections"}'}
    health = mappings(("app", 8080, 9080), ("db", 5432, 9432))
    made = pod(
        container("app", 8080),
        container("db", 5432),
        health=health,
        initContainers=[setup, container("mesh", restartPolicy="Always")],
        **two,
    )
    after = completed(made)
    sidecar, *others = after["spec"]["initContainers"]
    assert others[0] == setup
    assert [one["name"] for one in others] == ["setup", "mesh"]
    assert sidecar == {
        "name": "architect-health-check-proxy",
        "image": "localhost/architect:1",
        "imagePullPolicy": "Never",
        "restartPolicy": "Always",
        "command": [PROGRAM],
        "args": ["--map", "app:9080:8080", "--map", "db:9432:5432"],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsGroup": 65532,
            "runAsNonRoot": True,
            "runAsUser": 65532,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    assert paths.PROXY_PROGRAM.as_posix() == PROGRAM
    # Once each, or every pod would be warned of a duplicate port definition.
    assert declared(after)[1:] == [("probe-9080", "TCP", 9080)]
    assert declared(after, "db")[1:] == [("probe-9432", "TCP", 9432)]


def test_without_init_containers_there_is_one() -> None:
    some: list[Json] = [{}, {"initContainers": []}, {"initContainers": None}]
    for there in some:
        after = completed(pod(health=mappings(("app", 8080, 9080)), **there))
        assert [one["name"] for one in after["spec"]["initContainers"]] == [PROXY_CONTAINER]


def test_what_others_have_made_of_the_sidecar_stays() -> None:
    made = completed(pod(health=mappings(("app", 8080, 9080))))
    sidecar = made["spec"]["initContainers"][0]
    sidecar |= {"image": "mirror/architect:1", "volumeMounts": [{"name": "token"}]}
    made["spec"]["initContainers"].insert(0, container("mesh-init"))
    assert completed(made) == made
    assert create(made).allowed


def test_a_pod_made_from_another_ones_manifest_gets_its_own_mappings() -> None:
    made = completed(pod(health=mappings(("app", 8080, 9080))))
    made["metadata"]["annotations"][a.HEALTH_CHECK_PROXY] = mappings(("app", 8080, 9999))
    (sidecar,) = own(completed(made))
    assert sidecar["args"] == ["--map", "app:9999:8080"]
    del made["metadata"]["annotations"][a.HEALTH_CHECK_PROXY]
    assert own(completed(made)) == []


def test_without_the_image_there_is_no_sidecar_and_a_warning() -> None:
    made, policy = pod(health=mappings(("app", 8080, 9080))), Policy()
    assert own(completed(made, policy)) == []
    assert "architect-manager was started without --image" in told(made, policy)


@pytest.mark.parametrize(
    ("place", "more"),
    [
        ("containers", {}),
        ("containers", {"command": ["sleep"]}),
        ("initContainers", {"restartPolicy": "Always"}),
        ("initContainers", {"command": [PROGRAM]}),
    ],
)
@pytest.mark.parametrize("health", [None, mappings(("app", 8080, 9080))])
def test_the_sidecars_name_is_ours(place: str, more: Json, health: str | None) -> None:
    made = pod(health=health)
    made["spec"].setdefault(place, []).append(container(PROXY_CONTAINER, **more))
    assert len(own(completed(made))) == 1
    message = refusal(create(completed(made)))
    assert message.startswith(f"field spec.{place}[")
    assert 'name, value "architect-health-check-proxy": it is the name of the sidecar' in message
    assert message.endswith("; give the container another name")
    made["spec"]["runtimeClassName"] = "runsc-architect"
    assert create(made).allowed


@pytest.mark.parametrize("health", [None, mappings(("app", 8080, 9080))])
def test_the_sidecar_is_never_managed(health: str | None) -> None:
    made = pod(health=health, managed='["app","architect-health-check-proxy"]')
    message = refusal(create(completed(made)))
    assert message.startswith(f'annotation {a.MANAGED_CONTAINERS}, key "[1]"')
    assert "is Architect's own sidecar" in message
    assert "take it out" in message
    live = completed(pod(health=health))
    listed = copy.deepcopy(live)
    listed["metadata"]["annotations"][a.MANAGED_CONTAINERS] = f'["{PROXY_CONTAINER}"]'
    assert "is Architect's own sidecar" in refusal(update(live, listed))


def test_mappings_of_a_live_pod_are_not_its_sidecars() -> None:
    live = completed(
        pod(container("app", 8080, readinessProbe=http(9080)), health=mappings(("app", 8080, 9080)))
    )
    changed = copy.deepcopy(live)
    changed["metadata"]["annotations"][a.HEALTH_CHECK_PROXY] = mappings(("app", 8080, 9081))
    review = update(live, changed)
    assert review.allowed
    assert any("the sidecar of a live pod cannot be changed" in one for one in review.warnings)
    other = copy.deepcopy(live)
    other["metadata"]["annotations"][a.SCALEDOWN_DURATIONS] = '{"app":"5s"}'
    assert update(live, other) == UNTOUCHED


# Its resources.


def asking(requests: Json | None = None, limits: Json | None = None) -> Json:
    found = {"requests": requests, "limits": limits}
    return {"resources": {kind: value for kind, value in found.items() if value}}


BOTH = {"cpu": "1", "memory": "1Gi"}


@pytest.mark.parametrize(
    ("others", "wanted"),
    [
        ([{}], None),
        ([asking(BOTH)], {"requests": {"cpu": "1m", "memory": "4Mi"}}),
        ([asking({"cpu": "1"}), {}], {"requests": {"cpu": "1m"}}),
        (
            [asking(BOTH, BOTH)],
            {
                "requests": {"cpu": "20m", "memory": "16Mi"},
                "limits": {"cpu": "20m", "memory": "16Mi"},
            },
        ),
        (
            [asking({"cpu": "1m", "memory": "1Gi"}, BOTH)],
            {
                "requests": {"cpu": "1m", "memory": "4Mi"},
                "limits": {"cpu": "20m", "memory": "16Mi"},
            },
        ),
        (
            [asking(limits={"memory": "1Gi"}), asking({"cpu": "1"}, {"memory": "1Gi"})],
            {"requests": {"cpu": "1m", "memory": "4Mi"}, "limits": {"memory": "16Mi"}},
        ),
        ([asking(BOTH, BOTH), asking(BOTH)], {"requests": {"cpu": "1m", "memory": "4Mi"}}),
        ([asking({"cpu": "0"}, {"cpu": "0"})], {"requests": {"cpu": "0"}, "limits": {"cpu": "0"}}),
        ([asking({"ephemeral-storage": "1Gi"})], None),
    ],
)
def test_the_sidecar_asks_for_what_the_others_ask_for(
    others: list[Json], wanted: Json | None
) -> None:
    made = pod(
        *(container(name, 8080, **one) for name, one in zip(("app", "b"), others, strict=False)),
        health=mappings(("app", 8080, 9080)),
    )
    assert own(completed(made))[0].get("resources") == wanted


def test_parts_of_a_pods_own_resources_are_not_asked_for() -> None:
    made = pod(container("app", 8080, **asking(BOTH, BOTH)), health=mappings(("app", 8080, 9080)))
    made["spec"]["resources"] = {"requests": BOTH, "limits": BOTH}
    assert "resources" not in own(completed(made))[0]


QUANTITIES = st.sampled_from(["0", "1m", "1", "2", "1Gi"])
RESOURCES = st.dictionaries(st.sampled_from(["cpu", "memory", "ephemeral-storage"]), QUANTITIES)


@st.composite
def asked(draw: st.DrawFn) -> Json:
    """Resources as the API server stores them: a limit without a request is both."""
    limits = draw(RESOURCES)
    chosen = draw(st.one_of(st.just({}), st.just(limits), RESOURCES))
    return {"requests": {**limits, **chosen}, "limits": limits}


def quality(made: Json) -> Qos:
    spec = made["spec"]
    parts = [
        resources.Container(
            one["name"],
            one.get("resources", {}).get("requests", {}),
            one.get("resources", {}).get("limits", {}),
        )
        for one in [*spec.get("initContainers", []), *spec["containers"]]
    ]
    return resources.qos(PodResources(tuple(parts)))


@given(st.lists(asked(), min_size=1, max_size=3), st.lists(asked(), max_size=2))
def test_the_class_of_service_stays_and_so_does_the_quota(
    running: list[Json], ending: list[Json]
) -> None:
    names = ("app", "b", "c")
    made = pod(
        *(container(n, resources=r) for n, r in zip(names, running, strict=False)),
        health=mappings(("app", 8080, 9080)),
        initContainers=[container(f"i{i}", resources=r) for i, r in enumerate(ending)],
    )
    after = completed(made)
    assert quality(after) is quality(made)
    mine = own(after)[0].get("resources", {})
    for kind in ("requests", "limits"):
        for name in ("cpu", "memory"):
            # What a ResourceQuota could ask of every container.
            if all(name in one[kind] for one in (*running, *ending)):
                assert name in mine.get(kind, {})
    for name, most in mine.get("limits", {}).items():
        assert quantities.nano(mine["requests"][name]) <= quantities.nano(most)


# Probes.


def test_probes_on_the_shadow_port_are_as_they_should_be() -> None:
    for probe in (http(9080), http("probe-9080"), {"tcpSocket": {"port": 9080}}, http("9080")):
        app = container("app", 8080, readinessProbe=probe, livenessProbe={"grpc": {"port": 9080}})
        assert told(pod(app, health=mappings(("app", 8080, 9080)))) == ""


@pytest.mark.parametrize(
    ("probes", "words"),
    [
        ({"readinessProbe": http(8080)}, "readinessProbe (httpGet) uses port 8080, which is act"),
        ({"livenessProbe": http("web")}, "livenessProbe (httpGet) uses port 8080, which is activ"),
        ({"livenessProbe": {"tcpSocket": {"port": 8080}}}, "livenessProbe (tcpSocket)"),
        ({"readinessProbe": {"grpc": {"port": 8080}}}, "readinessProbe (grpc)"),
        (
            {"livenessProbe": http(1)},
            "uses port 1, which nobody answers while it is hibernated: the k",
        ),
        ({"readinessProbe": http(1)}, "the pod is not Ready then"),
        ({"livenessProbe": http(7000)}, "uses port 7000, which nobody answers"),
        ({"livenessProbe": http(9999)}, "uses port 9999, which nobody answers"),
    ],
)
def test_a_probe_that_wakes_or_fails_is_said(probes: Json, words: str) -> None:
    ports = [
        {"name": "web", "containerPort": 8080, "protocol": "TCP"},
        {"containerPort": 7000, "protocol": "TCP"},
    ]
    made = pod(container(ports=ports, **probes), shadow=mappings(("app", 8080, 9999)))
    made["metadata"]["annotations"][a.IGNORE_ACTIVITY_PORTS] = '{"app":[7000]}'
    said = told(made)
    assert words in said
    assert f"give that port a shadowPort in {a.HEALTH_CHECK_PROXY}" in said
    assert len(said.splitlines()) == 1
    made["metadata"]["annotations"][a.DISABLE_AUTOSCALEDOWN_CONTAINERS] = '["app"]'
    assert told(made) == ""


@pytest.mark.parametrize(
    "probes",
    [
        {"startupProbe": http(8080)},
        {"livenessProbe": http(8080, host="10.0.0.1")},
        {"livenessProbe": {"exec": {"command": ["true"]}}},
        {"livenessProbe": http("nowhere")},
    ],
)
def test_a_probe_that_does_neither_is_not(probes: Json) -> None:
    assert told(pod(container("app", 8080, **probes))) == ""


def test_mappings_that_can_not_work_are_said() -> None:
    def said(shadow_port: int, *others: Json) -> str:
        app = container("app", 8080, livenessProbe=http(shadow_port))
        return told(pod(app, *others, health=mappings(("app", 8080, shadow_port))))

    assert said(9080) == ""
    assert "no privilege to listen on a port below 1024" in said(81)
    assert 'shadowPort 9080 of container "app" is declared by container "b"' in said(
        9080, container("b", 9080)
    )
    chain = told(pod(container("app", 1, 2), shadow=mappings(("app", 1, 2), ("app", 2, 3))))
    assert 'shadowPort 2 of container "app" is the appPort of another mapping' in chain
    unused = told(pod(health=mappings(("app", 8080, 9080))))
    assert "shadowPort 9080: no probe uses it; write port: 9080 in the probes of" in unused


def test_shadow_ports_are_no_ports_that_wake() -> None:
    made = pod(container(), shadow=mappings(("app", 8080, 29090)))
    assert 'container "app" declares no ports, so no traffic wakes it' in told(made)
    made = pod(
        container(ports=[{"containerPort": 53, "protocol": "UDP"}]),
        monitor='{"app":"connections"}',
        shadow=mappings(("app", 53, 29090)),
    )
    assert "declares no TCP port, so no connection wakes it" in told(made)


# The commands of exec probes.


def probing(*argv: str, **more: Any) -> Json:
    return {"exec": {"command": list(argv)}, **more}


def written(made: Json) -> str | None:
    found = made["metadata"]["annotations"].get(a.EXEC_PROBES)
    assert found is None or isinstance(found, str)
    return found


def test_exec_probes_are_written_once_each() -> None:
    db = container(
        "db",
        startupProbe=probing("pg_isready"),
        readinessProbe=probing("pg_isready"),
        livenessProbe=probing("sh", "-c", "psql -c 'select 1'"),
    )
    side = container("side", restartPolicy="Always", livenessProbe=probing("true"))
    ends = container("setup", livenessProbe=probing("false"))
    made = completed(pod(container(), db, initContainers=[ends, side]))
    assert json.loads(written(made) or "") == {
        "side": [["true"]],
        "db": [["pg_isready"], ["sh", "-c", "psql -c 'select 1'"]],
    }


@pytest.mark.parametrize(
    ("word", "run"),
    [
        ("$(USER)", "jane"),
        ("-U$(USER) -d$(DB)", "-Ujane -d$(DB)"),
        ("$$(USER)", "$(USER)"),
        ("$$$(USER)", "$jane"),
        ("$USER ${USER} $", "$USER ${USER} $"),
        ("$(USER", "$(USER"),
        ("$(SECRET)", ""),
        ("kill $$", "kill $"),
        ("$(A$(USER))", "$(A$(USER))"),
    ],
)
def test_exec_probes_are_written_as_the_kubelet_runs_them(word: str, run: str) -> None:
    env = [{"name": "USER", "value": "jane"}, {"name": "SECRET", "valueFrom": {}}]
    made = pod(container(env=env, livenessProbe=probing("sh", word)))
    assert exec_probes(made) == {"app": [["sh", run]]}


def test_exec_probes_of_a_new_pod_are_ours_alone() -> None:
    made = pod(container("app", 80, livenessProbe=probing("true")))
    right = written(completed(made))
    for theirs in ('{"app":[["sh"]]}', "x", right):
        assert theirs is not None
        made["metadata"]["annotations"][a.EXEC_PROBES] = theirs
        review = complete_pod(Request(CREATE, made), POLICY)
        assert written(completed(made)) == right
        assert bool(review.warnings) is (theirs != right)
        assert create(completed(made)) == UNTOUCHED
    none = pod()
    none["metadata"]["annotations"][a.EXEC_PROBES] = "{}"
    assert written(completed(none)) is None
    bare: Json = {
        "metadata": {},
        "spec": pod(container("app", 80, livenessProbe=probing("true")))["spec"],
    }
    assert written(completed(bare)) == right


@pytest.mark.parametrize("value", ['{"app":[["sh"]]}', None])
def test_exec_probes_of_a_live_pod_stay(value: str | None) -> None:
    live = completed(pod(container("app", 80, livenessProbe=probing("true"))))
    forged = copy.deepcopy(live)
    del forged["metadata"]["annotations"][a.EXEC_PROBES]
    if value is not None:
        forged["metadata"]["annotations"][a.EXEC_PROBES] = value
    review = update(live, forged)
    assert review.forbidden
    assert f'annotation "{a.EXEC_PROBES}"' in refusal(review)
    assert update(live, forged, DAEMON).allowed
    assert update(forged, live, "jane").forbidden


def test_a_template_is_told_that_exec_probes_are_ours() -> None:
    template = pod(container("app", 80, livenessProbe=probing("true")))
    made = {"kind": "Deployment", "metadata": {}, "spec": {"template": template}}
    assert review_workload(Request(CREATE, made), POLICY) == UNTOUCHED
    template["metadata"]["annotations"][a.EXEC_PROBES] = "{}"
    (said,) = review_workload(Request(CREATE, made), POLICY).warnings
    assert (
        said
        == f"annotation {a.EXEC_PROBES}: replaced, it is written by Architect alone; leave it out"
    )


# Whatever comes.

NAMES = ("app", "db")
PORTS = st.integers(min_value=1, max_value=12)
ENTRIES = st.lists(st.tuples(st.sampled_from(NAMES), PORTS, PORTS), max_size=4)
DECLARED = st.lists(
    st.fixed_dictionaries(
        {"containerPort": PORTS, "protocol": st.sampled_from(["TCP", "UDP", "SCTP"])}
    ),
    max_size=4,
    unique_by=lambda one: (one["containerPort"], one["protocol"]),
)
LISTS = st.lists(st.sampled_from(NAMES), unique=True).map(json.dumps)
MONITORS = st.dictionaries(st.sampled_from(NAMES), st.sampled_from(["packets", "connections"]))


@given(
    st.tuples(DECLARED, DECLARED), ENTRIES, ENTRIES, LISTS, MONITORS, st.booleans(), st.booleans()
)
def test_each_mapping_that_can_be_is_done_and_the_rest_is_untouched(
    there: tuple[list[Json], list[Json]],
    health: list[tuple[str, int, int]],
    shadow: list[tuple[str, int, int]],
    managed: str,
    monitors: dict[str, str],
    init: bool,
    known: bool,
) -> None:
    made = pod(
        *(container(name, ports=ports) for name, ports in zip(NAMES, there, strict=True)),
        health=mappings(*(one for one in health if one[1] != one[2])),
        shadow=mappings(*(one for one in shadow if one[1] != one[2])),
        managed=managed,
        monitor=json.dumps(monitors),
        **({"initContainers": [container("setup")]} if init else {}),
    )
    policy = POLICY if known else Policy()
    after = completed(made, policy)
    assert create(after, policy).allowed
    settings = a.parse(made["metadata"]["annotations"], NAMES)
    wanted = [one for name in NAMES for one in settings.container(name).health_ports]
    assert len(own(after)) == (1 if wanted and known else 0)
    if wanted and known:
        (sidecar,) = own(after)
        assert after["spec"]["initContainers"][0] == sidecar
        pairs = Counter(f"{one.container}:{one.shadow_port}:{one.app_port}" for one in wanted)
        assert Counter(sidecar["args"][1::2]) == pairs
        assert set(sidecar["args"][::2]) == {"--map"}
    named: list[str] = []
    for name, ports in zip(NAMES, there, strict=True):
        chosen, found = settings.container(name), declared(after, name)
        numbers = [(protocol, number) for _, protocol, number in found]
        assert [number for _, *number in found[: len(ports)]] == [
            [one["protocol"], one["containerPort"]] for one in ports
        ]
        assert len(set(numbers)) == len(numbers)
        shadows = (*chosen.shadow_ports, *chosen.health_ports)
        for mapping in shadows:
            assert ("TCP", mapping.shadow_port) in numbers
        added = numbers[len(ports) :]
        assert {number for _, number in added} <= {one.shadow_port for one in shadows}
        named += [label for label, _, _ in found if label]
    assert len(set(named)) == len(named)
    assert all(PORT_NAME.fullmatch(label) for label in named)
