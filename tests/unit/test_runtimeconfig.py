"""Editing containerd's configuration as text: exactly ours is added, and nothing else changes."""

import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.errors import ArchitectError
from architect.decisions import runtimeconfig as rc
from architect.decisions.runtimeconfig import MACHINE, NODE, Handler
from tests.unit import trees

HANDLER = Handler(
    "runc-architect",
    "/usr/local/lib/architect/libexec/runc-architect",
    ("architect.loopholelabs.io/*",),
    ("io.kubernetes.container.*",),
)
FILES = {
    "eks 2": trees.EKS_V2,
    "eks 3": trees.EKS_V3,
    "gke": trees.GKE,
    "kind 2": trees.KIND_V2,
    "kind 3": trees.KIND_V3,
    "kubeadm": trees.KUBEADM,
    "debian": trees.DEBIAN_12,
    "v4": trees.EKS_V3.replace("version = 3", "version = 4"),
    "nothing": "",
    "comments": "# one\n\n# two",
    "CRLF": trees.EKS_V3.replace("\n", "\r\n"),
}


def add(text: str, handler: Handler = HANDLER) -> str:
    return rc.with_handler(text, handler, NODE, name="config.toml")


def runtimes_of(text: str) -> dict[str, Any]:
    config = tomllib.loads(text)
    return rc.runtimes(config, rc.PLUGINS[config["version"]])


def without_ours(text: str, before: str) -> dict[str, Any]:
    """What ``text`` says, less what is promised to be added to ``before``."""
    config = tomllib.loads(text)
    own = tomllib.loads(before)
    table = config["plugins"][rc.PLUGINS[config["version"]]]["containerd"]["runtimes"]
    del table[HANDLER.name]
    if "runtimes" not in str(own):
        assert table.pop("runc") == {
            "runtime_type": "io.containerd.runc.v2",
            "options": {"SystemdCgroup": False},
        }
    return config


def pruned(value: Any) -> Any:
    """Without empty tables, which naming a table deep inside makes."""
    if not isinstance(value, dict):
        return value
    inner = {k: pruned(v) for k, v in value.items()}
    return {k: v for k, v in inner.items() if v != {}}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_exactly_the_handler_is_added_and_taken_away_again(text: str) -> None:
    after = add(text)
    assert after.startswith(text)
    ours = runtimes_of(after)[HANDLER.name]
    assert ours["runtime_type"] == "io.containerd.runc.v2"
    assert ours["options"]["BinaryName"] == HANDLER.binary
    assert ours["pod_annotations"] == ["architect.loopholelabs.io/*"]
    assert ours["container_annotations"] == ["io.kubernetes.container.*"]
    left, own = pruned(without_ours(after, text)), pruned(tomllib.loads(text))
    assert left == (own or {"version": 2})
    assert add(after) == after
    assert rc.removed(after, NODE, name="config.toml") == text


@pytest.mark.parametrize(
    ("text", "systemd"),
    [(trees.EKS_V3, True), (trees.GKE, True), (trees.DEBIAN_12, False), ("", False)],
)
def test_the_cgroup_driver_is_that_of_runc(text: str, systemd: bool) -> None:
    assert runtimes_of(add(text))[HANDLER.name]["options"]["SystemdCgroup"] is systemd


def test_the_cgroup_driver_follows_a_default_runtime_of_another_name() -> None:
    text = trees.EKS_V3.replace("'runc'", "'nvidia'").replace("runtimes.runc", "runtimes.nvidia")
    assert runtimes_of(add(text))[HANDLER.name]["options"]["SystemdCgroup"] is True


def test_the_limits_that_a_distribution_gives_its_pods_are_kept() -> None:
    ours = runtimes_of(add(trees.EKS_V3))[HANDLER.name]
    assert ours["base_runtime_spec"] == "/etc/containerd/base-runtime-spec.json"


def test_runc_is_named_where_containerd_would_forget_its_default() -> None:
    assert set(runtimes_of(add(trees.DEBIAN_12))) == {"runc", HANDLER.name}
    assert set(runtimes_of(add(trees.KIND_V2))) == {"runc", "test-handler", HANDLER.name}


def test_a_changed_setting_changes_the_block_where_it_stands() -> None:
    once = add(trees.EKS_V3) + "# the administrator's last word\n"
    other = once.replace("SystemdCgroup = true\n\n", "SystemdCgroup = false\n\n")
    twice = add(other)
    assert twice.endswith("# END architect\n# the administrator's last word\n")
    assert runtimes_of(twice)[HANDLER.name]["options"]["SystemdCgroup"] is False
    assert add(twice) == twice


def test_tables_behind_the_block_stay() -> None:
    more = '[plugins."io.containerd.internal.v1.opt"]\npath = "/opt"\n'
    after = add(trees.EKS_V3) + more
    assert add(after) == after
    assert rc.removed(after, NODE, name="x") == trees.EKS_V3 + more


