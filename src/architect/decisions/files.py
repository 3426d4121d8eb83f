"""What becomes of a container's files when it moves: which come along, and which open ones forbid it.

Called by the daemon: :func:`carried` when a pod's files are packed and put in place, :func:`outlook` before
the pod is frozen, so that a move that cannot succeed is refused in time. It judges what
:mod:`architect.adapters.openfiles` has read.

CRIU opens each file again by its path, and wants it to be of the same size, unless it is only appended to.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from architect.contract import oci
from architect.contract.annotations import MIGRATE_EMPTYDIR_CONTAINERS, ContainerSettings

SHM: Final = "/dev/shm"
_OF_THE_POD: Final = ("/etc/hosts", "/etc/hostname", "/etc/resolv.conf")
_OF_THE_KERNEL: Final = frozenset({"proc", "sysfs", "cgroup", "cgroup2", "mqueue", "devpts"})
_CONTENT: Final = frozenset({"configmap", "secret", "projected", "downward-api"})
_VOLUME: Final = re.compile(r"(/.*/pods/[^/]+/volumes/kubernetes\.io~([^/]+)/([^/]+))(?:/.*)?")
_PART: Final = re.compile(r"(/.*/pods/[^/]+)/volume-subpaths/([^/]+)/[^/]+/[^/]+")
_LOG: Final = re.compile(r"/.*/pods/[^/]+/containers/[^/]+/[^/]+")
"""Below the kubelet's directory, wherever that is (pkg/kubelet/kubelet_getters.go of Kubernetes)."""


class Kind(enum.Enum):
    """Where a mount's files are."""

    KERNEL = "kernel"
    """In no file system of anybody's: /proc and the like, and the container's own /dev."""
    MEMORY = "memory"
    """A tmpfs of the container or of its pod: it moves along."""
    EMPTY_DIR = "emptyDir"
    CONTENT = "content"
    """Made anew from the API at the destination: configmap, secret, projected, downward-api."""
    CLAIM = "claim"
    """Persistent: over the network, or detached and attached again, or binding the pod to its node."""
    POD = "pod"
    """Written by the kubelet or the engine for each pod, with its name and address."""
    LOG = "log"
    """The container's termination log."""
    HOST = "hostPath"
    """The node's own files."""


class Volume(NamedTuple):
    """A mount of the container."""

    point: str
    """In the container."""
    kind: Kind
    name: str
    """The volume's, as in the pod (a claim: the persistent volume's); "" if it is none."""
    source: str
    """On the host; "" for a tmpfs that is only in the container's mount namespace."""
    part: bool = False
    """Whether only a ``subPath`` of the volume is mounted."""


class EmptyDir(NamedTuple):
    """A directory whose files come along."""

    name: str
    """The same at both ends."""
    source: str
    """On this node's host: the whole volume, also of a ``subPath``; "" as in :class:`Volume`."""
    point: str
    """In the container."""


class OpenFile(NamedTuple):
    """A file or directory that a process of the container has in use."""

    path: str
    """In the container."""
    point: str
    """Of the mount it is on."""
    use: str
    """For people: ``descriptor 7 of process 12 (redis-server)``."""
    size: int | None = None
    """Of a regular file."""
    writable: bool = False
    appended: bool = False
    """Whether it is only appended to: then its size does not count."""
    deleted: bool = False


class Expected(NamedTuple):
    """What must be at the destination before the source gives the pod away."""

    path: str
    size: int | None = None
    """None: any."""
    content: bool = False
    """Whether its bytes must be the same too."""


class Generation(NamedTuple):
    """A directory of a configmap volume and its like, which the destination's has under another name."""

    point: str
    name: str
    """``..2026_11_23_07_12_01.1234``."""


