"""Shows on the node whether pods can hibernate there, and leaves it when the chart is removed.

Labels are for schedulers and people, the condition for dashboards and for whoever waits for a node.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Coroutine
from datetime import UTC, datetime
from typing import Any, Final

from architect.adapters import probes
from architect.adapters.kube.client import Kube, KubeError, Style
from architect.adapters.kube.informer import Backoff, Change, Informer, Timing
from architect.adapters.kube.resources import Node
from architect.contract import paths
from architect.contract.kubernetes import (
    FEATURE_LABEL_PREFIX,
    READY_CONDITION,
    REMOVAL_ANNOTATION,
    REMOVAL_DONE,
    REMOVAL_REQUESTED,
    REMOVAL_WITHDRAWN,
)
from architect.processes.architectd.cluster.pods import Pods
from architect.processes.architectd.log import log
from architect.processes.architectd.registry import Registry

_LOOK_S: Final = 0.5
"""Seconds between two looks whether everything is awake, while the node is being left."""


class NodeSide:
    """See the module."""

    def __init__(self, kube: Kube, name: str, registry: Registry, pods: Pods) -> None:
        self._kube = kube
        self._name = name
        self._registry = registry
        self._pods = pods
        self._leaving: asyncio.Task[None] | None = None
        self._labels: list[str] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self.informer = Informer(kube, Node, fields=f"metadata.name={name}")
        self.informer.add_handler(self._changed)

    async def show(self) -> None:
        """Probes the node and writes labels and condition; tries again until that has succeeded."""
        if paths.REMOVED.exists():
            # Between having left and the removal's end; architect-node takes it away when it installs.
            self._registry.retire()
            return
        findings = await asyncio.to_thread(probes.all_findings)
        self._labels = [FEATURE_LABEL_PREFIX + _slug(one.name) for one in findings]
        bad = [one for one in findings if one.verdict is probes.Verdict.FAIL]
        less = [one for one in findings if one.verdict is probes.Verdict.LESS]
        labels = {
            FEATURE_LABEL_PREFIX + _slug(one.name): one.verdict.value.lower() for one in findings
        }
        for one in (*bad, *less):
            log("probe", name=one.name, verdict=one.verdict, found=one.found, without=one.without)
        message = "; ".join(f"{one.name}: {one.found} ({one.without})" for one in bad)
        await self._insist({"metadata": {"labels": labels}})
        if bad:
            await self._condition("False", "NotFit", message)
        else:
            await self._condition("True", "Fit", "idle containers of managed pods hibernate here")

    async def leave(self) -> None:
        """The daemon ends: says so, if the API server answers."""
        if self._leaving is not None:
            return
        message = "architectd is not running; what runs goes on, what sleeps stays asleep"
        try:
            await self._write_condition("False", "Stopped", message)
        except KubeError as error:
            log("condition not written", error=str(error))

    async def _condition(self, status: str, reason: str, message: str) -> None:
        await self._insist(_condition(status, reason, message), "status")

    async def _write_condition(self, status: str, reason: str, message: str) -> None:
        body = _condition(status, reason, message)
        await self._kube.patch(Node, self._name, body, subresource="status", style=Style.STRATEGIC)

    async def _insist(self, body: dict[str, Any], subresource: str = "") -> None:
        backoff = Backoff(Timing())
        while True:
            try:
                await self._kube.patch(
                    Node, self._name, body, subresource=subresource, style=Style.STRATEGIC
                )
                return
            except KubeError as error:
                delay = backoff.next(error.retry_after)
                log("node not written", error=str(error), again_s=round(delay, 1))
                await asyncio.sleep(delay)

    # ---- removal ------------------------------------------------------------------------------------

    def _changed(self, change: Change[Node]) -> None:
        if change.new is None:
            return
        asked = change.new.annotations.get(REMOVAL_ANNOTATION)
        if asked == REMOVAL_REQUESTED and self._leaving is None:
            self._leaving = asyncio.create_task(self._leave_node())
        elif asked == REMOVAL_WITHDRAWN:
            self._stay()
        elif asked == REMOVAL_DONE and self._leaving is None and not paths.REMOVED.exists():
            # Of an earlier installation.
            self._background(self._insist(_annotation(None)))

    async def _leave_node(self) -> None:
        log("leaving the node", containers=len(self._registry.all()))
        self._registry.retire()
        while (busy := self._registry.busy()) or not self._pods.settled:
            await asyncio.sleep(_LOOK_S)
            for managed in busy:
                self._pods.stale(managed.record.pod_uid)
        paths.REMOVED.touch()
        # The account that may write this goes with the chart.
        gone = {"type": READY_CONDITION, "$patch": "delete"}
        await self._insist({"status": {"conditions": [gone]}}, "status")
        await self._insist({"metadata": {"labels": dict.fromkeys(self._labels)}})
        await self._insist(_annotation(REMOVAL_DONE))
        log("left the node")

    def _stay(self) -> None:
        """The chart stays installed, because another node could not be left."""
        if self._leaving is not None:
            self._leaving.cancel()
            self._leaving = None
        log("staying on the node")
        paths.REMOVED.unlink(missing_ok=True)
        self._registry.resume()
        self._background(self._insist(_annotation(None)))
        self._background(self.show())

    def _background(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _annotation(value: str | None) -> dict[str, Any]:
    return {"metadata": {"annotations": {REMOVAL_ANNOTATION: value}}}


def _condition(status: str, reason: str, message: str) -> dict[str, Any]:
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {
        "type": READY_CONDITION,
        "status": status,
        "reason": reason,
        "message": message,
        "lastHeartbeatTime": now,
        "lastTransitionTime": now,
    }
    return {"status": {"conditions": [condition]}}


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
