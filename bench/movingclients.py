"""The clients of the benchmark of moves: runs as it is, on the host and in a pod; started by bench/moving.py.

`python movingclients.py MODE KEY SECONDS PAUSE_MS ADDRESS PORT` talks to a valkey until a line (or the end)
comes on its standard input, at most for SECONDS. The modes:

- count: increments KEY over one connection, one request every PAUSE_MS;
- stream: has large values sent back over one connection, several under way at any time;
- connect: makes a new connection every PAUSE_MS, whatever became of those before;
- again: asks over one connection, and makes another at once when that is lost.

Every reply is checked. It prints "connected" after its first reply; its last line is JSON: how many were
answered, what went wrong, and when the longest request of each tenth of a second began and ended
(CLOCK_MONOTONIC, which all containers of a machine share). Standard library only: pods have nothing else.
"""

import asyncio
import collections
import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any, BinaryIO, Final

BUCKET_S: Final = 0.1
VALUE: Final = 64 * 1024
DEPTH: Final = 8
"""Values under way at any time, if the server lets them."""
SILENCE_S: Final = 60.0
"""An open connection on which nothing comes for so long is lost."""
CONNECT_S: Final = 5.0
"""So long a new connection may take, with its one reply."""
MOST_OPEN: Final = 700
"""New connections at a time: there is room for no more than 1024 files in many places."""
RETRY_S: Final = 0.005
RETRY_TIMEOUT_S: Final = 1.0
_MOST_TROUBLES: Final = 50


class Spans:
    """The longest span of each bucket of time: enough to find the longest of any window later."""

    def __init__(self) -> None:
        self.count = 0
        self._longest: dict[int, tuple[float, float]] = {}

    def add(self, start: float, end: float) -> None:
        """One more request, from its first byte to its reply."""
        self.count += 1
        bucket = int(end / BUCKET_S)
        known = self._longest.get(bucket)
        if known is None or end - start > known[1] - known[0]:
            self._longest[bucket] = (start, end)

    def listed(self) -> list[list[float]]:
        """All of them, in order."""
        return [[round(one, 5) for one in span] for _, span in sorted(self._longest.items())]


def longest(spans: Sequence[Sequence[float]], window: tuple[float, float]) -> float | None:
    """Milliseconds of the longest span (of a report) that overlaps a window.

    None if the client was not there for all of it: one that has failed waits for nothing any more.
    """
    begin, end = window
    if not spans or spans[0][0] > begin or spans[-1][1] < end:
        return None
    found = [last - first for first, last in spans if last >= begin and first <= end]
    return max(found) * 1000 if found else None


