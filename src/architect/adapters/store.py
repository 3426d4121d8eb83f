"""Checkpoints on the disk: written whole or not at all, checked before use.

Layout: ``CHECKPOINTS/<container id>/<generation>/`` with CRIU's images, ``manifest.json`` and, a moment
after the commit, ``pages.digests.json``. A dump goes to ``.dump-<generation>`` beside it, is fsynced and
renamed; the symbolic link ``checkpoint`` in the container's run directory is the commit (the keeper reads
it). Called by the daemon; :func:`verify` also by the tests that damage checkpoints.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

import msgspec
from blake3 import blake3

from architect.adapters import pagemap
from architect.contract.errors import ArchitectError
from architect.contract.records import (
    CHECKPOINT_FORMAT,
    CheckpointManifest,
    FileRecord,
    PageDigests,
)

_MANIFEST: Final = "manifest.json"
_DIGESTS: Final = "pages.digests.json"
_CHUNK: Final = 1 << 20

_NOT_IMAGES: Final = (".log", ".socket", ".json")
"""Suffixes of what CRIU and we leave beside the images."""


class CheckpointError(ArchitectError):
    """A checkpoint could not be written."""


class DamagedCheckpoint(ArchitectError):
    """A checkpoint is not what was written. It is kept as it is."""


class Store:
    """The checkpoints of one container."""

    def __init__(self, root: Path, link: Path, container: str) -> None:
        self._home = root / container
        self._link = link
        self._container = container

    def images(self, generation: int) -> Path:
        """Where the images of a committed checkpoint are."""
        return self._home / str(generation)

    def begin(self, generation: int) -> Path:
        """Makes the directory for a new dump; what an earlier, abandoned dump left is removed.

        Raises:
            CheckpointError: the file system refuses.
        """
        self.abandon()
        place = self._home / f".dump-{generation}"
        try:
            place.mkdir(parents=True, mode=0o700)
        except OSError as error:
            raise _cannot_write(place, error) from error
        return place

    def secure(self, generation: int, criu: str, *, durable: bool = True) -> int:
        """Gives the dump its final name, without committing it; blocking.

        Not ``durable``: a power failure, which would end the program as well, may leave half of it.

        Returns its size in bytes.

        Raises:
            CheckpointError: disk full, or an image cannot be read back.
        """
        place = self._home / f".dump-{generation}"
        try:
            files = self._write_manifest(place, generation, criu)
            if durable:
                # The largest first: one journal commit then covers all the small ones.
                for file in sorted(files, key=lambda record: -record.size):
                    fsync(place / file.name)
                fsync(place / _MANIFEST)
                fsync(place)
            place.rename(self.images(generation))
            if durable:
                fsync(self._home)
        except OSError as error:
            raise _cannot_write(place, error) from error
        return sum(file.size for file in files)

    def adopt(self, place: Path, generation: int, criu: str) -> None:
        """Makes the images in ``place``, which another node has dumped, this container's too; blocking.

        They stay in ``place`` as well (hard links): a container that is made anew finds them there. Not
        durable: until the container runs, the other node has them.

        Raises:
            CheckpointError: the file system refuses.
        """
        fresh = self.begin(generation)
        try:
            link_images(place, fresh)
            self._write_manifest(fresh, generation, criu)
            fresh.rename(self.images(generation))
        except OSError as error:
            raise _cannot_write(fresh, error) from error

    def _write_manifest(self, place: Path, generation: int, criu: str) -> list[FileRecord]:
        files = [_record(f"{place}/{name}") for name in _image_files(place)]
        manifest = CheckpointManifest(
            container=self._container,
            generation=generation,
            criu=criu,
            created=datetime.now(UTC).isoformat(timespec="milliseconds"),
            files=files,
        )
        _write(place / _MANIFEST, msgspec.json.encode(manifest))
        return files

    def commit(self, generation: int) -> None:
        """From here on the checkpoint stands for the program: sets the link, atomically."""
        fresh = self._link.with_name("checkpoint.new")
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(self.images(generation))
        fresh.rename(self._link)

    def committed(self) -> Path | None:
        """The committed checkpoint's images, if there is one."""
        try:
            return self._link.readlink()
        except OSError:
            return None

    def abandon(self) -> None:
        """Removes every checkpoint but the committed one."""
        kept = self.committed()
        with contextlib.suppress(FileNotFoundError):
            for place in self._home.iterdir():
                if place != kept:
                    shutil.rmtree(place, ignore_errors=True)

    def drop(self) -> None:
        """Removes all checkpoints of the container, the link first."""
        self._link.unlink(missing_ok=True)
        shutil.rmtree(self._home, ignore_errors=True)

    def retire(self) -> Path | None:
        """The committed checkpoint no longer stands for the program: takes the link away.

        Its files stay, for :meth:`damaged_pages`, until :meth:`discard`. Returns where they are.
        """
        place = self.committed()
        self._link.unlink(missing_ok=True)
        return place

    def discard(self, place: Path) -> None:
        """Removes a retired checkpoint, and the container's directory with the last one."""
        shutil.rmtree(place, ignore_errors=True)
        with contextlib.suppress(OSError):
            self._home.rmdir()

    def size(self) -> int:
        """Bytes that the committed checkpoint's files hold on the disk, 0 without one."""
        place = self.committed()
        total = 0
        if place is not None:
            with contextlib.suppress(OSError):
                total = sum(file.stat().st_blocks * 512 for file in place.iterdir())
        return total

    def verify(self) -> None:
        """Refuses a committed checkpoint that is not exactly what was written; a few milliseconds.

        All metadata is read and compared with its digest; page data by size only (see
        :func:`damaged_pages`), for reading it all would delay the wake.

        Raises:
            DamagedCheckpoint: what is wrong with which file.
        """
        place = self.committed()
        if place is None:
            raise _damaged(self._home, "there is no committed checkpoint")
        manifest = _read_manifest(place)
        if manifest.container != self._container or str(manifest.generation) != place.name:
            raise _damaged(
                place, f"it belongs to container {manifest.container}, {manifest.generation}"
            )
        for file in manifest.files:
            try:
                found = _record(f"{place}/{file.name}")
            except OSError as error:
                raise _damaged(place, f"{file.name}: {error.strerror}") from error
            if found.size != file.size:
                raise _damaged(place, f"{file.name} has {found.size} bytes instead of {file.size}")
            if found.digest != file.digest:
                raise _damaged(place, f"{file.name} has other contents than were written")
        names = {file.name for file in manifest.files}
        strange = [name for name in _image_files(place) if name not in names]
        # CRIU writes its statistics after the commit.
        strange = [name for name in strange if not name.startswith("stats-")]
        if strange:
            raise _damaged(place, f"{strange[0]} was not written by the dump")

    def digest_pages(self) -> None:
        """Writes the digests of page data; blocking, for a thread. After the commit.

        Raises:
            OSError: the checkpoint was retired meanwhile, or the disk is full.
        """
        place = self.committed()
        if place is None:
            return
        digests = {file.name: list(_chunk_digests(file)) for file in _page_files(place)}
        fresh = place / f"{_DIGESTS}.new"
        _write(fresh, msgspec.json.encode(PageDigests(chunk=_CHUNK, files=digests)))
        fresh.rename(place / _DIGESTS)

    def damaged_pages(self, place: Path) -> list[str]:
        """Which chunks of page data differ from their digests; blocking, for a thread.

        Called after a wake, when every page is in memory: it reports, it can no longer prevent. Empty if
        the wake came before the digests were made.
        """
        if not (place / _DIGESTS).exists():
            return []
        written = msgspec.json.decode((place / _DIGESTS).read_bytes(), type=PageDigests)
        return [
            f"{name} at {number * written.chunk}"
            for name, digests in written.files.items()
            for number, (then, now) in enumerate(
                zip(digests, _chunk_digests(place / name), strict=False)
            )
            if then != now
        ]

    def drop_page_cache(self) -> None:
        """Gives back the page cache of what the pager serves; the rest stays, for a quick wake.

        Raises:
            OSError, ValueError: the checkpoint was retired meanwhile.
        """
        place = self.committed()
        if place is None:
            return
        for name, extents in pagemap.lazy_extents(place).items():
            _advise_dont_need(place / name, extents)


