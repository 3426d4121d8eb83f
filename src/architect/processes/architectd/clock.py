"""The idle clock of one container: gathers what is known, asks :mod:`architect.decisions.idle`.

Called by :class:`.container.ManagedContainer`, which starts and stops it as its state says.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from architect.adapters import cgroup, healthproxy, listeners
from architect.adapters.gate import GateError
from architect.contract.annotations import ContainerSettings, Monitor
from architect.contract.records import ContainerRecord
from architect.decisions import idle
from architect.processes.architectd.gates import Place

_SECOND_NS: Final = 10**9
_BACKOFF_S: Final = 10.0
_LONGEST_BACKOFF_S: Final = 600.0
"""Seconds until the next try after a failed dump: at first, doubled each time, and at the most."""
_PROBE_S: Final = 0.1
"""Seconds between two looks for a probe's processes."""
_SHORTEST_S: Final = 0.05
"""Seconds between two looks at the least, whatever the rounding."""


class IdleClock:
    """Calls ``expired`` once the container has been idle for its scaledown duration."""

    def __init__(
        self, record: ContainerRecord, settings: ContainerSettings, expired: Callable[[], None]
    ) -> None:
        self.leases = 0
        """Engine calls under way that need the container awake."""
        self.probes = 0
        """Engine calls under way that start a probe."""
        self.unready = False
        """Whoever probes it has not seen it healthy yet, or does not any more."""
        self.failures = 0
        """Dumps in a row that have failed; each makes the next look come later."""
        self.place: Place | None = None
        self.cgroup: cgroup.Cgroup | None = None
        self.init = 0
        self.settings = settings
        self._record = record
        self._expired = expired
        self._timer: asyncio.TimerHandle | None = None
        self._touched = 0
        self._held = False

    def touch(self) -> None:
        """Something counts as activity now."""
        self._touched = time.monotonic_ns()

    def release(self) -> None:
        """An engine's call has ended. What it leaves behind is looked for: a session, a pause."""
        self.leases -= 1
        self.touch()
        if self._timer is not None:
            self.start(0.0)

    def start(self, first_look_s: float | None = None) -> None:
        """Lets it run; the first look comes after a whole scaledown duration unless said otherwise."""
        self.stop()
        if first_look_s is None:
            self._held = False
            first_look_s = self.settings.scaledown_ns / _SECOND_NS
            if self.failures:
                backoff = _BACKOFF_S * 2.0 ** (self.failures - 1)
                first_look_s = max(first_look_s, min(backoff, _LONGEST_BACKOFF_S))
        wanted = self.settings.managed and self.settings.autoscaledown
        if wanted and self._record.ports is not None:
            self._timer = asyncio.get_running_loop().call_later(first_look_s, self._look)

    def stop(self) -> None:
        """Stops it."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def idle_s(self) -> float:
        """Seconds since the last activity."""
        return round(max(0, time.monotonic_ns() - self._last_activity()) / _SECOND_NS, 1)

    def probe_begins(self) -> None:
        """An engine starts a probe's command."""
        self.probes += 1
        self._tell_probed(now=True)

    def probe_started(self) -> None:
        """It has started it. What it does over lo counts for nothing until it has ended."""
        self.probes -= 1
        asyncio.get_running_loop().call_later(_PROBE_S, self._look_for_probes)

    def _look_for_probes(self) -> None:
        running = self.probes > 0 or (
            self.cgroup is not None
            and cgroup.run_by(self._outsiders(self.cgroup), self._record.probes)
        )
        if running:
            asyncio.get_running_loop().call_later(_PROBE_S, self._look_for_probes)
        else:
            self._tell_probed(now=False)

    def _tell_probed(self, *, now: bool) -> None:
        if self.place is not None:
            with contextlib.suppress(GateError, OSError):
                self.place.probed(now=now)

    def sessions(self) -> int:
        """Open exec sessions and probes, and engine calls under way that may become one."""
        if self.cgroup is None:
            return self.leases
        return self.leases + self.probes + len(self._outsiders(self.cgroup))

    def _outsiders(self, group: cgroup.Cgroup) -> dict[int, int]:
        return cgroup.outsiders(group.processes(), self.init, self._record.keeper)

    def _last_activity(self) -> int:
        seen = 0
        if self.place is not None:
            with contextlib.suppress(GateError, OSError):
                seen = self.place.activity().last_ns
        return max(self._touched, seen)

    def _look(self) -> None:
        if self.place is None or self.cgroup is None:
            return
        now = time.monotonic_ns()
        outsiders = self._outsiders(self.cgroup)
        probes = cgroup.run_by(outsiders, self._record.probes)
        verdict = idle.judge(
            idle.Observed(
                now=now,
                last_activity=self._last_activity(),
                scaledown=self.settings.scaledown_ns,
                not_before=self._not_before(now),
                sessions=self.leases + len(outsiders.keys() - probes),
                connections=self.connections(),
                paused=self.cgroup.frozen(),
                unready=self.unready or self._is_failing(),
                probing=self.probes + len(probes) > 0,
                held_before=self._held,
            )
        )
        self._held = isinstance(verdict, idle.Wait) and verdict.held
        if isinstance(verdict, idle.Wait):
            if verdict.counts:
                self._touched = max(self._touched, now)
            self.start(max(_SHORTEST_S, (verdict.until - now) / _SECOND_NS))
        else:
            self._timer = None
            self._expired()

    def _not_before(self, now: int) -> int:
        """When the initial delay is over, on the clock of ``now``."""
        delay = self.settings.initial_delay_ns
        if not delay:
            return 0
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - self._record.first_started
        return now + delay - int(age * _SECOND_NS)

    def _is_failing(self) -> bool:
        space = Path(f"/proc/{self._record.keeper}/ns/net")
        return any(healthproxy.is_failing(space, one) for one in self.settings.health_ports)

    def connections(self) -> int:
        """Open connections, where they keep the container awake."""
        if self.settings.monitor is not Monitor.CONNECTIONS:
            return 0
        ports = {number for protocol, number in self._record.ports or () if protocol == "tcp"}
        ports -= self.settings.ignored_ports | self.settings.others_ports
        found = listeners.connections(self._record.keeper, ports)
        if found and self.settings.shadow_ports:
            shadows = {one.shadow_port for one in self.settings.shadow_ports}
            found -= listeners.translated(self._record.keeper, shadows)
        return len(found)
