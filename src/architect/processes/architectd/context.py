"""What all containers of the daemon share. Made by :mod:`.main`, passed on by :mod:`.registry`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from architect.adapters.cpuweight import Boosts
from architect.adapters.events import EventLog
from architect.contract.annotations import DEFAULTS, Defaults
from architect.processes.architectd.gates import Gates


@dataclass(frozen=True, slots=True)
class Context:
    """See the module."""

    gates: Gates
    events: EventLog
    criu_version: str
    """Written into each checkpoint."""
    defaults: Defaults = DEFAULTS
    """What holds where annotations are silent."""
    answers_keep_alives: bool = False
    """TCP's probes are answered for sleepers by the kernel, under network-monitor "packets"."""
    in_cluster: bool = False
    """The webhook has seen the pods, and given them what it gives."""
    boosts: Boosts = field(default_factory=Boosts)
    """Whose share of the CPU is raised."""
    followers: list[Callable[[str], None]] = field(default_factory=list)
    """Told the uid of a pod whenever what is true of one of its containers may have changed."""

    def changed(self, pod_uid: str) -> None:
        """Tells the followers. They must not block: a wake may be on its way."""
        if pod_uid:
            for follower in self.followers:
                follower(pod_uid)
