"""Which parts of a checkpoint's page data CRIU reads by itself, and which the pager brings in later.

Why: a hibernated container should leave nothing in memory, but what CRIU reads before the program runs
(pages of private file mappings, which userfaultfd does not serve) is on the way of each wake, and a cold
disk with a generous read-ahead takes 15 ms for a few hundred kilobytes. So these stay in the page cache.
Called by :mod:`.store`.

Why by hand: CRIU's Python package is not on the index, a protobuf runtime costs the daemon 8 MB, and four
integer fields of one message are needed (images/pagemap.proto of CRIU; protobuf's encoding guide).
native/keeper/pagemap.c reads the same for the pager.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

_PAGE: Final = 4096
_HEADER: Final = 8
"""Two magic numbers."""
_PAGES, _FLAGS, _PAGES_LONG = 2, 4, 5
"""Fields of PagemapEntry."""
_PAGES_ID: Final = 1
"""Field of PagemapHead: the number N of pages-N.img."""
_LAZY: Final = 2
_PRESENT: Final = 4


def lazy_extents(images: Path) -> dict[str, list[tuple[int, int]]]:
    """Extents (offset, length in bytes) of page data that the pager serves, by the file's name.

    Raises:
        ValueError: a pagemap is not one.
    """
    extents: dict[str, list[tuple[int, int]]] = {}
    for file in sorted(images.glob("pagemap-*.img")):
        messages = _messages(file.read_bytes())
        name = f"pages-{next(messages).get(_PAGES_ID, 0)}.img"
        found = extents.setdefault(name, [])
        offset = 0
        for entry in messages:
            flags = entry.get(_FLAGS, 0)
            if not flags & _PRESENT:
                continue
            length = (entry.get(_PAGES_LONG) or entry.get(_PAGES, 0)) * _PAGE
            if flags & _LAZY:
                found.append((offset, length))
            offset += length
    return extents


def _messages(image: bytes) -> Iterator[dict[int, int]]:
    """The integer fields of each message of an image."""
    place = _HEADER
    while place < len(image):
        size = int.from_bytes(image[place : place + 4], "little")
        place += 4
        if place + size > len(image):
            raise ValueError("a pagemap is cut short")
        yield dict(_fields(image[place : place + size]))
        place += size


def _fields(message: bytes) -> Iterator[tuple[int, int]]:
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        if key & 7:
            raise ValueError("a pagemap has a field that is no integer")
        value, place = _varint(message, place)
        yield key >> 3, value


def _varint(message: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while place < len(message):
        byte = message[place]
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, place
        shift += 7
    raise ValueError("a pagemap ends within a number")
