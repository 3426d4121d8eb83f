"""Whether a start waits for a state of another node: as long as the API does not say, or one may come.

What only architectd's starts without an API server show is tried on real nodes in tests/guest.
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from architect.adapters.kube import owners
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.resources import Pod
from architect.processes.architectd.cluster import arriving
from architect.processes.architectd.cluster.arriving import Arriving, StillOnItsWay
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.moving import MovableContainer
from tests.unit.test_checkpoints import NEW, pod


class Api:
    """An API server that gives one answer to each question for a pod."""

    def __init__(self, answer: Pod | KubeError) -> None:
        self.answer = answer
        self.asked = 0

    async def get(self, *_: Any) -> Pod:
        """The answer."""
        self.asked += 1
        if isinstance(self.answer, KubeError):
            raise self.answer
        return self.answer


AWAY = KubeError("GET pods/web-b", "no answer")
NOT_FOUND = KubeError("GET pods/web-b", "not found", status=404)


async def _starts(api: Api, *, copy: Pod | None = None, synced: bool = True) -> bool:
    """Whether a container of the pod "new" starts as new, its pod and no Checkpoint being known."""
    known = SimpleNamespace(objects={}, synced=asyncio.Event())
    if synced:
        known.synced.set()
    pods = SimpleNamespace(get=lambda _key: copy)
    recorder = SimpleNamespace(record=lambda *_: None)
    site = SimpleNamespace(kube=api, node="d", pods=pods, checkpoints=known, recorder=recorder)
    record = SimpleNamespace(container="main", pod="web-b", namespace="default", pod_uid="new")
    container = SimpleNamespace(
        name="web-b/main",
        record=record,
        arrivable=True,
        expecting=False,
        settings=SimpleNamespace(scaleup_timeout_ns=200_000_000),
    )
    return not await Arriving(cast(Site, site)).arrives(cast(MovableContainer, container))


def starts(api: Api, **known: Any) -> bool:
    """The same, in a loop."""
    return asyncio.run(_starts(api, **known))


@pytest.fixture(autouse=True)
def _soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(arriving, "_BLOCK_S", 0.3)
    monkeypatch.setattr(arriving, "_AGAIN_S", 0.05)


def test_a_pod_that_the_api_does_not_say_is_tried_again_by_the_kubelet() -> None:
    api = Api(AWAY)
    with pytest.raises(StillOnItsWay, match="the API does not answer"):
        starts(api)
    assert api.asked > 1


def test_a_pod_that_is_gone_starts_as_new() -> None:
    assert starts(Api(NOT_FOUND))


def test_without_knowing_the_checkpoints_nothing_starts_as_new() -> None:
    with pytest.raises(StillOnItsWay, match="the API does not answer"):
        starts(Api(NEW), copy=NEW, synced=False)


@pytest.mark.parametrize(
    ("state", "last", "waits"),
    [
        ({"waiting": {}}, {}, True),
        ({"waiting": {}}, {"terminated": {"exitCode": 1, "startedAt": "2026-01-01T00:00:00Z"}}, False),
        ({"waiting": {}}, {"terminated": {"exitCode": 128, "reason": "StartError"}}, True),
        ({"terminated": {"exitCode": 1, "startedAt": "2026-01-01T00:00:00Z"}}, {}, False),
    ],
    ids=["first start", "restart", "start that failed", "has just ended"],
)
def test_only_what_has_not_run_waits_for_a_sibling(
    monkeypatch: pytest.MonkeyPatch, state: Any, last: Any, waits: bool
) -> None:
    asked: list[None] = []

    async def may_come(*_: Any) -> bool:
        asked.append(None)
        return True

    monkeypatch.setattr(owners, "may_come", may_come)
    copy = pod("web-b", "new", "d", state=state, lastState=last)
    assert starts(Api(AWAY), copy=copy)
    assert bool(asked) == waits
