"""Where each distribution keeps containerd's configuration, and which file of it is to be edited.

One place for all that differs between EKS (AL2023), GKE (Ubuntu), k3s, rke2, kind and kubeadm.
Pure: files are read through :class:`Files`. Called by processes/node, which writes.

Sources: awslabs/amazon-eks-ami nodeadm/internal/containerd (config.toml written anew at each boot,
version 2 or 3 by containerd's own); k3s-io/k3s pkg/agent/containerd/config.go (config-v3.toml.tmpl
comes before config.toml.tmpl, which makes the whole version 2) and pull request 13680 (imports of
config-v3.toml.d); docs.k3s.io/advanced and docs.rke2.io/advanced; kind's images/base.
"""

from __future__ import annotations

import fnmatch
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final, Protocol

from architect.contract.errors import ArchitectError, quoted
from architect.decisions import runtimeconfig as rc

DROP_IN: Final = "99-architect.toml"
BACKUP_SUFFIX: Final = ".before-architect"
"""Behind the name of a file that was there before us: what was in it. Not .toml, or containerd might
import it."""
_RUNC_PLACES: Final = ("/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
"""Where runc-architect looks by itself: native/runc-architect/verbs.c."""


class Files(Protocol):
    """The node's files, by absolute paths."""

    def read(self, path: str) -> str | None:
        """The text of a file; None if there is none."""

    def names(self, folder: str) -> list[str]:
        """What is in a folder; nothing if there is none."""

    def exists(self, path: str) -> bool:
        """Whether something is there."""


@dataclass(frozen=True, slots=True)
class Layout:
    """What a distribution looks like on disk."""

    name: str
    config: str = "/etc/containerd/config.toml"
    units: tuple[str, ...] = ("containerd",)
    """systemd units one of which runs containerd."""
    socket: str = "/run/containerd/containerd.sock"
    is_generated: bool = False
    """The configuration is rendered from a template at each start."""
    runc: tuple[str, ...] = ()
    """Where its runc is, if not in a usual place; the paths outlive an upgrade."""
    signs: tuple[str, ...] = ()
    """Paths one of which is on every such node, and on no other."""

    def at(self, configs: set[str]) -> Layout:
        """The same for the containerds that run with these configurations.

        Another folder than the usual one is chosen by --data-dir or --config.
        """
        mine = {c for c in configs if not self.is_generated or c.endswith(_GENERATED)}
        if self.config in mine or len(mine) != 1:
            return self
        return replace(self, config=mine.pop())


_GENERATED: Final = "/agent/etc/containerd/config.toml"
"""Below the data directory of k3s and rke2."""


def _rancher(name: str, units: tuple[str, ...], runc: str) -> Layout:
    home = f"/var/lib/rancher/{name}"
    folders = ("/etc/systemd/system", "/usr/local/lib/systemd/system", "/usr/lib/systemd/system")
    return Layout(
        name,
        config=home + _GENERATED,
        units=units,
        socket="/run/k3s/containerd/containerd.sock",
        is_generated=True,
        runc=(f"{home}/{runc}",),
        signs=(home + _GENERATED, *(f"{f}/{unit}.service" for f in folders for unit in units)),
    )


# In the order in which `auto` looks: the more special first.
LAYOUTS: Final = {
    layout.name: layout
    for layout in (
        _rancher("k3s", ("k3s", "k3s-agent"), "data/current/bin/runc"),
        _rancher("rke2", ("rke2-server", "rke2-agent"), "bin/runc"),
        Layout("kind", signs=("/kind",)),
        Layout("eks", signs=("/usr/bin/nodeadm", "/etc/eks")),
        Layout("gke", signs=("/home/kubernetes/bin", "/etc/default/kube-env")),
        Layout("kubeadm"),
    )
}
AUTO: Final = "auto"
CHOICES: Final = (*sorted(LAYOUTS), AUTO)


def choose(distro: str, files: Files) -> Layout:
    """The layout of that name; for ``auto`` the one whose signs are there, else kubeadm's."""
    if distro in LAYOUTS:
        return LAYOUTS[distro]
    if distro != AUTO:
        raise ArchitectError(
            f"kubernetesDistro {quoted(distro)}",
            "it is not known",
            f"use one of {', '.join(CHOICES)}",
        )
    for layout in LAYOUTS.values():
        if any(files.exists(sign) for sign in layout.signs):
            return layout
    return LAYOUTS["kubeadm"]


@dataclass(frozen=True, slots=True)
class Edit:
    """A file and what is to be in it. ``before`` is None if it is not there, ``after`` if it goes."""

    path: str
    before: str | None
    after: str | None

    @property
    def is_needed(self) -> bool:
        """Whether anything has to be written."""
        return self.before != self.after


def _imports(config: rc.Config, path: str) -> list[str]:
    """Patterns of the files that a configuration imports, absolute."""
    folder = posixpath.dirname(path)
    found = config.get("imports", [])
    return [posixpath.join(folder, one) for one in found if isinstance(one, str)]


def _imported(patterns: Iterable[str], files: Files) -> list[str]:
    """The files behind them, in containerd's order."""
    found: dict[str, None] = {}
    for pattern in patterns:
        folder, last = posixpath.split(pattern)
        names = sorted(files.names(folder))
        found |= dict.fromkeys(
            posixpath.join(folder, n) for n in names if fnmatch.fnmatchcase(n, last)
        )
    return list(found)


def _drop_in_path(patterns: Iterable[str]) -> str | None:
    for pattern in patterns:
        folder, last = posixpath.split(pattern)
        if "*" in last and "*" not in folder and fnmatch.fnmatchcase(DROP_IN, last):
            return posixpath.join(folder, DROP_IN)
    return None


def _read(path: str, files: Files) -> rc.Config:
    return rc.parse(files.read(path) or "", path)


def effective(layout: Layout, files: Files) -> rc.Config:
    """The configuration that containerd works with, ours included. ArchitectError if unreadable."""
    main = _read(layout.config, files)
    imported = [_read(p, files) for p in _imported(_imports(main, layout.config), files)]
    return rc.merged([main, *imported])


def installation(layout: Layout, files: Files, handler: rc.Handler) -> Edit:
    """What to write so that containerd knows the handler. Raises ArchitectError if it cannot."""
    text = files.read(layout.config)
    if text is None and layout.is_generated:
        raise ArchitectError(
            layout.config,
            f"{layout.name} has not written it yet",
            f"start {' or '.join(layout.units)}, then try again",
        )
    config = rc.parse(rc.without_block(text or "", rc.NODE), layout.config)
    patterns = _imports(config, layout.config)
    version = config.get("version")
    imported = _imported(patterns, files)
    if isinstance(version, int) and version >= 3:
        ours = _drop_in_path(patterns)
        others = [_read(p, files) for p in imported if p != ours]
        around = rc.merged([config, *others])
        if ours is not None:
            after = rc.drop_in(handler, rc.NODE, around=around, name=ours)
            return Edit(ours, files.read(ours), after)
        if not layout.is_generated:
            after = rc.with_handler(
                text or "", handler, rc.NODE, name=layout.config, around=rc.merged(others)
            )
            return Edit(layout.config, text, after)
    if layout.is_generated:
        return _template(layout, files, handler, text or "", version)
    return _replacing(layout, files, handler, text, imported)


def _replacing(
    layout: Layout, files: Files, handler: rc.Handler, text: str | None, imported: list[str]
) -> Edit:
    """Version 2, where the last file with the plugin's section may be the only one that counts."""
    section = rc.PLUGINS[2]
    main = rc.parse(text or "", layout.config)
    for path in reversed(imported):
        if section in _read(path, files).get("plugins", {}):
            before = files.read(path) or ""
            version = main.get("version", 1)
            after = rc.with_handler(before, handler, rc.NODE, name=path, version=version)
            return Edit(path, before, after)
    after = rc.with_handler(text or "", handler, rc.NODE, name=layout.config)
    return Edit(layout.config, text, after)


def _templates(layout: Layout) -> tuple[str, str]:
    folder = posixpath.dirname(layout.config)
    return f"{folder}/config-v3.toml.tmpl", f"{folder}/config.toml.tmpl"


def _template(
    layout: Layout, files: Files, handler: rc.Handler, rendered: str, version: object
) -> Edit:
    newer, older = _templates(layout)
    path = older if version == 2 else newer
    template = files.read(path)
    if path == newer and template is None and files.read(older) is not None:
        raise ArchitectError(
            older,
            f"{layout.name} has not rendered it: {layout.config} is of version {version}",
            f"restart {' or '.join(layout.units)}, then try again",
        )
    after = rc.with_handler_in_template(template, rendered, handler, rc.NODE, name=path)
    return Edit(path, template, after or None)


def removal(layout: Layout, files: Files) -> list[Edit]:
    """What to write so that nothing of ours is left; a file that was all ours goes."""
    paths = [layout.config, *_templates(layout)] if layout.is_generated else [layout.config]
    text = files.read(layout.config)
    config = rc.parse(text or "", layout.config)
    patterns = _imports(config, layout.config)
    ours = _drop_in_path(patterns)
    paths += [p for p in (*_imported(patterns, files), ours or "") if p and p not in paths]
    edits = []
    for path in paths:
        before = files.read(path)
        if before is None or rc.NODE.span(before) is None:
            continue
        if path == layout.config and layout.is_generated:
            continue
        after = rc.removed(before, rc.NODE, name=path, toml=not path.endswith(".tmpl"))
        if after == rc.BASE_TEMPLATE and not files.exists(path + BACKUP_SUFFIX):
            after = ""
        edits.append(Edit(path, before, after or None))
    return edits


def runc_link(layout: Layout, files: Files, path: str) -> str | None:
    """Where runc is, if runc-architect does not look there; ``path`` is containerd's own PATH.

    None if it finds runc by itself.
    """
    config = effective(layout, files)
    section = rc.plugin(config.get("version", 2), layout.config)
    runc = rc.runtimes(config, section).get("runc", {})
    binary = runc.get("options", {}).get("BinaryName", "")
    usual = [f"{folder}/runc" for folder in _RUNC_PLACES]
    if isinstance(binary, str) and binary.startswith("/"):
        return None if binary == next(filter(files.exists, usual), None) else binary
    ours = next(filter(files.exists, layout.runc), None)
    if ours is not None:
        return ours
    if any(map(files.exists, usual)):
        return None
    folders = [one for one in path.split(":") if one.startswith("/")]
    return next((p for p in (f"{f}/runc" for f in folders) if files.exists(p)), None)


def socket(layout: Layout, files: Files) -> str:
    """The socket containerd answers at."""
    config = effective(layout, files)
    server = config.get("plugins", {}).get("io.containerd.server.v1.grpc", {})
    found = server.get("address") or config.get("grpc", {}).get("address")
    return found if isinstance(found, str) and found else layout.socket
