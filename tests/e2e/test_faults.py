"""Whatever is killed while a pod hibernates or wakes: nothing is lost, and the pod shows the truth again."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable

import pytest

from bench.valkey import Valkey, fill, wrong
from tests.cluster.base import ClusterError
from tests.e2e.site import PORT, PREFIX, Site, container, managing, pod, soon

pytestmark = pytest.mark.cluster

MEGABYTES = 30
AWAY_S = float(os.environ.get("ARCHITECT_API_AWAY_S", "0"))
"""For how long the API server stays away at least; three cycles are always waited for."""
RESOURCES = {"requests": {"cpu": "100m", "memory": "128Mi"}}


def _api(site: Site) -> None:
    site.cluster.control_plane.kill("kube-apiserver")
    site.cluster.control_plane.start_api()
    site.cluster.control_plane.await_api()


def _etcd(site: Site) -> None:
    site.cluster.control_plane.kill("etcd")
    site.cluster.control_plane.start_api()
    site.cluster.control_plane.await_api()


def _kubelet(site: Site) -> None:
    site.cluster.node(1).kill("kubelet")


def _containerd(site: Site) -> None:
    site.cluster.node(1).kill("containerd")


def _old_containerd(site: Site) -> None:
    site.cluster.node(2).kill("containerd")


def _component(site: Site, app: str, node: str = "") -> None:
    """Kills a component's process where its pod is; the kubelet starts it again."""
    fields = f"--field-selector=spec.nodeName={node}" if node else "--field-selector="
    found = site.cluster.get("pods", "--namespace=architect", f"--selector=app={app}", fields)
    for one in found["items"]:
        status = one["status"]["containerStatuses"][0]
        id_ = status["containerID"].rpartition("/")[2]
        site.killed.add(id_)
        number = int(one["spec"]["nodeName"].removeprefix("k8n"))
        site.cluster.node(number).run(
            "/opt/containerd/ctr", "-n", "k8s.io", "tasks", "kill", "--signal", "KILL", id_
        )


def _manager(site: Site) -> None:
    _component(site, "architect-manager")


def _control_plane(site: Site) -> None:
    _component(site, "architect-control-plane")


def _daemon(site: Site) -> None:
    _component(site, "architectd", "k8n1")


VICTIMS: dict[str, Callable[[Site], None]] = {
    "apiserver": _api,
    "etcd": _etcd,
    "kubelet": _kubelet,
    "containerd": _containerd,
    "containerd 1.7": _old_containerd,
    "manager": _manager,
    "control-plane": _control_plane,
    "architectd": _daemon,
}


@pytest.mark.parametrize("victim", VICTIMS)
def test_killed_amid_hibernation_and_wake(site: Site, victim: str) -> None:
    node = "k8n2" if victim == "containerd 1.7" else "k8n1"
    here = {"nodeSelector": {"kubernetes.io/hostname": node}}
    site.start(pod("app", [container(resources=RESOURCES)], managing(seconds=1), **here))
    client = site.connect("app")
    keys = fill(client, MEGABYTES)
    address = site.pod("app")["status"]["podIP"]

    # Amid a hibernation: it begins a second after the last packet.
    def hibernates() -> bool:
        return site.rows(node)[0]["state"] in ("SCALING_DOWN", "SCALED_DOWN")

    soon("the hibernation to begin", hibernates)
    VICTIMS[victim](site)
    assert wrong(client, keys) == 0

    # Amid a wake.
    site.await_components()
    soon("it to hibernate", lambda: site.rows(node)[0]["state"] == "SCALED_DOWN", 60)
    other: list[object] = []

    def ask() -> None:
        fresh = Valkey(address, PORT)
        other.append(fresh("PING"))
        fresh.close()

    asking = threading.Thread(target=ask)
    asking.start()
    VICTIMS[victim](site)
    asking.join(40)
    assert other == [b"PONG"]
    assert wrong(client, keys) == 0

    site.await_components()
    # And the pod shows the truth again, in both directions.
    soon("it to hibernate", lambda: site.rows(node)[0]["state"] == "SCALED_DOWN", 60)
    site.asleep("app")
    site.settled("app", "0", "1")
    assert wrong(client, keys) == 0
    site.awake("app")
    assert site.restarts("app") == 0
    client.close()


def test_hibernates_and_wakes_while_the_api_is_away(site: Site) -> None:
    here = {"nodeSelector": {"kubernetes.io/hostname": "k8n1"}}
    site.start(pod("app", [container(resources=RESOURCES)], managing(seconds=1), **here))
    client = site.connect("app")
    site.asleep("app")
    site.cluster.control_plane.kill("kube-apiserver")
    end = time.monotonic() + AWAY_S
    rounds = 0
    try:
        while rounds < 3 or time.monotonic() < end:
            began = time.monotonic()
            assert client("INCR", "rounds") == rounds + 1
            assert time.monotonic() - began < 5
            rounds += 1
            soon("it to hibernate", lambda: site.rows("k8n1")[0]["state"] == "SCALED_DOWN")
        client("SET", "while", "away")
    finally:
        site.cluster.control_plane.start_api()
        site.cluster.control_plane.await_api()
    site.asleep("app")
    site.settled("app", "0", "1")
    # What happened meanwhile is told; up to half a minute lies between two tries.
    assert soon("the events", lambda: site.events("app", "ScaledUp"), 90)
    assert client("GET", "while") == b"away"
    client.close()


