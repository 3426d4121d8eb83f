"""Delivers packets that waited at another node to the sockets that have come from there.

Called by architectd at the destination of a move. Without it a client's packets of the pause would be lost,
and come again only when its kernel's patience ends: after 200 ms, 600 ms, 1.4 s. They are put on the
namespace's lo, for the address that the connection had and still has there (:mod:`.home`).

Sources: RFC 791, RFC 8200, RFC 1071; raw(7) on IP_HDRINCL, ipv6(7).
"""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Collection, Iterator, Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Final, NamedTuple

from architect.adapters import netns
from architect.contract.errors import ArchitectError
from architect.contract.flows import Flow

_TCP, _UDP = socket.IPPROTO_TCP, socket.IPPROTO_UDP
_NAMES: Final = {_TCP: "tcp", _UDP: "udp"}
_CHECKSUM: Final = {_TCP: 16, _UDP: 6}
"""Where it is in the transport header."""
_FRAGMENT: Final = 0x3FFF
"""Of the IPv4 header's flags and offset: more fragments follow, or this is not the first."""
_HEADER6: Final = 40
_PORTS: Final = struct.Struct("!HH")


class NotResent(ArchitectError):
    """The packets could not be put into the namespace."""


class _Parts(NamedTuple):
    """Where things are in a packet."""

    protocol: int
    addresses: slice
    """Source and destination."""
    transport: int
    """Offset of the transport header."""


def resend(pid: int, packets: Collection[bytes], homes: Mapping[Flow, str]) -> int:
    """Delivers those of connections in ``homes`` in the network namespace of a process; blocking.

    ``packets`` begin with their network header and may lack a valid transport checksum. ``homes`` gives, for
    each connection as its pod had it, the address that it has now. Others are left out: a new connection's
    client asks again after a second, and finds the new pod. (Delivered here, its SYN would be answered by one
    that the node's conntrack takes for invalid, and kube-proxy drops.) Returns how many were delivered.

    Raises:
        NotResent: the process has ended, or the kernel refuses.
    """
    fitting = list(addressed(packets, homes))
    if not fitting:
        return 0
    try:
        space = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
        try:
            with netns.entered(space):
                _send(fitting)
        finally:
            os.close(space)
    except (netns.NetnsError, OSError) as error:
        raise NotResent(
            "packets that waited could not be delivered", str(error), "their senders repeat them"
        ) from error
    return len(fitting)


def addressed(packets: Collection[bytes], homes: Mapping[Flow, str]) -> Iterator[tuple[bytes, str]]:
    """The packets of these connections, as they are to be delivered, and to which address."""
    for packet in packets:
        parts = _parts(packet)
        if parts is None:
            continue
        both = packet[parts.addresses]
        half = len(both) // 2
        peer_port, port = _PORTS.unpack_from(packet, parts.transport)
        source, target = str(ip_address(both[:half])), str(ip_address(both[half:]))
        home = homes.get(Flow(_NAMES[parts.protocol], target, port, source, peer_port))
        if home is not None:
            yield _with_target(packet, parts, ip_address(home).packed), home


def _parts(packet: bytes) -> _Parts | None:
    """None for what no socket of a connection takes: fragments, other protocols, cut packets."""
    if len(packet) < 20:
        return None
    version = packet[0] >> 4
    if version == 4:
        protocol, start, addresses = packet[9], (packet[0] & 15) * 4, slice(12, 20)
        whole = not struct.unpack_from("!H", packet, 6)[0] & _FRAGMENT
        length = struct.unpack_from("!H", packet, 2)[0]
    else:
        protocol, start, addresses = packet[6], _HEADER6, slice(8, 40)
        whole = version == 6
        length = _HEADER6 + struct.unpack_from("!H", packet, 4)[0]
    if protocol not in _NAMES or not whole or length != len(packet):
        return None
    if start < addresses.stop or len(packet) < start + _CHECKSUM[protocol] + 2:
        return None
    return _Parts(protocol, addresses, start)


def _with_target(packet: bytes, parts: _Parts, target: bytes) -> bytes:
    """The packet for an address, with its checksums. IPv4's own is the kernel's work (raw(7))."""
    changed = bytearray(packet)
    changed[parts.addresses.stop - len(target) : parts.addresses.stop] = target
    place = parts.transport + _CHECKSUM[parts.protocol]
    changed[place : place + 2] = bytes(2)
    body = changed[parts.transport :]
    pseudo = changed[parts.addresses] + struct.pack("!II", len(body), parts.protocol)
    changed[place : place + 2] = struct.pack("!H", checksum(bytes(pseudo + body)) or 0xFFFF)
    return bytes(changed)


def checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071): the complement of the sum of 16-bit words, modulo 65535."""
    padded = data + bytes(len(data) % 2)
    rest = int.from_bytes(padded) % 0xFFFF
    # A sum of all zeros alone is 0; else it is 65535 where the remainder is 0.
    return 0xFFFF ^ (rest or (0xFFFF if any(padded) else 0))


def _send(packets: Collection[tuple[bytes, str]]) -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW) as v4,
        socket.socket(socket.AF_INET6, socket.SOCK_RAW, socket.IPPROTO_RAW) as v6,
    ):
        for packet, target in packets:
            if ":" in target:
                v6.sendto(packet, (target, 0))
            else:
                v4.sendto(packet, (target, 0))
