"""A managed pod hibernates and wakes: what kubectl shows of it, and what nobody notices."""

import json

import pytest

from tests.cluster.base import run
from tests.e2e.site import (
    NODES,
    PORT,
    PREFIX,
    Site,
    container,
    managing,
    pod,
    service,
    soon,
    template,
)

pytestmark = pytest.mark.cluster

RESOURCES = {"requests": {"cpu": "250m", "memory": "512Mi"}}


def test_pod_shows_that_it_hibernates_and_wakes(site: Site) -> None:
    site.start(pod("app", [container(resources=RESOURCES)]))
    asleep = site.asleep("app")
    notes = asleep["metadata"]["annotations"]
    assert json.loads(notes[PREFIX + "cpu-requests"]) == {"valkey": "250m"}
    assert json.loads(notes[PREFIX + "memory-requests"]) == {"valkey": "512Mi"}
    site.settled("app", "0", "1")
    (down,) = soon("the event", lambda: site.events("app", "ScaledDown"))
    assert "idle" in down
    assert " ms)" in down
    # Found as the guide finds it.
    found = site.get("pods", "--selector=status.architect.loopholelabs.io/valkey=SCALED_DOWN")
    assert [one["metadata"]["name"] for one in found["items"]] == ["app"]

    client = site.connect("app")
    assert client("PING") == b"PONG"
    awake = site.awake("app")
    site.settled("app", "250m", "512Mi", client=client)
    notes = awake["metadata"]["annotations"]
    assert not {PREFIX + "cpu-requests", PREFIX + "memory-requests"} & set(notes)
    assert awake["spec"]["containers"][0]["name"] == "valkey"
    (up,) = soon("the event", lambda: site.events("app", "ScaledUp"))
    assert "packet" in up
    assert site.restarts("app") == 0
    client.close()


def test_memory_and_open_connections_survive(site: Site) -> None:
    site.start(pod("app"))
    client = site.connect("app")
    client("SET", "answer", "42")
    for _ in range(3):
        site.asleep("app")
        assert client("INCR", "wakes")
    assert client("GET", "answer") == b"42"
    assert client("GET", "wakes") == b"3"
    client.close()
    assert site.restarts("app") == 0


def test_endpoints_stay_while_it_sleeps(site: Site) -> None:
    site.start(pod("app"), service("app", "app"))
    site.asleep("app")
    (subset,) = site.get("endpointslices", "--selector=kubernetes.io/service-name=app")["items"]
    (endpoint,) = subset["endpoints"]
    assert endpoint["conditions"]["ready"] is True
    assert site.ready("app")


def test_logs_do_not_wake(site: Site) -> None:
    site.start(pod("app"))
    site.asleep("app")
    before = site.rows(site.pod("app")["spec"]["nodeName"])[0]["hibernations"]
    assert "Ready to accept connections" in site.kubectl("logs", "app")
    assert site.state("app") == "SCALED_DOWN"
    (row,) = site.rows(site.pod("app")["spec"]["nodeName"])
    assert (row["state"], row["hibernations"]) == ("SCALED_DOWN", before)


def test_top_shows_nothing_and_still_lists_it(site: Site) -> None:
    site.start(pod("app", [container(resources=RESOURCES)]))
    site.asleep("app")
    line = soon(
        "kubectl top to have seen it asleep",
        lambda: [
            one
            for one in site.kubectl("top", "pods", "--no-headers").splitlines()
            if one.split() == ["app", "0m", "0Mi"]
        ],
        120,
    )
    assert line


