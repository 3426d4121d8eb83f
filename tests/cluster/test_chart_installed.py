"""The chart on a real API server: installed, upgraded, refused, held to its rights, uninstalled.

Its pods do not run here: no node has the label that they ask for. What they would write is written
with their service accounts' real tokens, on nodes and pods that no kubelet looks after.
"""

import base64
import json
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import pytest

from architect.contract.kubernetes import HOLDING_ADDRESSES
from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.cluster.helm import CHART, NAMESPACE, RELEASE, Helm, Object, as_list, pod_spec
from tests.cluster.objects import named, soon
from tests.cluster.settings import Programs

pytestmark = pytest.mark.cluster

GROUP: Final = "architect.loopholelabs.io"
CRDS: Final = (f"checkpoints.{GROUP}", f"persistentcheckpoints.{GROUP}")
OURS, OTHER = "chart-node-1", "chart-node-2"
"""Nodes without a kubelet."""
RESTRICTED: Final = "chart-test-restricted"
STATUS: Final = f"status.{GROUP}/main"
MANAGED: Final = {f"{GROUP}/managed-containers": '["main"]'}
SERVED_BY_ALL: Final = {"selfsubjectaccessreviews", "selfsubjectrulesreviews", "selfsubjectreviews"}
"""What anybody who is authenticated may ask."""
OWNER: Final = {"apiVersion": "apps/v1", "kind": "StatefulSet", "name": "web", "uid": "3"}
NAMESPACED: Final = f"--namespace={NAMESPACE}"

Rule = tuple[str, str, str]
"""Verb, resource (with its group, if it has one), object's name or nothing."""


@pytest.fixture(scope="module")
def helm(programs: Programs, cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    return Helm(programs, tmp_path_factory.mktemp("helm"), cluster.control_plane.admin)


def account(name: str) -> str:
    return f"system:serviceaccount:{NAMESPACE}:{name}"


def simple(name: str, on: str | None = None, runtime: str | None = None, **more: Any) -> Object:
    """A pod of one container that no kubelet will start."""
    resources = {"requests": {"cpu": "100m", "memory": "10Mi"}}
    spec: Object = {
        "containers": [{"name": "main", "image": "localhost/none", "resources": resources}]
    }
    if on is not None:
        spec["nodeName"] = on
    if runtime is not None:
        spec["runtimeClassName"] = runtime
    made = named("Pod", name, spec=spec | more)
    made["metadata"]["namespace"] = NAMESPACE
    return made


def create(cluster: Cluster, one: Object, *words: str) -> str:
    return cluster.kubectl("create", "--filename=-", *words, stdin=json.dumps(one))


def patch(cluster: Cluster, what: str, change: Object, *words: str) -> str:
    """A merge patch. Raises ClusterError where it is refused."""
    return cluster.kubectl(
        "patch", what, NAMESPACED, "--type=merge", f"--patch={json.dumps(change)}", *words
    )


@pytest.fixture(scope="module", autouse=True)
def installed(cluster: Cluster, helm: Helm) -> Iterator[None]:
    """The release, with default values, and what the tests write to."""
    try:
        helm("install", RELEASE, CHART, NAMESPACED, "--create-namespace")
        yield
    finally:
        helm("uninstall", RELEASE, NAMESPACED, "--no-hooks", "--ignore-not-found")
        words = ("--ignore-not-found", "--grace-period=0", "--force")
        cluster.kubectl("delete", "pods", "--all", NAMESPACED, *words)
        cluster.kubectl("delete", "crd", *CRDS, "--ignore-not-found")
        cluster.kubectl("delete", "node", OURS, OTHER, "--ignore-not-found")
        cluster.kubectl("delete", "namespace", NAMESPACE, RESTRICTED, "--ignore-not-found")


@pytest.fixture(scope="module")
def nodes(cluster: Cluster, installed: None) -> None:
    """Two nodes, each with a managed pod and one that is not."""
    for node in (OURS, OTHER):
        create(
            cluster,
            named("Node", node, labels={f"{GROUP}/node": "true", "kubernetes.io/os": "linux"}),
        )
        # Its rights are the administrator's, its name is what the webhooks let through.
        words = (f"--as={account('architect-control-plane')}", "--as-group=system:masters")
        create(cluster, simple(f"managed-{node}", node, "runc-architect"), *words)
        create(cluster, simple(f"other-{node}", node))


@dataclass(frozen=True, slots=True)
class Bearer:
    """Whoever has a token. kubectl would read a subresource before it writes it; we may not."""

    server: str
    context: ssl.SSLContext
    token: str

    def patch(self, what: str, change: Object, kind: str = "merge") -> None:
        """A patch of KIND/NAME or KIND/NAME/SUBRESOURCE. Raises ClusterError where it is refused."""
        plural, rest = what.split("/", 1)
        folders = {
            "pod": f"api/v1/namespaces/{NAMESPACE}/pods",
            "node": "api/v1/nodes",
            "checkpoint": f"apis/{GROUP}/v1/namespaces/{NAMESPACE}/checkpoints",
        }
        request = urllib.request.Request(
            f"{self.server}/{folders[plural]}/{rest}",
            method="PATCH",
            data=json.dumps(change).encode(),
            headers={
                "Authorization": f"Bearer {self.token}",
                "Content-Type": f"application/{kind}-patch+json",
            },
        )
        https = urllib.request.HTTPSHandler(context=self.context)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), https)
        try:
            opener.open(request, timeout=30).close()
        except urllib.error.HTTPError as error:
            with error:
                why = str(json.load(error)["message"])
            raise ClusterError(f"patching {what}", why) from error


