"""What a container tells the world: events for users, one structured log line a transition.

Called by :class:`.container.ManagedContainer` only.
"""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import Any

from architect.adapters.events import EventLog
from architect.adapters.gate import GateError
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord, Event, Row
from architect.contract.states import Happening, State
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.waiters import AWAKE


class Reporter:
    """Reports in the name of one container."""

    def __init__(self, record: ContainerRecord, events: EventLog) -> None:
        self._record = record
        self._events = events

    @property
    def name(self) -> str:
        """pod/container, for messages."""
        return f"{self._record.pod}/{self._record.container}"

    def down(self, why: str, size: int) -> None:
        """It is hibernated; ``size`` is its checkpoint's, in bytes."""
        record = self._record
        record.hibernations += 1
        record.error = None
        self.event("ScaledDown", f"{self.name} hibernated: {why}", record.last_scale_down_ms, size)

    def up(self, why: str) -> None:
        """It runs again."""
        self._record.error = None
        self.event("ScaledUp", f"{self.name} woke: {why}", self._record.last_scale_up_ms)

    def failed(self, reason: str, failure: ArchitectError | None) -> None:
        """A step failed and was undone; `architect ps` shows it until one succeeds."""
        text = str(failure or "unknown")
        self._record.error = text if self.name in text else f"{self.name}: {text}"
        self.event(reason, self._record.error)

    def row(self, state: State, clock: IdleClock, checkpoint_bytes: int) -> Row:
        """Its line in `architect ps`."""
        record, waiting, dropped = self._record, None, 0
        if clock.place is not None:
            with contextlib.suppress(GateError, OSError):
                waiting = clock.place.waiting()
                dropped = clock.place.activity().dropped
        return Row(
            namespace=record.namespace,
            pod=record.pod,
            container=record.container,
            id=record.id,
            state=state.shown,
            since=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.since)),
            idle_s=clock.idle_s() if state in AWAKE else None,
            hibernations=record.hibernations,
            last_scale_down_ms=record.last_scale_down_ms,
            last_scale_up_ms=record.last_scale_up_ms,
            checkpoint_bytes=checkpoint_bytes,
            memory_bytes=clock.cgroup.memory_bytes() if clock.cgroup else 0,
            held_packets=waiting.packets if waiting else 0,
            held_s=round(waiting.oldest_s, 1) if waiting else 0.0,
            dropped_packets=dropped,
            error=record.error,
        )

    def transition(
        self, before: State, state: State, happening: Happening, why: str, size: int
    ) -> None:
        """The one log line of a change of state."""
        self.log(
            "transition",
            state=state.value,
            was=before.value,
            because=happening.value,
            why=why,
            down_ms=self._record.last_scale_down_ms,
            up_ms=self._record.last_scale_up_ms,
            bytes=size,
        )

    def event(
        self, reason: str, message: str, duration_ms: float | None = None, size: int | None = None
    ) -> None:
        """Something a user should know of: what, why, what to do, in one line."""
        self._events.append(
            Event(
                time="",
                reason=reason,
                namespace=self._record.namespace,
                pod=self._record.pod,
                container=self._record.container,
                id=self._record.id,
                message=message,
                duration_ms=duration_ms,
                bytes=size,
            )
        )

    def log(self, what: str, **details: Any) -> None:
        """One JSON line on stderr: the journal, or /var/log/architectd.log."""
        line = {
            "time": round(time.time(), 3),
            "what": what,
            "pod": self._record.pod,
            "container": self._record.container,
            "id": self._record.id[:12],
            **details,
        }
        print(json.dumps(line), file=sys.stderr, flush=True)
