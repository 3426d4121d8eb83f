"""What a container has written, packed into one file, and put into its replacement on another node.

Called, in threads, by those who carry out a move: :func:`pack` once the program is dumped (CRIU may have left
`link_remap.N` names in the layer by then), :func:`unpack` when the replacement's root is mounted and its
program has not run yet. :func:`pack_tree` and :func:`unpack_tree` do the same for a volume.

Why through the mounted overlay at both ends: names come from the upper directory, which alone knows what is
new and what is gone; contents from the merged view, which alone has a file's bytes if only its metadata was
copied up (`metacopy`). At the destination writing into the upper directory behind a mounted overlay's back is
undefined (Documentation/filesystems/overlayfs.rst) and was seen to fail: deleted files stayed, new ones were
there without an inode, opaque directories hid nothing, until the dentry cache was dropped for the whole
machine and nobody held one of them.

The archive: :data:`_MAGIC`, the length of the header, the header (JSON), and what GNU tar writes, which keeps
what Python's tarfile does not: holes, extended attributes, access control lists.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import re
import stat
import struct
import subprocess
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from architect.contract import paths
from architect.contract.errors import ArchitectError

_MAGIC: Final = b"archlyr1"
_LENGTH: Final = struct.Struct("<Q")
_OURS: Final = paths.PREFIX / "bin/tar"
"""Preferred to the host's own, which may be another one (busybox, bsdtar)."""
_OPAQUE: Final = ("trusted.overlay.opaque", "user.overlay.opaque")
_REDIRECT: Final = ("trusted.overlay.redirect", "user.overlay.redirect")
"""The second of each with the mount option userxattr."""
_KEEP: Final = (
    "--numeric-owner", "--acls", "--xattrs", "--xattrs-include=*",
    # Labels are the node's own, a category for each container; EVM's are bound to an inode.
    "--xattrs-exclude=security.selinux", "--xattrs-exclude=security.evm",
)  # fmt: skip
_CHANGED: Final = 1
"""Exit status of tar if a file changed while it was read."""

_CHUNK: Final = 1 << 20

_SYS_OPENAT2: Final = 437
_RESOLVE_IN_ROOT: Final = 0x10
_AT_FDCWD: Final = -100


class LayerError(ArchitectError):
    """What a container has written could not be packed, or not be put in place."""


@dataclass(frozen=True, slots=True)
class Packed:
    """An archive that was written."""

    bytes: int
    """Its size."""
    entries: int
    """How many files, directories and deletions are in it."""


@dataclass(frozen=True, slots=True)
class Overlay:
    """A container's root file system."""

    merged: Path
    """Where it is mounted on the host."""
    upper: Path | None
    """Where what was written to it is (overlayfs's upper directory); None if nothing can be written."""


@dataclass(slots=True)
class _Header:
    """What tar cannot say; all paths relative, parents first."""

    gone: list[str] = field(default_factory=list)
    """Deleted, though the image has them."""
    opaque: list[str] = field(default_factory=list)
    """Directories of which nothing of the image is seen."""
    folders: list[str] = field(default_factory=list)
    """The archive's directories."""
    files: list[str] = field(default_factory=list)
    """And everything else in it."""
    holes: list[list[Any]] = field(default_factory=list)
    """Files that are recreated without their bytes: path, size, mode, owner, group, mtime in ns."""

    def entries(self) -> int:
        return len(self.gone) + len(self.folders) + len(self.files) + len(self.holes)


def overlay(rootfs: Path) -> Overlay:
    """The overlay that is mounted on the host at ``rootfs``.

    Raises:
        LayerError: nothing is mounted there, or another file system.
    """
    kind = ""
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        left, _, right = line.partition(" - ")
        if unescaped(left.split()[4]) != str(rootfs):
            continue
        # The last one is on top.
        kind, _, options = right.split(" ", 2)
        options = options.rpartition(" ")[2]
    if kind != "overlay":
        found = f"it is {kind}" if kind else "nothing is mounted there"
        raise LayerError(
            f"what was written to {rootfs} cannot be told from its image",
            f"the root of the container is no overlay file system: {found}",
            "use the snapshotter overlayfs in containerd's configuration (in Podman the storage"
            " driver overlay without mount_program)",
        )
    upper = next((x[9:] for x in options.split(",") if x.startswith("upperdir=")), "")
    if not upper:
        return Overlay(rootfs, None)
    # Podman may have mounted it from its own folder, <graph root>/overlay, as <id>/diff.
    place = rootfs.parents[1] / unescaped(upper)
    if not place.is_dir():
        raise LayerError(
            f"what was written to {rootfs} cannot be found",
            f"its upper directory {place} is not there",
            "architectd has to run in the mount namespace in which the engine runs",
        )
    return Overlay(rootfs, place)


