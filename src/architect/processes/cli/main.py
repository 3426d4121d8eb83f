"""architect: program. Verbs, exit codes and JSON fields are the contract's (docs/reference.md)."""

from __future__ import annotations

import enum
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import msgspec
import typer

from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.records import Event, Request, Row

app = typer.Typer(
    name="architect",
    help="Idle containers vanish in place and come back before the first packet's sender notices.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


class Output(enum.StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"


OutputOption = Annotated[Output, typer.Option("--output", "-o", help="table or json")]
PodArgument = Annotated[str, typer.Argument(help="Name of the pod; for `podman run --name N`, N")]
ContainerOption = Annotated[str, typer.Option("--container", "-c", help="Only this container")]
ROW_HEAD: Final = (
    "POD",
    "CONTAINER",
    "STATE",
    "SINCE",
    "IDLE",
    "HIBERNATED",
    "DOWN",
    "UP",
    "MEMORY",
    "DISK",
    "ERROR",
)
"""Of the table of `architect ps`."""


@app.command()
def up() -> None:
    """Start architectd on this machine."""
    from architect.processes.cli import service

    print(f"architectd runs, pid {service.up()}")


@app.command()
def down() -> None:
    """Stop architectd. Nothing is woken, nothing is lost."""
    from architect.processes.cli import service

    print("architectd stopped" if service.down() else "architectd was not running")


@app.command()
def check(output: OutputOption = Output.TABLE) -> None:
    """Say whether this machine is fit, and what is lost where it is not."""
    from architect.adapters import probes

    findings = probes.all_findings()
    if output is Output.JSON:
        print(msgspec.json.encode(findings).decode())
    else:
        table(
            ["", "WHAT", "FOUND", "WITHOUT IT"],
            [
                [finding.verdict.value, finding.name, finding.found, finding.without]
                for finding in findings
            ],
        )
    if any(finding.verdict is probes.Verdict.FAIL for finding in findings):
        raise typer.Exit(1)


@app.command()
def ps(output: OutputOption = Output.TABLE) -> None:
    """List the managed containers."""
    from architect.processes.cli import client

    show_rows(client.ask(Request(verb="ps")), output)


@app.command()
def sleep(
    pod: PodArgument, container: ContainerOption = "", output: OutputOption = Output.TABLE
) -> None:
    """Hibernate a pod's managed containers now."""
    from architect.processes.cli import client

    show_rows(client.ask(Request(verb="sleep", pod=pod, container=container)), output)


@app.command()
def wake(
    pod: PodArgument, container: ContainerOption = "", output: OutputOption = Output.TABLE
) -> None:
    """Wake a pod's managed containers now."""
    from architect.processes.cli import client

    show_rows(client.ask(Request(verb="wake", pod=pod, container=container)), output)


@app.command()
def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones")] = False,
    output: OutputOption = Output.TABLE,
) -> None:
    """Show what happened: hibernations, wakes, failures. With -o json, a line each."""
    from architect.adapters import events as log
    from architect.processes.cli import client

    if follow:
        for line in client.lines(Request(verb="events", follow=True)):
            show_event(msgspec.json.decode(line, type=Event), output)
        return
    for event in log.read(paths.EVENTS):
        show_event(event, output)


def show_event(event: Event, output: Output) -> None:
    """Prints one event."""
    if output is Output.JSON:
        print(msgspec.json.encode(event).decode(), flush=True)
        return
    figures = [f"{event.duration_ms:.0f} ms"] if event.duration_ms is not None else []
    if event.bytes is not None:
        figures.append(_bytes(event.bytes))
    tail = f" ({', '.join(figures)})" if figures else ""
    print(f"{event.time}  {event.reason:<16}  {event.message}{tail}", flush=True)


def show_rows(encoded: str, output: Output) -> None:
    """Prints rows of `architect ps`, given as JSON."""
    if output is Output.JSON:
        print(encoded)
        return
    rows = msgspec.json.decode(encoded, type=list[Row])
    table(list(ROW_HEAD), [row_cells(row) for row in rows])


def row_cells(row: Row) -> list[str]:
    """A container as cells below :data:`ROW_HEAD`."""
    return [
        row.pod,
        row.container,
        row.state,
        age(row.since),
        "" if row.idle_s is None else f"{row.idle_s:.0f} s",
        f"{row.hibernations}x",
        _ms(row.last_scale_down_ms),
        _ms(row.last_scale_up_ms),
        _bytes(row.memory_bytes),
        _bytes(row.checkpoint_bytes),
        row.error or "",
    ]


def age(since: str) -> str:
    """Time since then, as kubectl says it."""
    seconds = int((datetime.now(UTC) - datetime.fromisoformat(since)).total_seconds())
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size}{unit}"
    return f"{seconds}s"


def _ms(value: float | None) -> str:
    return "" if value is None else f"{value:.0f} ms"


def _bytes(value: int) -> str:
    size = float(value)
    for unit in ("B", "KB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}"
        size /= 1000
    return f"{size:.2f} GB"


def table(head: list[str], rows: list[list[str]]) -> None:
    """Plain columns, so that awk and a narrow terminal can read them."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    for row in [head, *rows]:
        cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
        print("  ".join(cells).rstrip())


def main(run: Callable[[], Any] = app) -> None:
    """Program; exit status 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    try:
        run()
    except ArchitectError as error:
        print(f"architect: {error}", file=sys.stderr)
        sys.exit(1)
    except BrokenPipeError:
        sys.exit(0)


if __name__ == "__main__":
    main()
