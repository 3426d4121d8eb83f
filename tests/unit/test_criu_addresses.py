"""Addresses of sockets in CRIU's images: images written here by hand, and one that CRIU has written."""

import ipaddress
import os
import socket
import stat
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from architect.adapters import criuaddresses, criuimages
from architect.adapters.criuaddresses import CLOSE, LISTEN, Flow, Listener

MAGICS = struct.pack("<II", 0x54564319, 0x56303138)
ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING = 1, 2, 4, 5, 8, 9, 11
POD, OTHER, CLIENT = "10.0.1.7", "10.0.2.9", "10.0.3.4"
POD6, OTHER6, CLIENT6 = "fd98:7::7", "fd98:8::9", "fd98:9::4"
TCP, UDP = (socket.SOCK_STREAM, socket.IPPROTO_TCP), (socket.SOCK_DGRAM, socket.IPPROTO_UDP)
Message = list[tuple[int, int | bytes]]


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


class Sock(NamedTuple):
    """A socket to be written; all but its addresses stays the same when it moves."""

    local: str = POD
    local_port: int = 6379
    peer: str = ""
    peer_port: int = 0
    state: int = LISTEN
    kind: tuple[int, int] = TCP
    packed: bool = False
    more: bytes = encode([(13, encode([(1, 0)])), (14, b""), (17, b"eth0"), (900, b"unknown")])

    def entry(self) -> bytes:
        wide = ":" in self.local
        message: Message = [(1, 7), (2, 0xBEEF), (3, socket.AF_INET6 if wide else socket.AF_INET)]
        message += [(4, self.kind[0]), (5, self.kind[1]), (6, self.state)]
        message += [(7, self.local_port), (8, self.peer_port), (9, 2), (10, 128)]
        nothing = "::" if wide else "0.0.0.0"
        for field, address in ((11, self.local), (12, self.peer or nothing)):
            packed = ipaddress.ip_address(address).packed
            words = struct.unpack(f"<{len(packed) // 4}I", packed)
            if self.packed:
                message.append((field, b"".join(map(number, words))))
            else:
                message += [(field, word) for word in words]
        inner = encode(message) + self.more
        return encode([(1, 4), (2, 7), (4, inner), (901, b"unknown too")])


REGULAR = encode([(1, 1), (2, 3), (3, encode([(1, 3), (6, b"/bin/true")]))])


def image(*messages: bytes) -> bytes:
    return MAGICS + b"".join(struct.pack("<I", len(one)) + one for one in messages)


def write(place: Path, *sockets: Sock) -> bytes:
    """Leave an image with the sockets among other files."""
    contents = image(REGULAR, *(one.entry() for one in sockets), REGULAR)
    (place / "files.img").write_bytes(contents)
    return contents


def connected(local: str = POD, peer: str = CLIENT, state: int = ESTABLISHED) -> Sock:
    return Sock(local, 6379, peer, 41234, state)


def mapped(address: str) -> str:
    return f"::ffff:{address}"


def test_sockets(tmp_path: Path) -> None:
    write(
        tmp_path,
        connected(),
        connected(mapped(POD), mapped(CLIENT)),
        Sock("::", 53, state=CLOSE, kind=UDP),
        Sock(kind=(socket.SOCK_STREAM, 132)),
    )
    assert criuaddresses.sockets(tmp_path) == [
        ("tcp", ESTABLISHED, socket.AF_INET, POD, 6379, CLIENT, 41234),
        ("tcp", ESTABLISHED, socket.AF_INET6, POD, 6379, CLIENT, 41234),
        ("udp", CLOSE, socket.AF_INET6, "::", 53, "::", 0),
    ]


@pytest.mark.parametrize(
    "state", [ESTABLISHED, SYN_SENT, FIN_WAIT1, FIN_WAIT2, CLOSE_WAIT, LAST_ACK, CLOSING]
)
def test_flow_in_every_state_that_is_dumped(tmp_path: Path, state: int) -> None:
    write(tmp_path, connected(state=state))
    assert criuaddresses.flows(tmp_path, [POD]) == [Flow("tcp", POD, 6379, CLIENT, 41234)]


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("sock", "flow"),
    [
        (connected(mapped(POD), mapped(CLIENT)), ("tcp", POD, 6379, CLIENT, 41234)),
        (connected(POD6, CLIENT6), ("tcp", POD6, 6379, CLIENT6, 41234)),
        (Sock(POD, 9, CLIENT, 53, ESTABLISHED, UDP), ("udp", POD, 9, CLIENT, 53)),
        (Sock(POD6, 9, CLIENT6, 53, ESTABLISHED, UDP), ("udp", POD6, 9, CLIENT6, 53)),
    ],
)
def test_flow_of_other_families_and_protocols(
    tmp_path: Path, sock: Sock, flow: tuple[str, str, int, str, int], packed: bool
) -> None:
    write(tmp_path, sock._replace(packed=packed))
    own = [mapped(POD), "fd98:7:0::7"]
    assert criuaddresses.flows(tmp_path, own) == [flow]


