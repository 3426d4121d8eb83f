"""What `make install` tells the engines and undoes again, and that the locked files are clean."""

import gzip
import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import engines
import image
import licences
from common import REPOSITORY, Failure
from record import Record

DEBIAN_12 = """version = 2

[plugins]
  [plugins."io.containerd.grpc.v1.cri"]
    [plugins."io.containerd.grpc.v1.cri".cni]
      bin_dir = "/usr/lib/cni"
      conf_dir = "/etc/cni/net.d"
  [plugins."io.containerd.internal.v1.opt"]
    path = "/var/lib/containerd"
"""
SYSTEMD = """version = 3
[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.runc.options]
  SystemdCgroup = true"""


def runtime_of(text: str, plugin: str) -> dict[str, object]:
    config = tomllib.loads(text)
    found: dict[str, object] = config["plugins"][plugin]["containerd"]["runtimes"]["runc-architect"]
    return found


@pytest.mark.parametrize(
    ("text", "plugin", "systemd"),
    [
        (DEBIAN_12, "io.containerd.grpc.v1.cri", False),
        (SYSTEMD, "io.containerd.cri.v1.runtime", True),
        ("version = 2", "io.containerd.grpc.v1.cri", False),
    ],
)
def test_containerd_gets_the_runtime_beside_its_own_settings(
    text: str, plugin: str, systemd: bool
) -> None:
    added = engines.with_containerd_runtime(text)

    assert added is not None
    assert added.startswith(text)
    runtime = runtime_of(added, plugin)
    assert runtime["pod_annotations"] == ["architect.loopholelabs.io/*"]
    assert runtime["options"] == {
        "BinaryName": "/usr/local/bin/runc-architect",
        "SystemdCgroup": systemd,
    }


def test_containerd_adding_twice_is_adding_once_and_removing_keeps_later_changes() -> None:
    once = engines.with_containerd_runtime(DEBIAN_12)
    assert once is not None
    assert engines.with_containerd_runtime(once) == once

    edited = once + "[debug]\n  level = 'debug'\n"
    assert engines.without_containerd_runtime(edited) == DEBIAN_12 + "[debug]\n  level = 'debug'\n"


def test_containerd_with_a_runtime_of_that_name_is_left_alone() -> None:
    table = 'plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc-architect'
    text = f"version = 2\n[{table}]\nruntime_type = 'own'\n"
    assert engines.with_containerd_runtime(text) is None


@pytest.mark.parametrize("text", ["", "version = 1\n", "version = = 2\n"])
def test_containerd_configurations_that_cannot_be_added_to_are_refused(text: str) -> None:
    with pytest.raises(Failure, match=re.escape("/etc/containerd/config.toml")):
        engines.with_containerd_runtime(text)


def test_podman_keeps_the_json_runtimes_that_it_had(tmp_path: Path) -> None:
    folder = tmp_path / "etc/containers/containers.conf.d"
    folder.mkdir(parents=True)
    (folder / "10-own.conf").write_text('[engine]\nruntime_supports_json = ["own"]\n')
    (folder / "50-architect.conf").write_text("[engine]\nruntime_supports_json = 'ours, skipped'\n")

    engine = tomllib.loads(engines.podman_runtime(tmp_path).decode())["engine"]

    assert {"crun", "runc", "own", "runc-architect"} <= set(engine["runtime_supports_json"])
    assert engine["runtimes"] == {"runc-architect": ["/usr/local/bin/runc-architect"]}


def tree(folder: Path) -> dict[str, tuple[int, bytes | str | None]]:
    """Every path below, with its mode and content, a link's target, or None for a folder."""
    found: dict[str, tuple[int, bytes | str | None]] = {}
    for path in sorted(folder.rglob("*")):
        content = str(path.readlink()) if path.is_symlink() else None
        data = path.read_bytes() if path.is_file() and content is None else content
        found[str(path.relative_to(folder))] = (path.lstat().st_mode, data)
    return found


def test_everything_that_was_changed_is_undone_byte_for_byte(tmp_path: Path) -> None:
    system = tmp_path / "system"
    (system / "etc/engine").mkdir(parents=True)
    kept = system / "etc/engine/config.toml"
    kept.write_bytes(b"version = 2\n\xff")
    kept.chmod(0o640)
    before = tree(system)
    where = tmp_path / "prefix/record.json"

    for version in (b"1", b"2"):  # an installation, then a newer one over it
        record = Record.load(where)
        record.write(kept, b"version = 2\nmore" + version)
        record.write(system / "etc/new/deep/drop-in.conf", version)
        record.link(system / "bin/program", Path("/elsewhere/program"))
    assert kept.read_bytes() == b"version = 2\nmore2"
    assert kept.stat().st_mode & 0o777 == 0o640

    record = Record.load(where)
    for name in list(record.files):
        record.undo_file(name)
    record.undo_links()
    record.undo_folders()
    assert tree(system) == before


