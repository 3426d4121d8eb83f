"""Makes a pod's network namespace the home of connections that were made to another address.

Called by architectd at the destination of a move. The address that the pod had before becomes a second one of
the namespace's lo, so that the restored sockets have what they had; what comes for them to the pod's own
address is translated at the very edge, before the gate and before the kernel looks for a socket.

What they send keeps the old address as its source. Translated, it could reach a client whose node has not
heard of the move yet; the client would refuse what it does not know, and the restored socket believe it.

Sockets that have been given the pod's new address (``rewrite-established-addresses-containers``) are
translated the other way round (:func:`disguise`): for everybody else they have the old one as well.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import socket
import struct
from collections.abc import Callable, Collection, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Final, TypeVar

from architect.adapters import listeners, netfilter, netns
from architect.contract.errors import ArchitectError
from architect.contract.flows import PROTOCOLS, Flow

TABLE: Final = "architect_home"

_ROOM: Final = 65536
_NEW_ADDRESS, _DELETE_ADDRESS = 20, 21
_REQUEST, _ACKNOWLEDGE, _REPLACE, _CREATE = 0x1, 0x4, 0x100, 0x400
_ADDRESS, _LOCAL = 1, 2
_NO_DETECTION: Final = 0x02
"""<linux/rtnetlink.h>, <linux/netlink.h>, <linux/if_addr.h>: rtnetlink(7)."""
_LIST_ADDRESSES: Final = 0x8912
"""SIOCGIFCONF (netdevice(7)); each entry is a name and a sockaddr."""
_ENTRY: Final = 40
_GLOBAL: Final = "00"

T = TypeVar("T")


class NoHome(ArchitectError):
    """The namespace cannot be made the connections' home."""


def addresses(pid: int) -> list[str]:
    """The addresses by which the pod of a process is known, IPv4 first; blocking.

    Raises:
        NoHome: the process has ended.
    """
    return _within(pid, lambda: [*_v4(own=True), *_v6(pid, own=True)])


def settle(pid: int, old: str, new: str, flows: Collection[Flow]) -> None:
    """Connections of the address ``old`` live here from now on, seen from outside at ``new``; blocking.

    Repeatable, and for several addresses, each with its own connections.

    Raises:
        NoHome: the kernel refuses, or the process has ended.
    """
    text = _translations("in", old, new, flows)

    def carry_out() -> None:
        _change_address(_NEW_ADDRESS, old)
        netfilter.checked("nft", "-f", "-", text=text)

    _within(pid, carry_out)


def disguise(pid: int, old: str, new: str, flows: Collection[Flow]) -> None:
    """As :func:`settle` for sockets of the address ``new``: what they send has ``old`` as its source."""
    text = _translations("out", old, new, flows)
    _within(pid, lambda: netfilter.checked("nft", "-f", "-", text=text))


def _translations(way: str, old: str, new: str, flows: Collection[Flow]) -> str:
    number = "6" if ":" in old else "4"
    kinds: dict[str, list[str]] = {}
    for flow in flows:
        key = f"{new} . {flow.local_port} . {flow.peer} . {flow.peer_port}"
        kinds.setdefault(flow.protocol, []).append(f"{key} : {old}")
    text = "\n".join(_rules()) + "\n"
    for protocol, elements in kinds.items():
        place = f"inet {TABLE} {way}_{protocol}{number}"
        text += f"add element {place} {{ {', '.join(elements)} }}\n"
    return text


def leave(pid: int) -> None:
    """No other address lives here any more; nothing if none did; blocking. Raises as :func:`settle`."""

    def carry_out() -> None:
        netfilter.checked(
            "nft", "-f", "-", text=f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
        )
        for address in (*_v4(own=False), *_v6(pid, own=False)):
            _change_address(_DELETE_ADDRESS, address)

    _within(pid, carry_out)


def open_flows(pid: int, old: str, new: Collection[str] = ()) -> list[Flow]:
    """The connections of the address ``old`` that the namespace of a process still has; blocking.

    Those of an address of ``new`` are among them as if they had ``old`` (:func:`disguise`).
    """
    places = (old, *(one for one in new if (":" in one) == (":" in old)))
    found = {
        Flow(*one)._replace(local=old) for at in places for one in listeners.connected(pid, at)
    }
    return sorted(found)


