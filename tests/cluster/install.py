"""architect on the cluster, as its users put it there: the chart, by helm, with its defaults.

Called by `make cluster-install` and by the end-to-end tests.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

from common import BUILD, REPOSITORY, say
from tests.cluster import machine
from tests.cluster.base import run
from tests.cluster.cluster import Cluster
from tests.cluster.settings import node_name

CHART: Final = REPOSITORY / "charts/architect"
NAMESPACE: Final = "architect"
RELEASE: Final = "architect"
NODE_LABEL: Final = "architect.loopholelabs.io/node=true"
CRITICAL_LABEL: Final = "architect.loopholelabs.io/critical-node=true"
WORKLOADS: Final = (
    "daemonset/architectd",
    "daemonset/architect-router",
    "deployment/architect-manager",
    "deployment/architect-control-plane",
)
_BUILD_S: Final = 900.0
_HELM_S: Final = 300.0


def image() -> Path:
    """The archive of the components' image, of what is in the tree now."""
    script = REPOSITORY / "scripts/component_image.py"
    run(sys.executable, script, timeout_s=_BUILD_S)
    (archive,) = (BUILD / "images").glob("architect-*.tar")
    return archive


def helm(cluster: Cluster, *words: str | Path, timeout_s: float = _HELM_S) -> str:
    """Run helm on the cluster; return what it printed. Raises ClusterError with what it said."""
    env = machine.environment(cluster.home) | {
        "KUBECONFIG": str(cluster.control_plane.admin),
        "HOME": str(cluster.home),
    }
    fix = "`kubectl get pods,events -n architect` shows what it waited for"
    return run(cluster.programs.helm / "helm", *words, env=env, timeout_s=timeout_s, fix=fix)


def install(cluster: Cluster, *settings: str, critical: int | None = None) -> None:
    """Load the image, label the nodes, and `helm upgrade --install` the chart; wait for its pods.

    All nodes are labelled for managed pods but the ``critical`` one, by default the last of several,
    which gets the other components. Raises ClusterError.
    """
    archive = image()
    cluster.load(archive)
    numbers = cluster.nodes_up()
    critical = numbers[-1] if critical is None else critical
    workers = [number for number in numbers if number != critical] or numbers
    names = [node_name(number) for number in workers]
    cluster.kubectl("label", "nodes", "--overwrite", *names, NODE_LABEL)
    cluster.kubectl("label", "nodes", "--overwrite", node_name(critical), CRITICAL_LABEL)
    words: list[str | Path] = ["upgrade", "--install", RELEASE, CHART, f"--namespace={NAMESPACE}"]
    words += ["--create-namespace", "--wait", "--timeout=4m"]
    before = helm(cluster, "list", f"--namespace={NAMESPACE}", "--short").split()
    helm(cluster, *words, *(f"--set={one}" for one in settings))
    if RELEASE in before:
        # The version is the same, but what is in the image may not be.
        for workload in WORKLOADS:
            cluster.kubectl("rollout", "restart", workload, f"--namespace={NAMESPACE}")
        for workload in WORKLOADS:
            cluster.kubectl("rollout", "status", workload, f"--namespace={NAMESPACE}")
    say("cluster", f"architect is installed; managed pods run on {', '.join(names)}")


def uninstall(cluster: Cluster) -> None:
    """`helm uninstall`, which wakes what sleeps first. Raises ClusterError."""
    helm(cluster, "uninstall", RELEASE, f"--namespace={NAMESPACE}", "--wait")
