"""Sees to it that a sleeping container's listeners can be bound again when it wakes.

Called by the daemon before each dump. Why: CRIU binds a listener with SO_REUSEADDR, and the kernel lets it
share the port with what is left of old connections only if those had the option too. Three things would
otherwise end a restore with "Can't bind inet socket: Address already in use":

- a program that listens without SO_REUSEADDR, and connections that it closed first, which linger without a
  descriptor (TIME_WAIT, FIN_WAIT2): the option is set on every socket it holds, and accepted ones inherit
  it; what lingers from before is destroyed (sock_diag(7), SOCK_DESTROY), nobody can be waiting for it;
- connections it closed whose last data are not acknowledged yet (FIN_WAIT1, CLOSING, LAST_ACK): those must
  not be destroyed, so the dump has to wait;
- a neighbour in the pod whose outgoing connection is given that port, which is free while the container
  sleeps: the port is reserved (ip_local_reserved_ports, ip-sysctl.rst of the kernel).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Final

from architect.adapters import netns

_SYS_PIDFD_GETFD: Final = 438
_FINISHED: Final = frozenset({"06", "05"})
"""TIME_WAIT and FIN_WAIT2, as /proc/net/tcp writes them."""
_UNFINISHED: Final = frozenset({"04", "0B", "09"})
"""FIN_WAIT1, CLOSING and LAST_ACK."""
_NO_DESCRIPTOR: Final = "0"
_RESERVED: Final = Path("/proc/sys/net/ipv4/ip_local_reserved_ports")


def allow_reuse(pids: Iterable[int]) -> int:
    """Sets SO_REUSEADDR on every TCP socket of the processes; returns on how many it was missing."""
    libc = ctypes.CDLL(None, use_errno=True)
    changed = 0
    for pid in pids:
        with contextlib.suppress(OSError):
            process = os.pidfd_open(pid)
            try:
                for number in _socket_numbers(pid):
                    copy = libc.syscall(_SYS_PIDFD_GETFD, process, number, 0)
                    if copy >= 0:
                        changed += _set_reuse(copy)
            finally:
                os.close(process)
    return changed


def _socket_numbers(pid: int) -> list[int]:
    numbers = []
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/{pid}/fd/{name}").startswith("socket:"):
                numbers.append(int(name))
    return numbers


def _set_reuse(descriptor: int) -> bool:
    """Takes the descriptor over; whether the option had to be set."""
    with socket.socket(fileno=descriptor) as one:
        if one.family not in (socket.AF_INET, socket.AF_INET6) or one.type != socket.SOCK_STREAM:
            return False
        if one.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR):
            return False
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        return True


def unfinished(netns_pid: int, ports: Collection[int]) -> int:
    """How many closed connections of those local ports still have data on the way."""
    return sum(1 for _ in _lingering(netns_pid, ports, _UNFINISHED))


def clear_finished(netns_pid: int, ports: Collection[int]) -> None:
    """Destroys closed connections of those local ports that only wait for their time to pass."""
    for port in sorted(set(_lingering(netns_pid, ports, _FINISHED))):
        with _network_of(netns_pid):
            subprocess.run(
                ["ss", "-K", "state", "time-wait", "state", "fin-wait-2", "sport", "=", f":{port}"],
                capture_output=True, check=False, timeout=10,
            )  # fmt: skip


@contextlib.contextmanager
def _network_of(pid: int) -> Iterator[None]:
    descriptor = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
    try:
        with netns.entered(descriptor):
            yield
    finally:
        os.close(descriptor)


def _lingering(netns_pid: int, ports: Collection[int], states: Collection[str]) -> Iterable[int]:
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(f"/proc/{netns_pid}/net/{table}").read_text().splitlines()[1:]:
                row = line.split()
                port = int(row[1].rpartition(":")[2], 16)
                if row[3] in states and row[9] == _NO_DESCRIPTOR and port in ports:
                    yield port


def reserve(netns_pid: int, ports: Collection[int]) -> None:
    """Keeps the kernel from giving these ports to outgoing connections in that namespace."""
    with _network_of(netns_pid):
        present = _RESERVED.read_text().strip()
        missing = [str(port) for port in sorted(ports) if not _covers(present, port)]
        if missing:
            _RESERVED.write_text(",".join(filter(None, [present, *missing])))


def _covers(ranges: str, port: int) -> bool:
    for part in filter(None, ranges.split(",")):
        first, _, last = part.partition("-")
        if int(first) <= port <= int(last or first):
            return True
    return False
