"""A pod without a controller goes to another node: `kubectl architect move`.

Nothing replaces such a pod, so this command does, with the rights of whoever calls it: it asks the API
server whether a successor would be taken, says by an annotation that there will be one, deletes the pod and
makes the successor when it is gone. Its state goes the way of every other pod's (docs/moving.md). From the
deletion on the successor is in a file, too, whose name is said if anything comes in between.
"""

from __future__ import annotations

import json
import os
import shlex
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NoReturn

import msgspec

from architect.adapters.kube import owners, pods
from architect.adapters.kube import resources as api
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import (
    CANNOT_MOVE,
    GROUP,
    MIGRATED,
    MOVE_REQUESTED,
    STARTED_FRESH,
)
from architect.decisions import podstatus, successor
from architect.decisions.reconcile import managed
from architect.decisions.resources import raised
from architect.processes.cli.cluster import ClusterError, kubectl

_POLL_S: Final = 0.2
_ENDS_S: Final = 60.0
"""Seconds that a pod may outlive its grace: the kubelet's and the API server's own."""
_ARRIVES_S: Final = 600.0
_MADE_S: Final = 30.0
"""Seconds in which a quota learns that the old pod is gone."""
_QUOTA: Final = "exceeded quota"
_NONE: Final = ("(Forbidden)", "doesn't have a resource type")
_RESTORE_FAILED: Final = "RestoreFailed"


def move(name: str, namespace: str, to: str) -> None:
    """Moves a pod and returns when it runs on the other node.

    Raises:
        NotMoved: it cannot be moved so, and runs on; or it runs there without its state.
        ClusterError: the cluster refused something, or did not get on with it.
    """
    text = kubectl("get", "pod", f"--namespace={namespace}", "--output=json", name)
    old: dict[str, Any] = json.loads(text)
    successor.refuse(old)
    nodes = _nodes()
    if nodes is not None:
        successor.refuse_nodes(old, nodes, to)
    pod = msgspec.convert(old, api.Pod)
    back = raised(
        pods.seen(pod).resources,
        managed(pod.annotations) or (),
        podstatus.originals(pod.annotations),
    )
    new = successor.successor(old, to, back)
    _would_be_taken(new, namespace)
    handle, file = tempfile.mkstemp(prefix=f"architect-move-{name}-", suffix=".json")
    with os.fdopen(handle, "w") as out:
        json.dump(new, out, indent=2)
    try:
        _delete(pod)
    except BaseException:
        Path(file).unlink()
        raise
    by_hand = f"the successor is in {file}: `kubectl create -f {shlex.quote(file)}` when it is gone"
    try:
        has_state = _ended(pod)
        made = _make(namespace, file)
    except ArchitectError as error:
        raise type(error)(error.what, error.why, by_hand) from error
    except BaseException:
        print(f"architect: {pod.key} is being deleted; {by_hand}", file=sys.stderr)
        raise
    Path(file).unlink()
    _arrived(pod, made, has_state)


def _nodes() -> list[dict[str, Any]] | None:
    """All nodes; None if the caller may not see them: then the scheduler alone says what fits."""
    try:
        text = kubectl("get", "nodes", "--output=json")
    except ClusterError as error:
        if _NONE[0] in error.why:
            return None
        raise
    found: list[dict[str, Any]] = json.loads(text)["items"]
    return found


def _would_be_taken(new: dict[str, Any], namespace: str) -> None:
    """Asks the API server, which asks every webhook and policy, and keeps nothing.

    A quota that has no room for two is none of a pod that replaces one.
    """
    trial = json.dumps(successor.trial(new))
    words = ("create", f"--namespace={namespace}", "--dry-run=server", "--output=name", "-f", "-")
    try:
        kubectl(*words, given=trial)
    except ClusterError as error:
        if _QUOTA not in error.why:
            what = f"pod {namespace}/{new['metadata']['name']} is not moved"
            raise successor.NotMoved(what, f"no successor may be made: {error.why}") from error


def _delete(pod: api.Pod) -> None:
    """Marks it as one that has a successor and deletes it; if it cannot, nothing is marked."""
    name, namespace, uid = pod.metadata.name, pod.metadata.namespace, pod.metadata.uid
    _mark(pod, uid)
    options = {"apiVersion": "v1", "kind": "DeleteOptions", "preconditions": {"uid": uid}}
    try:
        path = f"/api/v1/namespaces/{namespace}/pods/{name}"
        kubectl("delete", f"--raw={path}", "-f", "-", given=json.dumps(options))
    except BaseException:
        _mark(pod, pod.annotations.get(MOVE_REQUESTED))
        raise


