"""What users do that deletes pods: drains move all of a node, and what is to end ends as it always did."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from tests.e2e import draining, movers, movingfaults
from tests.e2e.movingfaults import Crowd
from tests.e2e.site import (
    CRITICAL,
    NODES,
    PORT,
    PREFIX,
    TOOLS,
    Site,
    container,
    managing,
    service,
    soon,
)
from tests.e2e.test_wakes import plugin

pytestmark = pytest.mark.cluster

ENDED_S: Final = 40.0
"""Far less than the grace that admission gives to managed pods."""
AWAKE: Final = tuple(f"app-{number}" for number in range(8))
ASLEEP: Final = ("app-8", "app-9")
BOTH: Final = AWAKE[0]
"""Has two replicas and a budget."""
FINALIZER: Final = "example.com/keep"


def _budget(app: str) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": {"name": app},
        "spec": {"minAvailable": 1, "selector": {"matchLabels": {"app": app}}},
    }


def _ways(site: Site, app: str) -> list[movers.Way]:
    """By the address of each pod, and, if there is but one, by the Service's."""
    pods = site.of(app)
    found = [movers.Way(one["metadata"]["name"], one["status"]["podIP"], PORT) for one in pods]
    if len(pods) == 1:
        found.append(movers.Way("service", site.get("service", app)["spec"]["clusterIP"], PORT))
    return found


def _crowd(site: Site, apps: Sequence[str], crowd: Crowd) -> dict[str, list[str]]:
    """Clients to each pod; their keys by app."""
    return {
        app: [crowd.start(f"{app}:{way.name}", way) for way in _ways(site, app)] for app in apps
    }


def _all_there(site: Site, app: str, counts: dict[str, int]) -> None:
    """Each key is in one of the app's pods, with the count that its client has; in each pod is one."""
    found: dict[str, int] = {}
    for one in site.of(app):
        client = site.connect(one["metadata"]["name"])
        here = {key: client("GET", key) for key in counts}
        client.close()
        mine = {key: int(value) for key, value in here.items() if isinstance(value, bytes)}
        assert mine, f"{one['metadata']['name']} has no state"
        assert not mine.keys() & found.keys()
        found |= mine
    assert found == counts


def test_drain_of_ten(site: Site) -> None:
    source, destination = NODES
    apps = {app: 2 if app == BOTH else 1 for app in (*AWAKE, *ASLEEP)}
    made = [movers.deployment(app, count) for app, count in apps.items() if app in AWAKE]
    made += [movers.deployment(app, notes=managing(seconds=2)) for app in ASLEEP]
    services = [service(app, app) for app in apps]
    draining.start(site, source, *made, *services, _budget(BOTH))
    sleepers = {}
    for app in ASLEEP:
        name = site.of(app)[0]["metadata"]["name"]
        sleepers[app] = site.connect(name)
        sleepers[app]("SET", "kept", app)
    with Crowd() as crowd:
        keys = _crowd(site, AWAKE, crowd)
        for app in ASLEEP:
            site.asleep(site.of(app)[0]["metadata"]["name"])
        with draining.drained(site, source) as began:
            draining.elsewhere(site, apps, destination, began)
        counts = crowd.finish()
    draining.migrated(site, apps)
    for app, mine in keys.items():
        _all_there(site, app, {key: counts[key] for key in mine})
    rows = json.loads(plugin(site, "ps", "--namespace", site.namespace, "-o", "json"))
    shown = {row["pod"]: row["state"] for row in rows}
    pods = {one["metadata"]["name"]: app for app in apps for one in site.of(app)}
    assert shown.keys() == pods.keys()
    for name, app in pods.items():
        assert shown[name] == ("SCALED_DOWN" if app in ASLEEP else "RUNNING"), name
    for app, client in sleepers.items():
        name = site.of(app)[0]["metadata"]["name"]
        assert site.asleep(name)["spec"]["nodeName"] == destination
        # A packet of the connection that it had on the other node.
        assert client("GET", "kept") == app.encode()
        site.awake(name)


