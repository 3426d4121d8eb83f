"""A runtime handler in containerd's configuration: old text in, new text out.

The file belongs to the administrator or to a distribution, so it is edited as text: one marked block
is appended, comments and order stay, and taking the block away gives back the bytes of before. What
comes out is parsed again and must be what went in plus exactly ours. Called by decisions/distros.py
(which chooses the file) for architect-node, and by scripts/engines.py for `make install`, which runs
without any package: nothing but the standard library and contract/errors.py is imported here.

Facts, from containerd's source (cmd/containerd/server/config/config.go, internal/cri/config):

* Versions 2 (containerd 1.x, 2.x), 3 (from 2.0) and 4 (from 2.3); 4 moved only the server's sockets.
* containerd 1.x decodes a plugin's section over the defaults and lets the table ``runtimes``
  replace the default one: a file that names any runtime has to name runc as well.
* containerd 1.x lets an imported file replace a plugin's whole section; 2.0 and later merge.
"""

from __future__ import annotations

import copy
import json
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from architect.contract.errors import ArchitectError, quoted

_V1_PLUGIN: Final = "io.containerd.grpc.v1.cri"
_V2_PLUGIN: Final = "io.containerd.cri.v1.runtime"
PLUGINS: Final = {2: _V1_PLUGIN, 3: _V2_PLUGIN, 4: _V2_PLUGIN}
"""The plugin whose section has the runtimes, by the configuration's version."""
_DEFAULT_VERSION: Final = 2
"""Written where there is no configuration: containerd 1.7 and all of 2.x read it."""
RUNC_TYPE: Final = "io.containerd.runc.v2"
_INHERITED: Final = (
    "base_runtime_spec",
    "snapshotter",
    "cgroup_writable",
    "privileged_without_host_devices",
    "privileged_without_host_devices_all_devices_allowed",
)
"""What a distribution gives its pods through the runc handler, ours get as well."""
_MIGRATE: Final = "write it anew with `containerd config migrate`, then try again"

Config = dict[str, Any]


class HandlerTaken(ArchitectError):
    """The file has a handler of our name that does something else."""


@dataclass(frozen=True, slots=True)
class Handler:
    """A runtime handler as pods name it (RuntimeClass.handler)."""

    name: str
    binary: str
    """Absolute path of the OCI runtime."""
    pod_annotations: tuple[str, ...] = ()
    """Patterns of the pod's annotations that reach the OCI configuration."""
    container_annotations: tuple[str, ...] = ()
    """Patterns of the annotations that the kubelet puts on containers, likewise."""


@dataclass(frozen=True, slots=True)
class Mark:
    """The lines around what we write; ``remover`` is the command that takes it away again."""

    remover: str

    @property
    def begin(self) -> str:
        """The first line of a block."""
        return f"# BEGIN architect ({self.remover} removes this)\n"

    @property
    def joined(self) -> str:
        """The same where the line before it had no end, which we gave it."""
        return f"\n# BEGIN architect ({self.remover} removes this and the line end before it)\n"

    @property
    def end(self) -> str:
        """The last line of a block."""
        return "# END architect\n"

    def span(self, text: str) -> tuple[int, int] | None:
        """Where our block is in ``text``; None if there is none. ArchitectError if it has no end."""
        start = text.find(self.joined)
        if start < 0:
            start = next(
                (m.start() for m in re.finditer(re.escape(self.begin), text) if _at_line(text, m)),
                -1,
            )
        if start < 0:
            return None
        stop = text.find("\n" + self.end, start)
        if stop < 0:
            raise ArchitectError(
                "containerd's configuration",
                "it has the first line of architect's block but not the last",
                f'remove the lines from "{self.begin.strip()}" on that are architect\'s',
            )
        return start, stop + 1 + len(self.end)


def _at_line(text: str, match: re.Match[str]) -> bool:
    return match.start() == 0 or text[match.start() - 1] == "\n"


NODE: Final = Mark("architect-node uninstall")
MACHINE: Final = Mark("make uninstall")


