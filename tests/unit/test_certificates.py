"""The webhooks' certificates: who trusts which, when they are renewed, and what never shows."""

import base64
import contextlib
import dataclasses
import datetime as dt
import ssl

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509 import verification

from architect.adapters import certificates
from architect.adapters.certificates import (
    AUTHORITY_LIFE,
    CLOCK_SKEW,
    SERVING_LIFE,
    Credentials,
    put_to_use,
    renewed,
    server_context,
)

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
NAMES = ["architect-manager.architect.svc", "10.1.2.3"]
OTHER = ["other.svc"]
DAY = dt.timedelta(days=1)


@pytest.fixture(scope="module")
def first() -> Credentials:
    return renewed(None, NAMES, NOW)


def serving(credentials: Credentials) -> x509.Certificate:
    return x509.load_pem_x509_certificate(credentials.certificate.encode())


def authorities(credentials: Credentials) -> list[x509.Certificate]:
    return x509.load_pem_x509_certificates(credentials.authorities.encode())


def verify(credentials: Credentials, trusting: Credentials, name: str, when: dt.datetime) -> None:
    """Verify the serving certificate as a TLS client does that trusts `trusting`'s authorities."""
    store = verification.Store(authorities(trusting))
    builder = verification.PolicyBuilder().store(store).time(when)
    builder.build_server_verifier(x509.DNSName(name)).verify(serving(credentials), [])


def test_a_client_that_trusts_the_authority_trusts_the_server(first: Credentials) -> None:
    verify(first, first, NAMES[0], NOW)
    with pytest.raises(verification.VerificationError):
        verify(first, first, OTHER[0], NOW)
    with pytest.raises(verification.VerificationError):
        verify(first, renewed(None, NAMES, NOW), NAMES[0], NOW)
    names = serving(first).extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    assert [str(n) for n in names.get_values_for_type(x509.IPAddress)] == ["10.1.2.3"]


def test_the_promised_lives(first: Credentials) -> None:
    for certificate, life in (
        (serving(first), dt.timedelta(days=90)),
        (authorities(first)[0], dt.timedelta(days=3652)),
    ):
        assert certificate.not_valid_after_utc - certificate.not_valid_before_utc == life
        assert certificate.not_valid_before_utc == NOW - CLOCK_SKEW


def test_what_is_good_stays_the_same_object(first: Credentials) -> None:
    assert renewed(first, NAMES, NOW) is first
    assert renewed(first, list(reversed(NAMES)), NOW) is first
    assert renewed(first, NAMES, NOW - CLOCK_SKEW + SERVING_LIFE * 2 / 3 - DAY) is first


def test_after_two_thirds_the_serving_certificate_is_renewed_alone(first: Credentials) -> None:
    when = NOW - CLOCK_SKEW + SERVING_LIFE * 2 / 3
    second = renewed(first, NAMES, when)
    assert second.authorities == first.authorities
    assert second.key != first.key
    verify(second, first, NAMES[0], when)
    assert renewed(second, NAMES, when) is second


def test_a_new_authority_signs_only_after_it_was_announced(first: Credentials) -> None:
    when = NOW - CLOCK_SKEW + AUTHORITY_LIFE * 2 / 3
    shortly_before = renewed(first, NAMES, when - DAY)
    added = renewed(shortly_before, NAMES, when)
    assert len(authorities(added)) == 2
    assert added.certificate == shortly_before.certificate
    # Those who have not yet been told of the new one, and those who have.
    verify(added, first, NAMES[0], when)
    verify(added, added, NAMES[0], when)
    later = when + SERVING_LIFE
    signed = renewed(added, NAMES, later)
    verify(signed, added, NAMES[0], later)
    with pytest.raises(verification.VerificationError):
        verify(signed, first, NAMES[0], later)
    # The old one goes when it has ended.
    at_last = renewed(signed, NAMES, NOW + AUTHORITY_LIFE)
    assert authorities(at_last) == authorities(added)[:1]


def test_other_names_need_another_certificate_and_no_other_authority(first: Credentials) -> None:
    moved = renewed(first, OTHER, NOW)
    assert moved.authorities == first.authorities
    verify(moved, first, OTHER[0], NOW)


@pytest.mark.parametrize("part", [f.name for f in dataclasses.fields(Credentials)])
@pytest.mark.parametrize("damage", ["", "nonsense", "other"])
def test_whatever_is_damaged_is_made_anew(first: Credentials, part: str, damage: str) -> None:
    if damage == "other":
        damage = getattr(renewed(None, NAMES, NOW), part)
    broken = dataclasses.replace(first, **{part: damage})
    mended = renewed(broken, NAMES, NOW)
    verify(mended, mended, NAMES[0], NOW)
    put_to_use(server_context(), mended.certificate.encode(), mended.key.encode())
    assert renewed(mended, NAMES, NOW) is mended
    if part == "certificate":
        assert mended.authorities == first.authorities


def test_a_secret_holds_all_of_it(first: Credentials) -> None:
    data = first.to_secret()
    assert set(data) == {"ca.crt", "ca.key", "tls.crt", "tls.key"}
    assert Credentials.from_secret(data) == first
    assert base64.b64decode(first.bundle).decode() == first.authorities
    assert Credentials.from_secret(None) is None
    for bad in ({**data, "tls.key": "%"}, {**data, "ca.crt": "/w=="}, {"tls.crt": data["tls.crt"]}):
        assert Credentials.from_secret(bad) is None


def test_keys_do_not_show(first: Credentials) -> None:
    assert "PRIVATE" not in repr(first)
    assert first.key not in str(first)


def presented(context: ssl.SSLContext) -> bytes | None:
    """The certificate (DER) that a client gets to see, by a handshake in memory."""
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    trusting = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    trusting.check_hostname, trusting.verify_mode = False, ssl.CERT_NONE
    client, server = trusting.wrap_bio(down, up), context.wrap_bio(up, down, server_side=True)
    for one in (client, server, client, server):
        with contextlib.suppress(ssl.SSLWantReadError):
            one.do_handshake()
    return client.getpeercert(binary_form=True)


def test_a_pair_that_does_not_match_leaves_the_context_as_it_was(first: Credentials) -> None:
    context = server_context()
    assert context.minimum_version == ssl.TLSVersion.TLSv1_2
    put_to_use(context, first.certificate.encode(), first.key.encode())
    other = renewed(None, NAMES, NOW)
    for certificate, key in ((first, other), (other, first)):
        with pytest.raises(ssl.SSLError):
            put_to_use(context, certificate.certificate.encode(), key.key.encode())
    with pytest.raises(ssl.SSLError):
        put_to_use(context, b"", b"")
    assert presented(context) == ssl.PEM_cert_to_DER_cert(first.certificate)
    put_to_use(context, other.certificate.encode(), other.key.encode())
    assert presented(context) == ssl.PEM_cert_to_DER_cert(other.certificate)


def test_only_our_kind_of_key_counts(first: Credentials) -> None:
    assert isinstance(serving(first).public_key(), ec.EllipticCurvePublicKey)
    assert certificates.ends(first.certificate) == serving(first).not_valid_after_utc
    assert certificates.ends("nonsense") is None
