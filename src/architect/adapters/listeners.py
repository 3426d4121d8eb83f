"""Which ports the processes of a container listen on, and which connections they have open.

Called by the daemon for pods with several containers: an engine knows the pod's ports, not whose they are.
From /proc/PID/net/{tcp,udp}* (proc(5)) and the processes' open sockets.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Final

_TCP_ESTABLISHED: Final = "01"
_TCP_LISTEN: Final = "0A"
_UDP_UNCONNECTED: Final = "07"
_KINDS: Final = (("tcp", "tcp"), ("tcp6", "tcp"), ("udp", "udp"), ("udp6", "udp"))


def _rows(pid: int, table: str) -> Iterable[list[str]]:
    with contextlib.suppress(OSError):
        lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        for line in lines:
            yield line.split()


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _sockets(pids: Iterable[int]) -> set[str]:
    """Inodes of all sockets that the processes hold."""
    inodes = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for name in os.listdir(f"/proc/{pid}/fd"):
                with contextlib.suppress(OSError):
                    target = os.readlink(f"/proc/{pid}/fd/{name}")
                    if target.startswith("socket:["):
                        inodes.add(target[8:-1])
    return inodes


def listening(netns_pid: int, pids: Iterable[int] | None = None) -> set[tuple[str, int]]:
    """Ports (protocol, number) listened on in the namespace of ``netns_pid``; by ``pids`` if given."""
    inodes = None if pids is None else _sockets(pids)
    found = set()
    for table, protocol in _KINDS:
        waiting = _TCP_LISTEN if protocol == "tcp" else _UDP_UNCONNECTED
        for row in _rows(netns_pid, table):
            if row[3] == waiting and (inodes is None or row[9] in inodes):
                found.add((protocol, _port(row[1])))
    return found


def local(
    netns_pid: int, pids: Iterable[int], known: Collection[tuple[str, int]]
) -> set[tuple[str, int]]:
    """Local ports (protocol, number) of all sockets of ``pids``, but for the ``known`` ones.

    That is: outgoing connections, and listeners on ports that nobody declared.
    """
    candidates = {
        (protocol, port, row[9])
        for table, protocol in _KINDS
        for row in _rows(netns_pid, table)
        if (port := _port(row[1])) and (protocol, port) not in known
    }
    inodes = _sockets(pids) if candidates else set()
    return {(protocol, port) for protocol, port, inode in candidates if inode in inodes}


def established(netns_pid: int, ports: Collection[int]) -> int:
    """How many TCP connections to ``ports`` are established in the namespace of ``netns_pid``."""
    return sum(
        row[3] == _TCP_ESTABLISHED and _port(row[1]) in ports
        for table in ("tcp", "tcp6")
        for row in _rows(netns_pid, table)
    )
