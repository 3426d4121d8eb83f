"""Which file is edited on the nodes of each distribution, and that all of it can be undone."""

import tomllib
from pathlib import Path

import pytest

from architect.adapters import hostfiles
from architect.adapters.hostfiles import Host
from architect.contract.errors import ArchitectError
from architect.decisions import distros
from architect.decisions import runtimeconfig as rc
from architect.processes.node.place import handler
from tests.unit import trees
from tests.unit.trees import CONFIG, K3S, NODES, RKE2

PREFIX = "/usr/local/lib/architect"
HANDLER = handler(PREFIX)
EDITED = {
    "eks-1.7": CONFIG,
    "eks-2": CONFIG,
    "eks-2-imports": "/etc/containerd/config.d/99-architect.toml",
    "gke": CONFIG,
    "k3s-1.7": f"{K3S}/config.toml.tmpl",
    "k3s-2": f"{K3S}/config-v3.toml.tmpl",
    "k3s-2-imports": f"{K3S}/config-v3.toml.d/99-architect.toml",
    "k3s-2-template": f"{K3S}/config-v3.toml.tmpl",
    "rke2": f"{RKE2}/config-v3.toml.tmpl",
    "kind-1.7": CONFIG,
    "kind-2": CONFIG,
    "kubeadm": CONFIG,
    "kubeadm-debian-12": CONFIG,
    "kubeadm-no-file": CONFIG,
    "kubeadm-empty-file": CONFIG,
    "kubeadm-v2-imports": "/etc/containerd/conf.d/nvidia.toml",
}
RUNC = {
    "k3s-1.7": "/var/lib/rancher/k3s/data/current/bin/runc",
    "k3s-2": "/var/lib/rancher/k3s/data/current/bin/runc",
    "k3s-2-imports": "/var/lib/rancher/k3s/data/current/bin/runc",
    "k3s-2-template": "/var/lib/rancher/k3s/data/current/bin/runc",
    "rke2": "/var/lib/rancher/rke2/bin/runc",
}


def node(name: str, root: Path) -> tuple[distros.Layout, Host]:
    distro, tree = NODES[name]
    trees.lay_out(tree, root)
    return distros.LAYOUTS[distro], Host(root)


def install(layout: distros.Layout, host: Host) -> distros.Edit:
    edit = distros.installation(layout, host, HANDLER)
    if edit.is_needed:
        hostfiles.edit_file(host.path(edit.path), edit.before, edit.after)
    return edit


def remove(layout: distros.Layout, host: Host) -> None:
    for edit in distros.removal(layout, host):
        assert hostfiles.unedit_file(host.path(edit.path), edit.after)


@pytest.mark.parametrize("name", NODES)
def test_a_node_is_known_by_its_files(name: str, tmp_path: Path) -> None:
    layout, host = node(name, tmp_path)
    assert distros.choose("auto", host) == layout
    assert distros.choose("gke", host).name == "gke"


def test_an_unknown_distribution_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ArchitectError, match=r'"bottlerocket": it is not known; use one of eks, gke'
    ):
        distros.choose("bottlerocket", Host(tmp_path))


@pytest.mark.parametrize("name", NODES)
def test_one_file_is_edited_once_and_comes_back(name: str, tmp_path: Path) -> None:
    layout, host = node(name, tmp_path)
    before = trees.contents(tmp_path)
    edit = install(layout, host)
    after = trees.contents(tmp_path)
    backup = edit.path + distros.BACKUP_SUFFIX
    existed = {backup} if edit.path in before else set()
    assert edit.path == EDITED[name]
    assert {n for n in after if after[n] != before.get(n)} == {edit.path} | existed
    assert not distros.installation(layout, host, HANDLER).is_needed
    remove(layout, host)
    assert trees.contents(tmp_path) == before
    assert distros.removal(layout, host) == []


@pytest.mark.parametrize("name", [n for n in NODES if NODES[n][0] not in ("k3s", "rke2")])
def test_containerd_then_has_the_handler(name: str, tmp_path: Path) -> None:
    layout, host = node(name, tmp_path)
    install(layout, host)
    config = distros.effective(layout, host)
    found = rc.runtimes(config, rc.plugin(config["version"], CONFIG))
    assert found[HANDLER.name]["options"]["BinaryName"] == f"{PREFIX}/libexec/runc-architect"
    assert "runc" in found


@pytest.mark.parametrize("name", [n for n in NODES if NODES[n][0] in ("k3s", "rke2")])
def test_what_is_rendered_from_the_template_has_the_handler(name: str, tmp_path: Path) -> None:
    layout, host = node(name, tmp_path)
    rendered = host.read(layout.config) or ""
    edit = install(layout, host)
    if edit.path.endswith(".tmpl"):
        again = (edit.after or "").replace('{{ template "base" . }}', rendered)
        trees.lay_out({layout.config: again}, tmp_path)
    config = distros.effective(layout, host)
    found = rc.runtimes(config, rc.plugin(config["version"], CONFIG))
    assert found[HANDLER.name]["options"]["SystemdCgroup"] is True
    assert found.keys() > {"runc"}
    # And what was rendered with it leads to no other edit.
    assert not distros.installation(layout, host, HANDLER).is_needed


