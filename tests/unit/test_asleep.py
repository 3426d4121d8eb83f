"""The name in a pod's network by which health-check-proxy knows that a program is away: a real keeper's.

Why it exists: probes are answered from memory exactly while connect(2) to that name succeeds, so it must be
there from the beginning of a dump until the program runs again, and never else. The keeper is built as
native/Makefile does; shell scripts stand for runc and CRIU, and a `sleep` in a network namespace of its own
for the container.

Needs root and musl-gcc; says so where it is skipped.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from architect.adapters import netns

KEEPER = Path(__file__).resolve().parents[2] / "native" / "keeper"
NAME = "app"
LONGEST = 89
"""Bytes of a container's name for which there is room: 108, less 1 of zero, 17 of prefix, 1 at the end."""
DEADLINE_S = 10.0

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces take root")

RUNC = """#!/bin/sh
unshare --net sh -c 'echo $$ > init.new; mv init.new init.pid; exec sleep 600' &
until [ -e init.pid ]; do sleep 0.01; done
"""
CRIU = """#!/bin/sh
cd "$1" || exit
until [ -e go ]; do sleep 0.01; done
[ -e fail ] && exit 1
nsenter --net=/proc/self/fd/200 sh -c 'echo $$ > new.pid; mv new.pid restored.pid; exec sleep 600' &
until [ -e restored.pid ]; do sleep 0.01; done
"""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The keeper, built as native/Makefile builds it."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    multiarch = subprocess.run(
        ["gcc", "-print-multiarch"], check=True, capture_output=True, text=True
    ).stdout.strip()
    built = tmp_path_factory.mktemp("keeper") / "keeper"
    headers = ["/usr/include", f"/usr/include/{multiarch}"]
    flags = ["-std=gnu11", "-static", "-Os", "-Wall", "-Wextra", "-Werror"]
    flags += [word for header in headers for word in ("-idirafter", header)]
    sources = [str(path) for path in KEEPER.glob("*.c")]
    subprocess.run(["musl-gcc", *flags, "-o", str(built), *sources], check=True)
    return built


def until(condition: Callable[[], bool], what: str) -> None:
    """Wait for a condition, or fail saying what was waited for."""
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {DEADLINE_S} s still waiting for {what}")
        select.select([], [], [], 0.005)


class Container:
    """A running container's keeper."""

    def __init__(self, program: Path, directory: Path, stack: contextlib.ExitStack) -> None:
        self.directory = directory
        for name, text in (("runc", RUNC), ("criu", CRIU)):
            (directory / name).write_text(text)
            (directory / name).chmod(0o755)
        words = [os.fsencode(word) for word in (directory / "criu", directory)]
        (directory / "restore.argv").write_bytes(b"".join(word + b"\0" for word in words))
        (directory / "images").mkdir()
        ready, tell = os.pipe()
        stack.callback(os.close, ready)
        keeper = subprocess.Popen(
            [program, directory, str(tell), "--", directory / "runc"],
            pass_fds=(tell,),
            cwd=directory,
            stdin=subprocess.DEVNULL,
        )
        stack.callback(self._end, keeper)
        os.close(tell)
        self._control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._control.settimeout(DEADLINE_S)
        assert select.select([ready], [], [], DEADLINE_S)[0], "the keeper said nothing"
        assert os.read(ready, 1) == b"\0"
        self._control.connect(str(directory / "ctl"))
        self.netns = netns.open_netns(Path(f"/proc/{self.status()['init']}/ns/net"))
        stack.callback(os.close, self.netns)

    def _end(self, keeper: subprocess.Popen[bytes]) -> None:
        (self.directory / "fail").touch()
        (self.directory / "go").touch()  # so that no script waits any more
        with self._control, contextlib.suppress(OSError):
            self.ask("exit 0")
        try:
            keeper.wait(DEADLINE_S)
        finally:
            keeper.kill()
            keeper.wait()

    def ask(self, request: str) -> str:
        self._control.send(request.encode())
        return self._control.recv(4096).decode()

    def status(self) -> dict[str, str]:
        return dict(word.split("=") for word in self.ask("status").split()[1:])

    def phase(self, expected: str) -> None:
        until(lambda: self.status()["phase"] == expected, f"the phase {expected}")

    def bind(self, name: str) -> socket.socket:
        """Take a container's name in the pod's network, as any process there could."""
        with netns.entered(self.netns):
            squatter = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        squatter.bind(f"\0architect/asleep/{name}")
        return squatter

    def is_away(self, name: str = NAME) -> bool:
        """Whether the name is there, asked as health-check-proxy does."""
        with netns.entered(self.netns):
            return is_away_here(name)

    def names(self) -> int:
        """How many names there are in the pod's network (proc(5): @ stands for the zero byte)."""
        return Path(f"/proc/{self.status()['keeper']}/net/unix").read_text().count("@architect/")

    def sleep(self) -> None:
        """Hibernate: commit a checkpoint, and end the program as CRIU does."""
        (self.directory / "checkpoint").symlink_to(self.directory / "images")
        os.kill(int(self.status()["init"]), signal.SIGKILL)
        self.phase("hibernated")


