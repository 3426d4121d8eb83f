"""Probes and scrapes: they neither keep a pod awake nor wake it, and tell the truth of it."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from bench.valkey import Valkey
from tests.e2e.site import PORT, PREFIX, Site, container, is_ready, managing, pod, soon

pytestmark = pytest.mark.cluster

SHADOW = 16379
PROBED_S = 4.0
"""How long a sleeper is watched that is probed every second."""


def _mapped(annotation: str) -> dict[str, str]:
    mapping = {"containerName": "valkey", "appPort": PORT, "shadowPort": SHADOW}
    return {**managing(seconds=2), PREFIX + annotation: json.dumps({"mappings": [mapping]})}


def _probe(**how: Any) -> dict[str, Any]:
    return {**how, "periodSeconds": 1, "timeoutSeconds": 1, "failureThreshold": 2}


def _stays_asleep(site: Site, name: str) -> None:
    node = site.pod(name)["spec"]["nodeName"]
    (before,) = site.rows(node)
    end = time.monotonic() + PROBED_S
    while time.monotonic() < end:
        assert site.state(name) == "SCALED_DOWN"
        assert is_ready(site.pod(name))
        time.sleep(0.2)
    (after,) = site.rows(node)
    assert after["hibernations"] == before["hibernations"]
    assert site.restarts(name) == 0


def test_exec_probes_are_answered_while_it_sleeps(site: Site) -> None:
    check = _probe(exec={"command": ["valkey-cli", "-p", "$(PORT)", "ping"]})
    env = [{"name": "PORT", "value": str(PORT)}]
    site.start(pod("app", [container(env=env, readinessProbe=check, livenessProbe=check)]))
    site.asleep("app")
    _stays_asleep(site, "app")
    # The same command by hand is somebody's exec if it has a terminal; without one it is the probe's.
    assert site.exec("app", "valkey-cli", "dbsize") == "0"
    site.awake("app")
    site.asleep("app")


def test_one_that_was_never_ready_or_fails_stays_awake(site: Site) -> None:
    check = _probe(exec={"command": ["test", "-e", "/tmp/healthy"]})
    site.apply(pod("app", [container(readinessProbe=check)]))
    soon("it to run", lambda: site.pod("app")["status"]["phase"] == "Running")
    end = time.monotonic() + PROBED_S
    while time.monotonic() < end:
        assert site.state("app") != "SCALED_DOWN"
        time.sleep(0.2)
    site.exec("app", "touch", "/tmp/healthy")
    soon("it to be ready", lambda: site.ready("app"))
    site.asleep("app")
    site.exec("app", "rm", "/tmp/healthy")
    soon("it to fail", lambda: not site.ready("app") and site.state("app") == "RUNNING")
    end = time.monotonic() + PROBED_S
    while time.monotonic() < end:
        assert site.state("app") == "RUNNING"
        time.sleep(0.2)


def test_proxy_answers_probes_while_it_sleeps(site: Site) -> None:
    check = _probe(tcpSocket={"port": SHADOW})
    made = site.start(
        pod(
            "app",
            [container(readinessProbe=check, livenessProbe=check)],
            _mapped("health-check-proxy"),
        )
    )
    names = [one["name"] for one in made["spec"]["initContainers"]]
    assert names == ["architect-health-check-proxy"]
    client = site.connect("app")
    client("SET", "some", "thing")
    site.asleep("app")
    _stays_asleep(site, "app")
    assert client("GET", "some") == b"thing"
    site.awake("app")
    site.asleep("app")
    client.close()


def test_shadow_port_reaches_the_program_and_counts_for_nothing(site: Site) -> None:
    made = site.start(pod("app", notes=_mapped("shadow-ports")))
    ports = made["spec"]["containers"][0]["ports"]
    assert SHADOW in [one["containerPort"] for one in ports]
    scrape = soon("the shadow port", lambda: Valkey(made["status"]["podIP"], SHADOW))
    assert scrape("SET", "by", "shadow") == b"OK"

    def asleep_though_scraped() -> bool:
        if site.state("app") == "SCALED_DOWN":
            return True
        fresh = Valkey(made["status"]["podIP"], SHADOW, timeout_s=1)
        fresh("GET", "by")
        fresh.close()
        return False

    soon("it to hibernate though it is scraped", asleep_though_scraped)
    with pytest.raises(ConnectionRefusedError):
        Valkey(made["status"]["podIP"], SHADOW, timeout_s=2)
    assert site.state("app") == "SCALED_DOWN"
    client = site.connect("app")
    assert client("GET", "by") == b"shadow"
    # The scraper's connection was open all the time.
    assert scrape("GET", "by") == b"shadow"
    scrape.close()
    client.close()
