"""Stock Debian machines, emulated, to run what this machine's own kernel cannot show.

Users' nodes run Debian 12 (kernel 6.1) or Debian 13 (kernel 6.12) with cgroup v2 and systemd. This
module builds a root file system of either with mmdebstrap, keeps it in a cache, and boots it under
qemu's software emulation with a second disk, the payload, whose command runs as a systemd service.
Called by the tests beside it and by hand: ``python -m tests.guest.guest run debian13 DIR CMD``.

Emulated code runs some ten times slower than native: a guest answers whether something works on
users' kernels and never how fast.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from types import MappingProxyType
from typing import Final

MEMORY_MB: Final = 3072
"""The guest's memory: room for a container of some hundred MB, its images and the page cache."""

CPUS: Final = 2
"""The guest's virtual CPUs: two, as races between processors are part of what is tested."""

ROOT_GB: Final = 4
"""Size of the root file system; the file is sparse, so that only what is written takes space."""

RESULTS_MB: Final = 256
"""Size of the disk that carries /results back, and so the limit of what a payload may leave."""

_KEYRING: Final = "/usr/share/keyrings/debian-archive-keyring.gpg"

_TOOLS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "mmdebstrap": "mmdebstrap",
        "mkfs.ext4": "e2fsprogs",
        "debugfs": "e2fsprogs",
        "qemu-img": "qemu-utils",
        "qemu-system-x86_64": "qemu-system-x86",
        "setpriv": "util-linux",
        "apt-get": "apt",
    }
)
"""Each program used here and the Debian package that has it."""

_CPU: Final = "max,la57=off,cx16=off"
"""The emulated processor.

Without five-level page tables every TLB miss walks one level less. With parallel processors
qemu 7.2 corrupts the flags after cmpxchg16b, of which the 6.12 kernel's allocator died by a double
fault in two boots of three; with the instruction hidden the kernel uses its own replacement.
"""

_ACCEL: Final = "tcg,thread=single,tb-size=512"
"""Software emulation, never KVM; the processors take turns on one thread.

With a thread for each, a processor can execute a breakpoint that another has already patched out
of the kernel's code, which is a panic: once in some twenty boots here. Taking turns costs a fifth.
"""

_KERNEL_ARGUMENTS: Final = (
    "console=ttyS0 root=/dev/nvme0n1 rw rootfstype=ext4 quiet loglevel=4 panic=-1 "
    "mitigations=off nokaslr fsck.mode=skip systemd.show_status=false"
)
"""panic=-1 reboots at once, which -no-reboot turns into the end of qemu: no wait for a deadline."""

_PACKAGES: Final = (
    "linux-image-cloud-amd64",
    "systemd-sysv",
    "dbus",
    "podman",
    "runc",
    "conmon",
    "netavark",
    "aardvark-dns",
    "catatonit",
    "iptables",
    "nftables",
    "iproute2",
    "libbpf1",
    "python3",
    "python3-venv",
    "procps",
    "kmod",
    "tar",
    "busybox-static",
)

_MASKED_UNITS: Final = (
    "apparmor.service",
    "apt-daily.timer",
    "apt-daily-upgrade.timer",
    "dpkg-db-backup.timer",
    "e2scrub_all.timer",
    "e2scrub_reap.service",
    "fstrim.timer",
    "getty.target",
    "ldconfig.service",
    "modprobe@drm.service",
    "modprobe@efi_pstore.service",
    "netavark-dhcp-proxy.socket",
    "netavark-dhcp-proxy.service",
    "podman.socket",
    "podman.service",
    "podman-auto-update.service",
    "podman-auto-update.timer",
    "podman-restart.service",
    "systemd-binfmt.service",
    "systemd-journal-catalog-update.service",
    "systemd-logind.service",
    "systemd-random-seed.service",
    "systemd-sysusers.service",
    "systemd-timesyncd.service",
    "systemd-udev-trigger.service",
    "systemd-update-utmp.service",
    "systemd-user-sessions.service",
)
"""Units no payload needs, each of which costs up to seconds of an emulated boot.

udevd itself runs, as on users' nodes, and names what appears later; only its replay of what the
kernel found at boot, five seconds long, is left out. AppArmor's profiles for a machine's programs
are left out as well, ten seconds long; the engines load those of their containers by themselves.
"""

_DISABLED_UNITS: Final = ("containerd.service",)
"""Units that a payload starts if it needs them."""

