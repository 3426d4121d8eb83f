"""What is on a node, for people and tests. Called by main.py; changes nothing."""

from __future__ import annotations

from typing import Any

from architect.adapters import hostfiles
from architect.decisions import distros, runtimeconfig
from architect.processes.node.place import Notes, Place
from architect.processes.node.uninstall import dependents


def status(place: Place) -> dict[str, Any]:
    """The distribution, what is installed, what is edited, and who needs it.

    Raises ArchitectError where containerd's configuration cannot be read.
    """
    host, layout = place.host, place.layout
    manifest = hostfiles.read_manifest(place.target)
    edits = distros.removal(layout, host)
    config = distros.effective(layout, host)
    section = runtimeconfig.plugin(config.get("version", 2), layout.config)
    service = place.restarter.service()
    return {
        "distro": layout.name,
        "prefix": place.prefix,
        "installed": manifest is not None,
        "damaged": [] if manifest is None else hostfiles.damaged(place.target),
        "config": layout.config,
        "edited": [edit.path for edit in edits],
        "backups": [
            edit.path + distros.BACKUP_SUFFIX
            for edit in edits
            if host.exists(edit.path + distros.BACKUP_SUFFIX)
        ],
        "handler": place.handler.name in runtimeconfig.runtimes(config, section),
        "restart_wanted": Notes(host).is_restart_wanted(service),
        "containerd": None if service is None else service.pid,
        "containers": dependents(place),
    }
