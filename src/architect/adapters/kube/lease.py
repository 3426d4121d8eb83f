"""Leader election: of several replicas one acts, by a Lease that it renews (coordination.k8s.io/v1).

Used by the control plane. The rules are those of k8s.io/client-go/tools/leaderelection:

- Whoever finds the lease free, or not renewed for its duration, writes itself in. The write names the
  version that was read, so one of several contenders wins.
- Whether it was renewed is judged by when *we* saw it change, on our own monotonic clock, never by the
  times in it: clocks of nodes differ.
- A leader that cannot renew for ``renew_deadline_s``, which is shorter than the duration, stops acting before
  anyone else may begin.
- On an orderly end the lease is given up, so that the next leader need not wait.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import logging
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Final

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.resources import Lease

_log: Final = logging.getLogger(__name__)

_RELEASES: Final = 3
"""Tries to give the lease up: only a renewal of our own can come in between."""


@dataclass(frozen=True, slots=True)
class Terms:
    """Times of the election, in seconds; the defaults are those of Kubernetes' own components."""

    duration_s: float = 15.0
    """Others wait that long after the last renewal they saw."""
    renew_deadline_s: float = 10.0
    """A leader that has not renewed for that long stops."""
    retry_s: float = 2.0
    """Between two tries to get or to renew it."""


class LostLease(Exception):
    """The lease could not be renewed, or somebody else has it."""


class Election:
    """One contender for one lease."""

    def __init__(
        self,
        kube: Kube,
        name: str,
        namespace: str,
        identity: str,
        terms: Terms | None = None,
    ) -> None:
        self._kube = kube
        self._name = name
        self._namespace = namespace
        self._identity = identity
        self._terms = terms or Terms()
        self._random = random.Random()
        self._seen: Lease | None = None
        self._seen_at = 0.0
        self._until = -math.inf

    @property
    def leading(self) -> bool:
        """Whether this contender may act now. Ask before each write: a process that was stopped for a while
        and goes on must not act on a lease that somebody else has by now."""
        return asyncio.get_running_loop().time() < self._until

    @property
    def holder(self) -> str:
        """Who has the lease, as last seen; empty if nobody."""
        return (self._seen.spec.holderIdentity or "") if self._seen else ""

    async def lead(self, work: Callable[[], Awaitable[None]]) -> None:
        """Waits for the lease, runs ``work`` while it is held, and gives it up afterwards.

        Cancelling this ends the work first and gives the lease up then. ``work`` is cancelled as soon as the
        lease may be lost.

        Raises:
            LostLease: it was lost; the caller ends its process or tries again.
        """
        await self._acquire()
        _log.info("leading %s as %s", self._name, self._identity)
        task = asyncio.ensure_future(work())
        renewal = asyncio.ensure_future(self._keep())
        try:
            await asyncio.wait({task, renewal}, return_when=asyncio.FIRST_COMPLETED)
            if renewal.done():
                await renewal
            await task
        finally:
            self._until = -math.inf
            for one in (task, renewal):
                one.cancel()
            await asyncio.gather(task, renewal, return_exceptions=True)
            await asyncio.shield(self._release())

    async def _acquire(self) -> None:
        while True:
            try:
                if await self._renewed():
                    return
            except KubeError as error:
                _log.warning("%s", error)
            # Contenders that began together should not go on together.
            await asyncio.sleep(self._terms.retry_s * self._random.uniform(1.0, 1.2))

    async def _keep(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(max(0.0, min(self._terms.retry_s, self._until - loop.time())))
            try:
                async with asyncio.timeout_at(self._until):
                    ours = await self._renewed()
            except TimeoutError as error:
                why = f"{self._name}: not renewed for {self._terms.renew_deadline_s:g} s"
                raise LostLease(why) from error
            except KubeError as error:
                _log.warning("%s", error)
                continue
            if not ours and self.holder != self._identity:
                raise LostLease(f"{self._name}: {self.holder or 'nobody'} has it")

    async def _renewed(self) -> bool:
        # What counts is when the request is sent: others may see the renewal from then on.
        begun = asyncio.get_running_loop().time()
        ours = await self._try()
        if ours:
            self._until = begun + self._terms.renew_deadline_s
        return ours

    async def _try(self) -> bool:
        """Reads the lease and writes us in if we may. Returns whether it is ours for another duration."""
        loop = asyncio.get_running_loop()
        try:
            found = await self._kube.get(Lease, self._name, self._namespace)
        except KubeError as error:
            if error.status != 404:
                raise
            return await self._write(None)
        if self._seen is None or found.spec != self._seen.spec:
            self._seen_at = loop.time()
        self._seen = found
        ours = found.spec.holderIdentity == self._identity
        duration = found.spec.leaseDurationSeconds or self._terms.duration_s
        free = not found.spec.holderIdentity or loop.time() >= self._seen_at + duration
        if not ours and not free:
            return False
        return await self._write(found)

    async def _write(self, found: Lease | None) -> bool:
        now = _micro(datetime.datetime.now(datetime.UTC))
        was = found.spec if found else None
        ours = was is not None and was.holderIdentity == self._identity
        transitions = (was.leaseTransitions or 0) if was else 0
        spec = {
            "holderIdentity": self._identity,
            # The API takes whole seconds of at least one; rounded up, so nobody comes too early.
            "leaseDurationSeconds": max(1, math.ceil(self._terms.duration_s)),
            "acquireTime": was.acquireTime if was and ours else now,
            "renewTime": now,
            "leaseTransitions": transitions if ours or was is None else transitions + 1,
        }
        return await self._put(found, spec)

    async def _put(self, found: Lease | None, spec: dict[str, Any]) -> bool:
        loop = asyncio.get_running_loop()
        metadata: dict[str, Any] = {"name": self._name, "namespace": self._namespace}
        body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": metadata}
        body["spec"] = spec
        try:
            if found is None:
                self._seen = await self._kube.create(Lease, body, self._namespace)
            else:
                metadata["resourceVersion"] = found.metadata.resourceVersion
                self._seen = await self._kube.replace(Lease, self._name, body, self._namespace)
        except KubeError as error:
            if error.status == 409:
                return False
            raise
        self._seen_at = loop.time()
        return True

    async def _release(self) -> None:
        if self._seen is None:
            return
        with contextlib.suppress(KubeError):
            # A renewal that was cancelled may still have been written, or be written in between: read again.
            for _ in range(_RELEASES):
                found = await self._kube.get(Lease, self._name, self._namespace)
                if found.spec.holderIdentity != self._identity:
                    return
                now = _micro(datetime.datetime.now(datetime.UTC))
                spec = {
                    "holderIdentity": "",
                    "leaseDurationSeconds": 1,
                    "acquireTime": now,
                    "renewTime": now,
                    "leaseTransitions": found.spec.leaseTransitions or 0,
                }
                if await self._put(found, spec):
                    return


def _micro(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
