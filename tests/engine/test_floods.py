"""Floods at a sleeper's port, 100,000 packets a second: it wakes once, or not at all; others are served."""

import contextlib
import ipaddress
import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import pytest

from architect.adapters import netns
from architect.adapters.gate import HELD_PACKETS
from architect.processes.cli import client as daemon_client
from tests.engine.servers.machine import Machine
from tests.engine.support import PORT, Client, Container, Lab, architect, must, wait_until

pytestmark = pytest.mark.engine

RATE: Final = 100_000
"""Packets a second that are sent."""
FLOOR: Final = 20_000
"""Packets a second that have to arrive on a machine that can send twice as many."""
UNDECLARED: Final = 7100
FLOOD_S: Final = 3.0
LONGEST_S: Final = 20.0
"""When a flood ends by itself, whatever the test does."""
GROWTH_BYTES: Final = 10 << 20
"""What a flood may add to architectd's memory; all of it may have 50 MB (docs/architecture.md)."""
CPU_SHARE: Final = 0.1
"""Of one core: what architectd may use while packets that wake nobody are dropped."""

SINK: Final = f"""
import select, socket
tcp = socket.create_server(("", {PORT}))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("", {PORT}))
open_ones, count = [tcp, udp], 0
while True:
    for one in select.select(open_ones, [], [])[0]:
        if one is tcp:
            open_ones.append(one.accept()[0])
        elif one is udp:
            one.recv(2048)
            count += 1
        elif one.recv(2048):
            one.sendall(b"%d\\n" % count)
        else:
            open_ones.remove(one)
            one.close()
"""
"""Counts datagrams, and tells how many there were to whoever sends a line."""


@pytest.fixture(scope="module")
def flooder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program that sends the floods."""
    compiler = shutil.which("gcc")
    if compiler is None:
        pytest.skip("no gcc to compile the sender with: `make setup` installs it")
    program = tmp_path_factory.mktemp("flood") / "flood"
    source = Path(__file__).with_name("flood.c")
    must(compiler, "-std=gnu11", "-O2", "-Wall", "-Wextra", "-o", str(program), str(source))
    return program


def plain(lab: Lab, stem: str) -> Machine:
    """Start a container of plain runc, to send from."""
    return Machine(lab.start(stem, "sleep", "infinity", runtime="runc", annotations={}))


@pytest.fixture(scope="module")
def origin(shared_lab: Lab) -> Iterator[Machine]:
    """Where the floods come from."""
    with contextlib.closing(plain(shared_lab, "flooder")) as machine:
        yield machine


@pytest.fixture(scope="module")
def client(shared_lab: Lab) -> Iterator[Machine]:
    """Where an honest client is."""
    with contextlib.closing(plain(shared_lab, "honest")) as machine:
        yield machine


class Flood:
    """A flood at one port of a container, for as long as the block runs."""

    def __init__(
        self, program: Path, origin: Machine, target: Container, protocol: str, port: int = PORT
    ) -> None:
        self._place = Path(f"/proc/{target.keeper}/ns/net")
        words = [program, "eth0", _network(target, "MacAddress"), _nobody(target), target.address]
        words += [port, protocol, RATE, LONGEST_S]
        entered = ["nsenter", "-t", origin.container.keeper, "-n", "--"]
        self._words = [str(word) for word in (*entered, *words)]
        self.rate = 0.0
        """Packets a second that have arrived; known at its end."""

    def _arrived(self) -> int:
        place = netns.open_netns(self._place)
        try:
            with netns.entered(place):
                lines = Path("/proc/thread-self/net/dev").read_text().splitlines()
        finally:
            os.close(place)
        (fields,) = (line.split() for line in lines if line.strip().startswith("eth0:"))
        return int(fields[2])

    def __enter__(self) -> Self:
        self._before, self._begun = self._arrived(), time.monotonic()
        self._process = subprocess.Popen(self._words, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.terminate()
        sent, _ = self._process.communicate(timeout=10)
        seconds = time.monotonic() - self._begun
        self.rate = (self._arrived() - self._before) / seconds
        if error is None:
            assert self._process.returncode == 0
            assert int(sent) > 0

    def goes_on(self) -> bool:
        """Whether it has not ended yet."""
        return self._process.poll() is None

    def lasts(self, seconds: float) -> None:
        """Wait until it has gone on for so long."""
        wait_until(lambda: time.monotonic() > self._begun + seconds, "the flood to go on")
        assert self.goes_on()


def _network(container: Container, field: str) -> str:
    return container.inspect(f"{{{{range .NetworkSettings.Networks}}}}{{{{.{field}}}}}{{{{end}}}}")


def _nobody(container: Container) -> str:
    """An address of the container's network that nobody has: answers go nowhere."""
    network = ipaddress.ip_network(
        f"{container.address}/{_network(container, 'IPPrefixLen')}", strict=False
    )
    return str(network.broadcast_address - 2)


def say(capsys: pytest.CaptureFixture[str], what: str, flood: Flood) -> None:
    with capsys.disabled():
        print(f"[{what}: {flood.rate:,.0f} packets/s arrived]", end=" ", flush=True)


@pytest.fixture(scope="module")
def possible(shared_lab: Lab, flooder: Path, origin: Machine) -> float:
    """Packets a second that can be had here: measured at a port that is nobody's, of a sleeper."""
    container = shared_lab.subject("aside")
    container.sleep()
    with Flood(flooder, origin, container, "tcp", UNDECLARED) as flood:
        flood.lasts(0.5)
    assert container.state() == "SCALED_DOWN"
    return flood.rate


