"""Probes that come as an exec: in which states they are answered, run, or wait."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from architect.contract.states import State
from architect.processes.architectd import probing
from architect.processes.architectd.container import ManagedContainer

PROBE = ["pg_isready", "-q"]
ASKED = {State.CREATED, State.RUNNING, State.FILLING, State.SCALING_UP, State.ENDED}
"""In which runc is asked, once it is awake: in all others it sleeps, or is being hibernated."""


def managed(state: State) -> ManagedContainer:
    """One of which only this is looked at."""
    made = SimpleNamespace(state=state, record=SimpleNamespace(probes=[PROBE]))
    return cast(ManagedContainer, made)


@pytest.mark.parametrize("state", list(State))
def test_a_probe_is_answered_while_the_program_cannot_be_asked(state: State) -> None:
    assert probing.is_answered(managed(state)) == (state not in ASKED)


def process(folder: Path, **words: object) -> str:
    file = folder / "process.json"
    file.write_text(json.dumps({"args": PROBE, "terminal": False} | words))
    return str(file)


def test_the_command_is_known_by_the_file_that_describes_it(tmp_path: Path) -> None:
    one = managed(State.RUNNING)
    assert probing.is_one(one, process(tmp_path))
    assert not probing.is_one(one, process(tmp_path, args=["pg_isready"]))
    assert not probing.is_one(one, process(tmp_path, terminal=True))


def test_what_cannot_be_read_is_no_probe(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"\xff\xfe")
    for file in ("", str(tmp_path / "gone"), str(tmp_path / "text"), str(tmp_path)):
        assert not probing.is_one(managed(State.RUNNING), file)


def test_it_is_under_way_until_its_engine_has_started_it_however_that_ends() -> None:
    told: list[str] = []
    clock = SimpleNamespace(
        probe_begins=lambda: told.append("begins"), probe_started=lambda: told.append("started")
    )
    one = cast(ManagedContainer, SimpleNamespace(clock=clock))

    def fail() -> None:
        with probing.under_way(one):
            assert told == ["begins"]
            raise ConnectionError

    with pytest.raises(ConnectionError):
        fail()
    assert told == ["begins", "started"]
