"""kubectl-architect: the same verbs in a cluster, as `kubectl architect …` (kubectl's plug-ins).

Asks the architectd of each node through `kubectl exec`, with the rights and the kubeconfig of whoever calls
it: it needs pods get and list, and pods/exec in the namespace of the chart.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Annotated, Any, Final

import msgspec
import typer

from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import DAEMON
from architect.contract.records import Event
from architect.processes.cli import main as local
from architect.processes.cli.main import ContainerOption, Output, OutputOption, PodArgument

_CALL_S: Final = 120.0
_AT_ONCE: Final = 16

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


class ClusterError(ArchitectError):
    """kubectl failed, or a node's architectd does not answer."""


def _kubectl(*words: str) -> str:
    program = shutil.which("kubectl")
    if program is None:
        raise ClusterError(
            "the cluster cannot be asked", "kubectl is not on the PATH", "install it"
        )
    done = subprocess.run(
        [program, *words],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=_CALL_S,
        check=False,
    )
    if done.returncode:
        # What architect says on a node is a line of its own; kubectl's follows.
        lines = [line for line in done.stderr.splitlines() if line.startswith("architect: ")]
        text = lines[0].removeprefix("architect: ") if lines else done.stderr.strip()
        raise ClusterError(f"kubectl {' '.join(words)}", text or "it failed")
    return done.stdout


def _daemons() -> dict[str, tuple[str, str]]:
    """Node -> (namespace, pod) of its architectd."""
    words = ("get", "pods", "--all-namespaces", f"--selector=app={DAEMON}", "--output=json")
    found = {}
    for one in json.loads(_kubectl(*words))["items"]:
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
    return _kubectl("exec", f"--namespace={namespace}", name, "--", "architect", *words)


def _everywhere(*words: str) -> dict[str, str]:
    """What each node's architect printed. Raises ClusterError for the first that failed."""
    daemons = _daemons()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        answers = pool.map(lambda one: _on(one, *words), daemons.values())
        return dict(zip(daemons, answers, strict=True))


def _namespace(given: str) -> str:
    if given:
        return given
    found = _kubectl("config", "view", "--minify", "--output=jsonpath={..namespace}")
    return found.strip() or "default"


def _one(verb: str, pod: str, container: str, namespace: str) -> str:
    where = _namespace(namespace)
    path = "--output=jsonpath={.spec.nodeName}"
    node = _kubectl("get", "pod", f"--namespace={where}", pod, path).strip()
    daemon = _daemons().get(node)
    if daemon is None:
        raise ClusterError(
            f"pod {pod} cannot be reached",
            f"no architectd runs on its node {node or '(none yet)'}",
            f"label it architect.loopholelabs.io/node=true; see `kubectl get pods -A -l app={DAEMON}`",
        )
    only = ("--container", container) if container else ()
    return _on(daemon, verb, f"{where}/{pod}", *only, "--output", "json")


@app.command()
def ps(
    namespace: NamespaceOption = "",
    everywhere: AllOption = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """List the managed containers of a namespace."""
    rows: list[dict[str, Any]] = []
    for text in _everywhere("ps", "--output", "json").values():
        rows += json.loads(text)
    if not everywhere:
        where = _namespace(namespace)
        rows = [row for row in rows if row["namespace"] == where]
    rows.sort(key=lambda row: (row["namespace"], row["pod"], row["container"]))
    local.show_rows(json.dumps(rows), output)


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
