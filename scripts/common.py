"""What the build and install scripts share: how to fail, run, hash and cache.

They run on a bare machine before anything is installed, with /usr/bin/python3 (3.11 or later) and
the standard library only, as root. Called by the other scripts in this folder, never by the
package.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BUILD = REPOSITORY / "build"


class Failure(Exception):
    """One sentence for the user: what failed, why, and what to do."""


def run(
    command: Sequence[str | Path], *, env: dict[str, str] | None = None, shown: str = ""
) -> str:
    """Run a command and return its standard output; its errors become a Failure.

    `env` adds to the environment; `shown` stands for a long command line in the message.
    """
    done = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
        env=None if env is None else {**os.environ, **env},
        check=False,
    )
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip() or "it said nothing").splitlines()
        words = shown or " ".join(map(str, command))
        raise Failure(f"{words!r} ended with {done.returncode}: " + "\n  ".join(said[-15:]))
    return done.stdout


def say(program: str, text: str) -> None:
    """One line of progress on standard output."""
    print(f"{program}: {text}", flush=True)


def sha256(path: Path) -> str:
    """The file's SHA-256 in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(*parts: str | bytes) -> str:
    """A key over these parts, for caches: 16 hex digits, with no part running into the next."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(len(data).to_bytes(8, "big") + data)
    return total.hexdigest()[:16]


def cache_folder(kind: str) -> Path:
    """A folder that outlives the checkout: ${XDG_CACHE_HOME:-~/.cache}/architect/KIND."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "architect" / kind
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def keep_only(entry: Path, entries: Iterable[Path]) -> None:
    """Remove a cache's other entries: what older recipes made."""
    for other in entries:
        if other != entry and other.is_dir():
            shutil.rmtree(other, ignore_errors=True)
        elif other != entry:
            other.unlink(missing_ok=True)


def replace_tree(new: Path, target: Path) -> None:
    """Put the finished folder `new` at `target`, whatever was there before."""
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    new.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def architecture() -> str:
    """Debian's name for this machine's architecture, such as amd64."""
    return run(["dpkg", "--print-architecture"]).strip()


def main(program: str, body: Callable[[list[str]], None]) -> None:
    """Run a script's body; a Failure becomes one message and exit code 1."""
    try:
        body(sys.argv[1:])
    except Failure as failure:
        sys.exit(f"{program}: {failure}")
    except KeyboardInterrupt:
        sys.exit(130)
