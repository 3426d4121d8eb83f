"""What admission does so that a pod can move: it takes over hooks and grace, and says what will not move.

Called by decisions.podreview. The kubelet runs preStop and counts the grace whenever a pod is deleted, and
postStart at every start. A pod that moves must see neither, so architectd runs the hooks in the kubelet's
place, and ends the pod after the user's own grace (processes/architectd/lifecycle.py). The API server calls
the webhook again after others have changed the pod: what has been taken over once stays as it is.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any, Final

from architect.contract.annotations import (
    MANAGED_CONTAINERS,
    MIGRATE_EMPTYDIR_CONTAINERS,
    MOVING_ANNOTATIONS,
    POST_START,
    PRE_STOP,
    TERMINATION_GRACE_PERIOD,
    PodSettings,
)
from architect.contract.errors import InvalidAnnotation, quoted
from architect.contract.kubernetes import MOVE_REQUESTED
from architect.decisions.podobject import (
    Object,
    as_object,
    as_objects,
    as_text,
    containers,
    spec_of,
    strings,
)

_USUAL_GRACE_S: Final = 30
"""Kubernetes' own default, which the API server has filled in before it asks."""
_UID: Final = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_HOOKS: Final = {"preStop": PRE_STOP, "postStart": POST_START}


def _managed(pod: Object, settings: PodSettings) -> dict[str, tuple[str, Object]]:
    """The containers that will be managed: one with a terminal never is (decisions.admission)."""
    return {
        name: (place, container)
        for name, (place, container) in containers(pod).items()
        if settings.container(name).managed and container.get("tty") is not True
    }


def _asks_elsewhere(handler: Object) -> bool:
    """Whether a hook has its own host, which Pod Security forbids: it looks at the pod's fields alone."""
    return bool(as_object(handler.get("httpGet")).get("host"))


def _written(pod: Object, annotation: str) -> Mapping[str, Any]:
    try:
        return as_object(json.loads(strings(pod, "annotations").get(annotation, "{}")))
    except (ValueError, RecursionError):
        return {}


def _grace_s(pod: Object) -> int:
    given = spec_of(pod).get("terminationGracePeriodSeconds")
    return given if isinstance(given, int) and not isinstance(given, bool) else _USUAL_GRACE_S


def _annotate(annotation: str, value: str) -> Object:
    # A pod with managed containers has annotations already.
    path = "/metadata/annotations/" + annotation.replace("/", "~1")
    return {"op": "add", "path": path, "value": value}


def operations(pod: Object, settings: PodSettings, grace_s: int) -> list[Object]:
    """Return the JSON Patch that a new pod needs. ``grace_s`` is the least grace, 0 to leave it as it is."""
    ours = _managed(pod, settings)
    if not ours:
        return []
    patch: list[Object] = []
    own_s = _grace_s(pod)
    if own_s < grace_s:
        path = "/spec/terminationGracePeriodSeconds"
        patch.append(_annotate(TERMINATION_GRACE_PERIOD, str(own_s)))
        patch.append({"op": "add", "path": path, "value": grace_s})
    for hook, annotation in _HOOKS.items():
        taken = {
            name: (place, handler)
            for name, (place, container) in ours.items()
            if (handler := as_object(as_object(container.get("lifecycle")).get(hook)))
            and not _asks_elsewhere(handler)
        }
        if not taken:
            continue
        kept = {name: handler for name, (_, handler) in taken.items()}
        every = {**_written(pod, annotation), **kept}
        text = json.dumps(every, separators=(",", ":"), ensure_ascii=False)
        patch.append(_annotate(annotation, text))
        # stopSignal, which is beside them, stays the kubelet's: it comes to us with the stop.
        patch += [
            {"op": "remove", "path": f"{place}/lifecycle/{hook}"} for place, _ in taken.values()
        ]
    return patch


