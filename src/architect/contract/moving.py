"""What two architectds tell each other about a pod that moves, and what a leaving pod has on the disk.

The source writes a :class:`Manifest` when it has frozen the pod (``cluster/departing.py`` of architectd) and
sends it; the destination restores by it (``cluster/arrival.py``). The calls between the two are the verbs
below, over mutual TLS (:mod:`architect.adapters.transfer`).
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

MANIFEST_FORMAT: Final = 1
"""Version of :class:`Manifest`. Raised when a reader of the old one would misread the new one."""

MOST_FLOWS: Final = 10_000
"""Connections that a pod may have to move: as many as its Checkpoint can name (maxItems in the CRD)."""

MOST_ADDRESSES: Final = 256
"""The same of the addresses that these connections were made to, with the pod's own."""

LOOK: Final = "look"
"""Asks what the pod would need of a node, before anything is stopped. Answer: :class:`Needs`."""
LEAVE: Final = "leave"
"""The destination is ready: freeze the pod now. Answer: :class:`Manifest`."""
ABORT: Final = "abort"
"""The destination gives up (the body says why): the pod goes on where it was."""
REFUSE: Final = "refuse"
"""The destination can never have it (the body says why)."""

HELD: Final = "held"
"""After the commit: asks for the packets that have waited at the source since the last such call.

Answer: a msgpack list of them, each from its network header on. Until the destination has closed the
connection, or 2 s are over, the source keeps taking them in.
"""

LAYER: Final = "layer.tar"
"""Beside a container's images: what it has written to its own file system."""


class OnRestoreFailure(enum.StrEnum):
    """What becomes of a pod that has arrived and cannot be restored; the chart's value of that name."""

    WAIT = "wait"
    """It is tried again, for as long as the pod is there."""
    FRESH = "fresh"
    """It is tried once more, then the pod starts as new."""


class NeededFile(msgspec.Struct, frozen=True):
    """A file that the container has open and that does not travel."""

    path: str
    """In the container."""
    size: int | None
    """None: any."""
    digest: str = ""
    """BLAKE3, hex; empty where any contents will do."""


class ContainerNeeds(msgspec.Struct, frozen=True):
    """What one container must find."""

    name: str
    files: list[NeededFile]
    points: list[str]
    """Mount points, all of which the destination's container must have too, and no others."""


class Needs(msgspec.Struct, frozen=True, kw_only=True):
    """What a node must have for the pod to run on there."""

    features: dict[str, object]
    """adapters/cpufeatures.py, as JSON has it."""
    addresses: list[str] = []
    """Those of which it has connections."""
    containers: list[ContainerNeeds] = []
    trouble: list[str] = []
    """Why the pod cannot leave now, one line each: open files that would not come along."""


class MovedFile(msgspec.Struct, frozen=True):
    """One file that is fetched."""

    name: str
    size: int


class MovedDirectory(msgspec.Struct, frozen=True):
    """A directory whose files come along: an emptyDir volume, or a file system in memory."""

    file: str
    """The archive."""
    volume: str
    point: str
    """In the container."""


class MovedGeneration(msgspec.Struct, frozen=True):
    """A directory of a configmap volume and its like of which the program has a file open."""

    file: str
    point: str
    name: str


class MovedContainer(msgspec.Struct, frozen=True, kw_only=True):
    """One managed container of the pod, as it was frozen."""

    name: str
    awake: bool
    age_s: float
    """Seconds since its first start."""
    pipes: dict[str, int]
    """As in :class:`architect.contract.records.ContainerRecord`."""
    quiet: list[tuple[str, int]]
    files: list[MovedFile]
    """Images, :data:`LAYER` if it has written anything, and the archives of the next two; below a directory
    of the container's name."""
    directories: list[MovedDirectory] = []
    generations: list[MovedGeneration] = []


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """A frozen pod."""

    format: int = MANIFEST_FORMAT
    checkpoint: str
    """``namespace/name`` of its Checkpoint."""
    pod_uid: str
    addresses: list[str]
    """The pod's, one for each family."""
    flows: list[str]
    """Its connections: contract/flows.py."""
    ports: list[str]
    """``tcp/80``: where it takes new connections."""
    containers: list[MovedContainer]
    boot: str = ""
    """The start of the source's kernel with which it is lost (paths.BOOT_ID); empty: it is durable."""
