"""The packets that wait at one gate, and in which order they go on.

Called by the gate, which knows who holds and who drops. Owners are masks, as in the packets' marks.
A quiet packet came in a transition and wakes nobody. Those of a dump wait for the wake, whenever it is: most
are what the program's own connections need to go on at once, an acknowledgement or an answer.
"""

import time
from collections.abc import Iterable
from typing import Final, NamedTuple

from architect.adapters import nfqueue
from architect.adapters.netfilter import Rule


class Waiting(NamedTuple):
    """What is held for an owner now."""

    packets: int
    oldest_s: float
    """For how long the first of them has waited; 0 without one."""
    quiet: int = 0
    """Beside these: quiet ones."""


OWNERS_MASK: Final = 0xFFFF
"""Of a mark: whom the packet is for."""
QUIET: Final = 0x10000
"""Of a mark: nobody is to be woken. As in native/bpf/gate.bpf.c."""
QUIET_PACKETS: Final = 64
"""Quiet packets that a sleeper keeps."""


class _Held(NamedTuple):
    owners: int
    quiet: bool
    since: float
    """time.monotonic()"""
    data: bytes = b""


class Holding:
    """See the module. All methods raise nfqueue.QueueError; made where the queue may be opened."""

    def __init__(self, rule: Rule, *, capacity: int, buffer_bytes: int) -> None:
        """Open the queue, as nfqueue.Queue does, in the calling thread's network namespace."""
        self._rule = rule
        self._queue = nfqueue.Queue(rule.queue, capacity=capacity, buffer_bytes=buffer_bytes)
        self._held: dict[int, _Held] = {}  # by the packet's number, in order of arrival
        self._woken = 0
        self._copied: set[int] = set()  # numbers of those that `copies` has returned
        self.probe_arrived = False
        """A packet with exactly the rule's mark was there (netfilter.reach)."""

    def __bool__(self) -> bool:
        """Whether anything is held."""
        return bool(self._held)

    def fileno(self) -> int:
        """Return a descriptor that polls readable when there are packets to `collect`."""
        return self._queue.fileno()

    def collect(self, limit: int, *, holding: int, dropping: int, keep: int = 0) -> None:
        """Read the queue; hold what must wait, or belongs to an owner in `keep`.

        Does not block. `woken` then tells for whom there is something new.
        """
        keep |= holding
        for owners, *_ in self._held.values():
            if not owners & holding:  # about to be released: nothing may overtake it
                keep |= owners
        now = time.monotonic()
        for number, mark, data in self._queue.receive(limit):
            owners, quiet = mark & OWNERS_MASK, bool(mark & QUIET)
            if mark == self._rule.mark:
                self.probe_arrived = True
                self._queue.decide([number], accept=False)
            elif owners & keep:
                if not quiet:
                    self._woken |= owners & holding
                self._held[number] = _Held(owners, quiet, now, data)
            else:
                # Marked just before the gate was opened.
                self._queue.decide([number], accept=not owners & dropping)

    def woken(self) -> int:
        """Return the mask of those for whom something new was held since the last call."""
        woken, self._woken = self._woken, 0
        return woken

    def hush(self, bit: int) -> int:
        """Keep of an owner, which sleeps now, the first quiet packets alone; return how many are gone."""
        quiet = [number for number, held in self._held.items() if held.quiet and held.owners & bit]
        self._decide(quiet[QUIET_PACKETS:], accept=False)
        return len(quiet[QUIET_PACKETS:])

    def release(self, bit: int, *, holding: int, dropping: int, accept: bool) -> int:
        """Deliver or drop what is held for an owner, in order of arrival; return how many went.

        A packet that belongs to several owners stays until none of them holds, and is dropped if
        another of them drops. Quiet ones are not dropped here.
        """
        going = [
            (number, owners)
            for number, (owners, quiet, *_) in self._held.items()
            if owners == bit or (owners & bit and not owners & holding)
            if accept or not quiet
        ]
        accepted = [number for number, owners in going if accept and not owners & ~bit & dropping]
        self._decide(accepted, accept=True)
        kept = set(accepted)
        self._decide([number for number, _ in going if number not in kept], accept=False)
        return len(going)

    def release_all(self) -> None:
        """Deliver everything."""
        self._decide(list(self._held), accept=True)

    def forget(self, bit: int, *, holding: int) -> None:
        """An owner is no more: its packets are dropped; those of several stay for the others."""
        own = [number for number, held in self._held.items() if held.owners == bit]
        self._decide(own, accept=False)
        for number, held in self._held.items():
            self._held[number] = held._replace(owners=held.owners & ~bit)
        freed = [number for number, held in self._held.items() if not held.owners & holding]
        self._decide(freed, accept=True)

    def copy(self, *, on: bool) -> None:
        """Whether what is held from now on can be had from `copies`."""
        self._queue.copy(on=on)

    def copies(self, bit: int) -> list[bytes]:
        """Return what is held for an owner, in order of arrival, but what was returned before.

        Each from its network header on. It stays held.
        """
        fresh = [
            number
            for number, held in self._held.items()
            if held.owners & bit and held.data and number not in self._copied
        ]
        self._copied = {number for number in self._copied if number in self._held} | set(fresh)
        return [self._held[number].data for number in fresh]

    def waiting(self, bit: int) -> Waiting:
        """Return how much is held for an owner, and for how long."""
        own = [held for held in self._held.values() if held.owners & bit]
        since = [held.since for held in own if not held.quiet]
        oldest_s = time.monotonic() - since[0] if since else 0.0
        return Waiting(len(since), oldest_s, len(own) - len(since))

    def expire(self, seconds: float) -> int:
        """Drop what has been held for longer, but for quiet ones; return the mask of their owners."""
        end = time.monotonic() - seconds
        old = {
            number: held.owners
            for number, held in self._held.items()
            if held.since <= end and not held.quiet
        }
        self._decide(old, accept=False)
        owners = 0
        for mask in old.values():
            owners |= mask
        return owners

    def _decide(self, numbers: Iterable[int], *, accept: bool) -> None:
        numbers = list(numbers)
        self._queue.decide(numbers, accept=accept)
        for number in numbers:
            del self._held[number]

    def close(self) -> None:
        """Give the queue up; the kernel drops the packets that it still holds."""
        self._queue.close()
