"""kubectl-architect: the same verbs in a cluster, as `kubectl architect …` (kubectl's plug-ins).

Asks the architectd of each node through `kubectl exec`, with the rights and the kubeconfig of whoever calls
it: it needs pods get and list, and pods/exec in the namespace of the chart. Checkpoints are the API server's:
they take get and list of them, and no node is asked. What `move` takes says docs/reference.md.
"""

from __future__ import annotations

import enum
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final

import msgspec
import typer

from architect.adapters.kube.resources import Checkpoint
from architect.contract.kubernetes import DAEMON, GROUP
from architect.contract.records import Event, Row
from architect.processes.cli import checkpoints as moves
from architect.processes.cli import main as local
from architect.processes.cli import move as byhand
from architect.processes.cli.cluster import ClusterError, kubectl, namespace_of
from architect.processes.cli.main import ContainerOption, Output, OutputOption, PodArgument

_AT_ONCE: Final = 16
_CHECKPOINTS: Final = f"checkpoints.{GROUP}"
_REMEDIES: Final = {
    "doesn't have a resource type": "install the chart: it brings the resource",
    "(Forbidden)": f"ask for the right to get and list {_CHECKPOINTS}",
}
"""What kubectl says when checkpoints cannot be listed, and what helps."""

app = typer.Typer(
    name="kubectl-architect",
    help="What hibernates in a cluster, and what happened to it.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
NamespaceOption = Annotated[str, typer.Option("--namespace", "-n", help="The pods' namespace")]
AllOption = Annotated[bool, typer.Option("--all-namespaces", "-A", help="Pods of all namespaces")]


class Listing(enum.StrEnum):
    """How checkpoints are printed."""

    TABLE = "table"
    WIDE = "wide"
    JSON = "json"


ListingOption = Annotated[Listing, typer.Option("--output", "-o", help="table, wide or json")]


class _Found(msgspec.Struct):
    """What kubectl prints of several."""

    items: list[dict[str, Any]]


def _daemons() -> dict[str, tuple[str, str]]:
    """Node -> (namespace, pod) of its architectd."""
    words = ("get", "pods", "--all-namespaces", f"--selector=app={DAEMON}", "--output=json")
    found = {}
    for one in json.loads(kubectl(*words))["items"]:
        if one["status"].get("phase") == "Running":
            metadata = one["metadata"]
            found[one["spec"]["nodeName"]] = (metadata["namespace"], metadata["name"])
    if not found:
        raise ClusterError(
            "no architectd runs in this cluster",
            f"no pod with the label app={DAEMON} is running",
            "install the chart, and label nodes architect.loopholelabs.io/node=true",
        )
    return found


def _on(daemon: tuple[str, str], *words: str) -> str:
    namespace, name = daemon
    return kubectl("exec", f"--namespace={namespace}", name, "--", "architect", *words)


def _everywhere(*words: str) -> dict[str, str]:
    """What each node's architect printed. Raises ClusterError for the first that failed."""
    daemons = _daemons()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(lambda one: _on(one, *words), daemons.values())
        return dict(zip(daemons, answers, strict=True))


def _one(verb: str, pod: str, container: str, namespace: str) -> str:
    where = namespace_of(namespace)
    path = "--output=jsonpath={.spec.nodeName}"
    node = kubectl("get", "pod", f"--namespace={where}", pod, path).strip()
    daemon = _daemons().get(node)
    if daemon is None:
        raise ClusterError(
            f"pod {pod} cannot be reached",
            f"no architectd runs on its node {node or '(none yet)'}",
            f"label it architect.loopholelabs.io/node=true; see `kubectl get pods -A -l app={DAEMON}`",
        )
    only = ("--container", container) if container else ()
    return _on(daemon, verb, f"{where}/{pod}", *only, "--output", "json")


def _checkpoints(namespace: str) -> list[tuple[Checkpoint, dict[str, Any]]]:
    """Those of a namespace, of all if it is empty: each as we read it and as the API server has it.

    The oldest first; of one second by name, so that two calls agree.
    """
    scope = f"--namespace={namespace}" if namespace else "--all-namespaces"
    what = "checkpoints cannot be listed"
    try:
        text = kubectl("get", _CHECKPOINTS, scope, "--output=json")
    except ClusterError as error:
        for said, remedy in _REMEDIES.items():
            if said in error.why:
                raise ClusterError(what, error.why, remedy) from error
        raise
    try:
        whole = msgspec.json.decode(text, type=_Found).items
        found = msgspec.convert(whole, list[Checkpoint])
    except msgspec.DecodeError as error:
        raise ClusterError(
            what, str(error), "use the kubectl-architect of the chart's version"
        ) from error
    pairs = zip(found, whole, strict=True)
    return sorted(pairs, key=lambda one: (one[0].metadata.creationTimestamp or "", one[0].key))


@app.command()
def ps(
    namespace: NamespaceOption = "",
    everywhere: AllOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the managed containers of a namespace."""
    rows: list[dict[str, Any]] = []
    for node, text in _everywhere("ps", "--output", "json").items():
        rows += [{**row, "node": node} for row in json.loads(text)]
    if not everywhere:
        where = namespace_of(namespace)
        rows = [row for row in rows if row["namespace"] == where]
    rows.sort(key=lambda row: (row["namespace"], row["pod"], row["container"], row["node"]))
    if output is Output.JSON:
        print(json.dumps(rows))
        return
    # A pod that moves is MIGRATING on the node that it leaves and on the one that it comes to.
    *columns, last = local.ROW_HEAD
    head = [*columns, "NODE", last]
    lines = []
    for row in rows:
        *cells, error = local.row_cells(msgspec.convert(row, Row))
        lines.append([*cells, row["node"], error])
    if everywhere:
        head.insert(0, "NAMESPACE")
        lines = [[row["namespace"], *line] for row, line in zip(rows, lines, strict=True)]
    local.table(head, lines)


@app.command()
def checkpoints(
    namespace: NamespaceOption = "",
    everywhere: AllOption = False,
    output: ListingOption = Listing.TABLE,
) -> None:
    """List the pods that move: from where to where, how far they are, and what they wait for."""
    where = "" if everywhere else namespace_of(namespace)
    found = _checkpoints(where)
    if output is Listing.JSON:
        print(json.dumps([whole for _, whole in found]))
    elif found:
        moves.show([one for one, _ in found], everywhere, output is Listing.WIDE)
    else:
        place = f" in {where} namespace" if where else ""
        print(f"No checkpoints found{place}.", file=sys.stderr)


@app.command()
def sleep(
    pod: PodArgument,
    container: ContainerOption = "",
    namespace: NamespaceOption = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Hibernate a pod's managed containers now."""
    local.show_rows(_one("sleep", pod, container, namespace), output)


@app.command()
def wake(
    pod: PodArgument,
    container: ContainerOption = "",
    namespace: NamespaceOption = "",
    output: OutputOption = Output.TABLE,
) -> None:
    """Wake a pod's managed containers now."""
    local.show_rows(_one("wake", pod, container, namespace), output)


@app.command()
def move(
    pod: PodArgument,
    to: Annotated[str, typer.Option("--to", help="The node; any other than its own if left out")] = "",
    namespace: NamespaceOption = "",
) -> None:
    """Move a pod without a controller to another node, with its memory, files and connections."""
    byhand.move(pod, namespace_of(namespace), to)


@app.command()
def events(output: OutputOption = Output.TABLE) -> None:
    """Show what happened on all nodes, oldest first. `kubectl get events` has it by pod, for an hour."""
    lines = [
        line for text in _everywhere("events", "-o", "json").values() for line in text.splitlines()
    ]
    found = [msgspec.json.decode(line, type=Event) for line in lines]
    for event in sorted(found, key=lambda one: one.time):
        local.show_event(event, output)


@app.command()
def check() -> None:
    """Say of each node whether it is fit, and what is lost where it is not."""
    for node, text in _everywhere("check").items():
        print(f"{node}\n{text}")


def main() -> None:
    """Program; exit status 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    local.main(app)


if __name__ == "__main__":
    main()
