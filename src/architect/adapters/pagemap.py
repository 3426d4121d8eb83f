"""Which parts of a checkpoint's page data CRIU reads by itself, and which the pager brings in later.

Why: a hibernated container should leave nothing in memory, but what CRIU reads before the program runs
(pages of private file mappings, which userfaultfd does not serve) is on the way of each wake, and a cold
disk with a generous read-ahead takes 15 ms for a few hundred kilobytes. So these stay in the page cache.
Called by :mod:`.store`.

The format is read by hand (why: :mod:`.criuimages`); four integer fields of one message are needed
(images/pagemap.proto of CRIU). native/keeper/pagemap.c reads the same for the pager.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from architect.adapters import criuimages

_PAGE: Final = 4096
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
    for message in criuimages.entries(image):
        yield dict(_fields(message))


def _fields(message: bytes) -> Iterator[tuple[int, int]]:
    # Not those of criuimages: a large program's pagemaps have tens of thousands, all of one kind.
    place = 0
    while place < len(message):
        key, place = criuimages.varint(message, place)
        if key & 7:
            raise ValueError("a pagemap has a field that is no integer")
        value, place = criuimages.varint(message, place)
        yield key >> 3, value
