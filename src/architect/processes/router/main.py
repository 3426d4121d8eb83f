"""architect-router: program. The chart's DaemonSet starts one on each node, in the node's network namespace.

It knows nothing but the Checkpoints of the cluster, and makes the node's rules what these say: what is to go
to a pod that has moved goes to where it is now (:mod:`architect.adapters.rerouting`). The rules are the
kernel's: while this program is away they stay as they are.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final

from architect.adapters import entrances, rerouting
from architect.adapters.kube.client import SERVICE_ACCOUNT, Kube
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import Checkpoint
from architect.contract.errors import ArchitectError
from architect.contract.flows import Flow
from architect.contract.kubernetes import ROUTER

_log: Final = logging.getLogger(ROUTER)

_LOOK_S: Final = 10.0
"""Seconds between two looks whether somebody has taken the rules away."""
_AGAIN_S: Final = 1.0
"""Seconds until rules that the kernel refused are tried again."""


def wanted(checkpoints: Iterable[Checkpoint]) -> Iterator[rerouting.Moved]:
    """What the rules are to say: one for each old address of each pod that has moved."""
    for one in checkpoints:
        move = one.status.move
        if move is None or one.status.phase not in ("Committed", "Restored"):
            continue
        flows = [Flow.parse(flow) for flow in move.flows]
        ports = tuple(_port(port) for port in move.ports)
        for old in move.oldAddresses:
            new = next((each for each in move.newAddresses if (":" in each) == (":" in old)), None)
            mine = tuple(flow for flow in flows if flow.local == old)
            if new is not None and (mine or move.accepting):
                yield rerouting.Moved(old, new, mine, ports, move.accepting)


def _port(text: str) -> tuple[str, int]:
    protocol, _, number = text.partition("/")
    return protocol, int(number)


class Router:
    """Keeps the rules; ``run`` it once."""

    def __init__(self, kube: Kube) -> None:
        self.checkpoints: Informer[Checkpoint] = Informer(kube, Checkpoint)
        self.checkpoints.add_handler(self._changed)
        self._stale = asyncio.Event()
        self._entered: dict[Flow, entrances.Entrance] = {}
        self._seen: set[Flow] = set()

    async def run(self) -> None:
        """Never returns; cancel it.

        Raises:
            ArchitectError: this node cannot have such rules at all.
        """
        await asyncio.to_thread(rerouting.prepare)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.checkpoints.run())
            tasks.create_task(self._keep())

    def _changed(self, change: Change[Checkpoint]) -> None:
        before = change.old.status.move if change.old else None
        now = change.new.status.move if change.new else None
        if before != now:
            self._stale.set()

    async def _keep(self) -> None:
        # Before the first list nothing is known, and what an earlier router has left is right.
        await self.checkpoints.synced.wait()
        while True:
            self._stale.clear()
            moves = list(wanted(self.checkpoints.objects.values()))
            try:
                await asyncio.to_thread(self._apply, moves)
            except ArchitectError as error:
                _log.error("%s", error)
                await asyncio.sleep(_AGAIN_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._stale.wait()

    def _apply(self, moves: Sequence[rerouting.Moved]) -> None:
        flows = {flow for move in moves for flow in move.flows}
        self._entered = {flow: way for flow, way in self._entered.items() if flow in flows}
        new = flows - self._seen
        if new:
            # Asked once, when they have just moved: what the kernel knows of them it may forget soon.
            self._entered |= entrances.known(rerouting.TABLE, new) | entrances.find(new)
        self._seen = flows
        rerouting.apply(moves, self._entered)


async def _run(service_account: Path) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Kube.found(service_account) as kube:
        routing = asyncio.create_task(Router(kube).run())
        stopping = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({routing, stopping}, return_when=asyncio.FIRST_COMPLETED)
        for task in (routing, stopping):
            task.cancel()
        if routing in done:
            routing.result()


def main() -> None:
    """Program; exit status 0 when told to stop, 1 with one line on stderr if it cannot do its work."""
    parser = argparse.ArgumentParser(prog=ROUTER, description=__doc__)
    parser.add_argument(
        "--service-account",
        type=Path,
        default=SERVICE_ACCOUNT,
        help="directory with token and ca.crt; where there is none, KUBECONFIG is used",
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    try:
        asyncio.run(_run(options.service_account))
    except ArchitectError as error:
        print(f"{ROUTER}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