def bearer(cluster: Cluster, name: str, *words: str) -> Bearer:
    """A service account by a token that it is given."""
    config = json.loads(cluster.control_plane.admin.read_text())
    context = ssl.create_default_context(cafile=str(cluster.control_plane.pki.crt("ca")))
    token = cluster.kubectl("create", "token", name, NAMESPACED, *words).strip()
    return Bearer(config["clusters"][0]["cluster"]["server"], context, token)


@pytest.fixture(scope="module")
def architectd(cluster: Cluster, nodes: None) -> Bearer:
    """The architectd of the node OURS, by the token that its pod would have."""
    daemon = simple("architectd-of-ours", OURS, serviceAccountName="architectd")
    create(cluster, daemon)
    name = daemon["metadata"]["name"]
    words = ("--bound-object-kind=Pod", f"--bound-object-name={name}")
    return bearer(cluster, "architectd", *words)


# Installed.


def test_everything_of_every_choice_is_taken_by_the_api_server(
    cluster: Cluster, helm: Helm
) -> None:
    for given in (("architectControlPlaneReplicas=3",), ("certManager.enabled=true",)):
        objects = [
            one for one in helm.rendered(*given) if not one["apiVersion"].startswith("cert-manager")
        ]
        listed = as_list(objects)
        said = cluster.kubectl(
            "apply", "--dry-run=server", "--server-side", "--force-conflicts", "-f-", stdin=listed
        )
        assert len(said.splitlines()) == len(objects)


def test_what_the_pods_without_rights_ask_for_is_the_least(cluster: Cluster, helm: Helm) -> None:
    enforce = {"pod-security.kubernetes.io/enforce": "restricted"}
    cluster.apply(named("Namespace", RESTRICTED, labels=enforce))
    soon(
        "its service account",
        lambda: cluster.kubectl("get", "serviceaccount", "default", f"--namespace={RESTRICTED}"),
    )
    objects = helm.rendered()
    for kind, name in (
        ("Deployment", "architect-manager"),
        ("Deployment", "architect-control-plane"),
        ("Job", "architect-remove"),
        ("DaemonSet", "architectd"),
    ):
        spec = pod_spec(objects, kind, name) | {"serviceAccountName": "default"}
        one = named("Pod", name, spec=spec)
        words = ("--dry-run=server", f"--namespace={RESTRICTED}")
        if name == "architectd":
            with pytest.raises(ClusterError, match="violates PodSecurity"):
                create(cluster, one, *words)
        else:
            create(cluster, one, *words)