def parse(text: str, name: str) -> Config:
    """The configuration in ``text``; ``name`` is the file for the message of an ArchitectError."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ArchitectError(
            name, f"it is no TOML that can be read: {error}", "repair the file, then try again"
        ) from error


def without_block(text: str, mark: Mark) -> str:
    """``text`` as it was before :func:`with_handler`."""
    span = mark.span(text)
    return text if span is None else text[: span[0]] + text[span[1] :]


def plugin(version: object, name: str) -> str:
    """The section that has the runtimes. ArchitectError for a version that is not known."""
    if isinstance(version, int) and version in PLUGINS:
        return PLUGINS[version]
    known = ", ".join(map(str, PLUGINS))
    raise ArchitectError(
        name, f"its version is {version}; {known} are known", _MIGRATE if version == 1 else ""
    )


def runtimes(config: Mapping[str, Any], section: str) -> Config:
    """The runtimes that a configuration names."""
    value: Any = config
    for key in ("plugins", section, "containerd", "runtimes"):
        value = value.get(key, {}) if isinstance(value, Mapping) else {}
    return dict(value) if isinstance(value, Mapping) else {}


def model(config: Mapping[str, Any], section: str) -> Config:
    """The runtime that ours is to be like: runc, or what stands for it; empty if none is named."""
    found = runtimes(config, section)
    default = config.get("plugins", {}).get(section, {}).get("containerd", {})
    names = ("runc", default.get("default_runtime_name"), *found)
    of_runc = (
        found[name]
        for name in names
        if isinstance(found.get(name), Mapping)
        and found[name].get("runtime_type", RUNC_TYPE) == RUNC_TYPE
    )
    return dict(next(of_runc, {}))


def merged(parts: list[Config]) -> Config:
    """Configurations over one another, the last on top, tables merged (containerd from 2.0 on)."""
    total: Config = {}
    for part in parts:
        _merge(total, part)
    return total


def _merge(into: Config, what: Mapping[str, Any]) -> None:
    for key, value in what.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = copy.deepcopy(value)


def _ours(handler: Handler, config: Mapping[str, Any], section: str) -> Config:
    """The tables that we add: handlers by name."""
    like = model(config, section)
    options = like.get("options", {})
    ours: Config = {
        "runtime_type": RUNC_TYPE,
        **{key: like[key] for key in _INHERITED if isinstance(like.get(key), str | bool)},
        "pod_annotations": list(handler.pod_annotations),
        "container_annotations": list(handler.container_annotations),
        "options": {
            "BinaryName": handler.binary,
            "SystemdCgroup": bool(options.get("SystemdCgroup", False)),
        },
    }
    if runtimes(config, section):
        return {handler.name: ours}
    # The default would be gone: see the module.
    return {
        "runc": {"runtime_type": RUNC_TYPE, "options": {"SystemdCgroup": False}},
        handler.name: ours,
    }


def _lines(section: str, tables: Config) -> str:
    lines = []
    for name, table in tables.items():
        head = f'plugins."{section}".containerd.runtimes.{name}'
        values = {k: v for k, v in table.items() if k != "options"}
        for place, pairs in ((head, values), (f"{head}.options", table["options"])):
            lines.append(f"[{place}]")
            # Strings, booleans and lists of strings are the same in JSON and in TOML.
            lines += [f"  {k} = {json.dumps(v, ensure_ascii=False)}" for k, v in pairs.items()]
    return "\n".join(lines) + "\n"


def _is_same(found: object, ours: Config) -> bool:
    """Whether a handler that somebody else wrote does what ours would."""
    if not isinstance(found, Mapping):
        return False
    lists = ("pod_annotations", "container_annotations")
    return found.get("options", {}).get("BinaryName") == ours["options"]["BinaryName"] and all(
        set(ours[key]) <= set(found.get(key, ())) for key in lists
    )


def _check(config: Config, version: object, handler: Handler, name: str) -> tuple[str, Config]:
    """The section, and what we add to it; nothing if it is there already."""
    section = plugin(version, name)
    disabled = {"cri", section} & set(config.get("disabled_plugins", ()))
    if disabled:
        raise ArchitectError(
            name,
            f"it disables the plugin {disabled.pop()}, so the kubelet cannot use this containerd",
            "remove it from disabled_plugins",
        )
    ours = _ours(handler, config, section)
    found = runtimes(config, section).get(handler.name)
    if found is None:
        return section, ours
    if _is_same(found, ours[handler.name]):
        return section, {}
    raise HandlerTaken(
        name,
        f"it has another runtime handler {quoted(handler.name)}",
        "remove that handler, or give it another name",
    )


def _verify(after: str, expected: Config, name: str) -> None:
    try:
        right = tomllib.loads(after) == expected
    except tomllib.TOMLDecodeError as error:
        raise ArchitectError(
            name,
            f"a table cannot be added at its end: {error}",
            'write its runtimes as tables of their own: [plugins."…".containerd.runtimes.runc]',
        ) from error
    if not right:
        raise ArchitectError(
            name, "adding a runtime would change other settings", "put architect's block at its end"
        )


def _with(config: Config, section: str, ours: Config) -> Config:
    return merged([config, {"plugins": {section: {"containerd": {"runtimes": ours}}}}])


def _placed(text: str, mark: Mark, body: str) -> str:
    """``body`` as our block: where the block is, else at the end."""
    span = mark.span(text)
    if span is not None:
        begin = mark.joined if text.startswith(mark.joined, span[0]) else mark.begin
        return text[: span[0]] + begin + body + mark.end + text[span[1] :]
    begin = mark.begin if not text or text.endswith("\n") else mark.joined
    return text + begin + body + mark.end


def with_handler(
    text: str,
    handler: Handler,
    mark: Mark,
    *,
    name: str,
    version: int | None = None,
    around: Config | None = None,
) -> str:
    """``text`` with our block; unchanged where the handler is there already.

    ``name`` is the file, for messages; ``version`` what an imported file without one has;
    ``around`` the configuration of all files but this one, where files are merged.
    Raises ArchitectError where nothing can be added, HandlerTaken where the name is.
    """
    own = without_block(text, mark)
    config = parse(own, name)
    body, expected = "", config
    if not config and version is None:
        version = _DEFAULT_VERSION
        body, expected = f"version = {version}\n", {"version": version}
    whole = merged([around or {}, config])
    section, ours = _check(whole, config.get("version", version or 1), handler, name)
    if not ours:
        return own
    after = _placed(text, mark, body + _lines(section, ours))
    _verify(after, _with(expected, section, ours), name)
    return after


def drop_in(handler: Handler, mark: Mark, *, around: Config, name: str) -> str | None:
    """A file of our own that the configuration ``around`` imports; None if it has the handler."""
    version = around.get("version")
    section, ours = _check(around, version, handler, name)
    if not ours:
        return None
    text = _placed("", mark, f"version = {version}\n" + _lines(section, ours))
    _verify(text, _with({"version": version}, section, ours), name)
    return text


BASE_TEMPLATE: Final = '{{ template "base" . }}\n\n'
"""What k3s and rke2 would render without a template of the administrator's."""


def with_handler_in_template(
    template: str | None, rendered: str, handler: Handler, mark: Mark, *, name: str
) -> str:
    """The template with our block, or a new one; ``rendered`` is what was made of it last.

    A Go template cannot be parsed, so what is checked is our block behind the rendered text.
    """
    own = without_block(rendered, mark)
    config = parse(own, name)
    section, ours = _check(config, config.get("version", 1), handler, name)
    if not ours:
        return "" if template is None else without_block(template, mark)
    lines = _lines(section, ours)
    _verify(_placed(own, mark, lines), _with(config, section, ours), name)
    # The base stays outside the block: both are rendered, and the block alone is ours there.
    return _placed(BASE_TEMPLATE if template is None else template, mark, lines)


def removed(text: str, mark: Mark, *, name: str, toml: bool = True) -> str:
    """``text`` without our block. ArchitectError where that would change what is not ours."""
    after = without_block(text, mark)
    span = mark.span(text)
    if not toml or span is None:
        return after
    before, left = parse(text, name), parse(after, name)
    ours = parse(text[span[0] : span[1]], name)
    if merged([left, ours]) != before:
        raise ArchitectError(
            name,
            "lines were added behind architect's block that belong to its last table",
            "move them to where they belong, then try again",
        )
    return after