class Daemon:
    """What architectd uses."""

    def __init__(self) -> None:
        pid = daemon_client.daemon_pid()
        assert pid is not None
        self.pid = pid
        self._place = Path(f"/proc/{pid}")
        (self._place / "clear_refs").write_text("5")  # proc(5): the highest is the present one
        self._resident, self._used = self._memory("VmRSS"), self._cpu()
        self._begun = time.monotonic()

    def _memory(self, field: str) -> int:
        lines = (self._place / "status").read_text().splitlines()
        (found,) = (line.split() for line in lines if line.startswith(f"{field}:"))
        return int(found[1]) * 1024

    def _cpu(self) -> float:
        fields = (self._place / "stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def growth(self) -> int:
        """By how many bytes it was larger since, at its largest."""
        return self._memory("VmHWM") - self._resident

    def share(self) -> float:
        """Of a core that it has used since."""
        return (self._cpu() - self._used) / (time.monotonic() - self._begun)

    def is_well(self) -> None:
        """It is the same process, and within its bound."""
        assert daemon_client.daemon_pid() == self.pid
        assert self.growth() < GROWTH_BYTES


def wakes(container: Container) -> int:
    return len(container.events("ScaledUp"))


def call(client: Machine, server: Container) -> Client:
    with client.inside():
        return Client.connect(server.address, PORT)


def at_full_rate(possible: float, flood: Flood) -> None:
    assert flood.rate >= FLOOR or possible < 2 * FLOOR, "no flood, though one was possible"


def wakes_once(
    server: Container, client: Machine, flood: Flood, ask: str, daemon: Daemon
) -> tuple[str, float]:
    """Flood a sleeper; return what it answered to an honest client meanwhile, and how late."""
    slept, woken = server.hibernations(), wakes(server)
    with client.capture() as capture, flood:
        begun = time.monotonic()
        honest = call(client, server)
        answer = honest.ask(ask)
        late = time.monotonic() - begun
        assert flood.goes_on()
        flood.lasts(FLOOD_S)
        assert server.state() == "RUNNING"
        daemon.is_well()
        assert flood.goes_on()
        assert capture.resets() == []
        assert capture.unanswered_openings() == []
        honest.close()
    assert wakes(server) == woken + 1
    server.await_state("SCALED_DOWN")
    assert server.hibernations() == slept + 1
    assert wakes(server) == woken + 1
    return answer, late


def test_syn_flood_wakes_once(
    lab: Lab,
    flooder: Path,
    origin: Machine,
    client: Machine,
    possible: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = lab.subject("flooded", idle="2s")
    server.sleep()
    daemon, flood = Daemon(), Flood(flooder, origin, server, "tcp")
    answer, late = wakes_once(server, client, flood, "hello", daemon)
    assert answer == "hello"
    say(capsys, f"SYNs; answer after {late:.2f} s, architectd +{daemon.growth() >> 10} kB", flood)
    at_full_rate(possible, flood)


def test_udp_flood_wakes_once(
    lab: Lab,
    flooder: Path,
    origin: Machine,
    client: Machine,
    possible: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--expose", f"{PORT}/udp"]
    server = lab.start("drowned", "python3", "-c", SINK, idle="2s", options=options)
    Client.when_ready("127.0.0.1", server.host_port).close()
    server.sleep()
    daemon, flood = Daemon(), Flood(flooder, origin, server, "udp")
    answer, late = wakes_once(server, client, flood, "how many?", daemon)
    assert int(answer) > 0
    say(capsys, f"UDP; answer after {late:.2f} s, architectd +{daemon.growth() >> 10} kB", flood)
    at_full_rate(possible, flood)


def test_flood_that_wakes_nobody_costs_the_daemon_nothing(
    lab: Lab,
    flooder: Path,
    origin: Machine,
    client: Machine,
    possible: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = lab.subject("silent", monitor=None)
    server.sleep()
    slept, woken = server.hibernations(), wakes(server)
    daemon = Daemon()
    with Flood(flooder, origin, server, "tcp") as flood:
        flood.lasts(FLOOD_S)
        assert daemon.share() < CPU_SHARE
        row = server.row()
        assert flood.goes_on()
    assert row is not None
    assert (row["state"], row["held_packets"]) == ("SCALED_DOWN", 0)
    assert row["dropped_packets"] > flood.rate * FLOOD_S / 2
    daemon.is_well()
    say(capsys, f"dropped SYNs; architectd {daemon.share():.1%} of a core", flood)
    at_full_rate(possible, flood)
    assert (server.hibernations(), wakes(server)) == (slept, woken)
    assert server.exec("true").code == 0
    assert call(client, server).ask("hello") == "hello"
    assert wakes(server) == woken + 1


def test_flood_at_a_sleeper_that_cannot_wake_is_bounded(
    lab: Lab,
    flooder: Path,
    origin: Machine,
    client: Machine,
    possible: float,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What is held goes on being held; all that comes after it is dropped in the kernel."""
    server = lab.subject("stranded")
    server.sleep()
    images = server.checkpoint()
    assert images is not None
    file, aside = images / "core-1.img", images.with_name("aside.img")
    file.rename(aside)
    woken, daemon = wakes(server), Daemon()
    with Flood(flooder, origin, server, "tcp") as flood:
        flood.lasts(FLOOD_S)
        row = server.row()
        assert flood.goes_on()
    assert row is not None
    assert row["state"] == "SCALED_DOWN"
    assert 0 < row["held_packets"] <= HELD_PACKETS
    assert row["dropped_packets"] > flood.rate * FLOOD_S / 2
    daemon.is_well()
    say(capsys, f"SYNs for a stranded one; architectd +{daemon.growth() >> 10} kB", flood)
    at_full_rate(possible, flood)
    aside.rename(file)
    architect("wake", server.name)
    assert call(client, server).ask("hello") == "hello"
    assert wakes(server) == woken + 1
