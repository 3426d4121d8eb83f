"""Pods move between nodes with their clients connected, whichever way these came."""

from __future__ import annotations

import contextlib
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from bench.movingclients import last_report
from tests.e2e import movers
from tests.e2e.site import CRITICAL, NODES, Site, soon

PROGRAM: Final = Path(__file__).parents[2].joinpath("bench/movingclients.py").read_text()


def test_every_client_stays_connected(site: Site) -> None:
    """From the host and from a pod on each node, by each way, there and back: no reply is lost or doubled."""
    movers.client_pods(site)
    pod = site.start(movers.deployment("mover"), movers.node_port("mover", "mover"), app="mover")
    with movers.Clients(site, seconds=45) as clients:
        for way in movers.ways(site, "mover", pod):
            for place in (movers.HOST, *movers.ALL_NODES):
                clients.start(place, way)
        for _ in range(2):
            before = pod
            with movers.cordoned(site, before["spec"]["nodeName"]):
                site.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
                pod = movers.moved(site, "mover", before)
                movers.gone(site, before)
            assert pod["spec"]["nodeName"] != before["spec"]["nodeName"]
            assert site.events(pod["metadata"]["name"], "Migrated")
        said = clients.finish()
    print(json.dumps(list(said.values()), indent=1))
    assert not {key: one["error"] for key, one in said.items() if one["error"]}
    for key, one in said.items():
        assert int(site.exec(pod["metadata"]["name"], "valkey-cli", "GET", key)) == one["count"]
    assert site.restarts(pod["metadata"]["name"]) == 0
    assert {*NODES} >= {pod["spec"]["nodeName"]}


def test_new_connections_are_never_refused(site: Site) -> None:
    """A hundred a second by the Service and by a node's port, there and back: each is made and answered."""
    movers.client_pods(site)
    pod = site.start(movers.deployment("mover"), movers.node_port("mover", "mover"), app="mover")
    ways = {way.name: way for way in movers.ways(site, "mover", pod)}
    with contextlib.ExitStack() as stack:
        clients = [
            stack.enter_context(_connects(site, CRITICAL, ways["service"])),
            stack.enter_context(_connects(site, NODES[0], ways[NODES[1]])),
        ]
        for _ in range(2):
            before = pod
            with movers.cordoned(site, before["spec"]["nodeName"]):
                site.kubectl("delete", "pod", before["metadata"]["name"], "--wait=false")
                pod = movers.moved(site, "mover", before)
                movers.gone(site, before)
        for client in clients:
            said = last_report(client.communicate("end\n", timeout=90)[0])
            assert said["count"] > 0
            assert not said["kinds"], said


def test_nobody_is_refused_while_a_stateful_set_has_no_pod(site: Site) -> None:
    """The Service has a placeholder for so long: who comes waits, and finds the pod at its new place."""
    movers.client_pods(site)
    made = movers.deployment("db")
    made["kind"] = "StatefulSet"
    made["spec"]["serviceName"] = "db"
    before = site.start(made, movers.node_port("db", "db"), app="db")
    ways = {way.name: way for way in movers.ways(site, "db", before)}
    with _connects(site, CRITICAL, ways["service"]) as client:
        with movers.cordoned(site, before["spec"]["nodeName"]):
            site.kubectl("delete", "pod", "db-0", "--wait=false")
            held = soon("a placeholder", lambda: _placeholders(site))
            after = movers.moved(site, "db", before)
        said = last_report(client.communicate("end\n", timeout=90)[0])
    assert after["spec"]["nodeName"] != before["spec"]["nodeName"]
    assert said["count"] > 0
    assert not {"refused", "reset"} & said["kinds"].keys(), said
    assert held == ["192.0.2.222"]
    soon("it to be gone", lambda: not _placeholders(site))


def _placeholders(site: Site) -> list[str]:
    """Addresses of the EndpointSlices that are architect's."""
    ours = "endpointslice.kubernetes.io/managed-by=architect.loopholelabs.io"
    found = site.get("endpointslices", f"--selector={ours}")["items"]
    return [address for one in found for end in one["endpoints"] for address in end["addresses"]]


@contextlib.contextmanager
def _connects(site: Site, node: str, way: movers.Way) -> Iterator[subprocess.Popen[str]]:
    """A client in the pod of a node that makes a new connection every ten milliseconds."""
    words = (
        "python3",
        "-c",
        PROGRAM,
        "connect",
        f"{node}-{way.name}",
        "600",
        "10",
        way.address,
        str(way.port),
    )
    with site.running("exec", "--stdin", f"client-{node}", "--", *words) as process:
        assert process.stdout is not None
        assert any("connected" in line for line in process.stdout)
        yield process
