"""The command line's side of the daemon's socket."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Iterator
from typing import Final

import msgspec

from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.records import Request

_UCRED: Final = struct.Struct("iII")
_ANSWER_S: Final = 10.0
"""Seconds that a living daemon takes to answer at the most."""


class DaemonAway(ArchitectError):
    """No daemon answers."""


class Refused(ArchitectError):
    """The daemon said no; ``str`` is its own line."""

    def __init__(self, line: str) -> None:
        super().__init__(line, "")
        self.line = line

    def __str__(self) -> str:
        return self.line


def _connect() -> socket.socket:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(str(paths.DAEMON_SOCKET))
    except PermissionError as error:
        connection.close()
        raise DaemonAway(
            "architectd cannot be asked", "only root may", "run this as root"
        ) from error
    except OSError as error:
        connection.close()
        raise DaemonAway(
            "architectd is not running", "nothing answers at its socket", "`architect up` starts it"
        ) from error
    return connection


def daemon_pid() -> int | None:
    """The pid of the daemon that answers, None if none does (unix(7), SO_PEERCRED).

    One that is just being killed still accepts for a moment, but answers no more.
    """
    try:
        with _connect() as connection:
            connection.settimeout(_ANSWER_S)
            connection.sendall(msgspec.json.encode(Request(verb="ping")) + b"\n")
            if not connection.recv(16).startswith(b"ok"):
                return None
            raw = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _UCRED.size)
            pid: int = _UCRED.unpack(raw)[0]
            return pid
    except DaemonAway:
        if os.geteuid() != 0:
            raise
        return None
    except OSError:
        return None


def lines(request: Request) -> Iterator[str]:
    """Sends a request and gives the lines of the reply, without their ends."""
    with _connect() as connection:
        connection.sendall(msgspec.json.encode(request) + b"\n")
        with connection.makefile("r") as reply:
            for line in reply:
                yield line.rstrip("\n")


def ask(request: Request) -> str:
    """Sends a request and returns what follows "ok".

    Raises:
        DaemonAway: no daemon.
        Refused: the daemon's error line.
    """
    reply = next(lines(request), "")
    if not reply.startswith("ok"):
        raise Refused(reply.removeprefix("error ") or "architectd ended before it answered")
    return reply.removeprefix("ok").strip()
