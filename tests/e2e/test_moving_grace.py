"""A pod whose grace ends before anybody takes it: on its node's disk, and from there to its replacement."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, Final

import pytest

from bench.valkey import Valkey
from tests.e2e import draining, movers, movingfaults
from tests.e2e.movingfaults import STEPS, other
from tests.e2e.site import NODES, Site, soon

pytestmark = pytest.mark.cluster

GRACE_S: Final = 26
"""Six more than those before whose end a pod goes to the disk."""


@pytest.fixture
def pod(site: Site) -> dict[str, Any]:
    return site.start(movers.deployment("app"), app="app")


@contextlib.contextmanager
def _left_alone(site: Site, pod: dict[str, Any]) -> Iterator[Valkey]:
    """Is deleted, with a connection, while no node takes its replacement; then one does, and it goes on."""
    name = pod["metadata"]["name"]
    client = site.connect(name)
    client("SET", "kept", "yes")
    with movers.cordoned(site, NODES[0]), movers.cordoned(site, NODES[1]):
        site.kubectl("delete", "pod", name, f"--grace-period={GRACE_S}", "--wait=false")
        yield client
        site.kubectl("uncordon", other(pod["spec"]["nodeName"]))
        after = movers.moved(site, "app", pod)
        assert after["spec"]["nodeName"] == other(pod["spec"]["nodeName"])
    draining.migrated(site, ["app"])
    assert client("GET", "kept") == b"yes"


def test_no_node_takes_it(site: Site, pod: dict[str, Any]) -> None:
    name = pod["metadata"]["name"]
    with _left_alone(site, pod) as client:
        assert client("PING") == b"PONG"
        kept = soon("the event", lambda: site.events(name, "CheckpointKept"))
        assert pod["spec"]["nodeName"] in kept[0]
        movers.gone(site, pod)
        assert set(movingfaults.phases(site).values()) == {"Available"}


def test_the_api_is_away_for_so_long(site: Site, pod: dict[str, Any]) -> None:
    logs = movingfaults.Logs(site)
    plane = site.cluster.control_plane
    with _left_alone(site, pod) as client:
        logs.wait(STEPS["offered"])
        plane.kill("kube-apiserver")
        try:
            assert client("PING") == b"PONG"
            logs.wait('"what": "CheckpointKept"')
        finally:
            plane.start_api()
            plane.await_api()
        movers.gone(site, pod)
