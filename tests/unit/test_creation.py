"""A daemon that starts while a container is being created waits for it, instead of clearing it away."""

import asyncio
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import msgspec
import pytest

from architect.adapters import runc_state
from architect.contract import paths
from architect.contract.records import Request
from architect.processes.architectd.context import Context
from architect.processes.architectd.registry import Registry, _await_creation
from architect.processes.architectd.server import Moves, Server

ID = "beef1234beef"
STATUS = "ok phase={phase} init=1 keeper=2 pager=3 pager_state=0 pages=0 left=0 faults=0 restore_status=0"


@pytest.fixture
def creator() -> Iterator[subprocess.Popen[bytes]]:
    """A process that looks as one that creates the container."""
    words = (sys.executable, "-c", "input()", "create", "--bundle", f"/x/{ID}", ID)
    with subprocess.Popen(words, stdin=subprocess.PIPE) as process:
        try:
            # Amid execve(2) it has no words yet.
            end = time.monotonic() + 10
            while not runc_state.is_being_created(ID):
                assert time.monotonic() < end, "the process has begun"
            yield process
        finally:
            process.kill()


def test_who_creates_is_seen(creator: subprocess.Popen[bytes]) -> None:
    assert runc_state.is_being_created(ID)
    assert not runc_state.is_being_created("dead1234dead")
    creator.kill()
    creator.wait()
    assert not runc_state.is_being_created(ID)


def test_what_is_not_known_is_not_started_as_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a container of a pod nobody but the daemon knows whether a checkpoint is on its way."""
    monkeypatch.setattr(paths, "CONTAINERS", tmp_path / "containers")
    monkeypatch.setattr(paths, "DAEMON_SOCKET", tmp_path / "daemon")

    async def ask() -> str:
        server = Server(Registry(cast(Context, None)), cast(Context, None), cast(Moves, object()))
        async with await server.listen():
            reader, writer = await asyncio.open_unix_connection(str(paths.DAEMON_SOCKET))
            writer.write(msgspec.json.encode(Request(verb="start", id=ID)) + b"\n")
            reply = await asyncio.wait_for(reader.readline(), 5)
            writer.close()
            return reply.decode()

    assert asyncio.run(ask()).startswith(f"error container {ID} is not known")


def test_nobody_creates_it(tmp_path: Path) -> None:
    asyncio.run(asyncio.wait_for(_await_creation(tmp_path / ID), 1))


def test_creation_is_awaited(tmp_path: Path, creator: subprocess.Popen[bytes]) -> None:
    """First there is no keeper, then one that creates, then one that has."""
    run = tmp_path / ID
    run.mkdir()

    async def scene() -> list[str]:
        waiting = asyncio.create_task(_await_creation(run))
        done, _ = await asyncio.wait([waiting], timeout=0.2)
        assert not done
        phases = ["creating", "creating", "running"]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_NONBLOCK) as keeper:
            keeper.bind(str(run / "ctl"))
            keeper.listen(16)
            loop = asyncio.get_running_loop()
            while phases:
                orders, _ = await loop.sock_accept(keeper)
                news, _ = await loop.sock_accept(keeper)
                with orders, news:
                    assert await loop.sock_recv(orders, 100) == b"status"
                    assert not waiting.done()
                    await loop.sock_sendall(orders, STATUS.format(phase=phases.pop(0)).encode())
            await asyncio.wait_for(waiting, 5)
        return phases

    assert asyncio.run(scene()) == []
