"""Image archives that containerd takes, and what they are called; without a registry.

Podman is the project's one builder of images (scripts/image.py); this module makes archives of
its images and of single static programs. Called by build.py, by `load` and by the tests.
"""

import io
import json
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from tests.cluster.base import ClusterError, run, succeeds

_SAVE_S = 120.0
_CONTAINERD_NAME = "io.containerd.image.name"


def saved(tag: str, target: Path) -> Path:
    """Write Podman's image as an archive with its name in it; return `target`.

    In Docker's format: in an OCI archive of Podman's the name stands where containerd does not
    look for a whole one (containerd's pkg/archive: io.containerd.image.name). Raises ClusterError
    when Podman does not have the image.
    """
    if not succeeds("podman", "image", "exists", tag):
        raise ClusterError(f"image {tag}", "Podman does not have it", "run `make images`")
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)  # podman save does not replace an archive
    save = ("podman", "save", "--quiet", "--format", "docker-archive")
    run(*save, "--output", target, tag, timeout_s=_SAVE_S)
    return target


def of_program(program: Path, tag: str, target: Path) -> None:
    """Write the archive of an image that is nothing but this static program, its entry point."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".layer-") as name:
        layer = Path(name) / "layer.tar"
        with tarfile.open(layer, "w") as tar, program.open("rb") as content:
            entry = tarfile.TarInfo(program.name)
            entry.size = program.stat().st_size
            entry.mode = 0o755
            tar.addfile(entry, content)
        entry_point = f'ENTRYPOINT ["/{program.name}"]'
        words = ("podman", "import", "--quiet", "--change", entry_point)
        run(*words, layer, tag, timeout_s=_SAVE_S)
    saved(tag, target)
    run("podman", "image", "rm", tag)


def _json_of(tar: tarfile.TarFile, name: str) -> Any:
    try:
        member = tar.extractfile(name)
    except KeyError:
        return None
    return json.load(io.TextIOWrapper(member, "utf-8")) if member else None


def names(archive: Path) -> list[str]:
    """The images' names that containerd will know an archive's images by.

    Raises ClusterError when the file is no image archive, or names no image: containerd would
    take it, and no pod could ever refer to it.
    """
    fix = "make it with `podman save --format docker-archive --output FILE IMAGE`"
    try:
        with tarfile.open(archive) as tar:
            # The order of containerd's own import: an OCI layout counts where there are both.
            index = _json_of(tar, "index.json") if _json_of(tar, "oci-layout") else None
            manifests = _json_of(tar, "manifest.json")
    except (OSError, tarfile.TarError, ValueError) as problem:
        reason = str(problem).splitlines()[0].rstrip(":")
        raise ClusterError(f"{archive}", f"is no image archive ({reason})", fix) from problem
    if index is not None:
        marks = [entry.get("annotations", {}) for entry in index.get("manifests", [])]
        found = [mark[_CONTAINERD_NAME] for mark in marks if _CONTAINERD_NAME in mark]
    else:
        found = [name for entry in manifests or [] for name in entry.get("RepoTags") or []]
    if not found:
        raise ClusterError(f"{archive}", "has no image with a name for containerd in it", fix)
    return found
