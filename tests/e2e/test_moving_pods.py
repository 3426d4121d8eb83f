"""What is in a pod that moves: several containers, files of every kind, a Job's work, addresses, a volume."""

from __future__ import annotations

import contextlib
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest

from bench.valkey import Valkey
from tests.cluster.base import run
from tests.e2e import draining, movers
from tests.e2e.movingfaults import other
from tests.e2e.site import (
    NODES,
    PORT,
    PREFIX,
    TOOLS,
    Site,
    container,
    managing,
    service,
    soon,
    template,
)

pytestmark = pytest.mark.cluster

KEPT: Final = (Path(__file__).parent / "programs" / "kept.py").read_text()
TALK_S: Final = 60.0
WORK: Final = """
import time
for number in range(300):
    print(number, flush=True)
    time.sleep(0.1)
"""


def _named(*names: str) -> str:
    return json.dumps(list(names))


def _move(site: Site, app: str) -> dict[str, Any]:
    """Deletes the app's one pod with its node cordoned; returns the pod that has its state."""
    (before,) = site.of(app)
    with movers.cordoned(site, before["spec"]["nodeName"]):
        site.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
        pod = movers.moved(site, app, before)
        movers.gone(site, before)
    assert pod["spec"]["nodeName"] != before["spec"]["nodeName"]
    draining.migrated(site, [app])
    return pod


# ---- several containers ---------------------------------------------------------------------------


def _valkey(name: str, port: int) -> dict[str, Any]:
    words = ["valkey-server", "--port", str(port), "--save", "", "--protected-mode", "no"]
    return container(name, args=words, ports=[{"containerPort": port}])


def test_several_containers_move_as_they_are(site: Site) -> None:
    """One runs, two sleep, of which one is to be woken on arrival; one is not managed, and starts fresh."""
    ports = {"awake": 6379, "asleep": 6380, "woken": 6381}
    plain = container("plain", image=TOOLS, command=["busybox", "sleep", "6000"], ports=[])
    notes = managing(list(ports))
    notes[PREFIX + "scaledown-durations"] = json.dumps(
        {"awake": "300s", "asleep": "2s", "woken": "2s"}
    )
    notes[PREFIX + "postmigration-autoscaleup-containers"] = _named("woken")
    containers = [*(_valkey(name, port) for name, port in ports.items()), plain]
    app = movers.deployment("app", containers=containers, notes=notes)
    pod = site.start(app, service("app", "app"), app="app")
    name, address = pod["metadata"]["name"], pod["status"]["podIP"]
    site.exec(name, "touch", "/tmp/mine", container="plain")
    with contextlib.ExitStack() as stack:
        links = {
            one: stack.enter_context(contextlib.closing(Valkey(address, port)))
            for one, port in ports.items()
        }
        for one, link in links.items():
            link("SET", "name", one)
        site.asleep(name, "asleep")
        site.asleep(name, "woken")
        name = _move(site, "app")["metadata"]["name"]
        assert site.state(name, "awake") == "RUNNING"
        assert site.state(name, "asleep") == "SCALED_DOWN"
        woke = soon(
            "the event", lambda: [one for one in site.events(name, "ScaledUp") if "/woken" in one]
        )
        assert "postmigration" in woke[0]
        for one, link in links.items():
            assert link("GET", "name") == one.encode()
        site.awake(name, "asleep")
    assert site.exec(name, "sh", "-c", "ls /tmp", container="plain") == ""


# ---- files, addresses -----------------------------------------------------------------------------


