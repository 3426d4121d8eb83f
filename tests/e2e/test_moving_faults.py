"""Whatever is killed, cut or full in the middle of a move: one pod has the data, and its clients go on.

A corrupt image is not here: between the freeze and the fetch there are milliseconds, and that a byte that is
another than the source's digest says never counts is tested in tests/unit/test_transfer_troubles.py.

Each component is killed at each step if ARCHITECT_FAULTS is "all", which takes eight minutes; else where
faults have been found.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from bench.valkey import fill, wrong
from tests.cluster import images
from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.e2e import movers, movingfaults
from tests.e2e.movingfaults import STEPS, number
from tests.e2e.site import IMAGE, Site, archive, soon
from tests.e2e.test_wakes import plugin

pytestmark = pytest.mark.cluster

APP = "mover"
MEGABYTES = 50
CUT_S = 10.0
PENDING_S = 20.0
FULL_S = 5.0
BACK_S = 180.0
VICTIMS = ("source", "destination", "control-plane", "apiserver")
ALL = [(victim, step) for victim in VICTIMS for step in STEPS]
SOME = [
    ("source", "fetching"),
    ("destination", "claimed"),
    ("destination", "committed"),
    ("control-plane", "claimed"),
    ("apiserver", "restored"),
]
ROWS = ALL if os.environ.get("ARCHITECT_FAULTS") == "all" else SOME
Kill = Callable[[], None]


@pytest.fixture(scope="module")
def stage(installed: Cluster) -> Iterator[Site]:
    """One deployment for all tests of this file: each of them has it move on."""
    _with_api(installed)
    with Site(installed, "default").within("moving-faults") as site:
        site.await_components()
        movers.client_pods(site)
        yield site


@pytest.fixture
def mover(stage: Site, request: pytest.FixtureRequest) -> Iterator[Site]:
    """Its pod is ready and all components are, whatever the test before has left."""
    before = request.session.testsfailed
    _with_api(stage.cluster)
    stage.await_components()
    stage.apply(movers.deployment(APP), movers.node_port(APP, APP))
    try:
        soon(f"{APP} to be ready", lambda: stage.ready(APP))
    except ClusterError:
        # A test that failed may have left it anywhere between two nodes.
        stage.kubectl("delete", "pods", f"--selector=app={APP}", "--force", "--grace-period=0")
        soon(f"{APP} to be ready", lambda: stage.ready(APP), movingfaults.OUTCOME_S)
    yield stage
    if request.session.testsfailed > before:
        _with_api(stage.cluster)
        for words in (("pods", "-o", "wide"), ("ckpt", "-o", "yaml"), ("events",)):
            print(stage.kubectl("get", *words))


def _with_api(cluster: Cluster) -> None:
    cluster.control_plane.start_api()
    cluster.control_plane.await_api()


def _killer(site: Site, victim: str) -> Kill:
    """What kills it; the pod is where it is before the move."""
    pod = site.ready(APP)
    assert pod is not None
    source = pod["spec"]["nodeName"]
    if victim == "apiserver":
        plane = site.cluster.control_plane

        def api() -> None:
            plane.kill("kube-apiserver")
            _with_api(site.cluster)

        return api
    if victim == "control-plane":
        found = site.cluster.get(
            "pods", "--namespace=architect", "--selector=app=architect-control-plane"
        )
        nodes = {one["spec"]["nodeName"] for one in found["items"]}
        each = [movingfaults.killer(site, "architect-control-plane", node) for node in nodes]

        def control_planes() -> None:
            for kill in each:
                kill()

        return control_planes
    node = source if victim == "source" else movingfaults.other(source)
    return movingfaults.killer(site, "architectd", node)


@pytest.mark.parametrize(("victim", "step"), ROWS)
def test_killed_in_a_move(mover: Site, victim: str, step: str) -> None:
    kill = _killer(mover, victim)
    with movingfaults.scene(mover, APP, f"{victim}-{step}") as scene:
        scene.leave()
        scene.logs.wait(STEPS[step])
        kill()
        scene.outcome()


def _filled(site: Site) -> int:
    """Gives the pod a state that takes a while to travel; returns the number of keys."""
    pod = site.ready(APP)
    assert pod is not None
    client = site.connect(pod["metadata"]["name"])
    if client("EXISTS", "filled"):
        keys = MEGABYTES * 1000
    else:
        keys = fill(client, MEGABYTES)
        client("SET", "filled", "yes")
    client.close()
    return keys


def _whole(site: Site, name: str, keys: int) -> None:
    client = site.connect(name)
    assert wrong(client, keys) == 0
    client.close()


def test_network_is_cut_in_mid_transfer(mover: Site) -> None:
    keys = _filled(mover)
    with movingfaults.scene(mover, APP, "cut") as scene:
        scene.leave()
        scene.logs.wait(STEPS["fetching"])
        movingfaults.unplug(scene.source)
        try:
            # Clients in its own subnet's way wait; that none fails is all that can be asked for.
            movingfaults.holds(CUT_S, scene.crowd.check)
        finally:
            movingfaults.plug(scene.source)
        pod = scene.outcome()
    _whole(mover, pod["metadata"]["name"], keys)


@pytest.mark.parametrize(
    ("side", "folder"),
    [("destination", "arrivals"), ("source", "checkpoints")],
    ids=["destination", "source"],
)
def test_disk_is_full(mover: Site, side: str, folder: str) -> None:
    """The pod serves where it is until there is room.

    What leaves is linked to its images, and lies in the same file system as these: theirs is full.
    """
    keys = _filled(mover)
    with movingfaults.scene(mover, APP, f"full-{side}") as scene:
        node = scene.source if side == "source" else scene.destination
        with movingfaults.full(mover, node, folder):
            scene.leave()
            scene.logs.wait('"what": "not arrived"')
            scene.crowd.served(FULL_S)
            assert not scene.logs.about(STEPS["committed"])
        pod = scene.outcome()
    _whole(mover, pod["metadata"]["name"], keys)


def test_replacement_stays_pending(mover: Site) -> None:
    with (
        movingfaults.scene(mover, APP, "pending") as scene,
        movers.cordoned(mover, scene.destination),
    ):
        scene.leave()
        scene.logs.wait(STEPS["offered"])
        scene.crowd.served(PENDING_S)
        (waiting,) = mover.of(APP)
        assert waiting["status"]["phase"] == "Pending"
        assert "nodeName" not in waiting["spec"]
        assert set(movingfaults.phases(mover).values()) - {"Restored"} == {"Available"}
        listed = plugin(mover, "checkpoints", "--namespace", mover.namespace, "-o", "json")
        offered = [one for one in json.loads(listed) if one["status"]["phase"] == "Available"]
        assert [one["spec"]["podName"] for one in offered] == [scene.pod["metadata"]["name"]]
        mover.kubectl("uncordon", scene.destination)
        pod = scene.outcome()
        assert pod["metadata"]["uid"] == waiting["metadata"]["uid"]


def test_image_comes_late(mover: Site, tmp_path: Path) -> None:
    """As with a pull that takes minutes: the pod serves where it is, though its state is claimed."""
    saved = images.saved(IMAGE, archive(tmp_path, IMAGE))
    with movingfaults.scene(mover, APP, "image") as scene:
        node = number(scene.destination)
        machine = mover.cluster.node(node)
        machine.run("/opt/containerd/ctr", "-n", "k8s.io", "images", "rm", "--sync", IMAGE)
        try:
            scene.leave()
            soon("the image to be missed", lambda: "ErrImageNeverPull" in str(mover.of(APP)))
            scene.crowd.served(PENDING_S)
            assert set(movingfaults.phases(mover).values()) - {"Restored"} == {"Claimed"}
        finally:
            mover.cluster.load(saved, [node])
        scene.outcome()


def test_source_loses_power_after_the_commit(mover: Site) -> None:
    # Who is not in the cluster reaches both pods and Services by a node of it, and that may be this one.
    with movingfaults.scene(mover, APP, "power-after", places=("k8n3",)) as scene:
        lost = number(scene.source)
        scene.leave()
        scene.logs.wait(STEPS["committed"])
        mover.cluster.crash(lost)
        try:
            pod = scene.arrived()
            movingfaults.consistent(mover, pod, scene.crowd.finish())
        finally:
            mover.cluster.boot(lost)
            mover.cluster.await_ready([lost])
        movers.gone(mover, scene.pod)
        mover.await_components()
        scene.nothing_left()
    # And it is as it was once the node is back.
    assert soon("the pod", lambda: mover.ready(APP))["metadata"]["uid"] == pod["metadata"]["uid"]


def test_source_loses_power_before_the_commit(mover: Site) -> None:
    """Memory is lost with the power, as without us; a pod has to be there all the same."""
    ready = mover.ready(APP)
    assert ready is not None
    client = mover.connect(ready["metadata"]["name"])
    client("SET", "before", "power")
    client.close()
    with movingfaults.scene(mover, APP, "power-before", places=()) as scene:
        lost = number(scene.source)
        scene.leave()
        scene.logs.wait(STEPS["claimed"])
        # A power failure takes the test a second, a cable does not: nothing gets out any more.
        movingfaults.unplug(scene.source)
        committed = bool(scene.logs.about(STEPS["committed"]))
        mover.cluster.crash(lost)
        mover.cluster.boot(lost)
        mover.cluster.await_ready([lost])
        pod = scene.arrived(BACK_S)
        assert pod["spec"]["nodeName"] == scene.destination
        fresh = mover.connect(pod["metadata"]["name"])
        assert fresh("GET", "before") == (b"power" if committed else None)
        assert fresh("SET", "after", "power") == b"OK"
        fresh.close()
        movers.gone(mover, scene.pod)
        mover.await_components()
        scene.nothing_left()
