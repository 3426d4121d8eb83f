"""Signs the nodes' certificates: answers their requests, and keeps the authority.

Run by :mod:`.controller` while this replica leads. The authority is in a Secret, made by a compare-and-swap
so that two replicas never have two; what others have to trust is in a ConfigMap.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import datetime as dt
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final

from architect.adapters import nodeauthority
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import WARNING, Recorder, Reference
from architect.adapters.kube.informer import Change, Informer
from architect.adapters.kube.resources import (
    CertificateSigningRequest,
    ConfigMap,
    Node,
    Secret,
)
from architect.adapters.nodeauthority import Authority
from architect.contract.kubernetes import NODE_AUTHORITY, NODE_SIGNER
from architect.decisions import identity

_log: Final = logging.getLogger(__name__)

_CA, _KEY = "ca.crt", "ca.key"
_LOOK_S: Final = 30.0
"""Seconds between two looks when nothing happens."""
_OLD: Final = dt.timedelta(hours=1)
"""After which a request that its node has not deleted is."""


class Identities:
    """See the module; ``run`` it once."""

    def __init__(
        self,
        kube: Kube,
        namespace: str,
        nodes: Informer[Node],
        recorder: Recorder,
        may_act: Callable[[], bool] = lambda: True,
    ) -> None:
        self._kube = kube
        self._namespace = namespace
        self._nodes = nodes
        self._recorder = recorder
        self._may_act = may_act
        self._stale = asyncio.Event()
        self._authority: Authority | None = None
        self.requests: Informer[CertificateSigningRequest] = Informer(
            kube, CertificateSigningRequest, fields=f"spec.signerName={NODE_SIGNER}"
        )
        self.requests.add_handler(self._changed)

    async def run(self) -> None:
        """Never returns; cancel it."""
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self.requests.run())
            tasks.create_task(self._keep())

    def _changed(self, _: Change[CertificateSigningRequest]) -> None:
        self._stale.set()

    async def _keep(self) -> None:
        await self._nodes.synced.wait()
        while True:
            self._stale.clear()
            if self._may_act():
                try:
                    self._authority = await self._kept_authority()
                    for request in list(self.requests.objects.values()):
                        await self._look(request, self._authority)
                except KubeError as error:
                    _log.warning("%s", error)
                    await asyncio.sleep(1.0 if error.retry_after is None else error.retry_after)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_LOOK_S):
                    await self._stale.wait()

    # -- the authority ------------------------------------------------------------------------------

    async def _kept_authority(self) -> Authority:
        now = dt.datetime.now(dt.UTC)
        try:
            secret: Secret | None = await self._kube.get(Secret, NODE_AUTHORITY, self._namespace)
        except KubeError as error:
            if error.status != 404:
                raise
            secret = None
        current = _read(secret.data) if secret else None
        authority = nodeauthority.renewed(current, now)
        if authority is not current:
            body = self._body("Secret", authority, secret)
            if secret is None:
                await self._kube.create(Secret, body, self._namespace)
            else:
                await self._kube.replace(Secret, NODE_AUTHORITY, body, self._namespace)
            _log.info("made a new authority for nodes' certificates")
        await self._publish(authority)
        return authority

    def _body(self, kind: str, authority: Authority, secret: Secret | None) -> dict[str, Any]:
        data = {_CA: authority.certificates, _KEY: authority.key}
        metadata = {"name": NODE_AUTHORITY, "namespace": self._namespace}
        if secret is not None:
            metadata["resourceVersion"] = secret.metadata.resourceVersion
        encoded = {key: base64.b64encode(text.encode()).decode() for key, text in data.items()}
        return {"apiVersion": "v1", "kind": kind, "metadata": metadata, "data": encoded}

    async def _publish(self, authority: Authority) -> None:
        data = {_CA: authority.certificates}
        try:
            found = await self._kube.get(ConfigMap, NODE_AUTHORITY, self._namespace)
        except KubeError as error:
            if error.status != 404:
                raise
            metadata = {"name": NODE_AUTHORITY, "namespace": self._namespace}
            body = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data}
            await self._kube.create(ConfigMap, body, self._namespace)
            return
        if found.data != data:
            change = {"data": data}
            await self._kube.patch(ConfigMap, NODE_AUTHORITY, change, self._namespace)

    # -- requests -----------------------------------------------------------------------------------

    async def _look(self, request: CertificateSigningRequest, authority: Authority) -> None:
        name = request.metadata.name
        now = dt.datetime.now(dt.UTC)
        made = dt.datetime.fromisoformat(request.metadata.creationTimestamp or now.isoformat())
        try:
            if now - made > _OLD:
                await self._kube.delete(CertificateSigningRequest, name)
            elif not request.status.conditions and not request.status.certificate:
                await self._answer(request, authority, now)
        except KubeError as error:
            if error.status != 404:
                _log.warning("certificate request %s: %s", name, error)

    async def _answer(
        self, request: CertificateSigningRequest, authority: Authority, now: dt.datetime
    ) -> None:
        name, spec = request.metadata.name, request.spec
        try:
            asked = nodeauthority.read(base64.b64decode(spec.request))
        except ValueError as error:
            await self._deny(request, f"it cannot be read: {error}")
            return
        why = identity.refusal(
            identity.Asked(
                username=spec.username or "",
                node_claims=tuple((spec.extra or {}).get(identity.NODE_CLAIM, ())),
                usages=frozenset(spec.usages or ()),
                common_name=asked.common_name,
                organizations=asked.organizations,
                names=asked.names,
                sound=asked.sound,
            ),
            self._namespace,
            self._nodes.objects.keys(),
        )
        if why:
            await self._deny(request, why)
            return
        certificate = nodeauthority.sign(authority, asked, now)
        await self._say(name, "Approved", "NodeOfItsOwn", "architectd asks for its own node")
        encoded = base64.b64encode(certificate.encode()).decode()
        change = {"status": {"certificate": encoded}}
        await self._kube.patch(CertificateSigningRequest, name, change, subresource="status")
        _log.info("certificate for node %s", asked.common_name)

    async def _deny(self, request: CertificateSigningRequest, why: str) -> None:
        name = request.metadata.name
        _log.warning("certificate request %s denied: %s", name, why)
        # At the node that asks, by its token; what the request says may be anybody's.
        for claim in (request.spec.extra or {}).get(identity.NODE_CLAIM, ()):
            if (node := self._nodes.objects.get(claim)) is not None:
                about = Reference("Node", claim, node.metadata.uid)
                message = f"certificate request {name} denied: {why}"
                self._recorder.record(about, "CertificateDenied", message, WARNING)
        await self._say(name, "Denied", "NotItsNode", why)

    async def _say(self, name: str, kind: str, reason: str, message: str) -> None:
        condition = {"type": kind, "status": "True", "reason": reason, "message": message}
        change = {"status": {"conditions": [condition]}}
        await self._kube.patch(CertificateSigningRequest, name, change, subresource="approval")


def _read(data: Mapping[str, str] | None) -> Authority | None:
    try:
        text = {k: base64.b64decode(v, validate=True).decode() for k, v in (data or {}).items()}
        return Authority(text[_CA], text[_KEY])
    except (KeyError, ValueError):
        return None
