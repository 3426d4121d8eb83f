"""Every kind of workload and every QoS class: hibernates, wakes, keeps what is its own."""

import json
from typing import Any

import pytest

from tests.e2e.site import (
    NODES,
    PORT,
    PREFIX,
    TOOLS,
    Site,
    container,
    managing,
    pod,
    soon,
    template,
)

pytestmark = pytest.mark.cluster


def workload(kind: str, name: str, made: dict[str, Any], **spec: Any) -> dict[str, Any]:
    """A Deployment, StatefulSet or DaemonSet of pods made from `template`."""
    selector = {"matchLabels": {"app": name}}
    return {
        "apiVersion": "apps/v1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"selector": selector, "template": made, **spec},
    }


def test_stateful_set_keeps_its_volume(site: Site) -> None:
    node, folder = NODES[0], f"/mnt/{site.namespace}"
    site.cluster.node(1).run("mkdir", "-p", folder)
    storage = site.namespace
    here = {"key": "kubernetes.io/hostname", "operator": "In", "values": [node]}
    volume = {
        "apiVersion": "v1",
        "kind": "PersistentVolume",
        "metadata": {"name": storage},
        "spec": {
            "capacity": {"storage": "1Gi"},
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage,
            "local": {"path": folder},
            "nodeAffinity": {"required": {"nodeSelectorTerms": [{"matchExpressions": [here]}]}},
        },
    }
    claim = {
        "metadata": {"name": "data"},
        "spec": {
            "accessModes": ["ReadWriteOnce"],
            "storageClassName": storage,
            "resources": {"requests": {"storage": "1Gi"}},
        },
    }
    words = ["valkey-server", "--dir", "/data", "--appendonly", "yes", "--protected-mode", "no"]
    subject = container(args=words, volumeMounts=[{"name": "data", "mountPath": "/data"}])
    database = workload(
        "StatefulSet",
        "db",
        template("db", [subject]),
        serviceName="db",
        volumeClaimTemplates=[claim],
    )
    try:
        site.start(volume, database, app="db")
        client = site.connect("db-0")
        client("SET", "kept", "yes")
        site.asleep("db-0")
        assert site.get("pvc", "data-db-0")["status"]["phase"] == "Bound"
        assert client("GET", "kept") == b"yes"
        # Written through the mount that was there before.
        client("SET", "more", "x" * 5000)
        site.asleep("db-0")
        client.close()
        # Deleted for good and made anew: the volume has everything, the checkpoint is gone.
        site.kubectl("delete", "pod", "db-0", "--wait=true")
        soon("the next db-0", lambda: site.ready("db"))
        again = site.connect("db-0")
        assert again("STRLEN", "more") == 5000
        again.close()
    finally:
        site.kubectl("delete", "statefulset", "db", "--cascade=foreground", "--wait=true")
        site.kubectl("delete", "pvc", "--all")
        site.cluster.kubectl("delete", "pv", storage)


def test_daemon_set(site: Site) -> None:
    # Without it the controller makes pods for all nodes, and those that lack the label stay Pending:
    # it knows nothing of runtime classes.
    nodes: dict[str, Any] = {"nodeSelector": {PREFIX + "node": "true"}}
    site.apply(workload("DaemonSet", "every", template("every", **nodes)))
    site.kubectl("rollout", "status", "daemonset/every")
    names = [one["metadata"]["name"] for one in site.of("every")]
    assert len(names) == len(NODES)
    for name in names:
        site.asleep(name)
        client = site.connect(name)
        assert client("PING") == b"PONG"
        client.close()
        site.awake(name)


def test_job_that_sleeps_still_completes(site: Site) -> None:
    # Waits for a connection, answers it, and ends well.
    program = f"echo done | busybox nc -l -p {PORT} && exit 0"
    worker = container("worker", image=TOOLS, command=["sh", "-c", program])
    made = template("job", [worker], managing(["worker"]), restartPolicy="Never")
    job = {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": "job"},
        "spec": {"template": made, "backoffLimit": 0},
    }
    site.apply(job)
    name = soon("the job's pod", lambda: site.of("job")[0]["metadata"]["name"])
    site.asleep(name, "worker")
    assert site.get("job", "job")["status"].get("active") == 1
    address = site.pod(name)["status"]["podIP"]
    import socket

    with socket.create_connection((address, PORT), 10) as connection:
        assert connection.recv(10) == b"done\n"
    site.kubectl("wait", "--for=condition=Complete", "job/job", "--timeout=30s")
    assert site.pod(name)["status"]["containerStatuses"][0]["state"]["terminated"]["exitCode"] == 0


