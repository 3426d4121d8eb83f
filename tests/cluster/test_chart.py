"""The chart as helm renders it: for every kind of values it is what a user of the guide expects.

Needs the helm of the test cluster's build and no cluster; test_chart_installed.py has one.
"""

import itertools
from pathlib import Path
from typing import Any, Final

import pytest

from architect.processes.manager.main import options
from tests.cluster.base import ClusterError
from tests.cluster.helm import CHART, NAMESPACE, Helm, Object, only, pod_spec
from tests.cluster.settings import Programs

pytestmark = pytest.mark.cluster

GUIDE: Final = (
    "kubernetesDistro=eks",
    "machineToken=mymachinetoken",
    "clusterName=myclustername",
    "architectdNodeSelector.custom-label=value",
    "architectAdmissionControllerNodeSelector.zone=us-east-1a",
    "architectControlPlaneNodeSelector.tier=critical",
    "architectdTolerations[0].key=dedicated",
    "architectdTolerations[0].operator=Equal",
    "architectdTolerations[0].value=architect",
    "architectdTolerations[0].effect=NoSchedule",
    "architectAdmissionControllerResources.requests.cpu=100m",
    "architectAdmissionControllerResources.requests.memory=128Mi",
    "architectAdmissionControllerResources.limits.cpu=500m",
    "architectAdmissionControllerResources.limits.memory=512Mi",
    "architectControlPlaneResources.requests.cpu=200m",
    "architectControlPlaneResources.requests.memory=256Mi",
)
"""Every setting of the guide, as it is written there."""
DISTROS: Final = ("auto", "eks", "gke", "k3s", "kind", "kubeadm", "rke2")
WORKLOADS: Final = (
    ("DaemonSet", "architectd"),
    ("Deployment", "architect-manager"),
    ("Deployment", "architect-control-plane"),
    ("Job", "architect-remove"),
)
MATRIX: Final = [
    (f"kubernetesDistro={distro}", f"certManager.enabled={cert}", f"{pods}={replicas}")
    for distro, (cert, pods, replicas) in zip(
        itertools.cycle(DISTROS),
        itertools.product(
            ("true", "false"),
            ("architectAdmissionControllerReplicas", "architectControlPlaneReplicas"),
            (1, 3),
        ),
        strict=False,
    )
]


@pytest.fixture(scope="module")
def helm(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(programs, tmp_path_factory.mktemp("helm"))


def containers(spec: Object) -> list[Object]:
    return [*spec.get("initContainers", []), *spec["containers"]]


@pytest.mark.parametrize("given", [(), GUIDE, ("certManager.enabled=true",)])
def test_lint_finds_nothing(helm: Helm, given: tuple[str, ...]) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART, *(f"--set={s}" for s in given))


@pytest.mark.parametrize("distro", DISTROS)
def test_the_node_is_told_its_distribution(helm: Helm, distro: str) -> None:
    spec = pod_spec(helm.rendered(f"kubernetesDistro={distro}"), *WORKLOADS[0])
    assert spec["initContainers"][0]["args"] == [f"--distro={distro}"]


@pytest.mark.parametrize("given", MATRIX)
def test_every_object_is_labelled_and_in_its_place(helm: Helm, given: tuple[str, ...]) -> None:
    objects = helm.rendered(*given)
    keys = [(one["kind"], one["metadata"]["name"]) for one in objects]
    assert len(keys) == len(set(keys))
    for one in objects:
        labels = one["metadata"]["labels"]
        assert labels["app"] == labels["app.kubernetes.io/name"]
        assert labels["app.kubernetes.io/instance"] == "architect"
        assert labels["app.kubernetes.io/part-of"] == "architect"
        assert one["metadata"].get("namespace", NAMESPACE) == NAMESPACE
    budgets = {one["metadata"]["name"] for one in objects if one["kind"] == "PodDisruptionBudget"}
    several = {
        one["metadata"]["name"]
        for one in objects
        if one["kind"] == "Deployment" and one["spec"]["replicas"] > 1
    }
    assert budgets == several


def test_pods_have_the_labels_of_the_guide(helm: Helm) -> None:
    objects = helm.rendered()
    for kind, name in WORKLOADS:
        assert only(objects, kind, name)["spec"]["template"]["metadata"]["labels"]["app"] == name


def test_the_guides_settings_reach_their_components(helm: Helm) -> None:
    objects = helm.rendered(*GUIDE)
    daemon, manager, control_plane, remove = (pod_spec(objects, *one) for one in WORKLOADS)
    ours = "architect.loopholelabs.io"
    assert daemon["nodeSelector"] == {f"{ours}/node": "true", "custom-label": "value"}
    critical = {f"{ours}/critical-node": "true"}
    assert manager["nodeSelector"] == critical | {"zone": "us-east-1a"}
    assert (
        control_plane["nodeSelector"] == remove["nodeSelector"] == critical | {"tier": "critical"}
    )
    dedicated = {
        "key": "dedicated",
        "operator": "Equal",
        "value": "architect",
        "effect": "NoSchedule",
    }
    assert dedicated in daemon["tolerations"]
    assert manager["containers"][0]["resources"] == {
        "requests": {"cpu": "100m", "memory": "128Mi"},
        "limits": {"cpu": "500m", "memory": "512Mi"},
    }
    assert control_plane["containers"][0]["resources"] == {
        "requests": {"cpu": "200m", "memory": "256Mi"}
    }


