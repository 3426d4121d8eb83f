"""What install, uninstall and status have in common: one node, its layout, what is noted on it."""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from architect.adapters import containerd
from architect.adapters.hostfiles import Host, remove_file, replace_file
from architect.contract import kubernetes, paths
from architect.contract.annotations import PREFIX as ANNOTATIONS
from architect.contract.errors import ArchitectError
from architect.decisions import distros
from architect.decisions.distros import Edit, Layout
from architect.decisions.runtimeconfig import Handler

_STATE: Final = paths.STATE / "node"
_DEFAULT_CONFIG: Final = "/etc/containerd/config.toml"


def handler(prefix: str) -> Handler:
    """The runtime handler of an installation at ``prefix``."""
    return Handler(
        name=kubernetes.RUNC_CLASS,
        binary=f"{prefix}/libexec/runc-architect",
        pod_annotations=(ANNOTATIONS + "*",),
        # The kubelet puts the declared ports into io.kubernetes.container.ports.
        container_annotations=("io.kubernetes.container.*",),
    )


@dataclass(frozen=True, slots=True)
class Place:
    """A node that is worked on."""

    host: Host
    prefix: str
    layout: Layout

    @property
    def target(self) -> Path:
        """The folder of everything that is ours."""
        return self.host.path(self.prefix)

    @property
    def handler(self) -> Handler:
        """Our runtime handler."""
        return handler(self.prefix)

    @property
    def restarter(self) -> containerd.Restarter:
        """Restarts this node's containerd."""
        layout = self.layout
        return containerd.Restarter(
            self.host,
            layout.config,
            is_default=layout.config == _DEFAULT_CONFIG,
            socket=distros.socket(layout, self.host),
            units=layout.units,
        )


def find(host: Host, prefix: str, distro: str) -> Place:
    """The node at ``host``; its containerd's own command line overrides where the layout looks."""
    configs = {one.config or _DEFAULT_CONFIG for one in containerd.services()}
    return Place(host, prefix, distros.choose(distro, host).at(configs))


class Notes:
    """What has to outlive a kill of ours, in a folder of the node's disk."""

    def __init__(self, host: Host) -> None:
        self._folder = host.path(_STATE)
        self._restart = self._folder / "restart.json"
        self._failed = self._folder / "failed.json"

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """No other install or uninstall runs on this node. ArchitectError if one does."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with (self._folder / "lock").open("a") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ArchitectError(
                    "this node",
                    "another architect-node works on it",
                    "try again when it has ended",
                ) from error
            yield

    def want_restart(self) -> None:
        """From now on containerd is older than its configuration."""
        note = {"boot": paths.BOOT_ID.read_text().strip(), "since": containerd.boot_time()}
        replace_file(self._restart, json.dumps(note).encode())

    def restarted(self) -> None:
        """containerd has read its configuration."""
        remove_file(self._restart)

    @property
    def is_unproven(self) -> bool:
        """Whether no containerd has been seen to work with what was written."""
        return self._restart.exists()

    def is_restart_wanted(self, service: containerd.Service | None) -> bool:
        """Whether the running containerd has not read what was written."""
        note = self._load(self._restart)
        if note is None or service is None:
            return note is not None
        is_this_boot = note.get("boot") == paths.BOOT_ID.read_text().strip()
        since = note.get("since")
        return is_this_boot and isinstance(since, int | float) and service.started <= since

    def failed(self, edit: Edit) -> bool:
        """Whether containerd did not come up with this edit before."""
        return self._load(self._failed) == self._failure(edit)

    def note_failure(self, edit: Edit) -> None:
        """Remember it, so that it is not tried again and again."""
        replace_file(self._failed, json.dumps(self._failure(edit)).encode())

    def forget_failure(self) -> None:
        """It worked."""
        remove_file(self._failed)

    @property
    def failure_file(self) -> str:
        """For a message: what to remove for another try."""
        return str(_STATE / self._failed.name)

    @staticmethod
    def _failure(edit: Edit) -> dict[str, object]:
        return {"path": edit.path, "after": edit.after}

    @staticmethod
    def _load(path: Path) -> dict[str, object] | None:
        try:
            found = json.loads(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        return found if isinstance(found, dict) else None
