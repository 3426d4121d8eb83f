"""What goes wrong, and that nothing is lost by it: dead daemons, full disks, damaged checkpoints."""

import contextlib
import json
import os
import random
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from architect.adapters.keeper import KeeperStatus, PagerState
from architect.contract import paths
from architect.contract.records import Request
from architect.processes.cli import client as daemon_client
from tests.engine.support import (
    SUBJECT,
    Client,
    Container,
    Lab,
    Valkey,
    architect,
    cgroup_of,
    must,
    podman,
    run,
    wait_until,
)

pytestmark = pytest.mark.engine

KILLS = 100
CYCLES = 300
MEGABYTES = 200
PAGE = 4096
RSEQ = 32
"""Bytes of struct rseq."""
STEP = 4000
"""Pages that a page server places before it is killed."""


def daemon_pid() -> int:
    pid = daemon_client.daemon_pid()
    assert pid is not None, "architectd does not run"
    return pid


def kill_daemon() -> None:
    """SIGKILL, and wait until it is gone."""
    pid = daemon_pid()
    process = os.pidfd_open(pid)
    os.kill(pid, signal.SIGKILL)
    try:
        # Not /proc/PID: it loses its memory, and with it its name, before it loses its sockets.
        assert select.select([process], [], [], 10.0)[0], "architectd is gone"
    finally:
        os.close(process)


@pytest.fixture
def no_daemon() -> Iterator[None]:
    """A test in which the daemon is away; it is back afterwards."""
    must("architect", "down")
    yield
    must("architect", "up")


def keeper_status(container: Container) -> KeeperStatus:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as keeper:
        keeper.connect(str(paths.CONTAINERS / container.id / "ctl"))
        keeper.send(b"status")
        return KeeperStatus.parse(keeper.recv(4096).decode())


# ---- the daemon dies ---------------------------------------------------------------------------


