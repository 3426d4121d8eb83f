"""Drives CRIU (criu(8)): the words of a dump and of a restore, and what a failed one says.

Called by the daemon. A dump is a child of the daemon, outside the container's cgroup; a restore is
started by the keeper, which must be the new init's parent, from the words written here.

CRIU is never killed: between its parasite's arrival and departure that would take the program with it.
A dump is given up through its own hook (native/criu-hook), which asks :class:`DumpHook`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from architect.adapters import cgroup
from architect.contract import paths
from architect.contract.errors import ArchitectError

RESTORE_NETNS_FD = 200
"""As in native/common/control.h."""

RESTORE_LOG = "restore.log"
"""In the container's run directory."""

_GHOST_LIMIT = str(256 << 20)
"""Bytes of an unlinked but open file that may go into the image; CRIU's default of 1 MiB is too small
for databases' temporary files."""

ANY_MODE = "--skip-file-rwx-check"
"""For a restore on another node: a volume that is attached anew may have other modes there (fsGroup)."""

_COMMON = (
    "--tcp-established",
    "--file-locks",
    "--ext-unix-sk",
    "--manage-cgroups=ignore",
    "--network-lock",
    "skip",
)


class CriuError(ArchitectError):
    """CRIU gave up; ``why`` has what its log says."""


@dataclass(frozen=True, slots=True)
class Subject:
    """What CRIU must be told of a container."""

    init: int
    keeper: int
    rootfs: str
    netns_inode: int
    mounts: Sequence[tuple[str, str]]
    """(mount point, where it is kept on the host)."""
    pipes: Mapping[str, int]
    """CRIU's name of each pipe or socket of its standard streams -> the keeper's descriptor."""
    join: Sequence[str]
    """Namespaces that outlive the program and are joined again: ipc, uts."""


def command(bundle: Path | None = None) -> list[str]:
    """The words that start CRIU through the bundle's own loader, whatever the host's libc is.

    The copy in memory (``paths.HOT``) is preferred to the one on the disk.
    """
    for place in (bundle,) if bundle else (paths.HOT / "criu", paths.BUNDLE):
        loader = place / "lib" / "ld-linux-x86-64.so.2"
        if loader.exists():
            here = place / "lib" / paths.CRIU_COMPAT.name
            preloaded = here if here.exists() else paths.CRIU_COMPAT
            libraries = ["--library-path", str(place / "lib"), "--preload", str(preloaded)]
            return [str(loader), *libraries, str(place / "bin" / "criu")]
    raise CriuError(
        what="CRIU is not there",
        why=f"neither {paths.HOT}/criu nor {paths.BUNDLE} has it",
        fix="run `make install` again",
    )


def dump_words(subject: Subject, images: Path) -> list[str]:
    """The command that dumps ``subject`` into ``images`` and asks the hook before it ends it."""
    words = [
        *command(), "dump", "--tree", str(subject.init), "--images-dir", str(images),
        "--log-file", "dump.log", "-v2", "--root", subject.rootfs,
        "--external", f"net[{subject.netns_inode}]:net",
        "--link-remap", "--ghost-limit", _GHOST_LIMIT,
        "--action-script", str(paths.CRIU_HOOK), *_COMMON,
    ]  # fmt: skip
    for point, _ in subject.mounts:
        words += ["--external", f"mnt[{point}]:{point}"]
    return words


def restore_words(subject: Subject, images: Path, pid_file: Path) -> list[str]:
    """The command that the keeper runs to restore from ``images``; it adds --lazy-pages itself.

    CRIU's log goes where the pid file goes: a wake creates no file on a disk.
    """
    words = [
        *command(), "restore", "--restore-detached", "--restore-sibling",
        "--images-dir", str(images), "--work-dir", str(pid_file.parent), "--log-file", RESTORE_LOG, "-v1",
        "--root", subject.rootfs, "--pidfile", str(pid_file),
        "--inherit-fd", f"fd[{RESTORE_NETNS_FD}]:net", *_COMMON,
    ]  # fmt: skip
    for kind in subject.join:
        words += ["--join-ns", f"{kind}:/proc/{subject.keeper}/ns/{kind}"]
    for name, descriptor in subject.pipes.items():
        words += ["--inherit-fd", f"fd[{descriptor}]:{name}"]
    for point, kept in subject.mounts:
        words += ["--external", f"mnt[{point}]:{kept}"]
    return words