def test_the_policies_expressions_are_sound(cluster: Cluster, nodes: None) -> None:
    policies = (
        "architect-pods",
        "architect-nodes",
        "architect-host-paths",
        "architect-checkpoints",
        "architect-placeholders",
    )
    for name in policies:

        def checked(name: str = name) -> Object:
            status: Object = cluster.get("validatingadmissionpolicy", name).get("status", {})
            return status if "typeChecking" in status else {}

        assert not soon("type checking", checked)["typeChecking"].get("expressionWarnings")


def test_a_new_managed_pod_waits_for_the_manager_and_no_other_does(cluster: Cluster) -> None:
    words = ("--dry-run=server",)
    with pytest.raises(ClusterError, match=rf'failed calling webhook "pods\.{GROUP}"'):
        create(cluster, simple("new", runtime="runc-architect"), *words)
    create(cluster, simple("new"), *words)
    template: Object = {"metadata": {"labels": {"a": "b"}, "annotations": MANAGED}}
    template["spec"] = simple("new", runtime="runc-architect")["spec"]
    spec = {"selector": {"matchLabels": {"a": "b"}}, "template": template}
    create(cluster, named("Deployment", "new", "apps/v1", spec=spec), NAMESPACED, *words)
    job = {"template": {"spec": template["spec"] | {"restartPolicy": "Never"}}}
    cron = {"schedule": "0 0 * * *", "jobTemplate": {"spec": job}}
    create(cluster, named("CronJob", "new", "batch/v1", spec=cron), NAMESPACED, *words)


def test_only_changes_of_ours_wait_for_the_manager(cluster: Cluster, nodes: None) -> None:
    managed = f"pod/managed-{OURS}"
    patch(cluster, managed, {"metadata": {"labels": {"team": "a"}, "finalizers": ["a.b/c"]}})
    patch(cluster, managed, {"metadata": {"annotations": {"note": "x"}, "finalizers": None}})
    changes: tuple[Object, ...] = (
        {"annotations": MANAGED},
        {"labels": {STATUS: "SCALED_DOWN"}},
        {"annotations": {f"{GROUP}/cpu-requests": "{}"}},
    )
    for forged in changes:
        with pytest.raises(ClusterError, match="failed calling webhook"):
            patch(cluster, managed, {"metadata": forged})
    patch(cluster, f"pod/other-{OURS}", {"metadata": {"annotations": MANAGED}})


# What architectd may write, by the token of its pod.


def test_architectd_writes_to_its_own_managed_pods(architectd: Bearer) -> None:
    for state in ("SCALED_DOWN", None):
        change = {"labels": {STATUS: state}, "annotations": {f"{GROUP}/cpu-requests": state}}
        architectd.patch(f"pod/managed-{OURS}", {"metadata": change})


@pytest.mark.parametrize(
    ("what", "change", "message"),
    [
        (f"pod/managed-{OTHER}", {"labels": {STATUS: "RUNNING"}}, "pods of other nodes"),
        (f"pod/other-{OURS}", {"labels": {STATUS: "RUNNING"}}, "pods of its runtime classes"),
        (f"pod/managed-{OURS}", {"labels": {"app": "web"}}, "may only write labels of"),
        (f"pod/managed-{OURS}", {"annotations": {"a": "b"}}, "may only write annotations of"),
        (f"pod/managed-{OURS}", {"finalizers": ["a.b/c"]}, "may not write finalizers"),
        (f"pod/managed-{OURS}", {"ownerReferences": [OWNER]}, "may not write ownerReferences"),
        (f"node/{OTHER}", {"annotations": {f"{GROUP}/removal": "done"}}, "to other nodes"),
        (f"node/{OURS}", {"labels": {"zone": "a"}}, "may only write labels of"),
        (f"node/{OURS}", {"labels": {"kubernetes.io/os": None}}, "may only write labels of"),
        (f"node/{OURS}", {"labels": {f"evil-{GROUP}/x": "a"}}, "may only write labels of"),
    ],
)
def test_architectd_writes_nothing_else(
    architectd: Bearer, what: str, change: Object, message: str
) -> None:
    with pytest.raises(ClusterError, match=rf"ValidatingAdmissionPolicy.*{message}"):
        architectd.patch(what, {"metadata": change})


