"""The names that a cluster knows us by: labels, runtime classes, components, reasons of events.

Users write and read these, so they are those of the contract, word for word. Every component, the
chart's tests and the command line take them from here.
"""

from __future__ import annotations

from typing import Final

from architect.contract.annotations import PREFIX

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

RUNNING: Final = "RUNNING"
SCALED_DOWN: Final = "SCALED_DOWN"
"""Values of the status label."""


def status_label(container: str) -> str:
    """The label that shows a container's state on its pod."""
    return f"status.{GROUP}/{container}"
