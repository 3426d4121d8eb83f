"""A pod that leaves this node: frozen, on the disk with all that goes with it, handed out, ended.

Made by :mod:`.leaving`; other nodes reach it through :mod:`.handing`. On the disk it is
``DEPARTURES/<pod uid>/`` with ``manifest.json``, written last, and a directory for each container: hard
links to the images, so that the container still has its own checkpoint to wake from if the move fails.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec

from architect.adapters import cpufeatures, criuaddresses, listeners, silence, store
from architect.contract import paths
from architect.contract.errors import ArchitectError, as_error
from architect.contract.flows import Flow
from architect.contract.moving import (
    MANIFEST_FORMAT,
    MOST_ADDRESSES,
    MOST_FLOWS,
    ContainerNeeds,
    Manifest,
    MovedContainer,
    Needs,
)
from architect.contract.records import Moving
from architect.contract.states import State
from architect.decisions.files import Outlook
from architect.processes.architectd.cluster import files
from architect.processes.architectd.cluster.patience import within
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer
from architect.processes.architectd.registry import Registry
from architect.processes.architectd.waiters import AWAKE

_MANIFEST: Final = "manifest.json"
_FETCHED_S: Final = 2.0
"""Seconds for which packets that wait here can be fetched after the commit."""
_ASKED_S: Final = 30.0
"""Seconds for which the kubelet's stop signal is waited for."""


