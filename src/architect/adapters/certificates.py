"""The certificates by which the API server knows our webhooks: made, kept as text, put to use.

An authority of our own signs one serving certificate that all replicas share. Both are renewed when
two thirds of their life are over. A new authority is only added to those that clients are to trust;
it signs from the next serving certificate on, so that nobody ever meets a certificate whose
authority they have not been told of. Called by processes.manager, which keeps the text in a Secret.
"""

from __future__ import annotations

import base64
import binascii
import datetime as dt
import ipaddress
import os
import ssl
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

AUTHORITY_LIFE: Final = dt.timedelta(days=3652)
"""Ten years."""
SERVING_LIFE: Final = dt.timedelta(days=90)
CLOCK_SKEW: Final = dt.timedelta(hours=1)
"""How far another machine's clock may be behind: certificates begin that much in the past."""

AUTHORITY_NAME: Final = "architect admission authority"
SERVING_NAME: Final = "architect admission"

CA_CERTIFICATE: Final = "ca.crt"
CA_KEY: Final = "ca.key"
CERTIFICATE: Final = "tls.crt"
KEY: Final = "tls.key"
"""Names in the Secret, as cert-manager and kubernetes.io/tls have them."""

_NO_PASSWORD: Final = ""
"""Keeps OpenSSL from asking the terminal for the password of an encrypted key."""


@dataclass(frozen=True, slots=True)
class Credentials:
    """What the replicas share. All of it is PEM text; keys do not show in a repr."""

    authorities: str
    """Certificates of the authorities that clients are to trust, the one that signs first."""
    authority_key: str = field(repr=False)
    """Key of the first authority."""
    certificate: str
    """The serving certificate."""
    key: str = field(repr=False)
    """Its key."""

    @classmethod
    def from_secret(cls, data: Mapping[str, str] | None) -> Credentials | None:
        """Return what a Secret's ``data`` (base64) holds; None if anything of it is missing."""
        try:
            text = {k: base64.b64decode(v, validate=True).decode() for k, v in (data or {}).items()}
            return cls(text[CA_CERTIFICATE], text[CA_KEY], text[CERTIFICATE], text[KEY])
        except (KeyError, binascii.Error, UnicodeDecodeError):
            return None

    def to_secret(self) -> dict[str, str]:
        """Return the ``data`` of a Secret."""
        text = {
            CA_CERTIFICATE: self.authorities,
            CA_KEY: self.authority_key,
            CERTIFICATE: self.certificate,
            KEY: self.key,
        }
        return {k: base64.b64encode(v.encode()).decode() for k, v in text.items()}

    @property
    def bundle(self) -> str:
        """The authorities as a webhook's ``caBundle``: base64 of PEM."""
        return base64.b64encode(self.authorities.encode()).decode()


def due(certificate: x509.Certificate, now: dt.datetime) -> bool:
    """Whether two thirds of its life are over, or none of it has begun."""
    begin, end = certificate.not_valid_before_utc, certificate.not_valid_after_utc
    return not begin <= now < begin + (end - begin) * 2 / 3