def test_architectd_changes_no_spec(architectd: Bearer) -> None:
    with pytest.raises(ClusterError, match="may not write a node's spec"):
        architectd.patch(f"node/{OURS}", {"spec": {"unschedulable": True}})
    with pytest.raises(ClusterError, match="but through pods/resize"):
        architectd.patch(f"pod/managed-{OURS}", {"spec": {"activeDeadlineSeconds": 9}})


def test_architectd_resizes_its_own_pods_only(cluster: Cluster, architectd: Bearer) -> None:
    def change(cpu: str) -> Object:
        resources = {"requests": {"cpu": cpu}}
        return {"spec": {"containers": [{"name": "main", "resources": resources}]}}

    architectd.patch(f"pod/managed-{OURS}/resize", change("10m"), "strategic-merge")
    asked = cluster.get(f"pod/managed-{OURS}", NAMESPACED)["spec"]["containers"][0]["resources"]
    assert asked["requests"]["cpu"] == "10m"
    with pytest.raises(ClusterError, match="pods of other nodes"):
        architectd.patch(f"pod/managed-{OTHER}/resize", change("10m"), "strategic-merge")


def test_architectd_speaks_for_its_own_node(architectd: Bearer) -> None:
    removal, feature = {f"{GROUP}/removal": "done"}, {f"feature.{GROUP}/criu": "true"}
    architectd.patch(f"node/{OURS}", {"metadata": {"annotations": removal, "labels": feature}})
    condition = {"type": "ArchitectReady", "status": "True", "reason": "Fit", "message": "all"}
    status = {"status": {"conditions": [condition]}}
    architectd.patch(f"node/{OURS}/status", status, "strategic-merge")
    with pytest.raises(ClusterError, match="to other nodes"):
        architectd.patch(f"node/{OTHER}/status", status, "strategic-merge")


# Checkpoints: whose node has a pod's memory and connections.

ADDRESSES: Final = {"oldAddresses": ["10.0.0.1"], "newAddresses": ["10.0.0.2"]}
COMMITTED: Final = {"phase": "Committed", "move": ADDRESSES | {"accepting": True}}


def checkpoint(name: str, **spec: Any) -> Object:
    known = {
        "podName": "web-0",
        "podUID": "1-2",
        "nodeName": OURS,
        "containers": [{"name": "main"}],
    }
    return named("Checkpoint", name, f"{GROUP}/v1", spec=known | spec)


def left(cluster: Cluster, name: str, source: str, taker: str = "", **status: Any) -> str:
    """A Checkpoint of a pod of the node ``source``, claimed by one of ``taker`` if that is given."""
    create(cluster, checkpoint(name, nodeName=source), NAMESPACED)
    what, words = f"checkpoint/{name}", ("--subresource=status",)
    available = {"phase": "Available", "endpoint": "10.0.0.9:9443"}
    patch(cluster, what, {"status": available}, *words)
    if taker:
        claim = {"podName": "q", "podUID": "3-4", "nodeName": taker}
        patch(cluster, what, {"status": {"phase": "Claimed", "claimedBy": claim}}, *words)
    if status:
        patch(cluster, what, {"status": status}, *words)
    return f"{what}/status"


def test_architectd_writes_to_the_checkpoints_of_its_node(
    cluster: Cluster, nodes: None, architectd: Bearer
) -> None:
    mine = left(cluster, "leaves", OURS)
    architectd.patch(mine, {"status": {"endpoint": "10.0.0.8:9443"}})
    gone = left(cluster, "gone", OURS, OTHER, **COMMITTED)
    architectd.patch(gone, {"status": {"move": {"accepting": False}}})
    released = left(cluster, "released", OURS, OTHER)
    architectd.patch(released, {"status": {"phase": "Available", "claimedBy": None}})


