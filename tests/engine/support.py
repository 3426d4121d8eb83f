"""Real containers for the engine's tests: started with Podman, watched, cleaned up, accounted for.

Called by the fixtures of conftest and by the tests beside it. Containers run a program of our own
(``SUBJECT``) or a valkey; ``Lab`` starts them and takes them away, ``Footprint`` remembers every
one, so that the end of the session can tell whether anything of them is left on the machine.
"""

import contextlib
import itertools
import json
import os
import re
import select
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Final, Self

from architect.contract import paths
from architect.contract.annotations import (
    MANAGED_CONTAINERS,
    NETWORK_MONITOR,
    PREFIX,
    SCALEDOWN_DURATIONS,
)
from bench.harness import podman_value
from bench.valkey import encode

TEST_IMAGE: Final = "localhost/architect-test:1"
VALKEY_IMAGE: Final = "localhost/valkey:8"
PORT: Final = 7000
"""Port of ``SUBJECT``, TCP and UDP."""

_COMMAND_S: Final = 20.0
_SLEEPS: Final = 5
"""How often packets may cancel a hibernation that a test asks for."""
_numbers = itertools.count(1)

SUBJECT: Final = """
import os, select, signal, socket, sys
def end(*_):
    print("term", flush=True)
    os._exit(7)
signal.signal(signal.SIGHUP, lambda *_: print("hup", flush=True))
signal.signal(signal.SIGTERM, end)
port = int(os.environ.get("SUBJECT_PORT", "7000"))
tcp = socket.socket(socket.AF_INET6)
tcp.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
tcp.bind(("::", port))
tcp.listen()
udp = socket.socket(socket.AF_INET6, socket.SOCK_DGRAM)
udp.bind(("::", port))
count = 0
print("ready", flush=True)
open_ones = [tcp, udp]
while True:
    for one in select.select(open_ones, [], [])[0]:
        if one is tcp:
            open_ones.append(one.accept()[0])
            continue
        if one is udp:
            words, sender = udp.recvfrom(65536)
            udp.sendto(words, sender)
            continue
        try:
            words = one.recv(65536)
        except OSError:
            words = b""
        if not words:
            open_ones.remove(one)
            one.close()
            continue
        for line in words.decode().splitlines():
            verb, _, rest = line.partition(" ")
            if verb == "count":
                count += 1
                one.sendall(b"%d\\n" % count)
            elif verb == "print":
                print(rest, flush=True)
                one.sendall(b"ok\\n")
            elif verb == "exit":
                os._exit(int(rest))
            else:
                one.sendall(line.encode() + b"\\n")
"""
"""Echoes lines on TCP and datagrams on UDP; count, print TEXT and exit N do that; TERM exits 7."""


class Unmet(AssertionError):
    """A condition did not come true in time."""


def wait_until(condition: Callable[[], Any], what: str, deadline: float = 15.0) -> Any:
    """Return the condition's first true value.

    ``deadline`` is in seconds. Raises Unmet, which says what was waited for.
    """
    end = time.monotonic() + deadline
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            raise Unmet(f"after {deadline:g} s still waiting for {what}")
        select.select([], [], [], 0.02)


@dataclass(frozen=True, slots=True)
class Done:
    """What a command left."""

    code: int
    out: str
    err: str


def run(*words: str, deadline: float = _COMMAND_S, stdin: str | None = None) -> Done:
    """Run a command to its end, which may be a bad one."""
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        check=False,
        timeout=deadline,
        input=stdin,
        stdin=subprocess.DEVNULL if stdin is None else None,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def must(*words: str, deadline: float = _COMMAND_S, stdin: str | None = None) -> str:
    """Run a command that has to succeed; return what it printed, stripped."""
    done = run(*words, deadline=deadline, stdin=stdin)
    assert done.code == 0, f"{' '.join(words)}: exit {done.code}: {done.err.strip()}"
    return done.out.strip()


def podman(*words: str, deadline: float = _COMMAND_S, stdin: str | None = None) -> str:
    """Run a podman command that has to succeed."""
    return must("podman", *words, deadline=deadline, stdin=stdin)


def architect(*words: str) -> Any:
    """Run an architect command that has to succeed; return the JSON it printed."""
    return json.loads(must("architect", *words, "-o", "json"))


