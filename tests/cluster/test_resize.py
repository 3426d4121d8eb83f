"""How Kubernetes lets a running pod's requests go to other pods: facts that Architect builds on.

In-place resize (pods/resize) of the very kubelet, scheduler and API server that the cluster runs:
which requests a pod may give back, what is reported, and when others get the room. A new version
of Kubernetes that behaves otherwise fails here.
"""

import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.cluster.objects import pod, soon

pytestmark = pytest.mark.cluster

LABELS: Final = {"set": "resize"}
NODE: Final = "k8n1"
ZERO: Final = {"requests": {"cpu": "0", "memory": "0"}}
LEAST: Final = {"requests": {"cpu": "0", "memory": "1"}}
"""As little as can be given: one byte of memory instead of none."""
REFUSED: Final = "QOS Class may not change"
SMALL: Final = {"cpu": "200m", "memory": "128Mi"}


@pytest.fixture(scope="module")
def large(cluster: Cluster) -> str:
    """A memory request of which the node has room for one."""
    allocatable = cluster.get("node", NODE)["status"]["allocatable"]["memory"]
    assert allocatable.endswith("Ki"), allocatable
    return f"{int(allocatable[:-2]) // 1024 * 6 // 10}Mi"


@pytest.fixture(scope="module")
def subjects(cluster: Cluster, large: str) -> Iterator[str]:
    """One pod of each kind on one node: Burstable with and without limits, and Guaranteed.

    The first takes most of the node's memory; return how much.
    """
    megabytes = int(large.removesuffix("Mi"))
    limits = {"cpu": "500m", "memory": f"{megabytes + 1024}Mi"}
    burst = {"requests": {"cpu": "200m", "memory": large}, "limits": limits}
    given = {
        "burst": burst,
        "only": {"requests": SMALL},
        "full": {"requests": SMALL, "limits": SMALL},
    }
    cluster.apply(*(pod(name, LABELS, NODE, resources=one) for name, one in given.items()))
    cluster.kubectl(
        "wait", "--for=condition=Ready", "pod", "--selector=set=resize", "--timeout=30s"
    )
    second = {"requests": {"memory": large}}
    cluster.apply(pod("second", LABELS, NODE, resources=second))
    yield large
    cluster.kubectl("delete", "pod", "--selector=set=resize", "--grace-period=1")


def resize(cluster: Cluster, name: str, resources: dict[str, Any]) -> None:
    """Ask for other resources of the pod's container. Raises ClusterError where that is refused."""
    patch = {"spec": {"containers": [{"name": "valkey", "resources": resources}]}}
    words = ("--subresource=resize", "--type=strategic", f"--patch={json.dumps(patch)}")
    cluster.kubectl("patch", "pod", name, *words)


def reported(cluster: Cluster, name: str, kind: str, resource: str) -> str | None:
    """What the kubelet says that the container has."""
    statuses = cluster.get("pod", name)["status"]["containerStatuses"]
    found: str | None = statuses[0]["resources"].get(kind, {}).get(resource)
    return found


def condition(cluster: Cluster, name: str, kind: str) -> str | None:
    """The reason of one of the pod's conditions, if it has it."""
    for one in cluster.get("pod", name)["status"].get("conditions", []):
        if one["type"] == kind:
            reason: str | None = one.get("reason")
            return reason
    return None


def phase(cluster: Cluster, name: str) -> str:
    """The pod's phase."""
    found: str = cluster.get("pod", name)["status"]["phase"]
    return found


def test_a_memory_request_of_zero_is_taken_and_frees_nothing(
    cluster: Cluster, subjects: str
) -> None:
    soon("no room", lambda: condition(cluster, "second", "PodScheduled") == "Unschedulable")
    resize(cluster, "burst", ZERO)
    # Both come with one report of the kubelet's, so the memory's is not still on its way.
    soon("no CPU", lambda: reported(cluster, "burst", "requests", "cpu") == "0")
    assert cluster.get("pod", "burst")["spec"]["containers"][0]["resources"]["requests"][
        "memory"
    ] in ("0", 0)
    assert reported(cluster, "burst", "requests", "memory") == subjects
    assert phase(cluster, "second") == "Pending"


def test_a_memory_request_of_one_byte_frees_the_rest(cluster: Cluster, subjects: str) -> None:
    resize(cluster, "burst", LEAST)
    soon("a byte", lambda: reported(cluster, "burst", "requests", "memory") == "1")
    soon("the waiting pod to run", lambda: phase(cluster, "second") == "Running")


def test_a_pod_without_limits_may_give_all_but_a_byte(cluster: Cluster, subjects: str) -> None:
    with pytest.raises(ClusterError, match=REFUSED):
        resize(cluster, "only", ZERO)
    resize(cluster, "only", LEAST)
    soon("a byte", lambda: reported(cluster, "only", "requests", "memory") == "1")


def test_a_guaranteed_pod_gives_with_its_limits_only(cluster: Cluster, subjects: str) -> None:
    with pytest.raises(ClusterError, match=REFUSED):
        resize(cluster, "full", {"requests": {"cpu": "0"}})
    resize(cluster, "full", {"requests": {"cpu": "10m"}, "limits": {"cpu": "10m"}})
    soon("the limit", lambda: reported(cluster, "full", "limits", "cpu") == "10m")


def test_what_is_asked_back_waits_for_room(cluster: Cluster, subjects: str) -> None:
    soon("the waiting pod to run", lambda: phase(cluster, "second") == "Running")
    resize(cluster, "burst", {"requests": {"cpu": "200m", "memory": subjects}})
    soon("a wait", lambda: condition(cluster, "burst", "PodResizePending") == "Deferred")
    assert reported(cluster, "burst", "requests", "memory") == "1"
    cluster.kubectl("delete", "pod", "second", "--grace-period=1")
    soon("room", lambda: reported(cluster, "burst", "requests", "memory") == subjects)


def test_no_container_was_restarted(cluster: Cluster, subjects: str) -> None:
    for name in ("burst", "only", "full"):
        assert cluster.get("pod", name)["status"]["containerStatuses"][0]["restartCount"] == 0
