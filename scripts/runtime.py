"""A Python, and some programs, that run on any x86_64 Linux when PREFIX is copied there.

Why: architectd runs in the mount namespace of its node, whose distribution may have no Python, an
older C library or none of glibc's kind. So the loader and every library come along, and the
programs are told where these are; nothing of the node's is loaded. Called by component_image.py.

    PREFIX/python/bin/   the interpreter
    PREFIX/python/lib/   the loader, the libraries, the standard library and the locked packages
    PREFIX/python/share/ licences of the packages of which there are files here
    PREFIX/bin/          programs that architectd runs and a node may lack
"""

import fnmatch
import shutil
import tempfile
from pathlib import Path
from typing import Any

import elf
import licences
from common import BUILD, REPOSITORY, run
from debs import Archive, Deb
from install import PREFIX

REQUIREMENTS = REPOSITORY / "requirements" / "cluster.txt"
PYTHON = PREFIX / "python"
TOOLS = PREFIX / "bin"


def packages_folder(settings: dict[str, Any]) -> Path:
    """Where Debian's Python looks for packages, below its own prefix (site.py)."""
    return PYTHON / f"lib/python{settings['python']}/dist-packages"


def inside(root: Path, path: Path) -> Path:
    """Where a path of the target host is while that host's root is the folder `root`."""
    return root / path.relative_to("/")


def remove(folder: Path, patterns: list[str]) -> None:
    """Remove what matches, files and whole folders; the patterns are relative to `folder`."""
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if any(fnmatch.fnmatch(name, pattern) for pattern in patterns):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def _install_packages(settings: dict[str, Any], target: Path) -> None:
    """The locked packages; only what someone imports at run time stays."""
    pip: list[str | Path] = [BUILD / "venv/bin/python", "-m", "pip", "--disable-pip-version-check"]
    pip += ["--quiet", "install", "--target", target, "--no-compile", "--only-binary=:all:"]
    pip += ["--implementation", "cp", "--python-version", settings["python"]]
    run([*pip, "--require-hashes", "--requirement", REQUIREMENTS], shown="pip install (locked)")
    remove(target, settings["packages_leave_out"])
    for module in target.rglob("*.so"):
        run(["strip", "--strip-unneeded", module])


def _copy_program(source: Path, target: Path) -> Path:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source, target)
    target.chmod(0o755)
    return target


def _add_iptables(settings: dict[str, Any], debs: Path, root: Path) -> None:
    """Its extensions, and scripts by its programs' names that tell it where they are."""
    extensions = TOOLS / "xtables"
    for name in settings["iptables_extensions"]:
        (source,) = debs.glob(f"usr/lib/*-linux-gnu*/xtables/{name}")
        _copy_program(source, inside(root, extensions) / name)
    for multi, names in settings["iptables"].items():
        for name in names:
            script = inside(root, TOOLS) / name
            script.write_text(
                f'#!{TOOLS}/sh\nXTABLES_LIBDIR={extensions} exec {TOOLS}/{multi} {name} "$@"\n'
            )
            script.chmod(0o755)


def _copy_libraries(settings: dict[str, Any], debs: Path, programs: list[Path], to: Path) -> None:
    """What the programs and modules load, and what is loaded by name only."""
    named = [elf.library(debs, name) for name in settings["libraries"]]
    for library in [*elf.closure([*programs, *named], debs), *named]:
        copy = to / library.name
        shutil.copyfile(library, copy)
        copy.chmod(0o755 if copy.name.startswith("ld-linux-") else 0o644)
        if not copy.name.startswith("ld-linux-"):
            elf.drop_search_path(copy)


def _record(settings: dict[str, Any], debs: list[Deb], unpacked: Path, python: Path) -> None:
    """Which packages it was made of, as in the bundle of CRIU; and their licences."""
    interpreter = next(deb for deb in debs if deb.name == settings["packages"][0])
    lines = [f"python {interpreter.version}", *(deb.line for deb in debs)]
    (python / "VERSION").write_text("\n".join(lines) + "\n")
    licences.copy((deb.name for deb in debs), unpacked, python / "share")


def compile_modules(settings: dict[str, Any], root: Path, folder: Path) -> None:
    """Compile the modules below PREFIX's `folder` with PREFIX's own interpreter.

    In a root where nothing else is, so that it fails if anything of the building host is needed.
    Without it each process of a read-only image would compile what it imports. The result names
    no time and is never compared with the source, so that it is the same on any day.
    """
    interpreter = PYTHON / f"bin/python{settings['python']}"
    words: list[str | Path] = [
        "chroot",
        root,
        interpreter,
        "-I",
        "-B",
        "-m",
        "compileall",
        "-q",
        "-f",
    ]
    run([*words, "--invalidation-mode", "unchecked-hash", folder], shown="compileall")


def make(settings: dict[str, Any], archive: Archive, root: Path) -> None:
    """Make PREFIX/python and PREFIX/bin below the new folder `root`.

    `settings` is the table `runtime` of packaging/image.toml. Raises Failure when a package or a
    library is missing.
    """
    version = settings["python"]
    python, tools = inside(root, PYTHON), inside(root, TOOLS)
    found = archive.download([*settings["packages"], *settings["tools"]])
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=".debs-") as name:
        debs = Path(name)
        for deb in found:
            deb.unpack(debs)
        (python / "lib").mkdir(parents=True)
        source, name_of = debs / f"usr/lib/python{version}", f"python{version}"
        shutil.copytree(source, python / "lib" / name_of, symlinks=True)
        remove(python / "lib" / name_of, settings["leave_out"])
        _install_packages(settings, inside(root, packages_folder(settings)))
        programs: list[Path] = [_copy_program(debs / "usr/bin" / name_of, python / "bin" / name_of)]
        (python / "bin/python3").symlink_to(name_of)
        for path in (path for paths in settings["tools"].values() for path in paths):
            programs.append(_copy_program(debs / path, tools / Path(path).name))
        for link, target in settings["links"].items():
            (tools / link).symlink_to(target)
        _add_iptables(settings, debs, root)
        modules = [path for path in sorted(root.rglob("*.so")) if elf.is_elf(path)]
        _copy_libraries(settings, debs, [*programs, *modules], python / "lib")
        loader = PYTHON / "lib" / elf.loader(debs).name
        for program in programs:
            elf.settle(program, loader, PYTHON / "lib")
        for module in modules:
            elf.drop_search_path(module)
        _record(settings, found, debs, python)
    compile_modules(settings, root, PYTHON / "lib")
