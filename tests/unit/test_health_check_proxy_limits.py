"""The health-check-proxy at its bounds, under garbage, and as a program.

Why it exists: whoever reaches a pod reaches its shadow ports. Figures are taken of the program as `make
native` builds it; all else runs with the compiler's checks, as in test_health_check_proxy.py.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import os
import socket
import ssl
import subprocess
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit import probed
from tests.unit.probed import (
    SERVING,
    Grpc,
    GrpcClient,
    Health,
    Proxy,
    ask,
    asleep,
    check,
    free_port,
    fresh_name,
    hibernated,
    http_app,
    proxied_http,
    proxied_tcp,
    running,
    tcp_app,
    wait_until,
)

REQUEST_MAX = 65536
CONNECTIONS = 64
RESIDENT_KB = 3 * 1024
"""Of a proxy that has seen no TLS."""
RESIDENT_TLS_KB = 8 * 1024
GROWN_KB = 512
"""By how much 10,000 probes may change it: what is remembered, and the allocator's rounding."""


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program as it is installed."""
    return probed.build(tmp_path_factory.mktemp("native"))


@pytest.fixture(scope="session")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probed.build_checked(tmp_path_factory.mktemp("checked"))


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return probed.certificate(tmp_path_factory.mktemp("certificate"))


# ---- bounds --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"GET / HTTP/1.1\r\nA: " + b"a" * 20_000, 431),
        (b"POST / HTTP/1.1\r\nContent-Length: 70000\r\n\r\n", 413),
        (b"POST / HTTP/1.1\r\nContent-Length: 99999999999999999999999\r\n\r\n", 400),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n", 411),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\nContent-Length: 1\r\n\r\n", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 400),
        (b"GET /\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA : b\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: b\r\n c: d\r\n\r\n", 400),
        (b"GET / HTTP/1.1\r\nA: \0\r\n\r\n", 400),
    ],
)
def test_requests_beyond_the_bounds_are_refused_and_never_reach_the_app(
    program: Path, request_: bytes, status: int
) -> None:
    health = Health()
    with proxied_http(program, health) as proxy:
        with socket.create_connection(("127.0.0.1", proxy.port), timeout=10) as client:
            client.sendall(request_)
            assert client.recv(65536).startswith(b"HTTP/1.1 %d " % status)
        assert health.asked == []
        assert proxy.get().status == 200


def test_an_http2_connection_that_sends_too_much_is_closed(program: Path) -> None:
    ping = b"\0\0\x08\x06\0\0\0\0\0" + b"12345678"
    app = Grpc()
    with proxied_tcp(program, app.serve) as proxy:
        started = time.monotonic()
        with GrpcClient(proxy.port) as client, contextlib.suppress(ConnectionError):
            for _ in range(REQUEST_MAX // len(ping) + 1):
                client.socket.sendall(ping)
            while client.socket.recv(65536):
                pass
        assert time.monotonic() - started < 5
        assert check(proxy.port).health == SERVING


def test_sixty_four_connections_at_once_and_no_more(program: Path) -> None:
    with proxied_http(program, Health()) as proxy, contextlib.ExitStack() as stack:
        descriptors = Path(f"/proc/{proxy.process.pid}/fd")
        proxy.wait_idle()
        for _ in range(CONNECTIONS):
            client = socket.create_connection(("127.0.0.1", proxy.port), timeout=10)
            stack.enter_context(client)
        wait_until(lambda: len(list(descriptors.iterdir())) > 2 * CONNECTIONS, "all were accepted")
        with pytest.raises(ConnectionError):
            proxy.get()
        stack.close()
        wait_until(lambda: _answers(proxy), "the places are free again")


def _answers(proxy: Proxy) -> bool:
    try:
        return proxy.get().status == 200
    except ConnectionError:
        return False


def test_a_connection_lasts_ten_seconds(program: Path) -> None:
    with proxied_http(program, Health()) as proxy:
        silent, slow = (
            socket.create_connection(("127.0.0.1", proxy.port), timeout=20) for _ in range(2)
        )
        started = time.monotonic()
        with silent, slow:
            slow.sendall(b"GET / HTTP/1.1\r\n")
            for one in (silent, slow):
                with contextlib.suppress(ConnectionError):
                    assert one.recv(1) == b""
        assert 9.5 < time.monotonic() - started < 12


# ---- garbage -------------------------------------------------------------------------------------

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_starts = [b"", b"\x16\x03\x01", PREFACE, b"GET / HTTP/1.1\r\n", b"POST / HTTP/1.1\r\n", b"PRI "]
_starts += [PREFACE + b"\0\0\0\x04\0\0\0\0\0"]
_garbage = st.lists(
    st.one_of(
        st.binary(max_size=200),
        st.sampled_from([b"\r\n", b"\n", b": ", b"Content-Length: 5", b"Host: ", b"\r\n\r\n"]),
        st.sampled_from([b"Transfer-Encoding: chunked", b"5\r\n", b"HTTP/1.1 200 OK\r\n"]),
    ),
    max_size=12,
).map(b"".join)
quick = settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def test_garbage_harms_nobody(program: Path) -> None:
    with proxied_http(program, Health()) as proxy:

        @quick
        @given(start=st.sampled_from(_starts), garbage=_garbage, sleeps=st.booleans())
        def throw(start: bytes, garbage: bytes, *, sleeps: bool) -> None:
            state = proxy.asleep() if sleeps else contextlib.nullcontext()
            address = ("127.0.0.1", proxy.port)
            with (
                state,
                contextlib.suppress(OSError),
                socket.create_connection(address, 10) as client,
            ):
                client.sendall(start + garbage)
                client.shutdown(socket.SHUT_WR)
                while client.recv(65536):
                    pass
            assert proxy.process.poll() is None

        throw()
        assert proxy.get().status == 200


def test_garbage_from_the_app_harms_nobody(program: Path) -> None:
    thrown = [b""]

    def serve(connection: socket.socket) -> None:
        if connection.recv(65536):
            connection.sendall(thrown[0])

    with proxied_tcp(program, serve) as proxy:

        @quick
        @given(
            start=st.sampled_from([b"", b"HTTP/1.1 200 OK\r\n", b"\0\0\0\x04\0\0\0\0\0"]),
            garbage=_garbage,
        )
        def throw(start: bytes, garbage: bytes) -> None:
            thrown[0] = start + garbage
            with contextlib.suppress(ConnectionError, http.client.HTTPException):
                proxy.get()
            with contextlib.suppress(ConnectionError):
                assert check(proxy.port).status != 0
            assert proxy.process.poll() is None

        throw()


# ---- the program ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], ["--map", "NAME:SHADOWPORT:APPPORT"]),
        (["--map"], ["--map", "missing"]),
        (["--mop", "a:1:2"], ["--mop", "--map"]),
        (["--map", "web"], ["web", "three parts"]),
        (["--map", "web:1"], ["web:1", "three parts"]),
        (["--map", ":1:2"], [":1:2", "NAME"]),
        (["--map", "a b:1:2"], ["a b:1:2", "NAME"]),
        (["--map", "a" * 91 + ":1:2"], ["NAME"]),
        (["--map", "a" * 300], ["too long"]),
        (["--map", "web:0:2"], ["web:0:2", "SHADOWPORT '0'", "65535"]),
        (["--map", "web:1:65536"], ["APPPORT '65536'", "65535"]),
        (["--map", "web:+1:2"], ["SHADOWPORT '+1'"]),
        (["--map", "web:1:2:3"], ["APPPORT '2:3'"]),
        (["--map", "web:8080:8080"], ["web:8080:8080", "same"]),
        (["--map", "a:80:1", "--map=b:80:2"], ["b:80:2", "SHADOWPORT 80", "container a"]),
        ([f"--map=a:{n}:1000" for n in range(1, 66)], ["a:65:1000", "64"]),
    ],
)
def test_wrong_usage_ends_with_two_and_one_line_that_helps(
    program: Path, arguments: list[str], named: list[str]
) -> None:
    done = subprocess.run(
        [program, *arguments], capture_output=True, text=True, check=False, timeout=10
    )
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("health-check-proxy: ")
    assert [word for word in named if word not in line] == []


def test_a_port_that_is_taken_ends_it_with_one(program: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = subprocess.run(
            [program, "--map", f"web:{port}:1"],
            capture_output=True,
            text=True,
            check=False,
            timeout=10,
        )
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert f"shadowPort {port} of container web: Address already in use" in line


def test_several_mappings_are_kept_apart(program: Path) -> None:
    one, two = Health(200), Health(201)
    with http_app(one) as first, http_app(two) as second:
        ports, names = (free_port(), free_port()), (fresh_name(), fresh_name())
        command: list[str | Path] = [program]
        for name, shadow, app in zip(names, ports, (first, second), strict=True):
            command += ["--map", f"{name}:{shadow}:{app}"]
        process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            for port, status in zip(ports, (200, 201), strict=True):
                wait_until(functools.partial(probed.accepts, port), "it is open")
                assert ask(port).status == status
            with asleep(names[0]):
                assert hibernated(ask(ports[0]))
                assert not hibernated(ask(ports[1]))
        finally:
            process.terminate()
            assert process.wait(10) == 0


def test_it_is_small_and_does_not_grow(built: Path, certificate: Path) -> None:
    """10,000 probes of all kinds, awake and asleep."""
    health, app = Health(), Grpc()
    with (
        proxied_http(built, health) as proxy,
        tcp_app(app.serve) as grpc,
        running(built, grpc.port) as grpc_proxy,
        http_app(health, context=probed.server_context(certificate)) as secure,
        running(built, secure) as secure_proxy,
    ):
        grpc_proxy.wait_open()
        secure_proxy.wait_open()

        def probe(number: int) -> None:
            if number % 4 == 0:
                assert proxy.accepts()
            elif number % 20 == 1:
                assert secure_proxy.get(tls=True).status == 200
            elif number % 20 == 2:
                assert check(grpc_proxy.port).health == SERVING
            else:
                assert proxy.get(f"/{number % 40}").status in (200, 503)

        for number in range(1000):
            probe(number)
        proxies = (proxy, grpc_proxy, secure_proxy)
        before = [one.resident_kb for one in proxies]
        for number in range(5000):
            probe(number)
        with proxy.asleep(), grpc_proxy.asleep(), secure_proxy.asleep():
            for number in range(5000):
                probe(number)
        after = [one.resident_kb for one in proxies]
        print(f"resident kB after 10,000 probes: http, gRPC, TLS: {after}, before: {before}")
        assert max(after[:2]) < RESIDENT_KB
        assert after[2] < RESIDENT_TLS_KB
        assert max(b - a for a, b in zip(before, after, strict=True)) < GROWN_KB


def test_a_client_hello_is_known_at_whatever_instant_it_comes(built: Path) -> None:
    """In the midst of the proxy's first look at the connection, too."""
    incoming, outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = probed.unverified().wrap_bio(incoming, outgoing)
    with pytest.raises(ssl.SSLWantReadError):
        client.do_handshake()
    hello = outgoing.read()
    with proxied_tcp(built) as proxy:
        for number in range(20_000):
            with socket.create_connection(("127.0.0.1", proxy.port), 10) as one:
                at = time.perf_counter_ns() + number % 200 * 1000
                while time.perf_counter_ns() < at:
                    pass
                one.sendall(hello)
                assert one.recv(1) == b"\x16", "no ServerHello's record came back"


def test_it_needs_no_library(built: Path) -> None:
    """It runs in an image that has nothing else, and in any pod's namespaces."""
    headers = subprocess.run(
        ["readelf", "--program-headers", built], capture_output=True, text=True, check=True
    ).stdout
    assert "INTERP" not in headers
    assert os.access(built, os.X_OK)