def points(pid: int) -> list[str]:
    """Where something is mounted in a process's root, as paths relative to that."""
    found = []
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        point = unescaped(line.split()[4])
        if point != "/":
            found.append(point.lstrip("/"))
    return found


def pack(layer: Overlay, target: Path, leave_out: Collection[str] = ()) -> Packed | None:
    """Write what is in the layer to ``target``; nothing, and no file, if it is empty.

    Of the files with the absolute paths ``leave_out`` no bytes are written.

    Sockets are left out: nobody listens on them, and CRIU binds its own anew.

    Raises:
        LayerError: something cannot be read or written.
    """
    header = _Header()
    try:
        if layer.upper is not None:
            _survey(layer.merged, layer.upper, header, _holes(layer.merged, leave_out))
        if header.entries() <= 1:
            return None
        return _write(layer.merged, target, header, changes=False)
    except OSError as error:
        raise _failed(f"what was written to {layer.merged}", error) from error


def unpack(archive: Path, merged: Path, mounted: Collection[str]) -> None:
    """Make the root that is mounted at ``merged`` what the packed one was.

    ``mounted`` are the container's mount points (:func:`points`). They are not touched: to unlink a mount
    point through another mount would take the mount away from the container. As a container that has
    mounts there had them at the source too, nothing of its own is lost.

    Raises:
        LayerError: something cannot be read or written.
    """
    try:
        with archive.open("rb") as file:
            _extract(file, _header(file), merged, _Places(merged, mounted))
    except (OSError, ValueError) as error:
        raise _failed(f"what is to be put into {merged}", error) from error


def pack_tree(tree: Path, target: Path, leave_out: Collection[str] = ()) -> Packed | None:
    """Write all below a directory to ``target``; nothing, and no file, if it is empty.

    Of the files with the paths ``leave_out``, relative to it, no bytes are written.

    Others may write there meanwhile: containers that do not move.

    Raises:
        LayerError: something cannot be read or written.
    """
    header = _Header()
    try:
        _walk(tree, "", header, _holes(tree, leave_out))
        if header.entries() <= 1:
            return None
        return _write(tree, target, header, changes=True)
    except OSError as error:
        raise _failed(f"the files in {tree}", error) from error


def unpack_tree(archive: Path, tree: Path) -> None:
    """Put what was packed into a directory. What else is there already stays.

    Raises:
        LayerError: something cannot be read or written.
    """
    unpack(archive, tree, ())


def _failed(subject: str, error: Exception) -> LayerError:
    if isinstance(error, LayerError):
        return error
    return LayerError(
        f"{subject} cannot be moved", str(error), "see docs/troubleshooting.md, 'moving'"
    )


def unescaped(text: str) -> str:
    """A path as mountinfo has it (proc(5)): blanks and the like as octal numbers."""
    return os.fsdecode(re.sub(rb"\\([0-7]{3})", lambda m: bytes([int(m[1], 8)]), os.fsencode(text)))


