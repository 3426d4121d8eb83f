"""One pod's checkpoint on its way to this node: fetched, committed, restored.

Made by :mod:`.arriving`. The order is what keeps a move safe: everything that can fail comes before the one
compare-and-swap, and the gate of the pod is closed before anybody can learn that its connections live here.
Only CRIU's restore comes after it: if that fails, what was fetched stays for the next try, or the pod starts
fresh, as the chart's onRestoreFailure says.
"""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import time
from collections import Counter
from collections.abc import Awaitable, Iterable, Sequence
from typing import Final, NoReturn

import msgspec

from architect.adapters import cpufeatures, criuaddresses, home, resending, silence
from architect.adapters.kube import checkpoints
from architect.adapters.kube.client import KubeError
from architect.adapters.kube.events import NORMAL, WARNING, Reference
from architect.adapters.kube.resources import Checkpoint, Move, Pod
from architect.adapters.transfer.fetching import Connection, FileWish, connect
from architect.adapters.transfer.wire import Hello
from architect.contract import paths
from architect.contract.annotations import REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS
from architect.contract.errors import ArchitectError
from architect.contract.flows import Flow
from architect.contract.kubernetes import MIGRATED, STARTED_FRESH
from architect.contract.moving import (
    ABORT,
    HELD,
    LEAVE,
    LOOK,
    REFUSE,
    Manifest,
    MovedContainer,
    Needs,
    OnRestoreFailure,
)
from architect.contract.records import CHECKPOINT_FORMAT
from architect.decisions import cpufeatures as features
from architect.decisions import pairing
from architect.processes.architectd.cluster import files
from architect.processes.architectd.cluster.patience import insist
from architect.processes.architectd.cluster.site import Site
from architect.processes.architectd.log import log
from architect.processes.architectd.moving import MovableContainer, NotRestored

_STREAMS: Final = 2
_MANIFEST: Final = "manifest.json"
_HELD_S: Final = 1.0
"""Seconds for which the source is asked for packets: later their senders have repeated them."""
_TROUBLE_S: Final = 10.0
"""Seconds for which files that would not come along are waited for to be closed."""
_REFUSALS: Final = (400, 413, 422)
"""HTTP statuses with which the API says that it will never take what it was given."""


class NotHere(ArchitectError):
    """The pod can never run on this node."""


class MoveLost(ArchitectError):
    """The source went on before the move was committed."""


