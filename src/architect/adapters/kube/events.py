"""Events on pods (core/v1): what `kubectl describe pod` shows, with durations in the message.

Called by architectd and by the control plane. :meth:`Recorder.record` returns at once and never fails:
nothing waits for the API server. An event that repeats (same object, container, reason) within
:data:`REMEMBERED_S` is counted on the one that is there instead of becoming another, and while the API
server is away what repeats is merged before it is sent.
"""

from __future__ import annotations

import asyncio
import datetime
import logging
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import Any, Final

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.informer import Backoff, Timing
from architect.adapters.kube.resources import Event, Metadata

_log: Final = logging.getLogger(__name__)

REMEMBERED_S: Final = 600.0
"""As long as client-go's EventCorrelator counts repetitions. The API server forgets events after 1 h."""
MOST_PENDING: Final = 1000
"""Different events kept while the API server is away; beyond that the oldest are dropped."""
MOST_SENT: Final = 4096
"""Sent events that are remembered to be counted on, as in client-go."""
_RIGHTS_S: Final = 120.0
"""Seconds after which an event that we have no right to send is given up."""
NORMAL: Final = "Normal"
WARNING: Final = "Warning"
_MESSAGE: Final = 1024
"""Characters that the API takes."""


@dataclass(frozen=True, slots=True)
class Reference:
    """What an event is about."""

    kind: str
    name: str
    uid: str
    namespace: str = ""
    container: str = ""

    @classmethod
    def pod(cls, metadata: Metadata, container: str = "") -> Reference:
        """A pod, or a container of it."""
        return cls("Pod", metadata.name, metadata.uid, metadata.namespace, container)

    def body(self) -> dict[str, Any]:
        """As ``involvedObject``."""
        found = {"kind": self.kind, "apiVersion": "v1", "name": self.name, "uid": self.uid}
        if self.namespace:
            found["namespace"] = self.namespace
        if self.container:
            found["fieldPath"] = f"spec.containers{{{self.container}}}"
        return found


_Key = tuple[Reference, str, str]


@dataclass(slots=True)
class _Pending:
    message: str
    first: datetime.datetime
    last: datetime.datetime
    count: int = 1


@dataclass(slots=True)
class _Sent:
    name: str
    count: int
    at: float = field(default=0.0)


def seconds(duration_ms: float) -> str:
    """A duration for a message: "38 ms", "1.4 s"."""
    return f"{duration_ms:.0f} ms" if duration_ms < 1000 else f"{duration_ms / 1000:.1f} s"


class Recorder:
    """Sends events of one component. ``run`` it as a task."""

    def __init__(self, kube: Kube, component: str, host: str = "") -> None:
        self._kube = kube
        self._component = component
        self._host = host
        self._pending: OrderedDict[_Key, _Pending] = OrderedDict()
        self._sent: OrderedDict[_Key, _Sent] = OrderedDict()
        self._some = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.dropped = 0
        """Events lost because there were too many while the API server was away, or it refused them."""

    def record(self, about: Reference, reason: str, message: str, kind: str = NORMAL) -> None:
        """Has an event sent soon. ``kind`` is NORMAL or WARNING."""
        now = datetime.datetime.now(datetime.UTC)
        key = (about, reason, kind)
        message = message[:_MESSAGE]
        pending = self._pending.get(key)
        if pending is None:
            self._pending[key] = _Pending(message, now, now)
            if len(self._pending) > MOST_PENDING:
                self._pending.popitem(last=False)
                self.dropped += 1
        else:
            pending.message, pending.last = message, now
            pending.count += 1
        self._idle.clear()
        self._some.set()

    async def flushed(self) -> None:
        """Returns when everything recorded so far is sent or given up."""
        await self._idle.wait()

    async def run(self) -> None:
        """Sends; never returns."""
        backoff = Backoff(Timing())
        while True:
            await self._some.wait()
            self._some.clear()
            while self._pending:
                key, pending = self._pending.popitem(last=False)
                try:
                    await self._send(key, pending)
                except KubeError as error:
                    if not error.temporary and not _may_pass(error, pending):
                        # A namespace that is being deleted takes no events; nothing to be done about it.
                        self.dropped += 1
                        _log.warning("event %s for %s: %s", key[1], key[0].name, error)
                        continue
                    self._back(key, pending)
                    await asyncio.sleep(backoff.next(error.retry_after))
                else:
                    backoff.reset()
            self._idle.set()

    def _back(self, key: _Key, pending: _Pending) -> None:
        newer = self._pending.pop(key, None)
        if newer is not None:
            pending.message, pending.last = newer.message, newer.last
            pending.count += newer.count
        self._pending[key] = pending
        self._pending.move_to_end(key, last=False)

    async def _send(self, key: _Key, pending: _Pending) -> None:
        about, reason, kind = key
        loop = asyncio.get_running_loop()
        where = about.namespace or "default"
        sent = self._sent.get(key)
        if sent is not None and loop.time() - sent.at < REMEMBERED_S:
            count = sent.count + pending.count
            body = {
                "count": count,
                "lastTimestamp": _rfc3339(pending.last),
                "message": pending.message,
            }
            try:
                await self._kube.patch(Event, sent.name, body, where)
            except KubeError as error:
                if error.status != 404:
                    raise
            else:
                sent.count, sent.at = count, loop.time()
                self._sent.move_to_end(key)
                return
        name = f"{about.name[:230]}.{int(pending.first.timestamp() * 1e9):x}"
        body = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": where},
            "involvedObject": about.body(),
            "reason": reason,
            "message": pending.message,
            "type": kind,
            "count": pending.count,
            "firstTimestamp": _rfc3339(pending.first),
            "lastTimestamp": _rfc3339(pending.last),
            "source": {"component": self._component, "host": self._host},
            "reportingComponent": self._component,
            "reportingInstance": self._host,
        }
        try:
            await self._kube.create(Event, body, where)
        except KubeError as error:
            # An answer that was lost: the event of the first try is there.
            if error.status != 409:
                raise
        self._sent[key] = _Sent(name, pending.count, loop.time())
        if len(self._sent) > MOST_SENT:
            self._sent.popitem(last=False)


def _may_pass(error: KubeError, pending: _Pending) -> bool:
    """Whether a missing right may be none: an API server that has just started knows no roles yet."""
    age = datetime.datetime.now(datetime.UTC) - pending.last
    is_ending = "being terminated" in error.why
    return error.status in (401, 403) and not is_ending and age.total_seconds() < _RIGHTS_S


def _rfc3339(when: datetime.datetime) -> str:
    return when.strftime("%Y-%m-%dT%H:%M:%SZ")
