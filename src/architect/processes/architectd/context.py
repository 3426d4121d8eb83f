"""What all containers of the daemon share. Made by :mod:`.main`, passed on by :mod:`.registry`."""

from __future__ import annotations

from dataclasses import dataclass

from architect.adapters.events import EventLog
from architect.processes.architectd.gates import Gates


@dataclass(frozen=True, slots=True)
class Context:
    """See the module."""

    gates: Gates
    events: EventLog
    criu_version: str
    """Written into each checkpoint."""