def _kept(site: Site, address: str, **notes: str) -> dict[str, Any]:
    """A pod with kept.py, which listens on an address."""
    where = {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    subject = container(
        "kept",
        image=TOOLS,
        command=["sh", "-c", f'exec python3 -c "$0" {address} {PORT} /empty', KEPT],
        env=[where],
        volumeMounts=[{"name": "empty", "mountPath": "/empty"}],
        readinessProbe={"tcpSocket": {"port": PORT}, "periodSeconds": 1},
    )
    wanted = managing(["kept"], seconds=300)
    wanted |= {PREFIX + name.replace("_", "-"): value for name, value in notes.items()}
    app = movers.deployment(
        "kept", containers=[subject], notes=wanted, volumes=[{"name": "empty", "emptyDir": {}}]
    )
    return site.start(app, service("kept", "kept"), app="kept")


class Talk(contextlib.AbstractContextManager["Talk"]):
    """A connection to kept.py."""

    def __init__(self, address: str) -> None:
        self._link = socket.create_connection((address, PORT), TALK_S)
        self._replies = self._link.makefile("rb")

    def __exit__(self, *_: object) -> None:
        self._replies.close()
        self._link.close()

    def ask(self) -> dict[str, Any]:
        self._link.sendall(b"\n")
        found: dict[str, Any] = json.loads(self._replies.readline())
        return found


def test_files_of_every_kind_come_along(site: Site) -> None:
    pod = _kept(site, "0.0.0.0", migrate_emptydir_containers=_named("kept"))
    with Talk(pod["status"]["podIP"]) as talk:
        before = talk.ask()
        assert before["number"] == 0
        assert all(before["files"].values()), before
        for asked in (1, 2):
            _move(site, "kept")
            after = talk.ask()
            assert after["number"] == asked
            assert all(after["files"].values()), after
    assert "serving" not in site.kubectl("logs", site.of("kept")[0]["metadata"]["name"])


def test_open_file_in_an_emptydir_that_does_not_move(site: Site) -> None:
    """It ends as it would without us, and says why; nothing of it is lost unsaid."""
    pod = _kept(site, "0.0.0.0")
    name = pod["metadata"]["name"]
    with movers.cordoned(site, pod["spec"]["nodeName"]):
        site.kubectl("delete", "pod", name, "--wait=false")
        fresh = movers.moved(site, "kept", pod)
    (said,) = {*site.events(name, "CannotMove")}
    assert "/empty/log" in said
    assert not site.events(fresh["metadata"]["name"], "Migrated")


def test_listener_at_the_pods_own_address(site: Site) -> None:
    """By annotation it listens on all addresses of the new pod: else nobody would reach it there."""
    pod = _kept(
        site, "$POD_IP",
        migrate_emptydir_containers=_named("kept"),
        rewrite_listener_addresses_containers=_named("kept"),
    )  # fmt: skip
    first = pod["status"]["podIP"]
    with Talk(first) as talk:
        assert talk.ask()["address"] == first
        pod = _move(site, "kept")
        assert talk.ask()["address"] == first
        with Talk(pod["status"]["podIP"]) as new:
            assert new.ask()["address"] == pod["status"]["podIP"]


def test_connections_get_the_pods_new_address(site: Site) -> None:
    """By annotation; the client knows nothing of it, and its rules stay when they are looked at."""
    pod = _kept(
        site, "0.0.0.0",
        migrate_emptydir_containers=_named("kept"),
        rewrite_established_addresses_containers=_named("kept"),
    )  # fmt: skip
    with Talk(pod["status"]["podIP"]) as talk, Talk(_cluster_ip(site)) as by_service:
        assert talk.ask()["address"] == by_service.ask()["address"] == pod["status"]["podIP"]
        for asked in (1, 2):
            pod = _move(site, "kept")
            found = [each.ask() for each in (talk, by_service)]
            assert {one["number"] for one in found} == {asked}
            assert {one["address"] for one in found} == {pod["status"]["podIP"]}


def _cluster_ip(site: Site) -> str:
    address: str = site.get("service", "kept")["spec"]["clusterIP"]

    def answers() -> bool:
        with Talk(address) as talk:
            return bool(talk.ask())

    soon("the Service to answer", answers)
    return address


# ---- a Job ----------------------------------------------------------------------------------------


def test_job_goes_on_elsewhere(site: Site) -> None:
    worker = container("worker", image=TOOLS, command=["python3", "-c", WORK], ports=[])
    made = template("job", [worker], managing(["worker"], 300, monitor=None), restartPolicy="Never")
    spec = {"template": made, "backoffLimit": 2}
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": spec}
    site.apply(job)
    pod = soon("the job to run", lambda: site.ready("job"))
    name = pod["metadata"]["name"]
    soon("its work to begin", lambda: "10" in site.kubectl("logs", name).split())
    with draining.drained(site, pod["spec"]["nodeName"]):
        after = movers.moved(site, "job", pod)
    draining.migrated(site, ["job"])
    site.kubectl("wait", "--for=condition=Complete", "job/job", "--timeout=60s")
    lines = site.kubectl("logs", after["metadata"]["name"]).split()
    # It went on where it was: the new pod's log begins there.
    assert lines[-1] == "299"
    assert 10 <= int(lines[0]) <= 299
    assert [int(one) for one in lines] == list(range(int(lines[0]), 300))
    assert site.get("job", "job")["status"]["succeeded"] == 1


# ---- a volume -------------------------------------------------------------------------------------


@contextlib.contextmanager
def _disk(folder: Path) -> Iterator[str]:
    """A block device that both nodes have, as they would have one of a storage network."""
    image = folder / "disk"
    with image.open("wb") as file:
        file.truncate(64 << 20)
    device = run("losetup", "--find", "--show", str(image)).strip()
    try:
        yield device
    finally:
        soon("the disk to be let go", lambda: run("losetup", "--detach", device) == "")


def test_stateful_set_with_a_volume(site: Site, tmp_path: Path) -> None:
    """The kubelets mount it and let it go, for one node after the other, as they do what CSI has attached."""
    with _disk(tmp_path) as device:
        storage = site.namespace
        nodes = {"key": "kubernetes.io/hostname", "operator": "In", "values": [*NODES]}
        volume = {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": storage},
            "spec": {
                "capacity": {"storage": "50Mi"},
                "accessModes": ["ReadWriteOncePod"],
                "storageClassName": storage,
                "local": {"path": device, "fsType": "ext4"},
                "nodeAffinity": {
                    "required": {"nodeSelectorTerms": [{"matchExpressions": [nodes]}]}
                },
            },
        }
        claim = {
            "metadata": {"name": "data"},
            "spec": {
                "accessModes": ["ReadWriteOncePod"],
                "storageClassName": storage,
                "resources": {"requests": {"storage": "50Mi"}},
            },
        }
        words = ["valkey-server", "--dir", "/data", "--appendonly", "yes", "--protected-mode", "no"]
        subject = container(args=words, volumeMounts=[{"name": "data", "mountPath": "/data"}])
        database = {
            "apiVersion": "apps/v1",
            "kind": "StatefulSet",
            "metadata": {"name": "db"},
            "spec": {
                "selector": {"matchLabels": {"app": "db"}},
                "serviceName": "db",
                "template": template("db", [subject], managing(seconds=300)),
                "volumeClaimTemplates": [claim],
            },
        }
        try:
            pod = site.start(volume, database, service("db", "db"), app="db")
            client = site.connect("db-0")
            for asked in range(1, 4):
                assert client("INCR", "count") == asked
                moved = _move(site, "db")
                assert moved["spec"]["nodeName"] == other(pod["spec"]["nodeName"])
                pod = moved
                # The file that it has open there is the one on the volume.
                client("SET", f"more-{asked}", "x" * 10000)
                assert int(site.exec("db-0", "du", "-sk", "/data").split()[0]) > 10 * asked
            assert client("GET", "count") == b"3"
        finally:
            site.kubectl("delete", "statefulset", "db", "--cascade=foreground", "--wait=true")
            site.kubectl("delete", "pvc", "--all")
            site.cluster.kubectl("delete", "pv", storage)
