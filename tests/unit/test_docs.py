"""The documentation keeps step with the code: whatever users can meet is in it, under its own name.

Each test reads the names from the code itself, so a new annotation, verb, field, event reason, make target,
option of a component, webhook, distribution or message that refers to a heading fails here until it is
written about; and a label, an annotation or a value of the chart that a page names and that is nowhere fails.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import typer
import yaml  # type: ignore[import-untyped]  # it comes with lightkube, its stubs do not

from architect.adapters import probes
from architect.contract import annotations as known
from architect.contract import kubernetes, paths
from architect.contract.records import (
    CHECKPOINT_FORMAT,
    CheckpointManifest,
    Event,
    PageDigests,
    Row,
)
from architect.contract.states import State
from architect.decisions import distros, life, podstatus, reconcile
from architect.processes.cli.main import app

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "src" / "architect").rglob("*.py"))
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
REFERENCE = (ROOT / "docs" / "reference.md").read_text()


def missing(names: list[str], page: str) -> list[str]:
    """The names that ``page`` does not have in code markup, alone or as part of a longer word."""
    spans = re.findall(r"`([^`\n]+)`", page)
    return [
        name
        for name in names
        if not any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", span) for span in spans)
    ]


def section(title: str) -> str:
    """The part of the reference below a heading, up to the next one of its level or above."""
    level, rest = re.split(rf"^(#+) {re.escape(title)}$", REFERENCE, maxsplit=1, flags=re.M)[1:]
    return re.split(rf"^#{{2,{len(level)}}} ", rest, maxsplit=1, flags=re.M)[0]


def test_the_diagram_is_the_table() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    drawn = re.findall(r"```mermaid\n(.*?)```", page, re.S)
    assert drawn == [life.mermaid()]


def test_every_annotation_is_explained() -> None:
    every = (*known.USER_ANNOTATIONS, *known.OWN_ANNOTATIONS)
    names = [name.removeprefix(known.PREFIX) for name in every]
    assert missing(names, section("Annotations")) == []
    constants = {
        value
        for value in vars(known).values()
        if isinstance(value, str) and value.startswith(known.PREFIX)
    }
    assert constants == {known.PREFIX, *every}, "a constant is in neither list"


def test_defaults_and_bounds_are_what_the_reference_says() -> None:
    rules = section("Those that take effect")
    second = 10**9
    assert f"`{known.DEFAULT_SCALEDOWN_NS // second}s`" in rules
    assert f"Minimum `{known.MINIMUM_SCALEDOWN_NS // second}s`" in rules
    assert f"`{known.MAXIMUM_INITIAL_DELAY_NS // second // 3600}h`" in rules


def test_every_verb_and_option_is_explained() -> None:
    page = section("Command line")
    names = []
    for command in app.registered_commands:
        assert command.callback is not None
        names.append(command.name or command.callback.__name__)
    assert len(names) > 5
    assert missing(names, page) == []
    group = typer.main.get_command(app)
    assert isinstance(group, typer.core.TyperGroup)
    assert sorted(group.commands) == sorted(names)
    for verb in group.commands.values():
        for option in verb.params:
            assert missing([one for one in option.opts if one.startswith("-")], page) == []


@pytest.mark.parametrize(
    ("record", "title"),
    [
        (Row, "architect ps"),
        (probes.Finding, "architect check"),
        (Event, "Events"),
        (CheckpointManifest, "Checkpoint format"),
        (PageDigests, "Checkpoint format"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_every_field_is_explained(record: type[msgspec.Struct], title: str) -> None:
    names = [one.encode_name for one in msgspec.structs.fields(record)]
    assert missing(names, section(title)) == []


def test_every_state_is_explained() -> None:
    shown = {state.shown for state in State if state is not State.ENDED}
    assert missing(sorted(shown), section("architect ps")) == []


def test_the_checkpoint_format_is_the_one_described() -> None:
    assert f"Version {CHECKPOINT_FORMAT}." in section("Checkpoint format")


def reasons() -> set[str]:
    """The literal reasons in all calls of ``Event`` and of the reporter's methods that are given one."""
    found: set[str] = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if not isinstance(node, ast.Call):
                continue
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            given: list[ast.expr] = []
            if name in ("event", "failed"):
                given = node.args[:1]
            elif name == "Event":
                given = [word.value for word in node.keywords if word.arg == "reason"]
            found |= {text for one in given for text in _texts(one)}
    return found


def _texts(expression: ast.expr) -> Iterator[str]:
    # Of a conditional expression both branches, but nothing of its condition.
    if isinstance(expression, ast.IfExp):
        yield from _texts(expression.body)
        yield from _texts(expression.orelse)
    elif isinstance(expression, ast.Constant) and isinstance(expression.value, str):
        yield expression.value


def test_every_event_reason_is_explained() -> None:
    used = reasons()
    assert {"ScaledDown", "ScaledUp", "RestoreFailed", "Warning"} <= used
    assert missing(sorted(used), section("Events")) == []


