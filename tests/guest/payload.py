"""What the core path needs in a guest: everything that `make install` installs from, and an image.

A guest has no network, so nothing can be fetched there: the payload is the part of a built
checkout that scripts/install.py reads, the locked Python packages for either release's interpreter,
and the archive of the valkey image. :mod:`tests.guest.core_path` installs and runs it.

A node of a cluster gets another: the image of the components, a pause image, and what stands in for
the kubelet (:mod:`tests.guest.node_path`).

Called by test_guest.py, and by hand to try something: ``PYTHONPATH=.:scripts python -m
tests.guest.payload`` makes both.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import image
from common import (
    BUILD,
    REPOSITORY,
    architecture,
    cache_folder,
    digest,
    keep_only,
    replace_tree,
    run,
)
from tests.cluster import images, install, toolchain

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
    "tests/guest/steps.py",
)
"""Paths of the checkout that a guest gets, where they are."""

NODE_CARRIED: Final = (
    "bench/__init__.py",
    "bench/valkey.py",
    "tests/guest/node_path.py",
    "tests/guest/steps.py",
)
"""The same for a node: all else is in the image of the components."""

TARGET: Final = BUILD / "guest-payload"
"""Where it is put together: :data:`CARRIED`, the image as ``valkey.tar``, and in ``packages/3.X`` what
belongs into that Python's site-packages."""

NODE_TARGET: Final = BUILD / "guest-node-payload"
"""Where a node's is: :data:`NODE_CARRIED`, the images as NAME.tar, the program ``cri``, and ``ca.crt``
with ``ca.key``, a certificate for 127.0.0.1 that is its own authority."""

PAUSE_TAG: Final = "localhost/guest-pause:1"
"""What node_path.py, which runs where this module cannot be imported, knows as PAUSE."""

_CRI: Final = Path(__file__).with_name("cri")
_PAUSE: Final = REPOSITORY / "tests/cluster/kube/pause/pause.c"
_PLATFORMS: Final = ("manylinux2014_x86_64", "manylinux_2_17_x86_64", "manylinux_2_28_x86_64")
"""Tags of binary wheels that glibc 2.36, Debian 12's, can load (PEP 600)."""

_MARKER: Final = re.compile(r" ; python_full_version [^\\\n]*")
"""A requirement's condition. pip judges it by its own interpreter, not by the one it is asked for."""


def build(target: Path = TARGET) -> Path:
    """Make the payload at a directory, in place of what is there; return that directory.

    Only the packages take long, and come from the cache while they stay the same.

    Raises Failure (scripts/common.py) when something is not built or cannot be downloaded.
    """
    with _replacing(target) as fresh:
        _carry(CARRIED, fresh)
        for version in INTERPRETERS:
            shutil.copytree(_packages(version), fresh / "packages" / version)
        _archive_image(fresh / "valkey.tar")
    return target


def build_node(target: Path = NODE_TARGET) -> Path:
    """Likewise a node's payload, with the components' image as the checkout is now.

    Raises Failure when something is not built or cannot be downloaded.
    """
    components = install.image()
    with _replacing(target) as fresh:
        _carry(NODE_CARRIED, fresh)
        shutil.copyfile(components, fresh / "architect.tar")
        _archive_image(fresh / "valkey.tar")
        helpers = _helpers()
        for name in ("cri", "pause.tar"):
            shutil.copy2(helpers / name, fresh / name)
        _make_certificate(fresh / "ca.crt", fresh / "ca.key")
    return target


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A new folder that takes a directory's place when the block ends well."""
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f".{target.name}.new")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir()
    yield fresh
    replace_tree(fresh, target)


def _carry(names: tuple[str, ...], fresh: Path) -> None:
    """Copy paths of the checkout to where they are in it."""
    for name in names:
        source, place = REPOSITORY / name, fresh / name
        place.parent.mkdir(parents=True, exist_ok=True)
        if source.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
            shutil.copytree(source, place, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, place)


def _helpers() -> Path:
    """A folder with the program ``cri`` and ``pause.tar``, from the cache if it is there."""
    files = [_PAUSE, *sorted(path for path in _CRI.iterdir() if path.is_file())]
    folder = cache_folder("guest-node")
    place = folder / digest(PAUSE_TAG, architecture(), *(file.read_bytes() for file in files))
    if place.exists():
        return place
    with _replacing(place) as fresh:
        environment = {**toolchain.environment(), "CGO_ENABLED": "0"}
        build = ("build", "-C", _CRI, "-trimpath", "-ldflags=-s -w", "-o", fresh / "cri", ".")
        run([toolchain.go(), *build], env=environment, shown="go build of cri")
        run(["musl-gcc", "-static", "-Os", "-s", "-o", fresh / "pause", _PAUSE])
        images.of_program(fresh / "pause", PAUSE_TAG, fresh / "pause.tar")
    keep_only(place, folder.iterdir())
    return place


def _make_certificate(target: Path, key: Path) -> None:
    """What node_path.py's API server shows, and what architectd is to trust."""
    kind = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    whose = ("-subj", "/CN=guest", "-addext", "subjectAltName=IP:127.0.0.1", "-days", "3650")
    run(["openssl", "req", "-x509", *kind, *whose, "-keyout", key, "-out", target])


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
    print(build(), build_node(), sep="\n")
