"""architect-manager against a real API server: the chart's webhooks call a manager on this machine.

The webhooks are those that the chart renders, but for their names, their address, and that they are
limited to this test's namespace. No node runs the pods: none has the label that they ask for.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from architect.contract import annotations as a
from architect.contract.kubernetes import (
    CONTROL_PLANE,
    GROUP,
    NAMESPACE,
    WAKE_REQUESTED,
    status_label,
)
from common import REPOSITORY
from tests.cluster.base import ClusterError, until
from tests.cluster.cluster import Cluster
from tests.cluster.helm import Helm
from tests.cluster.objects import named, soon
from tests.cluster.settings import HOST_ADDRESS

pytestmark = pytest.mark.cluster

CLASS: Final = "runc-architect"
MANAGED: Final = {a.MANAGED_CONTAINERS: '["app"]'}
ASLEEP: Final = {status_label("app"): "SCALED_DOWN"}
OURS: Final = f"system:serviceaccount:{NAMESPACE}:{CONTROL_PLANE}"
"""Who may write states."""
_ENDS_S: Final = 30.0
"""Seconds after SIGTERM: it drains for 15 s at most, then has 10 s for what it is answering."""

Json = dict[str, Any]


@dataclass
class Manager:
    """The program, and what the API server has been told of it."""

    cluster: Cluster
    name: str
    """Of the namespace and of both configurations."""
    process: subprocess.Popen[bytes]
    log: Path

    def lines(self, what: str) -> list[Json]:
        """Its log lines of that kind."""
        found = [json.loads(line) for line in self.log.read_text().splitlines()]
        return [line for line in found if line["what"] == what]

    def kubectl(self, *words: str, stdin: Json | None = None, user: str = "") -> tuple[int, str]:
        """kubectl in the namespace; its exit status, and all that it said, warnings included."""
        client = self.cluster.control_plane
        command: list[str | Path] = [client.programs.kubectl, "--kubeconfig", client.admin]
        command += [f"--namespace={self.name}", *words]
        if user:
            command += [f"--as={user}", "--as-group=system:masters"]
        done = subprocess.run(
            command,
            input=json.dumps(stdin) if stdin else None,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=60.0,
            check=False,
            env={**os.environ, "NO_PROXY": HOST_ADDRESS, "no_proxy": HOST_ADDRESS},
        )
        return done.returncode, done.stdout

    def create(self, made: Json, *words: str, user: str = "") -> str:
        """Create an object that must be allowed; return what kubectl said."""
        status, said = self.kubectl("create", "--filename=-", *words, stdin=made, user=user)
        assert status == 0, said
        return said

    def refused(self, made: Json, user: str = "") -> str:
        """Try to create an object that must be refused; return what kubectl said."""
        status, said = self.kubectl("create", "--filename=-", stdin=made, user=user)
        assert status != 0, said
        assert "denied the request" in said, said
        return said

    def pod(self, name: str) -> Json:
        """A pod of the namespace."""
        return self.cluster.get("pod", name, f"--namespace={self.name}")


def pod(
    name: str,
    annotations: dict[str, str] | None = None,
    runtime: str | None = CLASS,
    **spec: Any,
) -> Json:
    """A pod that no node can run; `spec` are fields of its spec."""
    made = named("Pod", name)
    made["metadata"]["annotations"] = annotations or {}
    made["spec"] = {
        "nodeSelector": {f"{GROUP}/no-such-node": "true"},
        "containers": [{"name": "app", "image": "localhost/none:1"}],
        **({"runtimeClassName": runtime} if runtime else {}),
        **spec,
    }
    return made


@pytest.fixture(scope="module")
def runtime_class(cluster: Cluster) -> Iterator[None]:
    """The runtime class, for as long as it is needed, unless the cluster has it already."""
    there = cluster.kubectl("get", "runtimeclass", CLASS, "--ignore-not-found", "--output=name")
    if not there:
        cluster.apply(named("RuntimeClass", CLASS, "node.k8s.io/v1", handler=CLASS))
    yield
    if not there:
        cluster.kubectl("delete", "runtimeclass", CLASS, "--ignore-not-found")


def _webhooks(cluster: Cluster, home: Path, name: str, port: int) -> list[Json]:
    """The chart's webhook configurations for a manager on the host, for one namespace alone."""
    rendered = Helm(cluster.programs, home).rendered()
    found = []
    for one in rendered:
        if not one["kind"].endswith("WebhookConfiguration"):
            continue
        one["metadata"]["name"] = name
        for hook in one["webhooks"]:
            path = hook["clientConfig"].pop("service")["path"]
            hook["clientConfig"]["url"] = f"https://{HOST_ADDRESS}:{port}{path}"
            hook["namespaceSelector"] = {"matchLabels": {"kubernetes.io/metadata.name": name}}
        found.append(one)
    assert len(found) == 2
    return found