def last_report(output: str) -> dict[str, Any]:
    """What a client says at its end, whatever kubectl has said around it."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            with contextlib.suppress(ValueError):
                found: dict[str, Any] = json.loads(line)
                return found
    raise ValueError(f"a client has not reported: {output[-500:]!r}")


def kind_of(error: BaseException) -> str:
    """What went wrong, in a word."""
    if isinstance(error, ConnectionRefusedError):
        return "refused"
    if isinstance(error, TimeoutError):
        return "timed out"
    if isinstance(error, (ConnectionError, EOFError, asyncio.IncompleteReadError)):
        return "reset"
    if isinstance(error, OSError):
        return "unreachable"
    return "wrong reply"


def payload(number: int) -> bytes:
    """The value of a number: different for each."""
    word = b"%016x" % (number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF)
    return word * (VALUE // len(word))


class Work:
    """What all modes share: where to, for how long, and what came of it."""

    def __init__(self, key: str, seconds: float, pause_s: float, peer: tuple[str, int]) -> None:
        self.key = key
        self.pause_s = pause_s
        self.peer = peer
        self.spans = Spans()
        self.connects = Spans()
        self.kinds: collections.Counter[str] = collections.Counter()
        self.troubles: list[list[Any]] = []
        self.ended = threading.Event()
        self._end = time.monotonic() + seconds
        self._told = False

    def going(self) -> bool:
        """Whether to go on."""
        return not self.ended.is_set() and time.monotonic() < self._end

    def connected(self) -> None:
        """Says so, once."""
        if not self._told:
            self._told = True
            print("connected", flush=True)

    def trouble(self, error: BaseException) -> None:
        """Notes what went wrong, and when."""
        self.kinds[kind_of(error)] += 1
        if len(self.troubles) < _MOST_TROUBLES:
            self.troubles.append([round(time.monotonic(), 5), repr(error)])

    def pace(self, due: float) -> float:
        """Waits for the moment of a request; returns that of the next: what is late is not made up for."""
        now = time.monotonic()
        if due > now:
            self.ended.wait(due - now)
        return max(due, now) + self.pause_s

    def report(self) -> dict[str, Any]:
        """The last line."""
        return {
            "key": self.key,
            "count": self.spans.count,
            "kinds": dict(self.kinds),
            "troubles": self.troubles,
            "spans": self.spans.listed(),
            "connects": self.connects.listed(),
        }


def _line(replies: BinaryIO) -> bytes:
    line = replies.readline()
    if not line.endswith(b"\n"):
        raise EOFError("the connection was closed")
    return line


def count(work: Work) -> None:
    """See the module. Ends with the first thing that goes wrong."""
    with socket.create_connection(work.peer, SILENCE_S) as link, link.makefile("rb") as replies:
        link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        request = f"INCR {work.key}\r\n".encode()
        due = time.monotonic()
        while work.going():
            due = work.pace(due)
            began = time.monotonic()
            link.sendall(request)
            reply = _line(replies)
            work.spans.add(began, time.monotonic())
            if reply != b":%d\r\n" % work.spans.count:
                raise ValueError(f"reply {work.spans.count} is {reply!r}")
            work.connected()


def stream(work: Work) -> None:
    """See the module. Ends with the first thing that goes wrong."""
    room = threading.Semaphore(DEPTH)
    sent: collections.deque[float] = collections.deque()
    failed: list[BaseException] = []
    done = threading.Event()
    with socket.create_connection(work.peer, SILENCE_S) as link, link.makefile("rb") as replies:

        def send() -> None:
            due, number = time.monotonic(), 0
            try:
                while work.going():
                    due = work.pace(due)
                    if not room.acquire(timeout=SILENCE_S):
                        raise TimeoutError("no reply")
                    body = payload(number)
                    sent.append(time.monotonic())
                    link.sendall(b"*2\r\n$4\r\nECHO\r\n$%d\r\n%s\r\n" % (len(body), body))
                    number += 1
                # Of this one the reply is the last that is read.
                sent.append(time.monotonic())
                link.sendall(b"PING\r\n")
            except (OSError, ValueError) as error:
                failed.append(error)
                with contextlib.suppress(OSError):
                    link.shutdown(socket.SHUT_RDWR)
            finally:
                done.set()

        sender = threading.Thread(target=send, daemon=True)
        sender.start()
        try:
            while (head := _line(replies)) != b"+PONG\r\n":
                body = replies.read(VALUE + 2)
                began = sent.popleft()
                wanted = payload(work.spans.count)
                work.spans.add(began, time.monotonic())
                if head != b"$%d\r\n" % VALUE or body != wanted + b"\r\n":
                    raise ValueError(f"value {work.spans.count - 1} is another: {head!r}")
                room.release()
                work.connected()
        except (OSError, EOFError) as error:
            work.ended.set()
            raise (failed[0] if failed else error) from error
        finally:
            work.ended.set()
            done.wait(1)


async def _one(work: Work) -> None:
    began = time.monotonic()
    writer = None
    try:
        async with asyncio.timeout(CONNECT_S):
            reader, writer = await asyncio.open_connection(*work.peer)
            work.connects.add(began, time.monotonic())
            writer.write(b"PING\r\n")
            reply = await reader.readline()
            if not reply.endswith(b"\n"):
                raise EOFError("the connection was closed")
            if reply != b"+PONG\r\n":
                raise ValueError(f"the reply is {reply!r}")
        work.spans.add(began, time.monotonic())
        work.connected()
    except (OSError, EOFError, ValueError) as error:
        work.trouble(error)
    finally:
        if writer is not None:
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()


async def _connect(work: Work) -> None:
    under_way: set[asyncio.Task[None]] = set()
    due = time.monotonic()
    while work.going():
        if len(under_way) < MOST_OPEN:
            task = asyncio.create_task(_one(work))
            under_way.add(task)
            task.add_done_callback(under_way.discard)
        else:
            work.trouble(TimeoutError("too many connections wait"))
        due = max(due + work.pause_s, time.monotonic())
        await asyncio.sleep(due - time.monotonic())
    while under_way:
        await asyncio.wait(under_way)


def connect(work: Work) -> None:
    """See the module. Goes on whatever goes wrong."""
    asyncio.run(_connect(work))


def again(work: Work) -> None:
    """See the module. A span is from the last good reply before a loss to the first after it."""
    link: socket.socket | None = None
    last = due = time.monotonic()
    with contextlib.ExitStack() as stack:
        while work.going():
            due = work.pace(due)
            try:
                if link is None:
                    link = stack.enter_context(socket.create_connection(work.peer, RETRY_TIMEOUT_S))
                link.sendall(b"PING\r\n")
                reply = link.recv(100)
                if not reply:
                    raise EOFError("the connection was closed")
                if reply != b"+PONG\r\n":
                    raise ValueError(f"the reply is {reply!r}")
            except (OSError, EOFError) as error:
                work.trouble(error)
                if link is not None:
                    link.close()
                    link = None
                work.ended.wait(RETRY_S)
                continue
            now = time.monotonic()
            work.spans.add(last, now)
            last = now
            work.connected()


MODES: Final = {"count": count, "stream": stream, "connect": connect, "again": again}


def main() -> None:
    """Program."""
    mode, key, seconds, pause_ms, address, port = sys.argv[1:7]
    work = Work(key, float(seconds), float(pause_ms) / 1000, (address, int(port)))

    def listen() -> None:
        # Not by sys.stdin, whose lock a thread that waits would keep beyond the end of the program.
        os.read(0, 1)
        work.ended.set()

    threading.Thread(target=listen, daemon=True).start()
    try:
        MODES[mode](work)
    except (OSError, EOFError, ValueError) as error:
        work.trouble(error)
    print(json.dumps(work.report()), flush=True)


if __name__ == "__main__":
    main()
