"""Who gets a node's certificate, and that two nodes know each other by what they got."""

from __future__ import annotations

import dataclasses
import datetime as dt
import socket
import ssl
import threading
from pathlib import Path

import pytest

from architect.adapters import nodeauthority, nodekey
from architect.decisions import identity
from architect.decisions.identity import Asked, refusal, server_name

NOW = dt.datetime.now(dt.UTC)
GOOD = Asked(
    username="system:serviceaccount:architect:architectd",
    node_claims=("n1",),
    usages=identity.USAGES,
    common_name="n1",
    organizations=(identity.ORGANIZATION,),
    names=(server_name("n1"),),
    sound=True,
)


def test_a_node_may_ask_for_itself() -> None:
    assert refusal(GOOD, "architect", {"n1", "n2"}) == ""


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"username": "system:serviceaccount:default:architectd"}, "only system:serviceaccount"),
        ({"username": "admin"}, "only system:serviceaccount"),
        ({"node_claims": ("n2",)}, "runs on n2"),
        ({"node_claims": ()}, "runs on no node"),
        ({"common_name": "n3", "node_claims": ("n3",)}, "there is no node n3"),
        ({"sound": False}, "signature"),
        ({"organizations": ()}, "organization"),
        ({"organizations": ("system:masters",)}, "organization"),
        ({"names": (server_name("n2"),)}, "its only name"),
        ({"names": (server_name("n1"), "kubernetes.default")}, "its only name"),
        ({"usages": identity.USAGES | {"cert sign"}}, "usages"),
    ],
)
def test_who_is_refused(change: dict[str, object], why: str) -> None:
    asked = dataclasses.replace(GOOD, **change)  # type: ignore[arg-type]
    assert why in refusal(asked, "architect", {"n1", "n2"})


def test_what_a_node_asks_for_is_granted() -> None:
    asked = nodeauthority.read(nodekey.make("n1")["request"].encode())
    found = dataclasses.replace(
        GOOD,
        common_name=asked.common_name,
        organizations=asked.organizations,
        names=asked.names,
        sound=asked.sound,
    )
    assert found == GOOD


def test_an_authority_is_kept_until_it_is_due_and_trusted_until_it_ends() -> None:
    first = nodeauthority.renewed(None, NOW)
    assert nodeauthority.renewed(first, NOW) is first
    later = NOW + dt.timedelta(days=3652 * 0.7)
    second = nodeauthority.renewed(first, later)
    assert second.certificates.endswith(first.certificates)
    assert second.key != first.key
    ended = nodeauthority.renewed(second, NOW + dt.timedelta(days=3660))
    assert first.certificates not in ended.certificates


def test_a_damaged_authority_is_made_anew() -> None:
    first = nodeauthority.renewed(None, NOW)
    damaged = nodeauthority.Authority(first.certificates, "no key")
    assert nodeauthority.renewed(damaged, NOW).certificates != first.certificates


def context(
    kind: int, folder: Path, node: str, authority: nodeauthority.Authority, trusted: str
) -> ssl.SSLContext:
    made = nodekey.make(node)
    request = nodeauthority.read(made["request"].encode())
    pair = folder / f"{node}-{kind}.pem"
    pair.write_text(made["key"] + nodeauthority.sign(authority, request, NOW))
    found = ssl.SSLContext(kind)
    found.verify_mode = ssl.CERT_REQUIRED
    found.minimum_version = ssl.TLSVersion.TLSv1_3
    found.load_cert_chain(pair)
    found.load_verify_locations(cadata=trusted)
    return found


def talk(server: ssl.SSLContext, client: ssl.SSLContext, name: str) -> bytes:
    """What the server says to a client that expects a name; TLS 1.3 tells a client late of its refusal."""
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            with server.wrap_socket(ours, server_side=True) as tls:
                tls.sendall(b"hello")
        except (ssl.SSLError, OSError):
            ours.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client.wrap_socket(theirs, server_hostname=name) as tls:
            return tls.recv(16)
    finally:
        thread.join(10)


def test_two_nodes_know_each_other(tmp_path: Path) -> None:
    authority = nodeauthority.renewed(None, NOW)
    trusted = authority.certificates
    server = context(ssl.PROTOCOL_TLS_SERVER, tmp_path, "n1", authority, trusted)
    client = context(ssl.PROTOCOL_TLS_CLIENT, tmp_path, "n2", authority, trusted)
    assert talk(server, client, server_name("n1")) == b"hello"
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(server, client, server_name("n3"))


def test_a_stranger_is_known_by_neither_side(tmp_path: Path) -> None:
    ours, other = nodeauthority.renewed(None, NOW), nodeauthority.renewed(None, NOW)
    server = context(ssl.PROTOCOL_TLS_SERVER, tmp_path, "n1", ours, ours.certificates)
    stranger = context(ssl.PROTOCOL_TLS_CLIENT, tmp_path, "n2", other, ours.certificates)
    with pytest.raises((ssl.SSLError, OSError)):
        talk(server, stranger, server_name("n1"))
    false = context(ssl.PROTOCOL_TLS_SERVER, tmp_path, "n1", other, ours.certificates)
    client = context(ssl.PROTOCOL_TLS_CLIENT, tmp_path, "n3", ours, ours.certificates)
    with pytest.raises(ssl.SSLCertVerificationError):
        talk(false, client, server_name("n1"))
