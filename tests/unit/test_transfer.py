"""The transfer of files and messages between two daemons, over loopback and real TLS."""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import ssl
import stat
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from architect.adapters.transfer import fetching, ranges, serving
from architect.adapters.transfer.fetching import Connection, FileWish
from architect.adapters.transfer.limits import RateLimit
from architect.adapters.transfer.wire import NODE_SUFFIX, Hello, TransferError, checked_name
from architect.contract.errors import ArchitectError

HELLO = Hello("default/app-12345678", "uid-p", "uid-q", 3)
MB = 1_000_000


class Authority:
    """Signs certificates of nodes."""

    def __init__(self, home: Path) -> None:
        home.mkdir()
        self._home = home
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        made = self._builder(self._name, self._key).add_extension(
            x509.BasicConstraints(ca=True, path_length=0), critical=True
        )
        self.text = self._signed(made)

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        now = dt.datetime.now(dt.UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - dt.timedelta(hours=1))
            .not_valid_after(now + dt.timedelta(hours=1))
        )

    def _signed(self, builder: x509.CertificateBuilder) -> str:
        made = builder.sign(self._key, hashes.SHA256())
        return made.public_bytes(serialization.Encoding.PEM).decode()

    def context(self, *names: str, server: bool = False, trust: str = "") -> ssl.SSLContext:
        """For a daemon of the node ``names``; no certificate without one."""
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=trust or self.text)
        if names:
            key = ec.generate_private_key(ec.SECP256R1())
            sans = x509.SubjectAlternativeName([x509.DNSName(n + NODE_SUFFIX) for n in names])
            subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, names[0] or "none")])
            made = self._builder(subject, key).add_extension(sans, critical=False)
            text = self._signed(made).encode() + key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
            path = self._home / "pair.pem"
            path.write_bytes(text)
            context.load_cert_chain(path)
        return context


