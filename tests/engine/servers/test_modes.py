"""What keeps a container awake and what wakes it, in each mode of network-monitor, seen by its clients."""

import contextlib
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from architect.adapters import criuimages
from architect.contract.annotations import IGNORE_ACTIVITY_PORTS
from tests.engine import support
from tests.engine.servers.capture import Capture, Flag
from tests.engine.servers.machine import DEADLINE_S, Machine, program
from tests.engine.servers.serving import SERVERS_IMAGE, serve, serve_pages, stays
from tests.engine.support import PORT, Client, Container, Lab, architect, must, unique

pytestmark = pytest.mark.engine

IDLE_S = 1.0
LONGER_S = 2.5
"""Long enough to hibernate twice, if nothing kept a container awake."""
PROGRAM = ("python3", "-c", program("halves.py"))


def halves(lab: Lab, stem: str, **keywords: Any) -> Container:
    return serve(
        lab,
        stem,
        *PROGRAM,
        port=PORT,
        expose=[f"{PORT}/udp"],
        ready=lambda server: "ready" in server.logs(),
        **keywords,
    )


def call(client: Machine, server: Container) -> Client:
    with client.inside():
        return Client.connect(server.address, PORT)


def send_stray_segment(client: Machine, server: Container, flags: Flag) -> None:
    """Send a TCP segment of no connection (RFC 9293, section 3.1), with an odd port as its source."""
    ends = socket.inet_aton(client.address) + socket.inet_aton(server.address)
    fields = [41001, PORT, 1, 1, 5 << 4, flags, 1024, 0, 0]
    header = struct.pack("!HHIIBBHHH", *fields)
    words = struct.unpack("!16H", ends + struct.pack("!HH", socket.IPPROTO_TCP, 20) + header)
    total = sum(words)
    total = (total & 0xFFFF) + (total >> 16)
    fields[7] = ~(total + (total >> 16)) & 0xFFFF
    with (
        client.inside(),
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw,
    ):
        raw.sendto(struct.pack("!HHIIBBHHH", *fields), (server.address, 0))


def send_datagram(client: Machine, server: Container) -> None:
    with client.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.sendto(b"stray", (server.address, PORT))


def from_server(capture: Capture) -> list[object]:
    return [one for one in capture.packets if not one.outgoing]


# ---- connections ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def counting(shared_lab: Lab) -> Container:
    return halves(shared_lab, "connections", monitor="connections", idle="1s")


@pytest.fixture
def dropped(counting: Container, client: Machine) -> Iterator[None]:
    """No connection is left after the test, whoever has half closed it; so the container sleeps."""
    yield
    last = call(client, counting)
    last.socket.sendall(b"drop\n")
    with contextlib.suppress(ConnectionError):
        last.line()
    counting.await_state("SCALED_DOWN")


@pytest.mark.parametrize("how", ["open", "half closed by the client", "half closed by the server"])
@pytest.mark.usefixtures("dropped")
def test_connection_keeps_awake(
    counting: Container, client: Machine, wire: Capture, how: str
) -> None:
    connection = call(client, counting)
    assert connection.ask("hello") == "hello"
    if how.endswith("client"):
        connection.socket.shutdown(socket.SHUT_WR)
    elif how.endswith("server"):
        connection.socket.sendall(b"half\n")
        with pytest.raises(ConnectionError):
            connection.line()
    stays(counting, "RUNNING", LONGER_S)


@pytest.mark.usefixtures("dropped")
def test_new_connection_wakes_stray_packets_do_not(
    counting: Container, client: Machine, wire: Capture
) -> None:
    counting.await_state("SCALED_DOWN")
    send_datagram(client, counting)
    for flags in (Flag.ACK, Flag.FIN | Flag.ACK, Flag.RST, Flag.SYN | Flag.ACK):
        send_stray_segment(client, counting, flags)
    stays(counting, "SCALED_DOWN", LONGER_S / 2)
    assert from_server(wire) == []
    assert call(client, counting).ask("hello") == "hello"
    assert counting.state() == "RUNNING"


