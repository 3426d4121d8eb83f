"""What wakes a hibernated container, by every way there is to reach it."""

import json
import sys
import threading
import urllib.request
from pathlib import Path

import pytest

from bench.valkey import Valkey
from tests.cluster import machine
from tests.cluster.base import ClusterError, run
from tests.cluster.settings import node_address
from tests.e2e.site import PORT, TOOLS, Site, container, managing, pod, service, soon

pytestmark = pytest.mark.cluster

WEB = 8080


def web(**more: object) -> dict[str, object]:
    """A program with a shell, tar and an HTTP server in its image."""
    program = (
        f"mkdir -p /www && echo hello >/www/index.html && exec busybox httpd -f -p {WEB} -h /www"
    )
    return {
        "name": "web",
        "image": TOOLS,
        "imagePullPolicy": "Never",
        "command": ["sh", "-c", program],
        "ports": [{"containerPort": WEB}],
        **more,
    }


def test_traffic_to_the_pods_address(site: Site) -> None:
    site.start(pod("app"))
    site.asleep("app")
    client = site.connect("app")
    assert client("PING") == b"PONG"
    site.awake("app")
    client.close()


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort"])
def test_traffic_to_a_service(site: Site, kind: str) -> None:
    site.start(pod("app"), service("app", "app", type=kind))
    site.asleep("app")
    spec = site.get("service", "app")["spec"]
    (port,) = spec["ports"]
    if kind == "NodePort":
        client = Valkey(node_address(3), port["nodePort"])
    else:
        client = Valkey(spec["clusterIP"], port["port"])
    assert client("PING") == b"PONG"
    site.awake("app")
    client.close()


def test_another_pod_by_the_names_of_services(site: Site) -> None:
    site.start(
        pod("app"), service("app", "app"), service("headless", "app", clusterIP="None"), app="app"
    )
    here = {"runtimeClassName": None}
    plain = pod("client", [web(command=["sleep", "600"])], {}, **here)
    site.start(plain)
    for name in ("app", "headless"):
        site.asleep("app")
        found = site.exec(
            "client", "valkey-cli", "-h", f"{name}.{site.namespace}", "ping", container="web"
        )
        assert found == "PONG"
        site.awake("app")


def test_exec_and_a_session_that_stays_open(site: Site) -> None:
    site.start(pod("app"))
    site.asleep("app")
    assert site.exec("app", "valkey-cli", "ping") == "PONG"
    (up,) = soon("the event", lambda: site.events("app", "ScaledUp"))
    assert "exec" in up
    node = site.pod("app")["spec"]["nodeName"]
    with site.running(
        "exec", "-i", "app", "--", "sh", "-c", "echo here; read line; echo $line"
    ) as it:
        assert it.stdout is not None
        assert it.stdin is not None
        assert it.stdout.readline() == "here\n"
        done = threading.Event()
        # Twice the idle time: an open session keeps it awake.
        assert not done.wait(4.5)
        assert site.rows(node)[0]["state"] == "RUNNING"
        it.stdin.write("bye\n")
        it.stdin.flush()
        assert it.stdout.readline() == "bye\n"
    site.asleep("app")


def test_cp_both_ways(site: Site, tmp_path: Path) -> None:
    site.start(pod("app", [web()], managing(["web"])))
    site.asleep("app", "web")
    there = tmp_path / "there"
    there.write_text("from outside\n")
    site.kubectl("cp", str(there), "app:/tmp/there")
    site.asleep("app", "web")
    site.kubectl("cp", "app:/tmp/there", str(tmp_path / "back"))
    assert (tmp_path / "back").read_text() == "from outside\n"


def test_port_forward(site: Site) -> None:
    site.start(pod("app", [web()], managing(["web"])))
    site.asleep("app", "web")
    with site.running("port-forward", "pod/app", f":{WEB}") as forward:
        assert forward.stdout is not None
        port = forward.stdout.readline().split(" -> ")[0].rpartition(":")[2]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/", timeout=20) as answer:
            assert answer.read() == b"hello\n"
    site.awake("app", "web")


def test_attach(site: Site) -> None:
    echo = ["sh", "-c", "while read line; do echo got $line; done; exec sleep 600"]
    site.start(pod("app", [web(command=echo, stdin=True)], managing(["web"], monitor=None)))
    site.asleep("app", "web")
    with site.running("attach", "-i", "app") as attached:
        assert attached.stdin is not None
        assert attached.stdout is not None
        site.awake("app", "web")
        attached.stdin.write("this\n")
        attached.stdin.flush()
        lines = iter(attached.stdout.readline, "")
        assert any("got this" in line for line in lines)


def test_without_network_monitor_traffic_does_not_wake_and_is_not_reset(site: Site) -> None:
    site.start(pod("app", notes=managing(monitor=None)))
    site.asleep("app")
    node = site.pod("app")["spec"]["nodeName"]
    with pytest.raises(TimeoutError):
        Valkey(site.pod("app")["status"]["podIP"], PORT, timeout_s=1.5)
    assert site.rows(node)[0]["state"] == "SCALED_DOWN"
    assert site.exec("app", "valkey-cli", "ping") == "PONG"


def plugin(site: Site, *words: str) -> str:
    """`kubectl architect …` as a user runs it, with the plug-in on the PATH."""
    programs = site.cluster.programs.kubernetes
    env = machine.environment(site.cluster.home)
    env["KUBECONFIG"] = str(site.cluster.control_plane.admin)
    env["PATH"] = f"{programs}:{Path(sys.executable).parent}:{env['PATH']}"
    return run("kubectl", "architect", *words, env=env, timeout_s=60)


def test_kubectl_architect(site: Site) -> None:
    site.start(pod("app", [container()], managing(seconds=600)))
    here = ("--namespace", site.namespace)
    (row,) = json.loads(plugin(site, "ps", *here, "-o", "json"))
    assert (row["pod"], row["container"], row["state"]) == ("app", "valkey", "RUNNING")
    assert "SCALED_DOWN" in plugin(site, "sleep", "app", *here)
    site.asleep("app")
    # As the guide asks what checkpoints take on the disk.
    daemons = site.cluster.get("pods", "--namespace=architect", "--selector=app=architectd")[
        "items"
    ]
    node = site.pod("app")["spec"]["nodeName"]
    (daemon,) = (one["metadata"]["name"] for one in daemons if one["spec"]["nodeName"] == node)
    size, _ = site.cluster.kubectl(
        "exec", "--namespace=architect", daemon, "--", "du", "-s", "/var/lib/architect/checkpoints/"
    ).split()
    assert int(size) > 1000
    assert "RUNNING" in plugin(site, "wake", "app", *here)
    site.awake("app")
    assert "app/valkey woke: command" in plugin(site, "events")
    assert plugin(site, "check").count("ok    root") == len(daemons)
    with pytest.raises(ClusterError, match="nosuch"):
        plugin(site, "sleep", "nosuch", *here)
