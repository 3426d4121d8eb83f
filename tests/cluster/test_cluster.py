"""What the test cluster promises its users, tried on three nodes: it behaves as a real one.

The tests share one cluster, and those of the first part its valkeys; the last one switches a node
off, and on again.
"""

import os
import re
import select
import subprocess
from collections.abc import Iterator
from typing import Any, Final

import pytest

from bench.valkey import Valkey
from tests.cluster import images, machine, stats
from tests.cluster.base import ClusterError, run
from tests.cluster.cluster import Cluster
from tests.cluster.objects import (
    PORT,
    cli,
    deployment,
    ping_from,
    pods,
    soon,
    stateful_set,
)
from tests.cluster.settings import PAUSE_IMAGE

pytestmark = pytest.mark.cluster

APP: Final = "valkey"
DB: Final = "db"
DB_POD: Final = "db-0"
DB_NODE: Final = 1


def answers(address: str, port: int = PORT) -> bool:
    client = Valkey(address, port, 3.0)
    try:
        return client("PING") == b"PONG"
    finally:
        client.close()


@pytest.fixture(scope="module")
def app(cluster: Cluster) -> Iterator[str]:
    """Two valkeys on two nodes behind a Service; return the Service's address."""
    cluster.apply(*deployment(APP, 2))
    cluster.kubectl("rollout", "status", f"deployment/{APP}", "--timeout=60s")
    address: str = cluster.get("service", APP)["spec"]["clusterIP"]
    yield address
    cluster.kubectl("delete", f"deployment/{APP}", f"service/{APP}")


@pytest.fixture(scope="module")
def db(cluster: Cluster) -> Iterator[str]:
    """A valkey of a StatefulSet, with a local volume; return its pod's name."""
    folder = "/mnt/disk1"
    cluster.node(DB_NODE).run("mkdir", "-p", folder)
    objects = stateful_set(DB, cluster.node(DB_NODE).name, folder)
    cluster.apply(*objects)
    cluster.kubectl("rollout", "status", f"statefulset/{DB}", "--timeout=60s")
    yield DB_POD
    kinds = [f"{one['kind']}/{one['metadata']['name']}" for one in reversed(objects)]
    cluster.kubectl("delete", kinds[0])
    cluster.kubectl("delete", f"pvc/data-{DB_POD}", *kinds[1:])


def test_the_file_to_source_gives_kubectl_and_helm(cluster: Cluster) -> None:
    script = (
        f". {cluster.env}; . {cluster.env}; kubectl get nodes --output=name; helm list; echo $PATH"
    )
    said = run("bash", "-ec", script, env={"PATH": os.environ["PATH"], "HOME": str(cluster.home)})
    assert [line for line in said.splitlines() if line.startswith("node/")] == [
        "node/k8n1",
        "node/k8n2",
        "node/k8n3",
    ]
    assert said.count(f"{cluster.home}/bin") == 1, "sourcing it twice adds it twice"
    version = run(cluster.programs.kubectl, "version", "--client")
    assert re.search(r"v1\.35\.\d+$", version, re.M), version


def test_up_again_changes_nothing(cluster: Cluster) -> None:
    before = [cluster.node(number).pid() for number in cluster.numbers()]
    cluster.up(cluster.options, cluster.programs)
    assert [cluster.node(number).pid() for number in cluster.numbers()] == before


def test_a_deployment_spreads_over_nodes(cluster: Cluster, app: str) -> None:
    assert len({one["spec"]["nodeName"] for one in pods(cluster, f"app={APP}")}) == 2


def test_the_host_and_every_node_reach_a_service(cluster: Cluster, app: str) -> None:
    assert soon("the Service to answer the host", lambda: answers(app))
    for number in cluster.numbers():
        assert ping_from(cluster.node(number), app) == "PONG", f"from node {number}"


def test_a_pod_reaches_pods_and_services_by_address_and_name(cluster: Cluster, app: str) -> None:
    there = pods(cluster, f"app={APP}")
    first = there[0]["metadata"]["name"]
    for one in there:
        assert cli(cluster, first, "-h", one["status"]["podIP"], "PING") == "PONG"
    assert cli(cluster, first, "-h", app, "PING") == "PONG"
    assert soon(
        "DNS", lambda: cli(cluster, first, "-h", f"{APP}.default.svc.cluster.local", "PING")
    )


def test_logs(cluster: Cluster, app: str) -> None:
    name = pods(cluster, f"app={APP}")[0]["metadata"]["name"]
    assert cluster.kubectl("logs", name).count("Ready to accept connections") == 1


