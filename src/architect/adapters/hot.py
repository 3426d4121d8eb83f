"""CRIU and what it needs, in memory: copied to a tmpfs once per boot, with its kernel-probe cache.

Why: a wake must not wait for a disk to bring the loader, the libraries and CRIU itself (14-44 ms when the
page cache has lost them), and CRIU asks the kernel the same forty questions (about 25 ms) at each start
unless its cache answers them. The copy is slimmer than the bundle: native/criu-standins says of what.

Called by the daemon when it starts.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
from pathlib import Path
from typing import Final

from architect.adapters import criu, rundir
from architect.contract import paths
from architect.contract.errors import ArchitectError

_OPTIONS: Final = "size=64m,mode=0700"
_STAMP: Final = "STAMP"
"""File of the copy that says of what it was made."""

_MAKE_CACHE: Final = """
set -e
mount -t tmpfs tmpfs /run
"$@" check >/dev/null 2>&1 || true
cat /run/criu.kdat
"""
"""CRIU writes its cache only where /run is a tmpfs, and only to this path."""


class HotError(ArchitectError):
    """CRIU could not be brought into memory."""


def prepare() -> None:
    """Makes the tmpfs and the kernel cache if they are not there, or are of another CRIU.

    Raises:
        HotError: the bundle is not installed, or does not work here.
        RunError: the tmpfs cannot be mounted.
    """
    if not (paths.BUNDLE / "VERSION").exists():
        raise HotError(f"{paths.BUNDLE}", "CRIU is not installed there", "run `make install`")
    here, stamp = paths.HOT / "criu", _stamp()
    stamped = here / _STAMP
    if stamped.exists() and stamped.read_text() == stamp and paths.KERNEL_CACHE.exists():
        return
    if not rundir.is_mount_point(paths.HOT):
        rundir.mount_tmpfs(paths.HOT, _OPTIONS)
    _make_kernel_cache()
    fresh, former = paths.HOT / "criu.new", paths.HOT / "criu.old"
    shutil.rmtree(former, ignore_errors=True)
    _copy(fresh)
    if not _slim(fresh):
        _copy(fresh)
    (fresh / _STAMP).write_text(stamp)
    if here.exists():
        here.rename(former)
    fresh.rename(here)
    shutil.rmtree(former, ignore_errors=True)


def criu_version() -> str:
    """The CRIU in use, as its bundle records it: the first line of VERSION."""
    try:
        return (paths.BUNDLE / "VERSION").read_text().splitlines()[0]
    except (OSError, IndexError):
        return "unknown"


def _stamp() -> str:
    parts = [paths.BUNDLE / "VERSION", paths.CRIU_COMPAT, *sorted(paths.CRIU_STANDINS.iterdir())]
    return hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()


def _copy(fresh: Path) -> None:
    shutil.rmtree(fresh, ignore_errors=True)
    # Licences are for people, who find them on the disk.
    shutil.copytree(paths.BUNDLE, fresh, symlinks=True, ignore=shutil.ignore_patterns("share"))
    shutil.copy(paths.CRIU_COMPAT, fresh / "lib")


def _slim(fresh: Path) -> bool:
    """Puts the stand-ins in, takes out what is then not asked for; whether CRIU still starts."""
    loader, *words = criu.command(fresh)
    for standin in paths.CRIU_STANDINS.iterdir():
        shutil.copy(standin, fresh / "lib")
    listing = subprocess.run(
        [loader, "--list", *words], check=False, capture_output=True, text=True
    )
    for library in (fresh / "lib").iterdir():
        if library.name not in listing.stdout:
            library.unlink()
    # All its symbols are bound at the start, so one that a stand-in lacks is seen here.
    started = subprocess.run([loader, *words, "--version"], check=False, capture_output=True)
    return listing.returncode == 0 and started.returncode == 0


def _make_kernel_cache() -> None:
    # /run, and with it all that is mounted there, is out of sight in there: the CRIU on the disk is used.
    made = subprocess.run(
        ["unshare", "--mount", "sh", "-c", _MAKE_CACHE, "sh", *criu.command(paths.BUNDLE)],
        check=False,
        capture_output=True,
    )
    if made.returncode or not made.stdout:
        raise HotError(
            "CRIU does not work here", "`criu check` wrote no kernel cache", "run `architect check`"
        )
    fresh = paths.KERNEL_CACHE.with_suffix(".new")
    fresh.write_bytes(made.stdout)
    fresh.rename(paths.KERNEL_CACHE)