@pytest.mark.parametrize(
    "sock",
    [
        Sock(),
        connected(state=CLOSE),
        connected("127.0.0.1", "127.0.0.1"),
        connected(OTHER),
        connected(POD, POD),
        connected(POD, "127.0.0.1"),
        connected(POD6, "::1"),
        connected(mapped(POD), mapped(POD)),
        Sock(POD, 9, state=CLOSE, kind=UDP),
    ],
)
def test_what_is_no_flow(tmp_path: Path, sock: Sock) -> None:
    """Without a peer, closed, not at the pod's address, or of the pod with itself."""
    write(tmp_path, sock)
    assert criuaddresses.flows(tmp_path, [POD, POD6]) == []


def test_flow_is_given_once(tmp_path: Path) -> None:
    write(tmp_path, connected(), connected(peer=OTHER), connected())
    found = criuaddresses.flows(tmp_path, [POD])
    assert [one.peer for one in found] == [CLIENT, OTHER]


@pytest.mark.parametrize(
    ("sock", "found"),
    [
        (Sock(), ("tcp", POD, 6379)),
        (Sock("0.0.0.0"), ("tcp", "0.0.0.0", 6379)),
        (Sock("::"), ("tcp", "::", 6379)),
        (Sock(mapped("0.0.0.0")), ("tcp", "0.0.0.0", 6379)),
        (Sock(mapped(POD)), ("tcp", POD, 6379)),
        (Sock(POD6), ("tcp", POD6, 6379)),
        (Sock(POD, 53, state=CLOSE, kind=UDP), ("udp", POD, 53)),
        (Sock("::", 53, state=CLOSE, kind=UDP), ("udp", "::", 53)),
        (Sock("127.0.0.1"), None),
        (Sock("::1"), None),
        (Sock(OTHER), None),
        (Sock(state=CLOSE), None),
        (connected(), None),
        (Sock(POD, 53, CLIENT, 9, ESTABLISHED, UDP), None),
        (Sock("0.0.0.0", 0, state=CLOSE, kind=UDP), None),
    ],
)
def test_listener(tmp_path: Path, sock: Sock, found: tuple[str, str, int] | None) -> None:
    write(tmp_path, sock, sock)
    expected = [] if found is None else [Listener(*found)]
    assert criuaddresses.listeners(tmp_path, [POD, POD6]) == expected


LISTENERS = {POD: "0.0.0.0", POD6: "::"}
MOVED = {POD: OTHER, POD6: OTHER6}


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize(
    ("sock", "local", "peer"),
    [
        (Sock(), "0.0.0.0", ""),
        (Sock(POD6), "::", ""),
        (Sock(mapped(POD)), mapped("0.0.0.0"), ""),
        (Sock(kind=UDP, state=CLOSE), "0.0.0.0", ""),
        (Sock(state=CLOSE), "0.0.0.0", ""),
        (connected(), OTHER, CLIENT),
        (connected(state=CLOSE), OTHER, CLIENT),
        (connected(POD6, CLIENT6), OTHER6, CLIENT6),
        (connected(mapped(POD), mapped(CLIENT)), mapped(OTHER), mapped(CLIENT)),
        (connected(POD, POD), OTHER, OTHER),
        (connected("127.0.0.1", POD), "127.0.0.1", OTHER),
        (Sock(POD, 9, CLIENT, 53, ESTABLISHED, UDP), OTHER, CLIENT),
    ],
)
def test_rewrite(tmp_path: Path, sock: Sock, local: str, peer: str, packed: bool) -> None:
    sock = sock._replace(packed=packed)
    write(tmp_path, sock, Sock("127.0.0.1"))
    assert criuaddresses.rewrite(tmp_path, listeners=LISTENERS, established=MOVED) == 1
    changed = (tmp_path / "files.img").read_bytes()
    assert changed == write(tmp_path, sock._replace(local=local, peer=peer), Sock("127.0.0.1"))


