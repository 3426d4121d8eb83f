"""What the core path needs in a guest: everything that `make install` installs from, and an image.

A guest has no network, so nothing can be fetched there: the payload is the part of a built
checkout that scripts/install.py reads, the locked Python packages for either release's interpreter,
and the archive of the valkey image. :mod:`tests.guest.core_path` installs and runs it. Called by
test_guest.py, and by hand to try something: ``PYTHONPATH=.:scripts python -m tests.guest.payload``.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

import image
from common import BUILD, REPOSITORY, cache_folder, digest, keep_only, replace_tree, run

INTERPRETERS: Final = ("3.11", "3.13")
"""Python of Debian 12 and of Debian 13."""

CARRIED: Final = (
    "bench/__init__.py",
    "bench/valkey.py",
    "build/bundle",
    "build/native",
    "examples/valkey/pod.yaml",
    "packaging",
    "pyproject.toml",
    "scripts/common.py",
    "scripts/engines.py",
    "scripts/install.py",
    "scripts/record.py",
    "src",
    "tests/guest/core_path.py",
)
"""Paths of the checkout that a guest gets, where they are."""

TARGET: Final = BUILD / "guest-payload"
"""Where it is put together: :data:`CARRIED`, the image as ``valkey.tar``, and in ``packages/3.X`` what
belongs into that Python's site-packages."""

_PLATFORMS: Final = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
"""Tags of binary wheels that glibc 2.36, Debian 12's, can load (PEP 600)."""

_MARKER: Final = re.compile(r" ; python_full_version [^\\\n]*")
"""A requirement's condition. pip judges it by its own interpreter, not by the one it is asked for."""


def build(target: Path = TARGET) -> Path:
    """Make the payload at a directory, in place of what is there; return that directory.

    Only the packages take long, and come from the cache while they stay the same.

    Raises Failure (scripts/common.py) when something is not built or cannot be downloaded.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    for name in CARRIED:
        source, place = REPOSITORY / name, fresh / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, place, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, place)
    for version in INTERPRETERS:
        shutil.copytree(_packages(version), fresh / "packages" / version)
    _archive_image(fresh / "valkey.tar")
    replace_tree(fresh, target)
    return target


def _packages(version: str) -> Path:
    """The locked packages for one interpreter, from the cache if they are there."""
    locked = _MARKER.sub("", (REPOSITORY / "requirements/runtime.txt").read_text())
    folder = cache_folder("guest-packages")
    place = folder / f"{version}-{digest(locked, *_PLATFORMS)}"
    if place.exists():
        return place
    fresh = folder / f".{place.name}.new"
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    requirements = fresh / "requirements.txt"
    requirements.write_text(locked)
    platforms = [word for name in _PLATFORMS for word in ("--platform", name)]
    run(
        [
            *(BUILD / "venv/bin/python", "-m", "pip", "--disable-pip-version-check", "--quiet"),
            *("install", "--target", fresh / "site-packages", "--no-compile", "--no-deps"),
            *("--implementation", "cp", "--python-version", version, *platforms),
            *("--only-binary=:all:", "--require-hashes", "--requirement", requirements),
        ],
        shown=f"pip install for Python {version}",
    )
    (fresh / "site-packages").rename(place)
    shutil.rmtree(fresh)
    keep_only(place, folder.glob(f"{version}-*"))
    return place


def _archive_image(target: Path) -> None:
    """The image as image.py built it, or else as Podman has it."""
    recipe = image.recipes()["valkey"]
    built = cache_folder("images") / f"{recipe.name}-{recipe.key}.tar"
    if built.exists():
        shutil.copyfile(built, target)
    else:
        run(["podman", "save", "--quiet", "--format=oci-archive", f"--output={target}", recipe.tag])


if __name__ == "__main__":
    print(build())
