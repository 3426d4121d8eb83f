"""The daemon's care for the process that answers probes: its end is noticed, told, and another one comes."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

import pytest

from architect.adapters import healthproxy
from architect.contract import paths
from architect.contract.annotations import PortMapping
from architect.contract.records import ContainerRecord
from architect.processes.architectd import proxy as upkeep
from architect.processes.architectd.proxy import Proxy
from tests.unit import probed

ONE, OTHER = PortMapping("app", 80, 18080), PortMapping("app", 81, 18081)
WORKS = "echo health-check-proxy: it begins; exec sleep 1000"
CANNOT = "echo it begins; echo health-check-proxy: no such port >&2; exit 1"
DEADLINE_S = 10.0
OWN_SPACE = Path("/proc/self/ns/net")


class Bench:
    """Stands in for the adapter: what it starts are shells."""

    def __init__(self) -> None:
        self.script = WORKS
        self.started: list[tuple[PortMapping, ...]] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.found = 0
        self.told: list[str] = []
        self.refusal: OSError | None = None

    def find(self, pid: int, namespace: Path, mappings: Collection[PortMapping]) -> int:
        return self.found

    def start(self, namespace: Path, mappings: Collection[PortMapping], log: Path) -> int:
        if self.refusal is not None:
            raise self.refusal
        self.started.append(tuple(mappings))
        with log.open("wb") as output:
            words = ["sh", "-c", self.script]
            process = subprocess.Popen(words, stdout=output, stderr=output)
        self.processes.append(process)
        return process.pid

    @property
    def last(self) -> int:
        return self.processes[-1].pid

    def has_started(self, times: int) -> bool:
        return len(self.started) >= times

    def alive(self) -> list[int]:
        return [one.pid for one in self.processes if Path(f"/proc/{one.pid}/exe").exists()]


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Bench]:
    made = Bench()
    (tmp_path / "x").mkdir()
    monkeypatch.setattr(paths, "CONTAINERS", tmp_path)
    monkeypatch.setattr(healthproxy, "find", made.find)
    monkeypatch.setattr(healthproxy, "start", made.start)
    monkeypatch.setattr(upkeep, "_RETRY_S", 0.05)
    monkeypatch.setattr(upkeep, "_LONGEST_RETRY_S", 0.1)
    yield made
    for process in made.processes:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        process.wait()


@pytest.fixture
def record() -> ContainerRecord:
    return ContainerRecord(
        id="x",
        namespace="default",
        pod="p",
        container="app",
        bundle="/x",
        runtime_root="/x",
        annotations={},
        engine=[],
        rootfs="/x",
        shared_ipc=False,
        keeper=os.getpid(),
    )


async def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < end, f"after {DEADLINE_S:g} s still waiting for {what}"
        await asyncio.sleep(0.005)


def test_killed_one_is_started_again_and_its_end_is_told(
    bench: Bench, record: ContainerRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_BEGUN_S", 0.0)
    log = paths.CONTAINERS / "x/health-check-proxy.log"

    async def body() -> None:
        proxy = Proxy(record, bench.told.append)
        proxy.serve([ONE])
        for number in range(1, 4):
            assert record.proxy == bench.last
            await until(lambda: log.read_text().endswith("it begins\n"), "it to begin")
            os.kill(bench.last, signal.SIGKILL)
            await until(functools.partial(bench.has_started, number + 1), "another one")
            assert len(bench.told) == number
            assert 'ended by SIGKILL, its last words: "it begins";' in bench.told[-1]
            assert len(bench.alive()) == 1
        assert bench.started == [(ONE,)] * 4
        assert "started again in 0.05 s" in bench.told[0]
        assert "started again in 0.1 s" in bench.told[1]
        assert "started again in 0.1 s" in bench.told[2]

    asyncio.run(body())


def test_one_that_works_for_long_is_started_again_as_soon_as_the_first(
    bench: Bench, record: ContainerRecord, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "_BEGUN_S", 0.0)
    monkeypatch.setattr(upkeep, "_STEADY_S", 0.0)

    async def body() -> None:
        Proxy(record, bench.told.append).serve([ONE])
        for number in range(1, 4):
            os.kill(bench.last, signal.SIGKILL)
            await until(functools.partial(bench.has_started, number + 1), "another one")
        assert all("started again in 0.05 s" in one for one in bench.told)

    asyncio.run(body())


def test_one_that_cannot_work_is_told_of_once_and_tried_again(
    bench: Bench, record: ContainerRecord
) -> None:
    bench.script = CANNOT

    async def body() -> None:
        Proxy(record, bench.told.append).serve([ONE])
        await until(lambda: len(bench.started) == 4, "more tries")
        (told,) = bench.told
        assert 'ended with status 1, its last words: "no such port"; it is started again' in told
        bench.script = WORKS
        await until(lambda: bench.alive() == [bench.last], "one that works")
        assert len(bench.told) == 1

    asyncio.run(body())


def test_it_is_tried_again_where_it_cannot_even_be_started(
    bench: Bench, record: ContainerRecord
) -> None:
    bench.refusal = PermissionError(13, "Permission denied", "/the/program")

    async def body() -> None:
        Proxy(record, bench.told.append).serve([ONE])
        await until(lambda: bench.told, "the event")
        assert "nobody answers its probes: [Errno 13] Permission denied" in bench.told[0]
        bench.refusal = None
        await until(bench.alive, "a process")

    asyncio.run(body())


def test_that_of_an_earlier_daemon_goes_on_and_is_watched(
    bench: Bench, record: ContainerRecord
) -> None:
    earlier = bench.start(OWN_SPACE, [ONE], paths.CONTAINERS / "x/health-check-proxy.log")
    record.proxy = bench.found = earlier

    async def body() -> None:
        Proxy(record, bench.told.append).serve([ONE])
        assert (record.proxy, len(bench.started)) == (earlier, 1)
        os.kill(earlier, signal.SIGKILL)
        await until(lambda: len(bench.started) == 2, "another one")
        assert len(bench.told) == 1

    asyncio.run(body())


def test_end_while_no_daemon_ran_is_told(bench: Bench, record: ContainerRecord) -> None:
    (paths.CONTAINERS / "x/health-check-proxy.log").write_text("first\nlast\n")
    record.proxy = 2**22 + 1  # a pid that no kernel gives (proc(5), pid_max)

    async def body() -> None:
        Proxy(record, bench.told.append).serve([ONE])
        assert len(bench.started) == 1
        (told,) = bench.told
        assert 'ended while no architectd ran, its last words: "last"; it is started again' in told

    asyncio.run(body())


def test_without_mappings_it_ends_and_nothing_is_told(
    bench: Bench, record: ContainerRecord
) -> None:
    async def body() -> None:
        proxy = Proxy(record, bench.told.append)
        proxy.serve([ONE])
        proxy.serve(())
        await until(lambda: not record.proxy, "its end")
        await asyncio.sleep(0.2)  # several times as long as until it would be started again
        assert (bench.alive(), len(bench.started), bench.told) == ([], 1, [])

    asyncio.run(body())


def test_it_is_not_started_again_for_what_was_taken_away_meanwhile(
    bench: Bench, record: ContainerRecord
) -> None:
    bench.script = CANNOT

    async def body() -> None:
        proxy = Proxy(record, bench.told.append)
        proxy.serve([ONE])
        await until(lambda: bench.told, "its end")
        proxy.serve(())
        started = len(bench.started)
        await asyncio.sleep(0.2)
        assert len(bench.started) == started
        assert record.proxy == 0

    asyncio.run(body())


def test_successor_for_other_mappings_comes_when_the_ports_are_free(
    bench: Bench, record: ContainerRecord
) -> None:
    async def body() -> None:
        proxy = Proxy(record, bench.told.append)
        proxy.serve([ONE])
        proxy.serve([ONE])
        assert bench.started == [(ONE,)]
        proxy.serve([OTHER])
        assert bench.started == [(ONE,)]
        await until(lambda: len(bench.started) == 2, "the successor")
        assert bench.started[-1] == (OTHER,)
        assert bench.alive() == [bench.last] == [record.proxy]
        assert bench.told == []

    asyncio.run(body())


def test_in_a_cluster_the_pod_has_its_own(bench: Bench, record: ContainerRecord) -> None:
    Proxy(record, bench.told.append, sidecar=True).serve([ONE])
    assert bench.started == []


def test_it_is_found_by_what_it_runs_and_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = probed.build(tmp_path)
    monkeypatch.setattr(paths, "PROXY_PROGRAM", program)
    mapping = PortMapping(probed.fresh_name(), 1, probed.free_port())
    words = [str(program), "--map", f"{mapping.container}:{mapping.shadow_port}:{mapping.app_port}"]
    with subprocess.Popen(words, stderr=subprocess.PIPE) as process:
        try:
            assert process.stderr
            assert process.stderr.readline(), "it did not begin"  # and so has read its words
            for written in (process.pid, os.getpid(), 2**22 + 1):
                assert healthproxy.find(written, OWN_SPACE, [mapping]) == process.pid
            assert healthproxy.find(0, OWN_SPACE, [mapping]) == 0
            assert healthproxy.find(process.pid, OWN_SPACE, [OTHER]) == 0
            # Of another kind of namespace, so another one for certain.
            assert healthproxy.find(process.pid, Path("/proc/self/ns/mnt"), [mapping]) == 0
            healthproxy.end(os.getpid())
            healthproxy.end(process.pid)
            assert process.wait(DEADLINE_S) == 0
        finally:
            process.kill()
    with pytest.raises(FileNotFoundError):
        healthproxy.find(process.pid, tmp_path / "gone", [mapping])