def test_daemon_killed_at_any_instant_loses_nothing(lab: Lab) -> None:
    container = lab.valkey("kills")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("DEBUG", "POPULATE", 5000, "key", 1000)
    chance = random.Random(1)
    slept = 0
    for count in range(1, KILLS + 1):
        sleeper = subprocess.Popen(
            ["architect", "sleep", container.name],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        # No condition to wait for: the instant is the point of the test.
        threading.Event().wait(chance.uniform(0.0, 0.4))
        kill_daemon()
        sleeper.wait(10)
        must("architect", "up")
        slept += keeper_status(container).phase == "hibernated"
        assert client.command("INCR", "count") == count
    assert client.command("DBSIZE") == 5001
    assert slept > 0, "no kill came after a hibernation"
    assert slept < KILLS, "no kill came before the commit"


def test_daemon_away_packets_are_dropped_never_reset(lab: Lab) -> None:
    container = lab.valkey("away")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("SET", "a", "1")
    container.sleep()
    kill_daemon()
    client.socket.sendall(b"*2\r\n$3\r\nGET\r\n$1\r\na\r\n")
    client.socket.settimeout(1.0)
    with pytest.raises(TimeoutError):
        client.line()
    must("architect", "up")
    client.socket.settimeout(15.0)
    assert client.reply() == "1"


def test_verbs_with_the_daemon_away(lab: Lab) -> None:
    container = lab.subject("alone")
    container.sleep()
    must("architect", "down")
    try:
        assert podman("ps", "--filter", f"name={container.name}", "--format", "{{.State}}")
        done = container.exec("true")
        assert done.code != 0
        assert "architect up" in done.err
        podman("stop", "-t", "10", container.name)
        assert "term" in container.logs(), "the signal reached the program"
    finally:
        must("architect", "up")
    assert container.exit_code == 7, "the program's own"


def test_killed_container_of_an_absent_daemon_is_cleared_away(lab: Lab) -> None:
    container = lab.subject("orphan")
    container.sleep()
    must("architect", "down")
    try:
        podman("rm", "-f", "-t", "0", container.name)
    finally:
        must("architect", "up")
    assert not (paths.CONTAINERS / container.id).exists()
    assert not (paths.CHECKPOINTS / container.id).exists()


def test_container_created_before_the_daemon_is_found(lab: Lab, no_daemon: None) -> None:
    container = lab.subject("early", idle="1s")
    must("architect", "up")
    container.await_state("SCALED_DOWN")
    assert Client.connect("127.0.0.1", container.host_port).ask("hello")


@pytest.fixture
def unanswered() -> Iterator[Callable[[], None]]:
    """Until it is called nobody reaches the daemon, which runs and knows of nothing that happens."""
    aside = paths.DAEMON_SOCKET.with_suffix(".aside")
    paths.DAEMON_SOCKET.rename(aside)

    def back() -> None:
        aside.rename(paths.DAEMON_SOCKET)

    yield back
    if aside.exists():
        back()


def test_container_created_while_the_daemon_looked_elsewhere_is_taken_in(
    lab: Lab, daemon: str, unanswered: Callable[[], None]
) -> None:
    """A daemon that has just looked for containers, and does not answer yet, is not told of a new one."""
    container = lab.subject("unseen", idle="1s", between=unanswered)
    container.await_state("SCALED_DOWN")
    assert Client.connect("127.0.0.1", container.host_port).ask("hello")


def test_second_daemon_refuses(daemon: str) -> None:
    pid = daemon_pid()
    done = run("/usr/local/lib/architect/venv/bin/architectd")
    assert done.code == 1
    assert "another architectd runs" in done.err
    assert daemon_pid() == pid


# ---- light load ----------------------------------------------------------------------------------


def test_random_cycles_under_light_load(lab: Lab) -> None:
    """Hibernated at random moments while a client asks at random moments: in order, once, all of it."""
    container = lab.valkey("cycles")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("DEBUG", "POPULATE", 2000, "key", 1000)
    stop = threading.Event()
    slept, refused = [0], [0]

    def sleeper() -> None:
        chance = random.Random(2)
        while not stop.is_set():
            try:
                rows = daemon_client.ask(Request(verb="sleep", pod=container.name))
                slept[0] = json.loads(rows)[0]["hibernations"]
            except daemon_client.Refused:
                refused[0] += 1
            stop.wait(chance.uniform(0.0, 0.05))

    thread = threading.Thread(target=sleeper)
    thread.start()
    chance = random.Random(3)
    count = 0
    try:
        deadline = time.monotonic() + 480
        while slept[0] < CYCLES:
            assert time.monotonic() < deadline, f"{slept[0]} of {CYCLES} cycles in time"
            for _ in range(chance.randrange(1, 4)):
                count += 1
                assert client.command("INCR", "count") == count
            stop.wait(chance.uniform(0.0, 0.8))
    finally:
        stop.set()
        thread.join(30)
    assert client.command("DBSIZE") == 2001
    assert container.hibernations() >= CYCLES


# ---- a dump that fails -------------------------------------------------------------------------


def test_full_disk_leaves_the_container_running(lab: Lab) -> None:
    container = lab.valkey("full")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("DEBUG", "POPULATE", 20000, "key", 1000)
    must("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(paths.CHECKPOINTS))
    try:

        def failed() -> bool:
            # A late acknowledgement of ours may give a dump up before the disk is full.
            assert run("architect", "sleep", container.name).code == 1
            return bool(container.events("CheckpointFailed"))

        wait_until(failed, "a dump to fail")
        assert container.state() == "RUNNING"
        assert client.command("DBSIZE") == 20000
        assert "runs on" in container.events("CheckpointFailed")[-1]["message"]
        assert not list(paths.CHECKPOINTS.glob(f"{container.id}/.dump-*"))
    finally:
        must("umount", str(paths.CHECKPOINTS))
    container.sleep()
    assert client.command("DBSIZE") == 20000


def foreign_socket() -> str | None:
    """An expression for a socket of a family that CRIU does not know, if this kernel has one."""
    for made in ("socket.AF_VSOCK, socket.SOCK_STREAM", "socket.AF_ALG, socket.SOCK_SEQPACKET"):
        if run("python3", "-c", f"import socket\nsocket.socket({made})").code == 0:
            return f"socket.socket({made})"
    return None


def test_program_that_criu_cannot_take_runs_on(lab: Lab) -> None:
    foreign = foreign_socket()
    if foreign is None:
        pytest.skip("this kernel has neither AF_VSOCK nor AF_ALG (CONFIG_VSOCKETS)")
    program = f"import socket\nkept = {foreign}\n{SUBJECT}"
    container = lab.start(
        "foreign", "python3", "-c", program, options=["--security-opt", "seccomp=unconfined"]
    )
    client = Client.when_ready("127.0.0.1", container.host_port)
    done = run("architect", "sleep", container.name)
    assert done.code == 1
    assert "could not be hibernated" in done.err
    assert client.ask("still there")
    assert container.state() == "RUNNING"
    assert container.events("CheckpointFailed")


def test_container_whose_packets_cannot_be_held_stays_awake(lab: Lab) -> None:
    # More ports than a gate has room for.
    container = lab.subject("crowd", options=["--expose", "20000-21100"])
    wait_until(lambda: container.events("Warning"), "the warning that there is no gate")
    done = run("architect", "sleep", container.name)
    assert done.code == 1
    assert "packets for it cannot be held" in done.err
    assert container.state() == "RUNNING"
    client = Client.connect("127.0.0.1", container.host_port)
    assert client.ask("still there") == "still there"
    assert container.events("CheckpointFailed")
    client.close()


# ---- damaged checkpoints -----------------------------------------------------------------------


def _flip(file: Path) -> None:
    contents = bytearray(file.read_bytes())
    contents[len(contents) // 2] ^= 0xFF
    file.write_bytes(contents)


def _metadata(images: Path) -> None:
    _flip(images / "core-1.img")


def _missing(images: Path) -> None:
    (images / "mm-1.img").unlink()


def _truncated(images: Path) -> None:
    pages = images / "pages-1.img"
    os.truncate(pages, pages.stat().st_size - 4096)


def _exchanged(images: Path) -> None:
    (images / "core-1.img").rename(images / "x.img")
    (images / "mm-1.img").rename(images / "core-1.img")
    (images / "x.img").rename(images / "mm-1.img")


def _added(images: Path) -> None:
    (images / "core-99.img").write_bytes(b"not ours")


def _manifest(images: Path) -> None:
    (images / "manifest.json").write_text("{")


def _version(images: Path) -> None:
    manifest = json.loads((images / "manifest.json").read_text())
    manifest["format"] = 999
    (images / "manifest.json").write_text(json.dumps(manifest))


def regular_files(images: Path) -> list[Path]:
    """All but the socket at which the pager waits."""
    return [file for file in images.iterdir() if file.is_file()]


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (_metadata, "other contents"),
        (_missing, "No such file"),
        (_truncated, "bytes instead of"),
        (_exchanged, "bytes instead of"),
        (_added, "was not written by the dump"),
        (_manifest, "manifest.json"),
        (_version, "999"),
    ],
    ids=["metadata", "missing", "truncated", "exchanged", "added", "manifest", "version"],
)
def test_damaged_checkpoint_is_refused_kept_and_reported(
    lab: Lab, damage: Callable[[Path], None], word: str
) -> None:
    container = lab.valkey("damaged")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("SET", "a", "1")
    container.sleep()
    images = container.checkpoint()
    assert images is not None
    good = images.with_name("good")
    good.mkdir()
    for file in regular_files(images):
        shutil.copy2(file, good)
    damage(images)
    done = run("architect", "wake", container.name)
    assert done.code == 1
    assert word in done.err
    assert container.state() == "SCALED_DOWN"
    assert container.processes() == [container.keeper], "nothing was started"
    assert images.exists(), "it is kept"
    assert word in container.events("RestoreFailed")[-1]["message"]
    for file in regular_files(images):
        file.unlink()
    for file in good.iterdir():
        file.rename(images / file.name)
    good.rmdir()
    assert client.command("GET", "a") == "1"


def test_damaged_page_data_is_reported_after_the_wake(lab: Lab) -> None:
    container = lab.valkey("pages")
    client = Valkey.connect("127.0.0.1", container.host_port)
    mark = "architect-mark-" * 400
    client.command("SET", "marked", mark)
    container.sleep()
    images = container.checkpoint()
    assert images is not None
    wait_until(lambda: (images / "pages.digests.json").exists(), "the digests of the page data")
    pages = images / "pages-1.img"
    contents = bytearray(pages.read_bytes())
    # The value lies there more than once: buffers of the connection still have it.
    place = contents.find(mark.encode())
    while place >= 0:
        contents[place + len(mark) // 2] ^= 1
        place = contents.find(mark.encode(), place)
    pages.write_bytes(contents)
    found = client.command("GET", "marked")
    assert found != mark, "the flipped bit came through"
    wait_until(lambda: container.events("CheckpointDamaged"), "the event")


# ---- the page server dies ------------------------------------------------------------------------


def await_stop(pid: int) -> None:
    """Waits until every thread has taken the SIGSTOP."""

    def stopped() -> bool:
        stats = [file.read_text() for file in Path(f"/proc/{pid}/task").glob("*/stat")]
        return all(stat.rpartition(")")[2].split()[0] == "T" for stat in stats)

    wait_until(stopped, "all threads to stop")


def stack_pointers(pid: int) -> list[int]:
    """Of each thread of a stopped process (proc(5), /proc/PID/task/TID/syscall)."""
    pointers = []
    for thread in Path(f"/proc/{pid}/task").iterdir():
        words = (thread / "syscall").read_text().split()
        pointers.append(int(words[-2], 16))
    return pointers


def private_memory(pid: int) -> dict[int, bytes]:
    """Each page of private memory of a stopped process, by its address.

    What lies below a stack pointer is left out: it belongs to nobody, and CRIU's signal frames were there.
    """
    pointers = stack_pointers(pid)
    pages = {}
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            span, mode, _, _, _, *name = line.split(maxsplit=5)
            start, end = (int(side, 16) for side in span.split("-"))
            if "p" not in mode or "r" not in mode or (name and name[0].startswith("[v")):
                continue
            pointer = max((one for one in pointers if start <= one < end), default=start)
            place = pointer & -PAGE
            while place < end:
                first = max(place, pointer)
                memory.seek(first)
                pages[place] = memory.read(place + PAGE - first)
                place += PAGE
    return pages


def same(before: bytes, after: bytes) -> bool:
    """Whether a page is what it was, but for the processor's number, which the kernel keeps for rseq(2)."""
    if before == after:
        return True
    places = [place for place in range(len(before)) if before[place] != after[place]]
    return places[-1] - places[0] < RSEQ


def test_page_server_killed_in_mid_fill_keeps_every_byte(lab: Lab) -> None:
    container = lab.valkey("filled")
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("DEBUG", "POPULATE", MEGABYTES * 1000, "key", 1000)
    client.command("SET", "a", "1")
    init = keeper_status(container).init
    # Stopped, it changes nothing by itself: what differs afterwards is our doing.
    os.kill(init, signal.SIGSTOP)
    await_stop(init)
    before = private_memory(init)
    container.sleep()
    architect_wake = threading.Thread(target=architect, args=("wake", container.name))
    architect_wake.start()
    kills, below = 0, MEGABYTES * 256

    def fill_is_over() -> bool:
        nonlocal kills, below
        status = keeper_status(container)
        # Each has placed something before it dies; five in a row that did not are given up.
        if status.pager_state is PagerState.FILLING and 0 < status.left < below:
            below = status.left - STEP
            with contextlib.suppress(ProcessLookupError):
                os.kill(status.pager, signal.SIGKILL)
                kills += 1
        return status.phase == "running" and status.pager_state is PagerState.DONE

    wait_until(fill_is_over, "all pages to be in", 60.0)
    architect_wake.join(30)
    assert kills > 0, "the fill was over before the first kill"
    init = keeper_status(container).init
    await_stop(init)
    after = private_memory(init)
    assert before.keys() == after.keys()
    different = [hex(place) for place in before if not same(before[place], after[place])]
    assert not different
    os.kill(init, signal.SIGCONT)
    assert client.command("GET", "a") == "1"


# ---- limits ----------------------------------------------------------------------------------------


def test_cpu_quota_weight_and_memory_limit_are_lifted_for_the_wake_only(lab: Lab) -> None:
    container = lab.valkey("limited", options=["--cpus", "0.1", "--memory", "64m"])
    client = Valkey.connect("127.0.0.1", container.host_port)
    client.command("SET", "a", "1")
    files = [
        file
        for controller, names in {
            "cpu": ("cpu.cfs_quota_us", "cpu.max", "cpu.shares", "cpu.weight"),
            "memory": ("memory.limit_in_bytes", "memory.max"),
        }.items()
        for name in names
        if (file := cgroup_of(container.keeper, controller) / name).exists()
    ]
    assert len(files) == 3
    before = [file.read_text() for file in files]
    container.sleep()
    seen: list[set[str]] = [set() for _ in files]
    awake = threading.Event()

    def look() -> None:
        while not awake.is_set():
            for file, values in zip(files, seen, strict=True):
                values.add(file.read_text())

    looking = threading.Thread(target=look)
    looking.start()
    try:
        assert client.command("GET", "a") == "1"
        container.await_state("RUNNING")
    finally:
        awake.set()
        looking.join()
    for file, values, one in zip(files, seen, before, strict=True):
        assert values > {one}, f"{file} was not lifted"
    wait_until(lambda: [file.read_text() for file in files] == before, "the limits to be back")
