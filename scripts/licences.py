"""The licence texts of other people's work in what we hand out: libraries copied, or linked in.

Each Debian package has its own at /usr/share/doc/PACKAGE/copyright. Those name the longest ones
instead of repeating them; Debian has these once for all, so they come along too. Compressed, as
each node of a cluster has them all:

    share/doc/PACKAGE/copyright.gz
    share/common-licenses/NAME.gz

Called by bundle.py and runtime.py for what they copy out of packages, and by `make native`, as a
program, for what is linked into what it has built: build/native/share, which `make install` and
the components' image then have at PREFIX/share.
"""

import gzip
import re
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path

from common import BUILD, REPOSITORY, Failure, main, replace_tree, run

NATIVE = BUILD / "native/share"

COMMON = Path("/usr/share/common-licenses")
"""Of the package base-files, which every Debian has."""
_NAMED = re.compile(rf"{COMMON}/([\w.+-]*\w)")
_LIBRARIES = ("libnghttp2", "libssl")
"""What native/Makefile asks pkg-config for."""
_COMPILERS = ("c", "gcc", "gcc_eh")
"""What a static program has of its C library and compiler without being asked for."""
_ALWAYS = ("libbpf-dev", "linux-libc-dev", "musl-dev")
"""The C library of the small programs; and headers whose inline functions are compiled in."""


def copy(packages: Iterable[str], root: Path, into: Path) -> None:
    """Copy the texts of the packages, whose files are below `root`, into a folder `share`.

    The same texts give the same bytes on any day. Raises Failure when a package has none.
    """
    texts = []
    for name in sorted(set(packages)):
        source = root / "usr/share/doc" / name / "copyright"
        if not source.exists():
            raise Failure(f"package {name} has no licence at {source}, so it cannot be handed out")
        _compress(source, into / "doc" / name)
        texts.append(source.read_text(errors="replace"))
    for name in sorted(set(_NAMED.findall("\n".join(texts)))):
        if (COMMON / name).exists():
            _compress(COMMON / name, into / "common-licenses")


def _compress(source: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{source.name}.gz").write_bytes(gzip.compress(source.read_bytes(), mtime=0))


def linked() -> list[str]:
    """The packages on this machine of which parts are in the programs of `make native`.

    Raises Failure when one of their libraries is not there.
    """
    asked = run(["pkg-config", "--static", "--libs-only-l", *_LIBRARIES]).split()
    names = [*(word.removeprefix("-l") for word in asked), *_COMPILERS]
    found = set(_ALWAYS)
    for name in names:
        # With musl's gcc wrapper as with gcc itself, libgcc is the compiler's own.
        file = Path(run(["gcc", f"-print-file-name=lib{name}.a"]).strip())
        if not file.is_absolute():
            raise Failure(f"lib{name}.a is not there: run make native")
        owner = run(["dpkg-query", "--search", file.resolve()])
        found.add(re.split(r"[:,]", owner)[0])
    return sorted(found)


def of_programs(into: Path) -> None:
    """Fill the new folder `into` with the texts for the programs of `make native`, and our own."""
    copy(linked(), Path("/"), into)
    (into / "doc/architect").mkdir()
    shutil.copyfile(REPOSITORY / "LICENSE", into / "doc/architect/LICENSE")


def body(arguments: list[str]) -> None:
    if arguments:
        raise Failure("usage: licences.py")
    NATIVE.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=NATIVE.parent, prefix=".share-") as folder:
        of_programs(Path(folder) / "share")
        replace_tree(Path(folder) / "share", NATIVE)


if __name__ == "__main__":
    main("licences", body)