def test_architectd_commits_what_its_pod_has_claimed(
    cluster: Cluster, nodes: None, architectd: Bearer
) -> None:
    comes = left(cluster, "comes", OTHER, OURS)
    architectd.patch(comes, {"status": COMMITTED})
    architectd.patch(comes, {"status": {"phase": "Restored"}})
    architectd.patch(comes, {"status": {"move": {"flows": []}}})


CLAIM: Final = {"podName": "q", "podUID": "3-4", "nodeName": OURS}


@pytest.mark.parametrize(
    ("source", "taker", "before", "change", "message"),
    [
        (OTHER, "", {}, {"endpoint": "10.0.0.8:9443"}, "that no pod of its own has claimed"),
        (OTHER, "", {}, {"phase": "Claimed", "claimedBy": CLAIM}, "no pod of its own has claimed"),
        (OURS, "", {}, {"phase": "Claimed", "claimedBy": CLAIM}, "the control plane does"),
        (OURS, OTHER, {}, COMMITTED, "may not commit a move"),
        (OURS, OTHER, COMMITTED, {"move": {"flows": ["x"]}}, "may not say where the connections"),
    ],
)
def test_architectd_leaves_other_checkpoints_alone(
    cluster: Cluster,
    nodes: None,
    architectd: Bearer,
    request: pytest.FixtureRequest,
    source: str,
    taker: str,
    before: Object,
    change: Object,
    message: str,
) -> None:
    number = request.node.callspec.indices["source"]
    what = left(cluster, f"stranger-{number}", source, taker, **before)
    with pytest.raises(ClusterError, match=rf"ValidatingAdmissionPolicy.*{message}"):
        architectd.patch(what, {"status": change})


def endpoints(name: str, manager: str, *addresses: str) -> Object:
    labels = {"endpointslice.kubernetes.io/managed-by": manager}
    found = named("EndpointSlice", name, "discovery.k8s.io/v1", labels=labels)
    listed = [{"addresses": [address]} for address in addresses]
    family = "IPv6" if ":" in addresses[0] else "IPv4"
    return found | {"addressType": family, "endpoints": listed, "ports": []}


def test_the_control_plane_makes_placeholders_and_no_other_endpoints(cluster: Cluster) -> None:
    words = (NAMESPACED, f"--as={account('architect-control-plane')}")
    for family, address in HOLDING_ADDRESSES.items():
        create(cluster, endpoints(f"held-{family.lower()}", GROUP, address), *words)
        cluster.kubectl("delete", "endpointslice", f"held-{family.lower()}", *words)
    with pytest.raises(ClusterError, match="leads to the holding addresses only"):
        create(cluster, endpoints("evil", GROUP, HOLDING_ADDRESSES["IPv4"], "10.0.0.9"), *words)
    with pytest.raises(ClusterError, match="of its own"):
        create(cluster, endpoints("evil", "mine", HOLDING_ADDRESSES["IPv4"]), *words)
    create(cluster, endpoints("theirs", "mine", "10.0.0.9"), NAMESPACED)
    with pytest.raises(ClusterError, match="of its own"):
        cluster.kubectl("delete", "endpointslice", "theirs", *words)
    cluster.kubectl("delete", "endpointslice", "theirs", NAMESPACED)


def test_a_token_of_no_pod_writes_nothing(cluster: Cluster, nodes: None) -> None:
    with pytest.raises(ClusterError, match="token names no node"):
        bearer(cluster, "architectd").patch(
            f"pod/managed-{OURS}", {"metadata": {"labels": {STATUS: "RUNNING"}}}
        )


