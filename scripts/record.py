"""What `make install` changed outside its own prefix, so that `make uninstall` can undo it.

Every file, link and folder goes through a Record, which is on disk before the change is made: an
installation that was interrupted is undone like a finished one. Called by install.py.
"""

import base64
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from common import Failure


@dataclass
class Entry:
    """A file outside the prefix that we wrote."""

    written: str
    """What we wrote, base64."""
    before: str | None
    """What stood there before, base64; None where there was no file."""
    mode: int
    """Permission bits, of the file before where there was one."""


@dataclass
class Record:
    """All changes of one installation; `path` is the JSON file that holds them."""

    path: Path
    files: dict[str, Entry] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    folders: list[str] = field(default_factory=list)
    parts: dict[str, str] = field(default_factory=dict)
    """Digest of each part inside the prefix, to leave alone what has not changed."""

    @classmethod
    def load(cls, path: Path) -> "Record":
        """The record on disk, or an empty one where nothing is installed."""
        if not path.exists():
            return cls(path)
        data = json.loads(path.read_text())
        data["files"] = {name: Entry(**entry) for name, entry in data["files"].items()}
        return cls(path, **data)

    def save(self) -> None:
        """Write the record and see it on the disk."""
        data = asdict(self)
        del data["path"]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _write(self.path, json.dumps(data, indent=1).encode(), 0o600)

    def folder(self, path: Path) -> None:
        """Make a folder with its parents; those that were not there are ours to remove."""
        missing = [p for p in [path, *path.parents] if not p.exists()]
        for each in reversed(missing):
            self.folders.append(str(each))
            self.save()
            each.mkdir()

    def write(
        self, path: Path, content: bytes, mode: int = 0o644, theirs: bytes | None = None
    ) -> bool:
        """Write a file, remembering what stood there; whether that changed anything.

        `theirs` is what stands there now without our part. It is what to go back to when the file
        was changed since we last wrote it.
        """
        current = path.read_bytes() if path.exists() else None
        known = self.files.get(str(path))
        as_written = known is not None and current == base64.b64decode(known.written)
        if as_written and current == content:
            return False
        if known is None:
            before = _encoded(current)
        elif as_written or known.before is None:
            before = known.before
        else:
            before = _encoded(theirs)
        mode = path.stat().st_mode & 0o7777 if current is not None else mode
        self.folder(path.parent)
        self.files[str(path)] = Entry(base64.b64encode(content).decode(), before, mode)
        self.save()
        _write(path, content, mode)
        return True

    def link(self, path: Path, target: Path) -> None:
        """Make a symbolic link; raises Failure where something of someone else's stands."""
        if path.is_symlink() and path.readlink() == target:
            if str(path) not in self.links:
                self.links[str(path)] = str(target)
                self.save()
            return
        if os.path.lexists(path) and str(path) not in self.links:
            raise Failure(f"{path} is there and is not ours: move it away, then install again")
        self.folder(path.parent)
        self.links[str(path)] = str(target)
        self.save()
        path.unlink(missing_ok=True)
        path.symlink_to(target)

    def undo_file(self, name: str, without_ours: bytes | None = None) -> None:
        """Bring back what stood at `name`.

        A file that someone changed after us keeps those changes: `without_ours` is then its
        content without our part. One that we made is removed.
        """
        entry, path = self.files[name], Path(name)
        if path.exists():
            if entry.before is None:
                path.unlink()
            elif path.read_bytes() == base64.b64decode(entry.written):
                _write(path, base64.b64decode(entry.before), entry.mode)
            elif without_ours is not None:
                _write(path, without_ours, entry.mode)
            else:
                raise Failure(f"{path} was changed after the installation: restore it by hand")
        del self.files[name]
        self.save()

    def undo_links(self) -> None:
        """Remove our links; one that points elsewhere by now is left."""
        for name, target in list(self.links.items()):
            path = Path(name)
            if path.is_symlink() and str(path.readlink()) == target:
                path.unlink()
            del self.links[name]
            self.save()

    def undo_folders(self) -> None:
        """Remove the folders that we made and that are empty."""
        for name in sorted(self.folders, key=len, reverse=True):
            path = Path(name)
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()
        self.folders.clear()


def _encoded(content: bytes | None) -> str | None:
    return None if content is None else base64.b64encode(content).decode()


def _write(path: Path, content: bytes, mode: int) -> None:
    """Replace a file in one step: readers see the old content or the new."""
    unfinished = path.with_name(f".{path.name}.new")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    unfinished.chmod(mode)
    unfinished.replace(path)