def test_port_forward(cluster: Cluster, app: str) -> None:
    name = pods(cluster, f"app={APP}")[0]["metadata"]["name"]
    client = cluster.control_plane
    words = ("port-forward", f"pod/{name}", f":{PORT}", "--address=127.0.0.1")
    with subprocess.Popen(
        [client.programs.kubectl, "--kubeconfig", client.admin, *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=machine.environment(cluster.home),
    ) as forward:
        try:
            assert forward.stdout is not None
            assert select.select([forward.stdout], [], [], 20.0)[0], "port-forward says nothing"
            said = forward.stdout.readline()
            found = re.search(r"127\.0\.0\.1:(\d+)", said)
            assert found is not None, said
            assert answers("127.0.0.1", int(found[1]))
        finally:
            forward.kill()


def test_an_image_is_loaded_in_all_nodes(cluster: Cluster) -> None:
    archive = cluster.programs.pause / "image.tar"
    ctr = ("/opt/containerd/ctr", "-n", "k8s.io", "images")
    cluster.node(3).run(*ctr, "remove", "--sync", PAUSE_IMAGE)
    assert PAUSE_IMAGE not in cluster.node(3).run(*ctr, "list", "--quiet").splitlines()
    assert cluster.load(archive) == images.names(archive) == [PAUSE_IMAGE]
    for number in cluster.numbers():
        assert PAUSE_IMAGE in cluster.node(number).run(*ctr, "list", "--quiet").splitlines()


def test_a_local_volume_survives_its_pod(cluster: Cluster, db: str) -> None:
    assert cli(cluster, db, "SET", "kept", "yes") == "OK"
    before = cluster.get("pod", db)["metadata"]["uid"]
    cluster.kubectl("delete", "pod", db)
    soon("another pod", lambda: cluster.get("pod", db)["metadata"]["uid"] != before)
    cluster.kubectl("wait", "--for=condition=Ready", f"pod/{db}", "--timeout=30s")
    assert cli(cluster, db, "GET", "kept") == "yes"


def other_node(cluster: Cluster) -> str:
    """A node that has a valkey of the Deployment, and not the StatefulSet's."""
    there = {one["spec"]["nodeName"] for one in pods(cluster, f"app={APP}")}
    name: str = min(there - {cluster.node(DB_NODE).name})
    return name


def test_a_drain_empties_a_node(cluster: Cluster, app: str) -> None:
    node = other_node(cluster)
    words = ("--ignore-daemonsets", "--delete-emptydir-data", "--timeout=60s")
    try:
        cluster.kubectl("drain", node, *words)
        listed = cluster.get("pods", "--all-namespaces", f"--field-selector=spec.nodeName={node}")
        assert listed["items"] == []
        cluster.kubectl("rollout", "status", f"deployment/{APP}", "--timeout=60s")
    finally:
        cluster.kubectl("uncordon", node)


def running(cluster: Cluster) -> list[dict[int, str]]:
    """All valkeys of the cluster, with their starts."""
    return [cluster.node(number).processes("valkey-server") for number in cluster.numbers()]


def test_restarts_of_a_nodes_programs_leave_its_pods_alone(
    cluster: Cluster, app: str, db: str
) -> None:
    before = running(cluster)
    assert sum(map(len, before)) == 3
    for number in cluster.numbers():
        node = cluster.node(number)
        for program in ("kubelet", "containerd", "kube-proxy"):
            node.stop(program)
            assert not node.is_healthy(program)
            node.start(program)
            node.await_health(program)
    cluster.node(1).kill("containerd")
    cluster.node(1).kill("kubelet")
    assert soon("exec", lambda: cli(cluster, db, "PING")) == "PONG"
    assert soon("logs", lambda: cluster.kubectl("logs", db))
    assert running(cluster) == before


def test_what_the_programs_use_is_counted(cluster: Cluster, app: str) -> None:
    found = {one.name: one for one in stats.measure(cluster, 0.2)}
    assert {"etcd", "kube-apiserver", "k8n1 kubelet", "k8n3 containerd"} <= set(found)
    assert found["kube-apiserver"].rss > 50 * 2**20
    assert found["k8n2 kubelet"].processes == 1


def endpoints(cluster: Cluster) -> set[Any]:
    """The nodes of the Service's endpoints that are ready."""
    found = cluster.get("endpointslices", f"--selector=kubernetes.io/service-name={APP}")["items"]
    return {
        one["nodeName"]
        for part in found
        for one in part.get("endpoints") or []
        if one["conditions"].get("ready")
    }


def test_a_crashed_node_loses_its_endpoints_and_comes_back(cluster: Cluster, app: str) -> None:
    name = other_node(cluster)
    number = next(n for n in cluster.numbers() if cluster.node(n).name == name)
    # A kubelet that has just begun may call its own node not ready; the pods of one that dies so are
    # never marked as not ready by the node controller, and stay endpoints.
    cluster.await_ready(cluster.numbers())
    assert name in endpoints(cluster)
    cluster.crash(number)
    assert cluster.node(number).processes("valkey-server") == {}
    with pytest.raises(ClusterError, match="it is down"):
        cluster.node(number).run("true")
    soon("the node to count as gone", lambda: name not in cluster.ready(), 60.0)
    soon("its endpoints to go", lambda: name not in endpoints(cluster), 120.0)
    cluster.boot(number)
    cluster.await_ready([number])
    soon("the Service to have both again", lambda: len(endpoints(cluster)) == 2, 60.0)
