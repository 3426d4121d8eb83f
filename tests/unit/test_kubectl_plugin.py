"""`kubectl architect`: what it asks kubectl, what it prints, and how it ends.

A program of the name kubectl stands in for the real one. It notes its arguments, and answers with the files
that the test has laid down.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from architect.contract.records import Row
from architect.contract.states import State
from architect.decisions.pairing import Phase
from architect.processes.cli import kubectl

ROOT = Path(__file__).resolve().parents[2]
STAND_IN = """#!/bin/sh
echo "$*" >> "{home}/asked"
case "$1 $2" in
  "config view") answer=namespace ;;
  "get pods") answer=daemons ;;
  "get pod") answer=node ;;
  "get checkpoints.architect.loopholelabs.io") answer=checkpoints ;;
  exec*) answer="$3" ;;
esac
if test -e "{home}/$answer.error"; then cat "{home}/$answer.error" >&2; exit 1; fi
cat "{home}/$answer"
"""
LIST = "get checkpoints.architect.loopholelabs.io"


@dataclass
class Told:
    """How one call of the plug-in ended."""

    status: object
    out: str
    err: str

    @property
    def lines(self) -> list[list[str]]:
        """The printed table, cut where two columns meet; empty cells are not seen."""
        return [re.split(r" {2,}", line) for line in self.out.splitlines()]


class Plugin:
    """The plug-in, with a kubectl that answers as the test says."""

    def __init__(
        self, home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.home = home
        self._patch, self._printed = monkeypatch, capsys
        program = home / "kubectl"
        program.write_text(STAND_IN.format(home=home))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(home), prepend=":")
        self.answer("namespace", "")

    def answer(self, name: str, text: str) -> None:
        (self.home / name).write_text(text)

    def has(self, *checkpoints: dict[str, Any]) -> None:
        # kubectl indents what it prints.
        self.answer("checkpoints", json.dumps({"kind": "List", "items": checkpoints}, indent=4))

    def nodes(self, rows: dict[str, list[dict[str, Any]]]) -> None:
        """An architectd on each node, with the rows of its `architect ps`."""
        pods = [
            {
                "metadata": {"namespace": "architect", "name": f"architectd-{node}"},
                "spec": {"nodeName": node},
                "status": {"phase": "Running"},
            }
            for node in rows
        ]
        self.answer("daemons", json.dumps({"items": pods}))
        for node, found in rows.items():
            self.answer(f"architectd-{node}", json.dumps(found))

    def __call__(self, *words: str) -> Told:
        self._patch.setattr(sys, "argv", ["kubectl-architect", *words])
        with pytest.raises(SystemExit) as end:
            kubectl.main()
        printed = self._printed.readouterr()
        return Told(end.value.code, printed.out, printed.err)

    @property
    def asked(self) -> list[str]:
        return (self.home / "asked").read_text().splitlines()


@pytest.fixture
def plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Plugin:
    # Nothing of a terminal of whoever runs the tests may wrap the usage.
    monkeypatch.setenv("COLUMNS", "200")
    return Plugin(tmp_path, monkeypatch, capsys)


def ago(seconds: float) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


def condition(kind: str, status: str, reason: str, message: str, age_s: float) -> dict[str, str]:
    return {
        "type": kind,
        "status": status,
        "reason": reason,
        "message": message,
        "lastTransitionTime": ago(age_s),
    }


def checkpoint(
    name: str = "api-1", phase: str = "Available", age_s: float = 30, **status: Any
) -> dict[str, Any]:
    return {
        "apiVersion": "architect.loopholelabs.io/v1",
        "kind": "Checkpoint",
        "metadata": {
            "name": f"{name}-3f0a91c2",
            "namespace": "web",
            "creationTimestamp": ago(age_s),
        },
        "spec": {
            "podName": name,
            "podUID": "3f0a91c2-0",
            "nodeName": "node-1",
            "owner": {"apiVersion": "apps/v1", "kind": "ReplicaSet", "name": "api", "uid": "rs"},
            "containers": [{"name": "app"}, {"name": "cache"}],
        },
        "status": {"phase": phase, **status} if phase else {},
    }


CLAIM = {"podName": "api-2", "podUID": "u2", "nodeName": "node-2"}
OFFERED = condition("Advertised", "True", "Offered", "at 10.0.0.1:9443", 30)
RELEASED = condition("Claimed", "False", "Released", "its pod did not take it", 10)
MOVE = {
    "oldAddresses": ["10.0.1.7"],
    "newAddresses": ["10.0.2.9"],
    "flows": ["tcp|10.0.1.7|80|10.0.3.4|4000", "tcp|10.0.1.7|80|10.0.3.4|4001"],
}


# -- checkpoints ----------------------------------------------------------------------------------------


def test_a_move_is_a_line(plugin: Plugin) -> None:
    plugin.has(
        checkpoint(
            phase="Restored",
            claimedBy=CLAIM,
            move=MOVE,
            transferredBytes=12 * 2**20 + 2**19,
            downtimeMs=84,
            endpoint="10.0.0.1:9443",
            conditions=[OFFERED],
        )
    )
    told = plugin("checkpoints", "-n", "web")
    assert (told.status, told.err) == (0, "")
    assert told.lines == [
        [
            *("NAME", "POD", "CONTAINERS", "FROM", "PHASE", "CLAIMED-BY", "TO"),
            *("SIZE", "CONNECTIONS", "AGE", "WHY"),
        ],
        [
            *("api-1-3f0a91c2", "api-1", "app,cache", "node-1", "Restored", "api-2", "node-2"),
            *("12.5 MiB", "2"),
            told.lines[1][-1],
        ],
    ]
    assert re.fullmatch(r"3\ds", told.lines[1][-1])
    assert plugin.asked == [f"{LIST} --namespace=web --output=json"]
    (_, line) = plugin("checkpoints", "-n", "web", "-o", "wide").lines
    assert line[-3:] == ["ReplicaSet/api", "84 ms", "10.0.0.1:9443"]


def test_what_is_not_known_yet_is_empty(plugin: Plugin) -> None:
    plugin.has(checkpoint(conditions=[OFFERED]))
    told = plugin("checkpoints", "-n", "web")
    (_, line) = told.lines
    assert line[:5] == ["api-1-3f0a91c2", "api-1", "app,cache", "node-1", "Available"]
    assert line[6:] == ["waits for a replacement to claim it"]
    # Each cell stands below its head.
    head, row = told.out.splitlines()
    assert row[head.index("SIZE") :].startswith(" " * len("SIZE  CONNECTIONS  "))


def test_a_checkpoint_without_a_status_is_shown(plugin: Plugin) -> None:
    plugin.has(checkpoint(phase=""))
    (_, line) = plugin("checkpoints", "-n", "web").lines
    assert line[-1] == "waits for node-1 to offer it"


def test_the_size_of_the_containers_counts_if_all_have_one(plugin: Plugin) -> None:
    one = checkpoint(transferredBytes=2**20)
    one["spec"]["containers"] = [{"name": "a", "bytes": 2**20}, {"name": "b", "bytes": 2**21}]
    plugin.has(one)
    assert "3.0 MiB" in plugin("checkpoints").out
    del one["spec"]["containers"][1]["bytes"]
    plugin.has(one)
    assert "1.0 MiB" in plugin("checkpoints").out


@pytest.mark.parametrize(
    ("phase", "status", "why"),
    [
        (
            "Available",
            {"conditions": [OFFERED, RELEASED]},
            "waits for a replacement to claim it; Released: its pod did not take it",
        ),
        ("Claimed", {"claimedBy": CLAIM}, "waits for node-2 to start api-2 and fetch it"),
        ("Committed", {"claimedBy": CLAIM, "move": MOVE}, "waits for node-2 to restore it"),
        (
            "Failed",
            {
                "message": "withdrawn",
                "conditions": [
                    RELEASED,
                    condition(
                        "Advertised", "False", "Withdrawn", "the pod does not\nmove\x1b[2J", 5
                    ),
                ],
            },
            "Withdrawn: the pod does not move?[2J",
        ),
        ("Failed", {"message": "the image is another one"}, "the image is another one"),
        # Of a later version.
        ("Copied", {"message": "half of it"}, "half of it"),
    ],
)
def test_why_it_is_not_done_is_said(
    plugin: Plugin, phase: str, status: dict[str, Any], why: str
) -> None:
    plugin.has(checkpoint(phase=phase, **status))
    (_, line) = plugin("checkpoints", "-n", "web").lines
    assert line[-1] == why


def test_of_two_troubles_the_last_is_said(plugin: Plugin) -> None:
    fresh = condition("Advertised", "Unknown", "Silent", "no word of it", 10)
    for conditions, said in [
        ([RELEASED, {**fresh, "lastTransitionTime": RELEASED["lastTransitionTime"]}], "Silent"),
        ([{**fresh, "lastTransitionTime": ago(86_400)}, RELEASED], "Released"),
        ([RELEASED, {**fresh, "lastTransitionTime": ago(86_400)}], "Released"),
    ]:
        plugin.has(checkpoint(conditions=conditions))
        assert f"; {said}: " in plugin("checkpoints").out


def test_every_phase_but_the_last_says_what_it_waits_for(plugin: Plugin) -> None:
    for phase in Phase:
        failed: dict[str, Any] = {"message": "no room"} if phase is Phase.FAILED else {}
        plugin.has(checkpoint(phase=phase.value, claimedBy=CLAIM, **failed))
        said = bool(re.search(r"waits for|no room", plugin("checkpoints").out))
        assert said is (phase is not Phase.RESTORED), phase


def test_all_namespaces_have_a_column_and_the_oldest_is_first(plugin: Plugin) -> None:
    young, old = checkpoint("young", age_s=5), checkpoint("old", age_s=7200)
    plugin.has(young, old)
    told = plugin("checkpoints", "-A")
    assert [line[:2] for line in told.lines] == [
        ["NAMESPACE", "NAME"],
        ["web", "old-3f0a91c2"],
        ["web", "young-3f0a91c2"],
    ]
    assert "  2h  " in told.out
    assert plugin.asked == [f"{LIST} --all-namespaces --output=json"]


def test_json_is_what_the_api_server_has_on_one_line(plugin: Plugin) -> None:
    young, old = checkpoint("young", age_s=5), checkpoint("old", age_s=60, news={"of": "later"})
    plugin.has(young, old)
    told = plugin("checkpoints", "-o", "json")
    assert told.out.count("\n") == 1
    assert json.loads(told.out) == [old, young]
    plugin.has()
    told = plugin("checkpoints", "-o", "json")
    assert (told.status, json.loads(told.out), told.err) == (0, [], "")


@pytest.mark.parametrize(
    ("context", "words", "asked", "said"),
    [
        ("", (), "--namespace=default", "No checkpoints found in default namespace.\n"),
        ("web", (), "--namespace=web", "No checkpoints found in web namespace.\n"),
        ("web", ("-n", "db"), "--namespace=db", "No checkpoints found in db namespace.\n"),
        ("web", ("-A",), "--all-namespaces", "No checkpoints found.\n"),
    ],
)
def test_none_is_said_as_kubectl_says_it(
    plugin: Plugin, context: str, words: tuple[str, ...], asked: str, said: str
) -> None:
    plugin.answer("namespace", context)
    plugin.has()
    told = plugin("checkpoints", *words)
    assert (told.status, told.out, told.err) == (0, "", said)
    assert plugin.asked[-1] == f"{LIST} {asked} --output=json"


# -- what goes wrong ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (
            'error: the server doesn\'t have a resource type "checkpoints"\n',
            "architect: checkpoints cannot be listed: error: the server doesn't have a resource type "
            '"checkpoints"; install the chart: it brings the resource\n',
        ),
        (
            'Error from server (Forbidden): checkpoints is forbidden: User "eve" cannot list\n',
            "architect: checkpoints cannot be listed: Error from server (Forbidden): checkpoints is "
            'forbidden: User "eve" cannot list; ask for the right to get and list '
            "checkpoints.architect.loopholelabs.io\n",
        ),
        (
            'E1123 11:41:42.591439   32672 memcache.go:265] "Unhandled Error" err="dial tcp"\n'
            "The connection to the server was refused\n",
            f"architect: kubectl {LIST} --namespace=web --output=json: "
            "The connection to the server was refused\n",
        ),
    ],
)
def test_a_refusal_is_one_line(plugin: Plugin, error: str, said: str) -> None:
    plugin.answer("checkpoints.error", error)
    told = plugin("checkpoints", "-n", "web")
    assert (told.status, told.out, told.err) == (1, "", said)


@pytest.mark.parametrize("text", ["no JSON", '{"items": [{"status": {"phase": 7}}]}', "{}"])
def test_an_answer_that_cannot_be_read_is_one_line(plugin: Plugin, text: str) -> None:
    plugin.answer("checkpoints", text)
    told = plugin("checkpoints")
    assert (told.status, told.out) == (1, "")
    assert told.err.startswith("architect: checkpoints cannot be listed: ")
    assert told.err.endswith("; use the kubectl-architect of the chart's version\n")
    assert told.err.count("\n") == 1


def test_a_kubectl_that_does_not_answer_is_one_line(
    plugin: Plugin, monkeypatch: pytest.MonkeyPatch
) -> None:
    def hang(words: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(words, 120.0)

    monkeypatch.setattr(subprocess, "run", hang)
    told = plugin("checkpoints", "-A")
    assert (told.status, told.out) == (1, "")
    assert told.err == (
        f"architect: kubectl {LIST} --all-namespaces --output=json: no answer within 120 s; "
        "see whether the API answers: `kubectl version`\n"
    )


def test_no_kubectl_is_one_line(plugin: Plugin, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    told = plugin("checkpoints")
    assert told.status == 1
    assert told.err == (
        "architect: the cluster cannot be asked: kubectl is not on the PATH; install it\n"
    )


@pytest.mark.parametrize(
    "words", [("checkpoints", "-o", "yaml"), ("checkpoints", "x"), ("nosuch",)]
)
def test_wrong_usage_ends_with_two(plugin: Plugin, words: tuple[str, ...]) -> None:
    told = plugin(*words)
    assert (told.status, told.out) == (2, "")
    assert told.err.startswith("Usage: ")
    assert not (plugin.home / "asked").exists()


# -- ps -------------------------------------------------------------------------------------------------


def row(pod: str, state: State, namespace: str = "web", error: str | None = None) -> dict[str, Any]:
    made = Row(
        namespace=namespace,
        pod=pod,
        container="app",
        id="0",
        state=state.shown,
        since=ago(3),
        idle_s=None,
        hibernations=1,
        last_scale_down_ms=40.0,
        last_scale_up_ms=None,
        checkpoint_bytes=0,
        memory_bytes=0,
        error=error,
    )
    found: dict[str, Any] = msgspec.to_builtins(made)
    return found


def test_a_pod_that_moves_is_shown_on_both_nodes(plugin: Plugin) -> None:
    plugin.nodes(
        {
            "node-2": [row("api-2", State.ARRIVING)],
            "node-1": [
                row("api-1", State.LEFT),
                row("api-0", State.STRANDED, error="it failed"),
                row("api-9", State.RUNNING, "db"),
            ],
        }
    )
    told = plugin("ps", "-n", "web")
    head, *lines = told.lines
    assert head[-2:] == ["NODE", "ERROR"]
    assert [line[:3] for line in lines] == [
        ["api-0", "app", "SCALED_DOWN"],
        ["api-1", "app", "MIGRATING"],
        ["api-2", "app", "MIGRATING"],
    ]
    assert [line[-1] for line in lines] == ["it failed", "node-1", "node-2"]
    assert lines[0][-2] == "node-1"
    assert "NAMESPACE" not in told.out
    assert told.status == 0


def test_ps_of_all_namespaces_says_which(plugin: Plugin) -> None:
    plugin.nodes({"node-1": [row("api", State.RUNNING), row("api", State.MIGRATING, "db")]})
    told = plugin("ps", "-A")
    assert [line[:4] for line in told.lines] == [
        ["NAMESPACE", "POD", "CONTAINER", "STATE"],
        ["db", "api", "app", "MIGRATING"],
        ["web", "api", "app", "RUNNING"],
    ]


def test_ps_has_the_node_in_json_and_what_a_later_daemon_says(plugin: Plugin) -> None:
    given = {**row("api", State.LEAVING), "later": 1}
    plugin.nodes({"node-1": [given]})
    told = plugin("ps", "-n", "web", "-o", "json")
    assert json.loads(told.out) == [{**given, "node": "node-1"}]


@pytest.mark.parametrize("state", list(State))
def test_every_state_of_a_move_is_shown_as_one(state: State) -> None:
    moving = (State.LEAVING, State.LEFT, State.MIGRATING, State.ARRIVING)
    assert (state.shown == "MIGRATING") is (state in moving)


# -- the documentation ----------------------------------------------------------------------------------


def test_every_verb_and_column_is_explained() -> None:
    page = (ROOT / "docs" / "reference.md").read_text()
    section = page.split("### kubectl architect\n")[1].split("\n## ")[0]
    group = typer.main.get_command(kubectl.app)
    assert isinstance(group, typer.core.TyperGroup)
    for verb in group.commands:
        assert f"| `kubectl architect {verb}" in section
    for column in ("FROM", "CLAIMED-BY", "TO", "SIZE", "CONNECTIONS", "WHY", "NODE"):
        assert f"`{column}`" in section, column
