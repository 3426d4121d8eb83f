"""What the product does on the kernels its users run, in emulated stock Debian machines.

Each test that boots a guest says why it cannot where the tools for one are absent. The time-outs
are for a busy machine of two cores: a boot is twelve seconds on an idle one.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.guest import guest, payload
from tests.guest.guest import DEBIAN_12, DEBIAN_13, RELEASES, Guest, GuestError, Release

SMOKE_TIMEOUT_S = 600.0
"""For a boot and a few commands."""

PATH_TIMEOUT_S = 3000.0
"""For a whole path, some ten times slower than native."""

CORE_PATH = "PYTHONPATH=.:scripts exec python3 -m tests.guest.core_path"
"""Installs what the payload carries, and runs it; its exit status is the verdict."""

NODE_PATH = "PYTHONPATH=. exec python3 -m tests.guest.node_path"
"""The same for a node of a cluster."""

SMOKE = """
uname -r
stat --file-system --format %T /sys/fs/cgroup
cat /sys/fs/cgroup/cgroup.controllers
systemctl is-system-running --wait
cat /payload/greeting
echo to standard error >&2
mkdir -p /results/deep
printf 'left behind' >/results/deep/file
touch /payload/written 2>/dev/null && echo the payload is writable
exit 7
"""

boots = pytest.mark.guest
every_release = pytest.mark.parametrize("release", RELEASES.values(), ids=list(RELEASES))


@pytest.fixture(scope="session")
def _guests() -> None:
    """Let tests that boot a guest say why they cannot."""
    if reason := guest.missing():
        pytest.skip(reason)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    """Make a cache that borrows the user's images, to see what a run leaves in it."""
    borrowed = tmp_path / "cache"
    borrowed.mkdir()
    for release in RELEASES.values():
        home = guest.build(release).root.parent
        (borrowed / home.name).symlink_to(home)
    return borrowed


def _leftovers(cache: Path) -> list[str]:
    """Name what is in a cache beside images."""
    return [entry.name for entry in cache.iterdir() if not entry.is_symlink()]


def _processes(cache: Path) -> list[str]:
    """Name the processes that run on a cache's files."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            arguments = (process / "cmdline").read_bytes()
        except OSError:  # it has ended since
            continue
        if bytes(cache) in arguments:
            found.append(process.name)
    return found


@every_release
@boots
@pytest.mark.usefixtures("_guests")
def test_a_guest_boots_its_stock_kernel_and_hands_everything_back(
    release: Release, tmp_path: Path, cache: Path
) -> None:
    """The seam itself: kernel, cgroup v2, systemd, output, exit status, files; and no traces."""
    disk = tmp_path / "payload"
    disk.mkdir()
    (disk / "greeting").write_text("hello from the payload\n")
    image = guest.build(release).root
    before = image.stat()

    result = Guest(release, cache).run(disk, SMOKE, SMOKE_TIMEOUT_S)

    kernel, file_system, controllers, state, *rest = result.output.splitlines()
    assert kernel.startswith(f"{release.kernel}."), result.output
    assert "cloud-amd64" in kernel
    assert file_system == "cgroup2fs"
    assert {"cpu", "memory", "pids"} <= set(controllers.split())
    assert state == "running"
    assert rest == ["hello from the payload", "to standard error"]
    assert result.exit_code == 7
    assert result.files["deep/file"] == b"left behind"
    assert b"systemd" in result.files[".journal"]
    assert [entry.name for entry in disk.iterdir()] == ["greeting"]
    assert _leftovers(cache) == []
    assert (image.stat().st_mtime_ns, image.stat().st_blocks) == (
        before.st_mtime_ns,
        before.st_blocks,
    )


@boots
@pytest.mark.usefixtures("_guests")
def test_a_guest_past_its_deadline_is_killed(tmp_path: Path, cache: Path) -> None:
    """A hung guest ends at the deadline, whatever it is doing, and leaves no process and file."""
    disk = tmp_path / "payload"
    disk.mkdir()

    with pytest.raises(GuestError, match="within 5 s and was killed") as caught:
        Guest(DEBIAN_12, cache).run(disk, "exec sleep infinity", 5)

    assert "--- console" in str(caught.value)
    assert _leftovers(cache) == []
    assert _processes(cache) == []


@boots
@pytest.mark.usefixtures("_guests")
def test_a_panic_of_the_kernel_ends_the_run_with_the_console(tmp_path: Path, cache: Path) -> None:
    """A dead kernel does not wait for the deadline; the error has its and the command's words."""
    disk = tmp_path / "payload"
    disk.mkdir()
    command = """
    echo the last words
    python3 -c 'import termios; termios.tcdrain(1)'
    echo c >/proc/sysrq-trigger
    """

    with pytest.raises(GuestError, match="without an exit status") as caught:
        Guest(DEBIAN_13, cache).run(disk, command, SMOKE_TIMEOUT_S)

    assert "sysrq triggered crash" in str(caught.value)
    assert "the last words" in str(caught.value)
    assert _leftovers(cache) == []


