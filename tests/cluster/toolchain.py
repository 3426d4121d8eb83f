"""Which Go builds the cluster's programs, and with what environment.

Debian 12 has Go 1.19, which cannot build them. Any Go from 1.21 on fetches the toolchain that a
go.mod asks for through the module proxy, verified by the checksum database (go.dev/doc/toolchain).
So the machine's own Go is used if it is that new, and otherwise one of Debian 13, unpacked into
the cache without touching the machine. Called by build.py.
"""

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Final

from common import architecture, cache_folder, digest, keep_only, replace_tree, say
from debs import archive
from tests.cluster.base import ClusterError, run

RELEASE: Final = "trixie"
PACKAGE: Final = "golang-1.24-go"
_INSIDE: Final = "usr/lib/go-1.24/bin/go"
_FIRST: Final = (1, 21)
"""The first version that fetches newer ones."""


def version(text: str) -> tuple[int, int]:
    """The version in what `go version` prints; (0, 0) if there is none."""
    found = re.search(r"\bgo(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def environment() -> dict[str, str]:
    """The whole environment of a build: nothing of the user's settings for Go changes it.

    Modules and compiled packages are kept below our own cache, so that they can be found and
    removed; only settings that say how to reach the network come from outside.
    """
    passed = ("GOPROXY", "GOSUMDB", "GOPRIVATE", "GONOPROXY", "GOINSECURE", "SSL_CERT_FILE")
    proxies = ("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY")
    kept = {name: os.environ[name] for name in (*passed, *proxies) if name in os.environ}
    return kept | {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(Path.home()),
        "LC_ALL": "C.UTF-8",
        "GOMODCACHE": str(cache_folder("go/modules")),
        "GOCACHE": str(cache_folder("go/packages")),
        "GOPATH": str(cache_folder("go/path")),
        "GOENV": "off",
        "GOWORK": "off",
        "GOTELEMETRY": "off",
        "GOTOOLCHAIN": "auto",
        # A read-only module cache could be removed by nothing but go itself.
        "GOFLAGS": "-mod=readonly -modcacherw -buildvcs=false",
    }


def go() -> Path:
    """A Go that builds whatever go.mod asks for: this machine's, or Debian 13's.

    Raises Failure when neither can be had.
    """
    found = shutil.which("go", path=f"{os.environ.get('PATH', '')}:/usr/local/go/bin")
    if found is not None:
        said = run(found, "version", env={**environment(), "GOTOOLCHAIN": "local"})
        if version(said) >= _FIRST:
            return Path(found)
    return _from_debian()


def _from_debian() -> Path:
    folder = cache_folder("go")
    target = folder / f"debian-{digest(RELEASE, PACKAGE, architecture())}"
    if not target.exists():
        say("cluster", f"fetching {PACKAGE} of Debian {RELEASE}; nothing is installed")
        with (
            archive(RELEASE) as source,
            tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as name,
        ):
            # Without what it depends on for cgo: of this Go only the fetching is used.
            for deb in source.download([PACKAGE]):
                if deb.name.startswith("golang-"):
                    deb.unpack(Path(name) / "root")
            replace_tree(Path(name) / "root", target)
        keep_only(target, folder.glob("debian-*"))
    program = target / _INSIDE
    if not program.exists():
        raise ClusterError(
            f"{PACKAGE} of Debian {RELEASE}", f"has no {_INSIDE}", f"remove {target} and try again"
        )
    return program
