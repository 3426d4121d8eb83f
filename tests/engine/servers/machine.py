"""The client's machine: a container of plain runc, in which programs are run and sockets opened.

Made by conftest, used by the tests beside it. Its programs are the Debian clients of the servers' image,
so nothing is installed on the host. They are started with nsenter(1) and not with `podman exec`: that
costs a third of a second each time, and hides when a program ends.
"""

import contextlib
import os
import queue
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, Self

from architect.adapters import netns
from tests.engine.servers.capture import Capture
from tests.engine.support import Container, Done, Unmet

DEADLINE_S: Final = 15.0
_PATH: Final = "/usr/lib/postgresql/15/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Session:
    """A client program that goes on: lines in, lines out."""

    def __init__(self, *words: str) -> None:
        self._process = subprocess.Popen(
            words,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            bufsize=1,
        )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self.heard: list[str] = []
        """What it has printed and somebody has read."""
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._process.stdout
        for line in self._process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, line: str) -> None:
        """Give it a line."""
        assert self._process.stdin
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()

    def line(self, deadline: float = DEADLINE_S) -> str:
        """Return the next line that it prints, within so many seconds.

        Raises Unmet, also when the program has ended instead.
        """
        try:
            line = self._lines.get(timeout=deadline)
        except queue.Empty:
            raise Unmet(f"after {deadline:g} s no line after {self.heard}") from None
        if line is None:
            raise Unmet(f"it ended with {self._process.wait()} after {self.heard}")
        self.heard.append(line)
        return line

    def until(self, text: str, deadline: float = DEADLINE_S) -> str:
        """Return the next line that holds this text; those before it are left out."""
        end = time.monotonic() + deadline
        while text not in (line := self.line(max(end - time.monotonic(), 0.001))):
            pass
        return line

    def ask(self, line: str) -> str:
        """Give it a line and return the next one that it prints."""
        self.send(line)
        return self.line()

    def ended(self, deadline: float = DEADLINE_S) -> int:
        """Return its exit status once it has ended by itself."""
        return self._process.wait(deadline)

    def alive(self) -> bool:
        """Whether it still runs."""
        return self._process.poll() is None

    def close(self) -> None:
        """End it: by the end of its input, or else by a signal."""
        assert self._process.stdin
        assert self._process.stdout
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(0.5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()
        self._process.stdout.close()


class Machine:
    """See the module."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.address = container.address
        self._pid = container.keeper
        self.place = os.open(f"/proc/{self._pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        """Descriptor of its network namespace."""

    def close(self) -> None:
        """Let go of its namespace."""
        os.close(self.place)

    def _words(self, *words: str) -> list[str]:
        entered = ["nsenter", "-t", str(self._pid), "-m", "-n", "--"]
        return [*entered, "env", "-i", f"PATH={_PATH}", "LC_ALL=C.UTF-8", "HOME=/tmp", *words]

    def run(self, *words: str, stdin: str = "", deadline: float = DEADLINE_S) -> Done:
        """Run a program there to its end, which may be a bad one."""
        done = subprocess.run(
            self._words(*words),
            capture_output=True,
            text=True,
            check=False,
            input=stdin,
            timeout=deadline,
        )
        return Done(done.returncode, done.stdout, done.stderr)

    def must(self, *words: str, stdin: str = "", deadline: float = DEADLINE_S) -> str:
        """Run a program there that has to succeed; return what it printed, stripped."""
        done = self.run(*words, stdin=stdin, deadline=deadline)
        assert done.code == 0, f"{' '.join(words)}: exit {done.code}: {done.err}{done.out}"
        return done.out.strip()

    def session(self, *words: str) -> Session:
        """Start a program there."""
        return Session(*self._words(*words))

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Sockets that are opened meanwhile are the machine's."""
        with netns.entered(self.place):
            yield

    def capture(self) -> Capture:
        """Look at what passes its interface, from now on."""
        return Capture(self.place)


def program(name: str) -> str:
    """Return the source of a program of ours, for `python3 -c`."""
    return (Path(__file__).with_name("programs") / name).read_text()