@pytest.mark.parametrize("name", NODES)
def test_runc_is_linked_only_where_it_is_not_found(name: str, tmp_path: Path) -> None:
    layout, host = node(name, tmp_path)
    assert distros.runc_link(layout, host, "/nowhere:/usr/bin") == RUNC.get(name)


def test_the_runc_that_containerd_uses_is_linked(tmp_path: Path) -> None:
    layout, host = node("eks-2", tmp_path)
    trees.lay_out(
        {"/opt/runc/runc": "", CONFIG: trees.EKS_V3.replace("/usr/sbin", "/opt/runc")}, tmp_path
    )
    assert distros.runc_link(layout, host, "") == "/opt/runc/runc"
    trees.lay_out({CONFIG: trees.EKS_V3}, tmp_path)
    assert distros.runc_link(layout, host, "") is None
    (tmp_path / "usr/sbin/runc").unlink()
    trees.lay_out({CONFIG: trees.KIND_V3}, tmp_path)
    assert distros.runc_link(layout, host, "/nowhere:/opt/runc:/opt") == "/opt/runc/runc"


def test_the_drop_in_is_of_the_version_of_the_file_that_imports_it(tmp_path: Path) -> None:
    layout, host = node("eks-2-imports", tmp_path)
    text = install(layout, host).after
    assert tomllib.loads(text or "")["version"] == 3


def test_the_drop_in_follows_what_other_files_say(tmp_path: Path) -> None:
    """containerd 2 merges them all."""
    layout, host = node("eks-2-imports", tmp_path)
    table = "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]"
    other = f"version = 3\n{table}\nSystemdCgroup = false\n"
    trees.lay_out({"/etc/containerd/config.d/20-own.toml": other}, tmp_path)
    install(layout, host)
    found = rc.runtimes(distros.effective(layout, host), rc.PLUGINS[3])
    assert found["runc"]["options"]["SystemdCgroup"] is False
    assert found[HANDLER.name]["options"]["SystemdCgroup"] is False


def test_imports_of_version_2_are_not_used_for_a_file_of_ours(tmp_path: Path) -> None:
    """containerd 1.x would let it replace the whole section."""
    layout, host = node("kubeadm-v2-imports", tmp_path)
    (tmp_path / "etc/containerd/conf.d/nvidia.toml").unlink()
    assert install(layout, host).path == CONFIG


def test_an_administrators_edit_after_ours_is_kept(tmp_path: Path) -> None:
    layout, host = node("kubeadm", tmp_path)
    install(layout, host)
    path = host.path(CONFIG)
    path.write_text("# mine\n" + path.read_text())
    (edit,) = distros.removal(layout, host)
    assert not hostfiles.unedit_file(path, edit.after)
    assert path.read_text() == "# mine\n" + trees.KUBEADM
    assert hostfiles.backup_path(path).read_text() == trees.KUBEADM


def test_k3s_that_never_ran_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArchitectError, match="k3s has not written it yet; start k3s or k3s-agent"):
        distros.installation(distros.LAYOUTS["k3s"], Host(tmp_path), HANDLER)


def test_a_template_that_would_hide_another_one_is_not_written(tmp_path: Path) -> None:
    """k3s takes config-v3.toml.tmpl alone if it is there."""
    layout, host = node("k3s-2", tmp_path)
    trees.lay_out({f"{K3S}/config.toml.tmpl": "version = 2\n"}, tmp_path)
    with pytest.raises(ArchitectError, match="k3s has not rendered it"):
        distros.installation(layout, host, HANDLER)


def test_the_configuration_is_the_one_that_containerd_was_started_with() -> None:
    k3s, kubeadm = distros.LAYOUTS["k3s"], distros.LAYOUTS["kubeadm"]
    other = "/data/k3s/agent/etc/containerd/config.toml"
    assert k3s.at({CONFIG, other}).config == other
    assert k3s.at({CONFIG}) == k3s.at(set()) == k3s
    assert kubeadm.at({"/opt/containerd.toml"}).config == "/opt/containerd.toml"
    assert kubeadm.at({"/opt/containerd.toml", CONFIG}) == kubeadm
    assert kubeadm.at({"/opt/1.toml", "/opt/2.toml"}) == kubeadm


def test_the_socket_is_the_one_of_the_configuration(tmp_path: Path) -> None:
    layout, host = node("k3s-2", tmp_path)
    assert distros.socket(layout, host) == "/run/k3s/containerd/containerd.sock"
    server = '[plugins."io.containerd.server.v1.grpc"]\naddress = "/run/other.sock"\n'
    trees.lay_out({CONFIG: "version = 4\n" + server}, tmp_path)
    assert distros.socket(distros.LAYOUTS["eks"], host) == "/run/other.sock"
    trees.lay_out({CONFIG: trees.GKE}, tmp_path)
    assert distros.socket(distros.LAYOUTS["gke"], host) == "/run/containerd/containerd.sock"
