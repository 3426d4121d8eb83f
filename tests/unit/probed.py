"""What test_health_check_proxy*.py put around a health-check-proxy: apps to probe, and probes.

The servers are real ones on loopback ports: Python's HTTP server, OpenSSL's TLS, h2's HTTP/2. A container
is put to sleep as its keeper does it, by a datagram socket with the abstract name that the proxy looks
for.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import ipaddress
import itertools
import os
import signal
import socket
import ssl
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import h2.config
import h2.connection
import h2.events
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

NATIVE = Path(__file__).resolve().parents[2] / "native"
DEADLINE_S = 10.0
TCP_SAVE_SYN, TCP_SAVED_SYN = 27, 28
"""Of linux/tcp.h: an accepted socket can tell the headers of its first packet."""
_names = itertools.count()


def build(folder: Path) -> Path:
    """The program, built as it is installed."""
    program = folder / "health-check-proxy"
    command: list[str | Path] = ["make", "--silent", "-C", NATIVE, f"BUILD={folder}", program]
    subprocess.run(command, check=True)
    return program


def build_checked(folder: Path) -> Path:
    """The program, built so that it finds its own wrong accesses and ends at the first."""
    program = folder / "health-check-proxy"
    flags = ["-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror"]
    flags += ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    files = sorted((NATIVE / "health-check-proxy").glob("*.c"))
    libraries = ["-lnghttp2", "-lssl", "-lcrypto"]
    subprocess.run(["gcc", *flags, "-o", program, *files, *libraries], check=True)
    return program


def fresh_name() -> str:
    """A container's name that no other test, or run of the tests, has."""
    return f"c{os.getpid()}-{next(_names)}"


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


def accepts(port: int) -> bool:
    """What a TCP probe of that port sees; whoever listens has taken it up when this returns."""
    try:
        client = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
    except OSError:
        return False
    with client:
        try:
            if client.getpeername() == client.getsockname():
                return False  # a port of its own, without a listener: it has met itself
            client.shutdown(socket.SHUT_WR)
            client.recv(1)
        except OSError:
            pass
    return True


def wait_until(holds: Callable[[], bool], what: str) -> None:
    """Return as soon as it holds; fail after DEADLINE_S."""
    deadline = time.monotonic() + DEADLINE_S
    while not holds():
        assert time.monotonic() < deadline, f"waited {DEADLINE_S:.0f} s until {what}"
        time.sleep(0.005)


@contextlib.contextmanager
def asleep(container: str) -> Iterator[None]:
    """The container is hibernated."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as name:
        name.bind(f"\0architect/asleep/{container}")
        yield


@dataclass
class Proxy:
    """A running proxy with one mapping."""

    process: subprocess.Popen[bytes]
    container: str
    port: int

    @property
    def resident_kb(self) -> int:
        """Memory of the process that is in RAM, kB (VmRSS, proc(5))."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0])

    def is_failing(self) -> bool:
        """Whether it says that the app is not known to be healthy."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
            name = f"\0architect/failing/{self.container}/{self.port}"
            return asking.connect_ex(name) == 0

    def first_line(self) -> str:
        """What it says first, on stderr; waited for."""
        assert self.process.stderr is not None
        return self.process.stderr.readline().decode()

    def wait_idle(self) -> None:
        """Until no probe is left in it, and each has left its mark."""
        folder = Path(f"/proc/{self.process.pid}/fd")

        def idle() -> bool:
            links = []
            for path in folder.iterdir():
                with contextlib.suppress(FileNotFoundError):
                    links.append(os.readlink(path))
            own = 1 + self.is_failing()
            return sum(link.startswith("socket:") for link in links) == own

        wait_until(idle, "no connection was left but the listener")

    def accepts(self) -> bool:
        """What a TCP probe sees."""
        return accepts(self.port)

    def wait_open(self) -> None:
        wait_until(self.accepts, "the proxy saw that the app accepts")

    def wait_closed(self) -> None:
        wait_until(lambda: not self.accepts(), "the proxy saw that the app accepts no more")

    def asleep(self) -> contextlib.AbstractContextManager[None]:
        return asleep(self.container)

    def get(self, path: str = "/", *, tls: bool = False, **headers: str) -> Answer:
        """Ask as the kubelet does; the whole answer is read, into `.text`."""
        return ask(self.port, path, tls=tls, headers=headers)


class Answer(http.client.HTTPResponse):
    """An answer that was read to its end."""

    text: bytes


def unverified() -> ssl.SSLContext:
    """What the kubelet's probes use."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def ask(
    port: int,
    path: str = "/",
    *,
    method: str = "GET",
    tls: bool = False,
    body: bytes | None = None,
    headers: dict[str, str] | None = None,
) -> Answer:
    """One request on a connection of its own."""
    plain = http.client.HTTPConnection("127.0.0.1", port, timeout=DEADLINE_S)
    secure = http.client.HTTPSConnection(
        "127.0.0.1", port, timeout=DEADLINE_S, context=unverified()
    )
    connection: http.client.HTTPConnection = secure if tls else plain
    connection.response_class = Answer
    with contextlib.closing(connection):
        connection.request(method, path, body=body, headers=headers or {})
        answer = connection.getresponse()
        assert isinstance(answer, Answer)
        answer.text = answer.read()
        return answer


