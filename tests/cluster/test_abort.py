"""However `up` ends, `down` leaves nothing: it is killed at instants of all its steps.

Needs a machine without a cluster, and runs before the fixture that makes one (by its name).
"""

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Final

import pytest

from common import BUILD, REPOSITORY
from tests.cluster import machine
from tests.cluster.base import ClusterError, run, until
from tests.cluster.cluster import Cluster
from tests.cluster.settings import HOST_LINK, SWITCH, Options, Programs

pytestmark = pytest.mark.cluster

HOME: Final = BUILD / "test-cluster-aborted"
_STEP_S: Final = 60.0


def reached(step: str) -> bool:
    """Whether `up` has come to a step."""
    network = machine.NAMESPACES / SWITCH
    node = HOME / "nodes/k8n1"
    steps = {
        "state": (HOME / "cluster.json").exists(),
        "switch": network.exists(),
        "certificates": (HOME / "pki/ca.crt").exists(),
        "etcd": (HOME / "log/etcd.log").exists(),
        "node": (node / "root").exists(),
        "namespace": (machine.NAMESPACES / "k8n1").exists(),
        "init": (node / "init.log").exists(),
        "containerd": (node / "root/var/log/containerd.log").exists(),
        "second": (HOME / "nodes/k8n2/init.log").exists(),
        "kubelet": (node / "root/var/log/kubelet.log").exists(),
    }
    return steps[step]


@pytest.mark.parametrize(
    "step",
    [
        "state",
        "switch",
        "certificates",
        "etcd",
        "node",
        "namespace",
        "init",
        "containerd",
        "second",
        "kubelet",
    ],
)
def test_an_up_that_is_killed_leaves_nothing_after_down(programs: Programs, step: str) -> None:
    before = machine.Record.take()
    cluster = Cluster(HOME)
    cluster.down()
    assert machine.leftovers(HOME, None) == []
    environment = {**os.environ, "PYTHONPATH": f"{REPOSITORY}:{REPOSITORY / 'scripts'}"}
    words = ("-m", "tests.cluster", "--dir", str(HOME), "up", "--nodes", "2", "--no-dns")
    with subprocess.Popen(
        [sys.executable, *words],
        cwd=REPOSITORY,
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    ) as up:
        try:
            until(f"step {step}", lambda: reached(step), _STEP_S, poll_s=0.001)
        finally:
            up.send_signal(signal.SIGKILL)
            up.wait(10.0)
            cluster.down()
    assert machine.leftovers(HOME, before) == []


def test_down_without_a_cluster_does_nothing(tmp_path: Path) -> None:
    Cluster(tmp_path / "none").down()
    (tmp_path / "cluster.json.new").touch()
    Cluster(tmp_path).down()
    assert not tmp_path.exists()


def test_down_leaves_a_folder_that_is_no_clusters_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    with pytest.raises(ClusterError, match="is no cluster's folder"):
        Cluster(tmp_path).down()
    assert (tmp_path / "precious").exists()


def test_a_folder_that_overlayfs_cannot_use_is_refused(programs: Programs) -> None:
    with pytest.raises(ClusterError, match="is on tmpfs"):
        Cluster(Path("/dev/shm/architect-test-cluster")).up(Options(), programs)


def test_addresses_that_are_taken_are_refused(programs: Programs) -> None:
    run("ip", "route", "add", "blackhole", "10.78.3.0/25")
    try:
        with pytest.raises(ClusterError, match=r"route to 10\.78\.3\.0/25 by no device"):
            Cluster(HOME).up(Options(), programs)
    finally:
        run("ip", "route", "delete", "blackhole", "10.78.3.0/25")
    assert not HOME.exists()
    assert HOST_LINK not in run("ip", "link")


def test_one_command_at_a_time_changes_the_cluster() -> None:
    with machine.alone(), pytest.raises(ClusterError, match="another command"):
        Cluster(HOME).down()


def test_a_program_that_is_just_being_started_is_ended_too(tmp_path: Path) -> None:
    """`setsid` forks and is gone; its child has the mark, but not while it changes programs."""
    for instant in range(60):
        with subprocess.Popen(
            ["setsid", "--fork", "sleep", "60"], env=machine.environment(tmp_path)
        ):
            threading.Event().wait(instant * 50e-6)
            machine.end_marked(tmp_path)
        assert machine.marked(tmp_path) == {}, f"{instant * 50} µs after its start"
    machine.end_marked(tmp_path)