class Files:
    """A session that serves a directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.ended = asyncio.Event()
        self.endings = 0
        self.answers: Callable[[str, bytes], Awaitable[bytes]] | None = None

    async def call(self, verb: str, body: bytes) -> bytes:
        """Repeats what it is told."""
        if self.answers is not None:
            return await self.answers(verb, body)
        return verb.encode() + b":" + body

    def open(self, name: str) -> Path | None:
        """A file of the directory."""
        path = self.home / name
        return path if path.exists() or path.is_symlink() else None

    def closed(self) -> None:
        """Counted."""
        self.endings += 1
        self.ended.set()


class Bed:
    """A source "s" with files in ``home``, a destination "d" that puts them in ``into``."""

    def __init__(self, path: Path) -> None:
        self.authority = Authority(path / "authority")
        self.home, self.into = path / "source", path / "destination"
        self.home.mkdir()
        self.into.mkdir()
        self.session = Files(self.home)
        self.asked: list[tuple[str, Hello]] = []
        context = self.authority.context("s", server=True)
        self.server = serving.Server(context, "127.0.0.1", 0, self.authorize)

    async def authorize(self, node: str, hello: Hello) -> serving.Session:
        """Everybody may."""
        self.asked.append((node, hello))
        return self.session

    async def connect(
        self, context: ssl.SSLContext | None = None, node: str = "s", port: int = 0
    ) -> Connection:
        """A connection of "d"."""
        context = context or self.authority.context("d")
        return await fetching.connect(context, f"127.0.0.1:{port or self.server.port}", node, HELLO)

    @contextlib.asynccontextmanager
    async def connected(self, port: int = 0) -> AsyncIterator[Connection]:
        """The same, closed at the end."""
        connection = await self.connect(port=port)
        try:
            yield connection
        finally:
            await connection.close()

    def make(self, name: str, contents: bytes) -> FileWish:
        """A file at the source."""
        path = self.home / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(contents)
        return FileWish(name, len(contents))

    def same(self, *wishes: FileWish) -> bool:
        """Whether they have come as they are."""
        return all(
            (self.into / w.name).read_bytes() == (self.home / w.name).read_bytes() for w in wishes
        )


Test = Callable[[Bed], Coroutine[Any, Any, None]]


def in_bed(path: Path, test: Test) -> None:
    """Runs a test with a bed whose server runs."""

    async def run() -> None:
        bed = Bed(path)
        await bed.server.start()
        try:
            async with asyncio.timeout(60):
                await test(bed)
        finally:
            await bed.server.close()

    asyncio.run(run())


def test_a_call_is_answered_and_the_session_told_of_its_end(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async with bed.connected() as connection:
            assert await connection.call("leave", b"now") == b"leave:now"
            await connection.prepare(2)
            assert await connection.call("done", bytes(3 * MB)) == b"done:" + bytes(3 * MB)
        await asyncio.wait_for(bed.session.ended.wait(), 10)
        assert (bed.session.endings, bed.asked) == (1, [("d", HELLO)])

    in_bed(tmp_path, test)


def test_an_error_of_the_other_side_says_whose_it_is(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        async def refuse(verb: str, _body: bytes) -> bytes:
            raise ArchitectError(f"verb {verb}", "not now", "wait")

        bed.session.answers = refuse
        async with bed.connected() as connection:
            for _ in range(2):
                with pytest.raises(TransferError, match="node s: verb leave: not now; wait"):
                    await connection.call("leave", b"")

    in_bed(tmp_path, test)


def test_the_caller_going_in_a_long_call_ends_the_session_at_once(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        begun, never = asyncio.Event(), asyncio.Event()

        async def long(_verb: str, _body: bytes) -> bytes:
            begun.set()
            await never.wait()
            return b""

        bed.session.answers = long
        connection = await bed.connect()
        calling = asyncio.create_task(connection.call("leave", b""))
        await begun.wait()
        calling.cancel()
        await asyncio.wait_for(bed.session.ended.wait(), 10)
        never.set()
        await connection.close()

    in_bed(tmp_path, test)


def test_files_of_all_sizes_come_as_they_are(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        sizes = (0, 1, 4095, 4096, 4097, 65536, 2 * MB, (2 << 20) + 1, 9 * MB + 5)
        wishes = [bed.make(f"box/file-{size}", os.urandom(size)) for size in sizes]
        seen: list[int] = []
        async with bed.connected() as connection:
            await connection.prepare(3)
            done = await connection.fetch(wishes, bed.into, streams=3, progress=seen.append)
        assert bed.same(*wishes)
        assert done.bytes == sum(sizes) == max(seen)
        assert done.wire_bytes == done.bytes
        modes = {stat.S_IMODE((bed.into / w.name).stat().st_mode) for w in wishes}
        assert modes == {0o600}

    in_bed(tmp_path, test)


def test_hundreds_of_small_files_take_few_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0
    batch = serving._batch

    def counted(*words: Any) -> Any:
        nonlocal asked
        asked += 1
        return batch(*words)

    monkeypatch.setattr(serving, "_batch", counted)

    async def test(bed: Bed) -> None:
        wishes = [bed.make(f"core-{i}.img", os.urandom(100 + 30 * i)) for i in range(300)]
        async with bed.connected() as connection:
            await connection.fetch(wishes, bed.into)
        assert bed.same(*wishes)

    in_bed(tmp_path, test)
    assert asked <= 4


def test_zeros_do_not_travel_and_are_holes(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        size = 200 * MB
        path = bed.home / "pages.img"
        with path.open("wb") as file:
            file.truncate(size)
            for offset in (0, 4096 * 3, 50 * MB + 17, size - 10):
                file.seek(offset)
                file.write(b"data here!")
            # Zeros that are no hole.
            file.seek(100 << 20)
            file.write(bytes(1 << 20) + os.urandom(4096) + bytes(1 << 20))
        async with bed.connected() as connection:
            done = await connection.fetch([FileWish("pages.img", size)], bed.into)
        arrived = (bed.into / "pages.img").stat()
        assert bed.same(FileWish("pages.img", size))
        assert done.wire_bytes <= 6 * 4096
        assert arrived.st_size == size
        assert arrived.st_blocks * 512 < MB

    in_bed(tmp_path, test)


def test_what_is_there_already_does_not_travel_again(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        big = bytearray(os.urandom(10 * MB))
        big[4 * MB : 6 * MB] = bytes(2 * MB)
        wishes = [bed.make("big", bytes(big)), bed.make("small", b"small"), bed.make("new", b"n")]
        damaged = bytearray(big)
        damaged[5 * MB] = 1
        (bed.into / "big").write_bytes(damaged)
        (bed.into / "small").write_bytes(b"smell and more")
        async with bed.connected() as connection:
            done = await connection.fetch(wishes, bed.into, resume=True)
        assert bed.same(*wishes)
        assert 0 < done.wire_bytes < 5 * MB

    in_bed(tmp_path, test)


def test_compression_where_the_link_is_slow_and_the_bytes_allow(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        text = bed.make("text", b"all work and no play " * 200_000)
        noise = bed.make("noise", os.urandom(MB))
        async with bed.connected() as connection:
            slow = RateLimit(40 * MB)
            done = await connection.fetch([text], bed.into, limit=slow)
            assert done.wire_bytes < text.size / 5
            done = await connection.fetch([noise], bed.into, limit=slow)
            assert done.wire_bytes == noise.size
        assert bed.same(text, noise)

    in_bed(tmp_path, test)


def test_two_moves_share_the_limit_whatever_their_streams(tmp_path: Path) -> None:
    async def test(bed: Bed) -> None:
        wish = bed.make("file", os.urandom(8 * MB))
        limit = RateLimit(10 * MB)
        seen = [0, 0]
        both = asyncio.Event()

        def progress(which: int) -> Callable[[int], None]:
            def note(done: int) -> None:
                seen[which] = done
                if max(seen) == wish.size:
                    both.set()

            return note

        async with bed.connected() as one, bed.connected() as other:
            targets = [bed.into / "a", bed.into / "b"]
            for each in targets:
                each.mkdir()
            began = asyncio.get_running_loop().time()
            tasks = [
                asyncio.create_task(
                    connection.fetch(
                        [wish], targets[i], streams=n, limit=limit, progress=progress(i)
                    )
                )
                for i, (connection, n) in enumerate([(one, 1), (other, 4)])
            ]
            await both.wait()
            # A range is on its way on each of the four streams.
            assert min(seen) >= wish.size / 4
            await asyncio.gather(*tasks)
            took = asyncio.get_running_loop().time() - began
        assert 1.4 < took < 4

    in_bed(tmp_path, test)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../x", "a/../b", "a//b", "a/", ".", "a\0b"])
def test_names_that_are_paths_elsewhere_are_refused(name: str) -> None:
    with pytest.raises(TransferError):
        checked_name(name)


def test_runs_of_zeros_are_found_at_pages() -> None:
    page = ranges.PAGE
    for zero in (range(0), range(16), range(16, 40), range(5, 7), range(30, 48)):
        data = bytearray(b"\0" * (page - 1) + b"x") * 48 + bytearray(b"end")
        for one in zero:
            data[one * page : (one + 1) * page] = bytes(page)
        found = ranges._data(memoryview(data))
        left = bytearray(len(data))
        for offset, length in found:
            left[offset : offset + length] = data[offset : offset + length]
        assert left == data
        assert sum(length for _, length in found) == len(data) - len(zero) * page