@pytest.mark.parametrize("name", ["architect-manager", "architect-control-plane"])
def test_the_others_write_ours_on_any_node_and_nothing_else(
    cluster: Cluster, nodes: None, name: str
) -> None:
    them = bearer(cluster, name)
    for node in (OURS, OTHER):
        ours = {f"{GROUP}/wake-requested": "now"}
        them.patch(f"pod/managed-{node}", {"metadata": {"annotations": ours}})
    with pytest.raises(ClusterError, match="pods of its runtime classes"):
        them.patch(f"pod/other-{OURS}", {"metadata": {"annotations": ours}})
    image = {"spec": {"containers": [{"name": "main", "image": "localhost/evil"}]}}
    with pytest.raises(ClusterError, match="but through pods/resize"):
        them.patch(f"pod/managed-{OURS}", image, "strategic-merge")


# Rights.


def rules(cluster: Cluster, name: str, namespace: str) -> set[Rule]:
    """Everything that a service account may do in a namespace, as the API server lists it."""
    ask = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectRulesReview",
        "spec": {"namespace": namespace},
    }
    said = create(cluster, ask, f"--as={account(name)}", "--output=json", "--validate=false")
    status = json.loads(said)["status"]
    assert not status["incomplete"]
    return {
        (verb, ".".join(filter(None, (resource, group))), thing)
        for rule in status["resourceRules"]
        for verb in rule["verbs"]
        for group in rule["apiGroups"]
        for resource in rule["resources"]
        for thing in rule.get("resourceNames") or [""]
        if resource not in SERVED_BY_ALL
    }


def each(verbs: str, resources: str, thing: str = "") -> set[Rule]:
    return {(verb, one, thing) for verb in verbs.split() for one in resources.split()}


EVENTS: Final = each("create patch", "events")
NODES: Final = each("list watch", "nodes")
PODS: Final = each("get list watch patch", "pods") | each("patch", "pods/resize")
CHECKPOINTS: Final = f"checkpoints.{GROUP}"
WRITES_OF_CHECKPOINTS: Final = each("update patch", f"checkpoints/status.{GROUP}")
REQUESTS: Final = "certificatesigningrequests.certificates.k8s.io"
ANSWERS: Final = (
    "certificatesigningrequests/approval.certificates.k8s.io"
    " certificatesigningrequests/status.certificates.k8s.io"
)
AUTHORITY: Final = "architect-node-authority"
EVERYWHERE: Final[dict[str, set[Rule]]] = {
    "architectd": PODS
    | NODES
    | EVENTS
    | each("patch", "nodes nodes/status")
    | each("get", "replicasets.apps statefulsets.apps jobs.batch namespaces")
    | each("get list watch create delete", CHECKPOINTS)
    | WRITES_OF_CHECKPOINTS
    | each("create get delete", REQUESTS),
    "architect-control-plane": PODS
    | NODES
    | EVENTS
    | each("get list watch delete", CHECKPOINTS)
    | WRITES_OF_CHECKPOINTS
    | each("get list watch delete", REQUESTS)
    | each("update patch", ANSWERS)
    | each("list watch", "services")
    | each("list watch create delete", "endpointslices.discovery.k8s.io")
    | each("approve sign", "signers.certificates.k8s.io", f"{GROUP}/node"),
    "architect-router": each("list watch", CHECKPOINTS),
    "architect-manager": each("get patch", "pods")
    | each("create", "subjectaccessreviews.authorization.k8s.io")
    | each(
        "get patch",
        "mutatingwebhookconfigurations.admissionregistration.k8s.io",
        "architect-manager",
    )
    | each(
        "get patch",
        "validatingwebhookconfigurations.admissionregistration.k8s.io",
        "architect-manager",
    ),
    "default": set(),
}
AT_HOME: Final[dict[str, set[Rule]]] = {
    "architect-control-plane": each("create", "leases.coordination.k8s.io")
    | each("get update", "leases.coordination.k8s.io", "architect-control-plane")
    | each("create", "secrets configmaps")
    | each("get update patch", "secrets configmaps", AUTHORITY),
    "architectd": each("get", "configmaps", AUTHORITY),
    "architect-manager": each("get patch", "secrets", "architect-manager-tls"),
}


