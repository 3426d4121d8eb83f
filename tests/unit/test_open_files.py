"""Which of a container's files come along, and which open ones forbid a move; and that they are found."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from architect.adapters import openfiles
from architect.contract import oci
from architect.contract.annotations import ContainerSettings
from architect.decisions import files
from architect.decisions.files import (
    EmptyDir,
    Expected,
    Generation,
    Kind,
    OpenFile,
    Outlook,
    Volume,
)

POD = "/var/lib/kubelet/pods/0c7e"
VOLUMES = f"{POD}/volumes/kubernetes.io~"
STAYS = ContainerSettings("app", managed=True)
MOVES = ContainerSettings("app", managed=True, migrate_emptydir=True)


def _bind(point: str, source: str) -> oci.Mount:
    return oci.Mount(point, "bind", source, ("rbind", "rw"))


@pytest.mark.parametrize(
    ("mount", "expected"),
    [
        (oci.Mount("/proc", "proc", "proc", ()), Volume("/proc", Kind.KERNEL, "/proc", "")),
        (oci.Mount("/dev", "tmpfs", "tmpfs", ()), Volume("/dev", Kind.KERNEL, "/dev", "")),
        (oci.Mount("/run", "tmpfs", "tmpfs", ()), Volume("/run", Kind.MEMORY, "/run", "")),
        (
            _bind("/dev/shm", "/run/containerd/sandboxes/1/shm"),
            Volume("/dev/shm", Kind.MEMORY, "/dev/shm", "/run/containerd/sandboxes/1/shm"),
        ),
        # Of a pod with hostIPC.
        (_bind("/dev/shm", "/dev/shm"), Volume("/dev/shm", Kind.HOST, "", "/dev/shm")),
        (
            _bind("/c", f"{VOLUMES}empty-dir/cache"),
            Volume("/c", Kind.EMPTY_DIR, "cache", f"{VOLUMES}empty-dir/cache"),
        ),
        (
            _bind("/g", f"{VOLUMES}git-repo/sources"),
            Volume("/g", Kind.EMPTY_DIR, "sources", f"{VOLUMES}git-repo/sources"),
        ),
        (
            _bind("/dev/shm", f"{VOLUMES}empty-dir/shm"),
            Volume("/dev/shm", Kind.EMPTY_DIR, "shm", f"{VOLUMES}empty-dir/shm"),
        ),
        (
            _bind("/c", f"{POD}/volume-subpaths/cache/app/0"),
            Volume("/c", Kind.EMPTY_DIR, "cache", f"{VOLUMES}empty-dir/cache", part=True),
        ),
        (
            _bind("/e/f", f"{POD}/volume-subpaths/config/app/1"),
            Volume(
                "/e/f", Kind.CONTENT, "config", f"{POD}/volume-subpaths/config/app/1", part=True
            ),
        ),
        *[
            (
                _bind("/v", f"{VOLUMES}{plugin}/v"),
                Volume("/v", Kind.CONTENT, "v", f"{VOLUMES}{plugin}/v"),
            )
            for plugin in ("configmap", "secret", "projected", "downward-api")
        ],
        *[
            (
                _bind("/v", f"{VOLUMES}{plugin}/pv-1/mount"),
                Volume("/v", Kind.CLAIM, "pv-1", f"{VOLUMES}{plugin}/pv-1/mount"),
            )
            for plugin in ("csi", "nfs", "local-volume", "iscsi")
        ],
        (
            _bind("/etc/hosts", f"{POD}/etc-hosts"),
            Volume("/etc/hosts", Kind.POD, "", f"{POD}/etc-hosts"),
        ),
        (
            _bind("/dev/termination-log", f"{POD}/containers/app/1f"),
            Volume("/dev/termination-log", Kind.LOG, "", f"{POD}/containers/app/1f"),
        ),
        (_bind("/h", "/srv/data"), Volume("/h", Kind.HOST, "", "/srv/data")),
    ],
)
def test_each_mount_is_known_by_its_source(mount: oci.Mount, expected: Volume) -> None:
    plugins = {"cache": "empty-dir", "config": "configmap"}
    assert files.volumes([mount], plugins) == [expected]


def test_an_empty_dir_comes_along_if_asked_for_and_memory_always() -> None:
    mounts = [
        Volume("/dev/shm", Kind.MEMORY, "/dev/shm", "/run/shm"),
        Volume("/c", Kind.EMPTY_DIR, "cache", "/k/cache"),
        Volume("/c2", Kind.EMPTY_DIR, "cache", "/k/cache"),
        Volume("/h", Kind.HOST, "", "/srv"),
        Volume("/p", Kind.CLAIM, "pv-1", "/k/pv-1"),
    ]
    shm = EmptyDir("/dev/shm", "/run/shm", "/dev/shm")
    assert files.carried(mounts, STAYS) == [shm]
    assert files.carried(mounts, MOVES) == [shm, EmptyDir("cache", "/k/cache", "/c")]


def test_sparse_files_of_a_directory_are_told_by_its_mount_point() -> None:
    settings = ContainerSettings("app", sparse_files=("/cache/a/b", "/cached", "/cache"))
    assert files.sparse_in(EmptyDir("cache", "/k/cache", "/cache"), settings) == ["a/b"]


def _file(path: str, point: str, **more: bool) -> OpenFile:
    return OpenFile(path, point, "descriptor 3 of process 7 (server)", 5, **more)


def _folder(path: str, point: str) -> OpenFile:
    return OpenFile(path, point, "cwd of process 7 (server)")


MOUNTS = [
    Volume("/proc", Kind.KERNEL, "/proc", ""),
    Volume("/dev/shm", Kind.MEMORY, "/dev/shm", "/run/shm"),
    Volume("/cache", Kind.EMPTY_DIR, "cache", f"{VOLUMES}empty-dir/cache"),
    Volume("/config", Kind.CONTENT, "config", f"{VOLUMES}configmap/config"),
    Volume("/one", Kind.CONTENT, "config", f"{POD}/volume-subpaths/config/app/0", part=True),
    Volume("/data", Kind.CLAIM, "pv-1", f"{VOLUMES}csi/pv-1/mount"),
    Volume("/etc/hosts", Kind.POD, "", f"{POD}/etc-hosts"),
    Volume("/dev/termination-log", Kind.LOG, "", f"{POD}/containers/app/1f"),
    Volume("/host", Kind.HOST, "", "/srv/data"),
]
GENERATION = "..2026_11_23_07_12_01.1234"


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (_file("/var/x", "/", writable=True, deleted=True), Outlook()),
        (_file("/proc/7/status", "/proc"), Outlook()),
        (_file("/dev/shm/x", "/dev/shm", writable=True), Outlook()),
        (_file("/own/x", "/own", writable=True), Outlook()),
        (_folder("/cache", "/cache"), Outlook()),
        (
            _file(f"/config/{GENERATION}/a/b", "/config"),
            Outlook(generations=(Generation("/config", GENERATION),)),
        ),
        (
            _folder(f"/config/{GENERATION}", "/config"),
            Outlook(generations=(Generation("/config", GENERATION),)),
        ),
        (_folder("/config", "/config"), Outlook()),
        (_file("/config/odd", "/config"), Outlook()),
        (_file("/one", "/one"), Outlook(expected=(Expected("/one", 5, content=True),))),
        # It grows until it is frozen.
        (_file("/data/x", "/data", writable=True), Outlook(expected=(Expected("/data/x"),))),
        (_file("/data/x", "/data", writable=True, deleted=True), Outlook()),
        (_file("/etc/hosts", "/etc/hosts"), Outlook(expected=(Expected("/etc/hosts", 5),))),
        (_file("/etc/hosts", "/etc/hosts", writable=True, appended=True), Outlook()),
        (
            _file("/dev/termination-log", "/dev/termination-log", writable=True),
            Outlook(rewritten=("/dev/termination-log",)),
        ),
        (_file("/host/x", "/host"), Outlook(expected=(Expected("/host/x", 5, content=True),))),
        (_folder("/host", "/host"), Outlook(expected=(Expected("/host"),))),
    ],
)
def test_what_is_there_at_the_destination_too(one: OpenFile, expected: Outlook) -> None:
    assert files.outlook([one, one], MOUNTS, STAYS) == expected
    assert expected.ok


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (
            _file("/cache/x", "/cache"),
            "/cache/x (descriptor 3 of process 7 (server)) of container app is in the emptyDir volume"
            " cache, which does not move: list the container in the annotation"
            " architect.loopholelabs.io/migrate-emptydir-containers",
        ),
        (
            _folder("/cache/sub", "/cache"),
            "/cache/sub (cwd of process 7 (server)) of container app is in the emptyDir volume"
            " cache, which does not move: list the container in the annotation"
            " architect.loopholelabs.io/migrate-emptydir-containers",
        ),
        (
            _file("/host/x", "/host", writable=True),
            "/host/x (descriptor 3 of process 7 (server)) of container app is in /srv/data of the node"
            " (hostPath) and open for writing: use an emptyDir volume or a persistent one",
        ),
        (
            _file(f"/config/{GENERATION}/x", "/config", deleted=True),
            f"/config/{GENERATION}/x (descriptor 3 of process 7 (server)) of container app is in the"
            " volume config and deleted, as that was updated: the container has to open it again",
        ),
    ],
)
def test_what_forbids_a_move_is_named(one: OpenFile, reason: str) -> None:
    found = files.outlook([one, one], MOUNTS, STAYS)
    assert found == Outlook(reasons=(reason,))
    assert not found.ok


def test_an_empty_dir_that_moves_forbids_nothing() -> None:
    assert files.outlook([_file("/cache/x", "/cache")], MOUNTS, MOVES) == Outlook()


# And that they are found


_PROGRAM = """
import mmap, os, sys
root = sys.argv[1]
os.chdir(root + "/volume/folder")
kept = [open(root + "/volume/read"), open(root + "/volume/log", "ab"), open(root + "/volume/both", "r+")]
kept += [open(root + "/volume/gone", "wb"), open(root + "/volume/odd (deleted)"), os.pipe()]
kept += [open(root + "/volume/both"), open(root + "/volume/both", "a+")]
kept += [os.memfd_create("memory"), open("/dev/zero"), os.open(root + "/plain", os.O_DIRECTORY)]
os.unlink(root + "/volume/gone")
with open(root + "/volume/mapped", "rb") as file:
    kept.append(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))
