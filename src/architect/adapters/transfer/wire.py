"""What two architectds say to each other, and the channel that carries it: lines of JSON, and raw bytes.

A connection begins with one :class:`Hello`, answered by a :class:`Reply`. After that the client sends
:class:`Request` lines (a call's is followed by its body), the server answers each, in order, with a
:class:`Reply` line and its payload. Used by both sides of this package and by nobody else, but for the
errors and :class:`Hello`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from architect.contract.errors import ArchitectError, quoted

T = TypeVar("T")

NODE_SUFFIX: Final = ".node.architect.loopholelabs.io"
"""A node's certificate is for its name with this behind it."""
MAX_LINE: Final = 1 << 20
MAX_BODY: Final = 64 << 20
"""Bytes of a control message, either way."""
MAX_BATCH: Final = 2 << 20
"""Bytes of files in one request. Two are on their way on each connection, so that none waits."""
MAX_ITEMS: Final = 256
"""Ranges in one request; with their names they fit any socket's buffer."""
MAX_REQUEST: Final = 48 << 10
HANDSHAKE_S: Final = 10.0
_GONE_MS: Final = 30_000
"""Milliseconds without a sign of life after which the peer's machine is taken for dead."""
_NAME_BYTES: Final = 1024


class TransferError(ArchitectError):
    """Files or messages did not get from one node to another."""


class Cut(Exception):
    """The connection broke; trying again may help."""


class Hello(msgspec.Struct, frozen=True):
    """Who asks for what, first on every connection."""

    checkpoint: str
    """The Checkpoint, "namespace/name"."""
    uid: str
    """Of the old pod."""
    claimant: str
    """UID of the pod that claimed it."""
    format: int
    """Of checkpoints on the disk, as the destination knows it."""


class Item(msgspec.Struct, frozen=True, array_like=True):
    """A range of a file."""

    name: str
    size: int
    """Of the whole file."""
    offset: int
    length: int


class Request(msgspec.Struct, frozen=True, omit_defaults=True):
    """One of: a call (with a body of ``body`` bytes), ranges of files, sizes of files."""

    call: str = ""
    body: int = 0
    items: list[Item] = []
    have: str = ""
    """Digest of what the destination has of all ``items`` together; "" if it has nothing."""
    deflate: bool = False
    """The link is slow enough for compression."""
    stat: list[str] = []


class Problem(msgspec.Struct, frozen=True):
    """An ArchitectError on its way to the other side."""

    what: str
    why: str
    fix: str = ""


class Reply(msgspec.Struct, frozen=True, omit_defaults=True):
    """What precedes a payload of ``wire`` bytes."""

    problem: Problem | None = None
    wire: int = 0
    raw: int = 0
    """Bytes of the payload once it is inflated."""
    deflated: bool = False
    digest: str = ""
    """BLAKE3 of the payload (inflated)."""
    extents: list[tuple[int, int, int]] = []
    """What the payload is: index of the item, offset in the file, length. The rest is zeros."""
    versions: list[int] = []
    """Of each item's file, to see that it did not change between two ranges."""
    same: bool = False
    """The destination has it already."""
    sizes: list[int] = []
    """Bytes that each file asked for with ``stat`` takes on the disk."""


class Refused(TransferError):
    """The other side understood, and said no."""


def raised(problem: Problem, node: str) -> Refused:
    """The other side's error as ours, saying whose it is."""
    return Refused(f"node {node}: {problem.what}", problem.why, problem.fix)


def checked_name(name: str) -> str:
    """``name`` if it names a file below a directory and nothing else. Raises TransferError."""
    parts = name.split("/")
    if any(part in ("", ".", "..") for part in parts) or not name.isprintable():
        why = "it is no relative path without . and .."
    elif len(name.encode("utf-8", "surrogateescape")) > _NAME_BYTES:
        why = f"it is longer than {_NAME_BYTES} bytes"
    else:
        return name
    raise TransferError(f"file {quoted(name)}", why, "this is an error of the other node's daemon")


def tuned(context: ssl.SSLContext) -> None:
    """Sets what makes bulk transfer fast, and requires the peer's certificate. Idempotent."""
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0
    if _kernel_tls():
        context.options |= ssl.Options(_OP_ENABLE_KTLS)


_OP_ENABLE_KTLS: Final = 1 << 3
"""SSL_OP_ENABLE_KTLS; Python has a name for it from 3.12 on."""


