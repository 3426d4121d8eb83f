"""TCP connections as read from CRIU's images, which are written here by hand (protobuf's encoding guide)."""

import ipaddress
import socket
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters import criuimages
from architect.adapters.criuimages import Connection

COMMON, FILES, STREAM = 0x54564319, 0x56303138, 0x51465506
INO = 0xBEEF
Value = int | bytes
Message = list[tuple[int, Value]]

ESTABLISHED, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LISTEN = 1, 4, 5, 8, 10
STAMPS, SACK, SCALED = 1, 2, 4


def number(value: int) -> bytes:
    found = b""
    while value > 0x7F:
        found += bytes([value & 0x7F | 0x80])
        value >>= 7
    return found + bytes([value])


def encode(message: Message) -> bytes:
    found = b""
    for field, value in message:
        if isinstance(value, int):
            found += number(field << 3) + number(value)
        else:
            found += number(field << 3 | 2) + number(len(value)) + value
    return found


def image(magic: int, *messages: bytes, common: int = COMMON) -> bytes:
    found = struct.pack("<II", common, magic)
    return found + b"".join(struct.pack("<I", len(one)) + one for one in messages)


def words(address: str) -> list[int]:
    packed = ipaddress.ip_address(address).packed
    return list(struct.unpack(f"<{len(packed) // 4}I", packed))


def inet(
    local: str = "10.0.0.2",
    peer: str = "10.0.0.1",
    *,
    state: int = ESTABLISHED,
    kind: int = socket.SOCK_STREAM,
    proto: int = socket.IPPROTO_TCP,
    packed: bool = False,
) -> bytes:
    """An inet_sk_entry in a file_entry, between fields that are of no interest."""
    family = socket.AF_INET if "." in local and ":" not in local else socket.AF_INET6
    message: Message = [(1, 7), (2, INO), (3, family), (4, kind), (5, proto), (6, state)]
    message += [(7, 6379), (8, 41000), (9, 2), (10, 0)]
    for field, address in ((11, local), (12, peer)):
        if packed:
            message.append((field, b"".join(map(number, words(address)))))
        else:
            message += [(field, word) for word in words(address)]
    message += [(13, encode([(1, 0)])), (14, b""), (17, b"eth0")]
    return encode([(1, 4), (2, 7), (4, encode(message))])


def stream(**changes: int) -> bytes:
    values = {
        "inq_len": 0, "inq_seq": 1000, "outq_len": 0, "outq_seq": 5000, "options": STAMPS | SCALED,
        "snd_wscale": 9, "mss": 1460, "rcv_wscale": 7, "stamp": 77, "rcv_wnd": 64000, "rcv_wup": 1000,
    } | changes  # fmt: skip
    numbers = {
        "inq_len": 1, "inq_seq": 2, "outq_len": 3, "outq_seq": 4, "options": 5, "snd_wscale": 6,
        "mss": 7, "rcv_wscale": 8, "stamp": 9, "rcv_wnd": 16, "rcv_wup": 17,
    }  # fmt: skip
    return encode([(numbers[name], value) for name, value in values.items() if value >= 0])


def dumped(place: Path, *files: bytes, tcp: bytes | None = None) -> list[Connection]:
    regular = encode([(1, 1), (2, 3), (3, encode([(1, 3), (6, b"/bin/true")]))])
    (place / "files.img").write_bytes(image(FILES, regular, *files))
    if tcp is not None:
        (place / f"tcp-stream-{INO:x}.img").write_bytes(image(STREAM, tcp) + b"queued bytes")
    return criuimages.connections(place)


def test_connection_is_as_its_peer_knows_it(tmp_path: Path) -> None:
    mapped = bytes(10) + b"\xff\xff"
    assert dumped(tmp_path, inet(), tcp=stream()) == [
        Connection(
            local=mapped + bytes([10, 0, 0, 2]),
            peer=mapped + bytes([10, 0, 0, 1]),
            local_port=6379,
            peer_port=41000,
            receive_next=1000,
            send_next=5000,
            window=500,
            timestamp=77,
        )
    ]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("local", ["fd98:7::2", "::ffff:10.0.0.2"])