# The mmap object keeps a descriptor of its own.
for number in range(3, 32):
    if os.path.realpath(f"/proc/self/fd/{number}").endswith("/mapped"):
        os.close(number)
kept.append(mmap.mmap(-1, 4096))
print(flush=True)
sys.stdin.read()
"""


@pytest.fixture
def program(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process in a mount namespace with a tmpfs in tmp_path/volume."""
    script = f"""
cd {tmp_path}
mkdir volume plain
mount -t tmpfs none volume
mkdir volume/folder
for name in read log both mapped 'odd (deleted)'; do echo text > "volume/$name"; done
exec {sys.executable} -I -c '{_PROGRAM}' {tmp_path}
"""
    with subprocess.Popen(
        ["unshare", "--mount", "sh", "-ec", script],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        assert process.stdout
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="mounts file systems")
def test_open_files_are_found_with_their_mounts(
    program: subprocess.Popen[str], tmp_path: Path
) -> None:
    volume = f"{tmp_path}/volume"
    all_found = [
        one._replace(use=one.use.partition(f" {program.pid} ")[0])
        for one in openfiles.read([program.pid, 0])
        # Its interpreter and libraries.
        if not one.path.startswith(("/usr/", "/lib"))
    ]
    found = {one.path: one for one in all_found}
    number = "descriptor {} of process".format

    assert set(found) == {
        "/",
        f"{tmp_path}/plain",
        *(f"{volume}/{name}" for name in ("read", "log", "both", "gone", "folder", "mapped")),
        f"{volume}/odd (deleted)",
    }
    assert found[f"{volume}/read"] == OpenFile(f"{volume}/read", volume, number(3), 5)
    assert found[f"{volume}/log"] == OpenFile(
        f"{volume}/log", volume, number(4), 5, writable=True, appended=True
    )
    ways = {(one.writable, one.appended) for one in all_found if one.path == f"{volume}/both"}
    assert ways == {(True, False), (False, False)}
    gone = found[f"{volume}/gone"]
    assert (gone.deleted, gone.writable, gone.appended) == (True, True, False)
    assert not found[f"{volume}/odd (deleted)"].deleted
    assert found[f"{volume}/folder"] == OpenFile(f"{volume}/folder", volume, "cwd of process")
    assert found[f"{volume}/mapped"] == OpenFile(f"{volume}/mapped", volume, "mapped by process", 5)
    assert found[f"{tmp_path}/plain"].point == "/"