def _kernel_tls() -> bool:
    """Whether the kernel can encrypt what a socket sends."""
    if ssl.OPENSSL_VERSION_INFO < (3, 0):
        return False
    with contextlib.suppress(OSError):
        return "tls" in Path("/proc/sys/net/ipv4/tcp_available_ulp").read_text().split()
    return False


def peer_node(tls: ssl.SSLSocket) -> str:
    """The node a peer is by its certificate. Raises TransferError if it is none, or several."""
    certificate = tls.getpeercert() or {}
    names = [
        str(pair[1]).removesuffix(NODE_SUFFIX)
        for pair in certificate.get("subjectAltName", ())
        if isinstance(pair, tuple) and pair[0] == "DNS" and str(pair[1]).endswith(NODE_SUFFIX)
    ]
    if len(names) == 1 and names[0]:
        return names[0]
    raise TransferError(
        "identity of the other node",
        f"its certificate names {len(names)} nodes",
        f"give each node a certificate for <node>{NODE_SUFFIX}",
    )


def kept_alive(sock: socket.socket) -> None:
    """Has the kernel find out that the peer's machine is gone, however long nothing is said."""
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 10)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _GONE_MS)


class Channel:
    """A TLS connection. Blocking: for threads; :meth:`close` may be called from any."""

    def __init__(self, tls: ssl.SSLSocket) -> None:
        self._tls = tls
        self._ahead = bytearray()
        """Received after the line that was asked for."""

    @property
    def tls(self) -> ssl.SSLSocket:
        """The socket."""
        return self._tls

    def send(self, *parts: bytes | bytearray | memoryview) -> None:
        """Sends all. Raises Cut."""
        try:
            for part in parts:
                self._tls.sendall(part)
        except (OSError, ValueError) as error:
            raise Cut(_reason(error)) from error

    def send_line(self, message: msgspec.Struct, *payload: memoryview | bytes) -> int:
        """Sends a message and what follows it; gives the bytes of the line."""
        line = msgspec.json.encode(message) + b"\n"
        self.send(line, *payload)
        return len(line)

    def line(self, limit: int = MAX_LINE) -> bytes:
        """The next line. Raises Cut if the connection ends first, or the line does not."""
        searched = 0
        while (end := self._ahead.find(b"\n", searched)) < 0:
            searched = len(self._ahead)
            if searched > limit:
                raise Cut(f"a line of more than {limit} bytes")
            try:
                more = self._tls.recv(16 << 10)
            except (OSError, ValueError) as error:
                raise Cut(_reason(error)) from error
            if not more:
                raise Cut("the other side closed the connection")
            self._ahead += more
        line = bytes(self._ahead[:end])
        del self._ahead[: end + 1]
        return line

    def receive(self, into: memoryview) -> None:
        """Fills ``into``. Raises Cut."""
        done = min(len(self._ahead), len(into))
        if done:
            into[:done] = self._ahead[:done]
            del self._ahead[:done]
        receive = self._tls.recv_into
        end = len(into)
        while done < end:
            try:
                count = receive(into[done:])
            except (OSError, ValueError) as error:
                raise Cut(_reason(error)) from error
            if not count:
                raise Cut("the other side closed the connection")
            done += count

    def close(self) -> None:
        """Ends the connection; a thread that sends or receives on it gets Cut."""
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._tls, socket.SHUT_RDWR)

    def free(self) -> None:
        """Closes it for good; only when no thread uses it any more."""
        self.close()
        with contextlib.suppress(OSError):
            self._tls.close()


def _reason(error: Exception) -> str:
    if isinstance(error, TimeoutError):
        return "the other side said nothing for too long"
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    return str(getattr(error, "strerror", None) or error)


async def in_thread(work: Callable[[], T], name: str) -> T:
    """What ``work`` gives, run in a thread of its own: it may take minutes, asyncio's are few.

    When the caller is cancelled the work goes on; end it by closing what it waits for.
    """
    loop = asyncio.get_running_loop()
    result: asyncio.Future[T] = loop.create_future()

    def settle(value: T | None, error: BaseException | None) -> None:
        if result.done():
            return
        if error is not None:
            result.set_exception(error)
        else:
            result.set_result(value)  # type: ignore[arg-type]

    def run() -> None:
        value, failed = None, None
        try:
            value = work()
        except BaseException as error:
            failed = error
        # The loop may be over: then nobody waits.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, value, failed)

    threading.Thread(target=run, name=name, daemon=True).start()
    return await result