def test_no_event_reason_is_promised_that_is_never_used() -> None:
    table = section("Events").split("| reason | meaning |")[1]
    promised = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    assert promised == reasons()


def test_every_make_target_is_explained() -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = re.findall(r"^([a-z-]+):.*## ", makefile, re.M)
    assert len(targets) > 5
    assert missing([f"make {target}" for target in targets], section("Make targets")) == []


def test_every_path_is_listed() -> None:
    written = re.findall(r"`([^`\n]+)`", section("Files") + section("Sockets"))
    for path in (value for value in vars(paths).values() if isinstance(value, Path)):
        listed = any(str(path) in one for one in written) or path.name in written
        assert listed, f"{path} is not in the reference"


def anchor(heading: str) -> str:
    """The fragment that GitHub makes of a heading."""
    plain = re.sub(r"[`*\[\]()]", "", heading).strip().lower()
    return re.sub(r"[^\w\- ]", "", plain).replace(" ", "-")


def headings(page: Path) -> list[str]:
    """All headings of a page, code blocks left out."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    return re.findall(r"^#+ (.*)$", text, re.M)


def test_every_heading_that_a_message_names_exists() -> None:
    pattern = re.compile(r"docs/(\w+)\.md, '([^']+)'")
    named = {found for source in SOURCES for found in pattern.findall(source.read_text())}
    assert named
    for page, heading in named:
        present = [one.lower() for one in headings(ROOT / "docs" / f"{page}.md")]
        assert heading.lower() in present, f"docs/{page}.md has no heading '{heading}'"


def test_every_page_that_the_source_names_exists() -> None:
    for source in SOURCES:
        for page in re.findall(r"docs/\w+\.md", source.read_text()):
            assert (ROOT / page).exists(), f"{source} names {page}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", target):
            continue
        name, _, fragment = target.partition("#")
        there = (page.parent / name).resolve() if name else page
        assert there.exists(), f"{page.name} links to {target}"
        if fragment:
            anchors = [anchor(one) for one in headings(there)]
            assert fragment in anchors, f"{page.name} links to {target}"


# ---- in a cluster ------------------------------------------------------------------------------------

CHART = ROOT / "charts" / "architect"
PROSE = [page for page in PAGES if page.name != "CHANGELOG.md"]
OWN_NAME = re.compile(r"((?:[a-z]+\.)?architect\.loopholelabs\.io)\\?/([a-z*][a-z0-9*-]*)?")


def prefixed(kind: str) -> set[str]:
    """The constants of contract/kubernetes.py that begin with the prefix of our annotations."""
    values = vars(kubernetes).values()
    return {one for one in values if isinstance(one, str) and one.startswith(kind) and one != kind}


def test_every_label_and_annotation_of_the_cluster_is_explained() -> None:
    places = (
        kubernetes.FEATURE_LABEL_PREFIX + "<probe>",
        known.STATUS_LABEL_PREFIX + "<container>",
    )
    names = [*sorted(prefixed(known.PREFIX)), *places]
    assert len(names) >= 6
    assert missing(names, section("In a cluster")) == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_no_label_or_annotation_is_named_that_does_not_exist(page: Path) -> None:
    there = {
        *known.USER_ANNOTATIONS,
        *known.OWN_ANNOTATIONS,
        *prefixed(known.PREFIX),
        f"{kubernetes.GROUP}/{kubernetes.VERSION}",
        known.PREFIX,
        known.PREFIX + "*",
        kubernetes.FEATURE_LABEL_PREFIX,
        kubernetes.FEATURE_LABEL_PREFIX + "*",
    }
    # A message that is quoted because it refuses the name.
    wrong = {known.PREFIX + "scaledown-duration"}
    for group, name in OWN_NAME.findall(page.read_text()):
        # A container's own name follows.
        if group + "/" == known.STATUS_LABEL_PREFIX:
            continue
        assert f"{group}/{name}" in there | wrong, f"{page.name} names {group}/{name}"


def test_every_probe_is_a_label_of_the_reference() -> None:
    calls = [
        node
        for node in ast.walk(ast.parse(Path(probes.__file__).read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("Finding", "_finding")
    ]
    found = {text for call in calls for one in call.args[:1] for text in _texts(one)} - {"Podman"}
    slugs = [re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") for name in found]
    assert len(slugs) > 8
    assert missing(sorted(slugs), section("On the node")) == []


def options(source: Path) -> set[str]:
    """The options that a program's parser knows: the literals that begin with two hyphens."""
    found = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if not isinstance(node, ast.Call):
            continue
        if getattr(node.func, "attr", getattr(node.func, "id", "")) in ("add_argument", "add"):
            words = [one.value for one in node.args if isinstance(one, ast.Constant)]
            found |= {one for one in words if isinstance(one, str) and one.startswith("--")}
    return found


