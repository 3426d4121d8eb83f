"""The addresses of a program's sockets, read from CRIU's images and changed in them.

A pod that moves gets another address. Its source says by this which connections must follow it
(:func:`flows`) and where it takes new ones (:func:`listeners`); its destination changes the addresses in the
images for those who have asked for that by annotation (:func:`rewrite`). Called by the daemon, in a thread.

Of files.img only the messages are written anew that change; what is not known here stays as it is, byte for
byte (the format: :mod:`.criuimages`).
"""

from __future__ import annotations

import socket
from collections.abc import Collection, Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, NamedTuple

from architect.adapters import criuimages
from architect.adapters.criuimages import (
    DESTINATION,
    DESTINATION_PORT,
    FAMILY,
    INET_SOCKET,
    PROTO,
    SOURCE,
    SOURCE_PORT,
    STATE,
    TYPE,
    Message,
)

CLOSE: Final = 7
LISTEN: Final = 10
"""TCP's states (<linux/tcp.h>) without a connection."""

_PROTOCOLS: Final[dict[tuple[int, int], str]] = {
    (socket.SOCK_STREAM, socket.IPPROTO_TCP): "tcp",
    (socket.SOCK_DGRAM, socket.IPPROTO_UDP): "udp",
}
_LENGTH: Final = 2
"""Wire type of protobuf: a length, then so many bytes."""

_Address = IPv4Address | IPv6Address
_Mapping = Mapping[_Address, _Address]


class Socket(NamedTuple):
    """A TCP or UDP socket. An IPv4 address in an IPv6 socket is given as an IPv4 address."""

    protocol: str
    """``tcp`` or ``udp``."""
    state: int
    """<linux/tcp.h>; a UDP socket is 1 (established) when connected, else :data:`CLOSE`."""
    family: int
    """The socket's own: AF_INET6 also for one that speaks IPv4."""
    local: str
    local_port: int
    """0 for a socket that is bound to nothing."""
    peer: str
    peer_port: int
    """0 for a socket without a peer."""


class Flow(NamedTuple):
    """A connection as the program that has it sees it."""

    protocol: str
    local: str
    local_port: int
    peer: str
    peer_port: int


class Listener(NamedTuple):
    """Where a program takes what nobody has connected yet: TCP connections, UDP datagrams."""

    protocol: str
    address: str
    port: int


def sockets(images: Path) -> list[Socket]:
    """Return the TCP and UDP sockets of a checkpoint.

    Raises OSError, and ValueError for an image that is none.
    """
    return [
        found
        for message in criuimages.entries(_read(images / "files.img"))
        for number, value in criuimages.fields(message)
        if number == INET_SOCKET
        and isinstance(value, bytes)
        and (found := _socket(Message(value))) is not None
    ]


def flows(images: Path, addresses: Collection[str]) -> list[Flow]:
    """Return the connections that reach the pod from outside at one of its ``addresses``, each once.

    A connection of the pod with itself is none: both its ends move. Raises as :func:`sockets`.
    """
    own = {_plain(ip_address(one)) for one in addresses}
    found = (
        Flow(one.protocol, one.local, one.local_port, one.peer, one.peer_port)
        for one in sockets(images)
        if one.peer_port
        # A closed TCP socket still names the peer that it had.
        and not (one.protocol == "tcp" and one.state in (LISTEN, CLOSE))
        and ip_address(one.local) in own
        and (peer := ip_address(one.peer)) not in own
        and not peer.is_loopback
    )
    return list(dict.fromkeys(found))


def listeners(images: Path, addresses: Collection[str]) -> list[Listener]:
    """Return where the pod can be reached at one of its ``addresses``, each once.

    These are listening TCP sockets, and UDP sockets without a peer, bound to one of the addresses or to all.
    Raises as :func:`sockets`.
    """
    own = {_plain(ip_address(one)) for one in addresses}
    found = (
        Listener(one.protocol, one.local, one.local_port)
        for one in sockets(images)
        if one.local_port
        and (one.state == LISTEN if one.protocol == "tcp" else not one.peer_port)
        and ((local := ip_address(one.local)) in own or local.is_unspecified)
    )
    return list(dict.fromkeys(found))


