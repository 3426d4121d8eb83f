"""Talks to a container's keeper (native/keeper): its status, and the few orders it takes.

Called by the daemon for each managed container. The protocol is in native/common/control.h.
"""

from __future__ import annotations

import asyncio
import enum
import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from architect.contract.errors import ArchitectError


class KeeperError(ArchitectError):
    """The keeper refused an order or is gone."""


class PagerState(enum.IntEnum):
    """State of the keeper's page server; the order is native/keeper/pager.h's."""

    IDLE = 0
    LOADING = 1
    ARMED = 2
    RESTORING = 3
    FILLING = 4
    DONE = 5
    FAILED = 6
    STALLED = 7


@dataclass(frozen=True, slots=True)
class KeeperStatus:
    """One status line of a keeper."""

    phase: str
    """creating, running, dumping, hibernated or restoring."""
    init: int
    keeper: int
    pager: int
    pager_state: PagerState
    pages: int
    left: int
    faults: int
    restore_status: int

    @classmethod
    def parse(cls, text: str) -> KeeperStatus:
        """Reads "ok phase=running init=1 ..."."""
        words = dict(word.split("=", 1) for word in text.split()[1:])
        return cls(
            phase=words["phase"],
            init=int(words["init"]),
            keeper=int(words["keeper"]),
            pager=int(words["pager"]),
            pager_state=PagerState(int(words["pager_state"])),
            pages=int(words["pages"]),
            left=int(words["left"]),
            faults=int(words["faults"]),
            restore_status=int(words["restore_status"]),
        )


class Keeper:
    """A connection for orders and one for news. Close it with :meth:`close`."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._orders = self._connect()
        self._news = self._connect()
        self._lock = asyncio.Lock()
        self._asking: asyncio.Future[bytes] | None = None
        self._closed = False
        self._watcher: asyncio.Task[None] | None = None

    def _connect(self) -> socket.socket:
        connection = socket.socket(
            socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC
        )
        try:
            connection.connect(str(self._path))
        except OSError as error:
            connection.close()
            raise KeeperError(
                what=f"keeper at {self._path} cannot be reached",
                why=str(error),
                fix="the container has ended; remove it with the engine",
            ) from error
        return connection

    async def ask(self, order: str, timeout_s: float = 30.0) -> KeeperStatus:
        """Sends an order and awaits the status line that answers it.

        Raises:
            KeeperError: it refused, or is gone, or is frozen (a paused container).
        """
        return KeeperStatus.parse(await self._ask(order, timeout_s))

    async def tell(self, order: str, timeout_s: float = 30.0) -> None:
        """Sends an order that is answered by no status, such as ``kill 15``. Raises as :meth:`ask`."""
        await self._ask(order, timeout_s)

    async def _ask(self, order: str, timeout_s: float) -> str:
        loop = asyncio.get_running_loop()
        async with self._lock:
            try:
                await loop.sock_sendall(self._orders, order.encode())
                self._asking = asyncio.ensure_future(loop.sock_recv(self._orders, 4096))
                reply = await asyncio.wait_for(self._asking, timeout_s)
            except asyncio.CancelledError as error:
                if self._closed:
                    raise self._gone(None) from error
                raise
            except TimeoutError as error:
                # A late answer would be taken for the next order's: begin anew.
                self._orders.close()
                self._orders = self._connect()
                raise KeeperError(
                    what=f"keeper did not answer {order!r} within {timeout_s:g} s",
                    why="the container may be paused",
                    fix="resume it",
                ) from error
            except OSError as error:
                raise self._gone(error) from error
        text = reply.decode()
        if not text:
            raise self._gone(None)
        if text != "ok" and not text.startswith("ok "):
            raise KeeperError(
                what=f"keeper refused {order!r}", why=text.removeprefix("error "), fix="see the log"
            )
        return text

    def watch(self, news: Callable[[KeeperStatus | None], None]) -> None:
        """Calls ``news`` with each new status, and with None when the keeper has ended."""
        self._watcher = asyncio.create_task(self._watch(news))

    async def _watch(self, news: Callable[[KeeperStatus | None], None]) -> None:
        loop = asyncio.get_running_loop()
        try:
            await loop.sock_sendall(self._news, b"watch")
            while text := await loop.sock_recv(self._news, 4096):
                news(KeeperStatus.parse(text.decode()))
        except OSError:
            pass
        news(None)

    def close(self) -> None:
        """Closes both connections; the keeper lives on. Whoever waits for an answer is told that it is gone.

        The sockets are closed a moment later: the loop still has to let go of what waited for them, which it
        knows by their descriptors' numbers, and the next connection may have the same.
        """
        self._closed = True
        for waiting in (self._watcher, self._asking):
            if waiting is not None:
                waiting.cancel()
        loop = asyncio.get_running_loop()
        loop.call_soon(self._orders.close)
        loop.call_soon(self._news.close)

    @staticmethod
    def _gone(error: OSError | None) -> KeeperError:
        return KeeperError(
            what="keeper is gone",
            why=str(error or "connection closed"),
            fix="the container has ended; remove it with the engine",
        )