@pytest.fixture(scope="session")
def built(_guests: None) -> Path:
    """Put the built checkout where the guests get it from."""
    return payload.build()


@every_release
@boots
@pytest.mark.slow
def test_the_core_path(release: Release, built: Path, tmp_path: Path) -> None:
    """On users' kernels an idle container vanishes, and comes back by all that wakes one.

    By a packet on an open connection, on a new one, by exec, and by what was sent while the daemon
    was dead; systemd starts and stops the daemon, Podman stops a sleeper, and uninstalling leaves
    nothing. The steps are in core_path.py, which says at which one it failed.
    """
    result = Guest(release).run(built, CORE_PATH, PATH_TIMEOUT_S)
    for name, content in result.files.items():
        (tmp_path / Path(name).name).write_bytes(content)
    assert result.exit_code == 0, f"{result.output}\nits logs are in {tmp_path}"


@pytest.fixture(scope="session")
def node(_guests: None) -> Path:
    """Put the components' image and what stands in for a kubelet where a guest gets it from."""
    return payload.build_node()


@boots
@pytest.mark.slow
def test_a_node_of_a_cluster(node: Path, tmp_path: Path) -> None:
    """Under containerd with systemd's cgroups a pod's container vanishes and comes back, through CRI.

    The pod of the chart's DaemonSet puts architect on the node and takes it off, systemd restarts
    containerd for it; limits that are lowered around a wake kill nothing. The steps are in
    node_path.py, which says at which one it failed.
    """
    result = Guest(DEBIAN_13).run(node, NODE_PATH, PATH_TIMEOUT_S)
    for name, content in result.files.items():
        (tmp_path / Path(name).name).write_bytes(content)
    assert result.exit_code == 0, f"{result.output}\nits logs are in {tmp_path}"


@pytest.mark.parametrize(
    ("lines", "site"),
    [
        ("Debian|Debian|http://mirror.test/debian", "http://mirror.test/debian"),
        (
            "Debian|Debian-Security|http://mirror.test/security\n"
            "Vendor|Vendor|https://vendor.test/apt\n"
            "Debian|Debian|http://mirror.test/debian\n"
            "Debian|Debian|http://second.test/debian",
            "http://mirror.test/debian",
        ),
        ("Debian|Debian|http://mirror.test/a|b", "http://mirror.test/a|b"),
    ],
)
def test_the_mirror_is_the_one_of_the_main_archive(lines: str, site: str) -> None:
    """Neither the security archive nor a vendor's repository can build a guest."""
    assert guest.debian_site(lines) == site


@pytest.mark.parametrize(
    "lines", ["", "||http://mirror.test/debian", "Ubuntu|Ubuntu|http://u.test"]
)
def test_without_a_debian_archive_the_error_names_the_remedy(lines: str) -> None:
    """Before the first apt-get update, apt knows its sources but not whose they are."""
    with pytest.raises(GuestError, match="apt-get update"):
        guest.debian_site(lines)


def test_a_changed_recipe_makes_another_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """What goes into an image is in its key; both releases have their own."""
    keys = {guest.recipe_key(release) for release in RELEASES.values()}
    assert len(keys) == 2
    monkeypatch.setattr(guest, "_PACKAGES", (*guest._PACKAGES, "another"))
    assert keys.isdisjoint({guest.recipe_key(release) for release in RELEASES.values()})


def test_clean_keeps_the_images_in_use(tmp_path: Path) -> None:
    """Older recipes' images and what killed runs left behind go, and nothing else."""
    kept = [f"{release.name}-{guest.recipe_key(release)}" for release in RELEASES.values()]
    for name in [*kept, "debian12-0123456789abcdef", "run-abc", "build-def"]:
        (tmp_path / name).mkdir()
    assert guest.clean(tmp_path) == ["build-def", "debian12-0123456789abcdef", "run-abc"]
    assert sorted(entry.name for entry in tmp_path.iterdir()) == sorted(kept)
