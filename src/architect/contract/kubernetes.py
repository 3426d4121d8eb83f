"""The names that a cluster knows us by: labels, runtime classes, components, reasons of events.

Users write and read these, so they are those of the contract, word for word. Every component, the
chart's tests and the command line take them from here.
"""

from __future__ import annotations

from typing import Final

from architect.contract.annotations import POST_START as POST_START
from architect.contract.annotations import PRE_STOP as PRE_STOP
from architect.contract.annotations import PREFIX
from architect.contract.annotations import TERMINATION_GRACE_PERIOD as TERMINATION_GRACE_PERIOD

GROUP: Final = "architect.loopholelabs.io"
VERSION: Final = "v1"

NAMESPACE: Final = "architect"
"""Where the chart is installed unless its user says otherwise."""
RUNC_CLASS: Final = "runc-architect"
RUNSC_CLASS: Final = "runsc-architect"
RUNTIME_CLASSES: Final = (RUNC_CLASS, RUNSC_CLASS)

MANAGER: Final = "architect-manager"
CONTROL_PLANE: Final = "architect-control-plane"
DAEMON: Final = "architectd"
"""Names of the components; each of their pods has it as the label ``app``."""
ROUTER: Final = "architect-router"
PROXY_CONTAINER: Final = "architect-health-check-proxy"
"""The sidecar that answers probes for hibernated containers: in the pods of users, never managed."""

NODE_LABEL: Final = PREFIX + "node"
"""``true`` on nodes that run managed pods: set by the user, asked for by the runtime classes."""
CRITICAL_NODE_LABEL: Final = PREFIX + "critical-node"
"""``true`` on nodes for the manager and the control plane."""
READY_CONDITION: Final = "ArchitectReady"
"""Condition that architectd keeps on its node: whether managed pods can hibernate there."""
FEATURE_LABEL_PREFIX: Final = "feature.architect.loopholelabs.io/"
"""Labels ``feature.architect.loopholelabs.io/<probe>`` on a node: what `architect check` found."""
REMOVAL_ANNOTATION: Final = PREFIX + "removal"
REMOVAL_REQUESTED: Final = "requested"
REMOVAL_DONE: Final = "done"
REMOVAL_WITHDRAWN: Final = "withdrawn"
"""On a node: requested by the chart's pre-delete hook, done by architectd when all is awake; withdrawn by
the hook if another node could not be left."""
WAKE_REQUESTED: Final = PREFIX + "wake-requested"
"""On a pod: RFC 3339 time at which the webhook saw somebody attach to it."""
MOVE_REQUESTED: Final = PREFIX + "move"
"""On a pod without a controller: the UID of the pod whose state moves. Its own if it is to leave its node,
that of the pod before it if it takes over. Written by `kubectl architect move`."""

NODE_SIGNER: Final = "architect.loopholelabs.io/node"
"""Signer of the certificates by which nodes' architectds know each other (CertificateSigningRequest)."""
NODE_AUTHORITY: Final = "architect-node-authority"
"""Name of the Secret that has the signer's key, and of the ConfigMap that says whom to trust."""
TRANSFER_PORT: Final = 9443
"""Where architectd hands out pods that move, unless the chart's user says otherwise."""

HOLDING_ADDRESSES: Final = {"IPv4": "192.0.2.222", "IPv6": "2001:db8::222"}
"""What a Service has for an endpoint while nobody is there to take its new connections; by the family, as
Services and EndpointSlices call it. architect-router drops what is sent there. Of the ranges for
documentation (RFC 5737, RFC 3849): they are nobody's, and the API server takes them, as it does not take
loopback, link-local and multicast addresses."""
PLACEHOLDER_OF: Final = PREFIX + "checkpoint"
"""Annotation of an EndpointSlice of ours: the Checkpoint for whose sake it is there."""
SERVICE_LABEL: Final = "kubernetes.io/service-name"
SLICE_MANAGER_LABEL: Final = "endpointslice.kubernetes.io/managed-by"
"""Labels of an EndpointSlice, by Kubernetes. The value of the second one is :data:`GROUP` on those of ours:
so Kubernetes' own controller leaves them alone."""

MIGRATED: Final = "Migrated"
CANNOT_MOVE: Final = "CannotMove"
STARTED_FRESH: Final = "StartedFresh"
CHECKPOINT_KEPT: Final = "CheckpointKept"
"""Reasons of events of a move."""

RUNNING: Final = "RUNNING"
SCALED_DOWN: Final = "SCALED_DOWN"
"""Values of the status label."""


def status_label(container: str) -> str:
    """The label that shows a container's state on its pod."""
    return f"status.{GROUP}/{container}"
