"""Takes architect off a node: undoes what install.py did, as far as no container needs it.

Called by main.py, at the end of the daemon once the chart is being removed. Handler and programs
outlive their last container: then this is run again.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from pathlib import Path
from typing import Final

from architect.adapters import containerd, hostfiles
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.decisions import distros
from architect.processes.node.place import Notes, Place

_COMMAND_S: Final = 30.0
_SHOWN: Final = 5


def dependents(place: Place) -> list[str]:
    """Containers that need the handler and the programs: one description each."""
    found = []
    for folder in sorted(place.host.names(str(paths.CONTAINERS))):
        found.append(_described(place.host.path(paths.CONTAINERS / folder)))
    keepers = list(filter(_is_keeper, os.listdir("/proc"))) if not found else []
    return found + [f"the container of keeper {pid}" for pid in keepers]


def _described(folder: Path) -> str:
    try:
        meta = json.loads((folder / "meta.json").read_bytes())
        return f"{meta['namespace']}/{meta['pod']}/{meta['container']}"
    except (OSError, ValueError, KeyError, TypeError):
        return folder.name


def _is_keeper(pid: str) -> bool:
    """Whether it runs a keeper, of whatever version: an older one's file is gone."""
    if not pid.isdecimal():
        return False
    try:
        program = os.readlink(f"/proc/{pid}/exe").removesuffix(" (deleted)")
    except OSError:
        return False
    return program.endswith("/libexec/keeper") and "/architect" in program.replace("/.", "/")


def uninstall(place: Place) -> list[str]:
    """Take everything away; what was done, a line each.

    Raises ArchitectError, also when containers still need it: these stay, and end as under runc.
    """
    notes = Notes(place.host)
    with notes.held():
        # From now on no daemon says what a stop means: what still runs is stopped as under runc.
        place.host.path(paths.CLUSTER_MARK).unlink(missing_ok=True)
        if (place.target / hostfiles.RECORD).exists():
            raise ArchitectError(
                place.prefix, "it was installed with `make install`", "run `make uninstall` there"
            )
        _refuse_if_needed(place)
        edits = distros.removal(place.layout, place.host)
        done = []
        if edits:
            notes.want_restart()
        for edit in edits:
            path = place.host.path(edit.path)
            is_clean = hostfiles.unedit_file(path, edit.after)
            kept = "" if is_clean else f"; its backup stays: {hostfiles.backup_path(path).name}"
            done.append(f"{edit.path} is as it was before{kept}")
        service = place.restarter.service()
        # One that does not run will read it when it starts.
        if service is not None and notes.is_restart_wanted(service):
            place.restarter.restart(None)
            done.append("containerd was restarted")
        notes.restarted()
        # One may have been started until containerd forgot the handler.
        _refuse_if_needed(place)
        is_there = place.target.exists()
        hostfiles.remove_tree(place.target)
        _remove_state(place)
        return [*done, f"{place.prefix} was removed"] if is_there else done


def _refuse_if_needed(place: Place) -> None:
    needing = dependents(place)
    if not needing:
        return
    more = f" and {len(needing) - _SHOWN} more" if len(needing) > _SHOWN else ""
    raise ArchitectError(
        "architect stays on this node",
        f"containers need it: {', '.join(needing[:_SHOWN])}{more}",
        "uninstall again when they have ended",
    )


def _mounts(place: Place) -> list[str]:
    """Mount points of the node below the run directory, in the order in which they were made."""
    process = "self" if place.host.root == Path("/") else "1"
    lines = Path(f"/proc/{process}/mountinfo").read_text().splitlines()
    points = [line.split()[4] for line in lines]
    return [point for point in points if Path(point).is_relative_to(paths.RUN)]


def _is_mounted(point: Path) -> bool:
    """Whether a file system begins there; all of ours differ from the one around them."""
    try:
        return point.stat().st_dev != point.parent.stat().st_dev
    except OSError:
        return False


def _remove_state(place: Place) -> None:
    """What the daemon kept. The node's own view is asked: a mount of its is none of ours."""
    view = Path("/" if place.host.root == Path("/") else "/proc/1/root")
    for point in reversed(_mounts(place)):
        if not _is_mounted(view / point.lstrip("/")):
            continue  # Hidden below another mount, as on a node that is made of namespaces.
        command = [*containerd.entering(place.host), "umount", point]
        done = containerd.run(command, _COMMAND_S)
        if done.returncode != 0:
            why = done.stderr.strip() or f"umount ended with {done.returncode}"
            raise ArchitectError(point, why, "end what uses it, then uninstall again")
    for folder in (paths.RUN, paths.STATE):
        path = place.host.path(folder)
        # A pod may have the folder itself mounted: then only its content can go.
        for name in place.host.names(str(folder)):
            entry = path / name
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry)
            else:
                entry.unlink()
        with contextlib.suppress(OSError):
            path.rmdir()