class Arrival:
    """See the module."""

    def __init__(self, site: Site, pod: Pod, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self._site = site
        self._pod = pod
        self._place = paths.ARRIVALS / checkpoint.metadata.uid
        self._manifest: Manifest | None = None
        """Once everything is here and this node has it."""
        self._landed: set[str] = set()
        self._failures: Counter[str] = Counter()
        """Restores that have failed in a row, by container. A new daemon counts anew: it tries once more."""
        self._saying: asyncio.Task[None] | None = None
        self._lock = asyncio.Lock()
        self._began = 0.0
        self._paused_ms = 0
        self._bytes = 0
        self._troubled = 0.0

    @property
    def _rewrites(self) -> bool:
        """Whether the program's sockets get the new address. For all: they share one network namespace."""
        text = self._pod.annotations.get(REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS, "[]")
        return bool(msgspec.json.decode(text))

    @property
    def committed(self) -> bool:
        """Whether this node has it, whatever happens."""
        return self._manifest is not None

    def has(self, container: str) -> bool:
        """Whether the pod had a container of that name whose state is here."""
        found = any(one.name == container for one in self.checkpoint.spec.containers)
        return found and container not in self._landed

    async def take(self, managed: MovableContainer) -> None:
        """Returns when the container runs, or sleeps, as it did on the other node. Not to be cancelled.

        Raises:
            NotHere: it never can on this node.
            ArchitectError, OSError: it is not here; before the commit the source goes on.
        """
        async with self._lock:
            if pairing.starts_fresh(checkpoints.seen(self.checkpoint), self._pod.metadata.uid):
                raise ArchitectError(
                    f"{managed.name} is not restored",
                    "another container of its pod could not be, and the pod starts fresh",
                    "none needed: the kubelet tries again",
                )
            if self._manifest is None and self.checkpoint.status.phase == "Committed":
                self._manifest = self._read()
            if self._manifest is None:
                await self._bring(managed)
            elif managed.record.container not in self._landed:
                await self._land(managed, self._manifest)
                await self._all_landed(managed, self._manifest)

    # ---- before the commit -------------------------------------------------------------------------

    async def _bring(self, managed: MovableContainer) -> None:
        hello = Hello(
            checkpoint=self.checkpoint.key,
            uid=self.checkpoint.spec.podUID,
            claimant=self._pod.metadata.uid,
            format=CHECKPOINT_FORMAT,
        )
        await managed.prepare()
        # Of the pod's other containers there is no socket yet when the first one is there.
        await asyncio.to_thread(silence.begin, managed.record.keeper)
        context = self._site.identity.client_context()
        node, endpoint = self.checkpoint.spec.nodeName, self.checkpoint.status.endpoint or ""
        connection = await connect(context, endpoint, node, hello)
        try:
            manifest = await self._move(connection, managed)
            # The source takes packets in until its routers know; it may also be gone by now.
            waiting = asyncio.create_task(self._held(connection))
            try:
                await self._land(managed, manifest)
            finally:
                packets = await waiting
            await self._resend(managed, manifest, packets)
            await self._resend(managed, manifest, await self._held(connection))
            await self._all_landed(managed, manifest)
        finally:
            await connection.close()

    async def _held(self, connection: Connection) -> list[bytes]:
        try:
            async with asyncio.timeout(_HELD_S):
                raw = await connection.call(HELD, b"")
            return msgspec.msgpack.decode(raw, type=list[bytes])
        except (ArchitectError, OSError, msgspec.MsgspecError, TimeoutError) as error:
            log("packets that waited are lost", pod=self._pod.key, error=str(error))
            return []

    async def _resend(
        self, managed: MovableContainer, manifest: Manifest, packets: list[bytes]
    ) -> None:
        flows = [Flow.parse(flow) for flow in manifest.flows]
        homes = {flow: flow.local for flow in flows}
        if self._rewrites:
            pairs = _pairs(managed, manifest.addresses)
            homes = {flow: pairs.get(flow.local, flow.local) for flow in flows}
        try:
            count = await asyncio.to_thread(resending.resend, managed.record.keeper, packets, homes)
        except ArchitectError as error:
            log("packets that waited are lost", pod=self._pod.key, error=str(error))
            return
        log("resent", pod=self._pod.key, packets=count, held=len(packets), ms=self._ms())

    async def _move(self, connection: Connection, managed: MovableContainer) -> Manifest:
        needs = await self._check(connection, managed)
        laying: asyncio.Task[None] | None = None
        try:
            # All that needs no checkpoint is done while the pod still serves.
            await _both(connection.prepare(_STREAMS), self._make_home(managed, needs.addresses))
            self._began = time.monotonic()
            manifest = await self._ask_to_leave(connection)
            # The network takes as long as the namespace.
            await _both(self._fetch(connection, manifest), self._let_in(managed, manifest))
            await self._unpack(managed, manifest)
            log("at home", pod=self._pod.key, ms=self._ms())
            # The API takes as long as the disk.
            laying = asyncio.create_task(self._lay_in(managed, manifest))
            await self._commit(manifest)
            self._manifest = manifest
        except Exception as error:
            # Never after a commit that may have been: what would be told to the source then is wrong.
            if laying is not None:
                await asyncio.wait([laying])
            await managed.not_coming()
            with contextlib.suppress(ArchitectError, OSError):
                await connection.call(ABORT, str(error).encode())
            leave_home(managed)
            raise
        await laying
        return manifest

    async def _lay_in(self, managed: MovableContainer, manifest: Manifest) -> None:
        mine = _of(manifest, managed)
        await managed.lay_in(self._place / mine.name, mine.pipes)

    async def _check(self, connection: Connection, managed: MovableContainer) -> Needs:
        """What the pod needs and this node has not is found while the pod still serves."""
        needs = msgspec.json.decode(await connection.call(LOOK, b""), type=Needs)
        there = msgspec.convert(needs.features, type=features.Features)
        lacks = features.missing(there, cpufeatures.here())
        for one in needs.containers:
            if one.name == managed.record.container:
                lacks += await asyncio.to_thread(files.missing, managed, one)
                here = {point for point, _ in managed.record.mounts or ()}
                lacks += [f"{point} is mounted at one end only" for point in here ^ {*one.points}]
        if lacks:
            await self._refuse(
                connection,
                f"node {self._site.node}: {'; '.join(lacks)}",
                "let such pods run on nodes of one kind (node affinity)",
            )
        if needs.trouble:
            why = "; ".join(needs.trouble)
            self._troubled = self._troubled or time.monotonic()
            if time.monotonic() > self._troubled + _TROUBLE_S:
                await self._refuse(connection, why, "see docs/moving.md, 'What comes along'")
            raise ArchitectError(f"pod {self._pod.key} cannot leave yet", why, "it is tried again")
        return needs

    async def _refuse(self, connection: Connection, why: str, fix: str) -> NoReturn:
        await connection.call(REFUSE, why.encode())
        raise NotHere(f"the state of {self.checkpoint.spec.podName} cannot move", why, fix)

    async def _ask_to_leave(self, connection: Connection) -> Manifest:
        log("asks to leave", pod=self._pod.key, checkpoint=self.checkpoint.key)
        raw = await connection.call(LEAVE, b"")
        log("fetching", pod=self._pod.key, ms=self._ms())
        manifest = msgspec.json.decode(raw, type=Manifest)
        shutil.rmtree(self._place, ignore_errors=True)
        self._place.mkdir(parents=True, mode=0o700)
        for one in manifest.containers:
            (self._place / one.name).mkdir(mode=0o700)
        (self._place / _MANIFEST).write_bytes(raw)
        return manifest

    async def _fetch(self, connection: Connection, manifest: Manifest) -> None:
        wishes = [
            FileWish(f"{one.name}/{file.name}", file.size)
            for one in manifest.containers
            for file in one.files
        ]
        fetched = await connection.fetch(
            wishes, self._place, streams=_STREAMS, limit=self._site.limit
        )
        self._bytes = fetched.bytes
        log("fetched", pod=self._pod.key, ms=self._ms(), bytes=fetched.bytes)

    async def _make_home(self, managed: MovableContainer, old: Sequence[str]) -> None:
        """The pod's network namespace takes its addresses, and packets for it wait."""
        if not self._rewrites:
            for one, other in _pairs(managed, old).items():
                await asyncio.to_thread(home.settle, managed.record.keeper, one, other, ())
        await managed.expect()

    async def _let_in(self, managed: MovableContainer, manifest: Manifest) -> None:
        """The same for its connections."""
        managed.expect_ports(_of(manifest, managed).quiet)
        flows = [Flow.parse(flow) for flow in manifest.flows]
        for old, new in _pairs(managed, manifest.addresses).items():
            own = tuple(flow for flow in flows if flow.local == old)
            if own:
                dwell = home.disguise if self._rewrites else home.settle
                await asyncio.to_thread(dwell, managed.record.keeper, old, new, own)

    async def _unpack(self, managed: MovableContainer, manifest: Manifest) -> None:
        """What was fetched is made this container's."""
        mine, settings = _of(manifest, managed), managed.settings
        place = self._place / mine.name
        if settings.rewrite_listeners or self._rewrites:
            pairs = _pairs(managed, manifest.addresses)
            criuaddresses.rewrite(
                place,
                listeners=_wildcards(pairs) if settings.rewrite_listeners else {},
                established=pairs if self._rewrites else {},
            )
        await asyncio.to_thread(files.unpack, managed, place, mine.directories, mine.generations)

    async def _commit(self, manifest: Manifest) -> None:
        """From here on this node has the pod. In doubt nobody goes on until the API has answered."""
        kube = self._site.kube
        new = home.addresses(self._site.registry.of_pod(self._pod.metadata.uid)[0].record.keeper)
        move = Move(
            oldAddresses=tuple(manifest.addresses),
            newAddresses=tuple(new),
            ports=tuple(manifest.ports),
            flows=tuple(manifest.flows),
            accepting=True,
        )
        expected = self.checkpoint
        while True:
            try:
                self.checkpoint = await checkpoints.commit(kube, expected, move)
                break
            except checkpoints.Lost as error:
                raise MoveLost("the move was given up", str(error), "it is tried again") from error
            except KubeError as error:
                log("commit in doubt", checkpoint=expected.key, error=str(error))
                refused = str(error) if error.status in _REFUSALS else None
            found = await insist(
                lambda: kube.get(Checkpoint, expected.metadata.name, expected.metadata.namespace)
            )
            if found.status.phase == "Committed" and _claimant(found) == self._pod.metadata.uid:
                self.checkpoint = found
                break
            if found.metadata.resourceVersion != expected.metadata.resourceVersion:
                raise MoveLost("the move was given up", "the source went on", "it is tried again")
            if refused is not None:
                raise MoveLost("the move was given up", refused, "see `kubectl describe ckpt`")
        self._site.checkpoints.note(self.checkpoint)
        log("committed", pod=self._pod.key, ms=self._ms())

    # ---- after it ----------------------------------------------------------------------------------

    def _read(self) -> Manifest:
        return msgspec.json.decode((self._place / _MANIFEST).read_bytes(), type=Manifest)

    async def _land(self, managed: MovableContainer, manifest: Manifest) -> None:
        mine = _of(manifest, managed)
        if managed.arrivable:
            # Made anew after the commit, or not the first of the pod's containers.
            await managed.prepare()
            await self._make_home(managed, manifest.addresses)
            await self._let_in(managed, manifest)
            await self._unpack(managed, manifest)
            await self._lay_in(managed, manifest)
        wake = not mine.awake and managed.settings.autoscaleup_after_migration
        if managed.expecting:
            await self._restore(managed, mine, wake=wake)
        else:
            await managed.settled()
            if wake:
                await managed.wake("postmigration-autoscaleup-containers")
        self._landed.add(mine.name)
        self._paused_ms = self._ms()

    async def _restore(
        self, managed: MovableContainer, mine: MovedContainer, *, wake: bool
    ) -> None:
        """The keeper tries it lazily, and then with all pages read first: that is one time.

        After it the start fails, and the kubelet makes the container anew, for the next time.
        """
        failures = self._failures[mine.name] + 1
        gives_up = pairing.gives_up(self._site.on_restore_failure, failures)
        advice = f"{self._kept()}; {self._next(gives_up)}"
        try:
            await managed.land(awake=mine.awake, wake=wake, age=mine.age_s, advice=advice)
        except NotRestored as error:
            self._failures[mine.name] = failures
            log("not restored", pod=self._pod.key, failures=failures, error=str(error))
            if gives_up:
                await self._give_up(error, failures)
            else:
                self._say(str(error))
            raise

    def _kept(self) -> str:
        return f"its state is kept on node {self._site.node} in {self._place}"

    def _next(self, gives_up: bool) -> str:
        if gives_up:
            return "its pod starts fresh, as onRestoreFailure of the chart says"
        if self._site.on_restore_failure is OnRestoreFailure.FRESH:
            return "it is tried once more, then its pod starts fresh"
        return (
            "the kubelet tries again; delete the pod to have its successor start fresh; "
            "see docs/troubleshooting.md, 'RestoreFailed after a move'"
        )

    async def _give_up(self, error: NotRestored, failures: int) -> None:
        """The next start of the container, which finds this in the API, is a fresh one.

        Not before that is written: two that know different things would do different things. While the API
        does not answer, starts wait for it.
        """
        if self._saying is not None:
            self._saying.cancel()
        message = (
            f"{error.what}, {failures} times in a row: {error.why}; its pod starts fresh; "
            f"{self._kept()} until the Checkpoint {self.checkpoint.metadata.name} is deleted"
        )
        try:
            written = await insist(
                lambda: checkpoints.given_up(self._site.kube, self.checkpoint, message)
            )
        except ArchitectError as refused:
            # It is tried again with the next start.
            log("not given up", checkpoint=self.checkpoint.key, error=str(refused))
            return
        self.checkpoint = written
        self._site.checkpoints.note(written)
        about = Reference.pod(self._pod.metadata)
        self._site.recorder.record(about, STARTED_FRESH, message, WARNING)
        log("given up", pod=self._pod.key, checkpoint=written.key)

    def _say(self, message: str) -> None:
        """Shows it on the Checkpoint, without waiting for the API."""
        if self._saying is not None:
            self._saying.cancel()
        self._saying = asyncio.create_task(self._write_not_restored(message))

    async def _write_not_restored(self, message: str) -> None:
        try:
            written = await insist(
                lambda: checkpoints.not_restored(self._site.kube, self.checkpoint, message)
            )
        except ArchitectError as error:
            log("message not written", checkpoint=self.checkpoint.key, error=str(error))
            return
        self._site.checkpoints.note(written)

    async def _all_landed(self, managed: MovableContainer, manifest: Manifest) -> None:
        """Says so, once the last one has."""
        if self._landed >= {one.name for one in manifest.containers}:
            self._restored(self._paused_ms)
            await asyncio.to_thread(silence.end, managed.record.keeper)

    def _restored(self, ms: int) -> None:
        about = Reference.pod(self._pod.metadata)
        message = (
            f"moved from node {self.checkpoint.spec.nodeName}: {self._bytes >> 20} MiB, "
            f"{ms} ms from its last instruction there to its first here"
        )
        self._site.recorder.record(about, MIGRATED, message, NORMAL)
        log("migrated", pod=self._pod.key, checkpoint=self.checkpoint.key, ms=ms, bytes=self._bytes)
        task = asyncio.create_task(self._write_restored(ms))
        self._writing = task

    def _ms(self) -> int:
        """Milliseconds since the source was asked to let go; 0 if an earlier daemon asked."""
        return int((time.monotonic() - self._began) * 1000) if self._began else 0

    async def _write_restored(self, ms: int) -> None:
        written = await insist(
            lambda: checkpoints.restored(self._site.kube, self.checkpoint, self._bytes, ms)
        )
        self.checkpoint = written
        self._site.checkpoints.note(written)
        shutil.rmtree(self._place, ignore_errors=True)


def leave_home(managed: MovableContainer) -> None:
    """The pod has no other address and no connections of another one any more; blocking."""
    with contextlib.suppress(ArchitectError, OSError):
        home.leave(managed.record.keeper)
        silence.end(managed.record.keeper)


def _of(manifest: Manifest, managed: MovableContainer) -> MovedContainer:
    return next(one for one in manifest.containers if one.name == managed.record.container)


async def _both(*works: Awaitable[None]) -> None:
    """Returns when all have come to an end. Raises what the first of them has raised."""
    for outcome in await asyncio.gather(*works, return_exceptions=True):
        if outcome is not None:
            raise outcome


def _pairs(managed: MovableContainer, old: Sequence[str]) -> dict[str, str]:
    """Each address that the pod had, and the one of that family that it has now."""
    new = home.addresses(managed.record.keeper)
    return {one: other for one in old for other in new if (":" in one) == (":" in other)}


def _wildcards(addresses: Iterable[str]) -> dict[str, str]:
    return {one: "::" if ":" in one else "0.0.0.0" for one in addresses}


def _claimant(checkpoint: Checkpoint) -> str:
    claim = checkpoint.status.claimedBy
    return claim.podUID if claim else ""