@pytest.mark.parametrize(
    "sock",
    [
        Sock("0.0.0.0"),
        Sock("::"),
        Sock("127.0.0.1"),
        connected("127.0.0.1", "127.0.0.1"),
        connected(OTHER),
        Sock(kind=(socket.SOCK_STREAM, 132)),
    ],
)
def test_what_has_another_address_keeps_it(tmp_path: Path, sock: Sock) -> None:
    before = write(tmp_path, sock)
    inode = (tmp_path / "files.img").stat().st_ino
    assert criuaddresses.rewrite(tmp_path, listeners=LISTENERS, established=MOVED) == 0
    assert (tmp_path / "files.img").read_bytes() == before
    assert (tmp_path / "files.img").stat().st_ino == inode


def test_only_what_is_asked_for_is_rewritten(tmp_path: Path) -> None:
    write(tmp_path, Sock(), connected())
    assert criuaddresses.rewrite(tmp_path, listeners=LISTENERS) == 1
    found = criuaddresses.sockets(tmp_path)
    assert [one.local for one in found] == ["0.0.0.0", POD]
    write(tmp_path, Sock(), connected())
    assert criuaddresses.rewrite(tmp_path, established=MOVED) == 1
    found = criuaddresses.sockets(tmp_path)
    assert [one.local for one in found] == [POD, OTHER]


def test_rewritten_file_is_a_new_one_with_the_old_mode(tmp_path: Path) -> None:
    write(tmp_path, Sock())
    file = tmp_path / "files.img"
    file.chmod(0o640)
    with file.open("rb") as old:
        assert criuaddresses.rewrite(tmp_path, listeners=LISTENERS) == 1
        assert old.read() == image(REGULAR, Sock().entry(), REGULAR)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    assert list(tmp_path.iterdir()) == [file]


def test_families_are_not_mixed(tmp_path: Path) -> None:
    write(tmp_path, Sock())
    with pytest.raises(ValueError, match="different families"):
        criuaddresses.rewrite(tmp_path, listeners={POD: "::"})


@pytest.mark.parametrize(
    "contents",
    [
        b"",
        b"x" * 8,
        image(Sock().entry())[:-1],
        image(b"\x22\x7f"),
        image(encode([(4, encode([(3, 2), (4, 1), (5, 6), (7, 1), (11, 1), (11, 2), (12, 0)]))])),
    ],
)
def test_what_is_no_image_is_refused(tmp_path: Path, contents: bytes) -> None:
    (tmp_path / "files.img").write_bytes(contents)
    reads: list[Callable[[], object]] = [
        lambda: criuaddresses.flows(tmp_path, [POD]),
        lambda: criuaddresses.listeners(tmp_path, [POD]),
        lambda: criuaddresses.rewrite(tmp_path, established=MOVED),
    ]
    for read in reads:
        with pytest.raises(ValueError, match=r"\w"):
            read()
    assert (tmp_path / "files.img").read_bytes() == contents


V4 = st.ip_addresses(v=4).map(str)
V6 = st.ip_addresses(v=6).map(str).filter(lambda one: not one.startswith("::ffff:"))
PAIRS = st.one_of(st.tuples(V4, V4), st.tuples(V6, V6), st.tuples(V4.map(mapped), V4.map(mapped)))
PORTS = st.integers(1, 65535)
EXTRAS = st.lists(
    st.tuples(
        st.integers(19, 1 << 20), st.one_of(st.integers(0, (1 << 64) - 1), st.binary(max_size=40))
    ),
    max_size=3,
).map(encode)


@st.composite
def any_socket(draw: st.DrawFn) -> Sock:
    local, peer = draw(PAIRS)
    return Sock(
        local=local,
        local_port=draw(PORTS),
        peer=peer,
        peer_port=draw(PORTS),
        state=ESTABLISHED,
        kind=draw(st.sampled_from([TCP, UDP])),
        packed=draw(st.booleans()),
        more=draw(EXTRAS),
    )