@pytest.mark.usefixtures("dropped")
def test_open_connection_outlives_a_commanded_sleep(
    counting: Container, client: Machine, wire: Capture
) -> None:
    """Whatever its packets do meanwhile, they are not lost and not reset."""
    old = call(client, counting)
    assert old.ask("hello") == "hello"
    counting.sleep()
    old.socket.sendall(b"while it slept\n")
    assert call(client, counting).ask("new") == "new"
    assert old.line() == "while it slept"


@pytest.mark.usefixtures("dropped")
def test_connection_that_the_daemon_did_not_see_open_counts(
    counting: Container, client: Machine, wire: Capture
) -> None:
    seen = call(client, counting)
    assert seen.ask("hello") == "hello"
    must("architect", "down")
    try:
        connection = call(client, counting)
        assert connection.ask("hello") == "hello"
        seen.close()
    finally:
        must("architect", "up")
    stays(counting, "RUNNING", LONGER_S)


def test_connection_of_a_vanished_peer_counts(counting: Container, lab: Lab) -> None:
    """Its machine is off the net before it can say goodbye. Last here: nothing ends it soon."""
    container = lab.start(
        "vanishing", "sleep", "100", image=SERVERS_IMAGE, runtime="runc", annotations={}
    )
    machine = Machine(container)
    with contextlib.closing(machine):
        connection = call(machine, counting)
        assert connection.ask("hello") == "hello"
        with machine.inside():
            must("ip", "link", "set", "eth0", "down")
        connection.close()
        stays(counting, "RUNNING", LONGER_S)


# ---- packets --------------------------------------------------------------------------------------


def test_any_packet_wakes(shared_lab: Lab, client: Machine) -> None:
    server = halves(shared_lab, "packets")
    server.sleep()
    send_datagram(client, server)
    server.await_state("RUNNING")
    server.sleep()
    send_stray_segment(client, server, Flag.ACK)
    server.await_state("RUNNING")


def test_keep_alive_probes_are_packets(shared_lab: Lab, client: Machine, wire: Capture) -> None:
    server = halves(shared_lab, "probed", idle="2s")
    connection = call(client, server)
    assert connection.ask("hello") == "hello"
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    connection.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    stays(server, "RUNNING", 4)
    before = server.hibernations()
    server.sleep()
    server.await_state("RUNNING", 3)
    assert server.hibernations() == before + 1
    assert connection.ask("hello") == "hello"


@contextlib.contextmanager
def daemon_with(variable: str) -> Iterator[None]:
    """The daemon has NAME=VALUE in its environment for a while; then it is as it was."""
    unit = Path("/run/systemd/system/architectd.service.d/test.conf")
    name, _, value = variable.partition("=")
    with contextlib.ExitStack() as undoing:
        undoing.callback(must, "architect", "up")
        must("architect", "down")
        if unit.parents[1].is_dir():
            unit.parent.mkdir(exist_ok=True)
            undoing.callback(must, "systemctl", "daemon-reload")
            undoing.callback(unit.unlink)
            unit.write_text(f"[Service]\nEnvironment={variable}\n")
            must("systemctl", "daemon-reload")
        else:
            patch = undoing.enter_context(pytest.MonkeyPatch.context())
            patch.setenv(name, value)
        must("architect", "up")
        undoing.callback(must, "architect", "down")
        yield


@pytest.fixture
def answering(footprint: support.Footprint) -> Iterator[None]:
    """A daemon that has keep-alive probes answered."""
    with daemon_with("ARCHITECT_ANSWER_KEEP_ALIVE=1"):
        yield


def probe_each_second(connection: Client, patience: int = 2) -> None:
    """From now on; so many without an answer are one too many."""
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, patience),
    ):
        connection.socket.setsockopt(socket.IPPROTO_TCP, option, value)
    connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def failure(connection: Client) -> int:
    return connection.socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def sleeps_through_probes(server: Container, connection: Client) -> None:
    """For longer than the client would wait without an answer."""
    before = server.hibernations()
    probe_each_second(connection)
    stays(server, "SCALED_DOWN", 5)
    assert server.hibernations() == before
    assert failure(connection) == 0


