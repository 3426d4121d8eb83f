"""Puts architect on a node: programs, containerd's runtime handler, at most one restart.

Every step may be the last one before a power failure: run again, it goes on from there. Called by
main.py, in the init container of each start of the daemon, so mostly there is nothing to do.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, NoReturn

from architect.adapters import hostfiles
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.decisions import distros
from architect.decisions.distros import Edit
from architect.processes.node.place import Notes, Place

_RUNC: Final = "libexec/runc"
"""Where runc-architect looks for runc first: native/runc-architect/verbs.c."""


def install(place: Place, source: Path) -> list[str]:
    """Install from ``source``, the image's folder; what was done, a line each.

    Raises ArchitectError; then containerd is as it was, but the programs may be there.
    """
    notes = Notes(place.host)
    with notes.held():
        # First what can be refused: then nothing has changed.
        edit = distros.installation(place.layout, place.host, place.handler)
        _check(place, source)
        if edit.is_needed:
            _check_edit(place, notes, edit)
        done = []
        if hostfiles.sync_tree(source, place.target, _links(place)):
            done.append(f"{place.prefix} was installed")
        if edit.is_needed:
            notes.want_restart()
            hostfiles.edit_file(place.host.path(edit.path), edit.before, edit.after)
            done.append(f"{edit.path} was edited")
        if notes.is_unproven and _prove(place, notes, edit):
            done.append("containerd was restarted")
        notes.restarted()
        notes.forget_failure()
        # A removal that came as far as this, but not to its end, is over: the daemon manages again.
        place.host.path(paths.REMOVED).unlink(missing_ok=True)
        return done


def _check(place: Place, source: Path) -> None:
    for name in ("libexec/runc-architect", "venv/bin/architectd"):
        if not (source / name).exists():
            raise ArchitectError(
                str(source), f"{name} is missing", "run this in architect's own image"
            )
    if (place.target / hostfiles.RECORD).exists():
        raise ArchitectError(
            place.prefix, "it was installed with `make install`", "run `make uninstall` there first"
        )


def _check_edit(place: Place, notes: Notes, edit: Edit) -> None:
    if not notes.failed(edit):
        place.restarter.check()
        return
    if notes.is_unproven:
        # We were killed while it was taken back.
        place.restarter.restart(None)
        notes.restarted()
    raise ArchitectError(
        edit.path,
        "containerd did not come up with architect's runtime handler in it before",
        f"see containerd's log; remove {notes.failure_file} for another try",
    )


def _links(place: Place) -> dict[str, str]:
    """Links in the folder that depend on the node."""
    service = place.restarter.service()
    runc = distros.runc_link(place.layout, place.host, service.path if service else "")
    link = place.target / _RUNC
    if runc is None and service is None and link.is_symlink():
        # Where containerd finds runc cannot be asked now.
        runc = str(link.readlink())
    return {} if runc is None else {_RUNC: runc}


def _prove(place: Place, notes: Notes, edit: Edit) -> bool:
    """See containerd work with what was written, or take it back; whether it was restarted."""
    is_wanted = notes.is_restart_wanted(place.restarter.service())
    try:
        if is_wanted:
            place.restarter.restart(place.handler.name)
        else:
            # Started by somebody else, or by us before we were killed.
            place.restarter.await_up(0.0, place.handler.name)
    except ArchitectError as error:
        notes.note_failure(edit)
        _take_back(place, notes, error)
    return is_wanted


def _take_back(place: Place, notes: Notes, error: ArchitectError) -> NoReturn:
    """Back to the configuration of before, with one more restart."""
    notes.want_restart()
    edits = distros.removal(place.layout, place.host)
    for edit in edits:
        hostfiles.unedit_file(place.host.path(edit.path), edit.after)
    names = ", ".join(edit.path for edit in edits)
    try:
        place.restarter.restart(None)
    except ArchitectError as again:
        raise ArchitectError(
            error.what,
            f"{error.why}; {names} is as it was before, but containerd is not up: {again.why}",
            "see containerd's log, and restart it",
        ) from again
    notes.restarted()
    raise ArchitectError(
        error.what,
        f"{error.why}; {names} is as it was before, and containerd runs with it",
        f"see containerd's log; remove {notes.failure_file} for another try",
    ) from error
