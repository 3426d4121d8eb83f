"""Builds the image of all components: build/images/architect-VERSION.tar.

One image for architectd, architect-manager and architect-control-plane; `ctr images import` and
`podman load` take the archive. It is made of four parts, each a tar that packaging/Containerfile
adds, and buildah needs no network for it. What is in them is told in packaging/image.toml:

    root       a small Debian, for `kubectl exec`
    runtime    PREFIX/python and PREFIX/bin (runtime.py)
    native     PREFIX/libexec and PREFIX/criu, as `make native` and `make bundle` built them, and
               PREFIX/share, the licences of what is linked into the former
    architect  this package, PREFIX/venv and PREFIX/VERSION

The first two are kept in the cache under what they were made of, so that a change of the package
takes seconds; where nothing changed, nothing is done. REFRESH=1 makes all anew, with the versions
that the mirror has today. Called by the Makefile, as root.
"""

import contextlib
import json
import os
import re
import shutil
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import runtime
from common import (
    BUILD,
    REPOSITORY,
    Failure,
    architecture,
    cache_folder,
    digest,
    keep_only,
    main,
    run,
    say,
    sha256,
)
from debs import Archive, archive
from install import PREFIX, PROGRAMS
from licences import NATIVE
from rootfs import lay_out, write_layer
from runtime import inside

PACKAGING = REPOSITORY / "packaging"
RECIPE_LABEL = "architect.loopholelabs.io/recipe"
_ME = "component_image"
_RECIPES = ("component_image.py", "debs.py", "elf.py", "licences.py", "rootfs.py", "runtime.py")
_LAUNCHER = '''#!{python} -I
"""Starts {module} with the interpreter of {prefix}."""

import os
import sys

# Last: a program that the host has fits the host.
os.environ["PATH"] = os.environ.get("PATH", os.defpath) + os.pathsep + "{tools}"

from {module} import main

sys.exit(main())
'''


def settings() -> dict[str, Any]:
    """packaging/image.toml."""
    return tomllib.loads((PACKAGING / "image.toml").read_text())


def version() -> str:
    """This package's version, read and not imported: the package needs others that may be away."""
    text = (REPOSITORY / "src/architect/__init__.py").read_text()
    found = re.search(r'^__version__ = "(.+)"$', text, re.MULTILINE)
    if found is None:
        raise Failure("src/architect/__init__.py has no __version__")
    return found[1]


def target() -> Path:
    """The archive that this script makes."""
    return BUILD / "images" / f"architect-{version()}.tar"


def _files_key(*files: Path) -> str:
    return digest(*(part for file in files for part in (file.name, sha256(file))))


def _scripts_key() -> str:
    return _files_key(*(Path(__file__).with_name(name) for name in _RECIPES))


def _package_key() -> str:
    sources = [p for p in (REPOSITORY / "src").rglob("*") if p.suffix in (".py", ".typed")]
    parts = [str(p.relative_to(REPOSITORY)) + sha256(p) for p in sorted(sources)]
    return digest(*parts, (REPOSITORY / "pyproject.toml").read_bytes())


def _native_files() -> dict[Path, Path]:
    """What `make native` and `make bundle` built, by its place in PREFIX.

    Raises Failure when one of them has not run.
    """
    files = {Path("libexec", name): BUILD / "native" / name for name in PROGRAMS}
    bundle = BUILD / "bundle"
    found = [path for path in sorted(bundle.rglob("*")) if path.is_file()]
    files |= {Path("criu") / path.relative_to(bundle): path for path in found}
    texts = [path for path in sorted(NATIVE.rglob("*")) if path.is_file()]
    files |= {Path("share") / path.relative_to(NATIVE): path for path in texts}
    missing = [path for path in files.values() if not path.exists()]
    if missing or not texts or Path("criu/VERSION") not in files:
        lost = missing[0] if missing else bundle / "VERSION" if texts else NATIVE
        raise Failure(f"{lost} is missing: run make native bundle")
    return files


def _native_key(files: dict[Path, Path]) -> str:
    return digest(*(f"{place} {sha256(file)}" for place, file in files.items()))


def _make_root(table: dict[str, Any], source: Archive, root: Path) -> None:
    found = source.download(table["root"]["packages"])
    lay_out([deb for deb in found if deb.name not in table["root"]["leave_out"]], root)
    for name in table["root"]["remove"]:
        shutil.rmtree(root / name)
    for name, place in table["root"]["links"].items():
        (root / name).symlink_to(place)


def _make_runtime(table: dict[str, Any], source: Archive, root: Path) -> None:
    root.mkdir()
    runtime.make(table["runtime"], source, root)


def _cached_part(
    name: str,
    key: str,
    table: dict[str, Any],
    make: Callable[[dict[str, Any], Archive, Path], None],
) -> Path:
    """The tar of a part that is made of Debian's packages; made now unless the cache has it."""
    folder = cache_folder("components")
    entry = folder / f"{name}-{key}.tar"
    if os.environ.get("REFRESH") or not entry.exists():
        say(_ME, f"making {name} from Debian {table['release']}")
        with (
            archive(table["release"]) as source,
            tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as work,
        ):
            make(table, source, Path(work) / "root")
            write_layer(Path(work) / "root", Path(work) / "layer.tar")
            (Path(work) / "layer.tar").rename(entry)
        keep_only(entry, folder.glob(f"{name}-*.tar"))
    return entry


def _make_native(files: dict[Path, Path], work: Path) -> Path:
    root = work / "native"
    for place, file in files.items():
        copy = inside(root, PREFIX) / place
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, copy)
        runs = place.parts[0] == "criu" and bool(file.stat().st_mode & 0o100)
        runs |= place.parts[0] == "libexec" and ".so" not in place.name and place.suffix != ".o"
        copy.chmod(0o755 if runs else 0o644)
    write_layer(root, work / "native.tar")
    return work / "native.tar"