def rewrite(
    images: Path,
    *,
    listeners: Mapping[str, str] | None = None,
    established: Mapping[str, str] | None = None,
) -> int:
    """Change the addresses of sockets in files.img, old to new, and return how many sockets have changed.

    Args:
        images: the checkpoint.
        listeners: for sockets without a peer: listening ones, UDP, and those that are only bound.
        established: for sockets with a peer. The peer's address is changed too where it is one of the old
            ones: both ends of a pod's connection with itself move.

    The file is replaced at once or not at all. Raises OSError, and ValueError for an image that is none, or
    where an old address and its new one are of different families.
    """
    bound, connected = _mapping(listeners or {}), _mapping(established or {})
    file = images / "files.img"
    image = _read(file)
    count = 0
    written = [image[: criuimages.HEADER]]
    for message in criuimages.entries(image):
        fresh = bytearray()
        for part in criuimages.parts(message):
            if part.number == INET_SOCKET and isinstance(part.value, bytes):
                inet = _moved(part.value, bound, connected)
                if inet is not None:
                    fresh += _prefixed(INET_SOCKET, inet)
                    count += 1
                    continue
            fresh += message[part.begin : part.end]
        written += [len(fresh).to_bytes(4, "little"), bytes(fresh)]
    if count:
        _replace(file, b"".join(written))
    return count


def _read(file: Path) -> bytes:
    image = file.read_bytes()
    criuimages.check(file, image, criuimages.FILES_MAGIC)
    return image


def _replace(file: Path, image: bytes) -> None:
    fresh = file.with_name(f".{file.name}.new")
    fresh.unlink(missing_ok=True)
    # Nobody else may read it at any time: what CRIU writes is for root alone.
    fresh.touch(mode=0o600)
    fresh.chmod(file.stat().st_mode & 0o7777)
    fresh.write_bytes(image)
    fresh.replace(file)


def _socket(inet: Message) -> Socket | None:
    protocol = _PROTOCOLS.get((inet[TYPE], inet[PROTO]))
    if protocol is None:
        return None
    return Socket(
        protocol=protocol,
        state=inet[STATE],
        family=inet[FAMILY],
        local=str(_address(inet, SOURCE)),
        local_port=inet[SOURCE_PORT],
        peer=str(_address(inet, DESTINATION)),
        peer_port=inet[DESTINATION_PORT],
    )


def _address(inet: Message, number: int) -> _Address:
    # Also an IPv4 socket's address comes mapped from there.
    return _plain(IPv6Address(criuimages.address(inet[FAMILY], inet.integers(number))))


def _plain(address: _Address) -> _Address:
    if isinstance(address, IPv6Address) and address.ipv4_mapped is not None:
        return address.ipv4_mapped
    return address


def _mapping(addresses: Mapping[str, str]) -> _Mapping:
    found = {_plain(ip_address(old)): _plain(ip_address(new)) for old, new in addresses.items()}
    for old, new in found.items():
        if old.version != new.version:
            raise ValueError(f"{old} and {new} are addresses of different families")
    return found


def _moved(entry: bytes, bound: _Mapping, connected: _Mapping) -> bytes | None:
    """An inet_sk_entry with other addresses, or None if it keeps its own."""
    inet = Message(entry)
    if _socket(inet) is None:
        return None
    with_peer = bool(inet[DESTINATION_PORT])
    change: dict[int, _Address] = {}
    for number in (SOURCE, DESTINATION) if with_peer else (SOURCE,):
        old = _address(inet, number)
        new = (connected if with_peer else bound).get(old, old)
        if new != old:
            change[number] = new
    return _changed(entry, inet[FAMILY], change) if change else None


def _changed(entry: bytes, family: int, change: Mapping[int, _Address]) -> bytes:
    left = {number: _words(family, address) for number, address in change.items()}
    fresh = bytearray()
    for part in criuimages.parts(entry):
        words = left.get(part.number)
        if words is None:
            fresh += entry[part.begin : part.end]
        elif isinstance(part.value, bytes):  # packed: as many words as there were
            packed = b"".join(_varint(next(words)) for _ in _packed(part.value))
            fresh += _prefixed(part.number, packed)
        else:
            fresh += _varint(part.number << 3) + _varint(next(words))
    return bytes(fresh)


def _words(family: int, address: _Address) -> Iterator[int]:
    packed = address.packed
    if family == socket.AF_INET6 and len(packed) == 4:
        packed = bytes(10) + b"\xff\xff" + packed
    return (
        int.from_bytes(packed[place : place + 4], "little") for place in range(0, len(packed), 4)
    )


def _packed(value: bytes) -> Iterator[int]:
    place = 0
    while place < len(value):
        one, place = criuimages.varint(value, place)
        yield one


def _prefixed(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | _LENGTH) + _varint(len(value)) + value


def _varint(value: int) -> bytes:
    found = bytearray()
    while value > 0x7F:
        found.append(value & 0x7F | 0x80)
        value >>= 7
    found.append(value)
    return bytes(found)