def test_the_machine_token_is_in_no_object(helm: Helm) -> None:
    assert "mymachinetoken" not in str(helm.rendered(*GUIDE))


def test_what_set_makes_of_strings_is_made_strings_again(helm: Helm) -> None:
    objects = helm.rendered(
        "architectdNodeSelector.dedicated=true",
        "architectControlPlaneTolerations[0].key=pool",
        "architectControlPlaneTolerations[0].value=7",
        "architectControlPlaneTolerations[0].tolerationSeconds=3600",
    )
    assert pod_spec(objects, *WORKLOADS[0])["nodeSelector"]["dedicated"] == "true"
    wanted = [{"key": "pool", "value": "7", "tolerationSeconds": 3600}]
    assert pod_spec(objects, *WORKLOADS[2])["tolerations"] == wanted
    assert pod_spec(objects, *WORKLOADS[3])["tolerations"] == wanted


def test_one_image_for_all(helm: Helm) -> None:
    words = ("image.repository=mine/a", "image.tag=2", "image.pullPolicy=Never")
    for given, image, policy in (
        ((), "localhost/architect:0.1.0", "IfNotPresent"),
        (words, "mine/a:2", "Never"),
    ):
        objects = helm.rendered(*given)
        every = [c for one in WORKLOADS for c in containers(pod_spec(objects, *one))]
        assert {(c["image"], c["imagePullPolicy"]) for c in every} == {(image, policy)}
        # It puts the same image into the pods of users, for the sidecar that answers probes.
        manager = containers(pod_spec(objects, "Deployment", "architect-manager"))[0]
        chosen = options([word for word in manager["args"] if word.startswith("--image")])
        assert (chosen.image, chosen.image_pull_policy) == (image, policy)


def test_no_pressure_drives_architectd_away(helm: Helm) -> None:
    spec = pod_spec(helm.rendered(), "DaemonSet", "architectd")
    tolerated = {one["key"] for one in spec["tolerations"] if one["operator"] == "Exists"}
    pressures = ("disk-pressure", "memory-pressure", "pid-pressure", "unschedulable")
    assert {f"node.kubernetes.io/{one}" for one in pressures} <= tolerated
    assert all("limits" not in one["resources"] for one in containers(spec))


def test_runtime_classes_choose_labelled_nodes(helm: Helm) -> None:
    objects = helm.rendered()
    for name in ("runc-architect", "runsc-architect"):
        found = only(objects, "RuntimeClass", name)
        assert found["handler"] == name
        assert found["scheduling"] == {"nodeSelector": {"architect.loopholelabs.io/node": "true"}}


def test_only_webhooks_that_protect_fail_closed_and_those_exempt_nobody(helm: Helm) -> None:
    objects = helm.rendered()
    hooks = [
        hook
        for one in objects
        if one["kind"].endswith("WebhookConfiguration")
        for hook in one["webhooks"]
    ]
    paths = {(h["clientConfig"]["service"]["path"], h["failurePolicy"]) for h in hooks}
    assert paths == {
        ("/mutate", "Fail"),
        ("/validate", "Fail"),
        ("/validate-workload", "Ignore"),
        ("/attach", "Ignore"),
    }
    for hook in hooks:
        assert "caBundle" not in hook["clientConfig"]
        if hook["failurePolicy"] == "Fail":
            assert hook["matchConditions"][0]["name"] == "our-runtime-class"
            assert "namespaceSelector" not in hook
            assert "objectSelector" not in hook


def test_cert_manager_makes_the_certificate_instead(helm: Helm) -> None:
    objects = helm.rendered("certManager.enabled=true")
    certificate = only(objects, "Certificate", "architect-manager")
    secret = certificate["spec"]["secretName"]
    assert f"architect-manager.{NAMESPACE}.svc" in certificate["spec"]["dnsNames"]
    for kind in ("MutatingWebhookConfiguration", "ValidatingWebhookConfiguration"):
        metadata = only(objects, kind, "architect-manager")["metadata"]
        inject = f"{NAMESPACE}/{certificate['metadata']['name']}"
        assert metadata["annotations"]["cert-manager.io/inject-ca-from"] == inject
    spec = pod_spec(objects, "Deployment", "architect-manager")
    assert "--cert-dir=/etc/architect/tls" in spec["containers"][0]["args"]
    assert {"name": "tls", "mountPath": "/etc/architect/tls", "readOnly": True} in spec[
        "containers"
    ][0]["volumeMounts"]
    assert any(one.get("secret", {}).get("secretName") == secret for one in spec["volumes"])
    rules = str(only(objects, "ClusterRole", "architect-manager")["rules"])
    assert "webhookconfigurations" not in rules
    assert not any(one["kind"] == "Secret" for one in objects)