@contextlib.contextmanager
def running(
    program: Path, app_port: int, *, container: str | None = None, port: int | None = None
) -> Iterator[Proxy]:
    """A proxy for one mapping; ended with SIGTERM, which it has to obey with status 0 at once."""
    name, shadow = container or fresh_name(), port or free_port()
    command = [str(program), "--map", f"{name}:{shadow}:{app_port}"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE)
    try:
        yield Proxy(process, name, shadow)
        assert process.poll() is None, "the proxy has ended by itself"
    finally:
        process.send_signal(signal.SIGTERM)
        _, printed = process.communicate(timeout=DEADLINE_S)
        print(printed.decode())  # for a test that has failed by now
    assert process.returncode == 0, printed.decode()
    lines = printed.decode().splitlines()
    assert [line for line in lines if not line.startswith("health-check-proxy: port ")] == []


# ---- apps ----------------------------------------------------------------------------------------


@dataclass
class Health:
    """What the app says of itself; a test changes it while the app runs."""

    status: int = 200
    body: bytes = b"fine\n"
    headers: dict[str, str] = field(default_factory=dict)
    chunked: bool = False
    hold: threading.Event | None = None
    """The app answers only once this is set."""
    asked: list[tuple[str, str, dict[str, str], bytes]] = field(default_factory=list)
    """Method, path, headers and body of each request."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    health: Health

    def _answer(self) -> None:
        health = self.health
        length = int(self.headers.get("Content-Length", 0))
        body = self.rfile.read(length)
        health.asked.append((self.command, self.path, dict(self.headers.items()), body))
        if health.hold is not None:
            health.hold.wait(DEADLINE_S)
        with contextlib.suppress(OSError):
            self.send_response(health.status)
            for name, value in health.headers.items():
                self.send_header(name, value)
            if health.chunked:
                self.send_header("Transfer-Encoding", "chunked")
                self.end_headers()
                for start in range(0, len(health.body), 7):
                    part = health.body[start : start + 7]
                    self.wfile.write(b"%x;of=it\r\n%s\r\n" % (len(part), part))
                self.wfile.write(b"0\r\nAfter: all\r\n\r\n")
            else:
                self.send_header("Content-Length", str(len(health.body)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(health.body)

    do_GET = do_HEAD = do_POST = do_PUT = _answer  # noqa: N815

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Nothing on the tests' output."""


