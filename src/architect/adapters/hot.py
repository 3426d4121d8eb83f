"""CRIU and what it needs, in memory: copied to a tmpfs once per boot, with its kernel-probe cache.

Why: a wake must not wait for a disk to bring the loader, nine libraries and CRIU itself (14-44 ms when the
page cache has lost them), and CRIU asks the kernel the same forty questions (about 25 ms) at each start
unless /run/criu.kdat answers them, a file that it writes only where /run is a tmpfs.

Called by the daemon when it starts.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from typing import Final

from architect.adapters import criu
from architect.contract import paths
from architect.contract.errors import ArchitectError

_KERNEL_CACHE: Final = Path("/run/criu.kdat")
_MS_PRIVATE: Final = 1 << 18
_SIZE: Final = "64m"

_MAKE_CACHE: Final = """
set -e
mount -t tmpfs tmpfs /run
"$@" check >/dev/null 2>&1 || true
cat /run/criu.kdat
"""


class HotError(ArchitectError):
    """CRIU could not be brought into memory."""


def prepare() -> None:
    """Makes the tmpfs and the kernel cache if they are not there, or are of another CRIU.

    Raises:
        HotError: the bundle is not installed, or a mount failed.
    """
    version = paths.BUNDLE / "VERSION"
    if not version.exists():
        raise HotError(f"{paths.BUNDLE}", "CRIU is not installed there", "run `make install`")
    here = paths.HOT / "criu"
    copied = here / "VERSION"
    if copied.exists() and copied.read_bytes() == version.read_bytes() and _KERNEL_CACHE.exists():
        return
    if not _is_mount_point(paths.HOT):
        paths.HOT.mkdir(parents=True, exist_ok=True)
        _mount("tmpfs", paths.HOT, f"size={_SIZE},mode=0700")
    shutil.rmtree(here, ignore_errors=True)
    fresh = paths.HOT / "criu.new"
    shutil.rmtree(fresh, ignore_errors=True)
    shutil.copytree(paths.BUNDLE, fresh, symlinks=True)
    _make_kernel_cache()
    fresh.rename(here)


def criu_version() -> str:
    """The CRIU in use, as its bundle records it: the first line of VERSION."""
    try:
        return (paths.BUNDLE / "VERSION").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _make_kernel_cache() -> None:
    # A file that a killed CRIU left half written blocks saving for ever.
    _KERNEL_CACHE.with_name("criu.kdat.tmp").unlink(missing_ok=True)
    # /run, and with it the copy in memory, is out of sight in there: the one on the disk is used.
    made = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _MAKE_CACHE, "sh", *criu.command(paths.BUNDLE)],
        check=False,
        capture_output=True,
    )
    if made.returncode or not made.stdout:
        raise HotError(
            "CRIU does not work here", "`criu check` wrote no kernel cache", "run `architect check`"
        )
    fresh = _KERNEL_CACHE.with_name("criu.kdat.architect")
    fresh.write_bytes(made.stdout)
    fresh.rename(_KERNEL_CACHE)


def make_run_private() -> None:
    """Keeps the mounts below our run directory out of other mount namespaces' propagation.

    Must come before anything is mounted there: a bind mount hides what is below it.
    """
    if _is_mount_point(paths.RUN):
        return
    subprocess.run(["mount", "--bind", str(paths.RUN), str(paths.RUN)], check=True)
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mount(b"none", str(paths.RUN).encode(), None, _MS_PRIVATE, None)


def _is_mount_point(place: Path) -> bool:
    """Path.is_mount compares devices and does not see a bind mount of the same file system."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return any(line.split()[4] == str(place) for line in lines)


def _mount(kind: str, place: Path, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(kind.encode(), str(place).encode(), kind.encode(), 0, options.encode()):
        code = ctypes.get_errno()
        raise HotError(f"{place} cannot be mounted", os.strerror(code), "run as root")
