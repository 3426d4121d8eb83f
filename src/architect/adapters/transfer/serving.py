"""The source's side: listens for other nodes' daemons, passes on their calls, sends them files.

Called by architectd, which says with ``authorize`` who may have what. Each connection has a thread; the
calls run on the event loop that started the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import mmap
import os
import select
import socket
import ssl
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent import futures
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol, TypeVar

import msgspec

from architect.adapters.transfer import ranges, wire
from architect.adapters.transfer.wire import (
    Channel,
    Cut,
    Hello,
    Item,
    Problem,
    Reply,
    Request,
    TransferError,
)
from architect.contract.errors import ArchitectError, as_error, quoted

_T = TypeVar("_T")
_CONNECTIONS: Final = 256
"""At once; a move has one for calls and a few for files."""
_OPEN_FILES: Final = 16
"""Descriptors a connection keeps."""
_LOG: Final = logging.getLogger(__name__)


class Session(Protocol):
    """What one destination may do with one checkpoint; all its connections share it."""

    async def call(self, verb: str, body: bytes) -> bytes:
        """Answers a control message; an ArchitectError goes to the caller as it is."""
        ...

    def open(self, name: str) -> Path | None:
        """The file called ``name``, None if there is none. Called in a thread."""
        ...

    def closed(self) -> None:
        """The last connection is gone. Called on the event loop, once."""
        ...


Authorize = Callable[[str, Hello], Awaitable[Session]]


@dataclass
class _Joined:
    """A session and who is in it."""

    session: asyncio.Future[Session]
    connections: int = 0


@dataclass
class _Files:
    """The descriptors and the buffer of one connection."""

    session: Session
    descriptors: dict[str, int] = field(default_factory=dict)
    buffer: memoryview | None = None

    def descriptor(self, name: str) -> int:
        """Of the file that the session calls ``name``."""
        wire.checked_name(name)
        if (known := self.descriptors.get(name)) is not None:
            return known
        path = self.session.open(name)
        if path is None:
            raise TransferError(f"file {quoted(name)}", "the checkpoint has none of that name")
        opened = ranges.opened(path, name)
        if len(self.descriptors) >= _OPEN_FILES:
            os.close(self.descriptors.pop(next(iter(self.descriptors))))
        self.descriptors[name] = opened
        return opened

    def room(self) -> memoryview:
        """Space for one batch."""
        if self.buffer is None:
            self.buffer = memoryview(mmap.mmap(-1, wire.MAX_BATCH))
        return self.buffer

    def close(self) -> None:
        """Gives all back."""
        for descriptor in self.descriptors.values():
            os.close(descriptor)
        self.descriptors.clear()
        self.buffer = None


class Server:
    """Listens for destinations; port 0 takes any, see :attr:`port`."""

    def __init__(
        self, context: ssl.SSLContext, address: str, port: int, authorize: Authorize
    ) -> None:
        wire.tuned(context)
        self._context = context
        self._address = address
        self.port = port
        self._authorize = authorize
        self._joined: dict[tuple[str, Hello], _Joined] = {}
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._threads: set[threading.Thread] = set()
        self._listening: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop

    async def start(self) -> None:
        """Raises TransferError if the address is not to be had."""
        self._loop = asyncio.get_running_loop()
        family = socket.AF_INET6 if ":" in self._address else socket.AF_INET
        listening = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((self._address, self.port))
            listening.listen(64)
        except OSError as error:
            listening.close()
            raise TransferError(
                f"listening for moves on {self._address} port {self.port}",
                str(error.strerror),
                "choose another port for transfers",
            ) from error
        self.port = listening.getsockname()[1]
        self._listening = listening
        self._accepting = asyncio.create_task(self._accept(listening))

    async def close(self) -> None:
        """Ends all connections; their sessions are told."""
        if self._accepting is not None:
            self._accepting.cancel()
            await asyncio.gather(self._accepting, return_exceptions=True)
        if self._listening is not None:
            self._listening.close()
        with self._lock:
            threads = list(self._threads)
            for sock in self._sockets:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)
        if threads:

            def join() -> None:
                for each in threads:
                    each.join()

            await wire.in_thread(join, "transfer-close")

    async def _accept(self, listening: socket.socket) -> None:
        while True:
            try:
                sock, _ = await self._loop.sock_accept(listening)
            except OSError as error:
                # No descriptors left, or the peer was gone at once: the next one may do.
                _LOG.warning("accepting a transfer: %s", error)
                await asyncio.sleep(0.1)
                continue
            with self._lock:
                if len(self._sockets) >= _CONNECTIONS:
                    sock.close()
                    continue
                self._sockets.add(sock)
                thread = threading.Thread(
                    target=self._run, args=(sock,), name="transfer-serve", daemon=True
                )
                self._threads.add(thread)
            thread.start()

    def _run(self, sock: socket.socket) -> None:
        """A connection, from its first byte to its last."""
        tls = None
        try:
            sock.settimeout(wire.HANDSHAKE_S)
            wire.kept_alive(sock)
            # Wrapping takes the descriptor over; close() must still find it.
            tls = self._context.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            with self._lock:
                self._sockets.discard(sock)
                self._sockets.add(tls)
            tls.do_handshake()
            self._greet(Channel(tls))
        except ssl.SSLError as error:
            _LOG.warning("stranger refused: %s", error)
        except (Cut, OSError) as error:
            _LOG.debug("a transfer connection ended: %s", error)
        except Exception:
            _LOG.exception("a transfer connection failed")
        finally:
            with self._lock:
                self._sockets -= {sock, tls}
                self._threads.discard(threading.current_thread())
            for each in (tls, sock):
                if each is not None:
                    each.close()

    def _greet(self, channel: Channel) -> None:
        try:
            peer = wire.peer_node(channel.tls)
            hello = msgspec.json.decode(channel.line(16 << 10), type=Hello)
        except (TransferError, msgspec.DecodeError) as error:
            channel.send_line(Reply(problem=_problem(error, "greeting")))
            return
        channel.tls.settimeout(None)
        key = (peer, hello)
        try:
            joining: futures.Future[Session] = futures.Future()
            self._loop.call_soon_threadsafe(self._join, key, joining)
            try:
                session = self._awaited(joining, channel)
            except Cut:
                raise
            except Exception as error:
                if not isinstance(error, ArchitectError):
                    _LOG.exception("whether %s may have a checkpoint", peer)
                channel.send_line(Reply(problem=_problem(error, "greeting")))
                return
            channel.send_line(Reply())
            files = _Files(session)
            try:
                while True:
                    self._answer(channel, session, files)
            finally:
                files.close()
        finally:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._leave, key)

    def _join(self, key: tuple[str, Hello], joining: futures.Future[Session]) -> None:
        joined = self._joined.get(key)
        if joined is None:
            joined = _Joined(asyncio.ensure_future(self._authorize(*key)))
            self._joined[key] = joined
        joined.connections += 1

        def settle(session: asyncio.Future[Session]) -> None:
            if session.cancelled():
                joining.cancel()
            elif (error := session.exception()) is not None:
                joining.set_exception(error)
            else:
                joining.set_result(session.result())

        joined.session.add_done_callback(settle)

    def _leave(self, key: tuple[str, Hello]) -> None:
        joined = self._joined[key]
        joined.connections -= 1
        if joined.connections:
            return
        del self._joined[key]
        joined.session.add_done_callback(_told)

    @staticmethod
    def _awaited(result: futures.Future[_T], channel: Channel) -> _T:
        """The result, however long it takes; Cut at once if the peer goes meanwhile."""
        ready, wake = socket.socketpair()
        with ready, wake:
            lock = threading.Lock()

            def done(_: object) -> None:
                with lock, contextlib.suppress(OSError):
                    wake.send(b"x")

            result.add_done_callback(done)
            poll = select.poll()
            poll.register(ready, select.POLLIN)
            poll.register(channel.tls, select.POLLRDHUP)
            events = dict(poll.poll())
            with lock:
                wake.close()
        if result.done():
            return result.result()
        raise Cut(f"the other side went in the middle of a call ({events})")

    def _answer(self, channel: Channel, session: Session, files: _Files) -> None:
        """One request."""
        try:
            request = msgspec.json.decode(channel.line(), type=Request)
        except msgspec.DecodeError as error:
            raise Cut(f"no request: {error}") from error
        if request.call:
            if not 0 <= request.body <= wire.MAX_BODY:
                raise Cut("a call with too large a body")
            body = bytearray(request.body)
            channel.receive(memoryview(body))
            self._call(channel, session, request.call, bytes(body))
            return
        try:
            if request.stat:
                reply, payload = Reply(sizes=_sizes(request.stat, files)), None
            else:
                reply, payload = _batch(request, files)
        except (ArchitectError, OSError) as error:
            reply, payload = Reply(problem=_problem(error, "reading files")), None
        channel.send_line(reply, *([] if payload is None else [payload]))

    def _call(self, channel: Channel, session: Session, verb: str, body: bytes) -> None:
        async def call() -> bytes:
            return await session.call(verb, body)

        running = asyncio.run_coroutine_threadsafe(call(), self._loop)
        try:
            answer = self._awaited(running, channel)
        except Cut:
            raise
        except Exception as error:
            if not isinstance(error, ArchitectError):
                _LOG.exception("call %s of a move failed", quoted(verb))
            channel.send_line(Reply(problem=_problem(error, f"call {quoted(verb)}")))
            return
        channel.send_line(Reply(wire=len(answer), raw=len(answer)), answer)


def _told(session: asyncio.Future[Session]) -> None:
    if not session.cancelled() and session.exception() is None:
        session.result().closed()


def _problem(error: Exception, what: str) -> Problem:
    known = as_error(error, what)
    return Problem(known.what, known.why, known.fix)


def _sizes(names: Sequence[str], files: _Files) -> list[int]:
    found = []
    for name in names:
        status = os.fstat(files.descriptor(name))
        found.append(min(status.st_size, status.st_blocks * 512))
    return found


def _batch(request: Request, files: _Files) -> tuple[Reply, memoryview | bytes | None]:
    """Ranges of files: what precedes them, and their bytes."""
    items = request.items
    if len(items) > wire.MAX_ITEMS or sum(each.length for each in items) > wire.MAX_BATCH:
        raise TransferError("a request for files", "it asks for too much at once")
    room = files.room()
    if request.have and (same := _same(request, files, room)) is not None:
        return same, None
    extents: list[ranges.Extent] = []
    versions: list[int] = []
    used = 0
    for index, item in enumerate(items):
        versions.append(_version(item, files))
        found = ranges.read_packed(files.descriptor(item.name), index, item, room[used:])
        extents += found
        used += sum(length for _, _, length in found)
    data = room[:used]
    packed = ranges.deflated(data) if request.deflate and used else None
    payload = data if packed is None else packed
    reply = Reply(
        wire=len(payload),
        raw=used,
        deflated=packed is not None,
        digest=ranges.digest(data),
        extents=extents,
        versions=versions,
    )
    return reply, payload


def _version(item: Item, files: _Files) -> int:
    """Of the file as it is now; raises TransferError if it is not of the size in the manifest."""
    status = os.fstat(files.descriptor(item.name))
    if status.st_size != item.size:
        raise TransferError(
            f"file {quoted(item.name)}",
            f"it has {status.st_size} bytes, not {item.size}",
            "take a new checkpoint",
        )
    if item.offset < 0 or item.length < 0 or item.offset + item.length > item.size:
        raise TransferError(f"file {quoted(item.name)}", "a range beyond its end was asked for")
    return status.st_mtime_ns


def _same(request: Request, files: _Files, room: memoryview) -> Reply | None:
    """The answer if the destination has all of it already."""
    versions: list[int] = []
    used = 0
    for item in request.items:
        versions.append(_version(item, files))
        ranges.read_whole(files.descriptor(item.name), item, room[used:])
        used += item.length
    if ranges.digest(room[:used]) != request.have:
        return None
    return Reply(same=True, versions=versions)