def is_away_here(name: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as asking:
        error = asking.connect_ex(f"\0architect/asleep/{name}")
    assert error in (0, errno.ECONNREFUSED)
    return not error


@pytest.fixture
def container(program: Path, tmp_path: Path) -> Iterator[Container]:
    with contextlib.ExitStack() as stack:
        yield Container(program, tmp_path, stack)


def test_name_is_there_from_the_dump_until_it_runs_again(container: Container) -> None:
    assert not container.is_away()
    for _ in range(2):
        assert "phase=dumping" in container.ask(f"dump-begin {NAME}")
        assert container.is_away()
        assert not container.is_away("another")
        assert not is_away_here(NAME)  # of another network
        container.sleep()
        assert container.is_away()
        container.ask(f"kill {int(signal.SIGCONT)}")  # any signal wakes
        container.phase("restoring")
        assert container.is_away()
        (container.directory / "checkpoint").unlink()
        (container.directory / "go").touch()
        container.phase("running")
        assert not container.is_away()
        (container.directory / "go").unlink()


def test_dump_that_comes_to_nothing_gives_the_name_up(container: Container) -> None:
    for _ in range(2):
        container.ask(f"dump-begin {NAME}")
        assert container.is_away()
        assert "error cannot dump" in container.ask(f"dump-begin {NAME}")
        assert container.is_away()
        assert "phase=running" in container.ask("dump-end")
        assert not container.is_away()


def test_refused_dump_takes_no_name(container: Container) -> None:
    (container.directory / "checkpoint").symlink_to(container.directory / "images")
    assert "error an earlier checkpoint" in container.ask(f"dump-begin {NAME}")
    assert not container.is_away()


def test_failed_restore_leaves_it_away(container: Container) -> None:
    container.ask(f"dump-begin {NAME}")
    container.sleep()
    for name in ("fail", "go"):
        (container.directory / name).touch()
    assert "error restore failed" in container.ask("wake")
    assert container.is_away()
    (container.directory / "fail").unlink()
    assert "phase=running" in container.ask("wake")
    assert not container.is_away()


def test_pager_that_died_meanwhile_does_not_keep_the_name(container: Container) -> None:
    container.ask(f"dump-begin {NAME}")
    first = container.status()["pager"]
    os.kill(int(first), signal.SIGKILL)
    until(lambda: container.status()["pager"] != first, "another pager")
    assert container.is_away()
    container.ask("dump-end")
    assert not container.is_away()


def test_name_ends_with_the_container(container: Container) -> None:
    container.ask(f"dump-begin {NAME}")
    container.sleep()
    assert container.is_away()
    container.ask("kill 9")
    until(lambda: not container.is_away(), "the name to be gone")


def test_squatter_does_no_harm(container: Container) -> None:
    with container.bind(NAME):
        assert "phase=dumping" in container.ask(f"dump-begin {NAME}")
        container.sleep()
        (container.directory / "checkpoint").unlink()
        (container.directory / "go").touch()
        assert "phase=running" in container.ask("wake")
        assert container.is_away()  # which is the squatter's word, and harms its own pod alone
    assert not container.is_away()
    container.ask(f"dump-begin {NAME}")
    assert container.is_away()


@pytest.mark.parametrize(
    ("name", "there"),
    [("x" * LONGEST, True), ("x" * (LONGEST + 1), False), ("x" * 2000, False), ("", False)],
    ids=["longest", "too long", "far too long", "none"],
)
def test_names_too_long_are_passed_over(container: Container, name: str, there: bool) -> None:
    assert "phase=dumping" in container.ask(f"dump-begin {name}".rstrip())
    assert container.names() == there
    if there:
        assert container.is_away(name)
    assert "phase=running" in container.ask("dump-end")
    assert container.names() == 0
