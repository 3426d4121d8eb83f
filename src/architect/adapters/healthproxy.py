"""The process that answers a pod's probes, where no sidecar does: under Podman and bare containerd.

Called by the daemon for containers with health-check-proxy outside Kubernetes. The process lives in the
pod's network namespace (native/health-check-proxy), outlives the daemon, and is found again by what it runs.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
from collections.abc import Collection
from pathlib import Path
from typing import Final

from architect.adapters import cgroup, netns
from architect.contract import paths
from architect.contract.annotations import PortMapping

_NOBODY: Final = 65532
"""Needs no right to anything, as the sidecar."""


def find(pid: int, namespace: Path, mappings: Collection[PortMapping]) -> int:
    """The process that serves exactly these mappings in a network namespace; 0 if there is none.

    ``pid`` is which it was when somebody last wrote that down; 0 if there never was one, and then nobody
    looks. Raises OSError.
    """
    parts, space = _parts(_command(mappings)), namespace.stat().st_ino
    # The one that was written down may have had a successor since.
    others = (int(entry) for entry in os.listdir("/proc") if entry.isdigit())
    for one in (pid, *others) if pid else ():
        if _parts(_words(one)) == parts:
            with contextlib.suppress(OSError):
                if Path(f"/proc/{one}/ns/net").stat().st_ino == space:
                    return one
    return 0


def start(namespace: Path, mappings: Collection[PortMapping], log: Path) -> int:
    """Has these mappings served in a network namespace; returns the process's pid.

    Raises OSError, netns.NetnsError.
    """
    space = netns.open_netns(namespace)
    try:
        with netns.entered(space), log.open("wb") as output:
            process = subprocess.Popen(
                _command(mappings),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                cwd="/",
                start_new_session=True,
                user=_NOBODY,
                group=_NOBODY,
                extra_groups=[],
            )
    finally:
        os.close(space)
    cgroup.leave(process.pid)
    return process.pid


def is_failing(namespace: Path, mapping: PortMapping) -> bool:
    """Whether the program was not healthy when it was last probed, or has never been seen healthy.

    The proxy has a name for as long (native/health-check-proxy/failing.c). Without a proxy nobody says so.
    """
    name = f"\0architect/failing/{mapping.container}/{mapping.shadow_port}"
    try:
        space = netns.open_netns(namespace)
    except netns.NetnsError:
        return False
    try:
        with (
            netns.entered(space),
            socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as asking,
        ):
            asking.connect(name)
    except (OSError, netns.NetnsError):
        return False
    finally:
        os.close(space)
    return True


def end(pid: int) -> None:
    """Ends the process, if it is still one of ours."""
    if pid and _words(pid)[:1] == [str(paths.PROXY_PROGRAM)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)


def _command(mappings: Collection[PortMapping]) -> list[str]:
    words = [str(paths.PROXY_PROGRAM)]
    for one in mappings:
        words += ["--map", f"{one.container}:{one.shadow_port}:{one.app_port}"]
    return words


def _words(pid: int) -> list[str]:
    """Its command line (proc(5)), in which the program has ended the parts of each mapping (arguments.c)."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode().split("\0")[:-1]
    except (OSError, UnicodeDecodeError):
        return []


def _parts(words: list[str]) -> list[str]:
    return [part for word in words for part in word.split(":")]