def hibernate(*words: str) -> Any:
    """Run `architect sleep`; again if a packet came meanwhile, as a client's late acknowledgement does."""
    for _ in range(_SLEEPS):
        done = run("architect", "sleep", *words, "-o", "json")
        if "it was wanted: packet" not in done.err:
            break
    assert done.code == 0, (
        f"architect sleep {' '.join(words)}: exit {done.code}: {done.err.strip()}"
    )
    return json.loads(done.out)


def unique(stem: str) -> str:
    """Return a name that no other container, pod or network has."""
    return f"at{os.getpid()}-{next(_numbers)}-{stem}"


def free_port(kind: socket.SocketKind = socket.SOCK_STREAM) -> int:
    """Return a port of this host that nobody uses now."""
    with socket.socket(socket.AF_INET, kind) as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def annotation(key: str, value: object) -> tuple[str, str]:
    """Return podman's option for one annotation."""
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    return "--annotation", podman_value(f"{PREFIX}{key.removeprefix(PREFIX)}={text}")


def settings(
    name: str, *, idle: str | None = "10m", monitor: str | None = "packets", **more: object
) -> dict[str, object]:
    """Return the annotations of a container that is managed as ``name``."""
    found: dict[str, object] = {MANAGED_CONTAINERS: [name]}
    if idle is not None:
        found[SCALEDOWN_DURATIONS] = {name: idle}
    if monitor is not None:
        found[NETWORK_MONITOR] = {name: monitor}
    return found | {key.replace("_", "-"): value for key, value in more.items()}


def cgroup_of(pid: int, controller: str) -> Path:
    """Return the directory of a process's cgroup, of version 1 or 2."""
    unified = None
    for line in Path(f"/proc/{pid}/cgroup").read_text().splitlines():
        _, controllers, place = line.split(":", 2)
        if controller in controllers.split(","):
            return Path("/sys/fs/cgroup") / controller / place.lstrip("/")
        if not controllers:
            unified = Path("/sys/fs/cgroup") / place.lstrip("/")
    assert unified is not None, f"process {pid} is in no cgroup"
    return unified


@dataclass(slots=True)
class Trace:
    """What a container that is gone may not have left."""

    name: str
    id: str
    keeper: int
    netns: int
    """Inode of its network namespace."""


@dataclass(slots=True)
class Footprint:
    """Everything the session has started."""

    traces: list[Trace] = field(default_factory=list)

    def add(self, name: str) -> None:
        """Remember a container while it lives."""
        found = run("podman", "container", "inspect", "-f", "{{.Id}} {{.State.Pid}}", name)
        if found.code:
            return
        container, pid = found.out.split()
        inode = 0
        with contextlib.suppress(OSError):
            inode = Path(f"/proc/{pid}/ns/net").stat().st_ino
        self.traces.append(Trace(name, container, int(pid), inode))

    def left(self) -> list[str]:
        """Return what is still there of the containers, a line each."""
        mounts = Path("/proc/self/mountinfo").read_text()
        keepers = _keepers()
        spaces = _namespaces()
        found = []
        for trace in self.traces:
            for place in (paths.CONTAINERS / trace.id, paths.CHECKPOINTS / trace.id):
                if place.exists():
                    found.append(f"{trace.name}: {place}")
            if trace.id in mounts:
                found.append(f"{trace.name}: a mount of {trace.id}")
            if any(trace.id in words for words in keepers.values()):
                found.append(f"{trace.name}: its keeper")
            if trace.netns and trace.netns in spaces:
                found.append(f"{trace.name}: its network namespace {trace.netns}")
            if trace.netns and (paths.BPF / f"{trace.netns:x}").exists():
                found.append(f"{trace.name}: its gate {trace.netns:x}")
        return found


def _keepers() -> dict[int, str]:
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (process / "comm").read_text().strip() == "architect-keeper":
                found[int(process.name)] = (process / "cmdline").read_text()
    return found


def _namespaces() -> set[int]:
    places = [*Path("/proc").glob("[0-9]*/ns/net"), *Path("/run/netns").glob("*")]
    found = set()
    for place in places:
        with contextlib.suppress(OSError):
            found.add(place.stat().st_ino)
    return found