def write_launchers(programs: dict[str, str], bin_folder: Path) -> None:
    """The programs, started by the kernel itself: a node may have no shell.

    By way of venv/bin/python, so that a process is told by its command line as on a machine where
    `make install` made a virtual environment there.
    """
    bin_folder.mkdir(parents=True)
    depth = len((PREFIX / "venv/bin").relative_to(PREFIX).parts)
    (bin_folder / "python").symlink_to("../" * depth + "python/bin/python3")
    for name, module in programs.items():
        text = _LAUNCHER.format(
            python=PREFIX / "venv/bin/python", module=module, prefix=PREFIX, tools=runtime.TOOLS
        )
        (bin_folder / name).write_text(text)
        (bin_folder / name).chmod(0o755)


def _make_package(table: dict[str, Any], key: str, runtime_part: Path, work: Path) -> Path:
    """This package, compiled by PREFIX's own interpreter, with the programs that start it."""
    whole, own = work / "whole", work / "architect"
    whole.mkdir()
    run(["tar", "-C", whole, "-xf", runtime_part])
    place = runtime.packages_folder(table["runtime"])
    pip: list[str | Path] = [BUILD / "venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "--quiet", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", work]
    run([*build, REPOSITORY], shown="pip wheel")
    (wheel,) = work.glob("architect-*.whl")
    with zipfile.ZipFile(wheel) as file:  # of modules only, so that unpacking it is installing it
        file.extractall(work / "wheel")
    shutil.copytree(work / "wheel", inside(whole, place), dirs_exist_ok=True)
    runtime.compile_modules(table["runtime"], whole, place / "architect")
    write_launchers(table["programs"], inside(own, PREFIX) / "venv/bin")
    for part in sorted((work / "wheel").iterdir()):
        shutil.copytree(inside(whole, place) / part.name, inside(own, place) / part.name)
    (inside(own, PREFIX) / "VERSION").write_text(f"architect {version()} {key}\n")
    write_layer(own, work / "architect.tar")
    return work / "architect.tar"


def recipe_of(file: Path) -> str:
    """The key of what an archive was made of, out of its label; empty if it has none."""
    try:
        with tarfile.open(file) as tar:
            manifest = tar.extractfile("manifest.json")
            name = json.load(manifest)[0]["Config"] if manifest else ""
            config = tar.extractfile(name)
            labels = json.load(config)["config"]["Labels"] if config else {}
    except (OSError, KeyError, ValueError, tarfile.TarError):
        return ""
    return str(labels.get(RECIPE_LABEL, ""))


def _image(reference: str) -> str:
    try:
        return run(
            ["buildah", "inspect", "--type", "image", "--format", "{{.FromImageID}}", reference]
        )
    except Failure:
        return ""


def _run_buildah(parts: dict[str, Path], key: str, tag: str, work: Path) -> None:
    """Build the image, write the archive and forget the image that had the tag before."""
    context = work / "context"
    context.mkdir()
    for name, part in parts.items():
        try:
            (context / f"{name}.tar").hardlink_to(part)
        except OSError:  # the cache is on another disk
            shutil.copyfile(part, context / f"{name}.tar")
    before = _image(tag)
    words = ["buildah", "build", "--quiet", "--layers", "--timestamp", "0", "--pull-never"]
    words += ["--build-arg", f"VERSION={version()}", "--build-arg", f"RECIPE={key}", "--tag", tag]
    run([*words, "--file", str(PACKAGING / "Containerfile"), str(context)], shown="buildah build")
    unfinished = work / "image.tar"
    run(["buildah", "push", "--quiet", tag, f"docker-archive:{unfinished}:{tag}"])
    if recipe_of(unfinished) != key:
        raise Failure(f"buildah did not write the image that it was asked for, {tag} {key}")
    target().parent.mkdir(parents=True, exist_ok=True)
    unfinished.rename(target())
    if before and before != _image(tag):
        with contextlib.suppress(Failure):
            run(["buildah", "rmi", before.strip()])


def body(arguments: list[str]) -> None:
    if arguments:
        raise Failure("usage: component_image.py (REFRESH=1 in the environment makes it anew)")
    if os.geteuid() != 0:
        raise Failure("run as root: the files in the image belong to root")
    os.umask(0o022)  # whoever the containers run as has to be able to read it all
    table, native, scripts = settings(), _native_files(), _scripts_key()
    tag = f"{table['tag']}:{version()}"
    base = digest(table["release"], architecture(), scripts)
    root_key = digest(base, repr(table["root"]))
    runtime_key = digest(base, repr(table["runtime"]), runtime.REQUIREMENTS.read_bytes())
    package_key = digest(runtime_key, _package_key(), repr(table["programs"]))
    containerfile = (PACKAGING / "Containerfile").read_bytes()
    key = digest(root_key, _native_key(native), package_key, containerfile)
    if os.environ.get("REFRESH") or recipe_of(target()) != key:
        parts = {
            "root": _cached_part("root", root_key, table, _make_root),
            "runtime": _cached_part("runtime", runtime_key, table, _make_runtime),
        }
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD, prefix=".components-") as name:
            work = Path(name)
            parts["native"] = _make_native(native, work)
            parts["architect"] = _make_package(table, key, parts["runtime"], work)
            _run_buildah(parts, key, tag, work)
    say(_ME, f"{tag} is in {target().relative_to(REPOSITORY)}")


if __name__ == "__main__":
    main(_ME, body)
