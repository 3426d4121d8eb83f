"""Ranges of files: read without their zeros, and put back with holes where those were. Used by both sides."""

from __future__ import annotations

import errno
import os
import stat
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from blake3 import blake3

from architect.adapters.transfer.wire import Item, TransferError
from architect.contract.errors import quoted

PAGE: Final = 4096
_BLOCK: Final = 64 << 10
# A bytearray compares itself with any buffer by memcmp; a memoryview would go byte by byte.
_ZEROS: Final = bytearray(_BLOCK)
_ZERO_PAGE: Final = bytearray(PAGE)
_SAMPLE: Final = 64 << 10
_WORTH: Final = 0.8
"""Share of the bytes that may be left for compression to be worth it."""

Extent = tuple[int, int, int]
"""Index of the item, offset in its file, length."""


def digest(data: memoryview) -> str:
    """BLAKE3, hexadecimal."""
    return blake3(data).hexdigest()


def opened(path: Path, name: str) -> int:
    """A descriptor of a regular file. Raises TransferError."""
    try:
        # Without O_NONBLOCK a named pipe would have us wait.
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        why = "it is a symbolic link" if error.errno == errno.ELOOP else str(error.strerror)
        raise TransferError(f"file {quoted(name)}", why) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise TransferError(f"file {quoted(name)}", "it is no regular file")
    return descriptor


def read_whole(descriptor: int, item: Item, into: memoryview) -> None:
    """The range as it is, zeros too."""
    done = 0
    while done < item.length:
        count = os.preadv(descriptor, [into[done : item.length]], item.offset + done)
        if not count:
            raise changed(item.name)
        done += count


def changed(name: str) -> TransferError:
    """A file that is not any more what it was."""
    return TransferError(
        f"file {quoted(name)}", "it changed while it was sent", "take a new checkpoint"
    )


def read_packed(descriptor: int, index: int, item: Item, into: memoryview) -> list[Extent]:
    """What of the range is not zeros, one piece behind the other at the start of ``into``."""
    extents: list[Extent] = []
    used = 0
    end = item.offset + item.length
    position = item.offset
    while position < end:
        try:
            start = os.lseek(descriptor, position, os.SEEK_DATA)
        except OSError as error:
            if error.errno == errno.ENXIO:
                break
            start = position
        if start >= end:
            break
        position = max(start, position)
        stop = min(os.lseek(descriptor, position, os.SEEK_HOLE), end)
        if stop <= position:
            raise changed(item.name)
        piece = Item(item.name, item.size, position, stop - position)
        read_whole(descriptor, piece, into[used:])
        used = _pack(into, used, index, piece, extents)
        position = stop
    return extents


def _pack(into: memoryview, used: int, index: int, piece: Item, extents: list[Extent]) -> int:
    """Takes zero pages out of what was read to ``into[used:]``; gives where the rest ends."""
    begin = used
    for offset, length in _data(into[begin : begin + piece.length]):
        if begin + offset != used:
            into[used : used + length] = into[begin + offset : begin + offset + length]
        extents.append((index, piece.offset + offset, length))
        used += length
    return used


def _data(view: memoryview) -> list[tuple[int, int]]:
    """Where ``view`` is not zeros: offset and length of each run of pages."""
    found: list[tuple[int, int]] = []
    start = -1
    end = len(view)
    for block in range(0, end, _BLOCK):
        part = view[block : block + _BLOCK]
        if len(part) == _BLOCK and part[0] == 0 and part == _ZEROS:
            pages: Sequence[int] = ()
            if start >= 0:
                found.append((start, block - start))
                start = -1
        else:
            pages = range(block, min(block + _BLOCK, end), PAGE)
        for page in pages:
            # One look at a byte spares most pages the comparison.
            if view[page] or _ZERO_PAGE[: min(PAGE, end - page)] != view[page : page + PAGE]:
                if start < 0:
                    start = page
            elif start >= 0:
                found.append((start, page - start))
                start = -1
    if start >= 0:
        found.append((start, end - start))
    return found


def deflated(data: memoryview) -> bytes | None:
    """``data`` compressed; None if that is not worth it, by a sample of it."""
    sample = data[:_SAMPLE]
    if len(zlib.compress(sample, 1)) > len(sample) * _WORTH:
        return None
    packed = zlib.compress(data, 1)
    return packed if len(packed) <= len(data) * _WORTH else None


def inflate(packed: memoryview, into: memoryview) -> bool:
    """Fills ``into``; whether ``packed`` was just that much."""
    decompressor = zlib.decompressobj()
    try:
        raw = decompressor.decompress(packed, len(into) + 1)
    except zlib.error:
        return False
    if len(raw) != len(into):
        return False
    into[:] = raw
    return True


def are_within(extents: Sequence[Extent], items: Sequence[Item], raw: int) -> bool:
    """Whether the pieces lie in what was asked for, in order, and make up ``raw`` bytes."""
    last, position = 0, 0
    for index, offset, length in extents:
        if not last <= index < len(items) or length <= 0:
            return False
        item = items[index]
        floor = position if index == last else 0
        if offset < max(floor, item.offset) or offset + length > item.offset + item.length:
            return False
        last, position = index, offset + length
    return sum(length for _, _, length in extents) == raw


def write(descriptor: int, data: memoryview, offset: int) -> None:
    """All of ``data`` to its place."""
    while data:
        count = os.pwrite(descriptor, data, offset)
        data, offset = data[count:], offset + count