def key_text(key: ec.EllipticCurvePrivateKey) -> str:
    """A key as PEM text."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    ).decode()


def as_text(certificates: Iterable[x509.Certificate]) -> str:
    """Certificates as PEM text."""
    return "".join(c.public_bytes(serialization.Encoding.PEM).decode() for c in certificates)


def read_key(text: str) -> ec.EllipticCurvePrivateKey | None:
    """The key in PEM text; None if there is none."""
    try:
        key = serialization.load_pem_private_key(text.encode(), None)
    except (ValueError, TypeError):
        return None
    return key if isinstance(key, ec.EllipticCurvePrivateKey) else None


def read_certificates(text: str) -> list[x509.Certificate]:
    """The certificates in PEM text; none if it is damaged."""
    try:
        return x509.load_pem_x509_certificates(text.encode())
    except ValueError:
        return []


def _name(common: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common)])


def builder(
    subject: x509.Name, public: ec.EllipticCurvePublicKey, life: dt.timedelta, now: dt.datetime
) -> x509.CertificateBuilder:
    """What all our certificates have: subject, key, serial number and times."""
    # X.509 knows whole seconds.
    begin = (now - CLOCK_SKEW).replace(microsecond=0)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(begin + life)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )


def key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    """What a key is for: to sign certificates, or for TLS."""
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def new_authority(
    name: str, now: dt.datetime
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    """A self-signed authority of that common name, and its key."""
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        builder(_name(name), key.public_key(), AUTHORITY_LIFE, now)
        .issuer_name(_name(name))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    return certificate, key


def _new_serving(
    authority: x509.Certificate,
    authority_key: ec.EllipticCurvePrivateKey,
    names: Sequence[str],
    now: dt.datetime,
) -> tuple[x509.Certificate, ec.EllipticCurvePrivateKey]:
    key = ec.generate_private_key(ec.SECP256R1())
    issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
    certificate = (
        builder(_name(SERVING_NAME), key.public_key(), SERVING_LIFE, now)
        .issuer_name(authority.subject)
        .add_extension(issuer, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName(_general_names(names)), critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    return certificate, key


def belongs(certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> bool:
    """Whether a certificate is of that key."""
    return certificate.public_key() == key.public_key()


def _is_signed(certificate: x509.Certificate, authority: x509.Certificate) -> bool:
    try:
        certificate.verify_directly_issued_by(authority)
    except (ValueError, TypeError, InvalidSignature):
        return False
    return True


def _general_names(names: Iterable[str]) -> list[x509.GeneralName]:
    """Names as a certificate has them: TLS clients do not look for an address among DNS names."""
    found: list[x509.GeneralName] = []
    for name in names:
        try:
            found.append(x509.IPAddress(ipaddress.ip_address(name)))
        except ValueError:
            found.append(x509.DNSName(name))
    return found


def _is_for(certificate: x509.Certificate, names: Iterable[str]) -> bool:
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
    except (x509.ExtensionNotFound, ValueError):
        return False
    return set(found.value) == set(_general_names(names))


def renewed(current: Credentials | None, names: Sequence[str], now: dt.datetime) -> Credentials:
    """Return ``current`` itself if it is good for servers called ``names``, else what replaces it.

    ``names`` are DNS names or IP addresses, ``now`` is aware. Whatever is due, damaged or for other
    names is made anew, and nothing else.
    """
    authorities = read_certificates(current.authorities) if current else []
    authority_key = read_key(current.authority_key) if current else None
    key = read_key(current.key) if current else None
    chain = read_certificates(current.certificate) if current else []
    serving = chain[0] if chain else None

    trusted = [a for a in authorities if now < a.not_valid_after_utc]
    sound = authority_key is not None and trusted and belongs(trusted[0], authority_key)
    if not sound or authority_key is None or due(trusted[0], now):
        added, authority_key = new_authority(AUTHORITY_NAME, now)
        trusted.insert(0, added)
    good = (
        serving is not None
        and key is not None
        and belongs(serving, key)
        and not due(serving, now)
        and _is_for(serving, names)
        and any(_is_signed(serving, authority) for authority in trusted)
    )
    if not good or serving is None or key is None:
        serving, key = _new_serving(trusted[0], authority_key, names, now)
    elif trusted == authorities and current is not None:
        return current
    return Credentials(as_text(trusted), key_text(authority_key), as_text([serving]), key_text(key))


def ends(certificate: str) -> dt.datetime | None:
    """When the first certificate of PEM text ends; None if there is none."""
    found = read_certificates(certificate)
    return found[0].not_valid_after_utc if found else None


def server_context() -> ssl.SSLContext:
    """A context for a TLS server, 1.2 or later, that has no certificate yet."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    return context


def put_to_use(context: ssl.SSLContext, certificate: bytes, key: bytes) -> None:
    """Have ``context`` present the certificate (PEM) from its next handshake on.

    Connections that are open stay so. Raises ssl.SSLError if the two do not belong together or are
    no PEM; then the context is as before. The key is not written to any disk.
    """
    # ssl takes files alone. This one is memory, and gone when it is closed.
    descriptor = os.memfd_create("certificate")
    try:
        left = memoryview(key.rstrip() + b"\n" + certificate)
        while left:
            left = left[os.write(descriptor, left) :]
        name = f"/proc/self/fd/{descriptor}"
        server_context().load_cert_chain(name, password=_NO_PASSWORD)
        context.load_cert_chain(name, password=_NO_PASSWORD)
    finally:
        os.close(descriptor)
