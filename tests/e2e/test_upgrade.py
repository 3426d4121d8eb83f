"""helm upgrade and helm uninstall, with pods asleep; the chart is there again afterwards."""

from functools import partial

import pytest

from bench.valkey import Valkey
from tests.cluster import install
from tests.cluster.base import ClusterError
from tests.e2e.site import NODES, PORT, PREFIX, STATUS, Site, managing, pod, soon

pytestmark = pytest.mark.cluster

SLEEPERS = 20


def test_upgrade_and_removal(site: Site) -> None:
    names = [f"app{number}" for number in range(SLEEPERS)]
    site.apply(*(pod(name, notes=managing(seconds=1)) for name in names))
    clients: dict[str, Valkey] = {}
    for name in names:
        made = soon(f"{name} to be ready", partial(site.ready, name))
        clients[name] = Valkey(made["status"]["podIP"], PORT)
        clients[name]("SET", "name", name)
    for name in names:
        site.asleep(name)

    # Another version of the daemon, as far as Kubernetes can tell.
    generation = _generation(site)
    words = ("upgrade", install.RELEASE, install.CHART, f"--namespace={install.NAMESPACE}")
    value = "--set=architectdResources.requests.cpu=21m"
    install.helm(site.cluster, *words, "--reuse-values", value, "--wait", "--timeout=4m")
    assert _generation(site) > generation
    status = ("rollout", "status", "daemonset/architectd", "--namespace=architect")
    site.cluster.kubectl(*status, timeout_s=120)
    for name in names:
        assert site.state(name) == "SCALED_DOWN"
    for name in names[::2]:
        assert clients[name]("GET", "name") == name.encode()

    # Removal wakes what sleeps first.
    for name in names:
        site.asleep(name)
    install.uninstall(site.cluster)
    for name in names:
        labels = site.pod(name)["metadata"]["labels"]
        assert STATUS + "valkey" not in labels
        assert PREFIX + "cpu-requests" not in site.pod(name)["metadata"]["annotations"]
    for name in names:
        assert clients[name]("GET", "name") == name.encode()
        clients[name].close()
        assert site.restarts(name) == 0
    # Handler and programs outlive their last container.
    for node in NODES:
        number = int(node.removeprefix("k8n"))
        assert site.cluster.node(number).path("/usr/local/lib/architect/libexec/keeper").exists()
    site.kubectl("delete", "pods", "--all", "--wait=true", timeout_s=120)
    # Installed again it works as before, with what was left there.
    install.install(site.cluster)
    site.start(pod("again"))
    site.asleep("again")
    site.kubectl("delete", "pods", "--all", "--wait=true", timeout_s=120)
    install.uninstall(site.cluster)
    for node in NODES:
        _is_clean(site, node)
    # For the tests that follow.
    install.install(site.cluster)


def _generation(site: Site) -> int:
    found = site.cluster.get("daemonset", "architectd", "--namespace=architect")
    generation: int = found["metadata"]["generation"]
    return generation


def _is_clean(site: Site, node: str) -> None:
    inside = site.cluster.node(int(node.removeprefix("k8n")))

    def clean() -> bool:
        config = inside.path("/etc/containerd/config.toml").read_text()
        there = inside.path("/usr/local/lib/architect").exists()
        return "runc-architect" not in config and not there

    try:
        soon(f"{node} to be as it was before", clean, 60)
    except ClusterError:
        print(inside.run("ls", "-R", "/usr/local/lib/architect", "/run/architect"))
        raise
