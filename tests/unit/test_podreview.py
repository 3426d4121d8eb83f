"""What admission refuses, warns about and completes; and what it must leave alone."""

import copy
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract import annotations as a
from architect.contract.annotations import CheckpointName, Defaults, Monitor
from architect.contract.kubernetes import MOVE_REQUESTED, WAKE_REQUESTED
from architect.decisions import podreview
from architect.decisions.podreview import (
    CREATE,
    UNTOUCHED,
    UPDATE,
    Policy,
    Request,
    Review,
    complete_pod,
    is_asleep,
    refuse_checkpoint,
    review_pod,
    review_workload,
)
from tests.unit.json_patch import applied

DAEMON = "system:serviceaccount:architect:architectd"
POLICY = Policy(trusted=frozenset({DAEMON}))
MOVING = Policy(move_grace_s=600)
MANAGED = {a.MANAGED_CONTAINERS: '["app"]'}
STATUS = "status.architect.loopholelabs.io/app"
RESTARTING = [{"resourceName": "memory", "restartPolicy": "RestartContainer"}]
Json = dict[str, Any]


def container(name: str = "app", **more: Any) -> Json:
    return {"name": name, "image": "app:1", **more}


def pod(
    annotations: dict[str, str] | None = None,
    labels: dict[str, str] | None = None,
    runtime: str | None = "runc-architect",
    **spec: Any,
) -> Json:
    """A pod with one container, "app"; `spec` are fields of its spec."""
    fields = {"containers": [container()], **spec}
    if runtime is not None:
        fields["runtimeClassName"] = runtime
    metadata = {"name": "p", "annotations": annotations or {}, "labels": labels or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": fields}


def create(made: Json, policy: Policy = POLICY, user: str = "jane") -> Review:
    return review_pod(Request(CREATE, made, namespace="shop", username=user), policy)


def update(old: Json, new: Json, user: str = "jane") -> Review:
    return review_pod(Request(UPDATE, new, old, "shop", user), POLICY)


def refusal(review: Review) -> str:
    assert not review.allowed
    assert review.message
    assert len(review.message.splitlines()) == 1
    return review.message


def warning(review: Review) -> str:
    """The one warning of an object that is allowed."""
    assert review.allowed, review.message
    assert len(review.warnings) == 1, review.warnings
    return review.warnings[0]


# What is refused at creation.


def test_a_good_pod_passes_without_a_word() -> None:
    assert create(pod(MANAGED)) == UNTOUCHED


@pytest.mark.parametrize(
    ("annotation", "value", "words"),
    [
        (a.MANAGED_CONTAINERS, "app", "is not JSON"),
        (
            a.MANAGED_CONTAINERS,
            '["ap"]',
            "the pod has no such container (it has: app); did you mean app",
        ),
        (a.SCALEDOWN_DURATIONS, '{"app":"1"}', "has no unit"),
        (a.IGNORE_ACTIVITY_PORTS, '{"app":[70000]}', "is not a port"),
        (a.MANAGED_POD, "yes", "is neither true nor false"),
    ],
)
def test_a_bad_value_is_refused_by_name_value_and_fix(
    annotation: str, value: str, words: str
) -> None:
    review = create(pod({**MANAGED, annotation: value}))
    message = refusal(review)
    assert not review.forbidden
    assert message.startswith(f"annotation {annotation}")
    assert words in message
    assert "; " in message


def test_sidecars_can_be_managed_but_not_plain_init_containers() -> None:
    inits = [container("setup"), container("proxy", restartPolicy="Always")]
    both = {a.MANAGED_CONTAINERS: '["app","proxy"]'}
    assert create(pod(both, initContainers=inits)) == UNTOUCHED
    message = refusal(create(pod({a.MANAGED_CONTAINERS: '["setup"]'}, initContainers=inits)))
    assert 'value "setup": is an init container' in message
    assert "restartPolicy: Always" in message


@pytest.mark.parametrize("name", ["hostNetwork", "hostPID", "shareProcessNamespace"])
def test_shared_namespaces_are_refused_with_managed_containers_only(name: str) -> None:
    def sharing(annotations: dict[str, str], shared: bool) -> Json:
        made = pod(annotations)
        made["spec"][name] = shared
        return made

    message = refusal(create(sharing(MANAGED, True)))
    assert message.startswith(f'field spec.{name}, value "true": container "app" cannot be managed')
    assert f"remove {name}" in message
    assert create(sharing(MANAGED, False)).allowed
    assert create(sharing({a.MANAGED_CONTAINERS: "[]"}, True)).allowed


@pytest.mark.parametrize(
    "path",
    [
        "/",
        "/run",
        "/var/run",
        "/run/architect",
        "/var/run/architect/containers/",
        "//run//./architect",
        "/etc/../run/architect",
        "/var/lib",
        "/var/lib/architect/checkpoints",
        "/usr/local/lib/architect/libexec",
        "/run/containerd/containerd.sock",
        "/run/k3s/containerd",
        "/proc/1/root/run/architect",
        "/proc/self",
        "/proc/thread-self/root",
    ],
)
def test_the_nodes_own_files_are_not_shared_with_managed_pods(path: str) -> None:
    volumes = [{"name": "x", "emptyDir": {}}, {"name": "h", "hostPath": {"path": path}}]
    message = refusal(create(pod(MANAGED, volumes=volumes)))
    assert message.startswith(f'field spec.volumes[1].hostPath.path, value "{path}"')
    assert "mount a narrower path" in message


@pytest.mark.parametrize(
    "path",
    [
        "/data",
        "/run/architecture",
        "/var/lib/kubelet",
        "/var/log",
        "/proc",
        "/proc/sys/net",
        "/proc/meminfo",
        "/srv",
    ],
)
def test_other_host_paths_are_the_users_own_matter(path: str) -> None:
    assert create(pod(MANAGED, volumes=[{"name": "h", "hostPath": {"path": path}}])).allowed


@pytest.mark.parametrize(
    "forged",
    [
        {"labels": {STATUS: "RUNNING"}},
        {"annotations": {**MANAGED, a.CPU_REQUESTS: '{"app":"1"}'}},
        {"annotations": {**MANAGED, a.MEMORY_REQUESTS: "{}"}},
    ],
)
def test_states_are_written_by_us_alone(forged: dict[str, dict[str, str]]) -> None:
    made = pod(**{"annotations": MANAGED, **forged})  # type: ignore[arg-type]
    review = create(made)
    assert "written by Architect" in refusal(review)
    assert review.forbidden
    assert create(made, user=DAEMON).allowed
    # Later on: nobody but us adds, changes or removes them.
    plain = pod(MANAGED)
    changed = copy.deepcopy(made)
    for kind in ("labels", "annotations"):
        for key in changed["metadata"][kind]:
            if key not in MANAGED:
                changed["metadata"][kind][key] = "{ }"
    for old, new in ((plain, made), (made, changed), (made, plain)):
        assert "written by Architect" in refusal(update(old, new))
        assert update(old, new, user=DAEMON).allowed
    touched = copy.deepcopy(made)
    touched["metadata"]["labels"]["team"] = "blue"
    assert update(made, touched) == UNTOUCHED


# What is warned about.


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (pod(), "nothing is managed"),
        (pod(runtime="runsc-architect"), "nothing is managed"),
        (pod({**MANAGED, a.MANAGED_POD: "true"}), "only the runtime runsc-architect honours it"),
        (
            pod({**MANAGED, a.MANAGED_POD: "true"}, runtime="runsc-architect"),
            "has no effect with runtimeClassName runsc-architect",
        ),
        (
            pod(MANAGED, containers=[container(tty=True, ports=[{"containerPort": 80}])]),
            "it has a terminal",
        ),
        (
            pod(MANAGED, containers=[container(ports=[{"containerPort": 80}])]),
            "only kubectl exec wakes it",
        ),
        (pod({**MANAGED, a.NETWORK_MONITOR: '{"app":"packets"}'}), "declares no ports"),
        (
            pod(
                {**MANAGED, a.NETWORK_MONITOR: '{"app":"connections"}'},
                containers=[container(ports=[{"containerPort": 53, "protocol": "UDP"}])],
            ),
            "declares no TCP port",
        ),
        (pod({**MANAGED, a.IGNORE_ACTIVITY_PORTS: '{"app":[9]}'}), "does not declare (9)"),
        (
            pod(
                MANAGED,
                containers=[
                    container(resizePolicy=RESTARTING),
                    container("other", resizePolicy=RESTARTING),
                ],
            ),
            'container "app" keeps its request of memory',
        ),
        (pod({**MANAGED, a.PREFIX + "network-monitr": "x"}), "did you mean"),
    ],
)
def test_what_has_no_effect_is_said(made: Json, words: str) -> None:
    assert words in warning(create(made))


