"""Root file systems made of Debian packages, and layers of images made of folders.

Called by image.py and component_image.py.
"""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

from debs import Deb

# Documentation that no container reads; licences stay.
_UNWANTED = (
    "usr/share/doc",
    "usr/share/info",
    "usr/share/locale",
    "usr/share/man",
    "usr/share/lintian",
)


def lay_out(debs: list[Deb], root: Path) -> None:
    """Unpack the packages into the new folder `root`, with the users that Debian starts with."""
    root.mkdir()
    # First the one whose links make /bin, /lib and /sbin parts of /usr.
    for deb in sorted(debs, key=lambda deb: deb.name != "base-files"):
        deb.unpack(root)
    for kind in ("passwd", "group"):
        shutil.copyfile(root / f"usr/share/base-passwd/{kind}.master", root / f"etc/{kind}")


def _is_unwanted(path: str) -> bool:
    return path.startswith(_UNWANTED) and Path(path).name != "copyright"


def _members(root: Path) -> Iterator[tuple[Path, str]]:
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if not path.is_symlink() and path.is_dir():
            if not name.startswith(_UNWANTED) or any(path.rglob("copyright")):
                yield path, name
        elif not _is_unwanted(name):
            yield path, name


def without_time(info: tarfile.TarInfo) -> tarfile.TarInfo:
    """A filter for TarFile.add: the same content gives the same archive on any day."""
    info.mtime = 0
    info.uname = info.gname = ""
    return info


def write_layer(root: Path, layer: Path) -> None:
    """The tree as an uncompressed tar; the same tree gives the same bytes."""
    with tarfile.open(layer, "w", format=tarfile.PAX_FORMAT) as tar:
        for path, name in _members(root):
            info = without_time(tar.gettarinfo(path, name))
            if info.isreg():
                with path.open("rb") as file:
                    tar.addfile(info, file)
            else:
                tar.addfile(info)
