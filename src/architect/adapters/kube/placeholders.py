"""EndpointSlices of ours, the Services that they are for, and how the decisions see both.

Called by the control plane (:mod:`architect.processes.controlplane.placeholders`), which decides by
:mod:`architect.decisions.placeholders`. A slice belongs to its Service, and is collected with it; not to the
Checkpoint, which may be deleted before the restored pod is Ready and anybody else answers for the Service.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any, Final

from architect.adapters.kube import resources as api
from architect.adapters.kube.client import Kube, KubeError
from architect.contract.kubernetes import (
    GROUP,
    HOLDING_ADDRESSES,
    PLACEHOLDER_OF,
    SERVICE_LABEL,
    SLICE_MANAGER_LABEL,
)
from architect.decisions.pairing import Phase
from architect.decisions.placeholders import (
    Existing,
    Move,
    Placeholder,
    Pod,
    Service,
    ServicePort,
)

SELECTOR: Final = f"{SLICE_MANAGER_LABEL}={GROUP}"
"""Label selector of the slices that are ours."""

# -- how the decisions see them -------------------------------------------------------------------------


def counts(service: api.Service) -> bool:
    """Whether new connections to it are given to pods by kube-proxy.

    Not those to a headless one, whose clients know the pods' addresses, nor to an ExternalName, which has no
    address; and what has no selector is filled by somebody else.
    """
    spec = service.spec
    return spec.clusterIP not in ("", "None") and bool(spec.selector and spec.ports)


def is_ours(found: api.EndpointSlice) -> bool:
    """Whether a slice is one that we have made, and may delete."""
    return found.labels.get(SLICE_MANAGER_LABEL) == GROUP


def services(found: Iterable[api.Service], namespaces: Collection[str]) -> list[Service]:
    """Those of some namespaces that count."""
    return [
        Service(
            namespace=one.metadata.namespace,
            name=one.metadata.name,
            uid=one.metadata.uid,
            selector=one.spec.selector or {},
            families=tuple(each for each in one.spec.ipFamilies or () if each in HOLDING_ADDRESSES),
            ports=tuple(
                ServicePort(port.name, port.protocol, port.port, port.targetPort)
                for port in one.spec.ports or ()
            ),
        )
        for one in found
        if one.metadata.namespace in namespaces and counts(one)
    ]


def moves(found: Iterable[api.Checkpoint]) -> list[Move]:
    """The Checkpoints."""
    return [
        Move(
            key=one.key,
            phase=Phase(one.status.phase),
            pod_uid=one.spec.podUID,
            owner=one.spec.owner.kind if one.spec.owner else "",
        )
        for one in found
    ]


def pods(found: Iterable[api.Pod], namespaces: Collection[str]) -> list[Pod]:
    """Those of some namespaces; one that has come to its end is never ready, whatever it still says."""
    return [
        Pod(
            uid=one.metadata.uid,
            namespace=one.metadata.namespace,
            labels=one.labels,
            ports={
                (port.name, port.protocol): port.containerPort
                for container in (*one.spec.containers, *(one.spec.initContainers or ()))
                for port in container.ports or ()
                if port.name
            },
            ready=one.status.phase == "Running"
            and any(
                each.type == "Ready" and each.status == "True"
                for each in one.status.conditions or ()
            ),
        )
        for one in found
        if one.metadata.namespace in namespaces
    ]


def existing(found: Iterable[api.EndpointSlice]) -> list[Existing]:
    """The slices that are ours."""
    return [
        Existing(
            key=one.key,
            checkpoint=f"{one.metadata.namespace}/{one.annotations.get(PLACEHOLDER_OF, '')}",
            service=f"{one.metadata.namespace}/{one.labels.get(SERVICE_LABEL, '')}",
        )
        for one in found
        if is_ours(one)
    ]


# -- writing --------------------------------------------------------------------------------------------


async def create(kube: Kube, wanted: Placeholder) -> bool:
    """Makes a slice; False if it is there already. Raises KubeError."""
    owner = {
        "apiVersion": "v1",
        "kind": "Service",
        "name": wanted.service,
        "uid": wanted.service_uid,
    }
    body: dict[str, Any] = {
        "apiVersion": "discovery.k8s.io/v1",
        "kind": "EndpointSlice",
        "metadata": {
            "name": wanted.name,
            "namespace": wanted.namespace,
            "labels": {SERVICE_LABEL: wanted.service, SLICE_MANAGER_LABEL: GROUP},
            "annotations": {PLACEHOLDER_OF: wanted.checkpoint.rpartition("/")[2]},
            "ownerReferences": [owner],
        },
        "addressType": wanted.family,
        "endpoints": [
            {
                "addresses": [HOLDING_ADDRESSES[wanted.family]],
                # kube-proxy takes such a one only where none is ready.
                "conditions": {"ready": False, "serving": True, "terminating": True},
            }
        ],
        "ports": [
            {"name": one.name, "protocol": one.protocol, "port": one.number} for one in wanted.ports
        ],
    }
    try:
        await kube.create(api.EndpointSlice, body, wanted.namespace)
    except KubeError as error:
        if error.status == 409:
            return False
        raise
    return True


async def delete(kube: Kube, found: api.EndpointSlice) -> None:
    """Deletes a slice; nothing if it is gone. Raises KubeError."""
    meta = found.metadata
    try:
        await kube.delete(api.EndpointSlice, meta.name, meta.namespace, uid=meta.uid)
    except KubeError as error:
        if error.status != 404:
            raise
