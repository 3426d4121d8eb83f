"""What is written down and what is sent: records on disk, events, rows of `architect ps`.

msgspec structs, so that a record of another version is refused with the field's name, not misread.
Durations are milliseconds, sizes bytes, times RFC 3339 strings or CLOCK_REALTIME seconds, as named.
"""

from __future__ import annotations

import enum
from typing import Final

import msgspec

CHECKPOINT_FORMAT: Final = 1
"""Version of the checkpoint's layout. Raised when a reader of the old one would misread the new one."""

RECORD_FORMAT: Final = 1
"""Version of :class:`ContainerRecord`."""


class Moving(enum.StrEnum):
    """Whether a container is being moved to another node, and what it was before."""

    NO = ""
    AWAKE = "awake"
    ASLEEP = "asleep"


class ContainerRecord(msgspec.Struct, kw_only=True):
    """What the daemon must know of a container after it was killed: meta.json in the run directory."""

    format: int = RECORD_FORMAT
    id: str
    namespace: str
    pod: str
    container: str
    bundle: str
    runtime_root: str
    annotations: dict[str, str]
    engine: list[str]
    """Command that reaches the engine that made it, with its global flags; empty if unknown."""
    rootfs: str
    shared_ipc: bool
    """Its IPC namespace belongs to the pod, so not every object in it need be the container's own."""
    own_ipc: bool = False
    """As of its last dump, every System V IPC object there was its own, and is in the checkpoint."""
    pod_uid: str = ""
    """The pod's metadata.uid; empty outside Kubernetes."""
    sandbox: str = ""
    """Id of the pod's sandbox container; empty where the engine has told none."""
    keeper: int = 0
    owner: int = -1
    """Its number at the gate of its network namespace; -1 before the gate knows it."""
    first_started: float = 0.0
    """CLOCK_BOOTTIME seconds of its first start; arms the initial delay once."""
    since: float = 0.0
    """CLOCK_REALTIME seconds of its last change of state."""
    ports: list[tuple[str, int]] | None = None
    """Declared ports (protocol, number); None until the engine has been asked."""
    proxy: int = 0
    """The process that answers probes for it outside Kubernetes; 0 for none."""
    probes: list[list[str]] = []
    """Commands of its exec probes and healthcheck: no activity, and answered while it sleeps."""
    quiet: list[tuple[str, int]] = []
    """Its other local ports as of its last dump: packets to them wake nobody."""
    mounts: list[tuple[str, str]] | None = None
    """Mount points in the container and where they are kept on the host; None before the first dump."""
    pipes: dict[str, int] = {}
    """Pipes and sockets of its standard streams, by CRIU's name, and the keeper's descriptor of each."""
    warm: list[tuple[str, list[tuple[int, int]]]] = []
    """Files and extents that a wake wants in the page cache: adapters/warm.py."""
    generation: int = 0
    """Number of its last checkpoint."""
    hibernations: int = 0
    last_scale_down_ms: float | None = None
    last_scale_up_ms: float | None = None
    lifted: dict[str, str] = {}
    """Cgroup limits lifted for a wake (file, value to return); must not outlive it."""
    limits: list[tuple[str, str]] = []
    """Cgroup files of its pod and itself (path, value) as of its last hibernation, outermost first.

    The kubelet lowers them when the pod's requests are given back; a wake raises them again by itself.
    """
    moving: Moving = Moving.NO
    stop_signal: int = 0
    """The engine's, held until it is known whether the pod moves or ends; 0 for none."""
    post_started: bool = False
    """Its postStart hook has run."""
    error: str | None = None


class FileRecord(msgspec.Struct, frozen=True):
    """One image file of a checkpoint."""

    name: str
    size: int
    digest: str | None = None
    """BLAKE3, hex. None for page data, which has digests by chunk in PageDigests."""


class CheckpointManifest(msgspec.Struct, frozen=True, kw_only=True):
    """manifest.json of a checkpoint; written last, so that a checkpoint without it does not exist."""

    format: int = CHECKPOINT_FORMAT
    container: str
    """Container id it belongs to."""
    generation: int
    criu: str
    created: str
    files: list[FileRecord]


class PageDigests(msgspec.Struct, frozen=True, kw_only=True):
    """pages.digests.json: BLAKE3 of each chunk of each page file, made after the commit."""

    chunk: int
    """Bytes a chunk."""
    files: dict[str, list[str]]


class Event(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Something a user should know of. One JSON line in the event log, and in `architect events`."""

    time: str
    reason: str
    """ScaledDown, ScaledUp, CheckpointCreated, CheckpointFailed, RestoreFailed, Warning ..."""
    namespace: str = "default"
    pod: str = ""
    container: str = ""
    id: str = ""
    message: str = ""
    """What happened, why, and what to do: one line."""
    duration_ms: float | None = None
    bytes: int | None = None


class Row(msgspec.Struct, kw_only=True):
    """One container in `architect ps -o json`; the contract fixes the names."""

    namespace: str
    pod: str
    container: str
    id: str
    state: str
    since: str
    idle_s: float | None
    hibernations: int
    last_scale_down_ms: float | None
    last_scale_up_ms: float | None
    checkpoint_bytes: int
    memory_bytes: int
    held_packets: int = 0
    """Packets that wait for it now."""
    held_s: float = 0.0
    """Seconds for which the first of them has waited."""
    dropped_packets: int = 0
    """Packets that were dropped since it appeared: while it slept and they were not to wake it, or beyond
    the bound on held ones."""
    error: str | None


class Request(msgspec.Struct, kw_only=True):
    """One line to the daemon's socket, from runc-architect or the command line."""

    verb: str
    id: str = ""
    bundle: str = ""
    root: str = ""
    pid: int = 0
    pod: str = ""
    container: str = ""
    resources: str = ""
    """Of an update: the limits asked for, as the OCI specification's LinuxResources."""
    signal: int = 0
    """Of a stop: the number of the signal."""
    process: str = ""
    """Of an exec: the file that describes the process (OCI specification, Process)."""
    follow: bool = False