@contextlib.contextmanager
def _started(cluster: Cluster, home: Path, name: str) -> Iterator[Manager]:
    log = home / "manager.log"
    command = [sys.executable, "-m", "architect.processes.manager.main"]
    command += [f"--namespace={name}", f"--host={HOST_ADDRESS}", "--port=0", "--interval=1"]
    command += [f"--dns-name={HOST_ADDRESS}", f"--trusted-user={OURS}"]
    command += [f"--{kind}-configuration={name}" for kind in ("mutating", "validating")]
    environment = {
        **os.environ,
        "KUBECONFIG": str(cluster.control_plane.admin),
        "PYTHONPATH": str(REPOSITORY / "src"),
    }
    with log.open("wb") as sink:
        process = subprocess.Popen(command, stderr=sink, env=environment)
    manager = Manager(cluster, name, process, log)
    try:
        until("the manager to listen", lambda: manager.lines("listening"), 20.0)
        yield manager
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_ENDS_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture(scope="module")
def manager(
    cluster: Cluster, runtime_class: None, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Manager]:
    """A manager that is trusted by the API server."""
    home = tmp_path_factory.mktemp("manager")
    name = f"manager-{uuid.uuid4().hex[:8]}"
    # Written in that order, removed before the manager ends: nobody waits for one that is gone.
    cluster.apply(named("Namespace", name))
    try:
        with _started(cluster, home, name) as started:
            port = started.lines("listening")[0]["port"]
            hooks = _webhooks(cluster, home, name, port)
            try:
                cluster.apply(*hooks)
                until("its certificate to be trusted", lambda: len(started.lines("trust")) == 2, 20)
                # The API server takes a moment to learn of new webhooks.
                soon("webhooks that refuse", lambda: _refuses(started))
                yield started
            finally:
                for one in hooks:
                    kind = one["kind"].lower()
                    cluster.kubectl("delete", kind, name, "--ignore-not-found")
    finally:
        cluster.kubectl("delete", "namespace", name, "--ignore-not-found", timeout_s=90.0)


def _refuses(manager: Manager) -> bool:
    made = pod("probe", {a.MANAGED_CONTAINERS: "nonsense"})
    status, said = manager.kubectl("create", "--dry-run=server", "--filename=-", stdin=made)
    return status != 0 and "is not JSON" in said


# Pods.


@pytest.mark.parametrize(
    ("annotations", "spec", "words"),
    [
        (
            {a.MANAGED_CONTAINERS: '["ap"]'},
            {},
            f'annotation {a.MANAGED_CONTAINERS}, key "[0]", value "ap": the pod has no such '
            "container (it has: app); did you mean app?",
        ),
        (
            {**MANAGED, a.SCALEDOWN_DURATIONS: '{"app":"10ms"}'},
            {},
            f'annotation {a.SCALEDOWN_DURATIONS}, key "app", value "10ms": is below the minimum of '
            "1s; write 1s or more",
        ),
        (MANAGED, {"hostNetwork": True}, "remove hostNetwork"),
        (MANAGED, {"hostPID": True}, "remove hostPID"),
        (MANAGED, {"shareProcessNamespace": True}, "remove shareProcessNamespace"),
        (
            MANAGED,
            {"volumes": [{"name": "x", "hostPath": {"path": "/var/run/architect"}}]},
            "which holds Architect's own files",
        ),
        (
            MANAGED,
            {"volumes": [{"name": "x", "hostPath": {"path": "/run/containerd/containerd.sock"}}]},
            "which holds containerd's sockets",
        ),
        ({**MANAGED, a.CPU_REQUESTS: "{}"}, {}, "it is written by Architect alone"),
    ],
)
def test_bad_pods_are_refused_in_so_many_words(
    manager: Manager, annotations: dict[str, str], spec: Json, words: str
) -> None:
    assert words in manager.refused(pod("bad", annotations, **spec))
    last = manager.lines("refused")[-1]
    assert (last["namespace"], last["name"]) == (manager.name, "bad")
    # The same pod without our class is none of our business.
    manager.create(pod("bad", annotations, runtime=None, **spec), "--dry-run=server")


def test_a_good_pod_is_completed(manager: Manager) -> None:
    inits = [
        {"name": "setup", "image": "localhost/none:1"},
        {"name": "proxy", "image": "localhost/none:1", "restartPolicy": "Always"},
    ]
    made = pod("good", {a.MANAGED_CONTAINERS: '["app","proxy"]'}, initContainers=inits)
    assert "Warning" not in manager.create(made)
    spec = manager.pod("good")["spec"]
    policies = [
        {(one["resourceName"], one["restartPolicy"]) for one in container.get("resizePolicy", [])}
        for container in (*spec["initContainers"], *spec["containers"])
    ]
    both = {("cpu", "NotRequired"), ("memory", "NotRequired")}
    assert policies == [set(), both, both]


