"""Edits of a live pod's annotations take effect without a restart, in both directions."""

import contextlib
import json

import pytest

from tests.cluster.base import ClusterError
from tests.e2e.site import PREFIX, STATUS, Site, container, managing, pod, soon

pytestmark = pytest.mark.cluster

MANAGED = PREFIX + "managed-containers"
DURATIONS = PREFIX + "scaledown-durations"


def annotate(site: Site, name: str, **values: str | None) -> None:
    words = [
        f"{PREFIX}{key.replace('_', '-')}" + ("-" if value is None else f"={value}")
        for key, value in values.items()
    ]
    site.kubectl("annotate", "--overwrite", "pod", name, *words)


def checkpoints(site: Site, node: str) -> list[str]:
    found = site.cluster.node(int(node.removeprefix("k8n"))).run(
        "ls", "/var/lib/architect/checkpoints/"
    )
    return found.split()


def test_another_duration_holds_at_once(site: Site) -> None:
    site.start(pod("app", notes=managing(seconds=600)))
    annotate(site, "app", scaledown_durations='{"valkey": "1s"}')
    site.asleep("app")
    # And a longer one for one that sleeps: it wakes, and stays awake.
    annotate(site, "app", scaledown_durations='{"valkey": "10m"}')
    client = site.connect("app")
    assert client("PING") == b"PONG"
    site.awake("app")
    node = site.pod("app")["spec"]["nodeName"]
    assert soon("it to be idle for 3 s", lambda: site.rows(node)[0]["idle_s"] > 3)
    assert site.state("app") == "RUNNING"
    client.close()


@pytest.mark.parametrize("value", ["[]", None], ids=["empty", "removed"])
def test_one_that_is_no_longer_managed_wakes_and_stays_awake(site: Site, value: str | None) -> None:
    resources = {"requests": {"cpu": "100m", "memory": "64Mi"}}
    site.start(pod("app", [container(resources=resources)]))
    node = site.pod("app")["spec"]["nodeName"]
    client = site.connect("app")
    client("SET", "kept", "yes")
    before = len(checkpoints(site, node))
    site.asleep("app")
    assert len(checkpoints(site, node)) > before
    if value is None:
        # What depends on it goes with it, or admission would refuse the rest.
        names = ("managed_containers", "scaledown_durations", "network_monitor")
        annotate(site, "app", **dict.fromkeys(names))
    else:
        # What is said of a container that is not managed any more is refused with the list, or warned of.
        annotate(
            site, "app", managed_containers=value, scaledown_durations=None, network_monitor=None
        )
    soon("its label to go", lambda: STATUS + "valkey" not in site.pod("app")["metadata"]["labels"])
    site.settled("app", "100m", "64Mi")
    assert not {PREFIX + "cpu-requests"} & set(site.pod("app")["metadata"]["annotations"])
    soon("its checkpoint to go", lambda: len(checkpoints(site, node)) == before)
    assert client("GET", "kept") == b"yes"
    assert site.rows(node) == []
    # Managed again, without a restart.
    again = {key.removeprefix(PREFIX).replace("-", "_"): one for key, one in managing().items()}
    annotate(site, "app", **again)
    site.asleep("app")
    assert client("GET", "kept") == b"yes"
    assert site.restarts("app") == 0
    client.close()


def test_one_that_started_unmanaged_is_managed_from_its_next_start(site: Site) -> None:
    other = container("late", ports=[], args=["valkey-server", "--port", "6380", "--save", ""])
    site.start(pod("app", [container(), other]))
    site.asleep("app")
    said = site.kubectl(
        "annotate",
        "--overwrite",
        "pod",
        "app",
        MANAGED + '=["valkey","late"]',
        DURATIONS + '={"valkey":"2s","late":"1s"}',
    )
    assert said
    # It ends, and the kubelet starts it again; with the old annotations if it has not seen the new ones
    # yet, which nobody can ask it.
    for _ in range(5):
        with contextlib.suppress(ClusterError):
            # The session ends with the container that it asks to end.
            site.exec("app", "valkey-cli", "-p", "6380", "shutdown", container="late")
        with contextlib.suppress(ClusterError):
            soon("late to hibernate", lambda: site.state("app", "late") == "SCALED_DOWN", 15)
            break
    site.asleep("app", "late")
    assert json.loads(site.pod("app")["metadata"]["annotations"][MANAGED]) == ["valkey", "late"]


def test_a_bad_value_is_refused_and_changes_nothing(site: Site) -> None:
    site.start(pod("app", notes=managing(seconds=600)))
    for key, bad, says in (
        ("scaledown-durations", '{"valkey": "soon"}', "soon"),
        ("scaledown-durations", "1s", "JSON"),
        ("managed-containers", '["valkye"]', "valkye"),
        ("network-monitor", '{"valkey": "paquets"}', "paquets"),
        ("ignore-activity-ports", '{"valkey": [70000]}', "70000"),
    ):
        patch = json.dumps({"metadata": {"annotations": {PREFIX + key: bad}}})
        with pytest.raises(Exception, match=says) as refusal:
            site.kubectl("patch", "pod", "app", "--patch", patch)
        assert PREFIX + key in str(refusal.value)
    assert DURATIONS in site.pod("app")["metadata"]["annotations"]
    node = site.pod("app")["spec"]["nodeName"]
    assert site.rows(node)[0]["state"] == "RUNNING"