def test_several_containers_sleep_by_themselves(site: Site) -> None:
    other = container(
        "other",
        args=["valkey-server", "--port", "6380", "--save", "", "--protected-mode", "no"],
        ports=[{"containerPort": 6380}],
    )
    busy = container("busy", image=TOOLS, command=["busybox", "sleep", "600"], ports=[])
    site.start(pod("app", [container(), other, busy], managing(["valkey", "other"])))
    site.asleep("app", "valkey")
    site.asleep("app", "other")
    client = site.connect("app")
    assert client("PING") == b"PONG"
    site.awake("app", "valkey")
    assert site.state("app", "other") == "SCALED_DOWN"
    assert site.state("app", "busy") is None
    client.close()


def test_init_containers_and_sidecars(site: Site) -> None:
    shared: dict[str, Any] = {"volumeMounts": [{"name": "shared", "mountPath": "/shared"}]}
    first = container(
        "first", image=TOOLS, command=["sh", "-c", "echo made >/shared/file"], ports=[], **shared
    )
    side = container(
        "side",
        image=TOOLS,
        command=["sh", "-c", "while :; do date >/shared/alive; sleep 1; done"],
        ports=[],
        restartPolicy="Always",
        **shared,
    )
    volumes = [{"name": "shared", "emptyDir": {}}]
    site.start(pod("app", [container(**shared)], initContainers=[first, side], volumes=volumes))
    site.asleep("app")
    assert site.exec("app", "cat", "/shared/file") == "made"
    site.asleep("app")
    assert site.exec("app", "busybox", "cat", "/shared/file", container="side") == "made"
    assert site.state("app") == "SCALED_DOWN"


@pytest.mark.parametrize(
    ("quality", "resources", "asleep"),
    [
        (
            "Guaranteed",
            {k: {"cpu": "300m", "memory": "96Mi"} for k in ("requests", "limits")},
            None,
        ),
        (
            "Burstable",
            {"requests": {"cpu": "300m", "memory": "96Mi"}, "limits": {"memory": "128Mi"}},
            ("0", "1"),
        ),
        ("Burstable", {"requests": {"cpu": "300m", "memory": "96Mi"}}, ("0", "1")),
        ("Burstable", {"requests": {"memory": "96Mi"}}, None),
        ("BestEffort", {}, None),
    ],
    ids=["guaranteed", "limited", "requests", "memory", "best-effort"],
)
def test_quality_of_service_stays(
    site: Site, quality: str, resources: dict[str, Any], asleep: tuple[str, str] | None
) -> None:
    made = site.start(pod("app", [container(resources=resources)]))
    assert made["status"]["qosClass"] == quality
    client = site.connect("app")
    client("SET", "big", "x" * 30_000_000)
    for _ in range(3):
        sleeping = site.asleep("app")
        assert sleeping["status"]["qosClass"] == quality
        if asleep:
            site.settled("app", *asleep)
        elif quality != "BestEffort":
            soon(
                "less to be requested",
                lambda: (
                    site.pod("app")["spec"]["containers"][0]["resources"]["requests"]
                    != resources["requests"]
                ),
            )
        assert client("STRLEN", "big") == 30_000_000
        site.awake("app")
        soon(
            "the requests to be back",
            lambda: (
                client("PING")
                and site.pod("app")["spec"]["containers"][0]["resources"].get("requests", {})
                == resources.get("requests", {})
            ),
        )
    assert site.restarts("app") == 0
    assert PREFIX + "cpu-requests" not in site.pod("app")["metadata"]["annotations"]
    client.close()


def test_horizontal_autoscaler_scales_what_sleeps(site: Site) -> None:
    labels = {"app": "web"}
    site.start(
        workload(
            "Deployment",
            "web",
            template("web", [container(resources={"requests": {"cpu": "100m"}})]),
            replicas=1,
        ),
        app="web",
    )
    scaler = {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "web", "labels": labels},
        "spec": {
            "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "web"},
            "minReplicas": 2,
            "maxReplicas": 3,
            "metrics": [
                {
                    "type": "Resource",
                    "resource": {
                        "name": "cpu",
                        "target": {"type": "AverageValue", "averageValue": "80m"},
                    },
                }
            ],
        },
    }
    site.apply(scaler)
    soon("a second replica", lambda: len(site.of("web")) == 2, 60)
    for one in site.of("web"):
        site.asleep(one["metadata"]["name"])
    assert len(site.of("web")) == 2


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("hostNetwork", True, "hostNetwork"),
        ("hostPID", True, "hostPID"),
        ("shareProcessNamespace", True, "shareProcessNamespace"),
    ],
)
def test_what_cannot_be_checkpointed_is_refused(
    site: Site, field: str, value: bool, says: str
) -> None:
    message = site.refused(pod("app", **{field: value}))
    assert says in message
    assert json.loads(site.kubectl("get", "pods", "-o", "json"))["items"] == []
    # The same without managed containers is nobody's business.
    site.apply(pod("app", notes={}, **{field: value}))
