"""The gates of this machine: one for each network namespace that has managed containers.

Called by the daemon's containers. Numbers the owners at each gate and passes on whom held packets want.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Final

from architect.adapters.bpf import BpfError
from architect.adapters.criuimages import Connection
from architect.adapters.gate import Activity, Gate, GateError, Mode
from architect.adapters.gatemaps import OWNERS
from architect.adapters.holding import Waiting
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.decisions import rest
from architect.decisions.ports import Port, Shadow

_UPKEEP_S: Final = 5.0
"""Seconds between two looks at what others may have taken from a gate; each takes half a millisecond."""
_HELD_S: Final = 60.0
"""Seconds for which a packet waits at the most: its sender has sent it anew since, or has given up."""
_ROUNDS: Final = 4
"""How often what came while the last packets were let go is let go too, before the gate is opened."""
_WITHDRAW_S: Final = 2.0
"""Seconds after a wake until the rules that queue packets are taken off its packets' way."""


class GateUnavailable(ArchitectError):
    """Traffic to a container cannot be watched or held."""


class Place:
    """One container's place at the gate of its network namespace."""

    def __init__(self, shared: _Shared, owner: int) -> None:
        self._shared = shared
        self.owner = owner

    def set_ports(self, ports: Collection[Port], shadows: Collection[Shadow]) -> None:
        """Declares the owner's ports, and which of them are shadows of which.

        Raises:
            GateError: the kernel refuses.
        """
        self._shared.gate.set_ports(self.owner, ports)
        self._shared.set_shadows(self.owner, shadows)

    def listens_on(self, ports: set[tuple[str, int]]) -> set[tuple[str, int]]:
        """The owner has been seen to listen on these; returns those on which another was seen to."""
        listened = self._shared.listened
        listened[self.owner] = ports
        others = [each for owner, each in listened.items() if owner != self.owner]
        return set[tuple[str, int]]().union(*others)

    def hold(self) -> None:
        """Packets wait from now on."""
        self._shared.gate.set_mode(self.owner, Mode.HOLD)

    def present(self) -> None:
        """The owner's program is being brought back."""
        self._shared.gate.set_present(self.owner)

    def probed(self, *, now: bool) -> None:
        """A probe's command runs in the owner ``now``, or no more: its traffic over lo does not count."""
        self._shared.gate.set_probed(self.owner, probed=now)

    def holds(self) -> bool:
        """Whether packets wait."""
        return self._shared.gate.mode(self.owner) is Mode.HOLD

    def open(self) -> int:
        """Packets pass from now on, those that waited first; returns how many waited."""
        gate, released = self._shared.gate, 0
        # They go while the gate still holds: what is sent in answer to the first waits behind the last.
        for _ in range(_ROUNDS):
            count = gate.release(self.owner, accept=True)
            released += count
            if not count:
                break
        gate.set_mode(self.owner, Mode.OPEN)
        released += gate.release(self.owner, accept=True)
        self._shared.receive_soon()
        self._shared.withdraw_soon()
        return released

    def drop(self) -> None:
        """Packets vanish from now on, those that waited too; never a reset."""
        self._shared.gate.set_mode(self.owner, Mode.DROP)
        self._shared.gate.release(self.owner, accept=False)
        self._shared.receive_soon()

    def absent(self, *, only_opening: bool | None) -> None:
        """The owner's program is gone; ``only_opening``: no TCP segment but a new connection's is held
        (None: as it was)."""
        self._shared.gate.set_absent(self.owner, only_opening=only_opening)
        self._shared.receive_soon()

    def answer_keep_alives(self, connections: Collection[Connection]) -> int:
        """While the owner is absent, the kernel answers TCP's probes of exactly these connections.

        Returns how many there was room for.

        Raises:
            GateError: the kernel refuses.
        """
        try:
            return self._shared.gate.keep_alives.answer_for(self.owner, connections)
        except BpfError as error:
            raise GateError(f"keep-alive probes are not answered: {error}") from error

    def copy(self, *, on: bool) -> None:
        """Whether :meth:`copies` has what is held from now on. For the whole namespace.

        Raises:
            GateError: the kernel refuses.
        """
        self._shared.gate.copy(on=on)
        self._shared.receive_soon()

    def copies(self) -> list[bytes]:
        """What is held for the owner and was not returned before, each from its network header on.

        Raises:
            GateError: the queue cannot be read.
        """
        found = self._shared.gate.copies(self.owner)
        self._shared.receive_soon()
        return found

    def waiting(self) -> Waiting:
        """What is held for the owner now."""
        return self._shared.gate.waiting(self.owner)

    def activity(self) -> Activity:
        """What its ports have seen."""
        return self._shared.gate.activity(self.owner)

    def set_scaledown(self, scaledown_s: float) -> None:
        """The idle time, in seconds, after which the owner hibernates, is another one now."""
        self._shared.scaledown_s[self.owner] = scaledown_s

    def repair(self) -> list[str]:
        """Puts back what somebody took away from the gate; says what that was."""
        repaired = self._shared.gate.repair()
        self._shared.receive_soon()
        return repaired

    def leave(self) -> None:
        """Gives the place up; the last one takes the gate away."""
        self._shared.leave(self.owner)


