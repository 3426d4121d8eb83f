"""example-go, the quick start's first example: its chart with the real helm, its program in a pod.

Here it is an ordinary pod, without a runtime class: that it hibernates is tested where architect is
installed in the cluster.
"""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from lightkube.codecs import load_all_yaml

from architect.contract.annotations import PREFIX, Monitor, parse
from architect.contract.durations import SECOND
from architect.contract.kubernetes import RUNC_CLASS
from common import REPOSITORY, Failure
from tests.cluster import images, machine
from tests.cluster.base import ClusterError, run
from tests.cluster.cluster import Cluster
from tests.cluster.objects import pods
from tests.cluster.settings import Programs

pytestmark = pytest.mark.cluster

CHART: Final = REPOSITORY / "charts" / "example-go"
IMAGE: Final = "localhost/architect-example-go:1"
NAME: Final = "example-go"
SELECTOR: Final = f"app={NAME}"
HELM_S: Final = 90.0

Helm = Callable[..., str]


@pytest.fixture(scope="module")
def helm(programs: Programs, tmp_path_factory: pytest.TempPathFactory) -> Helm:
    """Helm, without a cluster."""
    home = tmp_path_factory.mktemp("helm")

    def call(*words: str | Path) -> str:
        return run(programs.helm / "helm", *words, env={"HOME": str(home)})

    return call


def rendered(helm: Helm, *more: str) -> dict[str, dict[str, Any]]:
    """The chart's objects by kind, as a release of the chart's own name."""
    text = helm("template", NAME, CHART, *more)
    found = [one.to_dict() for one in load_all_yaml(text)]  # type: ignore[no-untyped-call]
    return {one["kind"]: one for one in found}


def test_the_chart_is_in_order(helm: Helm) -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", CHART)


def test_its_pods_are_managed_and_hibernate_after_ten_seconds(helm: Helm) -> None:
    template = rendered(helm)["Deployment"]["spec"]["template"]
    assert template["metadata"]["labels"]["app"] == NAME
    assert template["spec"]["runtimeClassName"] == RUNC_CLASS
    (container,) = template["spec"]["containers"]
    assert (container["name"], container["image"]) == (NAME, IMAGE)
    assert container["imagePullPolicy"] == "IfNotPresent"

    settings = parse(template["metadata"]["annotations"], [NAME])

    assert not settings.warnings
    its = settings.container(NAME)
    assert (its.managed, its.scaledown_ns, its.monitor) == (True, 10 * SECOND, Monitor.PACKETS)


def test_no_probe_goes_on_when_it_has_started(helm: Helm) -> None:
    (container,) = rendered(helm)["Deployment"]["spec"]["template"]["spec"]["containers"]
    assert "startupProbe" in container
    assert not {"livenessProbe", "readinessProbe"} & set(container)


def test_the_service_finds_the_pods_of_its_release_only(helm: Helm) -> None:
    found = rendered(helm)
    labels = found["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert found["Service"]["spec"]["selector"] == labels
    assert labels["app.kubernetes.io/instance"] == NAME
    (port,) = found["Service"]["spec"]["ports"]
    (target,) = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]["ports"]
    assert (port["port"], port["targetPort"]) == (8080, target["name"])
    assert target["containerPort"] == 8080


def test_values_reach_the_objects(helm: Helm) -> None:
    values = "image.tag=2,replicas=3,scaledownDuration=1m30s,networkMonitor=,service.port=80"
    found = rendered(
        helm, "--set", values, "--set", "runtimeClassName=", "--set", "resources.requests.cpu=1"
    )
    spec = found["Deployment"]["spec"]
    assert spec["replicas"] == 3
    (container,) = spec["template"]["spec"]["containers"]
    assert container["image"] == "localhost/architect-example-go:2"
    assert container["resources"]["requests"] == {"cpu": 1, "memory": "64Mi"}
    assert "runtimeClassName" not in spec["template"]["spec"]
    annotations = spec["template"]["metadata"]["annotations"]
    assert annotations[f"{PREFIX}scaledown-durations"] == '{"example-go":"1m30s"}'
    assert f"{PREFIX}network-monitor" not in annotations
    assert found["Service"]["spec"]["ports"][0]["port"] == 80


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ("scaledownDuration=soon", "scaledownDuration"),
        ("networkMonitor=bytes", "networkMonitor"),
        ("replicas=-1", "replicas"),
        ("replica=1", "replica"),
    ],
)
def test_a_bad_value_is_refused_by_name(helm: Helm, value: str, named: str) -> None:
    with pytest.raises(ClusterError, match=rf"{named}'"):
        helm("template", NAME, CHART, "--set", value)


@pytest.fixture(scope="module")
def installed(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The chart in the cluster, as an ordinary pod; return what helm said."""
    folder = tmp_path_factory.mktemp("images")
    try:
        cluster.load(images.saved(IMAGE, folder / "example-go.tar"))
    except Failure as failure:
        pytest.fail(f"{failure}; `make image-example-go` makes it")
    yield in_cluster(cluster, "install", NAME, CHART, "--set", "runtimeClassName=", "--wait")
    in_cluster(cluster, "uninstall", NAME, "--wait")


def in_cluster(cluster: Cluster, *words: str | Path) -> str:
    """Run helm as the cluster's administrator."""
    client = cluster.control_plane
    env = machine.environment(cluster.home) | {"KUBECONFIG": str(client.admin)}
    return run(client.programs.helm / "helm", *words, env=env, timeout_s=HELM_S)


def test_it_counts_requests_in_its_memory(cluster: Cluster, installed: str) -> None:
    (pod,) = pods(cluster, SELECTOR)
    ask = ("exec", pod["metadata"]["name"], "--", "curl", "--silent", "localhost:8080")
    first, second = (cluster.kubectl(*ask) for _ in range(2))
    form = r"hello, request {} since (\d{{4}}-\d\d-\d\dT\d\d:\d\d:\d\dZ)\n"
    start = re.fullmatch(form.format(1), first)
    assert start is not None, first
    assert second == f"hello, request 2 since {start[1]}\n"


def test_the_notes_have_the_next_commands(cluster: Cluster, installed: str) -> None:
    command = re.search(r"^kubectl (exec .*) -- curl localhost:8080$", installed, re.M)
    assert command is not None, installed
    words = [word for word in command[1].split() if word != "-it"]
    assert "hello, request" in cluster.kubectl(*words, "--", "curl", "-s", "localhost:8080")


def test_a_shell_can_be_had_in_it(cluster: Cluster, installed: str) -> None:
    (pod,) = pods(cluster, SELECTOR)
    name = pod["metadata"]["name"]
    assert cluster.kubectl("exec", name, "--", "/bin/sh", "-c", "echo test") == "test\n"
