"""Debian packages of a given release, on a host of another: fetched, verified, unpacked.

Works beside the host's apt, never through it: a private state directory, so that the host's
sources, lists and dpkg database stay as they are. The mirror is the one that the host already
uses, and the release's signature is checked by apt against Debian's archive keyring. Called by
bundle.py and image.py.
"""

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import Failure, architecture, run, sha256

KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")


@dataclass(frozen=True)
class Deb:
    """A package file whose digest apt has checked against the signed index."""

    path: Path
    name: str
    version: str
    architecture: str

    @property
    def line(self) -> str:
        """For records of what something was made from."""
        return f"deb {self.name} {self.version} {self.architecture} {sha256(self.path)}"

    def unpack(self, into: Path) -> None:
        """Lay out the package's files; no maintainer script runs."""
        run(["dpkg-deb", "--extract", self.path, into])


def _host_archives() -> Iterator[tuple[str, str]]:
    """(label, base URI) of each archive of Debian's own that the host's apt uses."""
    targets = ["apt-get", "indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"]
    for line in dict.fromkeys(run(targets).splitlines()):
        origin, label, uri = line.split("|", 2)
        if origin == "Debian" and uri and not uri.startswith("cdrom:"):
            yield label, uri


def mirrors() -> dict[str, list[str]]:
    """Base URIs the host's apt uses, by label: "Debian" and, where it is, "Debian-Security".

    Raises Failure when the host's apt knows no archive of Debian's.
    """
    found = list(_host_archives())
    if not found:
        # Origin and label stand in the release files, which a new machine has not fetched yet.
        run(["apt-get", "-qq", "update"])
        found = list(_host_archives())
    by_label: dict[str, list[str]] = {}
    for label, uri in found:
        by_label.setdefault(label, []).append(uri)
    if "Debian" not in by_label:
        raise Failure(
            "the host's apt sources name no mirror of Debian (origin and label 'Debian'); "
            "add one to /etc/apt/sources.list.d and run apt-get update"
        )
    return by_label


class Archive:
    """One Debian release, reachable through a private apt; made by `archive`."""

    def __init__(self, folder: Path, release: str) -> None:
        self._folder = folder
        self._release = release
        self._architecture = architecture()
        for name in ("lists/partial", "archives/partial"):
            (folder / name).mkdir(parents=True)
            # apt downloads as this user; without the right it would do so as root, and warn.
            shutil.chown(folder / name, "_apt")
        (folder / "status").touch()

    def _apt(self, *arguments: str) -> str:
        folder = self._folder
        settings = {
            "Dir::State": folder,
            "Dir::State::lists": folder / "lists",
            "Dir::State::status": folder / "status",
            "Dir::Cache": folder,
            "Dir::Cache::archives": folder / "archives",
            "Dir::Etc::sourcelist": folder / "sources.list",
            "Dir::Etc::sourceparts": "/dev/null",
            "Dir::Etc::preferences": "/dev/null",
            "Dir::Etc::preferencesparts": "/dev/null",
            "APT::Architecture": self._architecture,
            "APT::Install-Recommends": "false",
            "APT::Get::AllowUnauthenticated": "false",
            "APT::Update::Error-Mode": "any",
            "Acquire::AllowInsecureRepositories": "false",
            "Acquire::AllowDowngradeToInsecureRepositories": "false",
            "Acquire::Languages": "none",
            "Acquire::IndexTargets::deb::DEP-11::DefaultEnabled": "false",
            "Acquire::Retries": "2",
        }
        options = [f"-o{name}={value}" for name, value in settings.items()]
        environment = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8"}
        shown = " ".join(["apt-get", *arguments])
        return run(["apt-get", "-qq", *options, *arguments], env=environment, shown=shown)

    def open(self, by_label: dict[str, list[str]]) -> None:
        """Fetch the release's index from the first of the mirrors that has it."""
        if not KEYRING.exists():
            raise Failure(f"{KEYRING} is missing: apt-get install debian-archive-keyring")
        marks = f"[arch={self._architecture} signed-by={KEYRING}]"
        security = [
            f"deb {marks} {uri} {self._release}-security main\n"
            for uri in by_label.get("Debian-Security", [])[:1]
        ]
        tried: list[str] = []
        for uri in by_label["Debian"]:
            source = f"deb {marks} {uri} {self._release} main\n"
            (self._folder / "sources.list").write_text("".join([source, *security]))
            try:
                self._apt("update")
            except Failure as failure:
                tried.append(f"{uri}: {failure}")
            else:
                return
        raise Failure(
            f"Debian {self._release} is not reachable through the mirrors of this host's apt "
            "(nothing else is ever asked):\n" + "\n".join(tried)
        )

    def download(self, packages: Iterable[str]) -> list[Deb]:
        """These packages with everything that they depend on, without recommendations."""
        self._apt("install", "--yes", "--download-only", *packages)
        fields = ["Package", "Version", "Architecture"]
        show = ["dpkg-deb", "--show", "--showformat", "|".join(f"${{{f}}}" for f in fields)]
        paths = sorted((self._folder / "archives").glob("*.deb"))
        return [Deb(path, *run([*show, path]).split("|")) for path in paths]

    def clear(self) -> None:
        """Forget the downloaded packages, so that the next download returns only its own."""
        for path in (self._folder / "archives").glob("*.deb"):
            path.unlink()


@contextmanager
def archive(release: str) -> Iterator[Archive]:
    """A Debian release by its code name, as "trixie", until the end of the with block.

    Raises Failure when no mirror of the host has it, or when a signature or digest is wrong.
    """
    if os.geteuid() != 0:
        raise Failure("run as root: apt's sandbox and the files' owners need it")
    # Not in the home directory, which apt's download user cannot enter.
    with tempfile.TemporaryDirectory(prefix="architect-apt-", dir="/var/tmp") as name:
        folder = Path(name)
        folder.chmod(0o755)
        opened = Archive(folder, release)
        opened.open(mirrors())
        yield opened
