"""What the processes of a container have open, and on which of its mounts that is.

Called, in threads, by those who carry out a move: :func:`read` before the pod is frozen, for
:mod:`architect.decisions.files` to judge; :func:`digests` at the source and :func:`missing` at the
destination for what must be the same at both ends.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final

from blake3 import blake3

from architect.adapters import layer
from architect.adapters.layer import LayerError
from architect.contract import oci
from architect.decisions.files import Expected, Generation, OpenFile

_DELETED: Final = " (deleted)"
_PODS: Final = re.compile(r"(/.*/pods/[^/]+)/volume(?:s|-subpaths)/.*")
_PLUGIN: Final = "kubernetes.io~"


def settled(mounts: Iterable[oci.Mount], rootfs: Path) -> list[oci.Mount]:
    """The mounts with their mount points as the kernel has them, without links of the image."""
    found = []
    for mount in mounts:
        point = mount.destination
        with contextlib.suppress(OSError):
            point = "/" + layer.resolved(rootfs, point)
        found.append(replace(mount, destination=point))
    return found


def plugins(mounts: Iterable[oci.Mount]) -> dict[str, str]:
    """Of what kind each of the pod's volumes is (``empty-dir``), by the kubelet's directory of the pod."""
    found: dict[str, str] = {}
    homes = {match[1] for mount in mounts if (match := _PODS.fullmatch(mount.source))}
    for home in homes:
        for place in Path(home, "volumes").glob(f"{_PLUGIN}*/*"):
            found[place.name] = place.parent.name.removeprefix(_PLUGIN)
    return found


def read(pids: Iterable[int]) -> list[OpenFile]:
    """Files and directories that the processes use, each once for each way in which it is used.

    Processes that end meanwhile are left out, and so is what is in no file system of the container's:
    pipes, sockets, memory, devices.
    """
    found: dict[tuple[object, ...], OpenFile] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for one in _of_process(pid):
                # Of the many threads' and children's ways to the same file one is enough.
                found.setdefault(
                    (one.path, one.point, one.writable, one.appended, one.deleted), one
                )
    return list(found.values())


def digests(root: Path, expected: Iterable[Expected]) -> dict[str, str]:
    """What the files contain whose contents count, by path; ``root`` is the container's (/proc/PID/root)."""
    found = {}
    for one in expected:
        if one.content:
            with contextlib.suppress(OSError):
                found[one.path] = _digest(root, one.path)
    return found


def missing(root: Path, expected: Iterable[Expected], known: Mapping[str, str]) -> list[str]:
    """What of the expected the container with that root does not have, one line each.

    ``known`` are the :func:`digests` of the source.
    """
    return [f"{one.path} {why}" for one in expected if (why := _differs(root, one, known))]


def carry(generation: Generation, source: Path, archive: Path) -> None:
    """Pack the directory of a volume that was mounted from ``source``. Raises LayerError."""
    layer.pack_tree(source / generation.name, archive)


def bring(generation: Generation, archive: Path, source: Path) -> None:
    """Put it beside the destination's own. The kubelet removes it with the volume. Raises LayerError."""
    place = source / generation.name
    try:
        place.mkdir(exist_ok=True)
    except OSError as error:
        raise LayerError(f"{generation.point}/{generation.name} is missing", str(error)) from error
    layer.unpack_tree(archive, place)


def _of_process(pid: int) -> Iterator[OpenFile]:
    home = Path(f"/proc/{pid}")
    mounts = _mounts(home)
    name = (home / "comm").read_text().strip()
    for number in os.listdir(home / "fd"):
        with contextlib.suppress(OSError):
            facts = _facts(home / "fdinfo" / number)
            point = mounts.get(facts["mnt_id"])
            if point is not None:
                use = f"descriptor {number} of process {pid} ({name})"
                one = _one(home / "fd" / number, point, use)
                if one is not None:
                    yield _opened(one, int(facts["flags"], 8))
    for link in ("cwd", "root", "exe"):
        with contextlib.suppress(OSError):
            yield from _by_path(home / link, mounts, f"{link} of process {pid} ({name})")
    for area in os.listdir(home / "map_files"):
        with contextlib.suppress(OSError):
            use = f"mapped by process {pid} ({name})"
            yield from _by_path(home / "map_files" / area, mounts, use)


def _opened(one: OpenFile, flags: int) -> OpenFile:
    mode = flags & os.O_ACCMODE
    appended = mode == os.O_WRONLY and bool(flags & os.O_APPEND)
    return one._replace(writable=mode != os.O_RDONLY, appended=appended)


def _by_path(link: Path, mounts: Mapping[str, str], use: str) -> Iterator[OpenFile]:
    """What has no mount's number: its mount is the one whose point is the longest part of its path."""
    path = os.readlink(link).removesuffix(_DELETED)
    points = [point for point in mounts.values() if f"{path}/".startswith(f"{point.rstrip('/')}/")]
    # A memory file has a path as well, but is on no mount: it is told by its device.
    if path.startswith("/") and points:
        point = max(points, key=len)
        one = _one(link, point, use)
        if one is not None and not (
            one.deleted and path.startswith(("/memfd:", "/SYSV", "/dev/zero"))
        ):
            yield one


def _one(link: Path, point: str, use: str) -> OpenFile | None:
    path, found = os.readlink(link), link.stat()
    regular = stat.S_ISREG(found.st_mode)
    if not path.startswith("/") or not (regular or stat.S_ISDIR(found.st_mode)):
        return None
    # A directory has a link more than none until it is removed; a file may be named so.
    deleted = found.st_nlink == 0
    return OpenFile(
        path=path.removesuffix(_DELETED) if deleted else path,
        point=point,
        use=use,
        size=found.st_size if regular else None,
        deleted=deleted,
    )


def _mounts(home: Path) -> dict[str, str]:
    """Mount points by the mounts' numbers (proc(5))."""
    lines = (home / "mountinfo").read_text().splitlines()
    return {(words := line.split())[0]: layer.unescaped(words[4]) for line in lines}


def _facts(info: Path) -> dict[str, str]:
    pairs = (line.partition(":") for line in info.read_text().splitlines())
    return {key: value.strip() for key, _, value in pairs}


def _differs(root: Path, one: Expected, known: Mapping[str, str]) -> str:
    try:
        found = (root / layer.resolved(root, one.path)).stat()
        if one.size is None:
            return ""
        if not stat.S_ISREG(found.st_mode):
            return "is no file here"
        if found.st_size != one.size:
            return f"has {found.st_size} bytes here and {one.size} at the source"
        if one.content and _digest(root, one.path) != known.get(one.path):
            return "has another content here than at the source"
    except OSError as error:
        return f"cannot be opened here: {os.strerror(error.errno or 0)}"
    return ""


def _digest(root: Path, path: str) -> str:
    with (root / layer.resolved(root, path)).open("rb") as file:
        hasher = blake3()
        while part := file.read(1 << 20):
            hasher.update(part)
    return hasher.hexdigest()