def test_lines_behind_the_block_that_would_move_to_another_table_are_noticed() -> None:
    after = add(trees.EKS_V3) + "NoPivotRoot = true\n"
    with pytest.raises(ArchitectError, match="belong to its last table"):
        rc.removed(after, NODE, name="x")
    with pytest.raises(ArchitectError, match="change other settings"):
        add(after)


def test_a_handler_that_is_there_already_is_enough() -> None:
    plain = add(trees.KIND_V3)
    theirs = plain.replace(NODE.begin, "").replace(NODE.end, "")
    assert add(theirs) == theirs
    with pytest.raises(rc.HandlerTaken, match=r"^config\.toml: it has another runtime handler"):
        add(theirs.replace(HANDLER.binary, "/usr/bin/other"))


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("version = 2\n[plugins", "no TOML"),
        ("root = '/x'\n", "version is 1"),
        ("version = 1\n", "version is 1"),
        ("version = 5\n", "version is 5"),
        ("version = '2'\n", "version is 2"),
        ("version = 2\ndisabled_plugins = ['cri']\n", "disables the plugin cri"),
        ("version = 2\n[plugins]\n'io.containerd.grpc.v1.cri' = {a = 1}\n", "cannot be added"),
        (f"version = 2\n{NODE.begin}[a]\n", "not the last"),
    ],
)
def test_what_cannot_be_added_to_is_refused(text: str, why: str) -> None:
    with pytest.raises(ArchitectError, match=why):
        add(text)


def test_blocks_of_two_installations_do_not_touch_each_other() -> None:
    other = Handler("other", "/usr/bin/other")
    both = rc.with_handler(add(trees.GKE), other, MACHINE, name="x")
    assert set(runtimes_of(both)) == {"runc", "other", HANDLER.name}
    assert rc.removed(both, NODE, name="x") != trees.GKE
    left = rc.removed(both, MACHINE, name="x")
    assert rc.removed(left, NODE, name="x") == trees.GKE


names = st.from_regex(r"[a-z][a-z0-9-]{0,8}", fullmatch=True)
scalars = st.one_of(
    st.integers(-5, 5).map(str), st.sampled_from(["true", "false", '"a b"', "'#'", "[1, 2]"])
)


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Text of a valid configuration with comments, odd spaces and line ends, or none at its end."""
    version = draw(st.sampled_from([2, 3, 4]))
    plugin = rc.PLUGINS[version]
    lines = [f"version = {version}"]
    for name in draw(st.lists(names.filter(lambda n: n != "version"), unique=True, max_size=3)):
        lines.append(f"x{name} = {draw(scalars)}")
    quote = draw(st.sampled_from(["'", '"']))
    head = f"plugins.{quote}{plugin}{quote}"
    blank = st.sampled_from(["", "# comment", "#END", "   ", "\t# x"])
    for name in draw(st.lists(names, unique=True, max_size=4)):
        lines.append(draw(blank))
        table = draw(st.sampled_from([f"{head}.containerd.runtimes", "other", f"{head}.cni"]))
        lines.append(f"{draw(st.sampled_from(['', '  ']))}[{table}.{name}]")
        keys = draw(st.lists(names, unique=True, max_size=3))
        lines += [f"  k{key} = {draw(scalars)}" for key in keys]
    end = draw(st.sampled_from(["\n", "\r\n"]))
    text = end.join(lines)
    return text + draw(st.sampled_from(["", end, end * 2]))


@given(configurations())
def test_any_configuration_comes_back_byte_by_byte(text: str) -> None:
    after = add(text)
    assert after.startswith(text)
    assert add(after) == after
    assert rc.removed(after, NODE, name="x") == text
    before = tomllib.loads(text)
    assert runtimes_of(after)[HANDLER.name]["options"]["BinaryName"] == HANDLER.binary
    left = tomllib.loads(after)
    table = left["plugins"][rc.PLUGINS[before["version"]]]["containerd"]["runtimes"]
    named = rc.runtimes(before, rc.PLUGINS[before["version"]])
    added = {HANDLER.name} if named else {HANDLER.name, "runc"}
    assert set(table) == set(named) | added
    for name in added:
        del table[name]
    assert pruned(left) == pruned(before)


@given(configurations(), st.text(max_size=30))
def test_a_template_gets_the_same_block(rendered: str, comment: str) -> None:
    template = '{{ template "base" . }}\n# ' + comment.replace("\n", " ").replace("\r", " ")
    after = rc.with_handler_in_template(template, rendered, HANDLER, NODE, name="x")
    assert after.startswith(template)
    assert rc.with_handler_in_template(after, rendered, HANDLER, NODE, name="x") == after
    assert rc.removed(after, NODE, name="x", toml=False) == template
    block = after[len(template) :]
    assert runtimes_of(rendered + block).keys() >= {HANDLER.name}
