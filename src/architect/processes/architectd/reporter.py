"""What a container tells the world: events for users, one structured log line a transition.

Called by :class:`.container.ManagedContainer` only.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from architect.adapters.events import EventLog
from architect.contract.records import ContainerRecord, Event


class Reporter:
    """Reports in the name of one container."""

    def __init__(self, record: ContainerRecord, events: EventLog) -> None:
        self._record = record
        self._events = events

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