@pytest.mark.usefixtures("answering")
def test_answered_keep_alive_probes_do_not_wake(
    shared_lab: Lab, client: Machine, wire: Capture
) -> None:
    """Data wakes as ever, over a published port, too."""
    server = shared_lab.valkey("answered")
    with client.inside():
        connection = support.Valkey.connect(server.address, 6379)
    published = support.Valkey.connect("127.0.0.1", server.host_port)
    assert connection.command("INCR", "count") == 1
    assert published.command("INCR", "count") == 2
    server.sleep()
    seen = len(from_server(wire))
    sleeps_through_probes(server, connection)
    assert len(from_server(wire)) >= seen + 3
    sleeps_through_probes(server, published)
    assert failure(connection) == 0
    assert connection.command("INCR", "count") == 3
    assert published.command("INCR", "count") == 4
    assert server.state() == "RUNNING"


@pytest.mark.usefixtures("answering")
def test_answers_go_on_while_no_daemon_runs(
    shared_lab: Lab, client: Machine, wire: Capture
) -> None:
    server = halves(shared_lab, "unattended")
    connection = call(client, server)
    assert connection.ask("hello") == "hello"
    server.sleep()
    seen = len(from_server(wire))
    must("architect", "down")
    try:
        probe_each_second(connection)
        support.wait_until(lambda: len(from_server(wire)) >= seen + 4, "four answers", 8)
    finally:
        must("architect", "up")
    sleeps_through_probes(server, connection)
    assert connection.ask("hello") == "hello"


def test_checkpoint_has_connections_as_their_peers_know_them(
    shared_lab: Lab, client: Machine, wire: Capture
) -> None:
    """Those are asked in the way in which CRIU asks the server's: TCP_REPAIR of <linux/tcp.h>."""
    server = halves(shared_lab, "read")
    callers = [call(client, server) for _ in range(3)]
    for count, caller in enumerate(callers):
        for _ in range(count + 1):
            assert caller.ask("hello") == "hello"
    server.sleep()
    images = server.checkpoint()
    assert images is not None
    found = {one.peer_port: one for one in criuimages.connections(images)}
    assert len(found) == len(callers)
    for caller in callers:
        one = found[caller.socket.getsockname()[1]]
        assert one.local == bytes(10) + b"\xff\xff" + socket.inet_aton(server.address)
        assert one.peer == bytes(10) + b"\xff\xff" + socket.inet_aton(client.address)
        assert one.local_port == PORT
        assert one.timestamp is not None
        known = known_to(caller.socket)
        assert (one.receive_next, one.send_next) == known[:2]
        assert one.window == known[2]
    assert callers[0].ask("hello") == "hello"


def known_to(client: socket.socket) -> tuple[int, int, int]:
    """What it sends next, what it awaits, and how much it may send, as that stood in the header."""
    repair, repair_queue, queue_end, repair_window, no_probe = 19, 20, 21, 29, -1
    receive_queue, send_queue = 1, 2
    scales = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 8)[6]
    ends = {}
    client.setsockopt(socket.IPPROTO_TCP, repair, 1)
    for queue in (send_queue, receive_queue):
        client.setsockopt(socket.IPPROTO_TCP, repair_queue, queue)
        ends[queue] = client.getsockopt(socket.IPPROTO_TCP, queue_end) & 0xFFFFFFFF
    window = struct.unpack("=5I", client.getsockopt(socket.IPPROTO_TCP, repair_window, 20))[1]
    client.setsockopt(socket.IPPROTO_TCP, repair, no_probe)
    return ends[send_queue], ends[receive_queue], window >> (scales & 0xF)


@pytest.mark.parametrize("how", ["by the client", "by the server"])
@pytest.mark.usefixtures("answering")
def test_half_closed_connections_are_answered_for(
    shared_lab: Lab, client: Machine, wire: Capture, how: str
) -> None:
    server = halves(shared_lab, "half-answered")
    connection, other = call(client, server), call(client, server)
    assert connection.ask("hello") == other.ask("hello") == "hello"
    if how == "by the client":
        connection.socket.shutdown(socket.SHUT_WR)
    else:
        connection.socket.sendall(b"half\n")
        with pytest.raises(ConnectionError):
            connection.line()
    server.sleep()
    sleeps_through_probes(server, connection)
    assert other.ask("hello") == "hello"


