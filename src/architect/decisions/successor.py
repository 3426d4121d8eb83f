"""The pod that takes the place of one without a controller, elsewhere: may there be one, and what it is.

Called by `kubectl architect move` with what the API server has. The successor has the name, the labels and
the spec of the pod before it, so that nothing but its node and its UID is new; the annotation
:data:`architect.contract.kubernetes.MOVE_REQUESTED` says whose state is to come to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Final

from architect.contract.annotations import (
    CPU_REQUESTS,
    EXEC_PROBES,
    MANAGED_CONTAINERS,
    MEMORY_REQUESTS,
    STATUS_LABEL_PREFIX,
)
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import (
    MOVE_REQUESTED,
    READY_CONDITION,
    RUNC_CLASS,
    WAKE_REQUESTED,
)
from architect.decisions.podobject import (
    CONTAINERS,
    INIT_CONTAINERS,
    Object,
    as_object,
    as_objects,
    as_text,
    runtime_class,
    spec_of,
    strings,
)
from architect.decisions.reconcile import managed
from architect.decisions.resources import PodResources

_MIRROR: Final = "kubernetes.io/config.mirror"
_HOSTNAME: Final = "kubernetes.io/hostname"
_NAME_FIELD: Final = "metadata.name"
_OF_THE_OLD: Final = (CPU_REQUESTS, MEMORY_REQUESTS, EXEC_PROBES, WAKE_REQUESTED)
"""Annotations that say what is true of one pod alone, or that admission writes anew."""


class NotMoved(ArchitectError):
    """A pod that cannot be moved so; nothing was changed."""


def _named(pod: Object) -> str:
    metadata = as_object(pod.get("metadata"))
    return f"pod {as_text(metadata.get('namespace'))}/{as_text(metadata.get('name'))}"


def refuse(pod: Object) -> None:
    """Raise NotMoved if the pod cannot have a successor made by hand."""
    what = f"{_named(pod)} is not moved"
    metadata = as_object(pod.get("metadata"))
    owner = next(
        (one for one in as_objects(metadata.get("ownerReferences")) if one.get("controller")), None
    )
    if owner is not None:
        kind, name = as_text(owner.get("kind")), as_text(owner.get("name"))
        raise NotMoved(
            what,
            f"its {kind} {name} replaces it",
            "drain its node, or cordon it and delete the pod: its state goes to the replacement",
        )
    if _MIRROR in strings(pod, "annotations"):
        raise NotMoved(what, "it is a static pod, and belongs to its node", "move its manifest")
    if runtime_class(pod) != RUNC_CLASS or not managed(strings(pod, "annotations")):
        raise NotMoved(
            what,
            "none of its containers is managed",
            f"make it anew with runtimeClassName: {RUNC_CLASS} and {MANAGED_CONTAINERS}",
        )
    if metadata.get("deletionTimestamp"):
        raise NotMoved(what, "it is being deleted already", "wait for its end")
    phase = as_text(as_object(pod.get("status")).get("phase"))
    if phase != "Running":
        raise NotMoved(what, f"it is {phase or 'nowhere'}, not Running", "wait until it runs")
    selector = as_object(spec_of(pod).get("nodeSelector"))
    if _HOSTNAME in selector:
        raise NotMoved(
            what,
            f"its nodeSelector wants {_HOSTNAME}: {selector[_HOSTNAME]}",
            "make it anew without that",
        )


def refuse_nodes(pod: Object, nodes: Sequence[Object], to: str) -> None:
    """Raise NotMoved if the node ``to`` (empty: no other node) cannot take the pod, as far as nodes say."""
    what = f"{_named(pod)} is not moved"
    here = as_text(spec_of(pod).get("nodeName"))
    names = {as_text(as_object(one.get("metadata")).get("name")): one for one in nodes}
    fit = sorted(name for name, one in names.items() if name != here and not _unfit(one))
    if here in names and (why := _down(names[here])):
        raise NotMoved(what, f"its node {here}: {why}", "its state cannot be kept as long as that is so")
    listed = f"nodes that can take it: {', '.join(fit)}" if fit else "no node can take it"
    if to == here:
        raise NotMoved(what, f"--to {to}: it runs there already", listed)
    if to and to not in names:
        raise NotMoved(what, f"--to {to}: there is no such node", listed)
    if to and (why := _unfit(names[to])):
        raise NotMoved(what, f"--to {to}: {why}", listed)
    if not fit:
        raise NotMoved(
            what,
            f"it runs on {here}, and no other node can take it",
            "uncordon a node, or label one architect.loopholelabs.io/node=true",
        )


def _unfit(node: Object) -> str:
    """Why no managed pod may come to a node; empty if one may."""
    return "it is cordoned" if spec_of(node).get("unschedulable") is True else _down(node)


def _down(node: Object) -> str:
    """Why nothing is checkpointed or restored on a node; empty if it is."""
    conditions = {
        as_text(one.get("type")): one.get("status")
        for one in as_objects(as_object(node.get("status")).get("conditions"))
    }
    if conditions.get("Ready") != "True":
        return "it is not Ready"
    if conditions.get(READY_CONDITION) != "True":
        return "no architectd is ready there"
    return ""


def successor(pod: Object, to: str, back: PodResources) -> dict[str, Any]:
    """The pod to be made when ``pod`` is gone, on any other node, or on the node ``to`` if that is not empty.

    ``back`` are its resources with the requests of what sleeps given back.
    """
    metadata = as_object(pod.get("metadata"))
    spec = copy.deepcopy(dict(spec_of(pod)))
    here = as_text(spec.pop("nodeName", ""))
    # Only running pods have these.
    spec.pop("ephemeralContainers", None)
    _give_back(spec, back)
    _to_another(spec, here, to)
    annotations = strings(pod, "annotations")
    kept = {key: value for key, value in annotations.items() if key not in _OF_THE_OLD}
    labels = strings(pod, "labels").items()
    fresh = {
        "name": metadata.get("name"),
        "namespace": metadata.get("namespace"),
        "labels": {k: v for k, v in labels if not k.startswith(STATUS_LABEL_PREFIX)},
        "annotations": {**kept, MOVE_REQUESTED: as_text(metadata.get("uid"))},
    }
    for more in ("ownerReferences", "finalizers"):
        if more in metadata:
            fresh[more] = metadata[more]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": fresh, "spec": spec}


def trial(pod: Mapping[str, Any]) -> dict[str, Any]:
    """The same pod under another name, to ask the API server whether it would take it."""
    metadata = {key: value for key, value in pod["metadata"].items() if key != "name"}
    metadata["generateName"] = f"{pod['metadata']['name'][:40]}-"
    return {**pod, "metadata": metadata}


def _give_back(spec: dict[str, Any], back: PodResources) -> None:
    for kind in (CONTAINERS, INIT_CONTAINERS):
        for container in spec.get(kind) or ():
            known = back.get(container.get("name"))
            if known is None:
                continue
            for name, quantities in (("requests", known.requests), ("limits", known.limits)):
                if quantities:
                    container.setdefault("resources", {})[name] = dict(quantities)


def _to_another(spec: dict[str, Any], here: str, to: str) -> None:
    """Node affinity for any node but ``here``, or for ``to``; that of an earlier move is replaced.

    Source: NodeSelectorTerm of the Kubernetes API: terms are alternatives, what is in one counts together,
    and matchFields knows metadata.name with one value.
    """
    operator, node = ("In", to) if to else ("NotIn", here)
    wish = {"key": _NAME_FIELD, "operator": operator, "values": [node]}
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    terms = required.get("nodeSelectorTerms") or [{}]
    for term in terms:
        others = [one for one in term.get("matchFields") or () if one.get("key") != _NAME_FIELD]
        term["matchFields"] = [*others, wish]
    required["nodeSelectorTerms"] = terms
