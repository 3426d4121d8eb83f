"""The destination's side: connects to another node's daemon, calls it, fetches files from it.

Called by architectd of the node a pod moves to. Files come over several connections in ranges, each
checked before it counts; a connection that breaks is made anew and only what is missing is fetched.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import mmap
import os
import socket
import ssl
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec

from architect.adapters.transfer import ranges, wire
from architect.adapters.transfer.limits import Member, RateLimit
from architect.adapters.transfer.wire import (
    Channel,
    Cut,
    Hello,
    Item,
    Refused,
    Reply,
    Request,
    TransferError,
)
from architect.contract.errors import quoted

_WINDOW: Final = 2
"""Requests on their way on each connection."""
_CORRUPT: Final = 3
"""Times a range is fetched before it is taken for damaged."""
_TRIES: Final = 6
"""Connections that may break with nothing received between them."""
_SILENCE_S: Final = 30.0
"""How long the source may take to send the next bytes of files."""
_SLOW: Final = 50e6
"""Bytes/s below which a link is slower than compression (zlib, level 1)."""
_JUDGED: Final = 2 << 20
"""Bytes received before the link is judged."""


class FileWish(msgspec.Struct, frozen=True):
    """A file to fetch, as the manifest has it."""

    name: str
    size: int


@dataclass(frozen=True, slots=True)
class Fetched:
    """What fetching came to."""

    bytes: int
    """Of the files, holes too."""
    wire_bytes: int
    """That came over the link, within TLS."""
    seconds: float


@dataclass(frozen=True, slots=True)
class _Peer:
    """Whom to connect to, and as whom."""

    context: ssl.SSLContext
    host: str
    port: int
    node: str
    hello: Hello

    def error(self, what: str, why: str, fix: str = "") -> TransferError:
        """An error that says who the other side was."""
        return TransferError(f"{what} (source: node {self.node})", why, fix)

    def connected(self, made: Callable[[socket.socket], None]) -> Channel:
        """A connection, greeted; ``made`` hears of each socket. Raises Cut, TransferError."""
        name = f"{self.node}{wire.NODE_SUFFIX}"
        tls = None
        try:
            sock = socket.create_connection((self.host, self.port), wire.HANDSHAKE_S)
            try:
                wire.kept_alive(sock)
                tls = self.context.wrap_socket(
                    sock, server_hostname=name, do_handshake_on_connect=False
                )
            except BaseException:
                sock.close()
                raise
            made(tls)
            tls.do_handshake()
            node = wire.peer_node(tls)
            if node != self.node:
                raise self.error("connecting", f"it says that it is node {quoted(node)}")
            channel = Channel(tls)
            channel.send_line(self.hello)
            # Whether we may have it can take the other side a look at the API.
            tls.settimeout(None)
            self.reply(channel)
        except ssl.SSLCertVerificationError as error:
            _shut(tls)
            raise self.error(
                "connecting",
                f"its certificate is not trusted: {error.verify_message}",
                "both nodes' certificates must be of the authority that the daemons share",
            ) from error
        except Cut as error:
            _shut(tls)
            if isinstance(error.__cause__, ssl.SSLError):
                raise self.error(
                    "connecting",
                    f"it refused us: {error}",
                    "both nodes' certificates must be of the authority that the daemons share",
                ) from error
            raise
        except OSError as error:
            _shut(tls)
            raise Cut(str(error.strerror or error)) from error
        except BaseException:
            _shut(tls)
            raise
        return channel

    def reply(self, channel: Channel) -> Reply:
        """The answer to the oldest request. Raises Refused with what the other side says."""
        line = channel.line()
        try:
            reply = msgspec.json.decode(line, type=Reply)
        except msgspec.DecodeError as error:
            raise self.error("talking", f"it sent no reply: {error}") from error
        if reply.problem is not None:
            raise wire.raised(reply.problem, self.node)
        return reply


def _shut(tls: ssl.SSLSocket | None) -> None:
    if tls is not None:
        tls.close()


@dataclass
class _Batch:
    """Ranges that are asked for together."""

    items: list[Item]
    corrupt: int = 0
    """Times that they came damaged."""

    @property
    def size(self) -> int:
        return sum(item.length for item in self.items)


def _planned(files: Sequence[FileWish]) -> deque[_Batch]:
    """The files cut into batches; the large first, so that the small ones fill the end."""
    batches: deque[_Batch] = deque()
    small: list[Item] = []
    room, line = wire.MAX_BATCH, wire.MAX_REQUEST
    for wish in sorted(files, key=lambda one: -one.size):
        if wish.size > wire.MAX_BATCH:
            for offset in range(0, wish.size, wire.MAX_BATCH):
                length = min(wire.MAX_BATCH, wish.size - offset)
                batches.append(_Batch([Item(wish.name, wish.size, offset, length)]))
            continue
        # Quoted, and with the numbers, a name takes no more than this.
        words = 6 * len(wish.name.encode()) + 64
        if wish.size > room or words > line or len(small) == wire.MAX_ITEMS:
            batches.append(_Batch(small))
            small, room, line = [], wire.MAX_BATCH, wire.MAX_REQUEST
        small.append(Item(wish.name, wish.size, 0, wish.size))
        room, line = room - wish.size, line - words
    if small:
        batches.append(_Batch(small))
    return batches


class _Target:
    """The files at the destination."""

    def __init__(self, into: Path, *, resume: bool) -> None:
        self.into = into
        self._resume = resume
        self._lock = threading.Lock()
        self._large: dict[str, int] = {}
        self._there: dict[str, bool] = {}

    def prepare(self, files: Sequence[FileWish]) -> None:
        """Makes directories and the large files; finds out what is there already."""
        made = {self.into}
        for wish in files:
            path = self.into / wish.name
            for parent in reversed(path.relative_to(self.into).parents):
                if (directory := self.into / parent) not in made:
                    directory.mkdir(mode=0o700, exist_ok=True)
                    if directory.is_symlink():
                        raise OSError(errno.ELOOP, f"{directory} is a symbolic link")
                    made.add(directory)
            if self._resume:
                with contextlib.suppress(FileNotFoundError):
                    status = path.lstat()
                    self._there[wish.name] = status.st_size == wish.size
            if wish.size > wire.MAX_BATCH:
                self._large[wish.name] = self._open(wish.name, wish.size)

    def _open(self, name: str, size: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
        kept = self._there.get(name, False)
        descriptor = os.open(self.into / name, flags | (0 if kept else os.O_TRUNC), 0o600)
        os.fchmod(descriptor, 0o600)
        os.ftruncate(descriptor, size)
        return descriptor

    def have(self, batch: _Batch, room: memoryview) -> str:
        """Digest of what is there of all of the batch; "" if something is missing."""
        if not all(self._there.get(item.name, False) for item in batch.items):
            return ""
        used = 0
        for item in batch.items:
            large = self._large.get(item.name)
            descriptor = large if large is not None else self._open(item.name, item.size)
            try:
                ranges.read_whole(descriptor, item, room[used:])
            finally:
                if large is None:
                    os.close(descriptor)
            used += item.length
        return ranges.digest(room[:used])

    def write(self, batch: _Batch, extents: Sequence[ranges.Extent], data: memoryview) -> None:
        """Puts what came of a batch in its place."""
        pieces: list[list[tuple[int, memoryview]]] = [[] for _ in batch.items]
        for index, offset, length in extents:
            pieces[index].append((offset, data[:length]))
            data = data[length:]
        for item, found in zip(batch.items, pieces, strict=True):
            large = self._large.get(item.name)
            descriptor = large if large is not None else self._open(item.name, item.size)
            try:
                if self._there.get(item.name, False):
                    _clear(descriptor, item, found)
                for offset, piece in found:
                    ranges.write(descriptor, piece, offset)
            finally:
                if large is None:
                    os.close(descriptor)

    def close(self) -> None:
        """Closes the large files."""
        for descriptor in self._large.values():
            os.close(descriptor)
        self._large.clear()


def _clear(descriptor: int, item: Item, found: Sequence[tuple[int, memoryview]]) -> None:
    """Zeros where nothing is going to be written over what an earlier attempt left."""
    position = item.offset
    for offset, piece in [*found, (item.offset + item.length, memoryview(b""))]:
        while position < offset:
            count = min(offset - position, wire.MAX_BATCH)
            ranges.write(descriptor, memoryview(bytes(count)), position)
            position += count
        position = offset + len(piece)


@dataclass
class _Job:
    """One fetch: what is left of it, and how it goes. Shared by its threads."""

    todo: deque[_Batch]
    target: _Target
    member: Member | None
    deflate: bool
    notify: Callable[[int], None]
    ended: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    error: Exception | None = None
    done: int = 0
    wire: int = 0
    failures: int = 0
    """Connections that broke since something was received."""
    active: weakref.WeakSet[Channel] = field(default_factory=weakref.WeakSet)
    versions: dict[str, int] = field(default_factory=dict)
    began: float = field(default_factory=time.monotonic)

    def next(self) -> _Batch | None:
        """Something to ask for."""
        with self.lock:
            return self.todo.popleft() if self.todo and not self.ended.is_set() else None

    def back(self, batches: Sequence[_Batch]) -> None:
        """These did not come."""
        with self.lock:
            self.todo.extendleft(reversed(batches))

    def checked(self, batch: _Batch, reply: Reply) -> None:
        """Raises TransferError if a file is another than when its other ranges came."""
        with self.lock:
            for item, version in zip(batch.items, reply.versions, strict=True):
                if self.versions.setdefault(item.name, version) != version:
                    raise ranges.changed(item.name)

    def finished(self, batch: _Batch, received: int) -> None:
        """These are on the disk."""
        with self.lock:
            self.done += batch.size
            self.wire += received
            self.failures = 0
            if not self.deflate and self.wire > _JUDGED:
                self.deflate = self.wire / (time.monotonic() - self.began) < _SLOW
            done = self.done
        self.notify(done)

    def failed(self, error: Exception) -> None:
        """It cannot be done; the first error counts."""
        self.ended.set()
        with self.lock:
            self.error = self.error or error
            for channel in self.active:
                channel.close()

    def use(self, channel: Channel) -> None:
        """A thread uses this connection now; Cut if it need not any more."""
        with self.lock:
            self.active.add(channel)
        if self.ended.is_set():
            raise Cut("it was given up")


class Connection:
    """To a source, for one checkpoint. Use from one event loop; :meth:`close` it."""

    def __init__(self, peer: _Peer) -> None:
        self._peer = peer
        self._calls: Channel | None = None
        self._calling = asyncio.Lock()
        self._ready: list[Channel] = []
        self._lock = threading.Lock()
        self._open: weakref.WeakSet[socket.socket] = weakref.WeakSet()
        self._is_closed = False

    async def call(self, verb: str, body: bytes) -> bytes:
        """The other side's answer, as long as it takes. Raises TransferError, Refused.

        A call whose connection breaks is not repeated: whether it was carried out is not known. The
        next one connects anew.
        """
        async with self._calling:
            return await self._held(lambda: self._call(verb, body), "transfer-call")

    async def begin(self) -> None:
        """Connects for the calls."""
        await self._held(lambda: self._keep_for_calls(self._connected()), "transfer-connect")

    async def prepare(self, streams: int) -> None:
        """Opens connections for files ahead of the first fetch."""
        missing = streams - len(self._ready)

        def connect() -> None:
            # Kept here, in the thread: the caller may be cancelled by now.
            self._keep([self._connected()])

        made = await asyncio.gather(
            *(self._held(connect, "transfer-connect") for _ in range(missing)),
            return_exceptions=True,
        )
        for one in made:
            if isinstance(one, BaseException):
                raise one

    async def fetch(
        self,
        files: Sequence[FileWish],
        into: Path,
        *,
        streams: int = 2,
        limit: RateLimit | None = None,
        progress: Callable[[int], None] | None = None,
        resume: bool = False,
    ) -> Fetched:
        """Puts ``files`` into the directory ``into``, which exists. Raises TransferError.

        ``progress`` is called on the event loop with the bytes done. With ``resume``, ranges that are
        there already from an earlier attempt do not travel. After an error nothing is taken away.
        """
        loop = asyncio.get_running_loop()

        def notify(done: int) -> None:
            if progress is not None:
                loop.call_soon_threadsafe(progress, done)

        for wish in files:
            wire.checked_name(wish.name)
        began = time.monotonic()
        job = _Job(
            _planned(files),
            _Target(into, resume=resume),
            None,
            deflate=limit is not None and limit.rate < _SLOW,
            notify=notify,
        )
        job.member = Member(limit, job.ended) if limit else None
        own, self._ready = self._ready[:streams], self._ready[streams:]
        work = asyncio.ensure_future(
            wire.in_thread(lambda: self._fetch(job, files, into, own, streams), "transfer-fetch")
        )
        try:
            kept = await asyncio.shield(work)
        except asyncio.CancelledError:
            job.failed(self._peer.error("fetching files", "it was given up"))
            # The threads write to the files: they end before we say that we have.
            with contextlib.suppress(TransferError):
                self._keep(await work)
            raise
        self._keep(kept)
        return Fetched(sum(one.size for one in files), job.wire, time.monotonic() - began)

    async def close(self) -> None:
        """Ends all connections. A call or fetch that is under way fails."""
        with self._lock:
            self._is_closed = True
            idle = [*self._ready, *([self._calls] if self._calls else [])]
            self._ready, self._calls = [], None
        self._shut_all()
        for channel in idle:
            channel.free()

    def _keep(self, channels: Sequence[Channel]) -> None:
        """For the next fetch."""
        with self._lock:
            closed = self._is_closed
            if not closed:
                self._ready += channels
        if closed:
            for channel in channels:
                channel.free()

    def _shut_all(self) -> None:
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    socket.socket.shutdown(sock, socket.SHUT_RDWR)

    async def _held(self, work: Callable[[], wire.T], name: str) -> wire.T:
        """Runs work that ends when the sockets do: a cancelled one ends all of them."""
        try:
            return await wire.in_thread(work, name)
        except asyncio.CancelledError:
            self._shut_all()
            raise

    def _made(self, sock: socket.socket) -> None:
        with self._lock:
            self._open.add(sock)
            closed = self._is_closed
        if closed:
            sock.close()

    def _connected(self) -> Channel:
        if self._is_closed:
            raise self._peer.error("connecting", "the connection was closed")
        try:
            return self._peer.connected(self._made)
        except Cut as error:
            raise self._unreachable(error) from error

    def _unreachable(self, error: Exception) -> TransferError:
        peer = self._peer
        return peer.error(
            f"connecting to {peer.host} port {peer.port}",
            str(error),
            "see that the daemon runs there and that nodes may reach its transfer port",
        )

    def _call(self, verb: str, body: bytes) -> bytes:
        with self._lock:
            open_, self._calls = self._calls, None
        channel = open_ or self._connected()
        try:
            channel.send_line(Request(call=verb, body=len(body)), body)
            reply = self._peer.reply(channel)
            if not 0 <= reply.wire <= wire.MAX_BODY:
                raise Cut(f"an answer of {reply.wire} bytes")
            answer = bytearray(reply.wire)
            channel.receive(memoryview(answer))
        except Refused:
            self._keep_for_calls(channel)
            raise
        except Cut as error:
            channel.free()
            raise self._peer.error(
                f"call {quoted(verb)}", f"the connection broke: {error}", "try the move again"
            ) from error
        except BaseException:
            channel.free()
            raise
        self._keep_for_calls(channel)
        return bytes(answer)

    def _keep_for_calls(self, channel: Channel) -> None:
        with self._lock:
            closed = self._is_closed
            if not closed:
                self._calls = channel
        if closed:
            channel.free()

    def _fetch(
        self,
        job: _Job,
        files: Sequence[FileWish],
        into: Path,
        own: list[Channel],
        streams: int,
    ) -> list[Channel]:
        """Thread: the whole of a fetch; gives the connections that are still good."""
        kept: list[Channel] = []
        try:
            try:
                self._fits(files, into, own)
                job.target.prepare(files)
            except OSError as error:
                raise _disk(into, error) from error
            count = max(1, min(streams, len(job.todo)))
            others = [
                threading.Thread(
                    target=self._pull, args=(job, own, kept), name="transfer-pull", daemon=True
                )
                for _ in range(count - 1)
            ]
            for each in others:
                each.start()
            self._pull(job, own, kept)
            for each in others:
                each.join()
        except BaseException:
            for channel in own:
                channel.free()
            raise
        finally:
            job.target.close()
        kept += own
        if job.error is not None:
            for channel in kept:
                channel.free()
            raise job.error
        return kept

    def _fits(self, files: Sequence[FileWish], into: Path, own: list[Channel]) -> None:
        """Raises TransferError if the disk has no room for the files."""
        disk = os.statvfs(into)
        free = disk.f_bavail * disk.f_frsize
        needed = sum(one.size for one in files)
        if needed <= free:
            return
        # Holes take none: ask what the files take at the source.
        needed = 0
        channel = own.pop() if own else self._connected()
        try:
            for start in range(0, len(files), wire.MAX_ITEMS):
                names = [one.name for one in files[start : start + wire.MAX_ITEMS]]
                channel.send_line(Request(stat=names))
                needed += sum(self._peer.reply(channel).sizes)
        except Cut as error:
            channel.free()
            raise self._unreachable(error) from error
        except BaseException:
            channel.free()
            raise
        own.append(channel)
        if needed > free:
            raise self._peer.error(
                f"fetching files to {into}",
                f"they take {needed} bytes, the disk has {free} left",
                "make room there or on this node's disk",
            )

    def _pull(self, job: _Job, own: list[Channel], kept: list[Channel]) -> None:
        """Thread: fetches until nothing is left, connecting anew as often as it helps."""
        channel: Channel | None = None
        try:
            room = memoryview(mmap.mmap(-1, wire.MAX_BATCH))
            while not job.ended.is_set() and job.todo:
                with job.lock:
                    channel = own.pop() if own else None
                pending: deque[_Batch] = deque()
                try:
                    channel = channel or self._peer.connected(self._made)
                    job.use(channel)
                    channel.tls.settimeout(_SILENCE_S)
                    while self._step(job, channel, pending, room):
                        pass
                    channel.tls.settimeout(None)
                    kept.append(channel)
                    channel = None
                except Cut as error:
                    job.back(pending)
                    if channel is not None:
                        channel.free()
                        channel = None
                    self._wait(job, error)
        except OSError as error:
            job.failed(_disk(job.target.into, error))
        except Exception as error:
            job.failed(error)
        finally:
            if channel is not None:
                channel.free()

    def _wait(self, job: _Job, error: Exception) -> None:
        """Before the next attempt; raises TransferError if there have been enough."""
        with job.lock:
            job.failures += 1
            failures = job.failures
        if self._is_closed or failures >= _TRIES:
            raise self._peer.error(
                "fetching files",
                f"the connection broke {failures} times: {error}",
                "see whether the source's node is up",
            )
        if failures > 1:
            job.ended.wait(0.05 * 2.0**failures)

    def _step(self, job: _Job, channel: Channel, pending: deque[_Batch], room: memoryview) -> bool:
        """Sends requests, receives one answer; False when there is nothing left to ask for."""
        while len(pending) < _WINDOW and (batch := job.next()) is not None:
            pending.append(batch)
            have = job.target.have(batch, room)
            channel.send_line(Request(items=batch.items, have=have, deflate=job.deflate))
        if not pending:
            return False
        if job.ended.is_set():
            raise Cut("it was given up")
        batch = pending[0]
        reply = self._peer.reply(channel)
        if len(reply.versions) != len(batch.items) or not self._is_sane(reply, batch):
            raise self._peer.error(_named(batch), "what it sent is not what was asked for")
        whole = True
        if not reply.same:
            whole = self._received(job, channel, reply, room)
        pending.popleft()
        if not whole:
            batch.corrupt += 1
            if batch.corrupt >= _CORRUPT:
                raise self._peer.error(
                    _named(batch),
                    f"it came damaged {_CORRUPT} times (its digest is another)",
                    "check the memory and the disk of the source's node",
                )
            job.back([batch])
            return True
        job.checked(batch, reply)
        if not reply.same:
            job.target.write(batch, reply.extents, room[: reply.raw])
        job.finished(batch, reply.wire)
        return True

    @staticmethod
    def _is_sane(reply: Reply, batch: _Batch) -> bool:
        if reply.same:
            return not reply.wire
        return (
            0 <= reply.wire <= wire.MAX_BATCH
            and reply.raw <= wire.MAX_BATCH
            and (reply.deflated or reply.wire == reply.raw)
            and ranges.are_within(reply.extents, batch.items, reply.raw)
        )

    def _received(self, job: _Job, channel: Channel, reply: Reply, room: memoryview) -> bool:
        """Receives a payload into ``room``; whether it is what was sent."""
        packed = memoryview(bytearray(reply.wire)) if reply.deflated else room[: reply.wire]
        if job.member is None:
            channel.receive(packed)
        else:
            for start in range(0, reply.wire, job.member.piece):
                part = packed[start : start + job.member.piece]
                job.member.take(len(part))
                channel.receive(part)
        raw = room[: reply.raw]
        if reply.deflated and not ranges.inflate(packed, raw):
            return False
        return ranges.digest(raw) == reply.digest


def _named(batch: _Batch) -> str:
    more = f" and {len(batch.items) - 1} more" if len(batch.items) > 1 else ""
    return f"file {quoted(batch.items[0].name)}{more}"


def _disk(into: Path, error: OSError) -> TransferError:
    """A failure of this node's own disk."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return TransferError(
        f"writing to {into} (destination)",
        str(error.strerror or error),
        "make room on this node's disk" if full else "see the disk of this node",
    )


async def connect(
    context: ssl.SSLContext, endpoint: str, node_expected: str, hello: Hello
) -> Connection:
    """A connection to the transfer server at ``endpoint`` ("address:port"). Raises TransferError."""
    wire.tuned(context)
    host, _, port = endpoint.rpartition(":")
    try:
        number = int(port)
    except ValueError as error:
        raise TransferError(
            f"endpoint {quoted(endpoint)}", "it is not address:port", "delete the Checkpoint"
        ) from error
    peer = _Peer(context, host.strip("[]"), number, node_expected, hello)
    connection = Connection(peer)
    try:
        await connection.begin()
    except BaseException:
        await connection.close()
        raise
    return connection