def test_ports_need_no_monitor_in_a_container_that_stays_awake() -> None:
    ports = [container(ports=[{"containerPort": 80}])]
    awake = {**MANAGED, a.DISABLE_AUTOSCALEDOWN_CONTAINERS: '["app"]'}
    assert create(pod(awake, containers=ports)) == UNTOUCHED
    chart = Policy(defaults=Defaults(monitor=Monitor.PACKETS))
    assert create(pod(MANAGED, containers=ports), chart) == UNTOUCHED


def test_there_are_never_more_warnings_than_anybody_reads() -> None:
    many = {a.PREFIX + f"x{i}": "" for i in range(100)}
    warnings = create(pod({**MANAGED, **many})).warnings
    assert len(warnings) == podreview.MOST_WARNINGS
    assert warnings[-1] == "and 81 more warnings"


# Changes of live pods.


def test_a_bad_new_value_on_a_live_pod_is_refused() -> None:
    bad = pod({**MANAGED, a.SCALEDOWN_DURATIONS: '{"app":"-1s"}'})
    assert "is negative" in refusal(update(pod(MANAGED), bad))


def test_old_bad_values_hinder_nobody_who_leaves_them() -> None:
    bad = {**MANAGED, a.SCALEDOWN_DURATIONS: '{"app":"-1s"}', a.NETWORK_MONITOR: "nonsense"}
    old = pod(bad)
    assert update(old, pod(bad, labels={"team": "blue"})) == UNTOUCHED
    corrected = update(old, pod({**bad, a.SCALEDOWN_DURATIONS: '{"app":"5s"}'}))
    assert "nonsense" in warning(corrected)
    worse = {**bad, a.SCALEDOWN_DURATIONS: '{"app":"0s"}'}
    assert a.SCALEDOWN_DURATIONS in refusal(update(old, pod(worse)))


