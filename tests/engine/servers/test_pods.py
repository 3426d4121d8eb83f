"""One pod, two servers that sleep and wake each on its own port, and a sidecar that is never quiet."""

import json
import socket
import struct
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from architect.contract.annotations import MANAGED_CONTAINERS, NETWORK_MONITOR, SCALEDOWN_DURATIONS
from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine, program
from tests.engine.servers.serving import NGINX, SERVERS_IMAGE, stays
from tests.engine.support import (
    VALKEY_IMAGE,
    Container,
    Lab,
    Valkey,
    free_port,
    podman,
    run,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine

MANAGED = ["cache", "web"]
LOCAL = """
import socket, sys
one = socket.create_connection(("127.0.0.1", int(sys.argv[1])), timeout=15)
one.sendall(sys.argv[2].encode())
print(one.recv(4096).decode())
"""


@dataclass(frozen=True, slots=True)
class Pod:
    """The pod."""

    address: str
    cache: Container
    web: Container
    sidecar: Container

    def ping(self, client: Machine) -> str:
        """Ask the cache, on a connection of its own."""
        with client.inside():
            connection = Valkey.connect(self.address, 6379)
        answer: str = connection.command("PING")
        connection.close()
        return answer

    def page(self, client: Machine) -> str:
        """Ask the web server."""
        return client.must("curl", "-sSf", f"http://{self.address}/")

    def locally(self, port: int, words: str) -> str:
        """Ask a port of the pod over lo, from the sidecar."""
        done = self.sidecar.exec("python3", "-c", LOCAL, str(port), words)
        assert done.code == 0, done.err
        return done.out

    def sleep(self) -> None:
        """Wait until both have fallen asleep."""
        for one in (self.cache, self.web):
            one.await_state("SCALED_DOWN")


def manifest(name: str, peer: str, peer_port: int) -> dict[str, object]:
    """Both are idle after a second."""

    def container(name: str, image: str, command: list[str], port: int = 0) -> dict[str, object]:
        ports = [{"containerPort": port, "hostPort": free_port()}] if port else []
        return {"name": name, "image": image, "command": command, "ports": ports}

    start = 'printf %s "$CONFIGURATION" > /tmp/conf; exec nginx -e stderr -c /tmp/conf'
    web = container("web", SERVERS_IMAGE, ["sh", "-c", start], 80)
    web["env"] = [{"name": "CONFIGURATION", "value": NGINX}]
    cache = ["valkey-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no"]
    talker = ["python3", "-c", program("talker.py"), peer, str(peer_port)]
    annotations: dict[str, object] = {
        MANAGED_CONTAINERS: MANAGED,
        NETWORK_MONITOR: dict.fromkeys(MANAGED, "packets"),
        SCALEDOWN_DURATIONS: dict.fromkeys(MANAGED, "1s"),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "annotations": {key: json.dumps(value) for key, value in annotations.items()},
        },
        "spec": {
            "terminationGracePeriodSeconds": 2,
            "containers": [
                container("cache", VALKEY_IMAGE, cache, 6379),
                web,
                container("sidecar", SERVERS_IMAGE, talker),
            ],
        },
    }


@pytest.fixture(scope="module")
def pod(shared_lab: Lab, client: Machine) -> Iterator[Pod]:
    name = unique("servers")
    with client.inside():
        # Nobody accepts: the kernel does, and acknowledges what the sidecar sends.
        listener = socket.create_server(("", 0))
    with listener:
        words = json.dumps(manifest(name, client.address, listener.getsockname()[1]))
        shared_lab.closing.callback(run, "podman", "pod", "rm", "-f", "-i", "-t", "0", name)
        podman("--runtime", "runc-architect", "kube", "play", "-", stdin=words)
        infra = podman("pod", "inspect", "-f", "{{.InfraContainerID}}", name)
        found = {}
        for one in (*MANAGED, "sidecar"):
            full = f"{name}-{one}"
            shared_lab.footprint.add(full)
            identity = podman("container", "inspect", "-f", "{{.Id}}", full)
            found[one] = Container(full, identity, pod=name)
        made = Pod(Container(infra, infra).address, **found)
        wait_until(lambda: "ready" in made.sidecar.logs(), "the sidecar to talk")
        yield made


def test_sidecar_keeps_nobody_awake(pod: Pod, client: Machine, wire: Capture) -> None:
    for _ in range(2):
        assert pod.ping(client) == "PONG"
        assert pod.page(client) == "hello over HTTP/1.1"
        pod.sleep()
    before = len(wire.packets)
    wait_until(lambda: len(wire.packets) > before, "the sidecar to talk on")
    assert pod.sidecar.inspect("{{.State.Status}}") == "running"


def test_each_wakes_on_its_own_port(pod: Pod, client: Machine, wire: Capture) -> None:
    pod.sleep()
    before = pod.cache.hibernations()
    assert pod.page(client) == "hello over HTTP/1.1"
    assert (pod.web.state(), pod.cache.state()) == ("RUNNING", "SCALED_DOWN")
    pod.sleep()
    assert pod.cache.hibernations() == before
    before = pod.web.hibernations()
    assert pod.ping(client) == "PONG"
    assert (pod.web.state(), pod.cache.state()) == ("SCALED_DOWN", "RUNNING")
    pod.sleep()
    assert pod.web.hibernations() == before


def test_traffic_to_one_does_not_keep_the_other_awake(pod: Pod, client: Machine) -> None:
    assert pod.page(client)
    before = pod.cache.hibernations()

    def asleep_while_the_other_is_asked() -> bool:
        assert pod.ping(client) == "PONG"
        return pod.web.state() == "SCALED_DOWN"

    wait_until(asleep_while_the_other_is_asked, "the other to hibernate", 8)
    assert pod.cache.hibernations() == before


def test_traffic_over_lo_counts_by_port(pod: Pod) -> None:
    pod.sleep()
    before = pod.web.hibernations()
    assert pod.locally(6379, "PING\r\n").strip() == "+PONG"
    assert (pod.web.state(), pod.cache.state()) == ("SCALED_DOWN", "RUNNING")
    pod.sleep()
    assert "hello" in pod.locally(80, "GET / HTTP/1.0\r\n\r\n")
    assert (pod.web.state(), pod.cache.state()) == ("RUNNING", "SCALED_DOWN")
    pod.sleep()
    assert pod.web.hibernations() == before + 1


def test_ping_and_undeclared_ports_wake_nobody(pod: Pod, client: Machine) -> None:
    pod.sleep()
    with (
        client.inside(),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ICMP) as raw,
    ):
        raw.settimeout(5)
        # An echo request (RFC 792), whose checksum is what is left to all ones.
        raw.sendto(struct.pack("!BBHHH", 8, 0, 0xF7FF, 0, 0), (pod.address, 0))
        while (answer := raw.recv(4096))[20] != 0:
            assert answer[20] in (3, 8)
        # The sidecar's own port: its kernel answers, the sleepers have no part in it.
        socket.create_connection((pod.address, 9000), timeout=5).close()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((pod.address, 9), timeout=5)
    for one in (pod.cache, pod.web):
        stays(one, "SCALED_DOWN", 0.7)
