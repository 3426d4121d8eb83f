"""What admission takes over so that a pod can move, what it refuses, and what it says will not move."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it comes with lightkube, its stubs do not

from architect.adapters import hooks
from architect.contract import annotations as a
from architect.contract import kubernetes
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
from architect.processes.manager import main
from tests.unit.json_patch import applied

CHART = Path(__file__).resolve().parents[2] / "charts" / "architect"
POLICY = Policy(move_grace_s=600)
MANAGED = {a.MANAGED_CONTAINERS: '["app"]'}
SLEEP = {"sleep": {"seconds": 5}}
COMMAND = {"exec": {"command": ["/bin/sh", "-c", "nginx -s quit; é"]}}
ELSEWHERE = {"httpGet": {"host": "10.0.0.1", "port": 80}}
Json = dict[str, Any]


def container(name: str = "app", **more: Any) -> Json:
    return {"name": name, "image": "app:1", **more}


def pod(annotations: Json | None = None, *made: Json, **spec: Any) -> Json:
    fields = {"runtimeClassName": "runc-architect", "containers": list(made) or [container()]}
    metadata = {"name": "p", "annotations": MANAGED if annotations is None else annotations}
    return {"metadata": metadata, "spec": {**fields, **spec}}


def completed(made: Json, policy: Policy = POLICY) -> Json:
    """The pod after the webhook, which must have no more to do if it is asked again."""
    after: Json = applied(made, complete_pod(Request(CREATE, made), policy).patch)
    assert complete_pod(Request(CREATE, after), policy) == UNTOUCHED
    assert review_pod(Request(CREATE, after), policy).allowed
    return after


def notes(made: Json) -> dict[str, str]:
    """The annotations that were added."""
    return {k: v for k, v in made["metadata"]["annotations"].items() if k != a.MANAGED_CONTAINERS}


def said(kind: str, template: Json, **spec: Any) -> tuple[str, ...]:
    inner = {"metadata": template["metadata"], "spec": template["spec"]}
    made = {"kind": kind, "metadata": {"name": "w"}, "spec": {"template": inner, **spec}}
    return review_workload(Request(CREATE, made), POLICY).warnings


# The grace.


@pytest.mark.parametrize(
    ("own", "least", "given", "kept"),
    [
        (30, 600, 600, "30"),
        (0, 600, 600, "0"),
        (599, 600, 600, "599"),
        (600, 600, 600, None),
        (3600, 600, 3600, None),
        (30, 0, 30, None),
    ],
)
def test_the_grace_is_raised_never_lowered(
    own: int, least: int, given: int, kept: str | None
) -> None:
    after = completed(pod(terminationGracePeriodSeconds=own), Policy(move_grace_s=least))
    assert after["spec"]["terminationGracePeriodSeconds"] == given
    assert notes(after).get(a.TERMINATION_GRACE_PERIOD) == kept


def test_what_is_not_written_is_kubernetes_own_default() -> None:
    assert notes(completed(pod())) == {a.TERMINATION_GRACE_PERIOD: "30"}


@pytest.mark.parametrize(
    "made",
    [
        pod({a.MANAGED_CONTAINERS: "[]"}, container(lifecycle={"preStop": SLEEP})),
        pod(None, container(tty=True, lifecycle={"preStop": SLEEP})),
        pod({a.MANAGED_CONTAINERS: "nonsense"}, container(lifecycle={"preStop": SLEEP})),
        pod(None, container(lifecycle={"preStop": SLEEP}), runtimeClassName="runsc-architect"),
        pod(None, container(lifecycle={"preStop": SLEEP}), runtimeClassName=None),
    ],
)
def test_a_pod_in_which_nothing_is_managed_keeps_hooks_and_grace(made: Json) -> None:
    after = applied(made, complete_pod(Request(CREATE, made), POLICY).patch)
    assert after["spec"]["containers"][0]["lifecycle"] == {"preStop": SLEEP}
    assert notes(after).keys() <= {a.MANAGED_CONTAINERS}
    assert "terminationGracePeriodSeconds" not in after["spec"]


# The hooks.


def test_hooks_of_managed_containers_are_taken_over() -> None:
    lifecycle = {"preStop": COMMAND, "postStart": SLEEP, "stopSignal": "SIGQUIT"}
    made = pod(
        {a.MANAGED_CONTAINERS: '["app","proxy"]'},
        container("other", lifecycle={"preStop": SLEEP}),
        container(lifecycle=lifecycle),
        initContainers=[
            container("setup"),
            container("proxy", restartPolicy="Always", lifecycle={"preStop": SLEEP}),
        ],
    )
    after = completed(made, Policy())
    other, app = after["spec"]["containers"]
    assert other["lifecycle"] == {"preStop": SLEEP}
    assert app["lifecycle"] == {"stopSignal": "SIGQUIT"}
    assert after["spec"]["initContainers"][1]["lifecycle"] == {}
    found = {key: json.loads(text) for key, text in notes(after).items()}
    assert found == {
        a.PRE_STOP: {"app": COMMAND, "proxy": SLEEP},
        a.POST_START: {"app": SLEEP},
    }
    # architectd reads what was written.
    assert hooks.parse(notes(after)[a.PRE_STOP])["app"].exec == hooks.Exec(
        COMMAND["exec"]["command"]
    )


def test_a_hook_that_another_webhook_adds_later_is_taken_over_too() -> None:
    two = {a.MANAGED_CONTAINERS: '["app","b"]'}
    after = completed(pod(two, container(lifecycle={"preStop": SLEEP}), container("b")))
    after["spec"]["containers"][1]["lifecycle"] = {"preStop": COMMAND}
    again = completed(after)
    assert json.loads(notes(again)[a.PRE_STOP]) == {"app": SLEEP, "b": COMMAND}
    assert notes(again)[a.TERMINATION_GRACE_PERIOD] == "30"


def test_the_sidecars_place_does_not_move_the_hooks() -> None:
    mapping = {"containerName": "app", "appPort": 80, "shadowPort": 9080}
    annotations = {
        a.MANAGED_CONTAINERS: '["app"]',
        a.NETWORK_MONITOR: '{"app":"packets"}',
        a.HEALTH_CHECK_PROXY: json.dumps({"mappings": [mapping]}),
    }
    first = container("setup", lifecycle={"preStop": COMMAND})
    second = container(restartPolicy="Always", lifecycle={"preStop": SLEEP})
    policy = main.policy(main.options(["--image", "a:1"]))
    after = completed(pod(annotations, container("z"), initContainers=[first, second]), policy)
    assert [one.get("lifecycle") for one in after["spec"]["initContainers"]] == [
        None,
        {"preStop": COMMAND},
        {},
    ]


def test_a_hook_with_a_host_stays_where_pod_security_sees_it() -> None:
    made = pod(None, container(lifecycle={"preStop": ELSEWHERE, "postStart": SLEEP}))
    after = completed(made)
    assert after["spec"]["containers"][0]["lifecycle"] == {"preStop": ELSEWHERE}
    assert a.PRE_STOP not in notes(after)
    [warning] = review_pod(Request(CREATE, after), POLICY).warnings
    assert warning.startswith('container "app": its preStop has a host in httpGet')


# What only we write.


@pytest.mark.parametrize(
    ("annotation", "value", "why"),
    [
        (a.TERMINATION_GRACE_PERIOD, "soon", "is not a number of seconds"),
        (a.TERMINATION_GRACE_PERIOD, "-1", "is not a number of seconds"),
        (a.TERMINATION_GRACE_PERIOD, "9" * 19, "is not a number of seconds"),
        (a.PRE_STOP, "{", "has no hooks"),
        (a.PRE_STOP, "[]", "has no hooks"),
        (a.PRE_STOP, '{"other":{"sleep":{"seconds":1}}}', "is of a container that is not in"),
        (a.POST_START, '{"app":1}', "is not a hook"),
        (a.POST_START, json.dumps({"app": ELSEWHERE}), "has a host of its own"),
    ],
)
def test_what_admission_cannot_have_written_is_refused(
    annotation: str, value: str, why: str
) -> None:
    made = pod({**MANAGED, annotation: value}, container(), container("other"))
    review = review_pod(Request(CREATE, made, username="jane"), POLICY)
    assert not review.allowed
    assert review.message.startswith(f"annotation {annotation}")
    assert why in review.message
    assert review.message.endswith("leave it out: Architect writes it")


@pytest.mark.parametrize("annotation", a.MOVING_ANNOTATIONS)
def test_on_a_live_pod_they_are_ours_alone(annotation: str) -> None:
    value = "30" if annotation == a.TERMINATION_GRACE_PERIOD else json.dumps({"app": SLEEP})
    plain, with_it = pod(), pod({**MANAGED, annotation: value})
    for old, new in ((plain, with_it), (with_it, plain)):
        review = review_pod(Request(UPDATE, new, old, username="jane"), POLICY)
        assert "written by Architect" in review.message
        assert review.forbidden
    assert f"annotation {annotation}: written by Architect alone" in said("Deployment", with_it)[0]


def test_the_node_knows_them() -> None:
    own = dict.fromkeys(a.MOVING_ANNOTATIONS, "{}")
    assert a.parse({**MANAGED, **own}).warnings == ()
    assert set(a.MOVING_ANNOTATIONS) < set(a.OWN_ANNOTATIONS)
    assert kubernetes.PRE_STOP == a.PRE_STOP


@pytest.mark.parametrize("name", ["claims", "claim", "checkpoint", "start-from-checkpoint"])
def test_a_checkpoint_cannot_be_claimed_by_annotation(name: str) -> None:
    """Claims are the control plane's: nothing on a pod makes one."""
    made = pod({**MANAGED, a.PREFIX + name: "bank/web-0"})
    review: Review = review_pod(Request(CREATE, made), POLICY)
    [warning] = review.warnings
    assert f'annotation "{a.PREFIX}{name}": unknown, ignored' in warning
    assert review.needs is None