def _mark(pod: api.Pod, value: str | None) -> None:
    # With the UID the API server refuses (409) to mark another pod of that name.
    metadata = {"uid": pod.metadata.uid, "annotations": {MOVE_REQUESTED: value}}
    words = (f"--namespace={pod.metadata.namespace}", pod.metadata.name, "--type=merge")
    kubectl("patch", "pod", *words, f"--patch={json.dumps({'metadata': metadata})}")


def _await(what: str, why: str, within_s: float, look: Callable[[], bool]) -> None:
    deadline = time.monotonic() + within_s
    while not look():
        if time.monotonic() > deadline:
            raise ClusterError(what, f"{why} within {within_s:.0f} s")
        time.sleep(_POLL_S)


def _read(pod: api.Pod) -> api.Pod | None:
    """The pod of that name as it is now; None if there is none."""
    words = (f"--namespace={pod.metadata.namespace}", pod.metadata.name)
    text = kubectl("get", "pod", *words, "--ignore-not-found", "--output=json")
    return msgspec.json.decode(text, type=api.Pod) if text else None


def _ended(pod: api.Pod) -> bool:
    """Waits until the pod is gone, and says whether it has left a state."""

    def is_gone() -> bool:
        now = _read(pod)
        return now is None or now.metadata.uid != pod.metadata.uid

    grace = pod.spec.terminationGracePeriodSeconds or 0
    _await(f"pod {pod.key}", "it has not come to its end", grace + _ENDS_S, is_gone)
    return _checkpoint(pod) is not None


def _checkpoint(pod: api.Pod) -> api.Checkpoint | None:
    """The Checkpoint of a pod; None if there is none, or the caller may not see it."""
    words = (f"--namespace={pod.metadata.namespace}", owners.checkpoint_name(pod))
    text = kubectl("get", f"checkpoints.{GROUP}", *words, "--ignore-not-found", "--output=json")
    return msgspec.json.decode(text, type=api.Checkpoint) if text else None


def _make(namespace: str, file: str) -> api.Pod:
    words = ("create", f"--namespace={namespace}", "-f", file, "--output=json")
    deadline = time.monotonic() + _MADE_S
    while True:
        try:
            return msgspec.json.decode(kubectl(*words), type=api.Pod)
        except ClusterError as error:
            if _QUOTA not in error.why or time.monotonic() > deadline:
                raise
            time.sleep(_POLL_S)


def _arrived(old: api.Pod, made: api.Pod, has_state: bool) -> None:
    """Waits until the successor has the state, and says what it waits for meanwhile."""
    what, said = f"pod {made.key}", ""
    rest = "nothing is lost" if has_state else ""
    deadline = time.monotonic() + _ARRIVES_S
    while True:
        now = _read(made)
        if now is None or now.metadata.uid != made.metadata.uid:
            raise ClusterError(what, "somebody has deleted the successor", rest)
        told = _told(now)
        if MIGRATED in told:
            print(f"pod/{now.metadata.name} runs on {now.spec.nodeName}: {told[MIGRATED]}")
            return
        if not has_state and (now.status.phase or "Pending") != "Pending":
            _without(what, now, {**_told(old), **told})
        if STARTED_FRESH in told or CANNOT_MOVE in told:
            _without(what, now, told)
        waits = told.get(_RESTORE_FAILED) or _waits(now)
        if waits and waits != said:
            print(f"{what} waits: {waits}", file=sys.stderr)
            said = waits
        if time.monotonic() > deadline:
            why = f"it has not begun within {_ARRIVES_S:.0f} s: {said or now.status.phase}"
            raise ClusterError(what, why, f"{rest}; see `kubectl architect checkpoints`")
        time.sleep(_POLL_S)


def _without(what: str, now: api.Pod, told: dict[str, str]) -> NoReturn:
    reasons = (CANNOT_MOVE, "CheckpointFailed", STARTED_FRESH)
    why = next((told[one] for one in reasons if one in told), "its state could not be kept")
    raise successor.NotMoved(what, f"it runs on {now.spec.nodeName} without its state: {why}")


def _told(pod: api.Pod) -> dict[str, str]:
    """Reason -> message of what has happened to a pod."""
    field = f"--field-selector=involvedObject.uid={pod.metadata.uid}"
    text = kubectl("get", "events", f"--namespace={pod.metadata.namespace}", field, "--output=json")
    return {one.get("reason", ""): one.get("message", "") for one in json.loads(text)["items"]}


def _waits(pod: api.Pod) -> str:
    """What the scheduler or the kubelet says of a pod that does not run yet."""
    for one in pod.status.conditions or ():
        if one.type == "PodScheduled" and one.status != "True":
            return one.message or one.reason or ""
    return ""
