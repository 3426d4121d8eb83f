"""Which execs are probes."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.annotations import EXEC_PROBES
from architect.decisions.probes import commands, healthcheck, is_probe

words = st.lists(st.text(min_size=1, max_size=8), min_size=1, max_size=4)


@given(st.dictionaries(st.sampled_from(["a", "b"]), st.lists(words, max_size=3)))
def test_what_the_webhook_writes_is_read(found: dict[str, list[list[str]]]) -> None:
    for name in ("a", "b"):
        assert commands({EXEC_PROBES: json.dumps(found)}, name) == found.get(name, [])


@pytest.mark.parametrize(
    "value",
    ["", "{", "[]", '"a"', '{"a": 1}', '{"a": [1, [], [2], "x"]}', "null", '{"b": [["x"]]}'],
)
def test_what_makes_no_sense_names_no_probe(value: str) -> None:
    assert commands({EXEC_PROBES: value}, "a") == []


@pytest.mark.parametrize(
    ("test", "found"),
    [
        (None, []),
        ([], []),
        (["NONE"], []),
        (["CMD", "pg_isready", "-q"], [["pg_isready", "-q"]]),
        (["CMD-SHELL", "curl -f localhost || exit 1"], "shell"),
        (["pg_isready"], [["pg_isready"]]),
        ("pg_isready", []),
    ],
)
def test_podmans_healthchecks(test: Any, found: Any) -> None:
    if found == "shell":
        line = "curl -f localhost || exit 1"
        found = [["sh", "-c", line], ["/bin/sh", "-c", line]]
    assert healthcheck(test) == found


@given(words, st.lists(words, max_size=3), st.booleans())
def test_the_whole_command_without_a_terminal_is_the_probe(
    asked: list[str], known: list[list[str]], terminal: bool
) -> None:
    process = json.dumps({"args": asked, "terminal": terminal, "cwd": "/"})
    assert is_probe(process, known) == (asked in known and not terminal)
    assert is_probe(process, [*known, asked]) == (not terminal)
    assert not is_probe(process, [[*asked, "more"]])


@pytest.mark.parametrize("process", ["", "[]", "1", "{}", '{"args": 1}', "{"])
def test_a_process_that_cannot_be_read_is_none(process: str) -> None:
    assert not is_probe(process, [["x"]])
