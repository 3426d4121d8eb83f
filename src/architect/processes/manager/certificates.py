"""Keeps the certificate that the webhooks are served with, and the API server's trust in it.

Either a Secret of our own (:class:`SharedSecret`): made, renewed, agreed upon by all replicas, and
its authorities written into our webhook configurations, again and again, because a ``helm upgrade``
may take them out. Or files that cert-manager keeps (:class:`Folder`), whose authority it writes
itself. ``main`` calls ``look`` once before it serves and then every few seconds.
"""

from __future__ import annotations

import datetime as dt
import ssl
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final, Protocol

from architect.adapters import certificates
from architect.adapters.certificates import Credentials
from architect.adapters.kube.client import KubeError
from architect.contract.errors import ArchitectError
from architect.processes.manager.cluster import CONFLICT, MISSING, Configuration, SecretData
from architect.processes.manager.journal import note

_ATTEMPTS: Final = 5
"""Times to look again when another replica was faster, at one ``look``."""


class CertificateFailure(ArchitectError):
    """There is no certificate to serve with."""


class SecretsAndHooks(Protocol):
    """The part of :class:`.cluster.Api` that is needed here."""

    async def secret(self, namespace: str, name: str) -> SecretData | None:
        """A Secret, None if there is none."""

    async def write_secret(
        self, namespace: str, name: str, data: Mapping[str, str], version: str | None
    ) -> None:
        """Creates or replaces it."""

    async def trust(self, kind: Configuration, name: str, bundle: str) -> bool:
        """Writes the authorities into a webhook configuration."""


class Source(Protocol):
    """Where the certificate comes from."""

    @property
    def ready(self) -> bool:
        """Whether the API server can be served."""

    async def look(self) -> None:
        """Does what is due. Raises ArchitectError if that failed; then it is tried again."""


def _now() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


class SharedSecret:
    """The certificate in a Secret that all replicas share."""

    def __init__(
        self,
        api: SecretsAndHooks,
        context: ssl.SSLContext,
        namespace: str,
        secret: str,
        names: Sequence[str],
        configurations: Sequence[tuple[Configuration, str]],
        now: Callable[[], dt.datetime] = _now,
    ) -> None:
        """``names`` are the server's DNS names or addresses; ``now`` is the time, aware."""
        self._api = api
        self._context = context
        self._namespace = namespace
        self._secret = secret
        self._names = names
        self._configurations = configurations
        self._now = now
        self._used: Credentials | None = None
        self._trusted = False

    @property
    def ready(self) -> bool:
        """Whether there is a certificate and the API server has been told to trust it."""
        return self._trusted and self._used is not None

    async def look(self) -> None:
        """Renews, has it trusted, puts it to use: in this order, so that no handshake fails.

        Raises KubeError; the certificate in use stays in use.
        """
        agreed = await self._agreed()
        failure: KubeError | None = None
        for kind, name in self._configurations:
            try:
                if await self._api.trust(kind, name, agreed.bundle):
                    note("trust", configuration=f"{kind.plural}/{name}")
            except KubeError as error:
                failure = failure or error
        if failure is None:
            self._trusted = True
        if agreed != self._used:
            certificates.put_to_use(self._context, agreed.certificate.encode(), agreed.key.encode())
            self._used = agreed
            note("certificate", secret=self._secret, until=certificates.ends(agreed.certificate))
        if failure is not None:
            raise failure

    async def _agreed(self) -> Credentials:
        """What the Secret holds, renewed if it has to be."""
        for _ in range(_ATTEMPTS):
            found = await self._api.secret(self._namespace, self._secret)
            kept = Credentials.from_secret(found.data) if found else None
            # If the Secret was lost, what the API server trusts at this moment is kept.
            wanted = certificates.renewed(kept or self._used, self._names, self._now())
            if kept == wanted:
                return wanted
            version = found.version if found else None
            try:
                await self._api.write_secret(
                    self._namespace, self._secret, wanted.to_secret(), version
                )
            except KubeError as error:
                if error.status not in (CONFLICT, MISSING):
                    raise
                continue
            return wanted
        raise KubeError(
            f"Secret {self._namespace}/{self._secret}",
            f"others changed it {_ATTEMPTS} times while it was to be renewed",
            "see who else writes it",
            status=CONFLICT,
        )


class Folder:
    """The certificate in files that somebody else (cert-manager) keeps."""

    def __init__(self, folder: Path, context: ssl.SSLContext) -> None:
        self._folder = folder
        self._context = context
        self._used: tuple[bytes, bytes] | None = None

    @property
    def ready(self) -> bool:
        """Whether there is a certificate."""
        return self._used is not None

    async def look(self) -> None:
        """Puts the files to use if they have changed. Raises CertificateFailure."""
        what = f"using {certificates.CERTIFICATE} and {certificates.KEY} of {self._folder}"
        fix = "see the Certificate whose secret is mounted there"
        try:
            read = (
                (self._folder / certificates.CERTIFICATE).read_bytes(),
                (self._folder / certificates.KEY).read_bytes(),
            )
        except OSError as error:
            raise CertificateFailure(what, error.strerror or str(error), fix) from error
        if read == self._used:
            return
        try:
            certificates.put_to_use(self._context, *read)
        except ssl.SSLError as error:
            why = f"they are no pair of certificate and key ({error.reason or error.strerror or error})"
            raise CertificateFailure(what, why, fix) from error
        self._used = read
        until = certificates.ends(read[0].decode(errors="replace"))
        note("certificate", folder=str(self._folder), until=until)


def configurations(mutating: str, validating: str) -> list[tuple[Configuration, str]]:
    """Return our two webhook configurations by their names; an empty name stands for none."""
    both = (Configuration.MUTATING, mutating), (Configuration.VALIDATING, validating)
    return [(kind, name) for kind, name in both if name]
