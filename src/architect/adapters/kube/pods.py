"""Pods as the decisions see them, and the writes that they decide, carried out.

Called by architectd for its node's pods and by the control plane for pods whose architectd made no
progress; both with the decisions of :mod:`architect.decisions.podstatus`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from architect.adapters.kube import resources as api
from architect.adapters.kube.client import Kube, KubeError, Style
from architect.adapters.kube.resources import Pod
from architect.decisions import podstatus
from architect.decisions.podstatus import Condition, Meta, Seen, Write
from architect.decisions.resources import Container, PodResources, Server

_ATTEMPTS = 8
"""Writes and conflicts of one :func:`settle`; what is left is done at the next."""


def _texts(quantities: Mapping[str, str | int | float] | None) -> dict[str, str]:
    return {name: str(value) for name, value in (quantities or {}).items()}


def _container(one: api.Container, init: bool) -> Container:
    return Container(
        name=one.name,
        requests=_texts(one.resources.requests),
        limits=_texts(one.resources.limits),
        init=init,
        sidecar=init and one.restartPolicy == "Always",
        restarts=frozenset(
            policy.resourceName
            for policy in one.resizePolicy or ()
            if policy.restartPolicy == "RestartContainer"
        ),
    )


def seen(pod: Pod) -> Seen:
    """The pod as :mod:`architect.decisions.podstatus` looks at it."""
    whole = pod.spec.resources or api.Requirements()
    containers = [_container(one, init=False) for one in pod.spec.containers]
    containers += [_container(one, init=True) for one in pod.spec.initContainers or ()]
    return Seen(
        resources=PodResources(tuple(containers), _texts(whole.requests), _texts(whole.limits)),
        labels=pod.labels,
        annotations=pod.annotations,
        conditions=tuple(
            Condition(one.type, one.reason or "", one.message or "")
            for one in pod.status.conditions or ()
            if one.status == "True"
        ),
        ending=pod.metadata.deletionTimestamp is not None
        or pod.status.phase in ("Succeeded", "Failed"),
    )


async def carry_out(kube: Kube, pod: Pod, write: Write, *, alone: bool = False) -> Pod:
    """Does one write and returns the pod as it is then.

    Never done to another pod of the same name (409). With ``alone`` it is refused (409) also if anybody has
    written the pod since it was seen.

    Raises:
        KubeError: the API server refused, or there was no answer.
    """
    body = write.body()
    metadata = body.setdefault("metadata", {})
    metadata["uid"] = pod.metadata.uid
    if alone:
        metadata["resourceVersion"] = pod.metadata.resourceVersion
    resize = not isinstance(write, Meta)
    try:
        return await kube.patch(
            Pod,
            pod.metadata.name,
            body,
            pod.metadata.namespace,
            subresource="resize" if resize else "",
            style=Style.STRATEGIC if resize else Style.MERGE,
        )
    except KubeError as error:
        # The API server has no precondition for patches: it takes this for a change of the uid.
        if error.status == 422 and "metadata.uid" in error.why:
            why = "another pod has that name now"
            raise KubeError(error.what, why, status=409, reason="Conflict") from error
        raise


@dataclass(frozen=True, slots=True)
class Outcome:
    """What :func:`settle` came to."""

    pod: Pod | None
    """As the last write returned it; None if it is gone."""
    writes: tuple[Write, ...]
    """Carried out, in order."""
    refused: KubeError | None = None
    """Why the API server refused a resize (a ResourceQuota, a LimitRange, a rule of a newer version): the
    requests are not what they should be. Try again later, and tell the user."""


async def settle(
    kube: Kube, pod: Pod, truth: podstatus.Truth, server: Server, *, alone: bool = False
) -> Outcome:
    """Makes a pod show the truth: asks the decisions for one write after the other and does them.

    Call it again if the truth has changed meanwhile, and after a temporary failure.

    Raises:
        KubeError: a write failed for a reason that is not the resize's own; what was written stays.
    """
    done: list[Write] = []
    refused: KubeError | None = None
    for _ in range(_ATTEMPTS):
        write = podstatus.next_write(seen(pod), truth, server, refused is not None)
        if write is None:
            break
        try:
            pod = await carry_out(kube, pod, write, alone=alone)
        except KubeError as error:
            if error.status == 404:
                return Outcome(None, tuple(done), refused)
            if error.status == 409:
                found = await _again(kube, pod)
                if found is None:
                    return Outcome(None, tuple(done), refused)
                pod = found
            elif isinstance(write, podstatus.Resize) and not error.temporary:
                refused = error
            else:
                raise
        else:
            done.append(write)
    return Outcome(pod, tuple(done), refused)


async def _again(kube: Kube, pod: Pod) -> Pod | None:
    try:
        found = await kube.get(Pod, pod.metadata.name, pod.metadata.namespace)
    except KubeError as error:
        if error.status == 404:
            return None
        raise
    return found if found.metadata.uid == pod.metadata.uid else None
