"""What may go wrong while files move: strangers, broken connections, damaged bytes, full disks, tricks."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import threading
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from architect.adapters.transfer import fetching, ranges, serving, wire
from architect.adapters.transfer.fetching import FileWish
from architect.adapters.transfer.limits import RateLimit
from architect.adapters.transfer.wire import Hello, Item, Request, TransferError
from architect.contract.errors import ArchitectError
from tests.unit.test_transfer import HELLO, MB, Authority, Bed, in_bed


class Proxy:
    """Between the two; closes the first ``cuts`` connections after ``after`` bytes from the source."""

    def __init__(self, port: int, *, after: int, cuts: int, rate: int = 0) -> None:
        self._target, self._after, self._cuts, self._rate = port, after, cuts, rate
        self.connections = 0
        self._running: set[asyncio.Task[Any]] = set()

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[int]:
        """Gives its port."""
        server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        try:
            yield server.sockets[0].getsockname()[1]
        finally:
            server.close()
            for each in self._running:
                each.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._running.add(task)
        self.connections += 1
        left = self._after if 1 < self.connections <= self._cuts + 1 else None
        there, back = await asyncio.open_connection("127.0.0.1", self._target)
        up = asyncio.create_task(self._copy(reader, back, None))
        try:
            with contextlib.suppress(ConnectionError, asyncio.CancelledError):
                await self._copy(there, writer, left)
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            for each in (writer, back):
                each.transport.abort()
            await asyncio.sleep(0)

    async def _copy(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, left: int | None
    ) -> None:
        while data := await source.read(64 << 10):
            if self._rate:
                await asyncio.sleep(len(data) / self._rate)
            if left is not None:
                left -= len(data)
                if left < 0:
                    return
            sink.write(data)
            await sink.drain()


@pytest.mark.parametrize("who", ["nobody", "another authority's", "no node", "two nodes"])
def test_strangers_are_refused(tmp_path: Path, who: str) -> None:
    async def test(bed: Bed) -> None:
        other = Authority(tmp_path / "other")
        contexts = {
            "nobody": lambda: bed.authority.context(),
            "another authority's": lambda: other.context("d", trust=bed.authority.text),
            "no node": lambda: bed.authority.context(""),
            "two nodes": lambda: bed.authority.context("d", "e"),
        }
        with pytest.raises(TransferError) as caught:
            await bed.connect(contexts[who]())
        assert "node s" in str(caught.value)
        assert bed.asked == []

    in_bed(tmp_path, test)


def test_a_source_that_is_another_node_is_refused(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        for checked in (True, False):
            context = bed.authority.context("d")
            context.check_hostname = checked
            with pytest.raises(TransferError, match="source: node t"):
                await bed.connect(context, node="t")
        assert bed.asked == []

    in_bed(tmp_path, test)


def test_who_may_not_have_the_checkpoint_is_told_why(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async def authorize(_node: str, _hello: Hello) -> serving.Session:
            raise ArchitectError("checkpoint", "another pod has claimed it")

        bed.server._authorize = authorize
        with pytest.raises(TransferError, match="node s: checkpoint: another pod has claimed it"):
            await bed.connect()

    in_bed(tmp_path, test)


def test_a_source_that_is_not_there(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        await bed.server.close()
        with pytest.raises(TransferError, match=r"port .*Connection refused"):
            await bed.connect()

    in_bed(tmp_path, test)


def test_damaged_bytes_are_fetched_again_and_given_up_at_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flips = 0
    packed = ranges.digest

    def flipping(data: memoryview) -> str:
        nonlocal flips
        right = packed(data)
        if flips and threading.current_thread().name == "transfer-serve":
            flips -= 1
            data[len(data) // 2] ^= 1
        return right

    # The source's digests come first: what it sends after that is damaged.
    monkeypatch.setattr(ranges, "digest", flipping)

    async def test(bed: Bed) -> None:
        nonlocal flips
        wish = bed.make("pages-1.img", os.urandom(MB))
        async with bed.connected() as connection:
            flips = 1
            await connection.fetch([wish], bed.into)
            assert bed.same(wish)
            flips = 100
            with pytest.raises(TransferError, match=r"pages-1.img.*node s.*damaged 3 times"):
                await connection.fetch([wish], bed.into)

    in_bed(tmp_path, test)


def test_a_file_that_changes_while_it_is_served(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        wish = bed.make("pages-1.img", os.urandom(12 * MB))
        async with bed.connected() as connection:

            def change(_done: int) -> None:
                with (bed.home / wish.name).open("r+b") as file:
                    file.write(b"other")

            limit = RateLimit(20 * MB)
            with pytest.raises(TransferError, match=r"pages-1.img.*changed while it was sent"):
                await connection.fetch([wish], bed.into, progress=change, limit=limit)
            with pytest.raises(TransferError, match=r"node s.*it has 12000000 bytes, not 5"):
                await connection.fetch([FileWish(wish.name, 5)], bed.into)

    in_bed(tmp_path, test)


def test_connections_that_break_are_made_anew_and_only_the_rest_is_fetched(
    tmp_path: Path,
) -> None:
    async def test(bed: Bed) -> None:
        wishes = [bed.make("pages-1.img", os.urandom(30 * MB)), bed.make("core", b"core")]
        proxy = Proxy(bed.server.port, after=6 * MB, cuts=3)
        async with proxy.running() as port, bed.connected(port) as connection:
            await connection.prepare(2)
            done = await connection.fetch(wishes, bed.into)
        assert bed.same(*wishes)
        assert proxy.connections >= 5
        assert done.wire_bytes == 30 * MB + 4

    in_bed(tmp_path, test)


def test_a_source_that_is_gone_for_good_is_given_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching, "_TRIES", 3)

    async def test(bed: Bed) -> None:
        wish = bed.make("pages-1.img", os.urandom(8 * MB))
        proxy = Proxy(bed.server.port, after=100_000, cuts=1000)
        async with proxy.running() as port, bed.connected(port) as connection:
            with pytest.raises(TransferError, match=r"source: node s.*broke 3 times"):
                await connection.fetch([wish], bed.into)

    in_bed(tmp_path, test)


def test_a_call_that_is_cut_is_not_repeated_and_the_next_connects(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        calls = 0
        never = asyncio.Event()

        async def count(_verb: str, _body: bytes) -> bytes:
            nonlocal calls
            calls += 1
            if calls == 1:
                connection._shut_all()
                await never.wait()
            return b"ok"

        bed.session.answers = count
        async with bed.connected() as connection:
            with pytest.raises(TransferError, match=r"leave.*node s.*the connection broke"):
                await connection.call("leave", b"")
            assert await connection.call("again", b"") == b"ok"
        assert calls == 2
        never.set()

    in_bed(tmp_path, test)


def test_a_slow_source_is_waited_for_and_may_be_given_up(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        wish = bed.make("pages-1.img", os.urandom(3 * MB))
        proxy = Proxy(bed.server.port, after=0, cuts=0, rate=3 * MB)
        async with proxy.running() as port, bed.connected(port) as connection:
            await connection.fetch([wish], bed.into)
            assert bed.same(wish)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await connection.fetch([wish], bed.into)
            # Its threads are gone: nothing writes any more.
            assert await connection.call("aborted", b"") == b"aborted:"

    in_bed(tmp_path, test)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "small"
    path.mkdir()
    if os.geteuid():
        pytest.skip("only root mounts")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", path], check=True)
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_disk_too_small_is_found_out_before_anything_travels(
    tmp_path: Path, small_disk: Path
) -> None:
    async def test(bed: Bed) -> None:
        wish = bed.make("pages-1.img", os.urandom(6 * MB))
        sparse = bed.make("sparse.img", b"")
        os.truncate(bed.home / "sparse.img", 100 * MB)
        async with bed.connected() as connection:
            with pytest.raises(TransferError, match=r"small.*6.* bytes, the disk has 4.* left"):
                await connection.fetch([wish], small_disk)
            assert list(small_disk.iterdir()) == []
            await connection.fetch([FileWish(sparse.name, 100 * MB)], small_disk)
            assert (small_disk / sparse.name).stat().st_size == 100 * MB

    in_bed(tmp_path, test)


def test_a_disk_that_fills_up_meanwhile(
    tmp_path: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fetching.Connection, "_fits", lambda *_: None)

    async def test(bed: Bed) -> None:
        wish = bed.make("pages-1.img", os.urandom(6 * MB))
        async with bed.connected() as connection:
            with pytest.raises(TransferError, match=r"small \(destination\): No space.*make room"):
                await connection.fetch([wish], small_disk)

    in_bed(tmp_path, test)


def test_only_regular_files_of_the_checkpoint_are_served(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        (bed.home / "link").symlink_to("/etc/passwd")
        os.mkfifo(bed.home / "pipe")
        (bed.home / "directory").mkdir()
        reasons = {
            "link": "symbolic link",
            "pipe": "no regular file",
            "directory": "no regular file",
            "missing": "none of that name",
        }
        async with bed.connected() as connection:
            for name, why in reasons.items():
                with pytest.raises(TransferError, match=f"node s.*{name}.*{why}"):
                    await connection.fetch([FileWish(name, 1)], bed.into)
            with pytest.raises(TransferError, match="no relative path"):
                await connection.fetch([FileWish("../authority/pair.pem", 1)], bed.into)

    in_bed(tmp_path, test)


@pytest.mark.parametrize("name", ["../authority/pair.pem", "/etc/passwd"])
def test_the_source_refuses_paths_whatever_the_session_would_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    async def test(bed: Bed) -> None:
        size = (bed.home / name).stat().st_size

        def ask() -> None:
            channel = connection._connected()
            channel.send_line(Request(items=[Item(name, size, 0, size)]))
            try:
                connection._peer.reply(channel)
            finally:
                channel.free()

        async with bed.connected() as connection:
            with pytest.raises(TransferError, match="no relative path"):
                await asyncio.to_thread(ask)

    in_bed(tmp_path, test)


def test_links_at_the_destination_are_not_followed(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        outside = tmp_path / "outside"
        outside.mkdir()
        (outside / "file").write_text("kept")
        (bed.into / "file").symlink_to(outside / "file")
        (bed.into / "box").symlink_to(outside)
        wishes = [bed.make("file", b"moved"), bed.make("box/other", b"moved")]
        async with bed.connected() as connection:
            for wish in wishes:
                with pytest.raises(TransferError, match="destination"):
                    await connection.fetch([wish], bed.into)
        assert (outside / "file").read_text() == "kept"
        assert not (outside / "other").exists()

    in_bed(tmp_path, test)


@pytest.mark.parametrize(
    ("extents", "raw"),
    [
        ([(1, 0, 10)], 10),
        ([(0, 90, 20)], 20),
        ([(0, -1, 5)], 5),
        ([(0, 0, 10), (0, 5, 10)], 20),
        ([(0, 0, 10)], 11),
        ([(0, 0, 0)], 0),
    ],
)
def test_pieces_outside_of_what_was_asked_for(
    extents: Sequence[tuple[int, int, int]], raw: int
) -> None:
    items = [Item("file", 100, 0, 100)]
    assert ranges.are_within([(0, 0, 50), (0, 50, 50)], items, 100)
    assert not ranges.are_within(extents, items, raw)


def test_a_compressed_range_that_is_larger_than_it_says() -> None:
    packed = ranges.deflated(memoryview(bytes(MB)))
    assert packed is not None
    room = memoryview(bytearray(MB))
    assert ranges.inflate(memoryview(packed), room)
    assert not ranges.inflate(memoryview(packed), room[:-1])
    assert not ranges.inflate(memoryview(b"no deflate"), room)


def test_a_client_that_says_nothing_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "HANDSHAKE_S", 0.2)

    async def test(bed: Bed) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", bed.server.port)
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()

    in_bed(tmp_path, test)


def test_an_authorization_that_comes_after_the_peer_has_gone_still_ends(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        asked, go = asyncio.Event(), asyncio.Event()

        async def authorize(_node: str, hello: Hello) -> serving.Session:
            assert hello == HELLO
            asked.set()
            await go.wait()
            return bed.session

        bed.server._authorize = authorize
        connecting: asyncio.Task[Any] = asyncio.create_task(bed.connect())
        await asked.wait()
        connecting.cancel()
        await asyncio.gather(connecting, return_exceptions=True)
        go.set()
        await asyncio.wait_for(bed.session.ended.wait(), 10)

    in_bed(tmp_path, test)