class _HttpServer(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone is no error of the app's."""


def certificate(folder: Path) -> Path:
    """A certificate of its own making and its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "app")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]),
            critical=False,
        )
        .sign(key, hashes.SHA256())
    )
    file = folder / "app.pem"
    file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + made.public_bytes(serialization.Encoding.PEM)
    )
    return file


def server_context(file: Path, *protocols: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(file)
    if protocols:
        context.set_alpn_protocols(protocols)
    return context


@contextlib.contextmanager
def http_app(
    health: Health, *, context: ssl.SSLContext | None = None, port: int = 0
) -> Iterator[int]:
    """An HTTP or HTTPS server; gives its port."""
    handler = type("Handler", (_Handler,), {"health": health})
    with _HttpServer(("127.0.0.1", port), handler) as server:
        if context is not None:
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()
            thread.join(DEADLINE_S)


@dataclass
class Listener:
    """A TCP server, and what has come to it."""

    port: int
    socket: socket.socket
    syns: list[bytes] = field(default_factory=list)
    """The IP and TCP headers of each connection's first packet."""
    failures: list[Exception] = field(default_factory=list)

    def close(self) -> None:
        """Listen no more; the port stays taken."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RD)


@contextlib.contextmanager
def tcp_app(
    serve: Callable[[socket.socket], None] = lambda connection: None,
    *,
    port: int = 0,
    host: str = "127.0.0.1",
    context: ssl.SSLContext | None = None,
) -> Iterator[Listener]:
    """A server that does `serve` with each connection and closes it."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.create_server((host, port), family=family) as listener:
        listener.setsockopt(socket.IPPROTO_TCP, TCP_SAVE_SYN, 1)
        app = Listener(listener.getsockname()[1], listener)

        def one(connection: socket.socket) -> None:
            with contextlib.suppress(OSError), connection:
                connection.settimeout(DEADLINE_S)
                if context is not None:
                    connection = context.wrap_socket(connection, server_side=True)
                try:
                    serve(connection)
                except OSError:
                    raise
                except Exception as error:
                    app.failures.append(error)
                connection.close()

        def accept() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                syn = connection.getsockopt(socket.IPPROTO_TCP, TCP_SAVED_SYN, 256)
                app.syns.append(syn)
                threading.Thread(target=one, args=(connection,), daemon=True).start()

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        try:
            yield app
        finally:
            app.close()
            thread.join(DEADLINE_S)
    assert app.failures == []


@contextlib.contextmanager
def proxied_http(
    program: Path, health: Health, context: ssl.SSLContext | None = None
) -> Iterator[Proxy]:
    """An HTTP app behind a proxy that has seen that it accepts."""
    with http_app(health, context=context) as port, running(program, port) as proxy:
        proxy.wait_open()
        yield proxy


@contextlib.contextmanager
def proxied_tcp(
    program: Path,
    serve: Callable[[socket.socket], None] = lambda connection: None,
    context: ssl.SSLContext | None = None,
) -> Iterator[Proxy]:
    """A TCP server behind a proxy that has seen that it accepts."""
    with tcp_app(serve, context=context) as app, running(program, app.port) as proxy:
        proxy.wait_open()
        yield proxy


def hibernated(answer: http.client.HTTPResponse) -> bool:
    """Whether the proxy says that it answered from memory."""
    return answer.getheader("Architect-Hibernated") == "true"


# ---- gRPC ----------------------------------------------------------------------------------------

SERVING, NOT_SERVING = 1, 2
CHECK = "/grpc.health.v1.Health/Check"


def framed(message: bytes) -> bytes:
    """A message as gRPC sends it: not compressed, its length, itself."""
    return struct.pack(">BI", 0, len(message)) + message


def check_request(service: str) -> bytes:
    """HealthCheckRequest."""
    name = service.encode()
    return framed(bytes([0x0A, len(name)]) + name if name else b"")


def check_response(status: int) -> bytes:
    """HealthCheckResponse."""
    return framed(bytes([0x08, status]))


@dataclass
class Checked:
    """What came of a gRPC call."""

    headers: dict[str, str] = field(default_factory=dict)
    message: bytes = b""
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> int:
        """The gRPC status of the call."""
        return int(self.headers["grpc-status"])

    @property
    def health(self) -> int:
        """The status in the message."""
        assert self.status == 0, self.headers
        return self.message[-1]


@dataclass
class Grpc:
    """A gRPC server's health, by service."""

    services: dict[str, int] = field(default_factory=lambda: {"": SERVING})
    status: int = 0
    text: str = ""
    asked: list[dict[str, str]] = field(default_factory=list)
    hold: threading.Event | None = None

    def serve(self, connection: socket.socket) -> None:
        """One connection of it."""
        http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False))
        http2.initiate_connection()
        connection.sendall(http2.data_to_send())
        messages: dict[int, bytes] = {}
        while received := connection.recv(65536):
            for event in http2.receive_data(received):
                match event:
                    case h2.events.RequestReceived():
                        self.asked.append(_texts(event.headers))
                        messages[event.stream_id] = b""
                    case h2.events.DataReceived():
                        messages[event.stream_id] += event.data
                    case h2.events.StreamEnded():
                        self._answer(http2, event.stream_id, messages.pop(event.stream_id))
                    case h2.events.ConnectionTerminated():
                        return
            connection.sendall(http2.data_to_send())

    def _answer(self, http2: h2.connection.H2Connection, stream: int, message: bytes) -> None:
        if self.hold is not None:
            self.hold.wait(DEADLINE_S)
        headers = [(":status", "200"), ("content-type", "application/grpc")]
        trailers = [("grpc-status", str(self.status))]
        if self.text:
            trailers.append(("grpc-message", self.text))
        service = message[7:].decode()
        if self.status == 0 and service in self.services:
            http2.send_headers(stream, headers)
            http2.send_data(stream, check_response(self.services[service]))
            http2.send_headers(stream, trailers, end_stream=True)
        else:
            status = self.status or 5  # NOT_FOUND
            http2.send_headers(
                stream, [*headers, ("grpc-status", str(status)), *trailers[1:]], end_stream=True
            )