def _rules() -> Iterator[str]:
    yield f"add table inet {TABLE}"
    yield f"add chain inet {TABLE} inward {{ type filter hook prerouting priority -310; }}"
    yield f"flush chain inet {TABLE} inward"
    yield f"add chain inet {TABLE} outward {{ type filter hook postrouting priority 310; }}"
    yield f"flush chain inet {TABLE} outward"
    for number, family in (("4", "ip"), ("6", "ip6")):
        for protocol in PROTOCOLS:
            # Why not `type`: rerouting.py.
            key = f"{family} saddr . {protocol} sport . {family} daddr . {protocol} dport"
            kind = f"{{ typeof {key} : {family} saddr; size {_ROOM}; }}"
            yield f"add map inet {TABLE} in_{protocol}{number} {kind}"
            yield f"add map inet {TABLE} out_{protocol}{number} {kind}"
            here = f"meta l4proto {protocol} {family}"
            packet = f"{family} daddr . th dport . {family} saddr . th sport"
            yield (
                f"add rule inet {TABLE} inward {here} daddr set {packet} "
                f"map @in_{protocol}{number} accept"
            )
            packet = f"{family} saddr . th sport . {family} daddr . th dport"
            yield (
                f"add rule inet {TABLE} outward {here} saddr set {packet} "
                f"map @out_{protocol}{number} accept"
            )


def _within(pid: int, work: Callable[[], T]) -> T:
    try:
        space = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
        try:
            with netns.entered(space):
                return work()
        finally:
            os.close(space)
    except (netns.NetnsError, netfilter.NetfilterError, OSError, ValueError) as error:
        raise NoHome(
            "connections cannot go on in the pod's network",
            str(error),
            "nf_tables has to be in the node's kernel",
        ) from error


def _v4(*, own: bool) -> list[str]:
    """IPv4 addresses of this namespace: the pod's own, or those that have moved here (on lo)."""
    room = ctypes.create_string_buffer(_ENTRY * 256)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking:
        asked = struct.pack("iL", len(room), ctypes.addressof(room))
        (size,) = struct.unpack("i", fcntl.ioctl(asking, _LIST_ADDRESSES, asked)[:4])
    listed = room.raw
    found = []
    for begin in range(0, size, _ENTRY):
        name = listed[begin : begin + 16].partition(b"\0")[0]
        address = socket.inet_ntoa(listed[begin + 20 : begin + 24])
        if not address.startswith("127.") and (name != b"lo") == own:
            found.append(address)
    return found


def _v6(pid: int, *, own: bool) -> list[str]:
    """As :func:`_v4`, from /proc/PID/net/if_inet6 (proc(5)): link-local ones are nobody's address."""
    found = []
    table = Path(f"/proc/{pid}/net/if_inet6")
    for line in table.read_text().splitlines() if table.exists() else ():
        text, _, _, scope, _, name = line.split()
        address = ip_address(bytes.fromhex(text))
        if scope == _GLOBAL and not address.is_loopback and (name != "lo") == own:
            found.append(str(address))
    return found


def _change_address(kind: int, address: str) -> None:
    """Adds an address to lo, or takes it away; neither minds if that is done already."""
    packed = ip_address(address).packed
    family = socket.AF_INET6 if len(packed) == 16 else socket.AF_INET
    index = socket.if_nametoindex("lo")
    body = struct.pack("BBBBI", family, 8 * len(packed), _NO_DETECTION, 0, index)
    for attribute in (_LOCAL, _ADDRESS):
        body += struct.pack("HH", 4 + len(packed), attribute) + packed
    flags = _REQUEST | _ACKNOWLEDGE
    if kind == _NEW_ADDRESS:
        flags |= _REPLACE | _CREATE
    head = struct.pack("IHHII", 16 + len(body), kind, flags, 1, 0)
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as link:
        link.settimeout(5.0)
        link.send(head + body)
        answer = link.recv(4096)
    (error,) = struct.unpack_from("i", answer, 16)
    if error:
        raise OSError(-error, f"address {address}: {os.strerror(-error)}")
