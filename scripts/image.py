"""Builds container images from Debian packages and loads them into Podman: image.py NAME...

Why: the demo, the benchmarks and the tests need images on machines that reach no image registry.
Each image is a row of images.toml: packages of a Debian release, unpacked into one layer, and
programs that are built here. Called by the Makefile (make image-NAME).

An image carries the digest of its recipe as a label; where Podman has it already, nothing is
done. The finished archive is kept in the cache under that digest, so a day's package updates
alone make no new image; REFRESH=1 makes it anew, with the versions that the mirror has today.
"""

import contextlib
import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import (
    REPOSITORY,
    Failure,
    architecture,
    cache_folder,
    digest,
    keep_only,
    main,
    run,
    say,
)
from debs import Deb, archive
from rootfs import lay_out, without_time, write_layer

TABLE = REPOSITORY / "scripts" / "images.toml"
RECIPE_LABEL = "architect.loopholelabs.io/recipe"
PACKAGES_LABEL = "architect.loopholelabs.io/packages"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Recipe:
    """A row of the table; the fields are explained there."""

    name: str
    release: str
    leave_out: tuple[str, ...]
    tag: str
    packages: tuple[str, ...]
    cmd: tuple[str, ...]
    directories: tuple[str, ...] = ()
    files: tuple[tuple[str, str], ...] = ()
    commands: tuple[tuple[str, ...], ...] = ()
    env: tuple[str, ...] = ()
    ports: tuple[str, ...] = ()
    workdir: str = "/"

    @property
    def key(self) -> str:
        """What the image is cached under: this row, its files and the code that builds it."""
        recipe = [Path(__file__).with_name(name).read_bytes() for name in ("image.py", "rootfs.py")]
        recipe += [path.read_bytes() for path in self.sources if path.exists()]
        return digest(repr(self), architecture(), *recipe)

    @property
    def sources(self) -> list[Path]:
        """The files that are built here."""
        return [REPOSITORY / name for name, _ in self.files]


def recipes() -> dict[str, Recipe]:
    """The table, by name."""
    table = tomllib.loads(TABLE.read_text())

    def frozen(value: Any) -> Any:
        return tuple(map(frozen, value)) if isinstance(value, list) else value

    common = {name: frozen(table.pop(name)) for name in ("release", "leave_out")}
    return {
        name: Recipe(name=name, **common | {k: frozen(v) for k, v in row.items()})
        for name, row in table.items()
    }


def _lay_out(recipe: Recipe, debs: list[Deb], root: Path) -> None:
    """Unpack the packages into `root` and do what their maintainer scripts would have done."""
    lay_out(debs, root)
    for directory in recipe.directories:
        (root / directory.lstrip("/")).mkdir(parents=True, exist_ok=True)
    for source, (_, place) in zip(recipe.sources, recipe.files, strict=True):
        target = root / place.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o755)
    for command in recipe.commands:
        run(["chroot", root, *command], env={"PATH": PATH, "LC_ALL": "C.UTF-8"})


