"""A narrow, typed view of an OCI runtime ``config.json``.

The document stays a plain dictionary, because it is handed on to runc with members this program has
never heard of; these functions read the few that matter here. A member that is absent or of another
type than the specification's reads as absent: runc itself reports such documents better.
Called by ``decisions.admission`` and by the adapters that start and restore containers.
Source: OCI runtime specification 1.0 to 1.2, config.md and config-linux.md.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Spec = Mapping[str, Any]
"""A parsed config.json."""


@dataclass(frozen=True, slots=True)
class Mount:
    """One entry of ``mounts``."""

    destination: str
    """Absolute path inside the container."""
    type: str
    """File system type, ``bind``, or empty when only the options say that it is a bind mount."""
    source: str
    """Device, file system name or host path; empty when the specification gives none."""
    options: tuple[str, ...]
    """Mount options in their order."""

    @property
    def bind(self) -> bool:
        """Whether the mount shows a path of the host."""
        return self.type == "bind" or "bind" in self.options or "rbind" in self.options


def _object(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""


def _texts(value: object) -> tuple[str, ...]:
    return tuple(item for item in _list(value) if isinstance(item, str))


def terminal(spec: Spec) -> bool:
    """Whether the container's process gets a terminal (``process.terminal``)."""
    return _object(spec.get("process")).get("terminal") is True


def args(spec: Spec) -> tuple[str, ...]:
    """The program and its arguments (``process.args``)."""
    return _texts(_object(spec.get("process")).get("args"))


def root_path(spec: Spec) -> str:
    """The root file system (``root.path``): absolute, or relative to the bundle; "" if absent."""
    return _text(_object(spec.get("root")).get("path"))


def annotations(spec: Spec) -> dict[str, str]:
    """The annotations whose values are text, as the specification wants all of them."""
    found = _object(spec.get("annotations"))
    return {key: value for key, value in found.items() if isinstance(value, str)}


def namespaces(spec: Spec) -> dict[str, str | None]:
    """The namespaces by type; the path of one to join, None for a new one, no key: the host's."""
    found: dict[str, str | None] = {}
    for entry in _list(_object(spec.get("linux")).get("namespaces")):
        kind = _text(_object(entry).get("type"))
        if kind:
            found[kind] = _text(_object(entry).get("path")) or None
    return found


def cgroups_path(spec: Spec) -> str:
    """The container's cgroup (``linux.cgroupsPath``); "" when the runtime chooses it."""
    return _text(_object(spec.get("linux")).get("cgroupsPath"))


def seccomp(spec: Spec) -> Mapping[str, Any] | None:
    """The seccomp profile (``linux.seccomp``), None for an unconfined container."""
    profile = _object(spec.get("linux")).get("seccomp")
    return profile if isinstance(profile, Mapping) else None


def mounts(spec: Spec) -> tuple[Mount, ...]:
    """The mounts in the order in which they are made; entries without a destination left out."""
    found = []
    for entry in map(_object, _list(spec.get("mounts"))):
        destination = _text(entry.get("destination"))
        if destination:
            kind, source = _text(entry.get("type")), _text(entry.get("source"))
            found.append(Mount(destination, kind, source, _texts(entry.get("options"))))
    return tuple(found)


def with_seccomp(spec: Spec, profile: Mapping[str, Any]) -> dict[str, Any]:
    """Return a copy of ``spec`` with another seccomp profile; everything else is shared with it."""
    return {**spec, "linux": {**_object(spec.get("linux")), "seccomp": profile}}