def refuse_forged(pod: Object, settings: PodSettings) -> None:
    """Refuse annotations of a new pod that admission cannot have written. Raises InvalidAnnotation.

    A good one of a user's passes: it cannot be told from ours, lets architectd do no more than the pod's own
    fields would let the kubelet do, and is what a pod restored from a backup has.
    """
    fix = "leave it out: Architect writes it"
    there, ours = strings(pod, "annotations"), _managed(pod, settings)
    grace = there.get(TERMINATION_GRACE_PERIOD)
    # Eighteen digits fit the API's number.
    if grace is not None and not (grace.isascii() and grace.isdecimal() and len(grace) <= 18):
        why = "is not a number of seconds"
        raise InvalidAnnotation(TERMINATION_GRACE_PERIOD, None, grace, why, fix)
    for annotation in _HOOKS.values():
        text = there.get(annotation)
        if text is None:
            continue
        hooks = _written(pod, annotation)
        if not hooks:
            raise InvalidAnnotation(annotation, None, text, "has no hooks", fix)
        for name, handler in hooks.items():
            if name not in ours:
                why = f"is of a container that is not in {MANAGED_CONTAINERS}"
            elif not isinstance(handler, Mapping) or not handler:
                why = "is not a hook"
            elif _asks_elsewhere(handler):
                why = "has a host of its own in httpGet"
            else:
                continue
            raise InvalidAnnotation(annotation, name, json.dumps(handler), why, fix)


def refuse_other_moves(pod: Object, old: Object | None) -> None:
    """Refuse a word of `kubectl architect move` that it cannot have said. Raises InvalidAnnotation.

    ``old`` is the pod before an edit, None of a new one, which may take over from any pod of its namespace:
    who may make pods there may have whatever its pods have.
    """
    value = strings(pod, "annotations").get(MOVE_REQUESTED)
    if value is None or (old is not None and strings(old, "annotations").get(MOVE_REQUESTED) == value):
        return
    fix = "leave it out: `kubectl architect move` writes it"
    if not _UID.fullmatch(value):
        raise InvalidAnnotation(MOVE_REQUESTED, None, value, "is not the UID of a pod", fix)
    if old is not None and value != as_object(pod.get("metadata")).get("uid"):
        raise InvalidAnnotation(MOVE_REQUESTED, None, value, "is not the UID of this pod", fix)


def left_to_the_kubelet(pod: Object, settings: PodSettings) -> list[str]:
    """Return the warnings about hooks that are not taken over."""
    return [
        f"container {quoted(name)}: its {hook} has a host in httpGet and is left to the kubelet, which runs "
        f"it when the pod moves, too; leave out host"
        for name, (_, container) in _managed(pod, settings).items()
        for hook in _HOOKS
        if _asks_elsewhere(as_object(as_object(container.get("lifecycle")).get(hook)))
    ]


def warnings(kind: str, template: Object, settings: PodSettings) -> list[str]:
    """Return what of a workload's pods does not move, or not at once; one line each.

    Said of workloads alone: a pod without one does not move by itself, and nobody reads what a controller is
    told.
    """
    ours = _managed(template, settings)
    found = [
        f"annotation {annotation}: written by Architect alone; leave it out of the pod template"
        for annotation in (*MOVING_ANNOTATIONS, MOVE_REQUESTED)
        if annotation in strings(template, "annotations")
    ]
    if not ours:
        return found
    if kind == "DaemonSet":
        return [*found, "pods of a DaemonSet belong to their nodes: they end there and never move"]
    if kind == "StatefulSet":
        found.append(
            "pods of a StatefulSet pause for seconds when they move: Kubernetes makes the new one only "
            "when the old one is gone"
        )
    volumes = {
        as_text(one.get("name")): one for one in as_objects(spec_of(template).get("volumes"))
    }
    for name, (_, container) in ours.items():
        moves = settings.container(name).migrate_emptydir
        # What is mounted twice, by subPath, is said once.
        mounted = {
            as_text(mount.get("name")): None
            for mount in as_objects(container.get("volumeMounts"))
            if mount.get("readOnly") is not True
        }
        found += [
            f"container {quoted(name)}: {trouble}"
            for volume in mounted
            if (trouble := _stays(volume, volumes.get(volume, {}), moves))
        ]
    return found


def _stays(name: str, volume: Object, moves: bool) -> str:
    """Why the contents of a volume do not come along; "" if they do."""
    stay = f"volume {quoted(name)} does not come along when the pod moves"
    if "hostPath" in volume:
        return f"hostPath {stay}; use a persistent volume"
    if "ephemeral" in volume:
        return f"ephemeral {stay}; use a PersistentVolumeClaim"
    directory = volume.get("emptyDir")
    in_memory = as_object(directory).get("medium") == "Memory"
    if "emptyDir" in volume and not moves and not in_memory:
        return f"emptyDir {stay}; add the container to {MIGRATE_EMPTYDIR_CONTAINERS}"
    return ""