@pytest.mark.parametrize("name", EVERYWHERE)
def test_nobody_may_do_more_than_they_do(cluster: Cluster, name: str) -> None:
    assert rules(cluster, name, "default") == EVERYWHERE[name]
    assert rules(cluster, name, NAMESPACE) == EVERYWHERE[name] | AT_HOME.get(name, set())


# The resources.


def persistent(name: str, **spec: Any) -> Object:
    return named("PersistentCheckpoint", name, f"{GROUP}/v1", spec=spec)


def test_a_persistent_checkpoint_as_the_examples_write_it(cluster: Cluster) -> None:
    create(cluster, persistent("demo", podName="valkey-cache-7d7f78c4f7-5f6ss"), NAMESPACED)
    what = "persistentcheckpoint/demo"
    patch(cluster, what, {"spec": {"checkpoint": "localhost/ref:1"}})
    asked = cluster.kubectl("get", what, NAMESPACED, "-o", "jsonpath={.spec.checkpoint}")
    assert asked == "localhost/ref:1"
    with pytest.raises(ClusterError, match="checkpoint never changes once it is there"):
        patch(cluster, what, {"spec": {"checkpoint": None}})
    with pytest.raises(ClusterError, match="podName never changes"):
        patch(cluster, what, {"spec": {"podName": "other"}})
    ready = {
        "type": "Ready",
        "status": "True",
        "reason": "Complete",
        "message": "",
        "lastTransitionTime": "2026-01-01T00:00:00Z",
    }
    patch(cluster, what, {"status": {"conditions": [ready]}}, "--subresource=status")
    header, row = cluster.kubectl("get", "pckpt", NAMESPACED).splitlines()
    assert header.split() == ["NAME", "POD", "READY", "REASON", "AGE"]
    assert row.split()[:4] == ["demo", "valkey-cache-7d7f78c4f7-5f6ss", "True", "Complete"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({}, "spec.podName: Required value"),
        ({"podName": "Not_A_Name"}, "spec.podName in body should match"),
        ({"podName": "a", "pod": "b"}, 'unknown field "spec.pod"'),
    ],
)
def test_a_wrong_persistent_checkpoint_is_refused(
    cluster: Cluster, spec: Object, message: str
) -> None:
    with pytest.raises(ClusterError, match=message):
        create(cluster, persistent("wrong", **spec), NAMESPACED, "--validate=strict")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            {"owner": OWNER, "templateHash": "a", "controllerRevision": "b", "ordinal": 0},
            "not both",
        ),
        ({"owner": OWNER, "controllerRevision": "b"}, "go together"),
        ({"templateHash": "a"}, "take an owner"),
        ({"containers": []}, "should have at least 1 items"),
        ({"owner": OWNER, "controllerRevision": "b", "ordinal": -1}, "greater than or equal to 0"),
    ],
)
def test_a_wrong_checkpoint_is_refused(cluster: Cluster, spec: Object, message: str) -> None:
    with pytest.raises(ClusterError, match=message):
        create(cluster, checkpoint("wrong", **spec), NAMESPACED)


def test_a_checkpoint_goes_to_one_pod(cluster: Cluster) -> None:
    stated = checkpoint("web-0", owner=OWNER, controllerRevision="web-5", ordinal=0)
    create(cluster, stated, NAMESPACED)
    what, words = "checkpoint/web-0", ("--subresource=status",)
    with pytest.raises(ClusterError, match="spec never changes"):
        patch(cluster, what, {"spec": {"nodeName": OTHER}})

    def claim(uid: str | None, phase: str) -> None:
        by = uid and {"podName": "web-0", "podUID": uid, "nodeName": OTHER}
        patch(cluster, what, {"status": {"phase": phase, "claimedBy": by}}, *words)

    claim(None, "Available")
    with pytest.raises(ClusterError, match="takes claimedBy"):
        claim(None, "Claimed")
    claim("1", "Claimed")
    with pytest.raises(ClusterError, match="claimed by another pod already"):
        claim("2", "Claimed")
    claim(None, "Available")
    claim("2", "Claimed")
    move = {"oldAddresses": ["10.0.1.7"], "newAddresses": ["10.0.2.9"]}
    for phase in ("Committed", "Restored"):
        patch(cluster, what, {"status": {"phase": phase, "move": move}}, *words)
    with pytest.raises(ClusterError, match="stays restored"):
        claim("2", "Claimed")
    header, row = cluster.kubectl("get", "ckpt", "web-0", NAMESPACED).splitlines()
    assert header.split() == ["NAME", "POD", "NODE", "PHASE", "CLAIMED-BY", "TO", "AGE", "MESSAGE"]
    assert row.split()[:5] == ["web-0", "web-0", OURS, "Restored", "web-0"]