def test_without_cert_manager_nothing_of_it_is_asked_for(helm: Helm) -> None:
    assert "cert-manager.io" not in str(helm.rendered())


def test_uninstalling_asks_the_nodes_first(helm: Helm) -> None:
    hooks: dict[str, Any] = {
        one["kind"]: one["metadata"]["annotations"]
        for one in helm.rendered()
        if "helm.sh/hook" in one["metadata"].get("annotations", {})
    }
    assert hooks.keys() == {"ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Job"}
    assert {one["helm.sh/hook"] for one in hooks.values()} == {"pre-delete"}
    weight = {kind: int(one["helm.sh/hook-weight"]) for kind, one in hooks.items()}
    assert max(weight, key=lambda kind: weight[kind]) == "Job"


def test_nodes_that_do_not_answer_are_left_only_on_request(helm: Helm) -> None:
    for given, wanted in (((), []), (("removalForceAfterSeconds=60",), ["--force-after=60"])):
        args = pod_spec(helm.rendered(*given), *WORKLOADS[3])["containers"][0]["args"]
        assert args == ["--deadline=270", *wanted]


@pytest.mark.parametrize("given", [None, False, True])
def test_keep_alives_are_answered_if_that_is_wanted(helm: Helm, given: bool | None) -> None:
    settings = [] if given is None else [f"architectdAnswerKeepAlive={str(given).lower()}"]
    args = pod_spec(helm.rendered(*settings), *WORKLOADS[0])["containers"][0]["args"]
    assert ("--answer-keep-alive" in args) is bool(given)


def test_crds_are_upgraded_and_outlive_the_release(helm: Helm) -> None:
    crds = [one for one in helm.rendered() if one["kind"] == "CustomResourceDefinition"]
    assert len(crds) == 2
    for one in crds:
        assert one["metadata"]["annotations"]["helm.sh/resource-policy"] == "keep"
    assert not (CHART / "crds").exists()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("kubernetesDistro=openshift", r"kubernetesDistro.*must be one of.*'kubeadm'"),
        (
            "architectdNodeselector.a=b",
            r"additional properties 'architectdNodeselector' not allowed",
        ),
        ("image.name=x", r"image.*additional properties 'name' not allowed"),
        ("defaultScaledownDuration=soon", r"defaultScaledownDuration.*does not match pattern"),
        (
            "defaultScaledownDuration=999ms",
            r"defaultScaledownDuration: 999ms is less than a second",
        ),
        ("defaultNetworkMonitor=udp", r"defaultNetworkMonitor.*must be one of"),
        ("architectdAnswerKeepAlive=2", r"architectdAnswerKeepAlive.*want boolean"),
        ("architectControlPlaneReplicas=0", r"architectControlPlaneReplicas.*minimum"),
        ("architectControlPlaneReplicas=many", r"architectControlPlaneReplicas.*want integer"),
        ("architectdTolerations=all", r"architectdTolerations.*want array"),
        ("architectdTolerations[0].Key=x", r"additional properties 'Key' not allowed"),
        ("architectdResources.request.cpu=1", r"additional properties 'request' not allowed"),
        ("architectdResources.requests.cpu=fast", r"architectdResources.*does not match pattern"),
        ("removalForceAfterSeconds=600", r"removalForceAfterSeconds.*maximum"),
        ("certManager.enabled=perhaps", r"certManager/enabled.*want boolean"),
    ],
)
def test_wrong_values_are_refused_by_name(helm: Helm, given: str, message: str) -> None:
    with pytest.raises(ClusterError, match=rf"(?s){message}"):
        helm.rendered(given)


@pytest.mark.parametrize("given", ["1s", "1m30s", "1.5h", "1000ms", "0.5s500ms"])
def test_durations_of_a_second_and_more_are_taken(helm: Helm, given: str) -> None:
    objects = helm.rendered(f"defaultScaledownDuration={given}")
    for workload in WORKLOADS[:2]:
        args = pod_spec(objects, *workload)["containers"][0]["args"]
        assert f"--default-scaledown-duration={given}" in args


def test_kubernetes_has_to_be_new_enough(helm: Helm) -> None:
    assert helm.rendered(kubernetes="1.32.3-gke.1100000")
    with pytest.raises(ClusterError, match=r"requires kubeVersion: >=1\.32"):
        helm.rendered(kubernetes="1.31.9")


def test_the_package_has_what_the_folder_has(helm: Helm, tmp_path: Path) -> None:
    helm("package", CHART, f"--destination={tmp_path}")
    (packed,) = tmp_path.iterdir()
    assert packed.name == "architect-0.1.0.tgz"
    assert "kubernetesDistro" in helm("show", "values", packed)
