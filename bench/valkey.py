"""A client of valkey that keeps one connection, as small as it can be (RESP2).

Used by the demo, the benchmarks and the tests: what is measured is the server's wake, so the client must
add next to nothing, and it must never connect again by itself.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

Reply = bytes | int | None | list["Reply"]


class Valkey:
    """One connection. Raises ConnectionError when the server closes it, TimeoutError when it is silent."""

    def __init__(self, host: str, port: int, timeout_s: float = 30.0) -> None:
        self.socket = socket.create_connection((host, port), timeout_s)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._buffer = b""

    def __call__(self, *words: str | bytes | int) -> Reply:
        """One command, one reply."""
        self.socket.sendall(encode(words))
        return self._read()

    def pipeline(self, commands: Sequence[Sequence[str | bytes | int]]) -> list[Reply]:
        """Many commands in one write, their replies in order."""
        self.socket.sendall(b"".join(encode(words) for words in commands))
        return [self._read() for _ in commands]

    def close(self) -> None:
        """Ends the connection."""
        self.socket.close()

    def _line(self) -> bytes:
        while (end := self._buffer.find(b"\r\n")) < 0:
            self._more()
        line, self._buffer = self._buffer[:end], self._buffer[end + 2 :]
        return line

    def _more(self) -> None:
        chunk = self.socket.recv(1 << 18)
        if not chunk:
            raise ConnectionError("valkey closed the connection")
        self._buffer += chunk

    def _read(self) -> Reply:
        line = self._line()
        kind, rest = line[:1], line[1:]
        if kind == b"+":
            return rest
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return self._bulk(int(rest))
        if kind == b"*":
            return [self._read() for _ in range(int(rest))]
        raise ValueError(rest.decode(errors="replace"))

    def _bulk(self, length: int) -> bytes | None:
        if length < 0:
            return None
        while len(self._buffer) < length + 2:
            self._more()
        value, self._buffer = self._buffer[:length], self._buffer[length + 2 :]
        return value


def encode(words: Sequence[str | bytes | int]) -> bytes:
    """A command as RESP wants it."""
    parts = [word if isinstance(word, bytes) else str(word).encode() for word in words]
    body = b"".join(b"$%d\r\n%s\r\n" % (len(part), part) for part in parts)
    return b"*%d\r\n%s" % (len(parts), body)


def value(key: int, size: int = 1000) -> bytes:
    """The value that belongs to a key: different for each, and no two pages alike."""
    word = b"%016x" % (key * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    return (word * (size // len(word) + 1))[:size]


def fill(client: Valkey, megabytes: int) -> int:
    """Writes about that many megabytes; returns how many keys."""
    keys = megabytes * 1000
    for start in range(0, keys, 500):
        batch = range(start, min(start + 500, keys))
        client.pipeline([("SET", f"key:{key}", value(key)) for key in batch])
    return keys


def wrong(client: Valkey, keys: int) -> int:
    """Reads everything back; how many values are not what was written."""
    bad = 0
    for start in range(0, keys, 500):
        batch = range(start, min(start + 500, keys))
        replies = client.pipeline([("GET", f"key:{key}") for key in batch])
        bad += sum(reply != value(key) for key, reply in zip(batch, replies, strict=True))
    return bad
