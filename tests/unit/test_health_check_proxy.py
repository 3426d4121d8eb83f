"""The health-check-proxy with real servers, real clients and a keeper's sign that the container sleeps.

Why it exists: what a probe sees while a container sleeps decides whether Kubernetes leaves it alone. Each
test runs native/health-check-proxy built with the compiler's checks of memory and arithmetic (-fsanitize),
so that a wrong access ends it. Bounds, garbage and the program itself: test_health_check_proxy_limits.py.
"""

from __future__ import annotations

import contextlib
import http.client
import socket
import ssl
import struct
import threading
import time
from pathlib import Path

import pytest

from tests.unit import probed
from tests.unit.probed import (
    NOT_SERVING,
    SERVING,
    Answer,
    Grpc,
    GrpcClient,
    Health,
    ask,
    asleep,
    check,
    free_port,
    fresh_name,
    hibernated,
    proxied_http,
    proxied_tcp,
    running,
    tcp_app,
    wait_until,
)

TRAFFIC_CLASS = 0x5C
"""Of native/health-check-proxy/bounds.h, which the gate knows."""
BODY_KEPT = 4096


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probed.build_checked(tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probed.certificate(tmp_path_factory.mktemp("certificate"))


# ---- HTTP ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
@pytest.mark.parametrize("status", [200, 301, 404, 503])
def test_the_last_answer_is_given_while_the_container_sleeps(
    program: Path, certificate: Path, status: int, *, secure: bool
) -> None:
    health = Health(status, b"as I am\n", {"X-Health": "a, b", "Content-Type": "text/health"})
    context = probed.server_context(certificate) if secure else None
    with proxied_http(program, health, context) as proxy:
        awake = proxy.get("/healthz?full=1", tls=secure)
        assert (awake.status, awake.text, hibernated(awake)) == (status, b"as I am\n", False)
        assert awake.getheader("X-Health") == "a, b"

        with proxy.asleep():
            remembered = proxy.get("/healthz?full=1", tls=secure)
        assert (remembered.status, remembered.text) == (status, b"as I am\n")
        assert hibernated(remembered)
        assert remembered.getheader("X-Health") == "a, b"
        assert remembered.getheader("Content-Type") == "text/health"
        assert remembered.getheader("Content-Length") == "8"
        assert len(health.asked) == 1, "the sleeper was asked"

        health.status = 204
        assert proxy.get("/healthz?full=1", tls=secure).status == 204
        with proxy.asleep():
            assert proxy.get("/healthz?full=1", tls=secure).status == 204


def test_a_request_reaches_the_app_whole(program: Path) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        headers = {"Host": "shop.example", "User-Agent": "kube-probe/1.33", "X-Own": "1"}
        headers |= {"Connection": "keep-alive", "Accept": "*/*"}
        answer = ask(proxy.port, "/a%20b", method="POST", body=b"x" * 60_000, headers=headers)
        assert answer.status == 200
        ((method, path, seen, body),) = health.asked
        assert (method, path, body) == ("POST", "/a%20b", b"x" * 60_000)
        sent = headers | {"Connection": "close"}
        assert {name: seen[name] for name in sent} == sent


def test_answers_are_told_apart_by_method_path_and_host(program: Path) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        asked = [("GET", "/a", "x"), ("GET", "/b", "x"), ("HEAD", "/a", "x"), ("GET", "/a", "y")]
        for number, (method, path, host) in enumerate(asked):
            health.status, health.body = 200 + number, b"n" * (number + 1)
            ask(proxy.port, path, method=method, headers={"Host": host})
        with proxy.asleep():
            for number, (method, path, host) in enumerate(asked):
                answer = ask(proxy.port, path, method=method, headers={"Host": host})
                assert answer.status == 200 + number
                assert answer.getheader("Content-Length") == str(number + 1)
                assert answer.text == (b"" if method == "HEAD" else b"n" * (number + 1))
            assert ask(proxy.port, "/c", headers={"Host": "x"}).status == 503


def test_what_was_never_asked_is_unavailable(program: Path) -> None:
    with proxied_http(program, Health()) as proxy:
        proxy.get("/asked")
        with proxy.asleep():
            answer = proxy.get("/")
            assert (answer.status, hibernated(answer)) == (503, True)
            assert b"never asked" in answer.text


def test_what_fails_says_so_by_a_name(program: Path) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        for status, failing in ((200, False), (503, True), (302, False), (404, True), (200, False)):
            health.status = status
            assert proxy.get("/").status == status
            proxy.wait_idle()  # the answer is out before what it says of the app is noted
            assert proxy.is_failing() == failing


def test_of_many_questions_the_least_recently_asked_is_forgotten(program: Path) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        for number in range(16):
            proxy.get(f"/{number}")
        proxy.get("/0")
        proxy.get("/another")
        with proxy.asleep():
            assert proxy.get("/0").status == 200
            assert proxy.get("/another").status == 200
            assert proxy.get("/1").status == 503
            assert proxy.get("/2").status == 200
        proxy.get("/more")  # a question to the memory counts as one too
        with proxy.asleep():
            assert proxy.get("/2").status == 200
            assert proxy.get("/3").status == 503


@pytest.mark.parametrize("size", [0, 1, BODY_KEPT - 1, BODY_KEPT, BODY_KEPT + 1, 300_000])
@pytest.mark.parametrize("chunked", [False, True])
def test_answers_of_any_size_pass_and_their_beginning_is_kept(
    program: Path, size: int, *, chunked: bool
) -> None:
    body = (b"0123456789abcdef" * (size // 16 + 1))[:size]
    with proxied_http(program, Health(body=body, chunked=chunked)) as proxy:
        assert proxy.get().text == body
        with proxy.asleep():
            answer = proxy.get()
            assert (answer.status, answer.text) == (200, body[:BODY_KEPT])
            assert answer.getheader("Transfer-Encoding") is None


def test_a_long_answer_is_passed_on_as_it_comes(program: Path) -> None:
    seen = threading.Event()

    def serve(connection: socket.socket) -> None:
        if connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 6000\r\n\r\n" + b"x" * 5000)
            assert seen.wait(5), "nothing of it was passed on"
            connection.sendall(b"x" * 1000)

    with proxied_tcp(program, serve) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            seen.set()
            assert sum(map(len, iter(lambda: client.recv(65536), b""))) > 6000
        # Once it has begun nothing else can take its place.
        seen.clear()
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            client.sendall(b"GET / HTTP/1.1\r\n\r\n")
            assert client.recv(15) == b"HTTP/1.1 200 OK"
            with proxy.asleep(), contextlib.suppress(ConnectionError):
                while rest := client.recv(65536):
                    assert b"HTTP" not in rest
            seen.set()


def test_an_answer_without_a_length_ends_with_its_connection(program: Path) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.0 200 fine\nX-Old: yes\n\nold ")
        connection.sendall(b"style")

    with proxied_tcp(program, serve) as proxy:
        assert proxy.get().text == b"old style"
        with proxy.asleep():
            answer = proxy.get()
            assert (answer.status, answer.reason, answer.text) == (200, "fine", b"old style")
            assert answer.getheader("X-Old") == "yes"


def test_interim_answers_are_passed_and_not_remembered(program: Path) -> None:
    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 103 Early\r\nLink: a\r\n\r\nHTTP/1.1 200 OK\r\n")
        connection.sendall(b"Content-Length: 2\r\n\r\nok")

    with proxied_tcp(program, serve) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port)) as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
            seen = b"".join(iter(lambda: client.recv(65536), b""))
        assert seen.startswith(b"HTTP/1.1 103 Early\r\n")
        assert seen.endswith(b"\r\n\r\nok")
        with proxy.asleep():
            answer = proxy.get("/", Host="a")
            assert (answer.status, answer.text) == (200, b"ok")
            assert answer.getheader("Link") is None


def test_headers_too_long_to_keep_leave_the_status(program: Path) -> None:
    with proxied_http(program, Health(418, headers={"X-Long": "l" * 6000})) as proxy:
        assert len(proxy.get().getheader("X-Long") or "") == 6000
        with proxy.asleep():
            answer = proxy.get()
            assert (answer.status, answer.text) == (418, b"fine\n")
            assert answer.getheader("X-Long") is None


def test_expecting_clients_are_told_to_go_on(program: Path) -> None:
    health = Health()
    with (
        proxied_http(program, health) as proxy,
        socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client,
    ):
        client.sendall(b"PUT / HTTP/1.1\r\nContent-Length: 3\r\nExpect: 100-continue\r\n\r\n")
        assert client.recv(65536) == b"HTTP/1.1 100 Continue\r\n\r\n"
        client.sendall(b"abc")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
        assert health.asked[0][3] == b"abc"


BROKEN = {
    "nothing": b"",
    "no HTTP": b"SSH-2.0-OpenSSH\r\n\r\n",
    "half a head": b"HTTP/1.1 200 OK\r\nContent-Le",
    "half a body": b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nhalf",
    "half a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n9\r\nhalf",
    "no chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    "two lengths": b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "endless head": b"HTTP/1.1 200 OK\r\n" + b"X-Y: " + b"y" * 30_000,
}


@pytest.mark.parametrize("answer", BROKEN.values(), ids=BROKEN)
def test_a_broken_answer_is_a_failure_and_stays_one(program: Path, answer: bytes) -> None:
    answers = [b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok", answer]

    def serve(connection: socket.socket) -> None:
        if connection.recv(65536):
            connection.sendall(answers.pop(0))

    with proxied_tcp(program, serve) as proxy:
        assert proxy.get().status == 200
        assert proxy.get().status == 502
        with proxy.asleep():
            assert proxy.get().status == 502


def test_a_long_answer_that_breaks_off_does_so_for_the_probe_too(program: Path) -> None:
    def serve(connection: socket.socket) -> None:
        if connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n" + b"x" * 50_000)

    with proxied_tcp(program, serve) as proxy:
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            proxy.get()
        with proxy.asleep():
            assert proxy.get().status == 502


def test_a_probe_that_gives_up_has_seen_a_failure(program: Path) -> None:
    health = Health(hold=threading.Event())
    with proxied_http(program, health) as proxy:
        impatient = http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=0.2)
        with contextlib.closing(impatient):
            impatient.request("GET", "/", headers={"Host": "a"})
            with pytest.raises(TimeoutError):
                impatient.getresponse()
        started = time.monotonic()
        proxy.wait_idle()
        assert time.monotonic() - started < 5, (
            "it was noticed only when the connection's time was over"
        )
        with proxy.asleep():
            assert proxy.get("/", Host="a").status == 504
        assert health.hold is not None
        health.hold.set()
        health.hold = None
        assert proxy.get("/", Host="a").status == 200
        with proxy.asleep():
            assert proxy.get("/", Host="a").status == 200


def test_an_app_that_hangs_has_ten_seconds(program: Path) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        assert proxy.get().status == 200
        health.hold = threading.Event()
        started = time.monotonic()
        with contextlib.closing(
            http.client.HTTPConnection("127.0.0.1", proxy.port, timeout=20)
        ) as patient:
            patient.request("GET", "/")
            assert patient.getresponse().status == 504
        assert 9.9 < time.monotonic() - started < 12
        health.hold.set()
        with proxy.asleep():
            assert proxy.get().status == 504


@pytest.mark.parametrize("secure", [False, True], ids=["http", "https"])
def test_going_to_sleep_while_an_answer_is_awaited_answers_from_memory(
    program: Path, certificate: Path, *, secure: bool
) -> None:
    health = Health(body=b"before")
    context = probed.server_context(certificate) if secure else None
    with proxied_http(program, health, context) as proxy:
        assert proxy.get(tls=secure).status == 200
        health.hold = threading.Event()
        answers: list[http.client.HTTPResponse] = []
        asker = threading.Thread(target=lambda: answers.append(proxy.get(tls=secure)))
        asker.start()
        wait_until(lambda: len(health.asked) == 2, "the app was asked")
        started = time.monotonic()
        with proxy.asleep():
            asker.join(10)
            took = time.monotonic() - started
        health.hold.set()
        (answer,) = answers
        assert isinstance(answer, Answer)
        assert (answer.status, answer.text, hibernated(answer)) == (200, b"before", True)
        assert took < 1


def test_an_app_frozen_in_the_middle_of_its_answer_is_no_failure(program: Path) -> None:
    frozen = threading.Event()
    parts = [True, False]

    def serve(connection: socket.socket) -> None:
        if connection.recv(65536):
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nok")
            if parts.pop(0):
                connection.sendall(b"ay")
            else:
                frozen.wait(10)

    with proxied_tcp(program, serve) as proxy:
        assert proxy.get().status == 200
        asker = threading.Thread(target=lambda: answers.append(proxy.get()))
        answers: list[http.client.HTTPResponse] = []
        asker.start()
        wait_until(lambda: not parts, "half of the answer was sent")
        with proxy.asleep():
            asker.join(10)
        frozen.set()
        (answer,) = answers
        assert isinstance(answer, Answer)
        assert (answer.status, answer.text, hibernated(answer)) == (200, b"okay", True)


# ---- TCP -----------------------------------------------------------------------------------------


def test_the_port_is_open_while_the_apps_is(program: Path) -> None:
    port = free_port()
    with running(program, port) as proxy:
        assert not proxy.accepts()
        with tcp_app(port=port):
            proxy.wait_open()
        proxy.wait_closed()
        assert not proxy.accepts()
        with tcp_app(port=port):
            proxy.wait_open()


def test_one_probe_at_most_is_told_the_old_state(program: Path) -> None:
    with tcp_app() as app, running(program, app.port) as proxy:
        proxy.wait_open()
        proxy.wait_idle()
        app.close()
        with (  # how far the first gets is the kernel's affair
            contextlib.suppress(ConnectionError),
            socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as first,
        ):
            assert first.recv(1) == b""
        assert not proxy.accepts()


def test_a_sleepers_port_stays_as_it_was(program: Path) -> None:
    port = free_port()
    with running(program, port) as proxy:
        with tcp_app(port=port) as app:
            proxy.wait_open()
            wait_until(lambda: len(app.syns) == 2, "the proxy's look and the probe were counted")
            with proxy.asleep():
                assert all(proxy.accepts() for _ in range(20))
                assert len(app.syns) == 2, "the sleeper was connected to"
        proxy.wait_closed()
        with proxy.asleep():
            assert not any(proxy.accepts() for _ in range(20))


def test_a_proxy_that_starts_beside_a_sleeper_takes_it_for_healthy(program: Path) -> None:
    name = fresh_name()
    with asleep(name), running(program, free_port(), container=name) as proxy:
        proxy.wait_open()
        answer = proxy.get()
        assert (answer.status, hibernated(answer)) == (200, True)
        assert check(proxy.port).health == SERVING
        # Awake it has to be seen healthy first.
        assert proxy.is_failing()


def test_the_apps_packets_carry_the_gates_mark(program: Path) -> None:
    with tcp_app() as app, running(program, app.port) as proxy:
        proxy.wait_open()
        proxy.accepts()
        wait_until(lambda: len(app.syns) >= 3, "the app was connected to")
        # The test's own connections go to the proxy: every one here is the proxy's.
        assert {syn[1] for syn in app.syns} == {TRAFFIC_CLASS}


def test_an_app_on_ipv6_only_is_found_and_its_packets_are_marked(program: Path) -> None:
    with tcp_app(host="::1") as app, running(program, app.port) as proxy:
        proxy.wait_open()
        wait_until(lambda: app.syns != [], "the app was connected to")
        words = {struct.unpack(">I", syn[:4])[0] for syn in app.syns}
        assert {word >> 20 & 0xFF for word in words} == {TRAFFIC_CLASS}


def test_an_app_on_the_pods_own_address_only_is_found(program: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as route:  # nothing is sent
        route.connect(("192.0.2.1", 9))
        own = route.getsockname()[0]
    with tcp_app(host=own) as app, running(program, app.port) as proxy:
        proxy.wait_open()
        wait_until(lambda: app.syns != [], "the app was connected to")
        assert {syn[1] for syn in app.syns} == {TRAFFIC_CLASS}


def test_an_app_that_accepts_and_resets_accepts(program: Path) -> None:
    def serve(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    with proxied_tcp(program, serve) as proxy:
        for _ in range(50):
            assert proxy.accepts()
            assert proxy.get().status == 502


def test_an_app_whose_queue_is_full_does_not_accept(program: Path) -> None:
    with contextlib.ExitStack() as stack:
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        port = full.getsockname()[1]
        stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=10))
        proxy = stack.enter_context(running(program, port))
        line = proxy.first_line()
        assert line == (
            f"health-check-proxy: port {port} of container {proxy.container} does not accept "
            f"connections, so port {proxy.port} does not\n"
        )
        assert not proxy.accepts()
        full.accept()[0].close()
        proxy.wait_open()


def test_probes_over_ipv6_are_answered(program: Path) -> None:
    with (
        proxied_http(program, Health()) as proxy,
        socket.create_connection(("::1", proxy.port), timeout=10) as client,
    ):
        client.sendall(b"GET / HTTP/1.1\r\nHost: a\r\n\r\n")
        assert client.recv(65536).startswith(b"HTTP/1.1 200 ")


# ---- TLS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls_is_spoken_awake_and_asleep(
    program: Path, certificate: Path, version: ssl.TLSVersion
) -> None:
    context = probed.unverified()
    context.minimum_version = context.maximum_version = version
    with proxied_http(program, Health(), probed.server_context(certificate)) as proxy:

        def status() -> int:
            with contextlib.closing(
                http.client.HTTPSConnection("127.0.0.1", proxy.port, timeout=10, context=context)
            ) as client:
                client.request("GET", "/")
                return client.getresponse().status

        assert status() == 200
        with proxy.asleep():
            assert status() == 200