def link_images(source: Path, target: Path) -> list[str]:
    """Puts hard links to the images of a checkpoint into another directory; returns their names.

    Raises:
        OSError: the file system refuses.
    """
    names = _image_files(source)
    for name in names:
        (target / name).hardlink_to(source / name)
    return names


def stray(root: Path, alive: set[str]) -> list[Path]:
    """Directories of containers that are not ``alive``: what a crash left behind."""
    if not root.is_dir():
        return []
    return [place for place in root.iterdir() if place.is_dir() and place.name not in alive]


def _image_files(place: Path) -> list[str]:
    # No Path a file, here and below: a wake waits for it.
    with os.scandir(place) as entries:
        return sorted(
            entry.name
            for entry in entries
            if entry.is_file() and not entry.name.endswith(_NOT_IMAGES)
        )


def _page_files(place: Path) -> list[Path]:
    return sorted(place.glob("pages-*.img"))


def _write(file: Path, data: bytes) -> None:
    """For nobody but root: a checkpoint holds what the program had in its memory."""
    with open(file, "wb", opener=_private) as target:
        target.write(data)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _record(file: str) -> FileRecord:
    name = file.rpartition("/")[2]
    descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if name.startswith("pages-"):
            return FileRecord(name, size)
        # One byte more: a file that grows meanwhile is not what was recorded.
        contents = os.read(descriptor, size + 1)
    finally:
        os.close(descriptor)
    return FileRecord(name, len(contents), blake3(contents).hexdigest())


def _chunk_digests(file: Path) -> Iterator[str]:
    with file.open("rb", buffering=0) as pages:
        while chunk := pages.read(_CHUNK):
            yield blake3(chunk).hexdigest()


def _read_manifest(place: Path) -> CheckpointManifest:
    try:
        raw = (place / _MANIFEST).read_bytes()
        version = msgspec.json.decode(raw).get("format")
        if version != CHECKPOINT_FORMAT:
            raise DamagedCheckpoint(
                what=f"checkpoint {place} cannot be used",
                why=f"its format is {version!r}; this version of architect reads {CHECKPOINT_FORMAT}",
                fix="wake it with the version that wrote it; it is kept as it is",
            )
        return msgspec.json.decode(raw, type=CheckpointManifest)
    except (OSError, msgspec.MsgspecError, AttributeError) as error:
        raise _damaged(place, f"{_MANIFEST}: {error}") from error


def fsync(path: Path) -> None:
    """Makes a file, or the names in a directory, durable. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _advise_dont_need(file: Path, extents: list[tuple[int, int]]) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        for offset, length in extents:
            os.posix_fadvise(descriptor, offset, length, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _cannot_write(place: Path, error: OSError) -> CheckpointError:
    return CheckpointError(
        what=f"checkpoint {place} cannot be written",
        why=error.strerror or str(error),
        fix="free space on that file system; the container runs on",
    )


def _damaged(place: Path, why: str) -> DamagedCheckpoint:
    return DamagedCheckpoint(
        what=f"checkpoint {place} is damaged and was not touched",
        why=why,
        fix="put the file back, then `architect wake`; or give the state up with the engine's rm -f",
    )