def test_warnings_reach_the_user(manager: Manager) -> None:
    made = pod("warned", MANAGED)
    made["spec"]["containers"][0] |= {"ports": [{"containerPort": 80}], "tty": True}
    assert "it has a terminal" in manager.create(made, "--dry-run=server")
    assert "nothing is managed" in manager.create(pod("none"), "--dry-run=server")


def test_a_live_pods_annotations_are_checked_and_the_rest_is_not(manager: Manager) -> None:
    name = "live"
    manager.create(pod(name, MANAGED))
    bad = f'{a.SCALEDOWN_DURATIONS}={{"app":"-1s"}}'
    status, said = manager.kubectl("annotate", "pod", name, bad)
    assert status != 0
    assert "is negative; write 0s or more" in said
    assert a.SCALEDOWN_DURATIONS not in manager.pod(name)["metadata"]["annotations"]
    good = f'{a.SCALEDOWN_DURATIONS}={{"app":"5s"}}'
    assert manager.kubectl("annotate", "pod", name, good)[0] == 0
    # States are ours alone.
    mine = f"{status_label('app')}=RUNNING"
    status, said = manager.kubectl("label", "pod", name, mine)
    assert status != 0
    assert "it is written by Architect alone" in said
    assert manager.kubectl("label", "pod", name, mine, user=OURS)[0] == 0
    # What has nothing to do with us does not even come by.
    before = manager.log.read_text()
    assert manager.kubectl("label", "pod", name, "team=blue")[0] == 0
    finalizers = '{"metadata":{"finalizers":["example.com/x"]}}'
    assert manager.kubectl("patch", "pod", name, "--patch", finalizers)[0] == 0
    assert manager.kubectl("delete", "pod", name, "--wait=false")[0] == 0
    assert (
        manager.kubectl("patch", "pod", name, "--patch", '{"metadata":{"finalizers":null}}')[0] == 0
    )
    gone = lambda: not manager.kubectl("get", "pod", name, "--ignore-not-found")[1]  # noqa: E731
    until("the pod to be gone", gone, 30.0)
    assert manager.log.read_text() == before


def test_another_namespaces_checkpoint_needs_the_right_to_get_it(manager: Manager) -> None:
    who, elsewhere = "jane", f"{manager.name}-bank"
    wanting = pod("restored", {**MANAGED, a.START_FROM_PERSISTENT_CHECKPOINT: f"{elsewhere}/warm"})
    cluster = manager.cluster

    def granted(namespace: str, resource: str, verb: str) -> None:
        cluster.kubectl(
            "create", "role", who, f"--verb={verb}", f"--resource={resource}", f"-n={namespace}"
        )
        cluster.kubectl(
            "create", "rolebinding", who, f"--role={who}", f"--user={who}", f"-n={namespace}"
        )

    def tried() -> tuple[int, str]:
        words = ("create", "--dry-run=server", "--filename=-", f"--as={who}")
        return manager.kubectl(*words, stdin=wanting)

    cluster.apply(named("Namespace", elsewhere))
    try:
        granted(manager.name, "pods", "create")
        said = ""

        def reviewed() -> bool:
            nonlocal said
            said = tried()[1]
            return "denied the request" in said

        until("jane's right to make pods", reviewed, 20.0)
        assert f'"{who}" may not get persistentcheckpoints in namespace "{elsewhere}"' in said
        rule = {"apiGroups": [GROUP], "resources": ["persistentcheckpoints"], "verbs": ["get"]}
        role = named("Role", who, "rbac.authorization.k8s.io/v1", rules=[rule])
        role["metadata"]["namespace"] = elsewhere
        cluster.apply(role)
        cluster.kubectl(
            "create", "rolebinding", who, f"--role={who}", f"--user={who}", f"-n={elsewhere}"
        )
        until("jane's right to get checkpoints", lambda: tried()[0] == 0, 20.0)
    finally:
        cluster.kubectl("delete", "namespace", elsewhere, timeout_s=90.0)


# Workloads.


def workload(kind: str, template: Json) -> Json:
    labels = {"app": "w"}
    inner = {"metadata": {"labels": labels, **template["metadata"]}, "spec": template["spec"]}
    inner["metadata"].pop("name")
    inner["metadata"]["labels"] = labels
    if kind == "CronJob":
        inner["spec"]["restartPolicy"] = "Never"
        spec: Json = {"schedule": "0 0 1 1 *", "jobTemplate": {"spec": {"template": inner}}}
        return named(kind, "w", "batch/v1", spec=spec)
    spec = {"replicas": 0, "selector": {"matchLabels": labels}, "template": inner}
    return named(kind, "w", "apps/v1", spec=spec)