def test_address_of_ipv6(tmp_path: Path, local: str, packed: bool) -> None:
    (found,) = dumped(tmp_path, inet(local, "fd98:7::1", packed=packed), tcp=stream())
    assert found.local == ipaddress.ip_address(local).packed
    assert found.peer == ipaddress.ip_address("fd98:7::1").packed


@pytest.mark.parametrize(
    ("changes", "window", "stamp"),
    [
        ({"options": SACK}, 64000, None),
        ({"options": STAMPS}, 64000, 77),
        ({"options": 0, "rcv_wnd": 70000}, 65535, None),
        ({"options": SCALED, "inq_seq": 1128}, 499, None),
        ({"options": SCALED, "inq_seq": 100, "rcv_wup": 0xFFFFFFE4}, 499, None),
    ],
)
def test_window_and_timestamp(
    tmp_path: Path, changes: dict[str, int], window: int, stamp: int | None
) -> None:
    """Scaled and never more than the peer was told, across the end of the sequence numbers too."""
    (found,) = dumped(tmp_path, inet(), tcp=stream(**changes))
    assert (found.window, found.timestamp) == (window, stamp)


@pytest.mark.parametrize(
    "changes",
    [
        {"outq_len": 1},
        {"rcv_wnd": -1},
        {"rcv_wnd": 0},
        {"rcv_wnd": 127},
        {"inq_seq": 66000},
    ],
)
def test_connections_that_only_their_socket_can_speak_for(
    tmp_path: Path, changes: dict[str, int]
) -> None:
    """Bytes to repeat, a window that is not known, and one that is closed."""
    assert dumped(tmp_path, inet(), tcp=stream(**changes)) == []


@pytest.mark.parametrize("state", range(1, 13))
def test_only_quiet_states_count(tmp_path: Path, state: int) -> None:
    found = dumped(tmp_path, inet(state=state), tcp=stream())
    assert bool(found) == (state in (ESTABLISHED, FIN_WAIT2, CLOSE_WAIT))


def test_other_sockets_need_no_stream(tmp_path: Path) -> None:
    others = [
        inet(state=LISTEN),
        inet(kind=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDP),
        inet(kind=socket.SOCK_STREAM, proto=132),
    ]
    assert dumped(tmp_path, *others) == []


@pytest.mark.parametrize(
    ("name", "contents"),
    [
        ("files.img", b""),
        ("files.img", image(STREAM)),
        ("files.img", image(FILES, common=1)),
        ("files.img", image(FILES, inet())[:-1]),
        ("files.img", image(FILES, b"\x80")),
        ("files.img", image(FILES, b"\x22\x7f")),
        ("files.img", image(FILES, b"\x0b")),
        ("files.img", image(FILES, encode([(4, encode([(4, b"text")]))]))),
        (f"tcp-stream-{INO:x}.img", b""),
        (f"tcp-stream-{INO:x}.img", image(FILES, stream())),
        (f"tcp-stream-{INO:x}.img", image(STREAM, stream())[:-3]),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, name: str, contents: bytes) -> None:
    dumped(tmp_path, inet(), tcp=stream())
    (tmp_path / name).write_bytes(contents)
    with pytest.raises(ValueError, match=r"\w"):
        criuimages.connections(tmp_path)


def test_stream_without_a_message_is_no_connection(tmp_path: Path) -> None:
    dumped(tmp_path, inet(), tcp=stream())
    (tmp_path / f"tcp-stream-{INO:x}.img").write_bytes(image(STREAM))
    assert criuimages.connections(tmp_path) == []


@given(
    st.lists(
        st.tuples(
            st.integers(1, (1 << 29) - 1),
            st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=300)),
        )
    )
)
def test_fields_are_what_was_encoded(message: Message) -> None:
    assert list(criuimages.fields(encode(message))) == message


@given(st.binary(max_size=64))
def test_any_bytes_are_fields_or_refused(message: bytes) -> None:
    try:
        for _ in criuimages.fields(message):
            pass
    except ValueError:
        pass