@dataclass(frozen=True, slots=True)
class Outlook:
    """Whether a container's open files would be there at the destination."""

    reasons: tuple[str, ...] = ()
    """Why not, one line each: file, volume, container, and what to do."""
    generations: tuple[Generation, ...] = ()
    """To be carried over beside the destination's own."""
    rewritten: tuple[str, ...] = ()
    """Mounted files whose bytes are written into the destination's."""
    expected: tuple[Expected, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether it may move."""
        return not self.reasons


def volumes(mounts: Iterable[oci.Mount], plugins: Mapping[str, str]) -> list[Volume]:
    """The container's mounts, by where their files are.

    ``plugins`` are the pod's volumes by name, as the kubelet's directory has them (``empty-dir``): the
    source of a ``subPath`` does not say it.
    """
    return [_volume(mount, plugins) for mount in mounts]


def _volume(mount: oci.Mount, plugins: Mapping[str, str]) -> Volume:
    point, source = mount.destination, mount.source
    if not mount.bind:
        own = mount.type in _OF_THE_KERNEL or point == "/dev"
        return Volume(point, Kind.KERNEL if own else Kind.MEMORY, point, "")
    if found := _VOLUME.fullmatch(source):
        whole, plugin, name = found.groups()
        kind = _kind(plugin)
        return Volume(point, kind, name, whole if kind is Kind.EMPTY_DIR else source)
    if found := _PART.fullmatch(source):
        pod, name = found.groups()
        kind = _kind(plugins.get(name, ""))
        if kind is Kind.EMPTY_DIR:
            source = f"{pod}/volumes/kubernetes.io~empty-dir/{name}"
        return Volume(point, kind, name, source, part=True)
    if point in _OF_THE_POD:
        return Volume(point, Kind.POD, "", source)
    if _LOG.fullmatch(source):
        return Volume(point, Kind.LOG, "", source)
    if point == SHM and source != SHM:
        return Volume(point, Kind.MEMORY, SHM, source)
    return Volume(point, Kind.HOST, "", source)


def _kind(plugin: str) -> Kind:
    if plugin in ("empty-dir", "git-repo"):
        return Kind.EMPTY_DIR
    return Kind.CONTENT if plugin in _CONTENT else Kind.CLAIM


def carried(mounts: Iterable[Volume], settings: ContainerSettings) -> list[EmptyDir]:
    """The directories that come along with a container, each once.

    Two containers may name the same: it is the pod's.
    """
    found: dict[str, EmptyDir] = {}
    for one in mounts:
        if one.kind is Kind.MEMORY or (one.kind is Kind.EMPTY_DIR and settings.migrate_emptydir):
            found.setdefault(one.name, EmptyDir(one.name, one.source, one.point))
    return list(found.values())


def sparse_in(place: EmptyDir, settings: ContainerSettings) -> list[str]:
    """Of the files that travel without their bytes those in this directory, relative to it."""
    start = place.point.rstrip("/") + "/"
    return [path.removeprefix(start) for path in settings.sparse_files if path.startswith(start)]


def outlook(
    open_files: Collection[OpenFile], mounts: Sequence[Volume], settings: ContainerSettings
) -> Outlook:
    """Judge what a container has open, before it is frozen."""
    by_point = {mount.point: mount for mount in mounts}
    reasons: dict[str, None] = {}
    generations: dict[Generation, None] = {}
    rewritten: dict[str, None] = {}
    expected: dict[Expected, None] = {}
    for one in open_files:
        mount = by_point.get(one.point)
        if mount is None:
            # Its root, or a mount of the container's own making, which CRIU has in its images.
            continue
        reason = _reason(one, mount, settings)
        if reason:
            reasons[reason] = None
            continue
        match mount.kind:
            case Kind.CONTENT if not mount.part:
                name = one.path.removeprefix(f"{mount.point}/").partition("/")[0]
                if name.startswith(".."):
                    generations[Generation(mount.point, name)] = None
            case Kind.LOG:
                rewritten[mount.point] = None
            case Kind.POD if not one.appended:
                expected[Expected(one.path, one.size)] = None
            case Kind.HOST | Kind.CONTENT:
                expected[Expected(one.path, one.size, content=one.size is not None)] = None
            case Kind.CLAIM if not one.deleted:
                # Its size changes until it is frozen.
                expected[Expected(one.path)] = None
            case _:
                pass
    return Outlook(tuple(reasons), tuple(generations), tuple(rewritten), tuple(expected))


def _reason(one: OpenFile, mount: Volume, settings: ContainerSettings) -> str:
    """Why a file would not be there; "" if it would."""
    itself = one.path == mount.point and one.size is None
    where = f"{one.path} ({one.use}) of container {settings.name} is"
    match mount.kind:
        case Kind.EMPTY_DIR if not settings.migrate_emptydir and not itself:
            return (
                f"{where} in the emptyDir volume {mount.name}, which does not move: list the container"
                f" in the annotation {MIGRATE_EMPTYDIR_CONTAINERS}"
            )
        case Kind.HOST if (one.writable or one.deleted) and not itself:
            return (
                f"{where} in {mount.source} of the node (hostPath) and open for writing: use an"
                " emptyDir volume or a persistent one"
            )
        case Kind.CONTENT if one.deleted:
            return (
                f"{where} in the volume {mount.name} and deleted, as that was updated: the container"
                " has to open it again"
            )
        case _:
            return ""
