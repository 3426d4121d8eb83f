"""The cluster's parts that need no cluster: archives, mount tables, keys of builds, messages."""

import io
import json
import tarfile
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import build, cgroups, images, nodefiles, toolchain
from tests.cluster.base import ClusterError, put, run, until
from tests.cluster.node import Node
from tests.cluster.settings import Handler, Options, Programs

CONTROLLERS = frozenset({"cpu", "cpuacct", "memory", "pids"})


def archive(path: Path, **files: Any) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            data = json.dumps(content).encode()
            info = tarfile.TarInfo(name.replace("_json", ".json").replace("_", "-"))
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def test_a_docker_archives_names(tmp_path: Path) -> None:
    made = archive(tmp_path / "a.tar", manifest_json=[{"RepoTags": ["localhost/a:1", "b:2"]}])
    assert images.names(made) == ["localhost/a:1", "b:2"]


def test_an_oci_archives_names(tmp_path: Path) -> None:
    mark = {"annotations": {"io.containerd.image.name": "localhost/a:1"}}
    made = archive(
        tmp_path / "a.tar",
        oci_layout={"imageLayoutVersion": "1.0.0"},
        index_json={"manifests": [mark, {}]},
        manifest_json=[{"RepoTags": ["localhost/other:1"]}],
    )
    assert images.names(made) == ["localhost/a:1"]


def test_an_archive_without_a_name_is_refused(tmp_path: Path) -> None:
    reference = {"annotations": {"org.opencontainers.image.ref.name": "localhost/a:1"}}
    oci = archive(tmp_path / "a.tar", oci_layout={"v": 1}, index_json={"manifests": [reference]})
    docker = archive(tmp_path / "b.tar", manifest_json=[{"RepoTags": None}])
    for made in (oci, docker):
        with pytest.raises(ClusterError, match=r"no image with a name.*docker-archive"):
            images.names(made)


