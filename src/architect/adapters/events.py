"""The event log: what users should know of, one JSON line each, kept across restarts.

Called by the daemon to append, and to follow for `architect events --follow`; read by `architect events`
also while no daemon runs. One older file is kept beside it, so the log has a bound.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec

from architect.contract.records import Event

_LIMIT: Final = 4 << 20
"""Bytes after which the log is turned over."""


class EventLog:
    """Appends events and passes them on to those who follow."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._followers: set[asyncio.Queue[Event]] = set()
        path.parent.mkdir(parents=True, exist_ok=True)

    def append(self, event: Event) -> None:
        """Writes ``event`` with the present time; a full disk loses the line, not the daemon."""
        event.time = datetime.now(UTC).isoformat(timespec="milliseconds")
        with contextlib.suppress(OSError):
            with self._path.open("ab") as log:
                log.write(msgspec.json.encode(event) + b"\n")
                size = log.tell()
            if size > _LIMIT:
                self._path.rename(older(self._path))
        for follower in self._followers:
            if not follower.full():
                follower.put_nowait(event)

    @contextlib.contextmanager
    def follow(self) -> Iterator[asyncio.Queue[Event]]:
        """A queue that gets each event from now on; a follower that does not read loses some."""
        queue: asyncio.Queue[Event] = asyncio.Queue(1024)
        self._followers.add(queue)
        try:
            yield queue
        finally:
            self._followers.discard(queue)


def older(path: Path) -> Path:
    """Where the log before the present one is."""
    return path.with_name(path.name + ".1")


def read(path: Path) -> list[Event]:
    """All events kept, oldest first; lines that were cut short are left out."""
    events = []
    for file in (older(path), path):
        with contextlib.suppress(FileNotFoundError):
            for line in file.read_bytes().splitlines():
                with contextlib.suppress(msgspec.MsgspecError):
                    events.append(msgspec.json.decode(line, type=Event))
    return events