def test_many_replicas_leave_at_once(site: Site) -> None:
    source, destination = NODES
    draining.start(site, source, movers.deployment("many", 4), service("many", "many"))
    names = sorted(one["metadata"]["name"] for one in site.of("many"))
    for name in names:
        client = site.connect(name)
        client("SET", "from", name)
        client.close()
    with Crowd() as crowd, movers.cordoned(site, source):
        keys = _crowd(site, ["many"], crowd)["many"]
        began = time.monotonic()
        site.kubectl("delete", "pods", "--selector=app=many", "--wait=false")
        draining.elsewhere(site, {"many": 4}, destination, began)
        counts = crowd.finish()
    assert len(counts) == len(keys) == 4
    _all_there(site, "many", counts)
    found = []
    for one in site.of("many"):
        client = site.connect(one["metadata"]["name"])
        value = client("GET", "from")
        assert isinstance(value, bytes)
        found.append(value.decode())
        client.close()
    assert sorted(found) == names


def test_a_session_outlives_its_node(site: Site) -> None:
    """The example of the front page, command by command: no persistence, no replica, and a drain."""
    notes = {
        PREFIX + "managed-containers": '["valkey"]',
        PREFIX + "scaledown-durations": '{"valkey":"10s"}',
        PREFIX + "network-monitor": '{"valkey":"connections"}',
    }
    shell = container("shell", command=["sleep", "infinity"], ports=[])
    user = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "user", "labels": {"app": "user"}},
        "spec": {
            "nodeName": CRITICAL,
            "terminationGracePeriodSeconds": 0,
            "tolerations": [{"operator": "Exists"}],
            "containers": [shell],
        },
    }
    site.apply(user, service("valkey", "valkey"))
    pod = site.start(movers.deployment("valkey", notes=notes), app="valkey")
    soon("the user's pod", lambda: site.ready("user"))

    def asked(*words: str) -> list[str]:
        command = ("valkey-cli", "-h", "valkey", *words)
        return site.exec("user", *command, container="shell").splitlines()

    soon("the Service to answer", lambda: asked("PING") == ["PONG"])
    assert asked("HSET", "session:8f3a", "user", "ada", "cart", "3 items") == ["2"]
    node = pod["spec"]["nodeName"]
    try:
        # Only this one: metrics-server has an emptyDir, which kubectl does not throw away unasked.
        words = ("drain", node, "--ignore-daemonsets", "--pod-selector=app=valkey")
        said = site.kubectl(*words, timeout_s=draining.DRAINED_S)
    finally:
        site.kubectl("uncordon", node)
    assert f"node/{node} drained" in said
    after = soon("it to serve", lambda: site.ready("valkey"))
    assert after["spec"]["nodeName"] != node
    assert asked("HGETALL", "session:8f3a") == ["user", "ada", "cart", "3 items"]
    draining.migrated(site, ["valkey"])


# ---- what ends ------------------------------------------------------------------------------------


@contextlib.contextmanager
def _kept(site: Site, name: str) -> Iterator[None]:
    """The API keeps a pod that has ended for as long as the context, so that it can be looked at."""

    def write(names: list[str] | None) -> None:
        patch = json.dumps({"metadata": {"finalizers": names}})
        site.kubectl("patch", "pod", name, "--type=merge", "--patch", patch)

    write([FINALIZER])
    try:
        yield
    finally:
        write(None)
    soon(f"{name} to be gone", lambda: name not in site.kubectl("get", "pods", "-o", "name"))


def _exit_code(site: Site, name: str) -> int:
    """Waits until a pod's program has ended."""

    def ended() -> dict[str, Any] | None:
        (one,) = site.pod(name)["status"]["containerStatuses"]
        found: dict[str, Any] | None = one["state"].get("terminated")
        return found

    code: int = soon(f"{name} to end", ended, ENDED_S)["exitCode"]
    return code


def _stopped(site: Site) -> list[Path]:
    """What preStop has left, on either node."""
    roots = [site.cluster.node(movingfaults.number(node)).root for node in NODES]
    files = (root / "mnt" / site.namespace / "stopped" for root in roots)
    return [path for path in files if path.exists()]