class _Layout:
    """An OCI image layout in a folder (specification: image-layout.md)."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._blobs = folder / "blobs" / "sha256"
        self._blobs.mkdir(parents=True)
        (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')

    def add(self, kind: str, content: Path | dict[str, Any]) -> dict[str, Any]:
        """Store a blob and return its descriptor; a file is moved, a dict becomes JSON."""
        source = self.folder / "new"
        if isinstance(content, Path):
            content.rename(source)
        else:
            source.write_text(json.dumps(content, sort_keys=True))
        with source.open("rb") as file:
            digest_of = hashlib.file_digest(file, "sha256").hexdigest()
        size = source.stat().st_size
        source.rename(self._blobs / digest_of)
        media_type = f"application/vnd.oci.image.{kind}"
        return {"mediaType": media_type, "digest": f"sha256:{digest_of}", "size": size}


def _configuration(recipe: Recipe, debs: list[Deb], diff_id: str) -> dict[str, Any]:
    versions = " ".join(f"{deb.name}={deb.version}" for deb in debs)
    contents = [*recipe.packages, *(name for name, _ in recipe.files)]
    return {
        "architecture": architecture(),
        "os": "linux",
        "config": {
            "Cmd": recipe.cmd,
            "Env": [f"PATH={PATH}", *recipe.env],
            "ExposedPorts": {port: {} for port in recipe.ports},
            "Labels": {RECIPE_LABEL: recipe.key, PACKAGES_LABEL: versions},
            "WorkingDir": recipe.workdir,
        },
        "rootfs": {"type": "layers", "diff_ids": [diff_id]},
        "history": [{"created_by": f"Debian {recipe.release}: {' '.join(contents)}"}],
    }


def _write_archive(recipe: Recipe, debs: list[Deb], layer: Path, work: Path, target: Path) -> None:
    """The OCI archive that `podman load` and `ctr images import` take."""
    layout = _Layout(work / "layout")
    stored = layout.add("layer.v1.tar", layer)
    config = layout.add("config.v1+json", _configuration(recipe, debs, stored["digest"]))
    manifest = layout.add(
        "manifest.v1+json",
        {
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": [stored],
        },
    )
    manifest["annotations"] = {
        "org.opencontainers.image.ref.name": recipe.tag,
        "io.containerd.image.name": recipe.tag,
    }
    index = {"schemaVersion": 2, "manifests": [manifest]}
    (layout.folder / "index.json").write_text(json.dumps(index))
    unfinished = work / "archive.tar"
    with tarfile.open(unfinished, "w") as tar:
        for path in sorted(layout.folder.rglob("*")):
            name = path.relative_to(layout.folder)
            tar.add(path, name, recursive=False, filter=without_time)
    unfinished.rename(target)


def _build(wanted: list[Recipe], folder: Path) -> None:
    """Build these images' archives, through one fetch of the release's index each release."""
    for release in sorted({recipe.release for recipe in wanted}):
        with archive(release) as source:
            for recipe in (r for r in wanted if r.release == release):
                say("image", f"building {recipe.tag} from Debian {release}")
                found = source.download(recipe.packages)
                debs = [deb for deb in found if deb.name not in recipe.leave_out]
                with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name:
                    work = Path(name)
                    _lay_out(recipe, debs, work / "root")
                    write_layer(work / "root", work / "layer.tar")
                    target = folder / f"{recipe.name}-{recipe.key}.tar"
                    _write_archive(recipe, debs, work / "layer.tar", work, target)
                keep_only(target, folder.glob(f"{recipe.name}-*.tar"))
                source.clear()


def _has(recipe: Recipe) -> bool:
    """Whether Podman has this very image, told by its recipe's label."""
    return _inspect(recipe, f'{{{{index .Config.Labels "{RECIPE_LABEL}"}}}}') == recipe.key


def _inspect(recipe: Recipe, template: str) -> str:
    """A field of Podman's image of that tag, or nothing where there is none."""
    try:
        return run(["podman", "image", "inspect", "--format", template, recipe.tag]).strip()
    except Failure:
        return ""


def _load(recipe: Recipe, source: Path) -> None:
    """Give Podman the image; the one that had its tag goes, unless a container uses it."""
    before = _inspect(recipe, "{{.Id}}")
    run(["podman", "load", "--quiet", "--input", source])
    if not _has(recipe):
        raise Failure(f"Podman does not have {recipe.tag} although it loaded {source}")
    if before and before != _inspect(recipe, "{{.Id}}"):
        with contextlib.suppress(Failure):
            run(["podman", "image", "rm", before])


def body(arguments: list[str]) -> None:
    table = recipes()
    unknown = set(arguments) - set(table)
    if unknown or not arguments:
        raise Failure(f"usage: image.py NAME..., of {', '.join(table)}")
    refresh = bool(os.environ.get("REFRESH"))
    wanted = [table[name] for name in arguments]
    for one in wanted:
        for path in one.sources:
            if not path.exists():
                raise Failure(f"{one.tag}: {path} is not built; run `make image-{one.name}`")
    missing = [recipe for recipe in wanted if refresh or not _has(recipe)]
    folder = cache_folder("images")
    archives = {recipe.tag: folder / f"{recipe.name}-{recipe.key}.tar" for recipe in missing}
    _build([r for r in missing if refresh or not archives[r.tag].exists()], folder)
    for recipe in missing:
        _load(recipe, archives[recipe.tag])
    for recipe in wanted:
        say("image", recipe.tag)


if __name__ == "__main__":
    main("image", body)