def test_room_is_given_back_to_the_scheduler(site: Site) -> None:
    node = NODES[0]
    allocatable = site.get("node", node)["status"]["allocatable"]["cpu"]
    most = f"{int(float(allocatable.rstrip('m')) * (1 if 'm' in allocatable else 1000) * 0.6)}m"
    here = {"nodeSelector": {"kubernetes.io/hostname": node}}
    big = {"requests": {"cpu": most, "memory": "64Mi"}}
    site.start(pod("first", [container(resources=big)], **here))
    site.asleep("first")
    site.settled("first", "0", "1")
    site.start(pod("second", [container(resources=big)], managing(seconds=600), **here))
    # The room is taken: the first one wakes at once all the same.
    client = site.connect("first")
    assert client("PING") == b"PONG"
    client.close()
    site.awake("first")
    soon("an event to say so", lambda: site.events("first", "ResizeDeferred"))
    # Its resize is carried out by itself when there is room again.
    site.kubectl("delete", "pod", "second", "--wait=true")
    soon("the pod's requests", lambda: site.events("first", "ResizeCompleted"))


def test_full_quota_does_not_keep_it_asleep(site: Site) -> None:
    quota = {"hard": {"requests.memory": "100Mi"}}
    site.apply(
        {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "all"}, "spec": quota}
    )
    small = {"requests": {"cpu": "10m", "memory": "64Mi"}}
    site.start(pod("first", [container(resources=small)]))
    site.asleep("first")
    site.settled("first", "0", "1")
    large = {"requests": {"cpu": "10m", "memory": "90Mi"}}
    soon(
        "the quota to have room",
        lambda: site.apply(pod("second", [container(resources=large)], managing(seconds=600))),
    )
    soon("second to run", lambda: site.ready("second"))
    client = site.connect("first")
    assert client("PING") == b"PONG"
    soon("an event to say so", lambda: site.events("first", "ResizeRefused"))
    site.awake("first")
    client.close()
    site.kubectl("delete", "pod", "second", "--wait=true")
    # Tried again by itself; it may hibernate in between, with nothing lost.
    soon(
        "the requests to be whole, or remembered",
        lambda: "64Mi" in json.dumps(site.pod("first")),
        60,
    )
    client = site.connect("first")
    assert client("PING") == b"PONG"
    site.settled("first", "10m", "64Mi", client=client)
    client.close()


def test_a_limit_range_forbids_the_resize_but_neither_sleep_nor_wake(site: Site) -> None:
    least = {"type": "Container", "min": {"memory": "32Mi"}}
    site.apply(
        {
            "apiVersion": "v1",
            "kind": "LimitRange",
            "metadata": {"name": "least"},
            "spec": {"limits": [least]},
        }
    )
    asked = {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": "128Mi"}}
    site.start(pod("app", [container(resources=asked)]))
    client = site.connect("app")
    site.asleep("app")
    soon("an event to say so", lambda: site.events("app", "ResizeRefused"))
    assert "LimitRange" in site.events("app", "ResizeRefused")[0]
    assert client("PING") == b"PONG"
    site.awake("app")
    client.close()
    found = site.pod("app")["spec"]["containers"][0]["resources"]["requests"]
    assert found == asked["requests"]


def test_unmanaged_containers_of_the_class_are_left_alone(site: Site) -> None:
    site.start(pod("app", notes={}))
    site.start(pod("other", [container(), container("side", ports=[], args=["sleep", "600"])]))
    site.asleep("other")
    assert site.state("other", "side") is None
    assert site.state("app") is None
    labels = site.pod("app")["metadata"]["labels"]
    assert labels == {"app": "app"}


def test_pods_of_other_classes_do_not_notice(site: Site) -> None:
    one = pod("app")
    del one["spec"]["runtimeClassName"]
    made = site.start(one)
    address = made["status"]["podIP"]
    assert run("redis-cli", "-h", address, "-p", str(PORT), "ping").strip() == "PONG"
    assert site.state("app") is None


def test_deployment_hibernates_each_of_its_pods(site: Site) -> None:
    labels = {"app": "web"}
    spec = {"replicas": 3, "selector": {"matchLabels": labels}, "template": template("web")}
    metadata = {"name": "web"}
    site.apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": spec},
        service("web", "web"),
    )
    site.kubectl("rollout", "status", "deployment/web")
    names = [one["metadata"]["name"] for one in site.of("web")]
    assert len(names) == 3
    for name in names:
        site.asleep(name)
