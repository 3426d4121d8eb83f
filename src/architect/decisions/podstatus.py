"""What is to be written on a pod so that it shows which of its containers are hibernated.

architectd calls this with the truth of its node whenever a container hibernates or wakes, the control plane
with what the labels say when architectd has made no progress. One write at a time is decided, from the
pod as the API last returned it, so whoever is killed between two writes leaves a pod from which the other
goes on. The order never loses a quantity:

- hibernation: label and original requests (one merge patch), then the requests are lowered (one resize);
- wake: the requests are raised (one resize), then the label changes and the originals go (one merge patch).

With an event each that is six writes a cycle. A resize that the API refuses keeps the originals and must not
keep the label from being written: pass ``refused``.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from architect.contract.annotations import CPU_REQUESTS, MEMORY_REQUESTS, STATUS_LABEL_PREFIX
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import RUNNING, SCALED_DOWN, status_label
from architect.contract.quantities import InvalidQuantity, parse, same
from architect.decisions import resources
from architect.decisions.resources import CPU, MEMORY, PodResources, Server

ANNOTATIONS: Final = {CPU: CPU_REQUESTS, MEMORY: MEMORY_REQUESTS}

RESIZE_PENDING: Final = "PodResizePending"
RESIZE_IN_PROGRESS: Final = "PodResizeInProgress"
DEFERRED: Final = "Deferred"
INFEASIBLE: Final = "Infeasible"
ERROR: Final = "Error"
_MOST_WRITES: Final = 8
"""More than any plan needs; a plan that gets here would never end."""

Truth = Mapping[str, str | None]
"""Container -> RUNNING or SCALED_DOWN; None for one that is no longer managed. Others stay as they are."""


@dataclass(frozen=True, slots=True)
class Condition:
    """One of the pod's conditions that is True."""

    type: str
    reason: str = ""
    message: str = ""


@dataclass(frozen=True, slots=True)
class Seen:
    """The pod as last seen."""

    resources: PodResources
    labels: Mapping[str, str] = field(default_factory=dict)
    annotations: Mapping[str, str] = field(default_factory=dict)
    conditions: tuple[Condition, ...] = ()
    ending: bool = False
    """It is being deleted, or all its containers have ended: nothing is written any more."""


@dataclass(frozen=True, slots=True)
class Meta:
    """A merge patch of labels and annotations; None removes one."""

    labels: Mapping[str, str | None]
    annotations: Mapping[str, str | None]

    def body(self) -> dict[str, Any]:
        """The patch."""
        both = {"labels": dict(self.labels), "annotations": dict(self.annotations)}
        return {"metadata": {name: values for name, values in both.items() if values}}


@dataclass(frozen=True, slots=True)
class Resize:
    """A strategic merge patch of the subresource ``resize``."""

    before: PodResources
    after: PodResources

    def body(self) -> dict[str, Any]:
        """The patch."""
        return resources.patch(self.before, self.after) or {}


Write = Meta | Resize


def originals(annotations: Mapping[str, str]) -> dict[str, dict[str, str]]:
    """What the annotations remember: resource -> container -> quantity.

    What is not a quantity of a container is not ours and cannot be given back: it is left out.
    """
    return {
        resource: dict(_quantities(annotations.get(annotation, "")))
        for resource, annotation in ANNOTATIONS.items()
    }


@functools.lru_cache(maxsize=4096)
def _quantities(text: str) -> tuple[tuple[str, str], ...]:
    try:
        value = json.loads(text)
    except ValueError:
        return ()
    found = []
    for container, quantity in value.items() if isinstance(value, dict) else ():
        try:
            parse(quantity)
        except (InvalidQuantity, TypeError):
            continue
        found.append((container, quantity))
    return tuple(found)


def remembered(annotations: Mapping[str, str]) -> bool:
    """Whether requests of the pod are waiting to be given back."""
    return any(annotation in annotations for annotation in ANNOTATIONS.values())


def labelled(labels: Mapping[str, str]) -> dict[str, str]:
    """Container -> state, by the pod's labels."""
    return {
        name.removeprefix(STATUS_LABEL_PREFIX): value
        for name, value in labels.items()
        if name.startswith(STATUS_LABEL_PREFIX)
    }


def _kept(seen: Seen, truth: Truth, server: Server) -> dict[str, dict[str, str]]:
    """The originals that have to be remembered now, before any further resize."""
    noted = originals(seen.annotations)
    shown = labelled(seen.labels)
    kept: dict[str, dict[str, str]] = {resource: {} for resource in ANNOTATIONS}
    for container in seen.resources.containers:
        name = container.name
        asleep = truth.get(name) == SCALED_DOWN
        # What was remembered for a hibernation that the label shows is final: if it is gone or another
        # value is set, somebody else decided so. At the start of one, what is there now is the original.
        begins = asleep and shown.get(name) != SCALED_DOWN
        fresh = resources.to_remember(seen.resources, name, server) if begins else {}
        for resource in ANNOTATIONS:
            original = noted[resource].get(name)
            if original is None or resources.belongs_to_user(
                seen.resources, name, resource, original
            ):
                if resource in fresh:
                    kept[resource][name] = fresh[resource]
            elif name not in truth or asleep or not same(container.requests[resource], original):
                kept[resource][name] = original
    return kept


