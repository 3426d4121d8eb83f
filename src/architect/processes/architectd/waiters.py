"""Those who wait for a container to be in some state: engine calls, commands.

Called by :class:`.container.ManagedContainer`.
"""

from __future__ import annotations

import asyncio

from architect.contract.errors import ArchitectError
from architect.contract.states import State
from architect.processes.architectd.subject import NotAsleep

AWAKE = (State.RUNNING, State.FILLING)
"""States in which the program runs and packets pass."""


class NotAwake(ArchitectError):
    """The container could not be woken."""


class Waiters:
    """Futures by what they wait for; each is done once, with nothing or with an ArchitectError."""

    def __init__(self) -> None:
        self._awake: list[asyncio.Future[None]] = []
        self._asleep: list[asyncio.Future[None]] = []
        self._changed: list[asyncio.Future[None]] = []

    def awake(self) -> asyncio.Future[None]:
        """Until the program runs."""
        return _new(self._awake)

    def asleep(self) -> asyncio.Future[None]:
        """Until it is hibernated."""
        return _new(self._asleep)

    def change(self) -> asyncio.Future[None]:
        """Until the next change of state."""
        return _new(self._changed)

    @property
    def want_it_awake(self) -> bool:
        """Whether anybody waits for the program to run."""
        return bool(self._awake)

    def settle(self, state: State, name: str, failure: ArchitectError | None, why: str) -> None:
        """The state has changed: tells those for whom it is there, or will not come."""
        _resolve(self._changed, None)
        if state in AWAKE:
            _resolve(self._awake, None)
            reason = str(failure) if failure else f"it was wanted: {why}"
            _resolve(self._asleep, NotAsleep(f"{name} stays awake", reason, "try again later"))
        elif state is State.SCALED_DOWN:
            _resolve(self._asleep, None)
        elif state is State.STRANDED:
            _resolve(self._awake, failure)
        elif state is State.ENDED:
            gone = NotAwake(f"{name} is gone", "the container has ended", "start it again")
            _resolve(self._awake, gone)
            _resolve(self._asleep, gone)


def _new(waiters: list[asyncio.Future[None]]) -> asyncio.Future[None]:
    waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    waiters.append(waiter)
    return waiter


def _resolve(waiters: list[asyncio.Future[None]], error: ArchitectError | None) -> None:
    for waiter in waiters:
        if waiter.done():
            continue
        if error is None:
            waiter.set_result(None)
        else:
            waiter.set_exception(error)
    waiters.clear()