class _Shared:
    """A gate and who is at it."""

    def __init__(self, gate: Gate, inode: int, gates: Gates) -> None:
        self.gate = gate
        self.inode = inode
        self.wanted: dict[int, Callable[[], None]] = {}
        self._gates = gates
        self._withdrawal: asyncio.TimerHandle | None = None
        self._look: asyncio.TimerHandle | None = None
        self._upkeep: asyncio.TimerHandle | None = None
        self.scaledown_s: dict[int, float] = {}
        self.listened: dict[int, set[tuple[str, int]]] = {}
        self._packets: dict[int, int] = {}
        self._counted = 0.0
        self._loop = asyncio.get_running_loop()
        self.tell: dict[int, Callable[[str], None]] = {}
        self._shadows: dict[int, tuple[Shadow, ...]] = {}
        self._troubles: dict[str, str] = {}
        """What the owners were told last, by what it is about; empty: it is over."""
        self._look_in(rest.LOOK_S)
        self._upkeep_in(_UPKEEP_S)
        asyncio.get_running_loop().add_reader(gate.fileno(), self._arrived)

    def _arrived(self) -> None:
        mask = self.gate.receive()
        for owner, wanted in list(self.wanted.items()):
            if mask >> owner & 1:
                wanted()

    def receive_soon(self) -> None:
        """The gate has read its queue, perhaps packets of others too: they are told, but not from within."""
        self._loop.call_soon(self._receive)

    def _receive(self) -> None:
        with contextlib.suppress(GateError, OSError):
            self._arrived()

    def withdraw_soon(self) -> None:
        """Somebody has opened: the rules go, unless somebody holds again by then."""
        if self._withdrawal is None:
            loop = asyncio.get_running_loop()
            self._withdrawal = loop.call_later(_WITHDRAW_S, self._withdraw)

    def _withdraw(self) -> None:
        self._withdrawal = None
        self._gates.in_thread(self._try_to_withdraw)

    def _try_to_withdraw(self) -> None:
        # Rules that stay cost a little speed and nothing else; the next opening tries again.
        with contextlib.suppress(GateError, OSError):
            self.gate.withdraw()

    def _look_in(self, seconds: float) -> None:
        self._look = asyncio.get_running_loop().call_later(seconds, self._look_at_packets)

    def _look_at_packets(self) -> None:
        """Has the filters rest while every owner is flooded with packets."""
        resting = rest.rest_s(min(self.scaledown_s.values(), default=0.0))
        delay = rest.LOOK_S
        with contextlib.suppress(GateError, OSError):
            if self.gate.resting:
                self.gate.watch()
                self._count()
                delay = rest.window_s(resting) if resting else rest.LOOK_S
            elif self._all_busy() and resting:
                self._gates.in_thread(self._try_to_rest)
                delay = resting
        self._look_in(delay)

    def _count(self) -> None:
        self._counted = time.monotonic()
        self._packets = {owner: self.gate.activity(owner).packets for owner in self.wanted}

    def _all_busy(self) -> bool:
        before, since = self._packets, self._counted
        self._count()
        seconds = self._counted - since
        return all(
            owner in before and rest.is_busy(now - before[owner], seconds)
            for owner, now in self._packets.items()
        )

    def _try_to_rest(self) -> None:
        with contextlib.suppress(GateError, OSError):
            self.gate.rest()

    def _upkeep_in(self, seconds: float) -> None:
        self._upkeep = asyncio.get_running_loop().call_later(seconds, self._look_after)

    def _look_after(self) -> None:
        """Puts back what somebody has taken away, and lets go what has waited for too long."""
        self._upkeep_in(_UPKEEP_S)
        if self.gate.busy:
            return
        try:
            repaired = self.gate.repair()
            self.gate.expire(_HELD_S)
            self._arrived()
        except (GateError, OSError) as error:
            self._tell_of("gate", f"its gate cannot be looked after: {error}")
        else:
            self._tell_of("gate", "")
            if repaired:
                self._tell_all(f"put back what was taken from its gate: {', '.join(repaired)}")
        if any(self._shadows.values()):
            self._gates.in_thread(self._keep_shadows)

    def _tell_all(self, message: str) -> None:
        for tell in list(self.tell.values()):
            tell(message)

    def _tell_of(self, what: str, trouble: str) -> None:
        if trouble != self._troubles.get(what, ""):
            self._troubles[what] = trouble
            if trouble:
                self._tell_all(trouble)

    def set_shadows(self, owner: int, shadows: Collection[Shadow]) -> None:
        """The owner has these shadow ports now."""
        wanted = tuple(sorted(shadows))
        if self._shadows.get(owner) == wanted:
            return
        self._shadows[owner] = wanted
        self._gates.in_thread(self._keep_shadows)

    def _keep_shadows(self) -> None:
        shadows = [one for each in list(self._shadows.values()) for one in each]
        try:
            repaired = self.gate.keep_shadows(shadows)
        except (GateError, OSError) as error:
            trouble = f"it has no shadow ports: {error}"
            self._loop.call_soon_threadsafe(self._tell_of, "shadows", trouble)
        else:
            self._loop.call_soon_threadsafe(self._tell_of, "shadows", "")
            if repaired:
                message = f"put back what was taken from its gate: {', '.join(repaired)}"
                self._loop.call_soon_threadsafe(self._tell_all, message)

    def leave(self, owner: int) -> None:
        if self.wanted.pop(owner, None) is None:
            return
        self.tell.pop(owner, None)
        self.set_shadows(owner, ())
        self.scaledown_s.pop(owner, None)
        self.listened.pop(owner, None)
        with contextlib.suppress(GateError, OSError):
            self.gate.drop_owner(owner)
            self.receive_soon()
        if not self.wanted:
            self._gates.forget(self)

    def deafen(self) -> None:
        for timer in (self._withdrawal, self._look, self._upkeep):
            if timer is not None:
                timer.cancel()
        with contextlib.suppress(GateError, OSError, ValueError):
            asyncio.get_running_loop().remove_reader(self.gate.fileno())

    def close(self, *, remove: bool) -> None:
        with contextlib.suppress(GateError, OSError):
            self.gate.close(remove=remove)