def test_what_must_be_the_same_is_compared(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for root in (source, target):
        (root / "etc").mkdir(parents=True)
        (root / "link").symlink_to("/etc")
        for name in ("same", "size", "bytes", "absent", "kind"):
            (root / "etc" / name).write_text("text")
    (target / "etc/size").write_text("longer")
    (target / "etc/bytes").write_text("TEXT")
    (target / "etc/absent").unlink()
    (target / "etc/kind").unlink()
    os.mkfifo(target / "etc/kind")
    names = ("same", "size", "bytes", "absent", "kind")
    expected = [Expected(f"/link/{name}", 4, content=True) for name in names]
    expected += [Expected("/etc"), Expected("/nowhere")]

    known = openfiles.digests(source, expected)

    assert openfiles.missing(source, expected[:-1], known) == []
    assert openfiles.missing(target, expected, known) == [
        "/link/size has 6 bytes here and 4 at the source",
        "/link/bytes has another content here than at the source",
        "/link/absent cannot be opened here: No such file or directory",
        "/link/kind is no file here",
        "/nowhere cannot be opened here: No such file or directory",
    ]


def test_a_generation_is_carried_over_beside_the_destinations_own(tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    for root, generation in ((source, "..1"), (target, "..2")):
        (root / generation).mkdir(parents=True)
        (root / generation / "key").write_text(f"value of {generation}")
        (root / "..data").symlink_to(generation)
    one = Generation("/config", "..1")

    openfiles.carry(one, source, tmp_path / "archive")
    openfiles.bring(one, tmp_path / "archive", target)
    openfiles.bring(one, tmp_path / "archive", target)

    assert (target / "..1/key").read_text() == "value of ..1"
    assert (target / "..data/key").read_text() == "value of ..2"


def test_volumes_are_told_by_the_pods_directory(tmp_path: Path) -> None:
    volumes = tmp_path / "pods/0c7e/volumes"
    for name in ("empty-dir/cache", "configmap/config"):
        (volumes / f"kubernetes.io~{name}").mkdir(parents=True)
    mounts = [_bind("/c", f"{tmp_path}/pods/0c7e/volume-subpaths/cache/app/0"), _bind("/h", "/srv")]
    assert openfiles.plugins(mounts) == {"cache": "empty-dir", "config": "configmap"}


def test_mount_points_are_those_of_the_kernel(tmp_path: Path) -> None:
    (tmp_path / "run/secrets").mkdir(parents=True)
    (tmp_path / "var").mkdir()
    (tmp_path / "var/run").symlink_to("/run")
    mounts = openfiles.settled([_bind("/var/run/secrets", "/s"), _bind("/none", "/n")], tmp_path)
    assert [mount.destination for mount in mounts] == ["/run/secrets", "/none"]
