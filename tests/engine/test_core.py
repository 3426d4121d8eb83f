"""An idle container vanishes, comes back for whoever asks, and nobody can tell."""

import contextlib
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from architect.adapters import bpf, netns
from architect.contract import paths
from tests.engine.support import (
    PORT,
    SUBJECT,
    TEST_IMAGE,
    VALKEY_IMAGE,
    Client,
    Container,
    Lab,
    Valkey,
    architect,
    available,
    must,
    podman,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine

KEYS = 20000
MEGABYTE = 1 << 20
HIBERNATED_BYTES = 400 * 1024
"""What a hibernated container's cgroup may hold here: the keeper, and what the kernel counts late."""

CLIENT = """
import socket, sys
open_ones = {}
for line in sys.stdin:
    name, host, port, *words = line.split()
    if name not in open_ones:
        open_ones[name] = socket.create_connection((host, int(port)), timeout=15)
    open_ones[name].sendall(" ".join(words).encode() + b"\\n")
    print(open_ones[name].recv(65536).decode().strip(), flush=True)
"""
"""Each line names a connection, which is opened at first use, and what to send on it."""


def fill(client: Valkey, megabytes: int) -> None:
    assert client.command("DEBUG", "POPULATE", KEYS, "key", megabytes * MEGABYTE // KEYS) == "OK"


def nothing_but_the_keeper(container: Container) -> bool:
    return container.processes() == [container.keeper]


@pytest.fixture(scope="module")
def cache(shared_lab: Lab) -> Container:
    """A valkey with 20 MB of data that hibernates after a second."""
    container = shared_lab.valkey("cache", idle="1s")
    client = Valkey.connect("127.0.0.1", container.host_port)
    fill(client, 20)
    client.command("SET", "mark", "kept")
    client.close()
    return container


@pytest.fixture(scope="module")
def echo(shared_lab: Lab) -> Container:
    """SUBJECT, hibernated by command only."""
    return shared_lab.subject("echo", options=["--expose", f"{PORT}/udp"])


def test_idle_container_vanishes(cache: Container) -> None:
    client = Valkey.connect("127.0.0.1", cache.host_port)
    before = cache.memory()
    assert client.command("GET", "mark") == "kept"
    cache.await_state("SCALED_DOWN")
    assert nothing_but_the_keeper(cache)
    assert before > 20 * MEGABYTE
    wait_until(lambda: cache.memory() < HIBERNATED_BYTES, "its memory to come back", 5.0)
    place = cache.checkpoint()
    assert place is not None
    assert sum(file.stat().st_size for file in place.rglob("*")) > 20 * MEGABYTE
    shown = json.loads(podman("ps", "--format", "json", "--filter", f"name={cache.name}"))
    assert [one["State"] for one in shown] == ["running"]
    assert shown[0]["Status"].startswith("Up")
    row = cache.row()
    assert row is not None
    assert row["checkpoint_bytes"] > 20 * MEGABYTE
    assert row["last_scale_down_ms"] > 0
    assert client.command("GET", "mark") == "kept"
    assert cache.state() == "RUNNING"
    assert not nothing_but_the_keeper(cache)
    client.close()


def test_several_cycles_lose_nothing(cache: Container) -> None:
    client = Valkey.connect("127.0.0.1", cache.host_port)
    digest = client.command("DEBUG", "DIGEST")
    client.command("SET", "counter", 0)
    before = cache.hibernations()
    for number in range(1, 6):
        cache.sleep()
        assert client.command("INCR", "counter") == number
    assert cache.hibernations() >= before + 5
    client.command("DEL", "counter")
    assert client.command("DBSIZE") == KEYS + 1
    assert client.command("DEBUG", "DIGEST") == digest
    client.close()


def test_wakes_by_a_packet_on_an_established_connection(echo: Container) -> None:
    through_port, direct = echo.call(), echo.call(echo.address, PORT)
    for client in (through_port, direct):
        first = int(client.ask("count"))
        echo.sleep()
        assert nothing_but_the_keeper(echo)
        assert int(client.ask("count")) == first + 1
        assert echo.state() == "RUNNING"
    through_port.close()
    direct.close()


def test_wakes_by_a_new_connection(echo: Container) -> None:
    for host, port in (("127.0.0.1", echo.host_port), (echo.address, PORT)):
        echo.sleep()
        client = Client.connect(host, port)
        assert client.ask(f"through {host}") == f"through {host}"
        client.close()


def test_wakes_by_exec(echo: Container) -> None:
    client = echo.call()
    first = int(client.ask("count"))
    echo.sleep()
    done = echo.exec("sh", "-c", "cat; exit 3", options=["-i"], stdin="through exec")
    assert (done.code, done.out) == (3, "through exec")
    assert echo.state() == "RUNNING"
    assert int(client.ask("count")) == first + 1
    client.close()


def test_wakes_by_command_and_signal(echo: Container) -> None:
    echo.sleep()
    podman("kill", "-s", "HUP", echo.name)
    wait_until(lambda: echo.logs()[-1] == "hup", "the program to see the signal")
    assert echo.state() == "RUNNING"


def test_wakes_by_udp(echo: Container) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as caller:
        caller.settimeout(10)
        for number in range(3):
            words = b"datagram %d" % number
            echo.sleep()
            caller.sendto(words, (echo.address, PORT))
            assert caller.recv(100) == words


@contextlib.contextmanager
def neighbour(container: Container) -> Iterator[int]:
    """Another machine on the container's bridge: a network namespace with an address there."""
    gateway = container.inspect("{{range .NetworkSettings.Networks}}{{.Gateway}}{{end}}")
    bridge = next(
        link["ifname"]
        for link in json.loads(_ip("-j", "-4", "address", "show"))
        if any(found["local"] == gateway for found in link["addr_info"])
    )
    address = gateway.rpartition(".")[0] + ".250/16"
    inner, outer = f"ati{container.id[:8]}", f"ato{container.id[:8]}"
    with netns.scratch():
        place = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        there = f"/proc/{os.getpid()}/fd/{place}"
        _ip("link", "add", outer, "type", "veth", "peer", "name", inner, "netns", there)
        try:
            _ip("link", "set", outer, "master", bridge, "up")
            with netns.entered(place):
                _ip("address", "add", address, "dev", inner)
                _ip("link", "set", inner, "up")
            yield place
        finally:
            _ip("link", "del", outer)
    finally:
        os.close(place)


def _ip(*words: str) -> str:
    return must("ip", *words, deadline=10)


def test_wakes_from_another_network_namespace(echo: Container) -> None:
    with neighbour(echo) as place:
        with netns.entered(place):
            client = Client.connect(echo.address, PORT)
        first = int(client.ask("count"))
        echo.sleep()
        assert int(client.ask("count")) == first + 1
        echo.sleep()
        with netns.entered(place):
            another = Client.connect(echo.address, PORT)
        assert int(another.ask("count")) == first + 2
        client.close()
        another.close()


def test_wakes_over_ipv6(lab: Lab) -> None:
    network = unique("net6")
    podman("network", "create", "--ipv6", "--subnet", "fd98:a7::/64", network)
    lab.closing.callback(podman, "network", "rm", "-f", network)
    options = ["--network", network, "--expose", f"{PORT}/udp"]
    container = lab.start("six", "python3", "-c", SUBJECT, options=options)
    address = container.inspect("{{range .NetworkSettings.Networks}}{{.GlobalIPv6Address}}{{end}}")
    client = Client.when_ready(address, PORT)
    first = int(client.ask("count"))
    container.sleep()
    assert int(client.ask("count")) == first + 1
    container.sleep()
    another = Client.connect(address, PORT)
    assert int(another.ask("count")) == first + 2
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as caller:
        caller.settimeout(10)
        container.sleep()
        caller.sendto(b"datagram", (address, PORT))
        assert caller.recv(100) == b"datagram"
    client.close()
    another.close()


def test_wakes_over_lo_from_a_second_container(lab: Lab) -> None:
    container = lab.subject("lo")
    name = unique("sidecar")
    lab.closing.callback(podman, "rm", "-f", "-i", "-t", "0", name)
    words = ["podman", "--runtime", "runc", "run", "-i", "--rm", "--name", name]
    words += ["--network", f"container:{container.name}"]
    with subprocess.Popen(
        [*words, TEST_IMAGE, "python3", "-c", CLIENT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        bufsize=1,
    ) as sidecar:
        assert sidecar.stdin
        assert sidecar.stdout

        def ask(line: str) -> str:
            assert sidecar.stdin
            assert sidecar.stdout
            sidecar.stdin.write(line + "\n")
            return sidecar.stdout.readline().strip()

        for number, host in enumerate(("127.0.0.1", "::1")):
            count = 4 * number
            assert ask(f"old{number} {host} {PORT} count") == str(count + 1)
            container.sleep()
            assert ask(f"old{number} {host} {PORT} count") == str(count + 2)
            container.sleep()
            assert ask(f"new{number} {host} {PORT} count") == str(count + 3)
            assert ask(f"old{number} {host} {PORT} count") == str(count + 4)
        sidecar.stdin.close()
        assert sidecar.wait(timeout=15) == 0
    assert container.hibernations() == 4


CALLER = """
import socket, sys
connection = socket.create_connection((sys.argv[1], int(sys.argv[2])))
count = 0
while words := connection.recv(65536):
    count += 1
    connection.sendall(f"{count} ".encode() + words)
"""
"""The other way round: a container that calls, and answers on the connection it made."""


def test_outgoing_connection_outlives_the_sleep(lab: Lab) -> None:
    gateway = podman("network", "inspect", "podman", "-f", "{{range .Subnets}}{{.Gateway}}{{end}}")
    with socket.create_server((gateway, 0)) as server:
        server.settimeout(15)
        port = str(server.getsockname()[1])
        container = lab.start("caller", "python3", "-c", CALLER, gateway, port)
        client = Client(server.accept()[0])
    client.socket.settimeout(1)
    assert client.ask("first") == "1 first"
    container.sleep()
    # What it hears from there is no reason to wake, and must not be answered with a reset.
    with pytest.raises(TimeoutError):
        client.ask("second")
    assert container.state() == "SCALED_DOWN"
    architect("wake", container.name)
    client.socket.settimeout(15)
    assert client.line() == "2 second"
    container.sleep()
    architect("wake", container.name)
    assert client.ask("third") == "3 third"


def test_memory_of_the_machine_comes_back(lab: Lab) -> None:
    container = lab.valkey("large")
    client = Valkey.connect("127.0.0.1", container.host_port)
    fill(client, 300)
    digest = client.command("DEBUG", "DIGEST")
    assert container.memory() > 300 * MEGABYTE
    before = available()
    container.sleep()
    # Of the data: page cache, which it is charged with too, was available before. A tenth is left to what
    # else the machine does meanwhile.
    wait_until(lambda: available() - before > 270 * MEGABYTE, "the machine's memory to come back")
    wait_until(lambda: container.memory() < HIBERNATED_BYTES, "its cgroup to be empty")
    assert client.command("DEBUG", "DIGEST") == digest
    client.close()


def test_flooded_container_is_not_watched_all_the_time_and_sleeps_all_the_same(lab: Lab) -> None:
    if not bpf.has_tcx():
        pytest.skip("the kernel has no tcx, whose links can be seen (Linux 6.6)")
    container = lab.subject("flooded", idle="20s")
    inode = Path(f"/proc/{container.keeper}/ns/net").stat().st_ino
    pins = paths.BPF / f"{inode:x}"
    client = Client.connect("127.0.0.1", container.host_port)
    count = 0

    def flood(until: Callable[[], bool], what: str) -> None:
        nonlocal count
        end = time.monotonic() + 15
        while not until():
            assert time.monotonic() < end, f"15 s of traffic, still waiting for {what}"
            for _ in range(100):
                count += 1
                assert int(client.ask("count")) == count

    flood(lambda: not list(pins.glob("ingress-*")), "the filters to rest")
    row = container.row()
    assert row is not None
    assert row["idle_s"] == 0
    container.sleep()
    assert list(pins.glob("ingress-*"))
    count += 1
    assert int(client.ask("count")) == count
    flood(lambda: not list(pins.glob("ingress-*")), "the filters to rest again")
    wait_until(lambda: list(pins.glob("ingress-*")), "the filters to be back")
    container.await_state("SCALED_DOWN", 30)
    count += 1
    assert int(client.ask("count")) == count
    client.close()


def test_valkey_image_declares_its_port(lab: Lab) -> None:
    container = lab.start("plain-image", image=VALKEY_IMAGE, program_port=6379)
    client = Valkey.when_ready("127.0.0.1", container.host_port, "PING")
    container.sleep()
    assert client.ask("PING") == "+PONG"
    client.close()