def test_a_file_that_is_no_archive_is_refused(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("no tar")
    for name in ("text", "missing"):
        with pytest.raises(ClusterError, match="is no image archive"):
            images.names(tmp_path / name)


def test_hierarchies_of_version_1() -> None:
    table = (
        "30 25 0:26 / /sys/fs/cgroup rw - tmpfs tmpfs rw\n"
        "31 30 0:27 / /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        "32 30 0:28 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n"
        "33 30 0:29 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n"
        "34 30 0:30 / /elsewhere/pids rw - cgroup cgroup rw,pids\n"
    )
    found = cgroups.parse(table, CONTROLLERS)
    assert [(one.folder.name, one.kind, one.options) for one in found] == [
        ("cpu,cpuacct", "cgroup", ("cpu", "cpuacct")),
        ("systemd", "cgroup", ("name=systemd",)),
        ("unified", "cgroup2", ()),
    ]
    assert not any(one.is_v2_alone for one in found)


def test_the_hierarchy_of_version_2() -> None:
    table = "30 25 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"
    (one,) = cgroups.parse(table, CONTROLLERS)
    assert one.is_v2_alone
    script = nodefiles.init_script("k8n1", Path("/a b"), [one], {}, [])
    assert "mount -t cgroup2 cgroup sys/fs/cgroup\n" in script
    assert "tmpfs sys/fs/cgroup" not in script
    assert "cd '/a b'\n" in script


def test_every_part_has_its_pinned_modules() -> None:
    parts = (*build.PARTS, build.METRICS_SERVER, build.OLD_CONTAINERD)
    for part in parts:
        assert (part.source / "go.sum").exists(), part.name
        assert part.key == part.key
    assert len({part.key for part in parts}) == len(parts)


def test_a_build_replaces_its_own_part_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, other = tmp_path / f"containerd-{'0' * 16}", tmp_path / f"containerd-1.7-{'1' * 16}"
    for path in (old, other):
        path.mkdir()
    monkeypatch.setattr(build, "_compile", lambda part, go, new: (new / "made").touch())
    containerd = next(part for part in build.PARTS if part.name == "containerd")
    made = build._part(containerd, tmp_path, [Path("go")])
    assert (made / "made").exists()
    assert {path.name for path in tmp_path.iterdir()} == {made.name, other.name}


def test_the_containerds_are_of_the_versions_that_they_are_there_for() -> None:
    containerd = next(part for part in build.PARTS if part.name == "containerd")
    assert containerd.required("github.com/containerd/containerd/v2").startswith("v2.1.")
    old = build.OLD_CONTAINERD.required("github.com/containerd/containerd")
    assert old.startswith("v1.7.")


def test_a_program_says_the_version_it_is_pinned_to() -> None:
    kubernetes = next(part for part in build.PARTS if part.name == "kubernetes")
    version = kubernetes.required("k8s.io/kubernetes")
    assert f"gitVersion={version}" in kubernetes.link_flags()
    with pytest.raises(ClusterError, match="does not require no/such"):
        kubernetes.required("no/such")


@pytest.mark.parametrize(
    ("said", "version"),
    [
        ("go version go1.26.8 linux/amd64", (1, 26)),
        ("go version go1.19.8 linux/amd64", (1, 19)),
        ("go version devel", (0, 0)),
    ],
)
def test_the_version_of_a_go(said: str, version: tuple[int, int]) -> None:
    assert toolchain.version(said) == version


def test_options_survive_their_file() -> None:
    given = Options(
        nodes=2,
        share=("/a",),
        handlers={"x": Handler("/b", ("c/*",))},
        dns=False,
        old_containerd=(2, 4),
    )
    assert Options.from_json(json.loads(json.dumps(given.as_json()))) == given
    assert Options.from_json({}) == Options()


def test_a_runtime_handler_is_in_containerds_configuration() -> None:
    text = nodefiles.containerd({"recorder": Handler("/usr/local/bin/r", ("a/*",))})
    assert 'BinaryName = "/usr/local/bin/r"' in text
    assert 'pod_annotations = ["a/*"]' in text
    assert text.count("SystemdCgroup = false") == 2


def test_both_containerds_have_the_same_settings() -> None:
    handlers = {"recorder": Handler("/usr/local/bin/r", ("a/*",), ("b/*",))}
    new = tomllib.loads(nodefiles.containerd(handlers))
    old = tomllib.loads(nodefiles.old_containerd(handlers))
    assert (new.pop("version"), old.pop("version")) == (3, 2)
    pods = new["plugins"].pop("io.containerd.cri.v1.runtime")
    images = new["plugins"].pop("io.containerd.cri.v1.images")
    both = old["plugins"].pop("io.containerd.grpc.v1.cri")
    assert new == old
    pods["cni"]["bin_dir"] = pods["cni"].pop("bin_dirs")[0]
    images["sandbox_image"] = images.pop("pinned_images")["sandbox"]
    assert both == {**pods, **images}


def test_a_node_has_the_containerd_that_the_options_say(tmp_path: Path) -> None:
    folders = {name: tmp_path / name for name in ("kubernetes", "runc", "cni", "helm")}
    programs = Programs(
        **folders,
        coredns=tmp_path,
        pause=tmp_path,
        containerd=tmp_path / "new",
        old_containerd=tmp_path / "old",
    )
    options = Options(old_containerd=(2,))
    found = [Node(tmp_path, number, options, programs).containerd for number in (1, 2, 3)]
    assert [path.name for path in found] == ["new", "old", "new"]
    unbuilt = Node(tmp_path, 2, options, replace(programs, old_containerd=None))
    with pytest.raises(ClusterError, match=r"k8n2's containerd 1\.7: was not built"):
        _ = unbuilt.containerd


def test_errors_say_what_why_and_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match=r"'false' ended|'false': ended with 1: it said nothing"):
        run("false")
    with pytest.raises(ClusterError, match=r"not done after 0\.1 s"):
        run("sleep", "9", timeout_s=0.1)
    with pytest.raises(ClusterError, match="scripts/setup"):
        run("no-such-program")
    with pytest.raises(ClusterError, match="no such file"):
        run("cat", stdin=tmp_path / "missing")
    with pytest.raises(ClusterError, match=r"waiting for rain: not so after 0 s \(it is dry\); go"):
        until("rain", lambda: False, 0.0, why=lambda: "it is dry", fix="go")


def test_a_file_is_written_whole(tmp_path: Path) -> None:
    put(tmp_path / "a/b", {"x": 1}, 0o600)
    assert json.loads((tmp_path / "a/b").read_text()) == {"x": 1}
    assert (tmp_path / "a/b").stat().st_mode & 0o777 == 0o600
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