PROGRAMS = {
    "architectd": "architectd",
    "architect-manager": "manager",
    "architect-control-plane": "controlplane",
    "architect-node": "node",
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_every_option_of_a_component_is_explained(program: str) -> None:
    known_ones = options(ROOT / "src/architect/processes" / PROGRAMS[program] / "main.py")
    assert len(known_ones) > 3
    text = section("Components").split(f"\n**{program}**")[1]
    text = re.split(r"^\*\*architect", text, maxsplit=1, flags=re.M)[0]
    assert missing(sorted(known_ones), text) == []
    named = {word for span in re.findall(r"`([^`\n]+)`", text) for word in span.split()}
    assert {word for word in named if word.startswith("--")} == known_ones


def recorded() -> set[str]:
    """The reasons of events that only a cluster has: literals given to a recorder, and what is mended."""
    found = {repair.value for repair in reconcile.Repair}
    found |= {f"Resize{one}" for one in (podstatus.DEFERRED, podstatus.INFEASIBLE, podstatus.ERROR)}
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "record":
                found |= {text for one in node.args[1:2] for text in _texts(one)}
    return found


def test_the_table_of_pods_events_is_the_code() -> None:
    table = section("Events of pods").split("| reason of a pod's event | meaning |")[1]
    promised = set(re.findall(r"^\| `(\w+)` \|", table, re.M))
    assert "ResizeRefused" in promised
    assert promised == recorded()


def test_every_distribution_is_explained() -> None:
    table = section("Distributions")
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(distros.CHOICES)
    assert missing([distros.DROP_IN, "*" + distros.BACKUP_SUFFIX], table) == []
    for layout in distros.LAYOUTS.values():
        folder = layout.config.removesuffix("config.toml")
        assert folder in table, f"{layout.name}: {folder}"
        assert missing(list(layout.units), table) == []


def test_every_webhook_is_explained() -> None:
    manifest = (CHART / "templates/manager/webhooks.yaml").read_text()
    names = set(re.findall(r"name: ([a-z]+\.architect\.loopholelabs\.io)$", manifest, re.M))
    hooks = set(re.findall(r'webhookClient" \(list \. "(/[a-z-]+)"', manifest))
    assert len(names) == 3
    assert len(hooks) == 4
    assert missing(sorted(names | hooks), section("Webhooks")) == []


def test_every_object_of_the_chart_with_a_name_of_its_own_is_explained() -> None:
    page = section("In a cluster")
    text = "\n".join(one.read_text() for one in CHART.rglob("templates/*.yaml"))
    classes = re.findall(r"^kind: PriorityClass\nmetadata:\n  name: ([a-z-]+)", text, re.M)
    policies = re.findall(r"architect-(?:pods|nodes)", text)
    assert classes
    assert policies
    crds = "\n".join(one.read_text() for one in CHART.glob("templates/crds/*.yaml"))
    kinds = re.findall(r"^    kind: (\w+)$", crds, re.M) + re.findall(
        r"shortNames: \[(\w+)\]", crds
    )
    assert len(kinds) == 4
    names = {*classes, *policies, *kinds, *kubernetes.RUNTIME_CLASSES, kubernetes.READY_CONDITION}
    names |= {kubernetes.REMOVAL_REQUESTED, kubernetes.REMOVAL_DONE, kubernetes.REMOVAL_WITHDRAWN}
    assert missing(sorted(names), page) == []


@pytest.mark.parametrize("page", PROSE, ids=lambda page: page.name)
def test_every_value_that_a_command_sets_is_in_the_chart(page: Path) -> None:
    values = yaml.safe_load((CHART / "values.yaml").read_text())
    example = yaml.safe_load((ROOT / "charts/example-go/values.yaml").read_text())
    text = page.read_text()
    given = re.findall(r"(?:--set[ =]['\"]?|SET=['\"]?)([A-Za-z][\w.-]*)", text)
    for name in given:
        first = name.split(".")[0]
        assert first in values or first in example, f"{page.name} sets {name}"
    for chart in re.findall(r"(?<![\w/])charts/[a-z-]+", text):
        assert (ROOT / chart).is_dir(), f"{page.name} names {chart}"


def test_the_commands_set_something() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    assert len(re.findall(r"--set ", guide)) > 10


def test_the_quick_start_is_the_one_that_users_know() -> None:
    guide = (ROOT / "docs" / "guide.md").read_text()
    steps = re.split(
        r"^## ", guide.split("## Quick start on a cluster\n")[1], maxsplit=1, flags=re.M
    )[0]
    for line in (
        "kubectl label nodes <node-name> architect.loopholelabs.io/node=true",
        "kubectl label nodes <node-name> architect.loopholelabs.io/critical-node=true",
        "helm uninstall -n architect architect || true",
        "helm install architect charts/architect \\",
        "helm uninstall example-go || true",
        "helm install example-go charts/example-go --wait",
        "kubectl get pods -w",
        "kubectl exec -it <example-go-pod> -- curl localhost:8080",
        "kubectl top pods",
    ):
        assert f"\n{line}\n" in steps, line
