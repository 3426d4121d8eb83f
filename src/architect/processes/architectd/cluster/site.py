"""What the parts of moving share on a node. Made by :mod:`.moves`."""

from __future__ import annotations

from dataclasses import dataclass

from architect.adapters.identity import Identity
from architect.adapters.kube.client import Kube
from architect.adapters.kube.events import Recorder
from architect.adapters.kube.informer import Informer
from architect.adapters.kube.resources import Checkpoint, Pod
from architect.adapters.transfer.limits import RateLimit
from architect.contract.moving import OnRestoreFailure
from architect.processes.architectd.registry import Registry


@dataclass(frozen=True, slots=True)
class Site:
    """See the module."""

    kube: Kube
    node: str
    endpoint: str
    """``address:port`` at which other nodes reach this one's transfer server."""
    registry: Registry
    recorder: Recorder
    identity: Identity
    pods: Informer[Pod]
    """Of this node."""
    checkpoints: Informer[Checkpoint]
    """Of the cluster."""
    limit: RateLimit | None
    """Of what is fetched from other nodes."""
    on_restore_failure: OnRestoreFailure
    """Of pods that have arrived here."""
