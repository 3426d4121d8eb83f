"""One container's traffic: its place at the gate, its ports, and what packets do while it sleeps.

Called by :class:`.container.ManagedContainer` as the table of its life says.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Final

from architect.adapters import criuimages
from architect.adapters.cgroup import Cgroup
from architect.adapters.gate import GateError
from architect.contract.annotations import ContainerSettings, Monitor
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord
from architect.decisions import ports
from architect.processes.architectd import subject as subjects
from architect.processes.architectd.clock import IdleClock
from architect.processes.architectd.context import Context
from architect.processes.architectd.proxy import Proxy
from architect.processes.architectd.reporter import Reporter

_ENGINE_RETRY_S: Final = 0.5
_LONGEST_RETRY_S: Final = 10.0
"""Seconds until an engine that gave no answer is asked again: at first, doubled each time, at most."""


class Traffic:
    """See the module. The place itself is the clock's, which reads the last activity from it."""

    def __init__(
        self,
        record: ContainerRecord,
        settings: ContainerSettings,
        context: Context,
        clock: IdleClock,
        report: Reporter,
        checkpoint: Callable[[], Path | None],
    ) -> None:
        """``checkpoint`` tells where the images of the program are while it is not there."""
        self._record = record
        self._settings = settings
        self._gates = context.gates
        self._answers = context.answers_keep_alives
        self._checkpoint = checkpoint
        self._reading: asyncio.Task[None] | None = None
        self._clock = clock
        self._report = report
        # Without the webhook, as on a lone containerd, a pod has none.
        sidecar = context.in_cluster and bool(record.pod_uid)
        self._proxy = Proxy(record, self._warn, sidecar=sidecar)
        self._unconnected: bool | None = None
        """Under network-monitor "connections": it has none, so nothing but a new one may wake it. None: an
        earlier daemon has told the gate."""

    async def join(self, wanted: Callable[[], None]) -> None:
        """Takes a place at its namespace's gate; ``wanted`` is called while packets are held.

        Without one, which is reported, the container stays awake.
        """
        namespace = Path(f"/proc/{self._record.keeper}/ns/net")
        scaledown_s = self._settings.scaledown_ns / 1e9
        try:
            self._clock.place = await self._gates.join(
                namespace, self._record.owner, wanted, self._warn, scaledown_s
            )
        except ArchitectError as error:
            self._record.error = str(error)
            self._report.event("Warning", str(error))
            return
        self._record.owner = self._clock.place.owner
        self.set_ports()
        self._proxy.serve(self._settings.health_ports)

    def _warn(self, message: str) -> None:
        self._report.event("Warning", f"{self._report.name}: {message}")

    def leave(self) -> None:
        """Gives the place up: packets pass unseen."""
        self._stop_reading()
        self._proxy.serve(())
        if self._clock.place is not None:
            self._clock.place.leave()
            self._clock.place = None

    def follow(self, settings: ContainerSettings) -> None:
        """Other annotations hold from now on.

        Raises:
            GateError: the ports cannot be set.
        """
        self._settings = settings
        if self._clock.place is not None:
            self._clock.place.set_scaledown(settings.scaledown_ns / 1e9)
            self._proxy.serve(settings.health_ports)
        self.set_ports()

    def set_ports(self) -> None:
        """Tells the gate which ports count.

        Raises:
            GateError: the kernel refuses.
        """
        if self._clock.place is not None:
            declared = self._record.ports or []
            self._clock.place.set_ports(
                ports.at_gate(declared, self._settings, self._record.quiet),
                ports.shadows(declared, self._settings),
            )

    def hold(self, *, wakes: bool) -> None:
        """Packets wait from now on, while it is dumped or (``wakes``) restored.

        A dump that then finds the gate open is not begun.
        """
        place = self._clock.place
        if place is None:
            return
        try:
            if wakes:
                place.hold()
                place.present()
                return
            repaired = place.repair()
            if repaired:
                self._warn(f"put back what was taken from its gate: {', '.join(repaired)}")
            place.hold()
        except GateError as error:
            self._warn(str(error))
        # Asked now: with the program its connections will be gone.
        watched = self._settings.monitor is Monitor.CONNECTIONS
        self._unconnected = watched and not self._clock.connections()

    def open(self) -> None:
        """Packets pass, those that waited first."""
        self._stop_reading()
        if self._clock.place is not None:
            self._clock.place.open()

    def sleep(self) -> None:
        """What packets do while the container is hibernated: wake it, or vanish."""
        if self._clock.place is None:
            return
        if self._settings.monitor is Monitor.NONE:
            self._clock.place.drop()
        else:
            self._clock.place.hold()
        self._clock.place.absent(only_opening=self._unconnected)
        self._stop_reading()
        self._reading = asyncio.create_task(self._answer_keep_alives())

    def _stop_reading(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            self._reading = None

    async def _answer_keep_alives(self) -> None:
        """Has the kernel answer probes of the connections that are in the checkpoint, if that is wanted."""
        wanted = self._answers and self._settings.monitor is Monitor.PACKETS
        images = self._checkpoint() if wanted else None
        try:
            found = (
                [] if images is None else await asyncio.to_thread(criuimages.connections, images)
            )
            if self._clock.place is not None:
                answered = self._clock.place.answer_keep_alives(found)
                if answered < len(found):
                    self._report.log("keep-alive probes", answered=answered, connections=len(found))
        except (GateError, OSError, ValueError) as error:
            self._warn(f"its clients' keep-alive probes wake it: {error}")

    async def learn_ports(self, group: Cgroup) -> None:
        """Asks the engine for the declared ports until it answers."""
        record, delay = self._record, _ENGINE_RETRY_S
        unknown = None
        while record.ports is None:
            try:
                record.ports = await subjects.declared_ports(record, group)
            except (ArchitectError, OSError) as error:
                self._report.log("ports unknown", error=str(error))
                record.error = unknown = str(error)
                await asyncio.sleep(delay)
                delay = min(delay * 2, _LONGEST_RETRY_S)
        if record.error == unknown:
            record.error = None
        try:
            self.set_ports()
        except GateError as error:
            record.error = str(error)
            self._report.event(
                "Warning", f"{self._report.name}: {error}; the container stays awake"
            )
            self.leave()
        self.warn_of_no_ports()

    async def settle_ports(self, group: Cgroup) -> None:
        """Gives up ports on which another container of the pod listens, which may not have done so yet
        when the engine was asked.

        Raises:
            GateError: the kernel refuses.
        """
        record, place = self._record, self._clock.place
        if place is not None and record.ports and subjects.shares_ports(record):
            own, others = await asyncio.to_thread(subjects.listened, record, group)
            others |= place.listens_on(own)
            record.ports = [port for port in record.ports if port in own or port not in others]
        self.set_ports()

    def warn_of_no_ports(self) -> None:
        """Says so if traffic is to wake a container that has no ports for it."""
        if not self._record.ports and self._settings.monitor is not Monitor.NONE:
            self._report.event(
                "Warning",
                f"{self._report.name} declares no ports, so no traffic wakes it; publish or expose "
                "the ports",
            )
