"""What the control plane mends on pods whose architectd has not: decided from the API's objects alone.

architectd writes what its node's containers do. It may die between two writes, or with its node. Then the
control plane goes on with the same decisions (:mod:`architect.decisions.podstatus`), but it does not know
what containers do, only what the labels say; so it never says that a container has gone to sleep or woken.
It acts only when the same thing has been left undone for a while, so that it never races architectd.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from architect.contract.annotations import MANAGED_CONTAINERS
from architect.contract.kubernetes import RUNNING, SCALED_DOWN
from architect.decisions import podstatus
from architect.decisions.podstatus import Meta, Seen, Write
from architect.decisions.resources import Server

PATIENCE_S: Final = 10.0
"""How long something is left to architectd: it writes within a second, and starts again within a few."""


class NodeState(enum.Enum):
    """What is known of the node that a pod is on."""

    SERVED = "architectd is ready on it"
    UNSERVED = "it is ready, but no architectd is"
    AWAY = "it is not ready, or gone"


def node_state(ready: str | None, served: bool) -> NodeState:
    """The state of a node by its Ready condition (None: no such node) and its architectd's readiness."""
    if ready != "True":
        return NodeState.AWAY
    return NodeState.SERVED if served else NodeState.UNSERVED


class Repair(enum.StrEnum):
    """What was mended: the reason of the event."""

    RESTORED = "RequestsRestored"
    """A running container had not got its requests back."""
    LOWERED = "RequestsLowered"
    """The requests of a hibernated container had not been lowered."""
    FORGOTTEN = "StatusRemoved"
    """The pod still showed the state of a container that is no longer managed, or that does not exist."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that architectd should have done: make the pod show ``truth``, by ``writes``."""

    repair: Repair
    truth: tuple[tuple[str, str | None], ...]
    writes: tuple[Write, ...]

    @property
    def message(self) -> str:
        """For the event."""
        names = ", ".join(name for name, _ in self.truth)
        done = {
            Repair.RESTORED: f"gave the requests of what is awake of {names} back",
            Repair.LOWERED: f"lowered the requests of what is hibernated of {names}",
            Repair.FORGOTTEN: f"removed what the pod showed of containers no longer managed ({names})",
        }
        return f"{done[self.repair]}, because architectd on its node had not"


def managed(annotations: Mapping[str, str]) -> frozenset[str] | None:
    """Containers that the pod wants managed; None if the annotation cannot be read."""
    try:
        found = json.loads(annotations.get(MANAGED_CONTAINERS, "[]"))
    except ValueError:
        return None
    if not isinstance(found, list) or not all(isinstance(one, str) for one in found):
        return None
    return frozenset(found)


def find(seen: Seen, node: NodeState, server: Server) -> Finding | None:
    """What is to be mended on a pod now, if anything.

    Nothing on nodes that are away: their containers may do anything, and the node lifecycle controller
    decides about the pods. A label that says SCALED_DOWN is never removed: its container sleeps, and
    architectd has to wake it first, whatever the annotations say now.

    Raises:
        InvalidQuantity: the pod's spec has one that the API server would not have taken.
    """
    if node is NodeState.AWAY or seen.ending:
        return None
    shown = podstatus.labelled(seen.labels)
    truth: dict[str, str | None] = {
        name: state for name, state in shown.items() if state in (RUNNING, SCALED_DOWN)
    }
    wanted = managed(seen.annotations)
    if node is NodeState.UNSERVED and wanted is not None:
        truth |= {
            name: None for name, state in shown.items() if name not in wanted and state == RUNNING
        }
    truth |= {name: None for name in shown if seen.resources.get(name) is None}
    plan = tuple(podstatus.writes(seen, truth, server))
    if not plan:
        return None
    return Finding(_repair(plan, truth), tuple(sorted(truth.items())), plan)


def _repair(plan: tuple[Write, ...], truth: Mapping[str, str | None]) -> Repair:
    first = plan[0]
    if isinstance(first, Meta):
        return Repair.FORGOTTEN if first.labels else Repair.RESTORED
    slept = [
        old.name
        for old, new in zip(first.before.containers, first.after.containers, strict=True)
        if old != new
    ]
    asleep = all(truth.get(name) == SCALED_DOWN for name in slept)
    return Repair.LOWERED if asleep else Repair.RESTORED


@dataclass(frozen=True, slots=True)
class Suspicion:
    """A finding that has been there since ``since`` (seconds, monotonic)."""

    finding: Finding
    since: float


def suspect(finding: Finding | None, now: float, earlier: Suspicion | None) -> Suspicion | None:
    """The suspicion after another look: the clock starts anew whenever the finding is another one."""
    if finding is None:
        return None
    if earlier is not None and earlier.finding == finding:
        return earlier
    return Suspicion(finding, now)
