"""Keeps alive the process that answers a container's probes, outside Kubernetes.

Called by :class:`.traffic.Traffic`. In a cluster that process is the pod's own, a sidecar, and the kubelet
starts it anew. Here the daemon does: it has a pidfd (pidfd_open(2)) of the process on its loop, so that its
end is known at once and nothing is asked meanwhile, whoever was its parent.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from architect.adapters import healthproxy, netns
from architect.contract import paths
from architect.contract.annotations import PortMapping
from architect.contract.records import ContainerRecord

_RETRY_S: Final = 0.5
_LONGEST_RETRY_S: Final = 300.0
"""Seconds from its end until it is started again: at first, doubled each time, at most."""
_BEGUN_S: Final = 1.0
"""Seconds after which a process that cannot do its work at all has said so, and ended."""
_STEADY_S: Final = 60.0
"""Seconds after which its end is a first one again."""
_TAIL_BYTES: Final = 4096
"""As much of its log as is looked at for the last line."""


class Proxy:
    """One container's process."""

    def __init__(
        self, record: ContainerRecord, warn: Callable[[str], None], *, sidecar: bool = False
    ) -> None:
        """``warn`` is called with what a user should know; with a ``sidecar`` there is nothing to do."""
        self._record = record
        self._sidecar = sidecar
        self._warn = warn
        self._mappings: tuple[PortMapping, ...] = ()
        self._pidfd = -1
        self._served: tuple[PortMapping, ...] = ()
        """What the process that ``_pidfd`` refers to was started for."""
        self._began = 0.0
        self._delay = _RETRY_S
        self._told = ""
        self._timer: asyncio.TimerHandle | None = None

    def serve(self, mappings: Collection[PortMapping]) -> None:
        """Has exactly these answered from now on; with none there is no process any more.

        One that an earlier daemon has started goes on.
        """
        if self._sidecar:
            return
        self._mappings = tuple(mappings)
        self._delay, self._told = _RETRY_S, ""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._pidfd < 0:
            if self._mappings:
                self._resume()
            else:
                healthproxy.end(self._record.proxy)
                self._record.proxy = 0
        elif self._mappings != self._served:
            # Its successor, if any, comes when it is gone: both would want the ports.
            self._served = ()
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGTERM)

    def _resume(self) -> None:
        """Finds the process of an earlier daemon, or starts one."""
        before = self._record.proxy
        try:
            found = healthproxy.find(before, self._space, self._mappings)
        except OSError as error:
            self._again(str(error))
            return
        if found:
            self._watch(found)
            return
        if before:
            self._warn(
                f"health-check-proxy has ended while no architectd ran{self._last_words()}; it is "
                "started again"
            )
        self._start()

    def _start(self) -> None:
        self._timer = None
        try:
            pid = healthproxy.start(self._space, self._mappings, self._log)
        except (OSError, netns.NetnsError) as error:
            self._again(str(error))
            return
        self._watch(pid)

    @property
    def _space(self) -> Path:
        return Path(f"/proc/{self._record.keeper}/ns/net")

    @property
    def _log(self) -> Path:
        return paths.CONTAINERS / self._record.id / "health-check-proxy.log"

    def _watch(self, pid: int) -> None:
        self._began = time.monotonic()
        try:
            self._pidfd = os.pidfd_open(pid)
        except OSError as error:
            # No child of this daemon, for that would be a zombie: it has ended just now.
            self._again(str(error))
            return
        self._record.proxy, self._served = pid, self._mappings
        asyncio.get_running_loop().add_reader(self._pidfd, self._ended)

    def _ended(self) -> None:
        asyncio.get_running_loop().remove_reader(self._pidfd)
        how = _end_of(self._pidfd)
        os.close(self._pidfd)
        self._pidfd = -1
        if not self._mappings:
            self._record.proxy = 0
        elif self._served != self._mappings:
            self._start()
        else:
            # The record keeps its pid: a later daemon then looks for a successor.
            lived = time.monotonic() - self._began
            if lived > _BEGUN_S:
                self._told = ""
            if lived > _STEADY_S:
                self._delay = _RETRY_S
            self._again(f"health-check-proxy {how}{self._last_words()}")

    def _last_words(self) -> str:
        try:
            with self._log.open("rb") as file:
                file.seek(max(0, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
                lines = file.read().decode(errors="replace").splitlines()
        except OSError:
            return ""
        last = lines[-1].removeprefix(f"{paths.PROXY_PROGRAM.name}: ") if lines else ""
        return f', its last words: "{last}"' if last else ""

    def _again(self, why: str) -> None:
        """It is started after a while. That it cannot do its work is told once for each reason."""
        if why != self._told:
            self._told = why
            self._warn(
                f"nobody answers its probes: {why}; it is started again in {self._delay:g} s, then after "
                "longer and longer"
            )
        self._timer = asyncio.get_running_loop().call_later(self._delay, self._start)
        self._delay = min(self._delay * 2, _LONGEST_RETRY_S)


def _end_of(pidfd: int) -> str:
    """How a process ended, as far as its parent knows; of a child no zombie is left."""
    result = None
    with contextlib.suppress(ChildProcessError):
        result = os.waitid(os.P_PIDFD, pidfd, os.WEXITED | os.WNOHANG)
    if result is None:
        return "has ended"
    if result.si_code == os.CLD_EXITED:
        return f"ended with status {result.si_status}"
    # With its pid, by which the kernel's log names whom the OOM killer chose.
    return f"(pid {result.si_pid}) was ended by {signal.Signals(result.si_status).name}"
