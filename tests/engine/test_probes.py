"""Probes under Podman: healthchecks, the health-check proxy and shadow ports of a container."""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.engine.support import (
    PORT,
    Container,
    Lab,
    Unmet,
    Valkey,
    must,
    podman,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine

APP = 6379
SHADOW = 16379
WATCHED_S = 4.0


HEALTH = f"""
import http.server, os
class Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if os.path.exists("/tmp/healthy") else 503)
        self.end_headers()
http.server.HTTPServer(("", {PORT}), Health).serve_forever()
"""


def _mapping(name: str, port: int = APP) -> dict[str, object]:
    return {"mappings": [{"containerName": name, "appPort": port, "shadowPort": SHADOW}]}


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


def _health(container: Container) -> int:
    """Returns the status with which an HTTP probe through the proxy is answered."""
    with contextlib.closing(http.client.HTTPConnection(container.address, SHADOW, 3)) as client:
        client.request("GET", "/healthz")
        return client.getresponse().status


def test_one_that_fails_its_probes_stays_awake_and_is_told_healthy_only_when_it_is(
    lab: Lab,
) -> None:
    name = unique("failing")
    container = lab.start(
        "",
        *("python3", "-c", HEALTH),
        name=name,
        idle="1s",
        health_check_proxy=_mapping(name, PORT),
    )
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    assert _health(container) == 503
    with pytest.raises(Unmet):
        wait_until(lambda: container.hibernations() > 0, "nothing", WATCHED_S)
    container.exec("touch", "/tmp/healthy")
    assert _health(container) == 200
    container.await_state("SCALED_DOWN")
    _stays_asleep(container, lambda: _health(container) == 200 or pytest.fail("not healthy"))


def _answered_anew(container: Container, before: int, ended: str) -> int:
    """Waits until another process than that one answers, and its end is told; returns the pid."""

    def found() -> int:
        proxies = _proxies(container)
        return proxies[0] if proxies and before not in proxies else 0

    pid: int = wait_until(found, "another proxy")
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    assert _proxies(container) == [pid]
    told = [one["message"] for one in container.events("Warning") if ended in one["message"]]
    assert told, container.events("Warning")
    assert 'its last words: "port 6379 of container' in told[-1]
    return pid


def test_proxy_that_is_killed_is_started_again(lab: Lab) -> None:
    name = unique("revived")
    container = lab.valkey("", name=name, health_check_proxy=_mapping(name))
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    (pid,) = _proxies(container)
    os.kill(pid, signal.SIGKILL)
    pid = _answered_anew(container, pid, f"(pid {pid}) was ended by SIGKILL")
    container.sleep()
    os.kill(pid, signal.SIGKILL)
    # It has seen nothing but a sleeper, and says nothing of it either.
    pid = wait_until(
        lambda: [one for one in _proxies(container) if one != pid],
        "another proxy beside the sleeper",
    )[0]
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    _stays_asleep(container, lambda: _connects(container, SHADOW) or pytest.fail("no answer"))
    warnings = [one["message"] for one in container.events("Warning")]
    assert len([one for one in warnings if "was ended by SIGKILL" in one]) == 2, warnings
    client = Valkey.connect("127.0.0.1", container.host_port)
    assert client.command("PING") == "PONG"
    assert _connects(container, SHADOW)
    assert _proxies(container) == [pid]


def test_proxy_outlives_the_daemon_and_is_cared_for_by_the_next(lab: Lab) -> None:
    name = unique("inherited")
    container = lab.valkey("", name=name, health_check_proxy=_mapping(name))
    wait_until(lambda: _connects(container, SHADOW), "the proxy to listen")
    (pid,) = _proxies(container)
    must("architect", "down")
    must("architect", "up")
    assert _proxies(container) == [pid], "it was started anew, and has forgotten what it had seen"
    os.kill(pid, signal.SIGKILL)
    pid = _answered_anew(container, pid, "health-check-proxy has ended")
    must("architect", "down")
    try:
        assert _connects(container, SHADOW)
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not _proxies(container), "its end")
    finally:
        must("architect", "up")
    pid = _answered_anew(container, pid, "has ended while no architectd ran")
    podman("rm", "-f", "-t", "0", container.name)
    wait_until(lambda: not Path(f"/proc/{pid}/ns/net").exists(), "the proxy's end")


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