@dataclass(slots=True)
class Container:
    """One container."""

    name: str
    id: str
    host_port: int = 0
    """Port of this host that is published to the program's."""
    pod: str = ""
    """Name of its pod, if other than its own."""

    def inspect(self, template: str) -> str:
        """Return what podman inspect says, by a Go template."""
        return podman("container", "inspect", "-f", template, self.name)

    @property
    def keeper(self) -> int:
        """The pid that Podman knows."""
        return int(self.inspect("{{.State.Pid}}"))

    @property
    def exit_code(self) -> int:
        """What Podman has for its end."""
        return int(self.inspect("{{.State.ExitCode}}"))

    @property
    def address(self) -> str:
        """Its IPv4 address."""
        return self.inspect("{{range .NetworkSettings.Networks}}{{.IPAddress}}{{end}}")

    def row(self) -> dict[str, Any] | None:
        """Return its line in architect ps."""
        rows = [row for row in architect("ps") if row["id"] == self.id]
        return rows[0] if rows else None

    def state(self) -> str:
        """Return its state, UNMANAGED if Architect does not know it."""
        row = self.row()
        return row["state"] if row else "UNMANAGED"

    def await_state(self, state: str, deadline: float = 15.0) -> None:
        """Wait for a state."""
        wait_until(lambda: self.state() == state, f"{self.name} to be {state}", deadline)

    def sleep(self) -> None:
        """Hibernate it now."""
        rows = hibernate(self.pod or self.name)
        assert [row["state"] for row in rows if row["id"] == self.id] == ["SCALED_DOWN"], rows

    def hibernations(self) -> int:
        """Return how often it was hibernated."""
        row = self.row()
        return row["hibernations"] if row else 0

    def exec(self, *words: str, options: Sequence[str] = (), stdin: str | None = None) -> Done:
        """Run podman exec."""
        return run("podman", "exec", *options, self.name, *words, stdin=stdin)

    def logs(self) -> list[str]:
        """Return the lines that it has written."""
        return podman("logs", self.name).splitlines()

    def processes(self) -> list[int]:
        """Return the pids in its cgroup."""
        return [
            int(pid)
            for pid in (cgroup_of(self.keeper, "pids") / "cgroup.procs").read_text().split()
        ]

    def memory(self) -> int:
        """Return the bytes that its memory cgroup is charged with."""
        group = cgroup_of(self.keeper, "memory")
        for name in ("memory.usage_in_bytes", "memory.current"):
            if (group / name).exists():
                return int((group / name).read_text())
        raise Unmet(f"{group} has no figure for memory in use")

    def checkpoint(self) -> Path | None:
        """Return its checkpoint's directory on the disk."""
        link = paths.CONTAINERS / self.id / "checkpoint"
        return link.resolve() if link.is_symlink() else None

    def events(self, *reasons: str) -> list[dict[str, Any]]:
        """Return its events, of these reasons only if there are any."""
        lines = must("architect", "events", "-o", "json").splitlines()
        found = [json.loads(line) for line in lines]
        return [
            event
            for event in found
            if event.get("id") == self.id and (not reasons or event["reason"] in reasons)
        ]

    def call(self, host: str = "127.0.0.1", port: int = 0) -> "Client":
        """Return a new connection to its program."""
        return Client.connect(host, port or self.host_port)


class Client:
    """A line-wise connection that stays open."""

    open_ones: ClassVar[list["Client"]] = []
    """All that were made; those of a test are closed at its end."""

    def __init__(self, connection: socket.socket) -> None:
        self.socket = connection
        self._rest = b""
        self.open_ones.append(self)

    @classmethod
    def connect(cls, host: str, port: int, deadline: float = 15.0) -> Self:
        """Return a connection; ``deadline``, in seconds, holds for every answer too."""
        return cls(socket.create_connection((host, port), timeout=deadline))

    @classmethod
    def when_ready(cls, host: str, port: int, ask: str = "hello") -> Self:
        """Return a connection to a server that has just been started."""

        def attempt() -> Self | None:
            client = None
            try:
                client = cls.connect(host, port)
                client.ask(ask)
            except OSError:
                if client:
                    client.close()
                return None
            return client

        found: Self = wait_until(attempt, f"a server at {host} port {port}")
        return found

    def ask(self, line: str) -> str:
        """Send a line and return the line that comes back."""
        self.socket.sendall(line.encode() + b"\n")
        return self.line()

    def line(self) -> str:
        """Return the next line. Raises ConnectionError at the end of the stream."""
        while b"\n" not in self._rest:
            self._more()
        line, self._rest = self._rest.split(b"\n", 1)
        return line.decode().rstrip("\r")

    def bytes(self, size: int) -> bytes:
        """Return exactly so many bytes."""
        while len(self._rest) < size:
            self._more()
        found, self._rest = self._rest[:size], self._rest[size:]
        return found

    def _more(self) -> None:
        got = self.socket.recv(1 << 16)
        if not got:
            raise ConnectionError("the other side has closed the connection")
        # At once, not 40 ms later, when it would be a packet for a container that has gone to sleep (tcp(7)).
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_QUICKACK, 1)
        self._rest += got

    def close(self) -> None:
        """End the connection."""
        self.socket.close()