# Upgraded and uninstalled: last, and in this order.


def generation(cluster: Cluster, kind: str, name: str) -> int:
    found: int = cluster.get(kind, name, NAMESPACED)["metadata"]["generation"]
    return found


def test_an_upgrade_keeps_what_the_manager_wrote_and_restarts_only_what_changed(
    cluster: Cluster, helm: Helm
) -> None:
    hooks = "validatingwebhookconfiguration/architect-manager"
    secret = "secret/architect-manager-tls"
    bundle = base64.b64encode(cluster.control_plane.pki.crt("ca").read_bytes()).decode()
    change = [{"op": "add", "path": "/webhooks/0/clientConfig/caBundle", "value": bundle}]
    cluster.kubectl("patch", hooks, "--type=json", f"--patch={json.dumps(change)}")
    patch(cluster, secret, {"data": {"tls.crt": bundle}})
    before = generation(cluster, "daemonset", "architectd")

    helm("upgrade", RELEASE, CHART, NAMESPACED, "--set=architectControlPlaneReplicas=3")

    assert cluster.get(hooks)["webhooks"][0]["clientConfig"]["caBundle"] == bundle
    assert cluster.get(secret, NAMESPACED)["data"] == {"tls.crt": bundle}
    assert generation(cluster, "daemonset", "architectd") == before
    budget = cluster.get("poddisruptionbudget", "architect-control-plane", NAMESPACED)
    assert budget["spec"]["maxUnavailable"] == 1

    helm("upgrade", RELEASE, CHART, NAMESPACED, "--set=defaultScaledownDuration=10s")

    assert generation(cluster, "daemonset", "architectd") == before + 1
    assert cluster.get("deployment", "architect-control-plane", NAMESPACED)["spec"]["replicas"] == 1
    with pytest.raises(ClusterError, match="not found"):
        cluster.get("poddisruptionbudget", "architect-control-plane", NAMESPACED)


def test_a_second_release_is_refused(helm: Helm) -> None:
    with pytest.raises(ClusterError, match="invalid ownership metadata"):
        helm("install", "second", CHART, f"--namespace={RESTRICTED}", "--create-namespace")


def test_uninstalling_leaves_the_crds_and_nothing_else(
    cluster: Cluster, helm: Helm, programs: Programs
) -> None:
    helm("uninstall", RELEASE, NAMESPACED, "--no-hooks")

    def left() -> list[str]:
        found: list[str] = []
        for namespaced in ("true", "false"):
            listed = (
                "api-resources",
                "--verbs=list",
                "--output=name",
                f"--namespaced={namespaced}",
            )
            kinds = ",".join(cluster.kubectl(*listed).split())
            chosen = f"--selector=app.kubernetes.io/instance={RELEASE}"
            words = ("--all-namespaces",) if namespaced == "true" else ()
            found += cluster.kubectl("get", kinds, chosen, "--output=name", *words).split()
        return found

    wanted = {f"customresourcedefinition.apiextensions.k8s.io/{one}" for one in CRDS}
    soon("all else to go", lambda: set(left()) == wanted)
    # They are still there for the same release to come again.
    helm("install", RELEASE, CHART, NAMESPACED)
