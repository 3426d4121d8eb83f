"""Clients that mostly listen: pub/sub, server-sent events, websockets, gRPC streams; and plain HTTP.

None of them is cut off when its server hibernates, and each gets what is published afterwards. Before
that it has sent nothing: the server was woken by somebody else.
"""

import pytest

from bench.valkey import encode
from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine, Session, program
from tests.engine.servers.serving import serve, serve_pages
from tests.engine.support import Client, Container, Lab, Valkey

pytestmark = pytest.mark.engine


# ---- valkey ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def valkey(shared_lab: Lab) -> Container:
    return shared_lab.valkey("valkey")


def connect(client: Machine, valkey: Container) -> Valkey:
    with client.inside():
        return Valkey.connect(valkey.address, 6379)


def test_subscriber_of_valkey_only_listens(
    valkey: Container, client: Machine, wire: Capture
) -> None:
    listener = connect(client, valkey)
    assert listener.command("SUBSCRIBE", "news") == ["subscribe", "news", 1]
    for number in range(3):
        valkey.sleep()
        publisher = connect(client, valkey)
        assert publisher.command("PUBLISH", "news", f"number {number}") == 1
        assert listener.reply() == ["message", "news", f"number {number}"]
        publisher.close()


def test_blocked_client_of_valkey_gets_its_item(
    valkey: Container, client: Machine, wire: Capture
) -> None:
    blocked = connect(client, valkey)
    blocked.socket.sendall(encode(["BLPOP", "list", 0]))
    valkey.sleep()
    assert connect(client, valkey).command("RPUSH", "list", "item") == 1
    assert blocked.reply() == ["list", "item"]


# ---- nginx ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nginx(shared_lab: Lab, client: Machine) -> Container:
    return serve_pages(shared_lab, client, "nginx")


def publish(client: Machine, server: Container, channel: str, text: str) -> None:
    url = f"http://{server.address}/pub/{channel}"
    client.must("curl", "-sSf", "--data-binary", text, url)


def test_curl_asks_a_sleeper(nginx: Container, client: Machine, wire: Capture) -> None:
    for words, version in (([], "HTTP/1.1"), (["--http2-prior-knowledge"], "HTTP/2.0")):
        port = 81 if words else 80
        for _ in range(2):
            nginx.sleep()
            answer = client.must("curl", "-sSf", *words, f"http://{nginx.address}:{port}/")
            assert answer == f"hello over {version}"


def test_long_first_request_is_whole(nginx: Container, client: Machine, wire: Capture) -> None:
    """A body of megabytes, most of it sent while its server still wakes."""
    megabytes = 4
    nginx.sleep()
    answer = client.must(
        *("curl", "-sSf", "-H", "Expect:", "--data-binary", "@-", f"http://{nginx.address}/upload"),
        stdin="x" * (megabytes << 20),
    )
    assert answer == f"took {megabytes << 20}"


def test_kept_alive_http_connection_goes_on(
    nginx: Container, client: Machine, wire: Capture
) -> None:
    with client.inside():
        raw = Client.connect(nginx.address, 80)
    for _ in range(3):
        nginx.sleep()
        raw.socket.sendall(b"GET / HTTP/1.1\r\nHost: test\r\n\r\n")
        assert raw.line() == "HTTP/1.1 200 OK"
        while raw.line():
            pass
        assert raw.bytes(19) == b"hello over HTTP/1.1"


def test_server_sent_events_go_on(nginx: Container, client: Machine, wire: Capture) -> None:
    url = f"http://{nginx.address}/sub/events"
    # -i and the first event tell when the stream is open.
    with client.session("curl", "-sSNi", "-H", "Accept: text/event-stream", url) as stream:
        stream.until("200 OK")
        publish(client, nginx, "events", "first")
        assert stream.until("data:") == "data: first"
        for number in range(3):
            nginx.sleep()
            assert stream.alive()
            publish(client, nginx, "events", f"number {number}")
            assert stream.until("data:") == f"data: number {number}"


def test_websocket_goes_on(nginx: Container, client: Machine, wire: Capture) -> None:
    """One of the two only listens; the other's message wakes the server."""
    url = f"ws://{nginx.address}/both/talk"

    def open_one() -> Session:
        return client.session("python3", "-c", program("websocket.py"), url)

    with open_one() as listener, open_one() as speaker:
        for one in (listener, speaker):
            assert one.line() == "open"
        for number in range(3):
            nginx.sleep()
            speaker.send(f"number {number}")
            for one in (listener, speaker):
                assert one.line() == f"number {number}"
        nginx.sleep()
        publish(client, nginx, "talk", "from outside")
        for one in (listener, speaker):
            assert one.line() == "from outside"


# ---- gRPC -----------------------------------------------------------------------------------------


def call(client: Machine, server: Container, method: str) -> Session:
    target = f"{server.address}:50051"
    return client.session("python3", "-c", program("grpc_client.py"), target, method)


@pytest.fixture(scope="module")
def grpc(shared_lab: Lab) -> Container:
    return serve(
        shared_lab,
        "grpc",
        *("python3", "-c", program("grpc_server.py")),
        port=50051,
        ready=lambda server: "ready" in server.logs(),
    )


def test_grpc_calls_go_on(grpc: Container, client: Machine, wire: Capture) -> None:
    grpc.sleep()
    with call(client, grpc, "Echo") as echo, call(client, grpc, "Chat") as chat:
        assert echo.ask("to a sleeper") == "to a sleeper"
        for number in range(3):
            grpc.sleep()
            assert echo.ask(f"call {number}") == f"call {number}"
            grpc.sleep()
            assert chat.ask("message") == f"{number} message"


def test_watcher_over_grpc_only_listens(grpc: Container, client: Machine, wire: Capture) -> None:
    with call(client, grpc, "Watch") as watcher:
        assert watcher.line() == "watching"
        for number in range(3):
            grpc.sleep()
            with call(client, grpc, "Publish") as publisher:
                assert publisher.ask(f"number {number}") == "1"
            assert watcher.line() == f"number {number}"