def test_who_becomes_managed_later_is_told_when() -> None:
    two = [container(), container("other")]
    old, new = pod(MANAGED, containers=two), pod({a.MANAGED_CONTAINERS: '["app","other"]'})
    new["spec"]["containers"] = two
    waiting = {"containerStatuses": [{"name": "other", "state": {"waiting": {}}}]}
    assert update({**old, "status": waiting}, {**new, "status": waiting}) == UNTOUCHED
    started = {"containerStatuses": [{"name": "other", "containerID": "containerd://1"}]}
    said = warning(update({**old, "status": started}, {**new, "status": started}))
    assert said == 'container "other" has started unmanaged; it becomes managed at its next start'
    assert update({**new, "status": started}, {**old, "status": started}) == UNTOUCHED


def test_a_live_pod_of_the_hosts_network_cannot_become_managed() -> None:
    old, new = pod({}, hostNetwork=True), pod(MANAGED, hostNetwork=True)
    assert "spec.hostNetwork" in refusal(update(old, new))
    # One that slipped in can still be given other durations.
    assert update(
        new, pod({**MANAGED, a.SCALEDOWN_DURATIONS: '{"app":"5s"}'}, hostNetwork=True)
    ).allowed


def test_a_request_to_wake_is_no_setting() -> None:
    assert (
        update(pod(MANAGED), pod({**MANAGED, WAKE_REQUESTED: "2026-01-01T00:00:00Z"})) == UNTOUCHED
    )
    assert create(pod({**MANAGED, WAKE_REQUESTED: "x"})) == UNTOUCHED


