"""A container's files in a move: what it must find at the destination, and what comes along with it.

Called by :mod:`.departing` at the source and :mod:`.arrival` at the destination. What is judged how is
:mod:`architect.decisions.files`'; this only fetches the facts and puts things where they belong.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Final

import msgspec

from architect.adapters import layer, openfiles
from architect.contract import oci
from architect.contract.moving import (
    LAYER,
    ContainerNeeds,
    MovedDirectory,
    MovedFile,
    MovedGeneration,
    NeededFile,
)
from architect.decisions import files
from architect.decisions.files import EmptyDir, Expected, Generation, Outlook, Volume
from architect.processes.architectd.moving import MovableContainer

_LOG: Final = "log"
"""The file with the contents of a container's termination log."""


class Packed(msgspec.Struct, kw_only=True):
    """What was put into a container's directory beside its images."""

    names: list[str]
    directories: list[MovedDirectory]
    generations: list[MovedGeneration]


def needs(managed: MovableContainer) -> tuple[ContainerNeeds, tuple[str, ...]]:
    """What a running container must find elsewhere, and why it cannot leave now; blocking.

    Raises:
        OSError: the container has ended.
    """
    outlook = _outlook(managed)
    root = Path(f"/proc/{managed.clock.init}/root")
    known = openfiles.digests(root, outlook.expected)
    needed = [
        NeededFile(one.path, one.size, known.get(one.path, "") if one.content else "")
        for one in outlook.expected
    ]
    points = [point for point, _ in managed.record.mounts or ()]
    return ContainerNeeds(managed.record.container, needed, points), outlook.reasons


def missing(managed: MovableContainer, needed: ContainerNeeds) -> list[str]:
    """What of that a container that was created here does not have, one line each; blocking."""
    root = Path(f"/proc/{managed.clock.init}/root")
    expected = [Expected(one.path, one.size, bool(one.digest)) for one in needed.files]
    known = {one.path: one.digest for one in needed.files if one.digest}
    return openfiles.missing(root, expected, known)


def outlook(managed: MovableContainer) -> Outlook | None:
    """What it has open, if it runs; to be asked before it is frozen, for :func:`pack`; blocking."""
    return _outlook(managed) if managed.clock.init else None


def pack(managed: MovableContainer, place: Path, seen: Outlook | None, others: set[str]) -> Packed:
    """Puts what a frozen container has written into ``place``; blocking.

    ``others`` are the volumes that another container of the pod brings; those of this one are added.

    Raises:
        LayerError, OSError: something cannot be read, or the disk is full.
    """
    record, settings = managed.record, managed.settings
    packed = Packed(names=[], directories=[], generations=[])
    overlay = layer.overlay(Path(record.rootfs))
    if layer.pack(overlay, place / LAYER, settings.sparse_files) is not None:
        packed.names.append(LAYER)
    mounts = _volumes(managed)
    for number, one in enumerate(files.carried(mounts, settings)):
        source = _source(managed, one)
        if one.name in others or source is None:
            continue
        others.add(one.name)
        name = f"directory-{number}.tar"
        if layer.pack_tree(source, place / name, files.sparse_in(one, settings)) is None:
            continue
        packed.names.append(name)
        packed.directories.append(MovedDirectory(name, one.name, one.point))
    sources = {one.point: one.source for one in mounts}
    for number, generation in enumerate(seen.generations if seen else ()):
        name = f"generation-{number}.tar"
        openfiles.carry(generation, Path(sources[generation.point]), place / name)
        packed.names.append(name)
        packed.generations.append(MovedGeneration(name, generation.point, generation.name))
    for point in seen.rewritten if seen else ():
        (place / _LOG).write_bytes(Path(sources[point]).read_bytes())
        packed.names.append(_LOG)
    return packed


def unpack(
    managed: MovableContainer,
    place: Path,
    directories: Collection[MovedDirectory],
    generations: Collection[MovedGeneration],
) -> None:
    """Gives a container that was created here what the one it replaces had written; blocking.

    Raises:
        LayerError, OSError: it cannot be put in place.
    """
    record = managed.record
    if (place / LAYER).exists():
        points = layer.points(managed.clock.init)
        layer.unpack(place / LAYER, Path(record.rootfs), points)
    mounts = _volumes(managed)
    mine = {one.name: one for one in files.carried(mounts, managed.settings)}
    for directory in directories:
        found = mine.get(directory.volume)
        target = _source(managed, found) if found is not None else None
        if target is None:
            raise layer.LayerError(
                f"{managed.name} has no place for volume {directory.volume}",
                f"nothing is mounted at {directory.point}",
                "a replacement has to have the same volumes",
            )
        layer.unpack_tree(place / directory.file, target)
    sources = {one.point: Path(one.source) for one in mounts}
    for one in generations:
        openfiles.bring(Generation(one.point, one.name), place / one.file, sources[one.point])
    if (place / _LOG).exists():
        for mount in mounts:
            if mount.kind is files.Kind.LOG:
                Path(mount.source).write_bytes((place / _LOG).read_bytes())


def moved_files(place: Path, names: Collection[str]) -> list[MovedFile]:
    """The files of a frozen container, with their sizes."""
    return [MovedFile(name, (place / name).stat().st_size) for name in names]


def _outlook(managed: MovableContainer) -> Outlook:
    group = managed.clock.cgroup
    pids = [pid for pid in group.processes() if pid != managed.record.keeper] if group else []
    return files.outlook(openfiles.read(pids), _volumes(managed), managed.settings)


def _volumes(managed: MovableContainer) -> list[Volume]:
    spec = json.loads((Path(managed.record.bundle) / "config.json").read_text())
    mounts = openfiles.settled(oci.mounts(spec), Path(managed.record.rootfs))
    return files.volumes(mounts, openfiles.plugins(mounts))


def _source(managed: MovableContainer, one: EmptyDir) -> Path | None:
    """Where it is on the host; what is only in the container's mount namespace is kept there."""
    if one.source:
        return Path(one.source)
    kept = dict(managed.record.mounts or ()).get(one.point)
    return Path(kept) if kept else None
