"""What an uninstall still waits for: decided from nodes and pods, for `architect-control-plane remove`.

Everything that sleeps is woken before the parts that can wake it go. A node is done when its architectd says
so and none of its pods shows a sleeper or waits for its requests any more.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass


class Standing(enum.Enum):
    """How far a node is."""

    DONE = "done"
    """Nothing sleeps there and architectd has stopped hibernating."""
    NOTHING = "no architectd, nothing of ours"
    """It has no architectd's pod, but no pod of ours that sleeps either: nothing can be lost there."""
    WAKING = "waking"
    """Its architectd is at it."""
    SILENT = "no answer"
    """Something sleeps there, or an architectd may start there, and none is ready that could answer."""


@dataclass(frozen=True, slots=True)
class NodeView:
    """A node that is ours by its label, or because pods of ours are on it."""

    name: str
    removal: str | None
    """Its removal annotation: None, "requested" or "done"."""
    daemon: bool
    """An architectd's pod is on it, ready or not."""
    served: bool
    """And it is ready."""
    ready: bool
    """The node itself is."""
    asleep: tuple[str, ...]
    """Pods on it (namespace/name) that show a sleeper, or wait for their requests."""


def standing(node: NodeView) -> Standing:
    """How far a node is."""
    if node.removal == "done" and not node.asleep:
        return Standing.DONE
    if node.served and node.ready:
        return Standing.WAKING
    return Standing.SILENT if node.asleep or node.daemon else Standing.NOTHING


def waits_for(nodes: Sequence[NodeView]) -> list[str]:
    """What is still missing, a phrase a node, for the log and for the error at the deadline."""
    found = []
    for node in nodes:
        how = standing(node)
        some = (
            f"{len(node.asleep)} pods asleep"
            if len(node.asleep) != 1
            else f"{node.asleep[0]} asleep"
        )
        if how is Standing.WAKING:
            what = some if node.asleep else "its architectd has not said that it is done"
            found.append(f"node {node.name}: {what}")
        elif how is Standing.SILENT:
            why = "no architectd is ready on it" if node.ready else "it is not ready"
            has = f", and it has {some}" if node.asleep else ""
            found.append(f"node {node.name} does not answer: {why}{has}")
    return found
