"""Takes programs of a Debian release to where there are no libraries of that release.

A program needs its loader, and the libraries that this loader finds for it. They are found in the
unpacked packages, never on the building host. Called by bundle.py and runtime.py.
"""

from collections.abc import Iterable
from pathlib import Path

from common import Failure, run

_MAGIC = b"\x7fELF"


def is_elf(path: Path) -> bool:
    """Whether the file is a program, a library or an object (elf(5))."""
    if path.is_symlink() or not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def loader(root: Path) -> Path:
    """The dynamic loader that the C library's package, unpacked into `root`, brings."""
    found = [*root.glob("usr/lib64/ld-linux-*.so.*"), *root.glob("usr/lib/ld-linux-*.so.*")]
    if not found:
        raise Failure("the C library's package has no loader at usr/lib*/ld-linux-*.so.*")
    # A link made for /usr of the target system; the file lies beside the libraries.
    return next(root.glob(f"usr/lib/*-linux-gnu*/{found[0].name}"), found[0])


def _folders(root: Path) -> list[Path]:
    return [d for d in (*root.glob("usr/lib/*-linux-gnu*"), root / "usr/lib") if d.is_dir()]


def library(root: Path, name: str) -> Path:
    """A library of the unpacked packages by the name that programs ask for.

    Raises Failure when no package has it.
    """
    for folder in _folders(root):
        if (folder / name).exists():
            return folder / name
    raise Failure(f"none of the release's packages has {name}")


def closure(programs: Iterable[Path], root: Path) -> list[Path]:
    """The loader, and the libraries that it finds for the programs in the release's packages.

    By the names that the loader asks for, sorted. Raises Failure when one is missing or came from
    the host instead of `root`.
    """
    own = loader(root)
    search = ":".join(map(str, _folders(root)))
    found = {own.name: own}
    for program in programs:
        # Without the cache: the host's would name the host's libraries.
        listing = run([own, "--inhibit-cache", "--library-path", search, "--list", program])
        for line in listing.splitlines():
            name, arrow, rest = line.strip().partition(" => ")
            if not arrow or Path(name).name == own.name:
                continue  # the vDSO is no file, and the loader is there already
            path = Path(rest.rpartition(" (")[0] or rest)
            if not path.is_relative_to(root):
                raise Failure(
                    f"{name}, which {program.name} needs, is not in the release's packages: {rest}"
                )
            found[path.name] = path
    return [found[name] for name in sorted(found)]


def settle(program: Path, loader_path: Path, libraries: Path) -> None:
    """Write into a program where its loader and libraries are: absolute paths of the target host.

    As DT_RPATH and not DT_RUNPATH, because only the former counts for what its libraries and
    modules load in their turn, and it goes before LD_LIBRARY_PATH (ld.so(8)).
    """
    words = ["patchelf", "--set-interpreter", str(loader_path), "--force-rpath"]
    run([*words, "--set-rpath", str(libraries), program])


def drop_search_path(file: Path) -> None:
    """Take a library's own search path out: a DT_RUNPATH would hide the program's DT_RPATH."""
    if run(["patchelf", "--print-rpath", file]).strip():
        mode = file.stat().st_mode
        run(["patchelf", "--remove-rpath", file])
        file.chmod(mode)
