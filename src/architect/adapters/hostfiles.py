"""The files of a node as seen from a container that has the node's root mounted somewhere.

Two things go onto a node: a folder of programs, and edits of configuration files. Both must survive
a kill or a power failure at any instant: what is at its final name is always whole. Called by
processes/node.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from architect.contract.errors import ArchitectError
from architect.decisions.distros import BACKUP_SUFFIX

MANIFEST: Final = "manifest.json"
"""In an installed folder: what was put there. Its absence means that something else did."""
RECORD: Final = "record.json"
"""In a folder that `make install` manages (scripts/record.py)."""
_LINKS: Final = 40  # path_resolution(7)
_RENAME_EXCHANGE: Final = 2  # <linux/fs.h>
_AT_FDCWD: Final = -100  # <fcntl.h>

_libc = ctypes.CDLL(None, use_errno=True)


class Host:
    """A node's root directory. Absolute links inside lead to the node's files, not the container's."""

    def __init__(self, root: Path) -> None:
        # Not resolved: /proc/1/root would become "/".
        self.root = Path(os.path.abspath(root))  # noqa: PTH100

    def path(self, path: str | Path) -> Path:
        """Where a path of the node is, all links followed. OSError (ELOOP) if they have no end."""
        done = Path("/")
        ahead = list(reversed(Path(path).parts))
        links = 0
        while ahead:
            part = ahead.pop()
            if part in ("/", ".."):
                done = Path("/") if part == "/" else done.parent
                continue
            here = self.root / done.relative_to("/") / part
            if not here.is_symlink():
                done /= part
                continue
            links += 1
            if links > _LINKS:
                raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(path))
            ahead += reversed(here.readlink().parts)
        return self.root / done.relative_to("/")

    def read(self, path: str) -> str | None:
        """The text of a file; None if there is none. ArchitectError if it is not UTF-8."""
        try:
            return self.path(path).read_bytes().decode()
        except FileNotFoundError:
            return None
        except UnicodeDecodeError as error:
            raise ArchitectError(path, f"it is no text: {error}", "repair the file") from error

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing if there is none."""
        try:
            return os.listdir(self.path(folder))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, path: str) -> bool:
        """Whether something is there."""
        return self.path(path).exists()


def _flush(path: Path) -> None:
    """Have a file or a folder written to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def replace_file(path: Path, data: bytes) -> None:
    """Put ``data`` at ``path`` at once, with the mode and owner of what was there (else 0644)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(f".{path.name}.architect-new")
    try:
        old: os.stat_result | None = path.stat()
    except FileNotFoundError:
        old = None
    new.write_bytes(data)
    if old is None:
        new.chmod(0o644)
    else:
        os.chown(new, old.st_uid, old.st_gid)
        new.chmod(stat.S_IMODE(old.st_mode))
    _flush(new)
    new.replace(path)
    _flush(path.parent)


def remove_file(path: Path) -> None:
    """Take a file away for good, if it is there."""
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        _flush(path.parent)


def backup_path(path: Path) -> Path:
    """Where the file as it was before our first edit is kept."""
    return path.with_name(path.name + BACKUP_SUFFIX)


def edit_file(path: Path, before: str | None, after: str | None) -> None:
    """Write an edit, and before the first one a backup. ``before`` is what the file has now."""
    backup = backup_path(path)
    if before is not None and not backup.exists():
        shutil.copy2(path, new := backup.with_name(f".{backup.name}.architect-new"))
        owner = path.stat()
        os.chown(new, owner.st_uid, owner.st_gid)
        _flush(new)
        new.replace(backup)
        _flush(path.parent)
    if after is None:
        remove_file(path)
    else:
        replace_file(path, after.encode())


def unedit_file(path: Path, after: str | None) -> bool:
    """Undo the edits of a file; ``after`` is None where nothing but ours is in it.

    The backup takes its place if it says the same; False if it says something else and stays.
    """
    backup = backup_path(path)
    if not backup.exists():
        if after is None:
            remove_file(path)
        else:
            replace_file(path, after.encode())
        return True
    if backup.read_bytes() != (after or "").encode():
        replace_file(path, (after or "").encode())
        return False
    now = path.stat()
    os.chown(backup, now.st_uid, now.st_gid)
    backup.chmod(stat.S_IMODE(now.st_mode))
    backup.replace(path)
    _flush(path.parent)
    return True


@dataclass(frozen=True, slots=True)
class _Entry:
    kind: str
    """``file``, ``link`` or ``folder``."""
    mode: int
    content: str
    """Digest of a file, target of a link."""


Manifest = dict[str, list[str | int]]


def _entries(root: Path) -> Iterator[tuple[str, _Entry]]:
    for folder, folders, files in os.walk(root):
        folders.sort()
        for name in sorted([*folders, *files]):
            path = Path(folder, name)
            relative = str(path.relative_to(root))
            if relative not in (MANIFEST, RECORD):
                yield relative, _entry(path)


def _entry(path: Path) -> _Entry:
    mode = path.lstat().st_mode
    if stat.S_ISLNK(mode):
        return _Entry("link", 0, str(path.readlink()))
    if stat.S_ISDIR(mode):
        return _Entry("folder", stat.S_IMODE(mode), "")
    if not stat.S_ISREG(mode):
        raise ArchitectError(str(path), "it is no file, link or folder", "build the image anew")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return _Entry("file", stat.S_IMODE(mode), digest)


def _found(path: Path) -> _Entry | None:
    try:
        return _entry(path)
    except (FileNotFoundError, NotADirectoryError):
        return None


def read_manifest(target: Path) -> Mapping[str, list[str | int]] | None:
    """What was installed at ``target``; None if we did not, or not to the end."""
    try:
        found = json.loads((target / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def damaged(target: Path) -> list[str]:
    """What of an installed folder is not as it was installed; the folder must have a manifest."""
    wanted = read_manifest(target) or {}
    return [
        name
        for name, (kind, mode, content) in wanted.items()
        if _found(target / name) != _Entry(str(kind), int(mode), str(content))
    ]


def _staged(target: Path) -> Path:
    return target.with_name(f".{target.name}.new")


def sync_tree(source: Path, target: Path, links: Mapping[str, str]) -> bool:
    """Make ``target`` a copy of ``source`` plus ``links`` (path in it to target); whether it changed.

    Everything is made beside it and takes its place in one step (renameat2(2), RENAME_EXCHANGE), so
    nobody ever sees half of it, and programs that run from the old one keep their files. What is in
    ``target`` but was not installed (Python's caches) does not count as a difference.
    """
    new = _staged(target)
    if new.exists():
        shutil.rmtree(new)
    wanted: dict[str, _Entry] = dict(_entries(source))
    wanted |= {name: _Entry("link", 0, content) for name, content in links.items()}
    manifest: Manifest = {n: [e.kind, e.mode, e.content] for n, e in sorted(wanted.items())}
    if read_manifest(target) == manifest and not damaged(target):
        return False
    new.parent.mkdir(parents=True, exist_ok=True)
    new.mkdir(mode=0o755)
    for name, entry in sorted(wanted.items()):
        _place(entry, source / name, target / name, new / name)
    (new / MANIFEST).write_text(json.dumps(manifest))
    _sync_file_system(new)
    if target.exists():
        _exchange(new, target)
        _flush(target.parent)
        shutil.rmtree(new)
    else:
        new.rename(target)
    _flush(target.parent)
    return True


def _place(entry: _Entry, source: Path, old: Path, new: Path) -> None:
    if entry.kind == "folder":
        new.mkdir()
        new.chmod(entry.mode)
        return
    if entry.kind == "link":
        new.symlink_to(entry.content)
        return
    if _found(old) == entry:
        # The same file once more: it stays in the page cache, mapped by those who run from it.
        with contextlib.suppress(OSError):
            new.hardlink_to(old)
            return
    shutil.copyfile(source, new)
    new.chmod(entry.mode)


def _sync_file_system(path: Path) -> None:
    number = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(number) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), str(path))
    finally:
        os.close(number)


def _exchange(one: Path, other: Path) -> None:
    names = (os.fsencode(one), os.fsencode(other))
    if _libc.renameat2(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
        return
    code = ctypes.get_errno()
    raise ArchitectError(
        str(other),
        f"it cannot be exchanged with its new version: {os.strerror(code)}",
        "remove the folder while no container of runc-architect runs, then try again",
    )


def remove_tree(target: Path) -> None:
    """Take an installed folder away; the name first, so that it is never half there."""
    new = _staged(target)
    if new.exists():
        shutil.rmtree(new)
    if target.exists():
        target.rename(new)
        _flush(target.parent)
        shutil.rmtree(new)
