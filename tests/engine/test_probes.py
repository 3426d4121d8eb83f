"""Probes under Podman: healthchecks, the health-check proxy and shadow ports of a container."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from tests.engine.support import Container, Lab, Unmet, Valkey, podman, unique, wait_until

pytestmark = pytest.mark.engine

APP = 6379
SHADOW = 16379
WATCHED_S = 4.0


def _mapping(name: str) -> dict[str, object]:
    return {"mappings": [{"containerName": name, "appPort": APP, "shadowPort": SHADOW}]}


def _stays_asleep(container: Container, knock: object) -> None:
    before = container.hibernations()
    end = time.monotonic() + WATCHED_S
    while time.monotonic() < end:
        assert container.state() == "SCALED_DOWN"
        assert callable(knock)
        knock()
        time.sleep(0.2)
    assert container.hibernations() == before


def _connects(container: Container, port: int) -> bool:
    try:
        socket.create_connection((container.address, port), 1).close()
    except OSError:
        return False
    return True


def _healthcheck(container: Container) -> str:
    """Makes the healthcheck once, as Podman's timer does; returns what Podman then says."""
    podman("healthcheck", "run", container.name)
    return container.inspect("{{.State.Healthcheck.Status}}")


def test_healthcheck_is_no_activity_and_is_answered_asleep(lab: Lab) -> None:
    container = lab.valkey(
        "checked",
        idle="2s",
        options=["--health-cmd", "valkey-cli ping", "--health-interval", "disable"],
    )
    assert _healthcheck(container) == "healthy"
    end = time.monotonic() + 20
    while container.state() != "SCALED_DOWN":
        assert time.monotonic() < end, "its healthchecks keep it awake"
        podman("healthcheck", "run", container.name)
        time.sleep(0.3)
    _stays_asleep(container, lambda: _healthcheck(container))
    client = Valkey.connect("127.0.0.1", container.host_port)
    assert client.command("PING") == "PONG"


def test_one_that_was_never_healthy_stays_awake(lab: Lab) -> None:
    container = lab.valkey(
        "sick",
        idle="1s",
        options=["--health-cmd", "test -e /tmp/healthy", "--health-interval", "disable"],
    )
    with pytest.raises(Unmet):
        wait_until(lambda: container.hibernations() > 0, "nothing", WATCHED_S)
    container.exec("touch", "/tmp/healthy")
    assert _healthcheck(container) == "healthy"
    container.await_state("SCALED_DOWN")


def test_proxy_answers_while_it_sleeps_and_ends_with_it(lab: Lab) -> None:
    name = unique("proxied")
    container = lab.valkey("", name=name, idle="2s", health_check_proxy=_mapping(name))
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    end = time.monotonic() + 20
    while container.state() != "SCALED_DOWN":
        assert time.monotonic() < end, "probes through the proxy keep it awake"
        assert _connects(container, SHADOW)
        time.sleep(0.3)
    proxies = _proxies(container)
    assert len(proxies) == 1
    status = Path(f"/proc/{proxies[0]}/status").read_text()
    assert "\nUid:\t65532\t" in status
    _stays_asleep(container, lambda: _connects(container, SHADOW) or pytest.fail("no answer"))
    client = Valkey.connect("127.0.0.1", container.host_port)
    assert client.command("PING") == "PONG"
    podman("rm", "-f", "-t", "0", container.name)
    wait_until(lambda: not Path(f"/proc/{proxies[0]}/ns/net").exists(), "the proxy's end")


def _proxies(container: Container) -> list[int]:
    space = os.readlink(f"/proc/{container.keeper}/ns/net")
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit():
            with contextlib.suppress(OSError):
                program = (folder / "cmdline").read_bytes().split(b"\0")[0]
                ours = program.endswith(b"/health-check-proxy")
                if ours and os.readlink(folder / "ns/net") == space:
                    found.append(int(folder.name))
    return found


def test_shadow_port_counts_for_nothing_and_is_refused_asleep(lab: Lab) -> None:
    name = unique("shadowed")
    container = lab.valkey("", name=name, idle="2s", shadow_ports=_mapping(name))
    scraper = wait_until(lambda: _call(container), "the shadow port")
    assert scraper.command("SET", "by", "shadow") == "OK"
    end = time.monotonic() + 20
    while container.state() != "SCALED_DOWN":
        assert time.monotonic() < end, "its scrapes keep it awake"
        fresh = _call(container)
        if fresh is not None:
            fresh.command("GET", "by")
            fresh.close()
        time.sleep(0.2)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((container.address, SHADOW), 2)
    assert container.state() == "SCALED_DOWN"
    client = Valkey.connect("127.0.0.1", container.host_port)
    assert client.command("GET", "by") == "shadow"
    assert scraper.command("GET", "by") == "shadow"


def _call(container: Container) -> Valkey | None:
    try:
        return Valkey.connect(container.address, SHADOW)
    except OSError:
        return None