def test_a_file_that_was_changed_since_loses_only_our_part(tmp_path: Path) -> None:
    record = Record.load(tmp_path / "prefix/record.json")
    path = tmp_path / "config.toml"
    path.write_bytes(b"theirs\n")
    record.write(path, b"theirs\nours\n")
    path.write_bytes(b"theirs\nours\nlater\n")

    with pytest.raises(Failure, match="by hand"):
        record.undo_file(str(path))
    record.undo_file(str(path), b"theirs\nlater\n")
    assert path.read_bytes() == b"theirs\nlater\n"


def test_a_file_that_was_changed_between_two_installations_goes_back_to_the_later(
    tmp_path: Path,
) -> None:
    record = Record.load(tmp_path / "prefix/record.json")
    path = tmp_path / "config.toml"
    path.write_bytes(b"first\n")
    record.write(path, b"first\nours\n", theirs=b"first\n")
    path.write_bytes(b"second\n")
    record.write(path, b"second\nours\n", theirs=b"second\n")

    record.undo_file(str(path))
    assert path.read_bytes() == b"second\n"


def test_a_file_of_someone_else_is_not_replaced_by_a_link(tmp_path: Path) -> None:
    (tmp_path / "program").write_text("theirs")
    record = Record.load(tmp_path / "prefix/record.json")
    with pytest.raises(Failure, match="not ours"):
        record.link(tmp_path / "program", Path("/elsewhere"))
    assert (tmp_path / "program").read_text() == "theirs"


def test_the_table_of_images_is_whole() -> None:
    recipes = image.recipes()
    assert recipes["valkey"].tag == "localhost/valkey:8"
    assert len({recipe.key for recipe in recipes.values()}) == len(recipes)
    for recipe in recipes.values():
        assert not set(recipe.packages) & set(recipe.leave_out)


@pytest.mark.parametrize("name", ["runtime", "dev"])
def test_locked_packages_have_a_version_and_a_hash_and_name_no_index(name: str) -> None:
    text = (REPOSITORY / f"requirements/{name}.txt").read_text()
    assert "://" not in text
    pinned = re.findall(r"^([a-z0-9._-]+)==\S+(?: ; [^\\]+)? \\\n    --hash=sha256:", text, re.M)
    named = [line for line in text.splitlines() if line[:1].isalnum()]
    assert len(pinned) == len(named) > 5


def package(root: Path, name: str, text: str) -> None:
    """Lay out a package's licence."""
    folder = root / "usr/share/doc" / name
    folder.mkdir(parents=True)
    (folder / "copyright").write_text(text)


def test_licences_come_with_the_texts_that_they_name(tmp_path: Path) -> None:
    root, into = tmp_path / "root", tmp_path / "share"
    package(root, "gcc-base", "see /usr/share/common-licenses/GPL-3.")
    (root / "usr/share/doc/libgcc").symlink_to("gcc-base")
    package(
        root,
        "crypto",
        "On Debian: /usr/share/common-licenses/Apache-2.0, and /usr/share/common-licenses/",
    )

    licences.copy(["libgcc", "crypto", "crypto"], root, into)

    found = [str(path.relative_to(into)) for path in into.rglob("*") if path.is_file()]
    assert sorted(found) == [
        "common-licenses/Apache-2.0.gz",
        "common-licenses/GPL-3.gz",
        "doc/crypto/copyright.gz",
        "doc/libgcc/copyright.gz",
    ]
    text = gzip.decompress((into / "common-licenses/GPL-3.gz").read_bytes())
    assert b"GNU GENERAL PUBLIC LICENSE" in text


def test_what_has_no_licence_is_not_handed_out(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="package libnone has no licence at"):
        licences.copy(["libnone"], tmp_path, tmp_path / "share")


def test_licences_of_all_that_the_linker_takes_are_there(tmp_path: Path) -> None:
    """It says itself which objects and archives it has opened."""
    programs = ("keeper", "runc-architect", "criu-hook", "health-check-proxy")
    words = ["make", "--silent", "-C", str(REPOSITORY / "native"), f"BUILD={tmp_path}"]
    words += ["LDFLAGS=-s -Wl,--trace", *(str(tmp_path / name) for name in programs)]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    said = [line for line in done.stdout.splitlines() if line.startswith("/usr/")]
    opened = {Path(name).resolve() for name in said if name.endswith((".a", ".o"))}
    names = {path.name for path in opened}
    assert {"libc.a", "libcrypto.a", "libnghttp2.a", "libssl.a"} <= names
    owners = subprocess.run(
        ["dpkg-query", "--search", *opened], capture_output=True, text=True, check=True
    )
    packages = {line.split(":")[0] for line in owners.stdout.splitlines()}
    assert {"libc6-dev", "libssl-dev", "musl-dev"} <= packages <= set(licences.linked())

    licences.of_programs(tmp_path / "share")
    texts = {path.parent.name for path in (tmp_path / "share/doc").glob("*/copyright.gz")}
    assert packages <= texts
    assert "Apache License" in (tmp_path / "share/doc/architect/LICENSE").read_text()
