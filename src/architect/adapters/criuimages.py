"""TCP connections as CRIU's images have them, for those who speak for a program that is not there.

Called by the daemon's traffic after a dump (:mod:`architect.processes.architectd.traffic`), in a thread.
:mod:`.pagemap` and :mod:`.criuaddresses` take the format's own parts from here.

Why by hand: CRIU's Python package is not on the index, a protobuf runtime costs the daemon 8 MB, and a dozen
fields are needed (CRIU's images/fdinfo.proto, images/sk-inet.proto and images/tcp-stream.proto; protobuf's
encoding guide). What the numbers of a stream mean is drawn in CRIU's soccr/soccr.c, at `get_queue`.
"""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

HEADER: Final = 8
"""Bytes of two magic numbers at the beginning of an image."""
_COMMON_MAGIC: Final = 0x54564319
FILES_MAGIC: Final = 0x56303138
_STREAM_MAGIC: Final = 0x51465506
"""CRIU's criu/include/magic.h."""

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
_WIDTHS: Final = {_FIXED64: 8, _FIXED32: 4}
"""Wire types of protobuf, and the widths of two of them."""

INET_SOCKET: Final = 4
"""Field of file_entry: an inet_sk_entry."""
_INO, FAMILY, TYPE, PROTO, STATE = 2, 3, 4, 5, 6
SOURCE_PORT, DESTINATION_PORT, SOURCE, DESTINATION = 7, 8, 11, 12
"""Fields of inet_sk_entry; the ports in the host's order, the addresses as words of memory."""
_IN_SEQ, _OUT_LENGTH, _OUT_SEQ, _OPTIONS = 2, 3, 4, 5
_RECEIVE_SCALE, _TIMESTAMP, _RECEIVE_WINDOW, _RECEIVE_UPDATE = 8, 9, 16, 17
"""Fields of tcp_stream_entry."""
_TIMESTAMPS: Final = 1
_SCALED: Final = 4
"""Bits of `_OPTIONS` (TCPI_OPT_* of <linux/tcp.h>)."""
_SPEAKING: Final = (1, 5, 8)
"""States in which nothing is under way by itself: established, FIN_WAIT2, CLOSE_WAIT (<linux/tcp.h>)."""
_U32: Final = 0xFFFFFFFF
_LARGEST_WINDOW: Final = 0xFFFF

Field = int | bytes


class Part(NamedTuple):
    """A field of a message, and where it stands there, its key included."""

    number: int
    value: Field
    begin: int
    end: int


class Connection(NamedTuple):
    """A connection with nothing unsent and nothing unacknowledged, as its peer knows it."""

    local: bytes
    """Address, 16 bytes; an IPv4 address as IPv6 maps it (RFC 4291, section 2.5.5.2)."""
    peer: bytes
    local_port: int
    peer_port: int
    receive_next: int
    """Sequence number of the next byte that the peer sends."""
    send_next: int
    """And of the next that it is sent."""
    window: int
    """As it stands in a segment's header, so scaled down; not 0."""
    timestamp: int | None
    """Of RFC 7323, at the time of the dump; None if the peers use none."""


def entries(image: bytes) -> Iterator[bytes]:
    """Yield the messages of an image, undecoded. Raises ValueError if it is cut short."""
    place = HEADER
    while place < len(image):
        size = int.from_bytes(image[place : place + 4], "little")
        place += 4
        if place + size > len(image):
            raise ValueError("an image is cut short")
        yield image[place : place + size]
        place += size


def fields(message: bytes) -> Iterator[tuple[int, Field]]:
    """Yield number and value of each field. Raises ValueError if the message is none."""
    for part in parts(message):
        yield part.number, part.value


def parts(message: bytes) -> Iterator[Part]:
    """Yield each field with the bytes that it is made of, in order. Raises ValueError as above."""
    place = 0
    while place < len(message):
        begin = place
        key, place = varint(message, place)
        kind, inside = key & 7, place
        value: Field
        if kind == _VARINT:
            value, place = varint(message, place)
        else:
            if kind == _BYTES:
                size, inside = varint(message, place)
            elif kind in _WIDTHS:
                size = _WIDTHS[kind]
            else:
                raise ValueError(f"a message has a field of the unknown kind {kind}")
            if inside + size > len(message):
                raise ValueError("a message ends within a field")
            value, place = message[inside : inside + size], inside + size
        yield Part(key >> 3, value, begin, place)


def varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number that begins at a place, and where it ends. Raises ValueError."""
    value = shift = 0
    while place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("a message ends within a number")


def connections(images: Path) -> list[Connection]:
    """Return the TCP connections of a checkpoint for which somebody else could speak.

    Left out are those with bytes in their send queue, which only their own socket can repeat, and
    those with a closed window, whose peer does not probe whether they live but whether they read.
    Raises OSError, and ValueError for an image that is none.
    """
    found = []
    files = images / "files.img"
    image = files.read_bytes()
    check(files, image, FILES_MAGIC)
    for message in entries(image):
        for number, value in fields(message):
            if number == INET_SOCKET and isinstance(value, bytes):
                one = _connection(images, Message(value))
                if one is not None:
                    found.append(one)
    return found


class Message:
    """A message's fields by number. Raises ValueError for one that is of another kind than wanted."""

    def __init__(self, message: bytes) -> None:
        self._fields: dict[int, list[Field]] = {}
        for number, value in fields(message):
            self._fields.setdefault(number, []).append(value)

    def __contains__(self, number: int) -> bool:
        return number in self._fields

    def __getitem__(self, number: int) -> int:
        """Return an integer, 0 if it is not there; the last one counts, says the encoding guide."""
        value = self._fields.get(number, [0])[-1]
        if isinstance(value, bytes):
            raise ValueError(f"field {number} is no integer")  # noqa: TRY004 (of the image, not of a caller)
        return value & _U32

    def integers(self, number: int) -> list[int]:
        """Return a repeated integer, packed or not."""
        found: list[int] = []
        for value in self._fields.get(number, ()):
            if not isinstance(value, bytes):
                found.append(value & _U32)
                continue
            place = 0
            while place < len(value):
                one, place = varint(value, place)
                found.append(one & _U32)
        return found


def _connection(images: Path, inet: Message) -> Connection | None:
    if (inet[TYPE], inet[PROTO]) != (socket.SOCK_STREAM, socket.IPPROTO_TCP):
        return None
    if inet[STATE] not in _SPEAKING:
        return None
    stream = Message(_stream(images / f"tcp-stream-{inet[_INO]:x}.img"))
    if stream[_OUT_LENGTH] or _RECEIVE_WINDOW not in stream:
        return None
    options = stream[_OPTIONS]
    # What of the window the peer has used since it was last told (tcp_receive_window of the kernel).
    used = (stream[_IN_SEQ] - stream[_RECEIVE_UPDATE]) & _U32
    window = max(stream[_RECEIVE_WINDOW] - used, 0)
    window >>= stream[_RECEIVE_SCALE] if options & _SCALED else 0
    if not window:
        return None
    return Connection(
        local=address(inet[FAMILY], inet.integers(SOURCE)),
        peer=address(inet[FAMILY], inet.integers(DESTINATION)),
        local_port=inet[SOURCE_PORT],
        peer_port=inet[DESTINATION_PORT],
        receive_next=stream[_IN_SEQ],
        send_next=stream[_OUT_SEQ],
        window=min(window, _LARGEST_WINDOW),
        timestamp=stream[_TIMESTAMP] if options & _TIMESTAMPS else None,
    )


def _stream(path: Path) -> bytes:
    """Read the one message of a stream's image; the bytes of its queues follow it."""
    with path.open("rb") as image:
        head = image.read(HEADER + 4)
        check(path, head, _STREAM_MAGIC)
        size = int.from_bytes(head[HEADER:], "little")
        return next(entries(head + image.read(size)), b"")


def check(path: Path, image: bytes, magic: int) -> None:
    """Raise ValueError unless the image begins as one of its kind does."""
    if image[:HEADER] != struct.pack("<II", _COMMON_MAGIC, magic):
        raise ValueError(f"{path.name} is no such image")


def address(family: int, words: list[int]) -> bytes:
    """Return an address of an inet_sk_entry as :class:`Connection` has it. Raises ValueError."""
    packed = b"".join(word.to_bytes(4, "little") for word in words)
    if family == socket.AF_INET and len(packed) == 4:
        return bytes(10) + b"\xff\xff" + packed
    if family == socket.AF_INET6 and len(packed) == 16:
        return packed
    raise ValueError(f"a socket of family {family} has an address of {len(packed)} bytes")