def _texts(headers: object) -> dict[str, str]:
    assert isinstance(headers, list)
    return {
        str(name if isinstance(name, str) else name.decode()): str(
            value if isinstance(value, str) else value.decode()
        )
        for name, value in headers
    }


class GrpcClient:
    """A client's connection, for one call after the other."""

    def __init__(self, port: int, *, tls: bool = False) -> None:
        self.socket = socket.create_connection(("127.0.0.1", port), timeout=DEADLINE_S)
        if tls:
            context = unverified()
            context.set_alpn_protocols(["h2"])
            secure = context.wrap_socket(self.socket)
            assert secure.selected_alpn_protocol() == "h2"
            self.socket = secure
        self._http2 = h2.connection.H2Connection()
        self._http2.initiate_connection()
        self.socket.sendall(self._http2.data_to_send())

    def __enter__(self) -> GrpcClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def begin(self, service: str = "", *, path: str = CHECK, message: bytes | None = None) -> int:
        """Send a call; gives its stream."""
        stream = self._http2.get_next_available_stream_id()
        headers = [
            (":method", "POST"),
            (":scheme", "http"),
            (":authority", "app.example"),
            (":path", path),
            ("content-type", "application/grpc"),
            ("te", "trailers"),
            ("user-agent", "kube-probe/test"),
        ]
        self._http2.send_headers(stream, headers)
        self._http2.send_data(
            stream, check_request(service) if message is None else message, end_stream=True
        )
        self.socket.sendall(self._http2.data_to_send())
        return stream

    def finish(self, stream: int) -> Checked:
        """The call's end."""
        checked = Checked()
        while not checked.ended:
            received = self.socket.recv(65536)
            if not received:
                raise ConnectionResetError("the connection ended before the call did")
            for event in self._http2.receive_data(received):
                match event:
                    case h2.events.ResponseReceived() | h2.events.TrailersReceived():
                        checked.headers |= _texts(event.headers)
                    case h2.events.DataReceived():
                        checked.message += event.data
                    case h2.events.StreamReset(error_code=code):
                        checked.reset, checked.ended = int(code or 0), True
                    case h2.events.StreamEnded():
                        checked.ended = True
            self.socket.sendall(self._http2.data_to_send())
        assert stream
        return checked


def check(port: int, service: str = "", *, tls: bool = False, path: str = CHECK) -> Checked:
    """One gRPC health check on a connection of its own."""
    with GrpcClient(port, tls=tls) as client:
        return client.finish(client.begin(service, path=path))
