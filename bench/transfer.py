"""Files from one daemon to another over loopback, beside a raw TLS stream from memory to memory, by turns.

The source is a process of its own. The raw stream is one connection, `sendall` of 1 MiB at a time into a
buffer; the transfer reads its files from the page cache, checks digests and writes files. What of the
difference is the writing shows the same stream written to a file as it comes.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime as dt
import os
import shutil
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from architect.adapters.transfer import fetching, serving, wire
from architect.adapters.transfer.fetching import FileWish
from bench import harness

MB: Final = 1_000_000
STREAMS: Final = 2
_PIECE: Final = 1 << 20
_NODE: Final = "bench"
_RAW: Final = "raw TLS stream"
_WRITTEN: Final = "raw TLS stream into a file"


def _pair(path: Path) -> None:
    """A certificate that is its own authority, good for both sides, with its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "bench")])
    now = dt.datetime.now(dt.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(hours=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.DNSName(_NODE + wire.NODE_SUFFIX)]), critical=False
        )
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(
        made.public_bytes(serialization.Encoding.PEM)
        + key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )


def _context(pair: Path, *, server: bool) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if server else ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(pair)
    context.load_cert_chain(pair)
    return context


class _Directory:
    """A session that serves a directory."""

    def __init__(self, home: Path) -> None:
        self._home = home

    async def call(self, verb: str, body: bytes) -> bytes:
        """Nothing is asked."""
        raise NotImplementedError(verb, body)

    def open(self, name: str) -> Path | None:
        """A file of it."""
        return self._home / name

    def closed(self) -> None:
        """Nothing to do."""


def _raw(listening: socket.socket, context: ssl.SSLContext) -> None:
    """Sends as many bytes as each client's first line asks for."""
    buffer = memoryview(os.urandom(_PIECE))
    while True:
        sock, _ = listening.accept()
        with context.wrap_socket(sock, server_side=True) as tls:
            left = int(tls.recv(100))
            while left:
                count = min(left, _PIECE)
                tls.sendall(buffer[:count])
                left -= count


async def _serve(pair: Path, home: Path) -> None:
    """The source's process, until its standard input ends."""

    async def authorize(_node: str, _hello: wire.Hello) -> serving.Session:
        return _Directory(home)

    context = _context(pair, server=True)
    server = serving.Server(context, "127.0.0.1", 0, authorize)
    await server.start()
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_raw, args=(listening, context), daemon=True).start()
        print(server.port, listening.getsockname()[1], flush=True)
        await asyncio.to_thread(sys.stdin.read)
    await server.close()


@contextlib.contextmanager
def _source(pair: Path, home: Path) -> Iterator[tuple[int, int]]:
    """Ports of a source: of its transfer server, and of its raw stream."""
    words = [sys.executable, "-m", "bench.transfer", str(pair), str(home)]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            one, other = process.stdout.readline().split()
            yield int(one), int(other)
        finally:
            process.stdin.close()
            process.wait(30)


def _raw_seconds(context: ssl.SSLContext, port: int, size: int, into: Path) -> float:
    """``into`` is a file, or the null device for a stream that ends in memory."""
    buffer = memoryview(bytearray(_PIECE))
    with (
        into.open("wb", buffering=0) as file,
        socket.create_connection(("127.0.0.1", port)) as sock,
        context.wrap_socket(sock, server_hostname=_NODE + wire.NODE_SUFFIX) as tls,
    ):
        began = time.perf_counter()
        tls.sendall(str(size).encode())
        left = size
        while left:
            count = tls.recv_into(buffer[:left])
            file.write(buffer[:count])
            left -= count
        return time.perf_counter() - began


async def _transfer_seconds(
    context: ssl.SSLContext, port: int, files: list[FileWish], into: Path
) -> float:
    hello = wire.Hello("bench/bench", "old", "new", 1)
    connection = await fetching.connect(context, f"127.0.0.1:{port}", _NODE, hello)
    try:
        await connection.prepare(STREAMS)
        began = time.perf_counter()
        await connection.fetch(files, into, streams=STREAMS)
        return time.perf_counter() - began
    finally:
        await connection.close()


def rates(size: int, n: int) -> list[dict[str, Any]]:
    """One file of ``size`` bytes, and as many in a raw stream, by turns."""
    workload = f"{size // MB} MB"
    found: dict[str, list[float]] = {_RAW: [], _WRITTEN: [], "architect": []}
    with tempfile.TemporaryDirectory(prefix="bench-transfer-") as name:
        home, into, pair = Path(name, "source"), Path(name, "destination"), Path(name, "pair.pem")
        home.mkdir()
        _pair(pair)
        with (home / "pages-1.img").open("wb") as file:
            for start in range(0, size, _PIECE):
                file.write(os.urandom(min(_PIECE, size - start)))
        files = [FileWish("pages-1.img", size)]
        context = _context(pair, server=False)
        with _source(pair, home) as (transfers, raw):
            for turn in range(n + 1):
                into.mkdir()
                moved = asyncio.run(_transfer_seconds(context, transfers, files, into))
                shutil.rmtree(into)
                streamed = _raw_seconds(context, raw, size, Path(os.devnull))
                written = _raw_seconds(context, raw, size, Path(name, "written"))
                Path(name, "written").unlink()
                if turn:
                    found["architect"].append(size / moved / MB)
                    found[_RAW].append(size / streamed / MB)
                    found[_WRITTEN].append(size / written / MB)
    medians = {subject: statistics.median(each) for subject, each in found.items()}
    shares = {one: 100 * medians["architect"] / medians[one] for one in (_RAW, _WRITTEN)}
    return [
        *(
            harness.figure("transfer between daemons", subject, workload, value, "MB/s", n)
            for subject, value in medians.items()
        ),
        *(
            harness.figure(f"share of a {one}", "architect", workload, share, "%", n)
            for one, share in shares.items()
        ),
    ]


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """What `python -m bench transfer` runs."""
    n = 3 if quick else 15
    return [lambda: rates(50 * MB, n), lambda: rates(500 * MB, n)]


if __name__ == "__main__":
    asyncio.run(_serve(Path(sys.argv[1]), Path(sys.argv[2])))
