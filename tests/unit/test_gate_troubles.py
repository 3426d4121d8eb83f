"""What a container's user is told of its gate: that it cannot be had, or be looked after, once each time."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import cast

import pytest

from architect.adapters.gate import Gate, GateError
from architect.adapters.gatemaps import OWNERS
from architect.decisions.ports import Shadow
from architect.processes.architectd import gates as upkeep
from architect.processes.architectd.gates import Gates, GateUnavailable, _Shared

OWNER = 3
SHADOWS = [Shadow("tcp", 9080, 8080)]
DEADLINE_S = 10.0


class Broken:
    """A gate of which somebody takes things away, and at which things fail."""

    busy = False
    resting = False

    def __init__(self) -> None:
        self.queue, self._end = os.pipe()
        self.repairs: list[str] = []
        self.fails = self.refuses = ""
        self.kept = self.looks = 0

    def fileno(self) -> int:
        return self.queue

    def close(self, *, remove: bool) -> None:
        os.close(self.queue)
        os.close(self._end)

    def receive(self) -> int:
        return 0

    def expire(self, seconds: float) -> int:
        return 0

    def repair(self) -> list[str]:
        self.looks += 1
        if self.fails:
            raise GateError(self.fails)
        done, self.repairs = self.repairs, []
        return done

    def drop_owner(self, owner: int) -> None:
        """Whoever had the number before is forgotten."""

    def keep_shadows(self, shadows: Collection[Shadow]) -> list[str]:
        self.kept += 1
        if self.refuses:
            raise GateError(self.refuses)
        return []


async def until(condition: Callable[[], object], what: str) -> None:
    loop = asyncio.get_running_loop()
    end = loop.time() + DEADLINE_S
    while not condition():
        assert loop.time() < end, f"after {DEADLINE_S:g} s still waiting for {what}"
        await asyncio.sleep(0.002)


async def more_looks(gate: Broken) -> None:
    """Lets it be looked after a few times more."""
    looks, kept = gate.looks, gate.kept
    await until(lambda: gate.looks > looks + 3 and gate.kept > kept + 3, "more looks")


def test_each_trouble_is_told_once_and_again_when_it_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(upkeep, "_UPKEEP_S", 0.01)
    gate, told = Broken(), list[str]()

    async def body() -> None:
        shared = _Shared(cast(Gate, gate), 1, Gates())
        shared.tell[OWNER] = told.append
        gate.refuses = "no way to translate"
        shared.set_shadows(OWNER, SHADOWS)
        await more_looks(gate)
        assert told == ["it has no shadow ports: no way to translate"]
        # Both at once: neither makes the other be told anew.
        gate.fails = "the kernel refuses"
        await more_looks(gate)
        assert told[1:] == ["its gate cannot be looked after: the kernel refuses"]
        gate.fails = gate.refuses = ""
        gate.repairs = ["filter on eth0", "IPv4 rule"]
        await more_looks(gate)
        assert told[2:] == ["put back what was taken from its gate: filter on eth0, IPv4 rule"]
        gate.refuses = "no way to translate"
        await more_looks(gate)
        assert told[3:] == ["it has no shadow ports: no way to translate"]
        shared.deafen()

    asyncio.run(body())
    gate.close(remove=False)


def test_sixteen_share_a_namespace_and_the_next_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Broken()
    monkeypatch.setattr(Gate, "open", lambda *_: cast(Gate, gate))
    space = Path("/proc/self/ns/net")

    async def body() -> None:
        gates = Gates()
        places = [
            await gates.join(space, -1, lambda: None, lambda _: None, 60.0) for _ in range(OWNERS)
        ]
        assert [place.owner for place in places] == list(range(OWNERS))
        with pytest.raises(GateUnavailable, match="16 managed containers share its pod's network"):
            await gates.join(space, -1, lambda: None, lambda _: None, 60.0)
        # One that is found again after the daemon's start has its number already.
        await gates.join(space, 7, lambda: None, lambda _: None, 60.0)
        places[3].leave()
        assert (await gates.join(space, -1, lambda: None, lambda _: None, 60.0)).owner == 3
        gates.close()

    asyncio.run(body())


def test_no_gate_is_a_reason_with_a_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> Gate:
        raise GateError("no way to queue packets")

    monkeypatch.setattr(Gate, "open", refuse)

    async def body() -> None:
        with pytest.raises(
            GateUnavailable, match=r"no way to queue packets; run `architect check`"
        ):
            await Gates().join(Path("/proc/self/ns/net"), -1, lambda: None, lambda _: None, 60.0)

    asyncio.run(body())