def _meta(seen: Seen, truth: Truth, kept: Mapping[str, Mapping[str, str]]) -> Meta | None:
    labels = {
        status_label(name): state
        for name, state in truth.items()
        if seen.labels.get(status_label(name)) != state
    }
    annotations: dict[str, str | None] = {}
    noted = originals(seen.annotations)
    for resource, annotation in ANNOTATIONS.items():
        if kept[resource] != noted[resource] or (
            not kept[resource] and annotation in seen.annotations
        ):
            text = json.dumps(kept[resource], sort_keys=True, separators=(",", ":"))
            annotations[annotation] = text if kept[resource] else None
    return Meta(labels, annotations) if labels or annotations else None


def next_write(seen: Seen, truth: Truth, server: Server, refused: bool = False) -> Write | None:
    """The next write, or None if the pod shows the truth (or will, without us).

    ``refused``: the API has refused a resize of this pod in this round; do what can be done without.

    Raises:
        InvalidQuantity: the pod's spec has one that the API server would not have taken.
    """
    if seen.ending:
        return None
    truth = {name: state for name, state in truth.items() if seen.resources.get(name)} | {
        name: None for name, state in truth.items() if state is None
    }
    resizable = server.resize and not refused
    if resizable:
        awake = [name for name, state in truth.items() if state != SCALED_DOWN]
        up = resources.raised(seen.resources, awake, originals(seen.annotations))
        if up != seen.resources:
            return Resize(seen.resources, up)
    kept = _kept(seen, truth, server)
    meta = _meta(seen, truth, kept)
    if meta is not None:
        return meta
    if resizable:
        asleep = [name for name, state in truth.items() if state == SCALED_DOWN]
        down = resources.lowered(seen.resources, asleep, kept)
        if down != seen.resources:
            return Resize(seen.resources, down)
    return None


def applied(seen: Seen, write: Write) -> Seen:
    """The pod after a write that was accepted, if nobody else writes."""
    if isinstance(write, Resize):
        return replace(seen, resources=write.after)
    labels = {**seen.labels, **write.labels}
    annotations = {**seen.annotations, **write.annotations}
    return replace(
        seen,
        labels={name: value for name, value in labels.items() if value is not None},
        annotations={name: value for name, value in annotations.items() if value is not None},
    )


def writes(seen: Seen, truth: Truth, server: Server) -> Iterator[Write]:
    """All writes in order, as they would be if each is accepted and nobody else writes."""
    for _ in range(_MOST_WRITES):
        write = next_write(seen, truth, server)
        if write is None:
            return
        yield write
        seen = applied(seen, write)
    raise ArchitectError(
        "writes of a pod", f"no end after {_MOST_WRITES}", "this is a bug: report it"
    )


@dataclass(frozen=True, slots=True)
class Trouble:
    """A resize that was accepted but is not carried out."""

    reason: str
    """DEFERRED, INFEASIBLE or ERROR."""
    message: str
    """What is wrong and what to do: one line, for an event."""


def trouble(seen: Seen) -> Trouble | None:
    """Whether the kubelet has not carried the last resize out, by the pod's conditions."""
    for condition in seen.conditions:
        if condition.type == RESIZE_PENDING and condition.reason == DEFERRED:
            return Trouble(
                DEFERRED,
                "the node has no room for the pod's requests now: the container runs without them and"
                f" is evicted first until other pods leave ({condition.message or 'no details'});"
                " the kubelet tries again by itself",
            )
        if condition.type == RESIZE_PENDING:
            return Trouble(
                INFEASIBLE,
                "the node can never have room for the pod's requests"
                f" ({condition.message or 'no details'}); delete the pod so that it moves to another"
                " node, or lower its requests",
            )
        if condition.type == RESIZE_IN_PROGRESS and condition.reason == ERROR:
            return Trouble(
                ERROR,
                f"the kubelet could not resize the pod ({condition.message or 'no details'});"
                " it tries again by itself",
            )
    return None


__all__ = [
    "ANNOTATIONS",
    "RUNNING",
    "SCALED_DOWN",
    "Condition",
    "Meta",
    "Resize",
    "Seen",
    "Trouble",
    "Truth",
    "Write",
    "applied",
    "labelled",
    "next_write",
    "originals",
    "remembered",
    "trouble",
    "writes",
]
