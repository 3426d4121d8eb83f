"""The chart's own files agree with each other and with the code; what needs helm is in tests/cluster.

A value that is added without a line in the chart's README and in its schema, and a version that is
raised in one place only, fail here.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # it comes with lightkube, its stubs do not

import architect
from architect.adapters.kube.resources import EndpointSlice, Service
from architect.contract import annotations as contract
from architect.contract import durations, kubernetes
from architect.contract.errors import InvalidDuration
from architect.contract.moving import OnRestoreFailure
from architect.decisions import distros

CHART = Path(__file__).resolve().parents[2] / "charts" / "architect"
ROW = re.compile(r"^\| `([\w.]+)` \| `([^`]*)` \|", re.M)


def loaded(name: str) -> Any:
    return yaml.safe_load((CHART / name).read_text())


def leaves(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The values a user sets, by dotted name; resources and selectors are one each."""
    for name, value in values.items():
        if prefix + name in ("image", "certManager"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


VALUES = dict(leaves(loaded("values.yaml")))
SCHEMA = json.loads((CHART / "values.schema.json").read_text())


def test_the_chart_has_the_programs_version() -> None:
    chart = loaded("Chart.yaml")
    assert chart["version"] == chart["appVersion"] == architect.__version__


def test_the_readme_has_every_value_with_its_default() -> None:
    table = {name: yaml.safe_load(text) for name, text in ROW.findall(readme())}
    assert table == VALUES


def readme() -> str:
    return (CHART / "README.md").read_text().split("## What each component")[0]


def test_the_schema_has_every_value_and_no_other() -> None:
    known = set()
    for name, one in SCHEMA["properties"].items():
        assert one.get("additionalProperties", True) is False or "properties" not in one, name
        inner = one.get("properties")
        known |= {f"{name}.{key}" for key in inner} if inner else {name}
    assert SCHEMA["additionalProperties"] is False
    assert known == VALUES.keys() | {"global"}


@pytest.mark.parametrize("text", ["60s", "1h2m3.5s", "100ms", "1.5h", "2us", "3µs"])
def test_the_schema_takes_durations_as_annotations_do(text: str) -> None:
    pattern = SCHEMA["properties"]["defaultScaledownDuration"]["pattern"]
    assert re.search(pattern, text)
    assert durations.parse(text) > 0


@pytest.mark.parametrize("text", ["", "60", "-1s", "1 s", "1d", "s", "1s2"])
def test_the_schema_refuses_what_annotations_refuse(text: str) -> None:
    assert not re.search(SCHEMA["properties"]["defaultScaledownDuration"]["pattern"], text)
    with contextlib.suppress(InvalidDuration):
        assert durations.parse(text) < 0


def test_templates_use_the_names_of_the_contract() -> None:
    text = "\n".join(path.read_text() for path in CHART.rglob("*") if path.is_file())
    helper = '{{- define "architect.prefix" -}}' + contract.PREFIX.removesuffix("/")
    assert helper in text
    names = (*kubernetes.RUNTIME_CLASSES, kubernetes.MANAGER, kubernetes.CONTROL_PLANE)
    for name in (*names, kubernetes.DAEMON, kubernetes.NODE_LABEL, kubernetes.CRITICAL_NODE_LABEL):
        assert name in text


def test_the_policy_of_placeholders_has_the_addresses_that_nodes_drop() -> None:
    text = (CHART / "templates" / "placeholder-policy.yaml").read_text()
    assert f"address in {list(kubernetes.HOLDING_ADDRESSES.values())}" in text
    assert f"== '{kubernetes.GROUP}'" in text
    assert f'"{kubernetes.SLICE_MANAGER_LABEL}"' in text


def test_the_control_plane_may_do_what_placeholders_take() -> None:
    text = (CHART / "templates" / "control-plane" / "rbac.yaml").read_text()
    rules = yaml.safe_load(text.split("\nrules:\n")[1].split("\n---")[0])
    rights = {
        (group, resource): one["verbs"]
        for one in rules
        for group in one["apiGroups"]
        for resource in one["resources"]
    }
    for kind, verbs in (
        (Service, ["list", "watch"]),
        (EndpointSlice, ["list", "watch", "create", "delete"]),
    ):
        group = kind.api.split("/")[1] if kind.api.startswith("apis/") else ""
        assert rights[group, kind.plural] == verbs


def test_the_schema_has_the_distributions_that_nodes_know() -> None:
    assert SCHEMA["properties"]["kubernetesDistro"]["enum"] == sorted(distros.CHOICES)
    assert VALUES["kubernetesDistro"] == distros.AUTO


def test_the_defaults_are_those_of_the_contract() -> None:
    given = durations.parse(VALUES["defaultScaledownDuration"])
    assert given == contract.DEFAULTS.scaledown_ns
    assert VALUES["defaultNetworkMonitor"] == ""
    monitors = SCHEMA["properties"]["defaultNetworkMonitor"]["enum"]
    assert monitors == [
        "",
        *(m.value for m in contract.Monitor if m is not contract.Monitor.NONE),
    ]


def test_the_schema_has_what_may_follow_a_failed_restore() -> None:
    assert SCHEMA["properties"]["onRestoreFailure"]["enum"] == [*OnRestoreFailure]
    assert VALUES["onRestoreFailure"] == OnRestoreFailure.WAIT
    template = (CHART / "templates/architectd/daemonset.yaml").read_text()
    assert "--on-restore-failure={{ .Values.onRestoreFailure }}" in template


def test_no_default_names_a_registry() -> None:
    assert VALUES["image.repository"] == "localhost/architect"
    assert VALUES["machineToken"] == ""
