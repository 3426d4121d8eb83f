"""Whose a pod's ports are, where the engine does not say; and what an engine's silence does."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from typing import cast

import pytest

from architect.adapters import listeners, podman
from architect.adapters.cgroup import Cgroup
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord
from architect.processes.architectd import subject

WEB, CACHE, SPARE, NAMES = ("tcp", 80), ("tcp", 6379), ("tcp", 9000), ("udp", 53)
OWN, OTHERS = 100, 200
"""Processes of the container, and of a neighbour in its pod."""
HEALTHCHECK = ["CMD", "pg_isready", "-q"]


class Group:
    """A cgroup of which only this is asked."""

    def processes(self) -> list[int]:
        return [OWN]


GROUP = cast(Cgroup, Group())


def record(*, pod: str = "pod", engine: Sequence[str] = ("podman",)) -> ContainerRecord:
    return ContainerRecord(
        id="x",
        namespace="default",
        pod=pod,
        container="app",
        bundle="/x",
        runtime_root="/x",
        annotations={},
        engine=list(engine),
        rootfs="/x",
        shared_ipc=False,
        keeper=1,
    )


@pytest.fixture
def listening(monkeypatch: pytest.MonkeyPatch) -> dict[int, set[tuple[str, int]]]:
    """Who listens where; Podman lists all four ports for the pod."""
    found: dict[int, set[tuple[str, int]]] = {OWN: set(), OTHERS: set()}

    async def declared(*_: object) -> tuple[list[tuple[str, int]], list[str]]:
        return sorted([WEB, CACHE, SPARE, NAMES]), HEALTHCHECK

    def ports(keeper: int, pids: Collection[int] | None = None) -> set[tuple[str, int]]:
        return set().union(*(found[pid] for pid in (found if pids is None else pids)))

    monkeypatch.setattr(podman, "declared", declared)
    monkeypatch.setattr(listeners, "listening", ports)
    return found


def declared(of: ContainerRecord) -> set[tuple[str, int]]:
    return set(asyncio.run(subject.declared_ports(of, GROUP)))


def test_ports_of_a_neighbour_are_not_ours_and_those_of_nobody_are_everybodys(
    listening: dict[int, set[tuple[str, int]]],
) -> None:
    listening[OWN] = {WEB}
    listening[OTHERS] = {CACHE, NAMES}
    assert declared(record()) == {WEB, SPARE}
    # The number alone is not the port.
    listening[OTHERS] = {("udp", 80), ("tcp", 53)}
    assert declared(record()) == {WEB, CACHE, SPARE, NAMES}


def test_a_port_on_which_both_listen_is_ours_too(
    listening: dict[int, set[tuple[str, int]]],
) -> None:
    listening[OWN] = listening[OTHERS] = {WEB}
    assert WEB in declared(record())


def test_a_container_alone_has_all_its_ports(
    listening: dict[int, set[tuple[str, int]]],
) -> None:
    listening[OTHERS] = {WEB, CACHE}
    assert declared(record(pod="app")) == {WEB, CACHE, SPARE, NAMES}


@pytest.mark.usefixtures("listening")
def test_podmans_healthcheck_is_noted_as_a_probe() -> None:
    made = record()
    declared(made)
    assert made.probes == [HEALTHCHECK[1:]]


def test_without_an_engine_it_says_what_is_missing() -> None:
    with pytest.raises(ArchitectError, match="container_annotations"):
        declared(record(engine=()))


@pytest.mark.parametrize(
    ("answer", "probes", "healthy"),
    [
        (True, [HEALTHCHECK[1:]], True),
        (False, [HEALTHCHECK[1:]], False),
        (None, [HEALTHCHECK[1:]], True),
        (False, [], True),
    ],
    ids=["passed", "failing", "no answer", "no healthcheck"],
)
def test_health_is_what_podman_says_and_silence_keeps_nobody_awake(
    monkeypatch: pytest.MonkeyPatch,
    answer: bool | None,
    probes: list[list[str]],
    healthy: bool,
) -> None:
    async def is_healthy(*_: object) -> bool:
        if answer is None:
            raise podman.EngineError(what="podman", why="is away", fix="none")
        return answer

    monkeypatch.setattr(podman, "is_healthy", is_healthy)
    made = record()
    made.probes = probes
    assert asyncio.run(subject.is_healthy(made)) is healthy