@pytest.mark.parametrize("how", ["scale-down", "rollout", "deletion"])
def test_what_nobody_replaces_ends_as_ever(site: Site, how: str) -> None:
    hook = {"preStop": {"exec": {"command": ["touch", "/seen/stopped"]}}}
    subject = container(lifecycle=hook, volumeMounts=[{"name": "seen", "mountPath": "/seen"}])
    path = {"path": f"/mnt/{site.namespace}", "type": "DirectoryOrCreate"}
    volumes = [{"name": "seen", "hostPath": path}]
    pod = site.start(
        movers.deployment(
            "ending", containers=[subject], volumes=volumes, terminationGracePeriodSeconds=20
        ),
        app="ending",
    )
    name = pod["metadata"]["name"]
    client = site.connect(name)
    client("SET", "kept", "no")
    client.close()
    logs = movingfaults.Logs(site)
    assert not _stopped(site)
    with _kept(site, name):
        if how == "scale-down":
            site.kubectl("scale", "deployment/ending", "--replicas=0")
        elif how == "deletion":
            site.kubectl("delete", "deployment", "ending", "--wait=false")
        else:
            change = {"spec": {"template": {"metadata": {"annotations": {"round": "2"}}}}}
            words = ("deployment", "ending", "--patch", json.dumps(change))
            site.kubectl("patch", *words)
        # Valkey ends well on SIGTERM; with SIGKILL it would be 137.
        assert _exit_code(site, name) == 0
    assert _stopped(site)
    assert not logs.about(movingfaults.STEPS["offered"])
    assert not movingfaults.checkpoints(site)
    if how == "rollout":
        fresh = movers.moved(site, "ending", pod)["metadata"]["name"]
        again = site.connect(fresh)
        assert again("GET", "kept") is None
        again.close()
        assert not site.events(fresh, "Migrated")
    for one in _stopped(site):
        one.unlink()


def test_scaled_to_zero_while_a_pod_waits_for_its_replacement(site: Site) -> None:
    pod = site.start(movers.deployment("waiting"), service("waiting", "waiting"), app="waiting")
    name = pod["metadata"]["name"]
    client = site.connect(name)
    logs = movingfaults.Logs(site)
    with contextlib.ExitStack() as stack:
        for node in NODES:
            stack.enter_context(movers.cordoned(site, node))
        stack.enter_context(_kept(site, name))
        site.kubectl("delete", "pod", name, "--wait=false")
        logs.wait(movingfaults.STEPS["offered"])
        assert client("PING") == b"PONG"
        site.kubectl("scale", "deployment/waiting", "--replicas=0")
        assert _exit_code(site, name) == 0
    client.close()
    soon("its offer to be taken back", lambda: not movingfaults.checkpoints(site))
    assert not site.of("waiting")


def test_failed_liveness_probe_restarts_in_place(site: Site) -> None:
    probe = {
        "exec": {"command": ["test", "!", "-e", "/tmp/sick"]},
        "periodSeconds": 1,
        "failureThreshold": 1,
        "timeoutSeconds": 10,
    }
    subject = container(
        "app",
        image=TOOLS,
        # It does not end by itself: that it does at all is the user's grace, of two seconds.
        command=["sh", "-c", "trap '' TERM; while :; do sleep 1; done"],
        ports=[],
        livenessProbe=probe,
    )
    notes = managing(["app"], 300, monitor=None)
    pod = site.start(movers.deployment("sick", containers=[subject], notes=notes), app="sick")
    name = pod["metadata"]["name"]
    site.exec(name, "touch", "/tmp/sick", container="app")
    soon("it to be restarted", lambda: site.restarts(name) == 1, ENDED_S)
    again = soon("it to be ready", lambda: site.ready("sick"))
    assert again["metadata"]["uid"] == pod["metadata"]["uid"]
    last = again["status"]["containerStatuses"][0]["lastState"]["terminated"]
    assert last["exitCode"] == 137
    assert not movingfaults.checkpoints(site)


# ---- again and again ------------------------------------------------------------------------------


@pytest.mark.parametrize("moves", [False, True], ids=["ends", "moves"])
def test_deaf_container_that_is_not_managed(site: Site, moves: bool) -> None:
    """It has the user's grace of two seconds, and not the one that admission has given to its pod."""
    deaf = {"name": "deaf", "image": TOOLS, "imagePullPolicy": "Never", "command": ["sleep", "600"]}
    made = movers.deployment("app", containers=[container(), deaf])
    site.start(made, app="app")
    (before,) = site.of("app")
    if not moves:
        site.kubectl("scale", "deployment", "app", "--replicas=0")
    else:
        site.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
        pod = movers.moved(site, "app", before)
        draining.migrated(site, ["app"])
        assert site.exec(pod["metadata"]["name"], "valkey-cli", "PING") == "PONG"
    soon(
        "the pod to be gone",
        lambda: before["metadata"]["name"] not in site.kubectl("get", "pods", "-o", "name"),
        ENDED_S,
    )