MOVED = {**MANAGED, MOVE_REQUESTED: "5d3f0a91-77c2-4d5e-9f10-0123456789ab"}


def test_a_move_by_hand_is_no_setting() -> None:
    old, new = pod(MANAGED), pod(MOVED)
    for one in (old, new):
        one["metadata"]["uid"] = MOVED[MOVE_REQUESTED]
    assert update(old, new) == UNTOUCHED
    assert create(pod(MOVED)) == UNTOUCHED
    # What took over may be edited.
    later = pod({**MOVED, a.SCALEDOWN_DURATIONS: '{"app":"5s"}'})
    assert update(pod(MOVED), later).allowed


@pytest.mark.parametrize(
    ("value", "words"),
    [("yes", "is not the UID of a pod"), (MOVED[MOVE_REQUESTED], "is not the UID of this pod")],
)
def test_a_move_that_nobody_can_have_meant_is_refused(value: str, words: str) -> None:
    marked = pod({**MANAGED, MOVE_REQUESTED: value})
    marked["metadata"]["uid"] = "another"
    message = refusal(update(pod(MANAGED), marked))
    assert message.startswith(f"annotation {MOVE_REQUESTED}, value")
    assert words in message
    assert "kubectl architect move" in message
    if value == "yes":
        assert words in refusal(create(marked))


# Another namespace's checkpoint.


def test_a_checkpoint_of_another_namespace_needs_a_right() -> None:
    def wanting(name: str) -> Json:
        return pod({**MANAGED, a.START_FROM_PERSISTENT_CHECKPOINT: name})

    assert create(wanting("warm")).needs is None
    assert create(wanting("shop/warm")).needs is None
    needed = CheckpointName("bank", "warm")
    assert create(wanting("bank/warm")).needs == needed
    assert update(wanting("warm"), wanting("bank/warm")).needs == needed
    slower = wanting("bank/warm")
    slower["metadata"]["annotations"][a.SCALEDOWN_DURATIONS] = '{"app":"5s"}'
    assert update(wanting("bank/warm"), slower) == UNTOUCHED
    review = refuse_checkpoint(needed, "jane")
    assert '"jane" may not get persistentcheckpoints in namespace "bank"' in refusal(review)
    assert review.forbidden
    assert "API is away" in refusal(refuse_checkpoint(needed, "jane", "API is away"))


# Completion.


def test_managed_containers_get_resize_policies_and_nothing_else() -> None:
    there = [{"resourceName": "cpu", "restartPolicy": "NotRequired"}]
    made = pod(
        {a.MANAGED_CONTAINERS: '["app","proxy"]'},
        containers=[container("other"), container(resizePolicy=there)],
        initContainers=[container("proxy", restartPolicy="Always")],
    )
    before = copy.deepcopy(made)
    review = complete_pod(Request(CREATE, made), POLICY)
    assert made == before
    memory = {"resourceName": "memory", "restartPolicy": "NotRequired"}
    assert review.patch == (
        {"op": "add", "path": "/spec/initContainers/0/resizePolicy", "value": [*there, memory]},
        {"op": "add", "path": "/spec/containers/1/resizePolicy", "value": [*there, memory]},
    )
    assert complete_pod(Request(CREATE, applied(made, review.patch)), POLICY) == UNTOUCHED
    assert complete_pod(Request(UPDATE, made, made), POLICY) == UNTOUCHED
    for other in (None, "runsc-architect", "kata"):
        assert complete_pod(Request(CREATE, pod(MANAGED, runtime=other)), POLICY) == UNTOUCHED
    assert complete_pod(Request(CREATE, pod({a.MANAGED_CONTAINERS: "app"})), POLICY) == UNTOUCHED