_RUNNER: Final = """\
#!/bin/sh
# Started by payload.service: runs the payload's command once, hands back what it left, powers off.
disk() {
    for block in /sys/block/vd*; do
        [ "$(cat "$block/serial")" = "$1" ] && echo "/dev/${block##*/}" && return
    done
    echo "payload-runner: no disk named $1" >&2
    systemctl poweroff --force --force
}
modprobe --all virtio_pci virtio_blk
mkdir -p /results
mount -o ro "$(disk payload)" /payload || systemctl poweroff --force --force
stty -F /dev/ttyS1 raw
cut -d ' ' -f 1 /proc/uptime >/results/.boot_s
# Podman leaves conmon in the caller's cgroup when this is set; users mostly run it from a shell.
unset INVOCATION_ID
cd /payload
sh /payload/.command </dev/null >/dev/ttyS1 2>&1
code=$?
[ "$code" = 0 ] || journalctl -b -n 200 -o short-monotonic --no-pager >/results/.journal
echo "$code" >/results/.exit_code
tar -C /results -cf "$(disk results)" .
sync
systemctl poweroff --force --force
"""

_UNIT: Final = """\
[Unit]
Description=Command of the payload disk
After=basic.target

[Service]
Type=exec
ExecStart=/usr/local/sbin/payload-runner
Environment=HOME=/root LANG=C.UTF-8 SYSTEMD_COLORS=0
Environment=PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
StandardOutput=journal+console
KillMode=process

[Install]
WantedBy=multi-user.target
"""

_TREE_FILES: Final[Mapping[str, str]] = MappingProxyType(
    {
        "etc/hostname": "guest\n",
        "etc/hosts": "127.0.0.1 localhost guest\n::1 localhost\n",
        "etc/machine-id": "5a1f6d3c0c1e4b7f9d2a8e6b4c3d2f1e\n",
        "etc/fstab": "",
        "etc/systemd/journald.conf.d/guest.conf": "[Journal]\nStorage=volatile\n",
        "etc/systemd/system.conf.d/guest.conf": (
            "[Manager]\nDefaultTimeoutStartSec=600\nDefaultTimeoutStopSec=600\n"
            "DefaultDeviceTimeoutSec=600\n"
        ),
        "etc/systemd/system/payload.service": _UNIT,
        "usr/local/sbin/payload-runner": _RUNNER,
    }
)
"""What is written over the packages' files; a fixed machine-id keeps every boot from being first.

The time-outs are systemd's own default of 90 s times the slowness of emulation.
"""


class GuestError(Exception):
    """The guest could not be built or did not finish its command; the message says how it ended."""


@dataclasses.dataclass(frozen=True, slots=True)
class Release:
    """One Debian release as it is built and booted here."""

    name: str
    """How callers call it, as ``debian13``."""

    suite: str
    """Its name in the archive, as ``trixie``."""

    kernel: str
    """The series of its stock kernel, as ``6.12``: how ``uname -r`` begins."""

    packages: tuple[str, ...] = ()
    """What it has beyond what both have."""


DEBIAN_12: Final = Release("debian12", "bookworm", "6.1")
DEBIAN_13: Final = Release(
    "debian13", "trixie", "6.12", ("apparmor", "containerd", "containernetworking-plugins")
)
RELEASES: Final[Mapping[str, Release]] = MappingProxyType(
    {release.name: release for release in (DEBIAN_12, DEBIAN_13)}
)


@dataclasses.dataclass(frozen=True, slots=True)
class Image:
    """A built guest in the cache; both files are only ever read."""

    root: Path
    """Raw ext4 file system, a sparse file."""

    kernel: Path
    """The release's stock kernel (bzImage); NVMe and ext4 are built in, so no initrd is needed."""


@dataclasses.dataclass(frozen=True, slots=True)
class GuestResult:
    """What a finished guest handed back."""

    exit_code: int
    """The command's exit status, as the shell reports it."""

    output: str
    """Standard output and error of the command, in the order written."""

    files: Mapping[str, bytes]
    """What the command left in /results, by path below it; after a failure also ``.journal``."""

    boot_s: float
    """Seconds from the start of the guest's kernel to the start of the command."""

    wall_s: float
    """Seconds from the start of qemu to its end."""


def missing() -> str | None:
    """Say why no guest can run on this machine, or None when one can.

    For tests that must say why they do not run. Building needs root, for mmdebstrap to make device
    files and to keep owners; booting does not.
    """
    absent = sorted({package for tool, package in _TOOLS.items() if shutil.which(tool) is None})
    if absent:
        return f"guests need the packages {' '.join(absent)}"
    if os.geteuid() != 0:
        return "guests are built as root: mmdebstrap keeps owners and makes device files"
    if not Path(_KEYRING).exists():
        return "guests need the package debian-archive-keyring"
    return None