def _below(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _attribute(path: Path | str, names: Sequence[str]) -> bytes:
    for name in names:
        with contextlib.suppress(OSError):
            return os.getxattr(path, name, follow_symlinks=False)
    return b""


def _survey(merged: Path, written: Path, header: _Header, holes: Collection[str]) -> None:
    """Notes what is in the upper directory."""
    waiting = [""]
    while waiting:
        folder = waiting.pop()
        upper = f"{written}/{folder}"
        if _attribute(upper, _REDIRECT):
            # Renamed: the image's files below it are not in the upper directory, and have other names there.
            header.opaque.append(folder)
            _walk(merged, folder, header, holes)
            continue
        header.folders.append(folder or ".")
        if folder and _attribute(upper, _OPAQUE) == b"y":
            header.opaque.append(folder)
        for name in sorted(os.listdir(upper)):
            path = _below(folder, name)
            try:
                found = os.lstat(f"{merged}/{path}")
            except FileNotFoundError:
                # However overlayfs says it: by a device 0:0, or by an attribute.
                header.gone.append(path)
                continue
            if stat.S_ISDIR(found.st_mode):
                waiting.append(path)
            else:
                _note(path, found, header, holes)


def _walk(root: Path, start: str, header: _Header, holes: Collection[str]) -> None:
    """Notes all below a directory, and itself."""
    waiting = [start]
    while waiting:
        folder = waiting.pop()
        header.folders.append(folder or ".")
        with contextlib.suppress(FileNotFoundError):
            for name in sorted(os.listdir(f"{root}/{folder}")):
                path = _below(folder, name)
                found = os.lstat(f"{root}/{path}")
                if stat.S_ISDIR(found.st_mode):
                    waiting.append(path)
                else:
                    _note(path, found, header, holes)


def _note(path: str, found: os.stat_result, header: _Header, holes: Collection[str]) -> None:
    if stat.S_ISSOCK(found.st_mode):
        return
    if path in holes and stat.S_ISREG(found.st_mode):
        mode = stat.S_IMODE(found.st_mode)
        header.holes.append(
            [path, found.st_size, mode, found.st_uid, found.st_gid, found.st_mtime_ns]
        )
        return
    header.files.append(path)


def _holes(root: Path, listed: Collection[str]) -> frozenset[str]:
    """The listed files by their real paths relative to the root; those that are not there left out."""
    found = set()
    for path in listed:
        with contextlib.suppress(OSError):
            found.add(resolved(root, path))
    return frozenset(found)


def resolved(root: Path, path: str) -> str:
    """A path as a process with that root sees it, without its links (openat2(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    folder = os.open(root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        how = struct.pack("=QQQ", os.O_PATH | os.O_CLOEXEC, 0, _RESOLVE_IN_ROOT)
        number = libc.syscall(_SYS_OPENAT2, folder, os.fsencode(path), how, len(how))
        if number < 0:
            raise OSError(ctypes.get_errno(), path)
        try:
            names = [os.readlink(f"/proc/self/fd/{each}") for each in (folder, number)]
        finally:
            os.close(number)
    finally:
        os.close(folder)
    return os.path.relpath(names[1], names[0])


# The archive


def _write(root: Path, target: Path, header: _Header, *, changes: bool) -> Packed:
    text = json.dumps(
        {
            "gone": header.gone,
            "opaque": header.opaque,
            "folders": header.folders,
            "files": header.files,
            "holes": header.holes,
        }
    ).encode()
    with target.open("wb") as file:
        os.fchmod(file.fileno(), 0o600)
        file.write(_MAGIC + _LENGTH.pack(len(text)) + text)
        file.flush()
        if header.files or header.folders:
            # "./", as tar takes a name for an option of its own if it may.
            names = "".join(f"./{name}\0" for name in [*header.folders, *header.files])
            words = [
                "--create", "--file=-", "--format=pax", "--pax-option=delete=atime,delete=ctime",
                "--sparse", *_KEEP, "--no-recursion", "--null", "--files-from=-",
            ]  # fmt: skip
            _tar(words, root, file, os.fsencode(names), changes=changes)
        size = os.fstat(file.fileno()).st_size
    return Packed(size, header.entries())


def _header(file: IO[bytes]) -> _Header:
    """Read the header, and leave the file where tar's part begins. ValueError if it is none."""
    head = os.read(file.fileno(), len(_MAGIC) + _LENGTH.size)
    if len(head) != len(_MAGIC) + _LENGTH.size or not head.startswith(_MAGIC):
        raise ValueError("the archive is none of ours")
    (length,) = _LENGTH.unpack(head[len(_MAGIC) :])
    # By itself: a file object would read on, and tar shares the descriptor's place.
    text = b""
    while len(text) < length:
        part = os.read(file.fileno(), min(length - len(text), _CHUNK))
        if not part:
            raise ValueError("the archive is cut short")
        text += part
    header = _Header(**json.loads(text))
    for path in [
        *header.gone, *header.opaque, *header.folders, *header.files, *(x[0] for x in header.holes)
    ]:  # fmt: skip
        if path.startswith("/") or ".." in path.split("/"):
            raise ValueError(f"the archive has a path that leads out of it: {path}")
    return header


def _extract(file: IO[bytes], header: _Header, root: Path, places: _Places) -> None:
    for path in header.folders:
        # Parents first: so nothing below is reached through a link.
        places.clear(path, folder=True)
    for path in header.opaque:
        places.empty(path)
    for path in header.gone:
        places.remove(path)
    for path in [*header.files, *(hole[0] for hole in header.holes)]:
        places.clear(path, folder=False)
    if header.files or header.folders:
        kept = [path for path in header.files if path in places.protected]
        words = [
            "--extract", "--file=-", "--delay-directory-restore", "--same-permissions",
            "--same-owner", *_KEEP,
            "--anchored", "--no-wildcards", *(f"--exclude=./{path}" for path in kept),
        ]  # fmt: skip
        _tar(words, root, file, b"", changes=False)
    for path, size, mode, owner, group, changed in header.holes:
        _make_hole(root / path, size, mode, (owner, group), changed)


def _make_hole(path: Path, size: int, mode: int, owner: tuple[int, int], changed: int) -> None:
    folder = path.parent.stat()
    path.unlink(missing_ok=True)
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        os.ftruncate(number, size)
        os.fchown(number, *owner)
        os.fchmod(number, mode)
        os.utime(number, ns=(changed, changed))
    finally:
        os.close(number)
    os.utime(path.parent, ns=(folder.st_atime_ns, folder.st_mtime_ns))


class _Places:
    """Takes away what is in the archive's way, but for what is mounted."""

    def __init__(self, root: Path, mounted: Collection[str]) -> None:
        self._root = root
        self.protected = set[str]()
        """Mount points and what leads to them."""
        for point in mounted:
            words = point.strip("/").split("/")
            self.protected.update("/".join(words[: n + 1]) for n in range(len(words)))

    def clear(self, path: str, *, folder: bool) -> None:
        """Removes what is of another kind than what comes."""
        with contextlib.suppress(FileNotFoundError):
            found = os.lstat(self._root / path)
            if stat.S_ISDIR(found.st_mode) != folder:
                self.remove(path)

    def empty(self, folder: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            for name in os.listdir(self._root / folder):
                self.remove(_below(folder, name))

    def remove(self, path: str) -> None:
        place = self._root / path
        with contextlib.suppress(FileNotFoundError):
            is_folder = stat.S_ISDIR(os.lstat(place).st_mode)
            if is_folder and path in self.protected:
                if any(other.startswith(f"{path}/") for other in self.protected):
                    self.empty(path)
            elif is_folder:
                self.empty(path)
                place.rmdir()
            elif path not in self.protected:
                place.unlink()


def _tar(words: list[str], root: Path, file: IO[bytes], names: bytes, *, changes: bool) -> None:
    """Runs tar in ``root``, from or to where ``file`` is now."""
    tar = str(_OURS) if _OURS.exists() else "tar"
    packing = bool(names)
    done = subprocess.run(
        [tar, *words],
        cwd=root,
        input=names if packing else None,
        stdin=None if packing else file.fileno(),
        stdout=file.fileno() if packing else subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env={"PATH": os.environ.get("PATH", ""), "LC_ALL": "C"},
        check=False,
    )
    said = list(_lines(done.stderr))
    if done.returncode == 0 or (changes and done.returncode == _CHANGED):
        return
    why = "; ".join(said[:3]) or f"tar ended with {done.returncode}"
    raise LayerError(
        f"the files in {root} cannot be moved", why, "see docs/troubleshooting.md, 'moving'"
    )


def _lines(text: bytes) -> Iterator[str]:
    for line in text.decode(errors="replace").splitlines():
        if "Exiting with failure" not in line:
            yield line.strip()