# What does not move.


def mounting(source: Json, annotations: Json | None = None, **mount: Any) -> Json:
    mounts = [{"name": "v", "mountPath": "/v", **mount}, {"name": "v", "mountPath": "/w", **mount}]
    return pod(annotations, container(volumeMounts=mounts), volumes=[{"name": "v", **source}])


EMPTYDIR: Json = {"emptyDir": {}}


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (mounting(EMPTYDIR), f"add the container to {a.MIGRATE_EMPTYDIR_CONTAINERS}"),
        (mounting({"hostPath": {"path": "/srv"}}), "hostPath volume"),
        (mounting({"ephemeral": {}}), "use a PersistentVolumeClaim"),
    ],
)
def test_volumes_that_stay_are_said_once(template: Json, words: str) -> None:
    [warning] = said("Deployment", template)
    assert warning.startswith('container "app": ')
    assert words in warning
    # A pod of its own moves only if somebody asks for it, and a controller reads nothing.
    assert review_pod(Request(CREATE, template), POLICY).warnings == ()


@pytest.mark.parametrize(
    "template",
    [
        pod(),
        mounting(EMPTYDIR, {**MANAGED, a.MIGRATE_EMPTYDIR_CONTAINERS: '["app"]'}),
        mounting({"emptyDir": {"medium": "Memory"}}),
        mounting({"persistentVolumeClaim": {"claimName": "c"}}),
        mounting({"hostPath": {"path": "/srv"}}, readOnly=True),
        mounting(EMPTYDIR, {a.MANAGED_CONTAINERS: "[]"}),
    ],
)
def test_what_moves_is_not_spoken_of(template: Json) -> None:
    assert said("Deployment", template) == ()


def test_workloads_that_move_late_or_never() -> None:
    [late] = said("StatefulSet", pod())
    assert "pause for seconds" in late
    of_nodes = mounting(EMPTYDIR)
    of_nodes["spec"]["nodeSelector"] = {kubernetes.NODE_LABEL: "true"}
    [never] = said("DaemonSet", of_nodes)
    assert "never move" in never
    assert said("StatefulSet", pod({a.MANAGED_CONTAINERS: "[]"})) == ()


# The option.


def test_the_charts_value_is_the_programs_option() -> None:
    value = yaml.safe_load((CHART / "values.yaml").read_text())["moveGracePeriodSeconds"]
    assert value == 600
    option = "--move-grace-period-seconds={{ int .Values.moveGracePeriodSeconds }}"
    assert option in (CHART / "templates/manager/deployment.yaml").read_text()
    chosen = main.options([f"--move-grace-period-seconds={value}"])
    assert main.policy(chosen).move_grace_s == value
    assert main.policy(main.options([])).move_grace_s == 0


@pytest.mark.parametrize("text", ["-1", "10m", "1.5", "²"])
def test_a_bad_option_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.options([f"--move-grace-period-seconds={text}"])
    assert "--move-grace-period-seconds" in capsys.readouterr().err
