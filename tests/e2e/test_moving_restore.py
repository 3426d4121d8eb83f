"""A restore that fails after the commit: the pod waits with its state, or starts fresh if it is to."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, Final

import pytest

from tests.e2e import movers, movingfaults
from tests.e2e.movingfaults import number, other
from tests.e2e.site import Site, is_ready, soon

pytestmark = pytest.mark.cluster

PROGRAM: Final = "/run/architect/hot/criu/bin/criu"
"""The copy in memory, which restores."""
BROKEN: Final = '#!/bin/sh\ncase "$*" in *restore*) exit 1;; esac\nexec {program}.kept "$@"\n'
OPTION: Final = "--on-restore-failure=fresh"
ROLLOUT_S: Final = 90.0


@contextlib.contextmanager
def _broken(site: Site, node: str) -> Iterator[None]:
    """CRIU restores nothing on a node."""
    machine = site.cluster.node(number(node))
    machine.run("mv", PROGRAM, f"{PROGRAM}.kept")
    try:
        text = BROKEN.format(program=PROGRAM)
        machine.run("sh", "-c", 'printf %s "$1" >"$0" && chmod 755 "$0"', PROGRAM, text)
        yield
    finally:
        machine.run("mv", f"{PROGRAM}.kept", PROGRAM)


@pytest.fixture
def pod(site: Site) -> dict[str, Any]:
    """With one client's state, which it loses or not."""
    pod = site.start(movers.deployment("app"), app="app")
    client = site.connect(pod["metadata"]["name"])
    client("SET", "kept", "yes")
    client.close()
    return pod


def _checkpoint(site: Site, phase: str) -> dict[str, Any]:
    (one,) = movingfaults.checkpoints(site)
    assert one["status"]["phase"] == phase
    return one


def test_waits_and_goes_on_when_it_can(site: Site, pod: dict[str, Any]) -> None:
    node = pod["spec"]["nodeName"]
    client = site.connect(pod["metadata"]["name"])
    with _broken(site, other(node)), movers.cordoned(site, node):
        site.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        (fresh,) = soon("its successor", lambda: site.of("app"))
        name = fresh["metadata"]["name"]
        first = soon("the event", lambda: site.events(name, "RestoreFailed"))[0]
        assert "kept on node" in first
        assert "delete the pod" in first
        told = soon("the message", lambda: _checkpoint(site, "Committed")["status"]["message"])
        assert told in first
        soon(
            "another try",
            lambda: len(site.events(name, "RestoreFailed")) > 1 or _tries(site, name) > 1,
        )
        assert not is_ready(site.pod(name))
    after = soon("it to be ready", lambda: site.ready("app"), 120)
    assert after["metadata"]["uid"] == fresh["metadata"]["uid"]
    # With everything, also the connection that was there before.
    assert client("GET", "kept") == b"yes"
    assert site.events(name, "Migrated")


def _tries(site: Site, name: str) -> int:
    fields = f"involvedObject.name={name},reason=RestoreFailed"
    items = site.get("events", f"--field-selector={fields}")["items"]
    return sum(one.get("count") or 1 for one in items)


@contextlib.contextmanager
def _starting_fresh(site: Site) -> Iterator[None]:
    """architectd has the option that the chart's value onRestoreFailure gives it."""
    words = ("--namespace=architect", "daemonset/architectd")

    def change(*operations: dict[str, Any]) -> None:
        site.cluster.kubectl("patch", *words, "--type=json", "--patch", json.dumps(operations))
        site.cluster.kubectl("rollout", "status", *words, timeout_s=ROLLOUT_S)

    place = "/spec/template/spec/containers/0/args"
    now = site.cluster.get(*words)["spec"]["template"]["spec"]["containers"][0]["args"]
    fresh = [one for one in now if not one.startswith("--on-restore-failure")] + [OPTION]
    change({"op": "replace", "path": place, "value": fresh})
    try:
        yield
    finally:
        change({"op": "replace", "path": place, "value": now})


def test_starts_fresh_where_the_chart_says_so(site: Site, pod: dict[str, Any]) -> None:
    node = pod["spec"]["nodeName"]
    before = movingfaults.left(site)
    with _starting_fresh(site), _broken(site, other(node)), movers.cordoned(site, node):
        site.kubectl("delete", "pod", pod["metadata"]["name"], "--wait=false")
        fresh = movers.moved(site, "app", pod)
        name = fresh["metadata"]["name"]
        client = site.connect(name)
        assert client("GET", "kept") is None
        (said,) = site.events(name, "StartedFresh")
        assert "is deleted" in said
        one = _checkpoint(site, "Failed")
        assert one["status"]["message"] == said
        assert not one["status"]["move"].get("flows")
    # What was kept goes with the Checkpoint.
    kept = movingfaults.left(site) - before
    assert any("arrivals" in place for place in kept), kept
    site.kubectl("delete", "checkpoints.architect.loopholelabs.io", one["metadata"]["name"])
    soon("its state to be gone", lambda: not kept & movingfaults.left(site))