class Gates:
    """All gates, by the inode of their network namespace."""

    def __init__(self) -> None:
        self._by_inode: dict[int, _Shared] = {}
        self._lock = asyncio.Lock()
        self._behind: set[asyncio.Task[None]] = set()

    async def join(
        self,
        netns: Path,
        owner: int,
        wanted: Callable[[], None],
        tell: Callable[[str], None],
        scaledown_s: float,
    ) -> Place:
        """A place at the gate of ``netns``; the ``owner`` number of old, or a free one for -1.

        ``wanted`` is called whenever packets for the owner's ports are held, ``tell`` with what was wrong
        with the gate. ``scaledown_s`` is the idle time, in seconds, after which the owner hibernates.

        Raises:
            GateUnavailable: the kernel lacks a piece, or 16 containers are there already.
        """
        async with self._lock:
            try:
                inode = os.stat(netns).st_ino  # noqa: PTH116 (follows the magic link)
                shared = self._by_inode.get(inode)
                if shared is None:
                    gate = await asyncio.to_thread(
                        Gate.open, netns, paths.BPF / f"{inode:x}", paths.GATE_PROGRAM
                    )
                    shared = self._by_inode[inode] = _Shared(gate, inode, self)
            except (GateError, OSError) as error:
                raise GateUnavailable(
                    what="its traffic cannot be watched",
                    why=str(error),
                    fix="run `architect check`; the container stays awake",
                ) from error
            fresh = owner < 0
            if fresh:
                free = [number for number in range(OWNERS) if number not in shared.wanted]
                if not free:
                    raise GateUnavailable(
                        what="its traffic cannot be watched",
                        why=f"{OWNERS} managed containers share its pod's network already",
                        fix="manage fewer containers of that pod",
                    )
                owner = free[0]
            shared.wanted[owner] = wanted
            shared.tell[owner] = tell
            shared.scaledown_s[owner] = scaledown_s
            if fresh:
                # Another container may have had the number, and have ended while no daemon ran.
                shared.gate.drop_owner(owner)
            return Place(shared, owner)

    def tidy(self) -> None:
        """After the daemon's start: removes what is pinned for namespaces without our containers."""
        ours = {f"{inode:x}" for inode in self._by_inode}
        for pins in list(paths.BPF.iterdir()):
            # The kernel puts two files of its own at the root of each bpffs.
            if pins.is_dir() and pins.name not in ours:
                for pin in list(pins.iterdir()):
                    pin.unlink()
                pins.rmdir()

    def forget(self, shared: _Shared) -> None:
        """A gate has lost its last owner: takes it away, behind the back of all others' wakes."""
        del self._by_inode[shared.inode]
        shared.deafen()
        self.in_thread(functools.partial(shared.close, remove=True))

    def in_thread(self, work: Callable[[], None]) -> None:
        """Runs what calls iptables behind the back of all wakes, one thing at a time."""
        task = asyncio.create_task(self._alone(work))
        self._behind.add(task)
        task.add_done_callback(self._behind.discard)

    async def _alone(self, work: Callable[[], None]) -> None:
        async with self._lock:
            await asyncio.to_thread(work)

    def close(self) -> None:
        """Lets go of all gates; filters, rules and modes stay for the next daemon."""
        for shared in self._by_inode.values():
            shared.deafen()
            shared.close(remove=False)
        self._by_inode.clear()