# Workloads.


def workload(template: Json, kind: str = "Deployment", **metadata: Any) -> Json:
    inner = {"metadata": template["metadata"], "spec": template["spec"]}
    spec: Json = {"template": inner}
    if kind == "CronJob":
        spec = {"jobTemplate": {"spec": spec}}
    return {"kind": kind, "metadata": {"name": "w", **metadata}, "spec": spec}


def test_daemon_set_without_the_nodes_label_is_warned_of_pods_that_stay_pending() -> None:
    made = workload(pod(MANAGED), "DaemonSet")
    never, pending = review_workload(Request(CREATE, made), POLICY).warnings
    assert "never move" in never
    assert "stay Pending" in pending
    made["spec"]["template"]["spec"]["nodeSelector"] = {"architect.loopholelabs.io/node": "true"}
    assert "stay Pending" not in warning(review_workload(Request(CREATE, made), POLICY))


@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
@pytest.mark.parametrize(
    ("template", "words"),
    [
        (pod({a.MANAGED_CONTAINERS: "x"}), "pods of this {} will be refused: annotation"),
        (pod(MANAGED, labels={STATUS: "RUNNING"}), "pods of this {} will be refused: label"),
        (pod(MANAGED, runtime=None), "no effect without runtimeClassName: runc-architect"),
        (pod(), "nothing is managed"),
    ],
)
def test_workloads_are_warned_of_and_never_refused(kind: str, template: Json, words: str) -> None:
    made = workload(template, kind)
    assert words.format(kind) in warning(review_workload(Request(CREATE, made), POLICY))
    assert review_workload(Request(UPDATE, made, made), POLICY) == UNTOUCHED
    assert review_workload(Request("DELETE", {}, made), POLICY) == UNTOUCHED
    owned = workload(template, kind, ownerReferences=[{"controller": True}])
    assert review_workload(Request(CREATE, owned), POLICY) == UNTOUCHED


def test_annotations_on_the_workload_itself_are_misplaced() -> None:
    made = workload(pod(MANAGED), annotations={a.SCALEDOWN_DURATIONS: "{}", **MANAGED})
    said = warning(review_workload(Request(CREATE, made), POLICY))
    assert "scaledown-durations" in said
    assert "on the Deployment itself has no effect" in said


# Sleepers.


def test_asleep_is_what_the_label_says() -> None:
    labels = {STATUS: "RUNNING", "status.architect.loopholelabs.io/db": "SCALED_DOWN"}
    assert is_asleep(pod(MANAGED, labels=labels))
    assert is_asleep(pod(MANAGED, labels=labels), "db")
    assert not is_asleep(pod(MANAGED, labels=labels), "app")
    assert not is_asleep(pod(MANAGED, labels=labels, runtime=None))
    assert not is_asleep(pod(MANAGED))


# Whatever comes.

TEXT = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["app", '["app"]', "[]", "{}", '{"app":"1s"}', "true", "bank/x", "/run", "cpu", "Always"]
    ),
)
ANNOTATIONS = st.dictionaries(
    st.one_of(
        st.sampled_from([*a.USER_ANNOTATIONS, *a.OWN_ANNOTATIONS, WAKE_REQUESTED, "team"]),
        st.text(max_size=4).map(lambda t: a.PREFIX + t),
    ),
    st.one_of(TEXT, st.none(), st.integers()),
    max_size=6,
)
_WORDS = (
    "metadata spec status annotations labels name containers initContainers runtimeClassName tty "
    "restartPolicy volumes hostPath path hostPID hostNetwork ports containerPort protocol template "
    "jobTemplate resizePolicy resourceName ownerReferences controller containerStatuses kind "
    "lifecycle preStop postStart exec httpGet host terminationGracePeriodSeconds volumeMounts emptyDir"
)
KEYS = st.sampled_from(_WORDS.split())
JSON = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXT),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(KEYS, TEXT), inner, max_size=5)
    ),
    max_leaves=20,
)
CONTAINERS = st.lists(
    st.one_of(
        JSON,
        st.fixed_dictionaries(
            {"name": st.sampled_from(["app", "db"])},
            optional={
                "tty": JSON,
                "ports": JSON,
                "resizePolicy": st.one_of(
                    JSON, st.lists(st.fixed_dictionaries({"resourceName": TEXT}), max_size=2)
                ),
                "restartPolicy": TEXT,
                "lifecycle": st.one_of(
                    JSON,
                    st.dictionaries(st.sampled_from(["preStop", "postStart"]), JSON, max_size=2),
                ),
            },
        ),
    ),
    max_size=3,
)


