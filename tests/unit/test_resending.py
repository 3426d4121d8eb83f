"""Which held packets are delivered after a move, and with which bytes."""

import socket
import struct
from ipaddress import ip_address

from hypothesis import given
from hypothesis import strategies as st

from architect.adapters.resending import addressed, checksum
from architect.contract.flows import Flow

ports = st.integers(1, 65535)
families = st.sampled_from(
    [("10.1.0.7", "10.3.0.4", "10.2.0.9"), ("fd00::7", "fd00:3::4", "fd00:2::9")]
)


def packet(flow: Flow, payload: bytes, *, options: int = 0) -> bytes:
    """What a client sends to the pod, with a checksum of the kind that a network card is to mend."""
    if flow.protocol == "tcp":
        body = struct.pack(
            "!HHIIHHHH", flow.peer_port, flow.local_port, 1, 2, 0x5018, 64, 0xBEEF, 0
        )
    else:
        body = struct.pack("!HHHH", flow.peer_port, flow.local_port, 8 + len(payload), 0xBEEF)
    body += payload
    number = socket.IPPROTO_TCP if flow.protocol == "tcp" else socket.IPPROTO_UDP
    source, target = ip_address(flow.peer).packed, ip_address(flow.local).packed
    if flow.is_v6:
        return struct.pack("!IHBB", 6 << 28, len(body), number, 64) + source + target + body
    size = 20 + 4 * options
    head = struct.pack("!BBHHHBBH", 0x45 + options, 0, size + len(body), 7, 0x4000, 64, number, 0)
    return head + source + target + bytes(4 * options) + body


def words(data: bytes) -> int:
    """The plain definition of RFC 1071."""
    total = 0
    for high, low in zip(data[::2], (data + b"\0")[1::2], strict=False):
        total += high << 8 | low
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return total


@given(st.binary(max_size=300))
def test_the_checksum_is_that_of_the_rfc(data: bytes) -> None:
    assert checksum(data) == 0xFFFF ^ words(data)


@given(
    families, st.sampled_from(["tcp", "udp"]), ports, ports, st.binary(max_size=100), st.booleans()
)
def test_packets_of_a_connection_are_whole_and_for_its_address(
    addresses: tuple[str, str, str], protocol: str, port: int, peer: int, data: bytes, moved: bool
) -> None:
    local, client, new = addresses
    flow = Flow(protocol, local, port, client, peer)
    target = new if moved else local
    given_ = packet(flow, data, options=0 if flow.is_v6 else 2)
    ((sent, address),) = addressed([given_], {flow: target})
    assert address == target
    start = 40 if flow.is_v6 else 28
    assert sent[start:].endswith(data)
    assert sent[: 8 if flow.is_v6 else 12] == given_[: 8 if flow.is_v6 else 12]
    number = socket.IPPROTO_TCP if protocol == "tcp" else socket.IPPROTO_UDP
    pseudo = ip_address(client).packed + ip_address(target).packed
    pseudo += struct.pack("!II", len(sent) - start, number)
    assert words(pseudo + sent[start:]) == 0xFFFF


@given(st.binary(max_size=120))
def test_no_bytes_are_too_strange(data: bytes) -> None:
    assert list(addressed([data, b"\x45" + data, b"\x60" + data], {})) == []


def test_what_is_no_packet_of_a_connection_is_left_out() -> None:
    flow = Flow("tcp", "10.1.0.7", 6379, "10.3.0.4", 41234)
    whole = packet(flow, b"x")
    fragment = whole[:6] + b"\x20\x00" + whole[8:]
    cut = whole[:-1]
    icmp = whole[:9] + b"\x01" + whole[10:]
    assert list(addressed([whole], {flow._replace(peer_port=1): "10.1.0.7"})) == []
    assert list(addressed([fragment, cut, icmp], {flow: "10.1.0.7"})) == []
    assert len(list(addressed([whole], {flow: "10.1.0.7"}))) == 1
