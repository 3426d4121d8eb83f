"""Makes build/bundle: CRIU with its own loader and libraries, independent of the host's libc.

Why: Debian 12's CRIU is too old for today's kernels and hosts differ; this one is Debian
trixie's, with exactly the libraries that its loader asks for. `make install` puts the folder at
/usr/local/lib/architect/criu. Called by the Makefile (make bundle).

    bundle/bin/criu  the program; start it by `lib/ld-linux-*.so.* --library-path lib bin/criu`
    bundle/lib/      the loader and the libraries, by the names that the loader looks for
    bundle/share/    their licences (licences.py)
    bundle/VERSION   "criu VERSION", then a line a package (deb NAME VERSION ARCHITECTURE SHA256)
                     and a line a file (file PATH SHA256)

The finished folder is kept in the cache by what determines it: release, architecture and this
recipe. REFRESH=1 makes it anew, with the versions that the mirror has today.
"""

import os
import shutil
import tempfile
from pathlib import Path

import licences
from common import (
    BUILD,
    Failure,
    architecture,
    cache_folder,
    digest,
    keep_only,
    main,
    replace_tree,
    run,
    say,
    sha256,
)
from debs import Deb, archive
from elf import closure

RELEASE = "trixie"
TARGET = BUILD / "bundle"


def _lay_out(debs: list[Deb], work: Path) -> Path:
    """Build the bundle's folder from the packages and return it."""
    root = work / "root"
    root.mkdir()
    for deb in debs:
        deb.unpack(root)
    bundle = work / "bundle"
    for name in ("bin", "lib"):
        (bundle / name).mkdir(parents=True)
    program = root / "usr/sbin/criu"
    shutil.copyfile(program, bundle / "bin/criu")
    for library in closure([program], root):
        shutil.copyfile(library, bundle / "lib" / library.name)
    licences.copy((deb.name for deb in debs), root, bundle / "share")
    files = sorted(p for p in bundle.rglob("*") if p.is_file())
    for path in files:
        runs = path.name == "criu" or path.name.startswith("ld-linux-")
        path.chmod(0o755 if runs else 0o644)
    criu = next(deb for deb in debs if deb.name == "criu")
    lines = [f"criu {criu.version}", *(deb.line for deb in debs)]
    lines += [f"file {path.relative_to(bundle)} {sha256(path)}" for path in files]
    (bundle / "VERSION").write_text("\n".join(lines) + "\n")
    return bundle


def check(bundle: Path) -> str:
    """CRIU's version, after every file of the bundle was compared with its record.

    Raises Failure when a file is missing or differs, or when the program does not start.
    """
    version, *records = (bundle / "VERSION").read_text().splitlines()
    for record in records:
        kind, _, rest = record.partition(" ")
        path, _, wanted = rest.rpartition(" ")
        if kind == "file" and (not (bundle / path).is_file() or sha256(bundle / path) != wanted):
            raise Failure(f"{bundle / path} is not the file that {bundle}/VERSION records")
    loader = next((bundle / "lib").glob("ld-linux-*"))
    criu = bundle / "bin" / "criu"
    run([loader, "--inhibit-cache", "--library-path", bundle / "lib", criu, "--version"])
    return version


def _cached(entry: Path) -> bool:
    """Whether the cache holds a whole bundle; a damaged one is thrown away."""
    if not entry.exists():
        return False
    try:
        check(entry)
    except (Failure, OSError, ValueError) as problem:
        say("bundle", f"the cached bundle is damaged, making it anew: {problem}")
        shutil.rmtree(entry)
        return False
    return True


def _make(entry: Path) -> None:
    say("bundle", f"fetching CRIU of Debian {RELEASE} through the host's mirror")
    with (
        archive(RELEASE) as release,
        tempfile.TemporaryDirectory(dir=entry.parent, prefix=".new-") as name,
    ):
        bundle = _lay_out(release.download(["criu"]), Path(name))
        check(bundle)
        replace_tree(bundle, entry)
    keep_only(entry, entry.parent.glob("[!.]*"))


def body(arguments: list[str]) -> None:
    if arguments:
        raise Failure("usage: bundle.py (REFRESH=1 in the environment makes it anew)")
    names = ("bundle.py", "elf.py", "licences.py")
    recipe = [Path(__file__).with_name(name).read_bytes() for name in names]
    key = digest(RELEASE, architecture(), *recipe)
    entry = cache_folder("bundle") / key
    if os.environ.get("REFRESH") or not _cached(entry):
        _make(entry)
    if not TARGET.exists() or (TARGET / "VERSION").read_bytes() != (entry / "VERSION").read_bytes():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD, prefix=".bundle-") as name:
            shutil.copytree(entry, Path(name) / "bundle")
            replace_tree(Path(name) / "bundle", TARGET)
    say("bundle", check(TARGET))


if __name__ == "__main__":
    main("bundle", body)
