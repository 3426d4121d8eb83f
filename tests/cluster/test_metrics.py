"""metrics-server in the cluster: added to one that is up, it answers `kubectl top` for every pod."""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.cluster import build
from tests.cluster.cluster import Cluster
from tests.cluster.objects import pod, soon

pytestmark = pytest.mark.cluster

API: Final = "/apis/metrics.k8s.io/v1beta1"
NAME: Final = "measured"
MEASURED_S: Final = 120.0
"""A node measures a pod every 30 s, and it takes two measurements to know what CPU it uses."""


@pytest.fixture(scope="module")
def metrics(cluster: Cluster) -> Cluster:
    """The cluster, with metrics-server."""
    cluster.add_metrics_server()
    return cluster


@pytest.fixture(scope="module")
def measured(metrics: Cluster) -> Iterator[str]:
    """A pod on the second node; return its name."""
    metrics.apply(pod(NAME, {"app": NAME}, metrics.node(2).name))
    metrics.kubectl("wait", "--for=condition=Ready", f"pod/{NAME}", "--timeout=60s")
    yield NAME
    metrics.kubectl("delete", "pod", NAME)


def usage(cluster: Cluster, path: str) -> Any:
    return json.loads(cluster.kubectl("get", "--raw", f"{API}/{path}"))


def test_it_is_built_at_the_version_it_is_pinned_to() -> None:
    part = build.METRICS_SERVER
    assert f"gitVersion={part.required('sigs.k8s.io/metrics-server')}" in part.link_flags()
    assert (part.source / "go.sum").exists()


def test_top_shows_every_node(metrics: Cluster) -> None:
    names = {metrics.node(number).name for number in metrics.numbers()}

    def shown() -> bool:
        lines = metrics.kubectl("top", "nodes", "--no-headers").splitlines()
        return {line.split()[0] for line in lines if "unknown" not in line} == names

    assert soon("the use of every node", shown, MEASURED_S)


def test_top_shows_what_a_pod_uses(metrics: Cluster, measured: str) -> None:
    said = soon(
        f"the use of {measured}",
        lambda: metrics.kubectl("top", "pod", measured, "--no-headers"),
        MEASURED_S,
    ).split()
    assert said[0] == measured
    assert said[1].endswith("m")
    assert 0 < int(said[2].removesuffix("Mi")) < 100
    (container,) = usage(metrics, f"namespaces/default/pods/{measured}")["containers"]
    assert container["name"] == "valkey"


def test_adding_it_again_changes_nothing(metrics: Cluster) -> None:
    where = ("deployment", "metrics-server", "--namespace=kube-system")
    before = metrics.get(*where)["metadata"]["generation"]
    metrics.add_metrics_server()
    assert metrics.get(*where)["metadata"]["generation"] == before
    assert metrics.options.metrics, "a node that is added would not get the image"