def pods(runtime: st.SearchStrategy[Any]) -> st.SearchStrategy[Json]:
    spec = st.fixed_dictionaries(
        {"runtimeClassName": runtime},
        optional={
            "containers": CONTAINERS,
            "initContainers": CONTAINERS,
            "volumes": st.one_of(
                JSON,
                st.lists(
                    st.fixed_dictionaries({"hostPath": st.fixed_dictionaries({"path": TEXT})})
                ),
            ),
            "hostPID": JSON,
        },
    )
    metadata = st.fixed_dictionaries(
        {}, optional={"annotations": ANNOTATIONS, "labels": st.one_of(ANNOTATIONS, JSON)}
    )
    return st.fixed_dictionaries({"spec": spec, "metadata": metadata}, optional={"status": JSON})


OURS = pods(st.sampled_from(["runc-architect", "runsc-architect"]))
OTHERS = pods(st.one_of(st.none(), TEXT, JSON))
OBJECTS = st.one_of(OURS, st.dictionaries(st.one_of(KEYS, TEXT), JSON, max_size=4))
OPERATIONS = st.sampled_from([CREATE, UPDATE, "DELETE", "CONNECT", ""])


@given(OPERATIONS, OBJECTS, OBJECTS)
def test_no_shape_makes_it_raise(operation: str, new: Json, old: Json) -> None:
    wrapped = {"kind": "Deployment", "spec": {"template": new}}
    before = copy.deepcopy((new, old))
    for request in (Request(operation, new, old), Request(operation, wrapped, old)):
        for review in (
            review_pod(request, POLICY),
            complete_pod(request, POLICY),
            review_workload(request, POLICY),
        ):
            assert review.allowed or review.message
            assert all("\n" not in w for w in (*review.warnings, review.message))
            json.dumps(review.patch)
        assert review_workload(request, POLICY).allowed
    is_asleep(new)
    assert json.dumps(before) == json.dumps((new, old))


@given(OPERATIONS, OTHERS, OTHERS)
def test_pods_of_others_are_left_alone(operation: str, new: Json, old: Json) -> None:
    request = Request(operation, new, old)
    assert review_pod(request, POLICY) == UNTOUCHED
    assert complete_pod(request, POLICY) == UNTOUCHED


@given(OURS)
def test_a_patch_is_needed_once(made: Json) -> None:
    for policy in (POLICY, MOVING):
        after = applied(made, complete_pod(Request(CREATE, made), policy).patch)
        assert complete_pod(Request(CREATE, after), policy) == UNTOUCHED


@given(OURS, OURS)
def test_an_update_that_leaves_our_annotations_alone_passes(old: Json, new: Json) -> None:
    new = {**new, "metadata": {**old["metadata"], "finalizers": [], "deletionTimestamp": "now"}}
    new["spec"]["runtimeClassName"] = old["spec"]["runtimeClassName"]
    assert update(old, new) == UNTOUCHED


@given(OURS, OURS)
def test_deletion_is_never_reviewed(new: Json, old: Json) -> None:
    for operation in ("DELETE", "CONNECT"):
        assert review_pod(Request(operation, new, old), POLICY) == UNTOUCHED
