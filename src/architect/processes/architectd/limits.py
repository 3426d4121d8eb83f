"""A container's cgroup limits around hibernation and wake.

Called by :class:`.container.ManagedContainer`. A restore must not be throttled, nor hit the memory limit
that CRIU shares with the program; and what the kubelet has lowered for a sleeper is raised before the
restore, because the API's answer cannot be waited for.
"""

from __future__ import annotations

import asyncio
import time
from typing import Final

from architect.adapters import cgroup
from architect.adapters.cpuweight import Boosts
from architect.contract.records import ContainerRecord
from architect.contract.states import State
from architect.decisions.limits import Verdict, judge

_ON_ITS_WAY_S: Final = 0.25
"""The kubelet lowers the pod's own limits right after its containers': so long, in seconds, a wake waits
for it at the most if that is just happening. Else they would be lowered under the woken program."""
_LOOK_S: Final = 0.002
_SETTLED_S: Final = 10.0
"""Seconds after a wake until no update that was meant for the sleeper can be under way any more."""
_AGAIN_S: Final = (0.02, 0.1, 0.5, 2.0)
"""Seconds after a wake at which limits are looked at again that were lowered while it slept."""


class Limits:
    """See the module."""

    def __init__(self, record: ContainerRecord, boosts: Boosts) -> None:
        self._record = record
        self._boosts = boosts
        self._boosted: dict[str, str] = {}
        self._skipped = 0.0
        self._woken = 0.0
        self._timers: list[asyncio.TimerHandle] = []

    def remember(self, group: cgroup.Cgroup) -> None:
        """It is hibernated: what holds now is what it must find when it wakes."""
        self.cancel()
        if self._record.pod_uid:
            self._record.limits = self._boosts.originals(group.limits())

    async def lift(self, group: cgroup.Cgroup) -> None:
        """Before a restore: back to what was remembered, and beyond."""
        self._woken = time.monotonic()
        end = self._skipped + _ON_ITS_WAY_S
        # Nothing but looking tells when the kubelet has written to a cgroup.
        while time.monotonic() < end and not cgroup.lowered(self._record.limits):  # noqa: ASYNC110
            await asyncio.sleep(_LOOK_S)
        if cgroup.lowered(self._record.limits):
            cgroup.raise_limits(self._record.limits)
            loop = asyncio.get_running_loop()
            self._timers = [loop.call_later(after, self._again) for after in _AGAIN_S]
        self._boosted = self._boosts.take(group)
        self._record.lifted = group.lift_limits() | self._boosted

    def put_back(self) -> bool:
        """After a restore, or at the daemon's start: what was lifted beyond; whether there was any."""
        lifted, self._record.lifted = self._record.lifted, {}
        boosted, self._boosted = self._boosted, {}
        cgroup.return_limits({file: lifted[file] for file in lifted.keys() - boosted.keys()})
        self._boosts.give_back(boosted)
        return bool(lifted)

    def cancel(self) -> None:
        """The container has ended, or sleeps."""
        for timer in self._timers:
            timer.cancel()
        self._timers = []

    def judge(self, resources: str, state: State) -> Verdict:
        """Whether runc may change the limits, asked by runc-architect before it does."""
        asleep = state in (State.SCALED_DOWN, State.STRANDED)
        verdict = judge(
            resources,
            remembered=cgroup.memory_limit(self._record.limits),
            asleep=asleep,
            settled=state is not State.SCALING_UP and time.monotonic() - self._woken > _SETTLED_S,
        )
        if verdict is Verdict.SKIP:
            self._skipped = time.monotonic()
        return verdict

    def _again(self) -> None:
        cgroup.raise_limits(self._record.limits)
