"""This node's identity among architectds: its key, its certificate, and whom it trusts.

Made by architectd in a cluster. The certificate is asked for by the API's own means, a
CertificateSigningRequest for our signer, which the control plane answers; the authority comes from a
ConfigMap. Everything is on the disk too: a daemon may start while the API is away.
"""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import secrets
import ssl
import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.informer import Backoff, Timing
from architect.adapters.kube.resources import CertificateSigningRequest, ConfigMap
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import NODE_AUTHORITY, NODE_SIGNER
from architect.decisions.identity import LIFE_S, USAGES

_log: Final = logging.getLogger(__name__)

_CA: Final = "ca.crt"
_PAIR: Final = "tls.pem"
"""Key and certificate in one file: they change together."""
_TIMES: Final = "times.json"
_END: Final = "-----END CERTIFICATE-----"
_LOOK_S: Final = 60.0
"""Seconds between two looks at the authority and at the clock."""
_ANSWER_S: Final = 60.0
"""Seconds until a request that nobody has answered is given up, and made anew."""
_POLL_S: Final = 0.3


class NoIdentity(ArchitectError):
    """The node could not get its certificate."""


class _Times(msgspec.Struct):
    """When the certificate was issued and when it ends; CLOCK_REALTIME seconds."""

    issued: float
    ends: float
    node: str
    authority: str = ""
    """Certificate of the authority that signed it, PEM."""


class Identity:
    """See the module; ``run`` it once."""

    def __init__(self, kube: Kube, node: str, namespace: str, home: Path = paths.IDENTITY) -> None:
        self.ready = asyncio.Event()
        """Set once there is a certificate and somebody to trust."""
        self._kube = kube
        self._node = node
        self._namespace = namespace
        self._home = home
        self._server = _context(ssl.PROTOCOL_TLS_SERVER)
        self._client = _context(ssl.PROTOCOL_TLS_CLIENT)
        self._trusted = ""

    def server_context(self) -> ssl.SSLContext:
        """For the transfer server: whoever connects needs a certificate of our authority."""
        return self._server

    def client_context(self) -> ssl.SSLContext:
        """For connections to other nodes."""
        return self._client

    async def run(self) -> None:
        """Keeps it fresh. Never returns; cancel it."""
        self._home.mkdir(parents=True, mode=0o700, exist_ok=True)
        self._put_to_use()
        backoff = Backoff(Timing())
        while True:
            try:
                await self._follow_authority()
                # Not only after a renewal, which may be refused for long.
                self._put_to_use()
                if self._is_due():
                    await self._renew()
                self._put_to_use()
            except (ArchitectError, OSError) as error:
                delay = backoff.next(None)
                _log.warning("no certificate for this node: %s; again in %.1f s", error, delay)
                await asyncio.sleep(delay)
            else:
                backoff.reset()
                await asyncio.sleep(_LOOK_S)

    async def _follow_authority(self) -> None:
        found = await self._kube.get(ConfigMap, NODE_AUTHORITY, self._namespace)
        text = (found.data or {}).get(_CA, "")
        if text and text != self._read(_CA):
            _write(self._home / _CA, text)

    def _is_due(self) -> bool:
        times = self._times()
        if times is None or not (self._home / _PAIR).exists():
            return True
        # An authority that was made anew, not renewed: nobody new trusts what the old one signed.
        if times.authority not in self._read(_CA):
            return True
        now = time.time()
        return not times.issued - 3600 <= now < times.issued + (times.ends - times.issued) * 2 / 3

    def _times(self) -> _Times | None:
        """None if there are none, or those of another node: a disk may be a copy."""
        try:
            times = msgspec.json.decode(self._read(_TIMES), type=_Times)
        except msgspec.MsgspecError:
            return None
        return times if times.node == self._node else None

    async def _renew(self) -> None:
        made = await _made(self._node)
        name = f"architect-node-{self._node}-{secrets.token_hex(4)}"
        body = {
            "apiVersion": "certificates.k8s.io/v1",
            "kind": "CertificateSigningRequest",
            "metadata": {"name": name},
            "spec": {
                "request": base64.b64encode(made["request"].encode()).decode(),
                "signerName": NODE_SIGNER,
                "usages": sorted(USAGES),
                "expirationSeconds": LIFE_S,
            },
        }
        now = time.time()
        # The one that signs is the first.
        head, end, _ = self._read(_CA).partition(_END)
        authority = head + end
        await self._kube.create(CertificateSigningRequest, body)
        try:
            certificate = await self._answer(name)
        finally:
            try:
                await self._kube.delete(CertificateSigningRequest, name)
            except KubeError as error:
                _log.debug("%s", error)
        _write(self._home / _PAIR, made["key"] + certificate)
        times = _Times(issued=now, ends=now + LIFE_S, node=self._node, authority=authority)
        _write(self._home / _TIMES, msgspec.json.encode(times).decode())
        _log.info("this node has a new certificate")

    async def _answer(self, name: str) -> str:
        end = time.monotonic() + _ANSWER_S
        while time.monotonic() < end:
            found = await self._kube.get(CertificateSigningRequest, name)
            if found.status.certificate:
                return base64.b64decode(found.status.certificate).decode()
            for one in found.status.conditions or ():
                if one.type in ("Denied", "Failed"):
                    raise NoIdentity(
                        f"certificate request {name}",
                        one.message or one.type,
                        "see the log of architect-control-plane",
                    )
            await asyncio.sleep(_POLL_S)
        raise NoIdentity(
            f"certificate request {name}",
            f"nobody has signed it within {_ANSWER_S:.0f} s",
            "see that architect-control-plane runs",
        )

    def _put_to_use(self) -> None:
        """Both contexts have what is on the disk, from their next handshake on."""
        pair, trusted = self._home / _PAIR, self._read(_CA)
        if not pair.exists() or not trusted or self._times() is None:
            return
        try:
            for context in (self._server, self._client):
                context.load_cert_chain(pair)
                if trusted != self._trusted:
                    context.load_verify_locations(cadata=trusted)
        except ssl.SSLError as error:
            _log.warning("the node's certificate cannot be used: %s", error)
            pair.unlink(missing_ok=True)
            return
        self._trusted = trusted
        self.ready.set()

    def _read(self, name: str) -> str:
        try:
            return (self._home / name).read_text()
        except FileNotFoundError:
            return ""


def _context(kind: int) -> ssl.SSLContext:
    context = ssl.SSLContext(kind)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    return context


async def _made(node: str) -> dict[str, str]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-I", "-m", "architect.adapters.nodekey", node,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    output, errors = await process.communicate()
    if process.returncode:
        why = errors.decode(errors="replace").strip().rpartition("\n")[2]
        raise NoIdentity("no key could be made for this node", why, "see architectd's log")
    found: dict[str, str] = json.loads(output)
    return found


def _write(file: Path, text: str) -> None:
    """For nobody but root, and whole or not at all."""
    fresh = file.with_name(file.name + ".new")
    with open(fresh, "w", opener=_private) as target:
        target.write(text)
    fresh.rename(file)


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)