@pytest.mark.parametrize("kind", ["Deployment", "CronJob"])
def test_workloads_are_warned_of(manager: Manager, kind: str) -> None:
    bad = workload(kind, pod("w", {a.MANAGED_CONTAINERS: '["ap"]'}))
    said = manager.create(bad, "--dry-run=server")
    assert f"Warning: pods of this {kind} will be refused: annotation" in said
    classless = workload(kind, pod("w", MANAGED, runtime=None))
    said = manager.create(classless, "--dry-run=server")
    assert "no effect without runtimeClassName: runc-architect" in said
    assert "Warning" not in manager.create(workload(kind, pod("w", MANAGED)), "--dry-run=server")
    assert "Warning" not in manager.create(workload(kind, pod("w", None, None)), "--dry-run=server")


# Attach.


def test_attaching_marks_a_sleeper_to_be_woken(manager: Manager) -> None:
    name = "asleep"
    manager.create(pod(name, MANAGED))
    attach = f"/api/v1/namespaces/{manager.name}/pods/{name}/attach?container=app&stdout=true"

    def attached() -> str | None:
        """Ask to attach, in vain as no node has the pod; return the mark."""
        manager.kubectl("create", "--raw", attach, "--filename=/dev/null")
        found: str | None = manager.pod(name)["metadata"]["annotations"].get(WAKE_REQUESTED)
        return found

    assert attached() is None
    [(label, value)] = ASLEEP.items()
    assert manager.kubectl("label", "pod", name, f"{label}={value}", user=OURS)[0] == 0
    first = attached()
    assert first is not None
    assert attached() != first
    assert {line["name"] for line in manager.lines("wake")} == {name}
    manager.kubectl("delete", "pod", name, "--wait=false")


# Outages.


def test_an_outage_is_no_other_pods_business(manager: Manager) -> None:
    manager.create(pod("before", MANAGED))
    manager.process.send_signal(signal.SIGSTOP)
    try:
        manager.create(pod("other", MANAGED, runtime=None), "--dry-run=server")
        labelled = manager.kubectl("label", "pod", "before", "team=blue")
        deleted = manager.kubectl("delete", "pod", "before")
        status, said = manager.kubectl("create", "--filename=-", stdin=pod("during", MANAGED))
    finally:
        manager.process.send_signal(signal.SIGCONT)
    assert labelled[0] == 0, labelled[1]
    assert deleted[0] == 0, deleted[1]
    assert status != 0
    assert "failed calling webhook" in said
    soon("webhooks that refuse", lambda: _refuses(manager))


# The certificate.


def _bundles(manager: Manager) -> set[str]:
    found = set()
    for kind in ("mutatingwebhookconfiguration", "validatingwebhookconfiguration"):
        hooks = manager.cluster.get(kind, manager.name)["webhooks"]
        found |= {hook["clientConfig"].get("caBundle", "") for hook in hooks}
    return found


def test_an_upgrade_that_takes_the_trust_away_is_repaired(manager: Manager) -> None:
    [before] = _bundles(manager)
    secret = manager.cluster.get("secret", "architect-manager-tls", f"--namespace={manager.name}")
    assert secret["data"]["ca.crt"] == before
    patch = [{"op": "remove", "path": "/webhooks/0/clientConfig/caBundle"}]
    kind = "validatingwebhookconfiguration"
    words = ("patch", kind, manager.name, "--type=json", f"--patch={json.dumps(patch)}")
    manager.cluster.kubectl(*words)
    until("the caBundle to be back", lambda: _bundles(manager) == {before}, 20.0, poll_s=0.2)
    soon("webhooks that refuse", lambda: _refuses(manager))


def test_a_lost_secret_is_written_again(manager: Manager) -> None:
    where = ("secret", "architect-manager-tls", f"--namespace={manager.name}")
    before = manager.cluster.get(*where)["data"]
    manager.cluster.kubectl("delete", *where)

    def there() -> bool:
        with contextlib.suppress(ClusterError):
            return bool(manager.cluster.get(*where)["data"] == before)
        return False

    until("the Secret to be back", there, 20.0, poll_s=0.2)


def test_its_keys_are_in_no_log(manager: Manager) -> None:
    data = manager.cluster.get("secret", "architect-manager-tls", f"--namespace={manager.name}")
    text = manager.log.read_text()
    assert "PRIVATE" not in text
    assert data["data"]["tls.key"] not in text
    # Nor is there anything else than lines of its own.
    assert all(line.startswith('{"time"') for line in text.splitlines())


def test_it_stays_small(manager: Manager) -> None:
    status = Path(f"/proc/{manager.process.pid}/status").read_text()
    [kib] = [int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")]
    assert kib < 60 * 1024, f"{kib} KiB"