def write_recipe(run: Path, words: Sequence[str]) -> None:
    """Leaves the restore command where the keeper reads it: in the container's run directory."""
    (run / "restore.argv").write_bytes(b"\0".join(word.encode() for word in words) + b"\0")


def stdio(init: int, keeper: int) -> dict[str, int]:
    """Pipes and sockets that the program shares with its keeper, by CRIU's name (``pipe:[7]``)."""
    held: dict[str, int] = {}
    for descriptor in (0, 1, 2):
        with contextlib.suppress(OSError):
            target = Path(f"/proc/{keeper}/fd/{descriptor}").readlink()
            if str(target).startswith(("pipe:", "socket:")):
                held[str(target)] = descriptor
    return held


_HARMLESS = re.compile(
    r"Can't setup RLIMIT_NOFILE"  # without CAP_SYS_RESOURCE; it goes on with the limit there is
    r"|opt: Operation not supported"  # socket options of other families, asked for to be sure
    r"|FAILED\.?$"  # the epitaph, which says nothing of the cause
)


def reason(log: Path) -> str:
    """Why CRIU gave up, out of its log: the last errors that are not known to be harmless."""
    try:
        text = log.read_text(errors="replace")
    except OSError:
        return "CRIU wrote no log"
    errors = [line.strip() for line in re.findall(r"Error \([^)]*\): (.*)", text)]
    errors = [line for line in errors if not _HARMLESS.search(line)]
    return " / ".join(dict.fromkeys(errors[-3:])) or "no error in its log"


class DumpHook:
    """Answers CRIU's question at the end of a dump. One for each dump.

    ``asked`` is called once, when every image is written and the program is still frozen;
    :meth:`answer` then decides. Closing it unanswered thaws the program.
    """

    def __init__(self, path: Path, asked: Callable[[], None]) -> None:
        self._path = path
        self._asked = asked
        self._answer: bool | None = None
        self._peer: socket.socket | None = None
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        self._listener.bind(str(path))
        self._listener.listen(1)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    @property
    def environment(self) -> dict[str, str]:
        """What CRIU's environment must have for the hook to find this."""
        return {"ARCHITECT_HOOK_SOCKET": str(self._path)}

    def _accept(self) -> None:
        if self._peer is None:
            self._peer, _ = self._listener.accept()
            self._asked()

    def answer(self, *, end_it: bool) -> None:
        """Tells CRIU to end the program, or to thaw it."""
        if self._peer is not None:
            with contextlib.suppress(OSError):
                self._peer.send(b"y" if end_it else b"n")
            self._peer.close()

    def close(self) -> None:
        """Takes the socket away."""
        asyncio.get_running_loop().remove_reader(self._listener)
        self._listener.close()
        if self._peer is not None:
            self._peer.close()
        self._path.unlink(missing_ok=True)


async def run(words: Sequence[str], environment: Mapping[str, str], pid_file: Path) -> int:
    """Runs CRIU to its end and returns its exit status.

    Its pid is in ``pid_file`` while it runs, so that a daemon that starts in mid-dump can wait for it.
    It is not killed when the caller is cancelled or the daemon dies.
    """
    process = await asyncio.create_subprocess_exec(
        *words,
        env={**os.environ, **environment},
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
        # Its log names files and addresses; the images it keeps to itself anyway.
        umask=0o077,
    )
    _shield(process.pid)
    with contextlib.suppress(OSError):
        cgroup.leave(process.pid)
    pid_file.write_text(str(process.pid))
    status = await process.wait()
    pid_file.unlink(missing_ok=True)
    return status


def _shield(pid: int) -> None:
    """The OOM killer must not choose CRIU in mid-dump; without CAP_SYS_RESOURCE this is refused.

    From outside: Python code between fork and exec may wait for ever for a lock that another thread held.
    """
    with contextlib.suppress(OSError):
        Path(f"/proc/{pid}/oom_score_adj").write_text("-1000")
