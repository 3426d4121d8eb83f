"""The daemon's socket: requests of runc-architect and of the command line, one line of JSON each.

Replies are one line, "ok ..." or "error TEXT". After `exec`, `pause` and `signal` the container is kept awake
until the connection closes; `events` with follow goes on line by line.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, Protocol

import msgspec

from architect.adapters import events
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.records import Request
from architect.decisions.limits import Verdict
from architect.processes.architectd import probing
from architect.processes.architectd.container import ManagedContainer
from architect.processes.architectd.context import Context
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer
from architect.processes.architectd.registry import Registry

_LINE_LIMIT: Final = 1 << 20


class LimitsRefused(ArchitectError):
    """Lower limits would kill a container that has just woken."""


class Moves(Protocol):
    """What the server must know of a cluster's moves; :mod:`.cluster.moves` implements it."""

    async def arrives(self, managed: MovableContainer) -> bool:
        """A container is to be started: whether a checkpoint of another node has taken its place.

        Raises:
            ArchitectError: it is on its way and cannot be restored now; the kubelet is to try again.
        """

    def started(self, managed: MovableContainer) -> None:
        """The engine has started a container anew."""

    def stopped(self, managed: MovableContainer) -> None:
        """The engine wants a container to end; its signal is in the record."""


class Server:
    """Answers requests; see the module."""

    def __init__(self, registry: Registry, context: Context, moves: Moves | None = None) -> None:
        """``moves`` decides what the starts and stops of a cluster's pods mean."""
        self._registry = registry
        self._moves = moves
        self._context = context
        self._verbs: dict[str, Callable[[Request], Awaitable[str]]] = {
            "create": self._create,
            "created": self._created,
            "start": self._start,
            "stop": self._stop,
            "started": self._started,
            "update": self._update,
            "updated": self._updated,
            "deleted": self._deleted,
            "ps": self._ps,
            "sleep": self._sleep,
            "wake": self._wake,
            "ping": self._ping,
        }

    async def listen(self) -> asyncio.Server:
        """Opens the socket."""
        paths.DAEMON_SOCKET.unlink(missing_ok=True)
        server = await asyncio.start_unix_server(
            self._serve, str(paths.DAEMON_SOCKET), limit=_LINE_LIMIT
        )
        paths.DAEMON_SOCKET.chmod(0o600)
        return server

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ValueError):
            line = await reader.readline()
            if line:
                await self._answer(line, reader, writer)
        with contextlib.suppress(OSError):
            writer.close()
            await writer.wait_closed()

    async def _answer(
        self, line: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            request = msgspec.json.decode(line, type=Request)
            if request.verb in ("exec", "pause", "signal"):
                await self._lease(request, reader, writer)
                return
            if request.verb == "events":
                await self._events(request, reader, writer)
                return
            verb = self._verbs.get(request.verb)
            reply = f"error unknown verb {request.verb}" if verb is None else await verb(request)
        except msgspec.MsgspecError as error:
            reply = f"error malformed request: {error}"
        except ArchitectError as error:
            reply = f"error {error}"
        writer.write(reply.encode() + b"\n")
        await writer.drain()

    # ---- runc-architect -----------------------------------------------------------------------------

    async def _create(self, request: Request) -> str:
        managed = self._registry.create(request.id, request.bundle, request.root, request.pid)
        return "ok managed" if managed else "ok unmanaged"

    async def _created(self, request: Request) -> str:
        try:
            managed = await self._registry.find(request.id)
            if managed is not None and not managed.clock.init:
                await managed.attach()
        except (OSError, ValueError) as error:
            # The container is there, and the next word about it makes another try.
            log("not attached", id=request.id, error=repr(error))
            return f"error {error}"
        return "ok"

    async def _start(self, request: Request) -> str:
        """Whether runc is to start it, or a checkpoint of another node has taken its place."""
        managed = await self._registry.find(request.id)
        if self._moves is None:
            return "ok start"
        if managed is None:
            # Started as new it would take the place of what may be on its way to it.
            return f"error container {request.id} is not known; it is gone, or its record cannot be read"
        if not managed.clock.init:
            await managed.attach()
        return "ok landed" if await self._moves.arrives(managed) else "ok start"

    async def _stop(self, request: Request) -> str:
        """Whether the signal is delivered now, or held until it is known what becomes of the pod."""
        managed = await self._registry.find(request.id)
        if managed is None or self._moves is None:
            return "ok deliver"
        managed.record.stop_signal = request.signal
        managed.save()
        self._moves.stopped(managed)
        return "ok held"

    async def _started(self, request: Request) -> str:
        managed = await self._registry.find(request.id)
        if managed is not None:
            managed.started()
            if self._moves is not None:
                self._moves.started(managed)
        return "ok"

    async def _update(self, request: Request) -> str:
        managed = await self._registry.find(request.id)
        if managed is None:
            return Verdict.APPLY.value
        verdict = managed.update(request.resources)
        if verdict is not Verdict.REFUSE:
            return str(verdict.value)
        raise LimitsRefused(
            what=f"the limits of {managed.name} stay as they are",
            why="the container has just woken, and lower ones were meant for the sleeper",
            fix="none needed: the kubelet asks again, with what the pod requests by then",
        )

    async def _updated(self, request: Request) -> str:
        managed = await self._registry.find(request.id)
        if managed is not None:
            managed.updated()
        return "ok"

    async def _deleted(self, request: Request) -> str:
        self._registry.deleted(request.id)
        return "ok"

    async def _lease(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """Wakes a container and keeps it awake while the connection is open."""
        managed = await self._registry.find(request.id)
        if managed is None:
            writer.write(b"ok\n")
            return
        if request.verb == "exec" and probing.is_one(managed, request.process):
            await self._probe(managed, reader, writer)
            return
        managed.clock.leases += 1
        try:
            try:
                await managed.wake(request.verb)
                reply = "ok"
            except ArchitectError as error:
                reply = f"error {error}"
            writer.write(reply.encode() + b"\n")
            await writer.drain()
            await reader.read()
        finally:
            managed.clock.release()

    async def _probe(
        self,
        managed: ManagedContainer,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        """A sleeper's probe succeeds without it; one that wakes anyway is awaited."""
        if probing.is_answered(managed):
            writer.write(b"ok answered\n")
            return
        with probing.under_way(managed):
            await managed.restored()
            writer.write(b"ok\n")
            await writer.drain()
            await reader.read()

    # ---- the command line ---------------------------------------------------------------------------------

    async def _ps(self, _request: Request) -> str:
        rows = [one.row() for one in self._registry.all() if one.settings.managed]
        return "ok " + msgspec.json.encode(rows).decode()

    async def _sleep(self, request: Request) -> str:
        for managed in self._registry.named(request.pod, request.container):
            await managed.sleep("command")
        return "ok " + await self._rows(request)

    async def _wake(self, request: Request) -> str:
        for managed in self._registry.named(request.pod, request.container):
            await managed.wake("command")
        return "ok " + await self._rows(request)

    async def _rows(self, request: Request) -> str:
        named = self._registry.named(request.pod, request.container)
        return msgspec.json.encode([managed.row() for managed in named]).decode()

    async def _ping(self, _request: Request) -> str:
        return "ok"

    async def _events(
        self, request: Request, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        with self._context.events.follow() as queue:
            for event in events.read(paths.EVENTS):
                writer.write(msgspec.json.encode(event) + b"\n")
            await writer.drain()
            if not request.follow:
                return
            gone = asyncio.create_task(reader.read())
            while not gone.done():
                news = asyncio.create_task(queue.get())
                await asyncio.wait({gone, news}, return_when=asyncio.FIRST_COMPLETED)
                if news.done():
                    writer.write(msgspec.json.encode(news.result()) + b"\n")
                    await writer.drain()
                else:
                    news.cancel()