@settings(max_examples=200)
@given(st.lists(any_socket(), min_size=1, max_size=4), st.data())
def test_rewriting_there_and_back_is_nothing(
    tmp_path_factory: pytest.TempPathFactory, found: list[Sock], data: st.DataObject
) -> None:
    """And in between only the address differs."""
    place = tmp_path_factory.mktemp("images")
    before = write(place, *found)
    former = criuaddresses.sockets(place)
    old = former[0].local
    version = ipaddress.ip_address(old).version
    taken = {name for one in former for name in (one.local, one.peer)}
    new = data.draw((V4 if version == 4 else V6).filter(lambda one: one not in taken))
    count = criuaddresses.rewrite(place, established={old: new})
    assert count >= 1
    wanted = [
        one._replace(
            local=new if one.local == old else one.local,
            peer=new if one.peer == old else one.peer,
        )
        for one in former
    ]
    assert criuaddresses.sockets(place) == wanted
    assert criuaddresses.rewrite(place, established={new: old}) == count
    assert (place / "files.img").read_bytes() == before


@given(EXTRAS)
def test_parts_are_the_message(message: bytes) -> None:
    found = list(criuimages.parts(message))
    assert b"".join(message[one.begin : one.end] for one in found) == message
    assert [(one.number, one.value) for one in found] == list(criuimages.fields(message))


BUILD = Path(__file__).parents[2] / "build"
CRIU = [
    str(BUILD / "bundle/lib/ld-linux-x86-64.so.2"),
    *("--library-path", str(BUILD / "bundle/lib")),
    *("--preload", str(BUILD / "native/criu-compat.so")),
    str(BUILD / "bundle/bin/criu"),
]

PROGRAM = """
import os, socket, sys, time
there = sys.argv[1]
family, address = (socket.AF_INET6, sys.argv[2]) if ":" in sys.argv[2] else (socket.AF_INET, sys.argv[2])
listening = socket.socket(family)
listening.bind((address, 0))
listening.listen()
calling = socket.socket(family)
calling.bind((address, 0))
calling.connect(listening.getsockname()[:2])
called, _ = listening.accept()
datagrams = socket.socket(family, socket.SOCK_DGRAM)
datagrams.bind((address, 0))
open(there + "/up", "w").close()
while not os.path.exists(there + "/ask"):
    time.sleep(0.01)
calling.sendall(b"still here")
if called.recv(99) == b"still here":
    ends = listening.getsockname(), datagrams.getsockname(), calling.getsockname(), called.getsockname()
    with open(there + "/new", "w") as answer:
        print(*(end[0] for end in ends), calling.getpeername()[0], file=answer)
    os.rename(there + "/new", there + "/answer")
"""


def criu_works() -> bool:
    if os.geteuid() != 0 or not all(Path(one).exists() for one in (CRIU[0], CRIU[4], CRIU[5])):
        return False
    return subprocess.run([*CRIU, "check"], capture_output=True, check=False).returncode == 0


def wait_for(file: Path) -> None:
    until = time.monotonic() + 30
    while not file.exists():
        assert time.monotonic() < until, f"{file.name} did not come"
        time.sleep(0.01)


@pytest.mark.skipif(not criu_works(), reason="needs root, and CRIU built by `make bundle native`")
@pytest.mark.parametrize("prefix", ["", "::ffff:"])
def test_real_images_rewritten_and_restored(tmp_path: Path, prefix: str) -> None:
    """A program with a connection to itself is dumped, moved to other addresses, and talks on."""
    old, new = "127.0.77.2", "127.0.77.3"
    program = subprocess.Popen(
        [sys.executable, "-I", "-c", PROGRAM, str(tmp_path), prefix + old],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    images = tmp_path / "images"
    images.mkdir()
    common = ["--images-dir", str(images), "--tcp-established", "--network-lock", "skip"]
    try:
        wait_for(tmp_path / "up")
        dump = [*CRIU, "dump", "--tree", str(program.pid), *common, "--log-file", "dump.log"]
        assert subprocess.run(dump, check=False).returncode == 0, (images / "dump.log").read_text()
    finally:
        program.kill()
        program.wait()

    found = criuaddresses.sockets(images)
    assert {one.local for one in found} == {old}
    assert len(found) == 4
    assert sorted(one.protocol for one in criuaddresses.listeners(images, [old])) == ["tcp", "udp"]
    assert criuaddresses.flows(images, [old]) == []
    assert criuaddresses.rewrite(images, listeners={old: "0.0.0.0"}, established={old: new}) == 4

    (tmp_path / "ask").touch()
    restore = [*CRIU, "restore", *common, "--log-file", "restore.log", "-v2"]
    done = subprocess.run(restore, check=False, timeout=60)
    assert done.returncode == 0, (images / "restore.log").read_text()
    anywhere, there = f"{prefix}0.0.0.0", prefix + new
    answer = (tmp_path / "answer").read_text().split()
    assert answer == [anywhere, anywhere, there, there, there]
