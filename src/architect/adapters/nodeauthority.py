"""The authority that signs nodes' certificates: made, kept as text, and put to work.

Called by the control plane's leader (:mod:`architect.processes.controlplane.identities`), which keeps it in
a Secret. One authority signs; an earlier one stays trusted until it has ended: a renewal breaks nothing.
"""

from __future__ import annotations

import datetime as dt
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from architect.adapters import certificates
from architect.decisions.identity import LIFE_S

NAME: Final = "architect node authority"


@dataclass(frozen=True, slots=True)
class Authority:
    """Certificates that are trusted, the one that signs first, and its key; PEM text."""

    certificates: str
    key: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Request:
    """What a request for a certificate says."""

    common_name: str
    organizations: tuple[str, ...]
    names: tuple[str, ...]
    sound: bool
    parsed: x509.CertificateSigningRequest = field(repr=False)


def renewed(current: Authority | None, now: dt.datetime) -> Authority:
    """``current`` itself as long as it is good, else what replaces it; ``now`` is aware."""
    known = certificates.read_certificates(current.certificates) if current else []
    key = certificates.read_key(current.key) if current else None
    trusted = [one for one in known if now < one.not_valid_after_utc]
    if (
        current is not None
        and key is not None
        and trusted
        and trusted == known
        and certificates.belongs(trusted[0], key)
        and not certificates.due(trusted[0], now)
    ):
        return current
    if key is None or not trusted or not certificates.belongs(trusted[0], key):
        trusted = []
    if key is None or not trusted or certificates.due(trusted[0], now):
        fresh, key = certificates.new_authority(NAME, now)
        trusted.insert(0, fresh)
    return Authority(certificates.as_text(trusted), certificates.key_text(key))


def read(pem: bytes) -> Request:
    """What a request says. Raises ValueError if it is none, or has what nobody here knows."""
    try:
        return _read(pem)
    except (
        UnsupportedAlgorithm,
        x509.DuplicateExtension,
        x509.UnsupportedGeneralNameType,
    ) as error:
        # Anybody may send one, and these are no ValueErrors.
        raise ValueError(str(error)) from error


def _read(pem: bytes) -> Request:
    parsed = x509.load_pem_x509_csr(pem)
    key = parsed.public_key()
    of_ours = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP256R1)
    sound = of_ours and parsed.is_signature_valid
    try:
        found = parsed.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        names: tuple[str, ...] = ()
    else:
        names = tuple(one.value if isinstance(one, x509.DNSName) else repr(one) for one in found)
    return Request(
        common_name=", ".join(_texts(parsed, NameOID.COMMON_NAME)),
        organizations=tuple(_texts(parsed, NameOID.ORGANIZATION_NAME)),
        names=names,
        sound=sound,
        parsed=parsed,
    )


def sign(authority: Authority, request: Request, now: dt.datetime) -> str:
    """A certificate for what was asked, as PEM text. Raises ValueError if the authority is not sound."""
    signer = certificates.read_certificates(authority.certificates)
    key = certificates.read_key(authority.key)
    public = request.parsed.public_key()
    if not signer or key is None or not isinstance(public, ec.EllipticCurvePublicKey):
        raise ValueError("the authority cannot sign")
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH, ExtendedKeyUsageOID.SERVER_AUTH]
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(key.public_key())
    # Only what has been judged: a request's subject may have more.
    subject = x509.Name(
        [
            *(x509.NameAttribute(NameOID.ORGANIZATION_NAME, one) for one in request.organizations),
            x509.NameAttribute(NameOID.COMMON_NAME, request.common_name),
        ]
    )
    names: Sequence[x509.GeneralName] = [x509.DNSName(one) for one in request.names]
    made = (
        certificates.builder(subject, public, dt.timedelta(seconds=LIFE_S), now)
        .issuer_name(signer[0].subject)
        .add_extension(issuer, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(certificates.key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(key, hashes.SHA256())
    )
    return certificates.as_text([made])


def _texts(request: x509.CertificateSigningRequest, kind: x509.ObjectIdentifier) -> list[str]:
    return [str(one.value) for one in request.subject.get_attributes_for_oid(kind)]
