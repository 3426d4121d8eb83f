"""Which ports the processes of a container listen on, and which connections they have open.

Called by the daemon for pods with several containers: an engine knows the pod's ports, not whose they are.
From /proc/PID/net/{tcp,udp}* (proc(5)) and the processes' open sockets.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Collection, Iterable
from ipaddress import IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple

_TCP_OPEN: Final = ("01", "03", "04", "08", "09", "0B")
"""ESTABLISHED, SYN_RECV, CLOSE_WAIT; FIN_WAIT1, LAST_ACK and CLOSING, in which the kernel still delivers what
a program has said before it closed, and needs the peer's acknowledgements for that."""
_TCP_HALF_CLOSED: Final = "05"
"""FIN_WAIT2: the kernel alone ends it, unless a program still holds the socket to read."""
_NO_INODE: Final = "0"
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


class Connection(NamedTuple):
    """One end of a TCP connection in the namespace."""

    port: int
    """The local one."""
    peer: str
    peer_port: int


def connections(netns_pid: int, ports: Collection[int]) -> set[Connection]:
    """The TCP connections to ``ports`` that are open in the namespace of ``netns_pid``.

    Open is what the kernel still has for a program: established ones, which one whose peer has vanished
    stays until keep-alive or retransmission gives up; those that the peer has half closed; those that the
    program has half closed and still holds; those that it has closed while the peer has not got everything
    yet, for which the kernel gives up in time, too. So are those that are being opened, or wait for a
    program's ``accept``.
    """
    return {
        Connection(_port(row[1]), _address(row[2]), _port(row[2]))
        for table in ("tcp", "tcp6")
        for row in _rows(netns_pid, table)
        if (row[3] in _TCP_OPEN or (row[3] == _TCP_HALF_CLOSED and row[9] != _NO_INODE))
        and _port(row[1]) in ports
    }


def connected(netns_pid: int, local: str) -> set[tuple[str, str, int, str, int]]:
    """Connections of a local address: protocol, local address and port, the peer's address and port.

    TCP's in any state but listening, and UDP sockets that have a peer.
    """
    return {
        (protocol, local, _port(row[1]), _address(row[2]), _port(row[2]))
        for table, protocol in _KINDS
        for row in _rows(netns_pid, table)
        if row[3] != _TCP_LISTEN and _port(row[2]) and _address(row[1]) == local
    }


def translated(netns_pid: int, ports: Collection[int]) -> set[Connection]:
    """Connections that were made to ``ports`` and are translated to others, of which these are the ends.

    From the kernel's table of tracked connections; empty on a kernel that does not show it
    (CONFIG_NF_CONNTRACK_PROCFS).
    """
    found = set()
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{netns_pid}/net/nf_conntrack").read_text().splitlines():
            connection = _translation(line, ports)
            if connection is not None:
                found.add(connection)
    return found


def _translation(line: str, ports: Collection[int]) -> Connection | None:
    """The program's end of the tracked connection that the line is of, if one to ``ports``."""
    words = [word.partition("=")[::2] for word in line.split()]
    both = {name: [value for key, value in words if key == name] for name in _TUPLE}
    if ("tcp", "") not in words or any(len(values) != 2 for values in both.values()):
        return None
    if int(both["dport"][0]) not in ports:
        return None
    # The answers' direction is as the program sees it: the client's port may have been translated, too.
    peer = str(ip_address(both["dst"][1]))
    return Connection(int(both["sport"][1]), peer, int(both["dport"][1]))


_TUPLE: Final = ("src", "dst", "sport", "dport")


def _address(text: str) -> str:
    """The address of "HEX:PORT": 32-bit words in the machine's order, each of which is big-endian."""
    words = bytes.fromhex(text.rpartition(":")[0])
    raw = b"".join(words[place : place + 4][::-1] for place in range(0, len(words), 4))
    found = ip_address(raw)
    mapped = found.ipv4_mapped if isinstance(found, IPv6Address) else None
    return str(mapped or found)