@pytest.mark.usefixtures("answering")
def test_answers_are_for_packets_alone(shared_lab: Lab, client: Machine, wire: Capture) -> None:
    """With "connections" probes of a sleeper's connections wake, so that none of them is lost."""
    server = halves(shared_lab, "unanswered", monitor="connections")
    connection = call(client, server)
    assert connection.ask("hello") == "hello"
    server.sleep()
    # A connection that was given up would let it sleep again before anybody has looked.
    probe_each_second(connection, patience=9)
    server.await_state("RUNNING", 10)
    assert connection.ask("hello") == "hello"


# ---- none -----------------------------------------------------------------------------------------


def test_without_monitor_a_sleeper_is_silent_until_exec(shared_lab: Lab, client: Machine) -> None:
    server = halves(shared_lab, "silent", monitor=None)
    asking, listening = call(client, server), call(client, server)
    for one in (asking, listening):
        assert one.ask("hello") == "hello"
    server.sleep()
    with client.capture() as capture:
        asking.socket.sendall(b"asked while it slept\n")
        send_datagram(client, server)
        with client.inside():
            newcomer = socket.socket()
        waiting = Client(newcomer)
        newcomer.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            newcomer.connect((server.address, PORT))
        stays(server, "SCALED_DOWN", LONGER_S)
        assert from_server(capture) == []
        assert len(capture.repeated_openings()) >= 1
        assert server.exec("true").code == 0
        # By repetition of their own, as in a congested network.
        assert asking.line() == "asked while it slept"
        newcomer.settimeout(15)
        newcomer.sendall(b"new\n")
        assert waiting.line() == "new"
        assert listening.ask("hello") == "hello"
        assert capture.resets() == capture.unanswered_openings() == []


# ---- what is no activity --------------------------------------------------------------------------


def test_ignored_port_neither_keeps_awake_nor_wakes(shared_lab: Lab, client: Machine) -> None:
    name = unique("ignoring")
    annotations = support.settings(name, idle="2s", monitor="packets")
    annotations[IGNORE_ACTIVITY_PORTS] = {name: [81]}
    server = serve_pages(shared_lab, client, "ignoring", name=name, annotations=annotations)
    ignored = ["curl", "-sS", "--max-time", "1", "--http2-prior-knowledge"]

    def unanswered() -> bool:
        done = client.run(*ignored, f"http://{server.address}:81/")
        assert done.code in (0, 28), done.err
        return done.code == 28

    with client.capture() as capture:
        support.wait_until(unanswered, "it to hibernate in spite of requests", 10)
        assert unanswered()
        stays(server, "SCALED_DOWN", 0.5)
        assert client.must("curl", "-sSf", f"http://{server.address}/") == "hello over HTTP/1.1"
        assert server.state() == "RUNNING"
        assert not unanswered()
        assert capture.resets() == []


def test_outgoing_traffic_is_no_activity(shared_lab: Lab, client: Machine) -> None:
    """Neither of TCP with acknowledgements, nor of UDP with ICMP for an answer, nor within."""
    with client.inside():
        listener = socket.create_server(("", 0))
    listener.settimeout(DEADLINE_S)
    with listener, client.capture() as capture:
        server = serve(
            shared_lab,
            "talking",
            *("python3", "-c", program("talker.py"), client.address),
            str(listener.getsockname()[1]),
            port=PORT,
            ready=lambda server: "ready" in server.logs(),
            idle="1s",
        )
        listened = Client(listener.accept()[0])
        listened.socket.settimeout(DEADLINE_S)
        assert listened.line() == "1"
        listened.socket.settimeout(0.5)
        numbers, heard = [1], [1]
        for _ in range(3):
            server.await_state("SCALED_DOWN")
            # Ten a second while it runs, so it is silent if none comes for longer.
            with contextlib.suppress(TimeoutError):
                while True:
                    numbers.append(int(listened.line()))
            heard.append(len(numbers))
            architect("wake", server.name)
        assert numbers == [*range(1, len(numbers) + 1)]
        assert sorted(set(heard)) == heard, "it was woken and said nothing"
        assert not [one for one in capture.packets if one.flags & Flag.RST]