def cache_directory() -> Path:
    """Where images are kept: ``$XDG_CACHE_HOME/architect/guest``, by default below ~/.cache."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "architect" / "guest"


def recipe_key(release: Release) -> str:
    """Name the content an image is built from: equal recipes have equal keys, 16 hex digits.

    The archive's state is no part of it: a cached image keeps the packages it was built with.
    """
    recipe = [
        dataclasses.astuple(release),
        _PACKAGES,
        _MASKED_UNITS,
        _DISABLED_UNITS,
        dict(_TREE_FILES),
        ROOT_GB,
    ]
    return hashlib.sha256(json.dumps(recipe, sort_keys=True).encode()).hexdigest()[:16]


def debian_site(index_targets: str) -> str:
    """Pick the mirror of the main Debian archive out of ``ORIGIN|LABEL|SITE`` lines.

    The lines are those of ``apt-get indextargets --format '$(ORIGIN)|$(LABEL)|$(SITE)'``
    (apt-get(8)): the guests come from wherever this machine's own packages come from.

    Raises:
        GuestError: apt knows no Debian archive, or its lists were never fetched.
    """
    for line in index_targets.splitlines():
        origin, label, site = line.split("|", 2)
        if (origin, label) == ("Debian", "Debian"):
            return site
    raise GuestError(
        "apt's lists name no Debian archive to build a guest from: is this Debian, "
        "and was `apt-get update` run?"
    )


def _call(argv: Sequence[str], **options: str) -> str:
    """Run one tool to its end and return its standard output.

    Raises:
        GuestError: it failed; the message ends with the last lines of its standard error.
    """
    environment = {**os.environ, "LC_ALL": "C", **options}
    done = subprocess.run(argv, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise GuestError(
            f"{argv[0]} failed with status {done.returncode}:\n{_tail(done.stderr or done.stdout)}"
        )
    return done.stdout


def _tail(text: str, lines: int = 120) -> str:
    """Return the last lines of a log, free of the control characters consoles are full of."""
    kept = "".join(c for c in text if c.isprintable() or c in "\n\t")
    return "\n".join(kept.splitlines()[-lines:])


@contextmanager
def _scratch(cache: Path, purpose: str) -> Iterator[Path]:
    """Make a directory that is gone afterwards, beside the images: /tmp may be memory."""
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f"{purpose}-", dir=cache) as name:
        yield Path(name)


def _configure(tree: Path) -> None:
    """Turn a freshly unpacked tree into one that boots fast and runs the payload's command."""
    for name, text in _TREE_FILES.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (tree / "usr/local/sbin/payload-runner").chmod(0o755)
    (tree / "payload").mkdir()
    units = tree / "etc/systemd/system"
    for unit in _MASKED_UNITS:
        (units / unit).unlink(missing_ok=True)
        (units / unit).symlink_to("/dev/null")
    (units / "default.target").unlink(missing_ok=True)
    (units / "default.target").symlink_to("/usr/lib/systemd/system/multi-user.target")
    wants = units / "multi-user.target.wants"
    wants.mkdir(exist_ok=True)
    for unit in _DISABLED_UNITS:
        (wants / unit).unlink(missing_ok=True)
    (wants / "payload.service").symlink_to("../payload.service")


def build(release: Release, cache: Path | None = None) -> Image:
    """Return the release's image, built first if the cache does not have it.

    An image appears under its name only when it is complete, so two builders at a time do double
    work and no harm.

    Raises:
        GuestError: a tool failed, or apt's configuration names no Debian archive.
    """
    cache = cache or cache_directory()
    home = cache / f"{release.name}-{recipe_key(release)}"
    image = Image(root=home / "root.ext4", kernel=home / "vmlinuz")
    if home.exists():
        return image
    site = debian_site(_call(["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(SITE)"]))
    with _scratch(cache, "build") as scratch:
        tree, made = scratch / "tree", scratch / "image"
        made.mkdir()
        _call(
            [
                *("mmdebstrap", "--mode=root", "--variant=essential", "--components=main"),
                f"--keyring={_KEYRING}",
                f"--include={','.join((*_PACKAGES, *release.packages))}",
                '--aptopt=APT::Install-Recommends "false"',
                "--dpkgopt=path-exclude=/usr/share/doc/*",
                "--dpkgopt=path-exclude=/usr/share/man/*",
                "--dpkgopt=path-exclude=/usr/share/locale/*",
                *(release.suite, str(tree), site),
            ],
            INITRD="No",
        )
        _configure(tree)
        (kernel,) = (tree / "boot").glob("vmlinuz-*")
        shutil.move(kernel, made / "vmlinuz")
        for unused in (tree / "boot").glob("initrd.img-*"):
            unused.unlink()
        versions = _call(
            ["dpkg-query", f"--admindir={tree}/var/lib/dpkg", "-W", "-f=${Package} ${Version}\\n"]
        )
        (made / "packages.txt").write_text(versions)
        _make_file_system(made / "root.ext4", tree, megabytes=ROOT_GB * 1024)
        try:
            made.rename(home)
        except OSError:
            if not home.exists():
                raise
    return image