class Valkey(Client):
    """A client of valkey over one connection: RESP, the serialisation of its protocol."""

    def command(self, *words: str | int) -> Any:
        """Send a command and return the reply as str, int, list or None."""
        self.socket.sendall(encode(words))
        return self.reply()

    def reply(self) -> Any:
        """Return the next reply."""
        line = self.line()
        kind, rest = line[0], line[1:]
        if kind == "+":
            return rest
        if kind == "-":
            raise RuntimeError(rest)
        if kind == ":":
            return int(rest)
        if kind == "$":
            return None if rest == "-1" else self.bytes(int(rest) + 2)[:-2].decode()
        assert kind == "*", line
        return [self.reply() for _ in range(int(rest))]


class Lab:
    """Starts containers and takes them away again."""

    def __init__(self, footprint: Footprint) -> None:
        self.footprint = footprint
        self.closing = contextlib.ExitStack()

    def start(
        self,
        stem: str,
        *command: str,
        image: str = TEST_IMAGE,
        options: Sequence[str] = (),
        annotations: dict[str, object] | None = None,
        runtime: str = "runc-architect",
        program_port: int = PORT,
        name: str | None = None,
        idle: str | None = "10m",
        monitor: str | None = "packets",
        between: Callable[[], None] | None = None,
        **more: object,
    ) -> Container:
        """Start a container that is managed, but for ``runtime="runc"``; its port is published.

        ``annotations`` stand instead of those that ``idle``, ``monitor`` and ``more`` make. ``between`` is
        called when the container exists and its program does not run.
        """
        name = name or unique(stem)
        port = free_port()
        if annotations is None:
            annotations = settings(name, idle=idle, monitor=monitor, **more)
        words = ["podman", "--runtime", runtime, *(("create",) if between else ("run", "-d"))]
        words += ["--name", name]
        words += ["-p", f"127.0.0.1:{port}:{program_port}"]
        for key, value in annotations.items():
            words += annotation(key, value)
        self.closing.callback(remove, name)
        identity = must(*words, *options, image, *command).splitlines()[-1]
        if between:
            must("podman", "--runtime", runtime, "init", name)
            between()
            must("podman", "--runtime", runtime, "start", name)
        self.footprint.add(name)
        return Container(name, identity, port)

    def subject(self, stem: str, **keywords: Any) -> Container:
        """Start SUBJECT and wait until it answers."""
        container = self.start(stem, "python3", "-c", SUBJECT, **keywords)
        if "-d" not in keywords.get("options", ()):
            Client.when_ready("127.0.0.1", container.host_port).close()
        return container

    def valkey(self, stem: str, **keywords: Any) -> Container:
        """Start a valkey and wait until it answers."""
        words = "valkey-server --bind 0.0.0.0 :: --protected-mode no --enable-debug-command yes"
        container = self.start(
            stem, *words.split(), "--save", "", image=VALKEY_IMAGE, program_port=6379, **keywords
        )
        Client.when_ready("127.0.0.1", container.host_port, "PING").close()
        return container

    def close(self) -> None:
        """Take everything away."""
        self.closing.close()


def remove(name: str) -> None:
    """Remove a container, if it is still there."""
    if run("podman", "container", "exists", name).code == 0:
        podman("rm", "-f", "-t", "0", name)


@contextlib.contextmanager
def lab(footprint: Footprint) -> Iterator[Lab]:
    """A lab that is empty again afterwards."""
    made = Lab(footprint)
    try:
        yield made
    finally:
        made.close()


def available() -> int:
    """Return the machine's MemAvailable and what waits in the kernel's per-CPU lists, in bytes.

    Pages freed lately stay in those lists for the same CPU's next allocation, since Linux 6.7 up to an eighth
    of the machine (``pcp->high_max`` of mm/page_alloc.c); they are free, yet not in MemAvailable
    (proc(5), /proc/meminfo and /proc/zoneinfo).
    """
    found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert found, "/proc/meminfo has no MemAvailable"
    lists = re.findall(r"^\s+count:\s+(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return int(found[1]) * 1024 + sum(map(int, lists)) * os.sysconf("SC_PAGE_SIZE")
