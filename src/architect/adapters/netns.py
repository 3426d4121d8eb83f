"""Network namespaces, entered by the calling thread for a moment.

The gate needs this to attach filters and to open its queue inside a pod, and
the netfilter probe to try rules where they can do no harm. `setns(2)` changes
one thread only, so every entry is a context manager that goes back; nothing
may be awaited inside one, or another coroutine would run in the pod's
namespace. `os.setns` exists from Python 3.12 on only, hence ctypes.

Constants: <linux/sched.h>, <linux/sockios.h>, <linux/if.h>, <linux/if_arp.h>.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

CLONE_NEWNET = 0x40000000

_SIOCGIFFLAGS = 0x8913
_SIOCSIFFLAGS = 0x8914
_SIOCGIFHWADDR = 0x8927
_IFF_UP = 0x1
_ARPHRD_ETHER = 1
_ARPHRD_LOOPBACK = 772
# struct ifreq: the name, then a union of at most 24 bytes.
_IFREQ = struct.Struct("16sH22x")

_libc = ctypes.CDLL(None, use_errno=True)


class NetnsError(Exception):
    """A network namespace could not be opened, entered or left."""


class Interface(NamedTuple):
    """One network interface, as seen inside its namespace."""

    number: int
    """What <net/if.h> calls the interface's index."""
    name: str
    ethernet: bool
    """Whether its packets carry an Ethernet header (veth and lo do, tun does not)."""


def open_netns(netns: int | Path) -> int:
    """Return a new close-on-exec descriptor of a network namespace.

    `netns` is a descriptor of one, which is duplicated, or a path such as
    /proc/PID/ns/net. The namespace lives at least as long as the result.
    Raises NetnsError.
    """
    try:
        if isinstance(netns, int):
            return fcntl.fcntl(netns, fcntl.F_DUPFD_CLOEXEC, 0)
        return os.open(netns, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetnsError(
            f"cannot open network namespace {netns}: {error.strerror}; has the pod ended?"
        ) from error


def _setns(netns: int) -> None:
    if _libc.setns(netns, CLONE_NEWNET):
        number = ctypes.get_errno()
        raise NetnsError(
            f"setns to network namespace: {os.strerror(number)}; it takes CAP_SYS_ADMIN"
        ) from OSError(number, os.strerror(number))


@contextlib.contextmanager
def _return_home() -> Iterator[None]:
    # Not /proc/self: that is the main thread's namespace, whichever thread asks.
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        try:
            yield
        finally:
            _setns(home)
    finally:
        os.close(home)


@contextlib.contextmanager
def entered(netns: int) -> Iterator[None]:
    """Run the block in the namespace with this descriptor. Raises NetnsError."""
    with _return_home():
        _setns(netns)
        yield


@contextlib.contextmanager
def scratch() -> Iterator[None]:
    """Run the block in a new namespace, with lo up, that ends with the block.

    Raises NetnsError.
    """
    with _return_home():
        if _libc.unshare(CLONE_NEWNET):
            number = ctypes.get_errno()
            raise NetnsError(
                f"unshare of a network namespace: {os.strerror(number)}; it takes CAP_SYS_ADMIN"
            ) from OSError(number, os.strerror(number))
        bring_up("lo")
        yield


def bring_up(name: str) -> None:
    """Set an interface of the current namespace up (netdevice(7)). Raises NetnsError."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            request = _IFREQ.pack(name.encode(), 0)
            _, flags = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFFLAGS, request))
            request = _IFREQ.pack(name.encode(), flags | _IFF_UP)
            fcntl.ioctl(control, _SIOCSIFFLAGS, request)
        except OSError as error:
            raise NetnsError(f"cannot bring {name} up: {error.strerror}") from error


def interfaces() -> list[Interface]:
    """List the interfaces of the current namespace. Raises NetnsError."""
    found = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as control:
        try:
            for index, name in socket.if_nameindex():
                try:
                    request = _IFREQ.pack(os.fsencode(name), 0)
                    _, kind = _IFREQ.unpack(fcntl.ioctl(control, _SIOCGIFHWADDR, request))
                except OSError as error:
                    if error.errno == errno.ENODEV:  # gone since it was listed
                        continue
                    raise
                ethernet = kind in (_ARPHRD_ETHER, _ARPHRD_LOOPBACK)
                found.append(Interface(index, name, ethernet))
        except OSError as error:
            raise NetnsError(f"cannot list network interfaces: {error.strerror}") from error
    return found