def _make_file_system(target: Path, tree: Path, megabytes: int) -> None:
    """Write a directory into an ext4 file of a size, owners and modes kept (mkfs.ext4(8), -d)."""
    _call(["mkfs.ext4", "-q", "-F", "-m", "0", "-d", str(tree), str(target), f"{megabytes}M"])


def _payload_megabytes(payload: Path) -> int:
    """Size a disk for a directory: its data, a tenth for ext4's own, and room for many inodes."""
    files = 0
    blocks = 0
    for path in payload.rglob("*"):
        files += 1
        blocks += path.lstat().st_blocks
    return 32 + (blocks * 512 * 11 // 10 >> 20) + (files >> 9)


class Guest:
    """One release's machine. Each run boots it afresh; nothing a run does is seen by the next."""

    def __init__(self, release: Release, cache: Path | None = None) -> None:
        """Name the release to boot and where its image is kept (by default the user's cache)."""
        self.release = release
        self.cache = cache or cache_directory()

    def run(self, payload_dir: Path, command: str, timeout_s: float) -> GuestResult:
        """Boot, run a shell command as root with the payload at /payload, and power off.

        The command starts in /payload, which is read-only. What it writes to standard output and
        error is the result's output, and what it leaves in /results comes back as files. The
        guest has no network but what the command makes in it.

        Args:
            payload_dir: becomes the payload disk, owners and modes kept; is not changed.
            command: run by sh in the service payload.service.
            timeout_s: seconds from the start of qemu, after which it is killed; the build of a
                missing image does not count.

        Raises:
            GuestError: the time was up, the guest's kernel panicked or a tool failed. The message
                has the end of the console and of the output so far.
        """
        image = build(self.release, self.cache)
        with _scratch(self.cache, "run") as scratch:
            payload = scratch / "payload.ext4"
            _make_file_system(payload, payload_dir, _payload_megabytes(payload_dir))
            script = scratch / "command"
            script.write_text(command + "\n")
            _call(["debugfs", "-w", "-R", f'write "{script}" .command', str(payload)])
            overlay = scratch / "root.qcow2"
            _call(
                [
                    *("qemu-img", "create", "-q", "-f", "qcow2"),
                    *("-b", str(image.root.resolve()), "-F", "raw", str(overlay)),
                ]
            )
            with (scratch / "results").open("wb") as results:
                results.truncate(RESULTS_MB << 20)
            started = time.monotonic()
            ended = self._boot(image, scratch, timeout_s)
            return self._collect(scratch, ended, time.monotonic() - started)

    def _boot(self, image: Image, scratch: Path, timeout_s: float) -> str:
        """Run qemu to its end or its deadline; return how it ended, in words."""
        argv = [
            # The kernel ends qemu when this process dies without having done so.
            *("nice", "-n", "10", "setpriv", "--pdeathsig", "KILL"),
            *("qemu-system-x86_64", "-accel", _ACCEL, "-cpu", _CPU, "-machine", "q35"),
            *("-m", str(MEMORY_MB), "-smp", str(CPUS)),
            *("-nodefaults", "-no-user-config", "-display", "none", "-nic", "none", "-no-reboot"),
            *("-kernel", str(image.kernel), "-append", _KERNEL_ARGUMENTS),
            *("-serial", f"file:{scratch}/console", "-serial", f"file:{scratch}/output"),
            *("-drive", f"file={scratch}/root.qcow2,if=none,id=root,format=qcow2,cache=unsafe"),
            *("-device", "nvme,serial=root,drive=root"),
            *("-drive", f"file={scratch}/payload.ext4,if=none,id=payload,format=raw,readonly=on"),
            *("-device", "virtio-blk-pci,drive=payload,serial=payload"),
            *("-drive", f"file={scratch}/results,if=none,id=results,format=raw,cache=unsafe"),
            *("-device", "virtio-blk-pci,drive=results,serial=results"),
        ]
        with (scratch / "qemu").open("wb") as log:
            qemu = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            try:
                status = qemu.wait(timeout_s)
            except subprocess.TimeoutExpired:
                return f"did not finish its command within {timeout_s:g} s and was killed"
            finally:
                if qemu.returncode is None:
                    qemu.kill()
                    qemu.wait()
        return f"ended (qemu status {status}) without an exit status of its command"

    def _collect(self, scratch: Path, ended: str, wall_s: float) -> GuestResult:
        """Read what the guest handed back; a guest that did not come so far is an error."""
        output = _read(scratch / "output")
        try:
            files = _unpack(scratch / "results")
            exit_code, boot_s = int(files.pop(".exit_code")), float(files.pop(".boot_s"))
        except (tarfile.TarError, KeyError) as error:
            raise GuestError(
                f"the {self.release.name} guest {ended}, after {wall_s:.0f} s\n"
                f"--- qemu\n{_tail(_read(scratch / 'qemu'))}\n"
                f"--- console\n{_tail(_read(scratch / 'console'))}\n"
                f"--- output\n{_tail(output)}"
            ) from error
        return GuestResult(exit_code, output, MappingProxyType(files), boot_s, wall_s)


def _read(log: Path) -> str:
    """Read a log that may be absent, cut off in mid-character or not text at all."""
    return log.read_text(errors="replace") if log.exists() else ""


def _unpack(archive: Path) -> dict[str, bytes]:
    """Return the regular files of a tar archive by their path in it."""
    with tarfile.open(archive, mode="r:") as tar:
        return {
            str(PurePosixPath(member.name)): content.read()
            for member in tar
            if member.isreg() and (content := tar.extractfile(member)) is not None
        }


def clean(cache: Path | None = None) -> list[str]:
    """Remove images of older recipes and what killed runs left behind; return their names.

    Not to be called while a guest runs: its scratch directory would be taken from under it.
    """
    cache = cache or cache_directory()
    current = {f"{release.name}-{recipe_key(release)}" for release in RELEASES.values()}
    removed = []
    for entry in sorted(cache.iterdir()) if cache.exists() else []:
        if entry.name not in current:
            shutil.rmtree(entry)
            removed.append(entry.name)
    return removed


def main(arguments: Sequence[str] | None = None) -> int:
    """Build, run or clean from the command line; the exit status of ``run`` is the command's."""
    parser = argparse.ArgumentParser(prog="guest", description="Emulated stock Debian machines.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("build", help="build the images that the cache does not have")
    verb.add_argument("release", nargs="*", choices=[*RELEASES, []], metavar="RELEASE")
    verb = verbs.add_parser("run", help="boot a guest and run a shell command in it")
    verb.add_argument("release", choices=list(RELEASES))
    verb.add_argument("payload", type=Path, help="directory to mount read-only at /payload")
    verb.add_argument("command", help="what sh runs in the guest")
    verb.add_argument("--timeout", type=float, default=900, help="seconds until it is killed")
    verb.add_argument("--results", type=Path, help="directory to write /results to")
    verbs.add_parser("clean", help="remove old images and leftovers")
    options = parser.parse_args(arguments)
    try:
        if options.verb == "clean":
            print(*clean(), sep="\n")
            return 0
        if reason := missing():
            raise GuestError(reason)
        if options.verb == "build":
            for name in options.release or RELEASES:
                print(build(RELEASES[name]).root)
            return 0
        return _run_verb(options)
    except GuestError as error:
        print(f"guest: {error}", file=sys.stderr)
        return 125


def _run_verb(options: argparse.Namespace) -> int:
    """Run one command and show what came back."""
    guest = Guest(RELEASES[options.release])
    result = guest.run(options.payload, options.command, options.timeout)
    sys.stdout.write(result.output)
    print(
        f"guest: booted in {result.boot_s:.1f} s, off after {result.wall_s:.1f} s",
        file=sys.stderr,
    )
    for name, content in result.files.items():
        if options.results:
            target = options.results / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(content)
        print(f"guest: /results/{name}: {len(content)} bytes", file=sys.stderr)
    return result.exit_code


if __name__ == "__main__":
    sys.exit(main())
