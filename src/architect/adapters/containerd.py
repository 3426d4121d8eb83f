"""containerd of this node: which process it is, and one careful restart.

Its containers go on running meanwhile: they belong to shims. Called by processes/node, from a
container that sees the node's processes (hostPID) and has its root directory mounted.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from architect.adapters import cri
from architect.adapters.hostfiles import Host
from architect.contract.errors import ArchitectError

UP_S: Final = 60.0
"""How long containerd may take to come up with its configuration."""
_STOP_S: Final = 30.0
"""How long it may take to end after SIGTERM; it does within a second."""
_SYSTEMCTL_S: Final = 180.0
"""More than systemd's own limit for starting a service (TimeoutStartSec, 90 s)."""
_POLL_S: Final = 0.1
_ASK_S: Final = 5.0
_PROC: Final = Path("/proc")


@dataclass(frozen=True, slots=True)
class Service:
    """A running containerd."""

    pid: int
    started: float
    """CLOCK_BOOTTIME seconds."""
    config: str | None
    """The configuration that its command line names; None for its default."""
    path: str
    """Where it looks for programs: PATH of its environment."""


def boot_time() -> float:
    """CLOCK_BOOTTIME seconds, the clock of /proc/PID/stat."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


def _stat(pid: str) -> tuple[str, int, float]:
    """Name, parent and start (proc(5), /proc/PID/stat)."""
    head, _, tail = (_PROC / pid / "stat").read_text().rpartition(")")
    fields = tail.split()
    return head.partition("(")[2], int(fields[1]), int(fields[19]) / os.sysconf("SC_CLK_TCK")


def _option(words: list[str]) -> str | None:
    """The value of --config or -c."""
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word in ("--config", "-config", "-c"):
            return following or None
        if word.startswith("--config="):
            return word.partition("=")[2] or None
    return None


def services() -> list[Service]:
    """Every containerd that is a service of this node, not of a container on it.

    One is told by its mount namespace, which is that of process 1; its shims have other names.
    """
    found = []
    for pid in filter(str.isdecimal, os.listdir(_PROC)):
        with contextlib.suppress(OSError, IndexError, ValueError):
            name, parent, started = _stat(pid)
            if name != "containerd" or _stat(str(parent))[0] == "containerd":
                continue
            here = _PROC / pid
            if (here / "ns/mnt").readlink() != (_PROC / "1/ns/mnt").readlink():
                continue
            words = (here / "cmdline").read_bytes().decode(errors="replace").split("\0")
            environment = (here / "environ").read_bytes().decode(errors="replace").split("\0")
            path = next((x[5:] for x in environment if x.startswith("PATH=")), "")
            found.append(Service(int(pid), started, _option(words), path))
    return found


class Restarter:
    """Restarts the containerd that reads one configuration, and sees that it serves.

    ``config`` is the path of the configuration, ``socket`` that of containerd's socket on the node,
    ``units`` the systemd units that may be the service.
    """

    def __init__(
        self, host: Host, config: str, is_default: bool, socket: str, units: tuple[str, ...]
    ) -> None:
        self._host = host
        self._config = config
        self._is_default = is_default
        self._socket = socket
        self._units = units

    def service(self) -> Service | None:
        """The running one; None if it does not run."""
        return self._one_of(services())

    def _one_of(self, found: list[Service]) -> Service | None:
        for one in found:
            if one.config == self._config or (one.config is None and self._is_default):
                return one
        return None

    @property
    def _has_systemd(self) -> bool:
        return self._host.exists("/run/systemd/system")  # sd_booted(3)

    def check(self) -> None:
        """Raise ArchitectError if it could not be restarted."""
        if self._has_systemd:
            self._unit()
        elif self._units != ("containerd",):
            # Its containerd is a child of the distribution's own program, which ends with it.
            names = " or ".join(self._units)
            raise ArchitectError(
                "containerd cannot be restarted",
                f"{names} runs it, and there is no systemd on this node to restart that",
                f"use {self._units[0]} with systemd",
            )
        elif self.service() is None:
            raise ArchitectError(
                "containerd cannot be restarted",
                f"no process of this node runs containerd with {self._config}",
                "the pod needs hostPID, and kubernetesDistro must be that of this node",
            )

    def restart(self, handler: str | None) -> None:
        """Restart it, and wait until it serves, with ``handler`` if one is named.

        Raises ArchitectError if it cannot be restarted or is not up within UP_S.
        """
        since = boot_time()
        # Start times have a resolution of one tick, and are rounded down.
        since -= 1 / os.sysconf("SC_CLK_TCK")
        if self._has_systemd:
            self._restart_unit()
        else:
            self._end()
        self.await_up(since, handler)

    def await_up(self, since: float, handler: str | None) -> None:
        """Wait until one that was started after ``since`` serves CRI, with ``handler``."""
        socket = self._host.path(self._socket)
        said = absent = f"no process of this node runs containerd with {self._config}"

        def serves() -> bool:
            nonlocal said
            service = self.service()
            if service is None or service.started < since:
                said = absent if service is None else "it was not started again"
                return False
            try:
                answer = cri.status(socket, _ASK_S)
            except OSError as error:
                said = f"{self._socket}: {error}"
                return False
            said = "its CRI plugin did not start" if not answer else "the kubelet would not see it"
            return bool(answer) and (handler is None or cri.has_handler(answer, handler))

        if not _within(UP_S, serves):
            waited = f"containerd did not come up within {UP_S:.0f} s"
            if handler is not None:
                waited += f" with the runtime handler {handler}"
            raise ArchitectError(waited, said, "its log says why")

    def _unit(self) -> str:
        """The unit that runs it, also while it fails to start: that one is `activating`."""
        for unit in self._units:
            state = self._systemctl("is-active", unit).stdout.strip()
            if state in ("active", "activating", "reloading"):
                return unit
        names = " or ".join(self._units)
        raise ArchitectError(
            "containerd cannot be restarted",
            f"the service {names} does not run on this node",
            "set kubernetesDistro to the distribution of this node",
        )

    def _restart_unit(self) -> None:
        unit = self._unit()
        done = self._systemctl("restart", unit)
        if done.returncode != 0:
            said = done.stderr.strip() or f"exit status {done.returncode}"
            raise ArchitectError(f"systemctl restart {unit}", said, f"see journalctl -u {unit}")

    def _systemctl(self, *words: str) -> subprocess.CompletedProcess[str]:
        command = [*entering(self._host), "systemctl", *words]
        return run(command, _SYSTEMCTL_S)

    def _end(self) -> None:
        """Without systemd: end it, so that whatever supervises it starts it again."""
        service = self.service()
        if service is None:
            # It may just be between two attempts to start.
            return
        with contextlib.suppress(ProcessLookupError):
            pidfd = os.pidfd_open(service.pid)
            try:
                if self.service() == service:
                    signal.pidfd_send_signal(pidfd, signal.SIGTERM)
            finally:
                os.close(pidfd)
        if not _within(_STOP_S, lambda: service not in services()):
            raise ArchitectError(
                f"containerd ({service.pid})", f"it did not end within {_STOP_S:.0f} s of SIGTERM"
            )


def entering(host: Host) -> list[str]:
    """What makes a command one of the node's own (nsenter(1)); nothing where we are the node."""
    return [] if host.root == Path("/") else ["nsenter", "--target", "1", "--mount", "--"]


def run(command: list[str], timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a command to its end. ArchitectError if it is not there or does not end in time."""
    try:
        return subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise ArchitectError(command[0], "there is no such program", "install it") from error
    except subprocess.TimeoutExpired as error:
        words = " ".join(command)
        raise ArchitectError(words, f"it did not end within {timeout_s:.0f} s") from error


def _within(limit_s: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + limit_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(_POLL_S)
    return True