def test_the_name_that_a_client_asks_for_reaches_the_app(program: Path, certificate: Path) -> None:
    names: list[str | None] = []
    context = probed.server_context(certificate)
    context.sni_callback = lambda connection, name, _: names.append(name)

    def serve(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

    with proxied_tcp(program, serve, context) as proxy:
        plain = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
        with probed.unverified().wrap_socket(plain, server_hostname="shop.example") as client:
            client.sendall(b"GET / HTTP/1.1\r\nHost: shop.example\r\n\r\n")
            assert client.recv(65536).startswith(b"HTTP/1.1 200 ")
    assert names == ["shop.example"]


def test_https_to_an_app_without_it_is_a_failure(program: Path) -> None:
    with proxied_http(program, Health()) as proxy:
        assert proxy.get(tls=True).status == 502
        with proxy.asleep():
            assert proxy.get(tls=True).status == 502
            assert proxy.get().status == 503, "http and https are two questions"


# ---- gRPC ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("secure", [False, True], ids=["h2c", "tls"])
def test_a_services_last_health_is_told_while_the_container_sleeps(
    program: Path, certificate: Path, *, secure: bool
) -> None:
    app = Grpc({"": SERVING, "shop": NOT_SERVING})
    context = probed.server_context(certificate, "h2") if secure else None
    with proxied_tcp(program, app.serve, context) as proxy:
        assert check(proxy.port, tls=secure).health == SERVING
        shop = check(proxy.port, "shop", tls=secure)
        assert shop.health == NOT_SERVING
        assert "architect-hibernated" not in shop.headers
        assert app.asked[-1][":authority"] == "app.example"
        assert app.asked[-1]["user-agent"] == "kube-probe/test"
        with proxy.asleep():
            remembered = check(proxy.port, tls=secure)
            assert remembered.health == SERVING
            assert remembered.headers["architect-hibernated"] == "true"
            assert check(proxy.port, "shop", tls=secure).health == NOT_SERVING
            assert check(proxy.port, "never", tls=secure).health == NOT_SERVING
        assert len(app.asked) == 2
        app.services[""] = NOT_SERVING
        assert check(proxy.port, tls=secure).health == NOT_SERVING
        with proxy.asleep():
            assert check(proxy.port, tls=secure).health == NOT_SERVING


def test_a_grpc_status_is_passed_on_and_remembered(program: Path) -> None:
    app = Grpc(status=13, text="a%20b")
    with proxied_tcp(program, app.serve) as proxy:
        for context in (contextlib.nullcontext(), proxy.asleep()):
            with context:
                answer = check(proxy.port, "")
                assert (answer.status, answer.headers["grpc-message"]) == (13, "a%20b")
                assert answer.message == b""


def test_one_connection_may_check_again_and_again(program: Path) -> None:
    app = Grpc()
    with proxied_tcp(program, app.serve) as proxy, GrpcClient(proxy.port) as client:
        for _ in range(5):
            assert client.finish(client.begin()).health == SERVING
        with proxy.asleep():
            assert client.finish(client.begin()).health == SERVING
        app.services[""] = NOT_SERVING
        assert client.finish(client.begin()).health == NOT_SERVING


def test_other_calls_are_not_implemented(program: Path) -> None:
    app = Grpc()
    with proxied_tcp(program, app.serve) as proxy:
        for path in ("/grpc.health.v1.Health/Watch", "/shop.Shop/Buy"):
            assert check(proxy.port, path=path).status == 12
        assert app.asked == []


def test_an_app_without_grpc_is_unavailable(program: Path) -> None:
    with proxied_http(program, Health()) as proxy:
        assert check(proxy.port).status == 14
        with proxy.asleep():
            assert check(proxy.port).status == 14


def test_going_to_sleep_while_a_call_waits_answers_from_memory(program: Path) -> None:
    app = Grpc()
    with proxied_tcp(program, app.serve) as proxy:
        assert check(proxy.port).health == SERVING
        app.hold = threading.Event()
        with GrpcClient(proxy.port) as client:
            stream = client.begin()
            wait_until(lambda: len(app.asked) == 2, "the app was asked")
            with proxy.asleep():
                answer = client.finish(stream)
        app.hold.set()
        assert answer.health == SERVING
        assert answer.headers["architect-hibernated"] == "true"


def test_a_grpc_probe_that_gives_up_has_seen_a_failure(program: Path) -> None:
    app = Grpc()
    with proxied_tcp(program, app.serve) as proxy:
        assert check(proxy.port).health == SERVING
        app.hold = threading.Event()
        with GrpcClient(proxy.port) as client:
            client.begin()
            wait_until(lambda: len(app.asked) == 2, "the app was asked")
        started = time.monotonic()
        proxy.wait_idle()
        assert time.monotonic() - started < 5, (
            "it was noticed only when the connection's time was over"
        )
        with proxy.asleep():
            assert check(proxy.port).status == 4
        app.hold.set()