@pytest.mark.parametrize("awake", [False, True], ids=["asleep", "awake"])
def test_a_killed_shim_leaves_nothing_of_its_container(site: Site, awake: bool) -> None:
    here = {"nodeSelector": {"kubernetes.io/hostname": "k8n1"}}
    notes = managing(seconds=600 if awake else 2)
    site.start(pod("app", [container(resources=RESOURCES)], notes, **here))
    if not awake:
        site.asleep("app")
    node = site.cluster.node(1)
    status = site.pod("app")["status"]["containerStatuses"][0]
    id_ = status["containerID"].rpartition("/")[2]
    keeper = node.run("pgrep", "--oldest", "--full", f"libexec/keeper .*{id_}").strip()
    shim = node.run("ps", "-o", "ppid=", "-p", keeper).strip()
    node.run("kill", "-KILL", shim)
    soon(
        "the kubelet to start it again", lambda: site.restarts("app") > 0 and site.ready("app"), 90
    )
    soon("the old one's files to go", lambda: not _left(site, id_))
    soon("the old one's end", lambda: not _processes(site, id_))
    # And it is managed as before.
    site.kubectl("annotate", "pod", "app", "--overwrite", *_as_words(managing(seconds=2)))
    site.asleep("app")
    client = site.connect("app")
    assert client("PING") == b"PONG"
    client.close()


def test_power_failure_of_a_node(site: Site) -> None:
    here = {"nodeSelector": {"kubernetes.io/hostname": "k8n1"}}
    site.start(pod("app", [container(resources=RESOURCES)], **here))
    site.asleep("app")
    site.settled("app", "0", "1")
    id_ = site.rows("k8n1")[0]["id"]
    # Started anew it is to be found awake, however long everything else takes to come back.
    site.kubectl("annotate", "pod", "app", "--overwrite", *_as_words(managing(seconds=600)))
    site.cluster.crash(1)
    site.cluster.boot(1)
    soon("the container to be started anew", lambda: site.restarts("app") > 0, 120)
    site.await_components()
    soon("its requests to be back", lambda: _requests(site) == RESOURCES["requests"])
    soon("the old checkpoint to go", lambda: not _left(site, id_))
    site.kubectl("annotate", "pod", "app", "--overwrite", *_as_words(managing(seconds=2)))
    site.asleep("app")
    assert site.exec("app", "valkey-cli", "ping") == "PONG"


def _requests(site: Site) -> object:
    return site.pod("app")["spec"]["containers"][0]["resources"]["requests"]


def _as_words(notes: dict[str, str]) -> list[str]:
    return [f"{name}={value}" for name, value in notes.items()]


def _processes(site: Site, id_: str) -> str:
    """Processes of a container on the first node, its program's and ours."""
    # The bracket keeps pgrep's own parent, the shell, out.
    script = f"grep -lsw {id_} /proc/[0-9]*/cgroup || true; pgrep --full 'libexec/[k]eeper .*{id_}' || true"
    return site.cluster.node(1).run("sh", "-c", script).strip()


def _left(site: Site, id_: str) -> str:
    """What the node still has of a container."""
    return site.cluster.node(1).run(
        "find", "/var/lib/architect", "/run/architect", "-path", f"*{id_}*"
    )


def test_pod_that_ends_for_good_leaves_nothing(site: Site) -> None:
    here = {"nodeSelector": {"kubernetes.io/hostname": "k8n1"}}
    site.start(pod("app", **here))
    node = site.cluster.node(1)
    client = site.connect("app")
    client("SET", "secret", "s3cr3t-" * 1000)
    client.close()
    site.asleep("app")
    (id_,) = (row["id"] for row in site.rows("k8n1"))
    modes = node.run(
        "find", "/var/lib/architect/checkpoints", "-path", f"*{id_}*", "-printf", "%m %U %y\\n"
    )
    files = [line for line in modes.splitlines() if line.endswith("f")]
    assert files
    assert set(files) == {"600 0 f"}
    assert node.run("stat", "-c", "%a", "/var/lib/architect/checkpoints").strip() == "700"
    site.kubectl("delete", "pod", "app", "--wait=true")
    soon("its files to go", lambda: not _left(site, id_))


def test_pod_that_reaches_for_ours_is_refused(site: Site) -> None:
    for path in (
        "/run/architect",
        "/run/architect/architectd.sock",
        "/var/lib/architect/checkpoints",
        "/usr/local/lib/architect/libexec",
        "/var/lib",
        "/",
    ):
        volumes = [{"name": "theirs", "hostPath": {"path": path}}]
        message = site.refused(pod("thief", volumes=volumes))
        assert path in message
        assert "volumes" in message


@pytest.mark.parametrize(
    ("path", "refused"),
    [
        ("/run/architect", True),
        ("/var/run//architect/architectd.sock", True),
        ("/var/lib/./architect/checkpoints/", True),
        ("/usr/local/lib/architect/libexec", True),
        ("/var/lib/architectural", False),
        ("/var/lib", False),
    ],
)
def test_pods_of_no_class_of_ours_get_our_directories_neither(
    site: Site, path: str, refused: bool
) -> None:
    volumes = [{"name": "theirs", "hostPath": {"path": path}}]
    thief = pod("thief", notes={}, volumes=volumes)
    del thief["spec"]["runtimeClassName"]
    if refused:
        message = site.refused(thief)
        assert path in message
        assert "volume theirs" in message
    else:
        site.apply(thief)


def test_status_is_written_by_architect_alone(site: Site) -> None:
    forged = pod("app")
    forged["metadata"]["labels"]["status.architect.loopholelabs.io/valkey"] = "SCALED_DOWN"
    assert "status.architect.loopholelabs.io/valkey" in site.refused(forged)
    site.start(pod("app", notes=managing(seconds=600)))
    with pytest.raises(ClusterError, match="cpu-requests"):
        site.kubectl("annotate", "pod", "app", PREFIX + 'cpu-requests={"valkey":"8"}')