class Departure:
    """See the module."""

    def __init__(
        self,
        key: str,
        pod_uid: str,
        addresses: Sequence[str],
        containers: Sequence[MovableContainer],
        brought: Collection[Flow] = (),
    ) -> None:
        """``brought`` are connections that the pod has from where it was before."""
        self.key = key
        """Of its Checkpoint: ``namespace/name``."""
        self.pod_uid = pod_uid
        self.refused = ""
        """Why no node can ever have it; empty if one may."""
        self.manifest: Manifest | None = None
        """Once it is frozen."""
        self.freeze_ms = 0.0
        self._sessions = 0
        self._alone = asyncio.Event()
        self._addresses = list(addresses)
        self._brought = {one._replace(local=""): one for one in brought}
        self._containers = list(containers)
        self._lock = asyncio.Lock()
        self._place = paths.DEPARTURES / pod_uid

    @classmethod
    def found(cls, registry: Registry) -> Iterator[Self]:
        """Those that an earlier daemon left. Whatever was frozen and not handed out goes on here."""
        known = set()
        paths.DEPARTURES.mkdir(mode=0o700, parents=True, exist_ok=True)
        for place in sorted(paths.DEPARTURES.iterdir()):
            try:
                manifest = msgspec.json.decode((place / _MANIFEST).read_bytes(), type=Manifest)
            except (OSError, msgspec.MsgspecError):
                # Not whole: nobody can have been told of it.
                shutil.rmtree(place, ignore_errors=True)
                continue
            if manifest.format != MANIFEST_FORMAT:
                continue
            if manifest.boot not in ("", _boot()):
                log("lost", checkpoint=manifest.checkpoint, why="it was to be fetched at once")
                shutil.rmtree(place, ignore_errors=True)
                continue
            known.add(manifest.pod_uid)
            mine = registry.of_pod(manifest.pod_uid)
            one = cls(manifest.checkpoint, manifest.pod_uid, manifest.addresses, mine)
            one.manifest = manifest
            yield one
        for managed in registry.all():
            if managed.state is State.MIGRATING and managed.record.pod_uid not in known:
                managed.stay()

    @property
    def frozen(self) -> bool:
        """Whether only its checkpoint stands for it."""
        return self.manifest is not None

    @property
    def fleeting(self) -> bool:
        """Whether it was to be fetched at once: without a Checkpoint nobody has still to do so."""
        return self.manifest is None or bool(self.manifest.boot)

    @property
    def in_use(self) -> bool:
        """Whether the node that takes it is connected."""
        return self._sessions > 0

    @property
    def size(self) -> int:
        """Bytes that are to be fetched, as far as they are known."""
        found = self.manifest.containers if self.manifest else ()
        return sum(file.size for one in found for file in one.files)

    def containers_left(self) -> bool:
        """Whether a container of it is still here."""
        return any(one.state is not State.ENDED for one in self._containers)

    async def freeze(self, *, durable: bool) -> Manifest:
        """Dumps all containers, or none; once.

        Not ``durable``: it is fetched at once, and as little worth after a power failure as the running pod.

        Raises:
            ArchitectError: one cannot be dumped, or the disk is full; all run on.
        """
        async with self._lock:
            if self.manifest is not None:
                if durable and self.manifest.boot:
                    try:
                        self.manifest = await asyncio.to_thread(self._make_durable, self.manifest)
                    except OSError as error:
                        # As long as the power stays it is as good as ever.
                        log("not durable", checkpoint=self.key, error=str(error))
                return self.manifest
            began = time.monotonic()
            # What the gate does not know yet must not be refused, either, once its socket is gone.
            silent = asyncio.create_task(self._refuse_nobody())
            seen = {
                one.record.id: await asyncio.to_thread(files.outlook, one)
                for one in self._containers
                if one.state in AWAKE
            }
            await silent
            leaving = [one.leave("its pod moves", durable=durable) for one in self._containers]
            outcomes = await asyncio.gather(*leaving, return_exceptions=True)
            failures = [one for one in outcomes if isinstance(one, BaseException)]
            try:
                if failures:
                    raise failures[0]
                self.manifest = await asyncio.to_thread(self._pack, seen, durable)
            except BaseException as error:
                await self._stay()
                if isinstance(error, OSError):
                    raise as_error(error, "the pod's checkpoint could not be kept") from error
                raise
            self.freeze_ms = (time.monotonic() - began) * 1000
            log("frozen", checkpoint=self.key, ms=round(self.freeze_ms), bytes=self.size)
            return self.manifest

    async def needs(self) -> Needs:
        """What another node must have for it; asked while it runs."""
        for managed in self._containers:
            if managed.state in AWAKE:
                await managed.prepare()
        found = await self._needs()
        return Needs(
            features=msgspec.to_builtins(cpufeatures.here()),
            addresses=self._addresses,
            containers=[needed for needed, _ in found],
            trouble=[
                *(each for _, reasons in found for each in reasons),
                *await asyncio.to_thread(self._crowd),
            ],
        )

    def _crowd(self) -> list[str]:
        """What is wrong with the number of its connections: once it is frozen it is too late to count."""
        keeper = self._containers[0].record.keeper
        count = sum(len(listeners.connected(keeper, one)) for one in self._addresses)
        found = []
        if count > MOST_FLOWS:
            found.append(f"it has {count:,} open connections, and {MOST_FLOWS:,} can move")
        if len(self._addresses) > MOST_ADDRESSES:
            there = f"its connections were made to {len(self._addresses)} addresses"
            found.append(f"{there}, and those of {MOST_ADDRESSES} can move")
        return found

    async def _needs(self) -> list[tuple[ContainerNeeds, tuple[str, ...]]]:
        running = [one for one in self._containers if one.state in AWAKE]
        return [await asyncio.to_thread(files.needs, one) for one in running]

    async def thaw(self) -> None:
        """The move is given up: every container is as it was."""
        async with self._lock:
            await self._stay()

    async def _stay(self) -> None:
        self.manifest = None
        shutil.rmtree(self._place, ignore_errors=True)
        for managed in self._containers:
            managed.stay()
        for managed in self._containers:
            if managed.state is not State.ENDED:
                with contextlib.suppress(ArchitectError):
                    await asyncio.to_thread(silence.end, managed.record.keeper)
                break

    async def _refuse_nobody(self) -> None:
        for managed in self._containers:
            if managed.state is not State.ENDED:
                try:
                    await asyncio.to_thread(silence.begin, managed.record.keeper)
                except ArchitectError as error:
                    log("not silent", pod=managed.name, error=str(error))
                break

    def held(self) -> list[bytes]:
        """The packets that have waited for it since this was asked last."""
        return [packet for one in self._containers for packet in one.held()]

    async def depart(self) -> None:
        """Ends the containers; what is on the disk stays until another node runs the pod.

        Not before the kubelet has asked for that: it would start them anew. Nor while the other node fetches
        the packets that wait here. Their network outlives them by a moment, in which it must refuse nobody.
        """
        await within(_FETCHED_S, self._left_alone())
        for managed in self._containers:
            await within(_ASKED_S, managed.told_to_stop())
        await self._refuse_nobody()
        await asyncio.gather(*(one.depart() for one in self._containers))

    async def _left_alone(self) -> None:
        while self.in_use:
            self._alone.clear()
            await self._alone.wait()

    def connected(self, change: int) -> None:
        """There are so many more connections of the node that takes it."""
        self._sessions += change
        self._alone.set()

    def forget(self) -> None:
        """Nobody needs what is on the disk any more."""
        shutil.rmtree(self._place, ignore_errors=True)

    def open(self, name: str) -> Path | None:
        """The file of that name in the manifest."""
        found = self.manifest.containers if self.manifest else ()
        for one in found:
            if any(f"{one.name}/{file.name}" == name for file in one.files):
                return self._place / name
        return None

    # ---- what is on the disk -----------------------------------------------------------------------

    def _make_durable(self, manifest: Manifest) -> Manifest:
        durable = msgspec.structs.replace(manifest, boot="")
        self._write(durable)
        return durable

    def _write(self, manifest: Manifest) -> None:
        """Last of all: nobody is told of a departure without it."""
        durable = not manifest.boot
        if durable:
            for one in manifest.containers:
                for each in one.files:
                    store.fsync(self._place / one.name / each.name)
                store.fsync(self._place / one.name)
        fresh = self._place / f"{_MANIFEST}.new"
        with open(fresh, "wb", opener=_private) as file:
            file.write(msgspec.json.encode(manifest))
            if durable:
                file.flush()
                os.fsync(file.fileno())
        fresh.rename(self._place / _MANIFEST)
        if durable:
            store.fsync(self._place)

    def _pack(self, seen: Mapping[str, Outlook | None], durable: bool) -> Manifest:
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True, mode=0o700)
        volumes: set[str] = set()
        moved = [
            self._pack_container(one, seen.get(one.record.id), volumes) for one in self._containers
        ]
        places = [self._place / one.name for one in moved]
        manifest = Manifest(
            checkpoint=self.key,
            pod_uid=self.pod_uid,
            addresses=self._addresses,
            flows=[
                str(self._as_peers_know_it(Flow(*flow)))
                for place in places
                for flow in criuaddresses.flows(place, self._addresses)
            ],
            ports=sorted(
                {
                    f"{one.protocol}/{one.port}"
                    for place in places
                    for one in criuaddresses.listeners(place, self._addresses)
                }
            ),
            containers=moved,
            boot="" if durable else _boot(),
        )
        self._write(manifest)
        return manifest

    def _as_peers_know_it(self, flow: Flow) -> Flow:
        """The connection with the address to which it was made: its socket may have been given another."""
        return self._brought.get(flow._replace(local=""), flow)

    def _pack_container(
        self, managed: MovableContainer, seen: Outlook | None, volumes: set[str]
    ) -> MovedContainer:
        record, images = managed.record, managed.checkpoint
        if images is None:
            raise OSError(f"{managed.name} has no checkpoint")
        place = self._place / record.container
        place.mkdir(mode=0o700)
        names = store.link_images(images, place)
        packed = files.pack(managed, place, seen, volumes)
        boot = time.clock_gettime(time.CLOCK_BOOTTIME)
        return MovedContainer(
            name=record.container,
            awake=record.moving is Moving.AWAKE,
            age_s=boot - record.first_started,
            pipes=record.pipes,
            quiet=record.quiet,
            files=files.moved_files(place, [*names, *packed.names]),
            directories=packed.directories,
            generations=packed.generations,
        )


def _boot() -> str:
    return paths.BOOT_ID.read_text().strip()


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
