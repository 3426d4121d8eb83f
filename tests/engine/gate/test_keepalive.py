"""TCP's keep-alive probes to a program that is not there: which are answered, how, and what that costs.

The pod's socket is taken away as CRIU takes it, by TCP_REPAIR (<linux/tcp.h>), after its sequence numbers
were read. Leaving that mode at the client's sends a probe at once; the kernel's own timer is tested too.
"""

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from architect.adapters import bpf, netns
from architect.adapters.criuimages import Connection
from architect.adapters.gate import Activity, Gate, Mode
from architect.decisions.ports import Port, Use
from tests.engine.gate.podnet import (
    POD,
    PORT,
    Network,
    command,
    held,
    readable,
    received,
    until,
)

pytestmark = [
    pytest.mark.skipif(os.geteuid() != 0, reason="network namespaces and eBPF programs take root"),
    pytest.mark.usefixtures("no_reset"),
]

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
stamped = pytest.mark.parametrize("stamps", [True, False], ids=["timestamps", "no timestamps"])

TCP_REPAIR, TCP_REPAIR_QUEUE, TCP_QUEUE_SEQ = 19, 20, 21
TCP_TIMESTAMP, TCP_REPAIR_WINDOW = 24, 29
RECEIVE_QUEUE, SEND_QUEUE = 1, 2
WINDOW = struct.Struct("=IIIII")
"""struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup."""
OPTIONS, SCALES, STATE, PROBES = 5, 6, 0, 3
"""Bytes of struct tcp_info; its first ones, which every kernel has."""
STAMPS, ESTABLISHED = 1, 1
SIOCETHTOOL, ETHTOOL_STXCSUM = 0x8946, 0x17
EVERY_PROTOCOL = 0x0003
OUTGOING = 4
ACK, RST, PUSH = 0x10, 0x04, 0x08
HOP_LIMIT = 64


TUNNEL = {
    socket.AF_INET: ("10.98.9.2", "10.98.9.1"),
    socket.AF_INET6: ("fd98:9::2", "fd98:9::1"),
}
"""The pod's address at an interface without Ethernet, and its peer's."""


class Segment(NamedTuple):
    """What a client's interface has seen of TCP."""

    outgoing: bool
    hop_limit: int
    source: int
    destination: int
    sequence: int
    acknowledged: int
    flags: int
    window: int
    options: bytes
    data: bytes
    checksum: str
    """right, left (to the interface, so it covers the pseudo-header alone), or wrong"""


def total(data: bytes) -> int:
    found: int = sum(struct.unpack(f"!{(len(data) + 1) // 2}H", data + bytes(len(data) % 2)))
    while found >> 16:
        found = (found & 0xFFFF) + (found >> 16)
    return found


def parse(frame: bytes, outgoing: bool) -> Segment | None:
    ipv4 = frame[0] >> 4 == 4
    (told,) = struct.unpack_from("!H", frame, 2 if ipv4 else 4)
    if ipv4:
        header, length, hops, protocol, ends = 20, told, frame[8], frame[9], frame[12:20]
        assert total(frame[:20]) == 0xFFFF, "checksum of IPv4"
    else:
        header, length, hops, protocol, ends = 40, 40 + told, frame[7], frame[6], frame[8:40]
    if protocol != socket.IPPROTO_TCP:
        return None
    assert len(frame) == length, "nothing follows the packet"
    tcp = frame[header:length]
    pseudo = total(ends + struct.pack("!HH", protocol, len(tcp)))
    fields = struct.unpack("!HHIIBBHHH", tcp[:20])
    if total(struct.pack("!H", pseudo) + tcp) == 0xFFFF:
        checksum = "right"
    else:
        checksum = "left" if fields[7] == pseudo else "wrong"
    size = fields[4] >> 4 << 2
    source, destination, sequence, acknowledged, _, flags, window, _, _ = fields
    return Segment(
        outgoing=outgoing,
        hop_limit=hops,
        source=source,
        destination=destination,
        sequence=sequence,
        acknowledged=acknowledged,
        flags=flags,
        window=window,
        options=tcp[20:size],
        data=tcp[size:],
        checksum=checksum,
    )


class Wire:
    """All TCP segments at the client's interface."""

    def __init__(self, network: Network, interface: str = "eth0") -> None:
        with netns.entered(network.client):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
            self._socket.bind((interface, EVERY_PROTOCOL))
        self._socket.setblocking(False)
        network.sockets.append(self._socket)
        self.segments: list[Segment] = []
        self._returned = 0

    def look(self) -> list[Segment]:
        while readable(self._socket):
            frame, sender = self._socket.recvfrom(1 << 16)
            if sender[1] in (0x0800, 0x86DD):
                segment = parse(frame, sender[2] == OUTGOING)
                if segment:
                    self.segments.append(segment)
        return self.segments

    def answers(self) -> list[Segment]:
        return [one for one in self.look() if not one.outgoing]

    def next_answer(self) -> Segment:
        """Return the first answer that was not returned before."""
        until(lambda: len(self.answers()) > self._returned, "an answer")
        self._returned += 1
        return self.answers()[self._returned - 1]


def queue_end(one: socket.socket, queue: int) -> int:
    one.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR_QUEUE, queue)
    return one.getsockopt(socket.IPPROTO_TCP, TCP_QUEUE_SEQ) & 0xFFFFFFFF


def address(text: str) -> bytes:
    if ":" in text:
        return socket.inet_pton(socket.AF_INET6, text)
    return bytes(10) + b"\xff\xff" + socket.inet_aton(text)


def information(one: socket.socket) -> bytes:
    return one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)


def take_away(served: socket.socket) -> Connection:
    """What the peer of a socket knows; the socket is gone without a word."""
    known = information(served)
    served.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    _, _, _, window, told = WINDOW.unpack(
        served.getsockopt(socket.IPPROTO_TCP, TCP_REPAIR_WINDOW, WINDOW.size)
    )
    receive_next = queue_end(served, RECEIVE_QUEUE)
    here, there = served.getsockname()[:2], served.getpeername()[:2]
    connection = Connection(
        address(here[0]),
        address(there[0]),
        here[1],
        there[1],
        receive_next,
        queue_end(served, SEND_QUEUE),
        (window - (receive_next - told)) >> (known[SCALES] >> 4),
        served.getsockopt(socket.IPPROTO_TCP, TCP_TIMESTAMP) & 0xFFFFFFFF
        if known[OPTIONS] & STAMPS
        else None,
    )
    served.close()
    return connection


def fall_asleep(network: Network, gate: Gate, served: socket.socket) -> Connection:
    """As the daemon does it: held, checkpointed, absent, answered for."""
    gate.set_mode(0, Mode.HOLD)
    connection = take_away(served)
    gate.set_absent(0)
    assert gate.keep_alives.answer_for(0, [connection]) == 1
    return connection


def probe(client: socket.socket) -> None:
    """Send a probe now: the end of the mode is announced by one."""
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)
    client.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 0)


def choose_stamps(network: Network, stamps: bool) -> None:
    with netns.entered(network.client):
        Path("/proc/sys/net/ipv4/tcp_timestamps").write_text(str(int(stamps)))


def compute_checksums(network: Network) -> None:
    """The client's segments leave it with their checksums, as they come from another machine."""
    with (
        netns.entered(network.client),
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asking,
    ):
        value = bytearray(struct.pack("=II", ETHTOOL_STXCSUM, 0))
        place = struct.pack("16sP", b"eth0", _place(value)).ljust(40, b"\0")
        fcntl.ioctl(asking, SIOCETHTOOL, place)


def _place(value: bytearray) -> int:
    return ctypes.addressof(ctypes.c_char.from_buffer(value))


def sent_probes(network: Network, namespace: int) -> int:
    """How many probes of its timer a namespace has sent."""
    with netns.entered(namespace):
        lines = Path("/proc/thread-self/net/netstat").read_text().splitlines()
    names, values = (line.split() for line in lines if line.startswith("TcpExt:"))
    return int(values[names.index("TCPKeepAlive")])


@pytest.fixture
def no_reset(network: Network) -> Iterator[None]:
    yield
    assert network.resets() == 0


@families
@stamped
@pytest.mark.parametrize("offloaded", [True, False], ids=["checksum left", "checksum sent"])
def test_probe_is_answered_as_the_kernel_would(
    network: Network, gate: Gate, family: socket.AddressFamily, stamps: bool, offloaded: bool
) -> None:
    choose_stamps(network, stamps)
    if not offloaded:
        compute_checksums(network)
    client, served = network.connection(family, "veth")
    client.send(b"x" * 1000)
    assert received(served) == b"x" * 1000
    served.send(b"answer")
    assert received(client) == b"answer"
    wire = Wire(network)
    probe(client)
    real = wire.next_answer()
    known = fall_asleep(network, gate, served)
    before = gate.activity(0)
    probe(client)
    answer = wire.next_answer()
    asked = [one for one in wire.look() if one.outgoing][-1]
    assert answer.checksum == ("left" if offloaded else "right")
    assert answer._replace(options=b"", checksum="") == real._replace(options=b"", checksum="")
    assert answer.hop_limit == HOP_LIMIT
    if stamps:
        (then,) = struct.unpack("!4xI4x", real.options)
        assert answer.options[:4] == real.options[:4] == b"\x01\x01\x08\x0a"
        now, echoed = struct.unpack("!4xII", answer.options)
        assert now == known.timestamp
        assert 0 <= now - then < 5000
        assert echoed == struct.unpack("!4xI4x", asked.options)[0]
    else:
        assert answer.options == real.options == b""
    assert gate.activity(0) == before
    assert not readable(gate)
    assert information(client)[STATE] == ESTABLISHED


@families
@stamped
@pytest.mark.parametrize("through", ["veth", "lo"])
def test_peer_keeps_its_connection(
    network: Network, gate: Gate, family: socket.AddressFamily, stamps: bool, through: str
) -> None:
    """For longer than it would without answers: it asks at 1 s, 2 s and 3 s, and then gives up."""
    if not stamps:
        choose_stamps(network, stamps)
        with netns.entered(network.pod):
            Path("/proc/sys/net/ipv4/tcp_timestamps").write_text("0")
    client, served = network.connection(family, through)
    fall_asleep(network, gate, served)
    before = gate.activity(0)
    for option, value in (
        (socket.TCP_KEEPIDLE, 1),
        (socket.TCP_KEEPINTVL, 1),
        (socket.TCP_KEEPCNT, 2),
    ):
        client.setsockopt(socket.IPPROTO_TCP, option, value)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    namespace = network.client if through == "veth" else network.pod
    until(lambda: sent_probes(network, namespace) >= 4, "four probes", 10)
    until(lambda: information(client)[PROBES] == 0, "the last of them to be answered")
    assert information(client)[STATE] == ESTABLISHED
    assert gate.activity(0) == before
    assert not readable(gate)
    client.send(b"data")
    held(gate, 1)


@families
def test_without_answers_it_would_give_up(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """What the test above is worth. Its probes are held, as all that is not known."""
    client, served = network.connection(family, "veth")
    fall_asleep(network, gate, served)
    gate.keep_alives.forget(0)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 1)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    client.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    held(gate, 1)
    until(lambda: information(client)[STATE] != ESTABLISHED, "the client to give up", 8)


@families
def test_byte_of_a_probe_is_cut_off(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    """Other kernels send one byte that was acknowledged before."""
    choose_stamps(network, stamps=False)
    compute_checksums(network)
    client, served = network.connection(family, "veth")
    known = fall_asleep(network, gate, served)
    before = gate.activity(0)
    wire = Wire(network)
    ask(network, family, known, data=b"\x9a")
    answer = wire.next_answer()
    assert (answer.sequence, answer.acknowledged) == (known.send_next, known.receive_next)
    assert (answer.flags, answer.data, answer.checksum) == (ACK, b"", "right")
    assert answer.window == known.window
    assert gate.activity(0) == before
    assert information(client)[STATE] == ESTABLISHED


def segment(
    family: socket.AddressFamily,
    known: Connection,
    *,
    back: int = 1,
    ahead: int = 0,
    flags: int = ACK,
    options: bytes = b"",
    data: bytes = b"",
    port: int = 0,
) -> bytes:
    """A TCP segment in the peer's name: a probe, unless something is other than that."""
    tcp = struct.pack(
        "!HHIIBBHHH",
        port or known.peer_port,
        known.local_port,
        (known.receive_next - back) & 0xFFFFFFFF,
        (known.send_next + ahead) & 0xFFFFFFFF,
        (20 + len(options)) // 4 << 4,
        flags,
        1024,
        0,
        0,
    )
    tcp += options + data
    first = 12 if family == socket.AF_INET else 0
    pseudo = known.peer[first:] + known.local[first:]
    pseudo += struct.pack("!HH", socket.IPPROTO_TCP, len(tcp))
    return tcp[:16] + struct.pack("!H", ~total(pseudo + tcp) & 0xFFFF) + tcp[18:]


def ask(network: Network, family: socket.AddressFamily, known: Connection, **changes: Any) -> None:
    """Send a segment in the client's name."""
    with (
        netns.entered(network.client),
        socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_TCP) as raw,
    ):
        raw.sendto(segment(family, known, **changes), (POD[family], 0))


@families
@pytest.mark.parametrize(
    "changes",
    [
        {"back": 0},
        {"back": 2},
        {"ahead": 1},
        {"ahead": -1},
        {"flags": ACK | PUSH},
        {"flags": 0},
        {"data": b"xy"},
        {"options": b"\x01\x01\x01\x00"},
        {"options": b"\x01\x01\x08\x0a" + bytes(8)},
        {"port": 9},
    ],
    ids=lambda changes: "-".join(f"{name}={value}" for name, value in changes.items()),
)
def test_anything_else_is_held(
    network: Network, gate: Gate, family: socket.AddressFamily, changes: dict[str, Any]
) -> None:
    choose_stamps(network, stamps=False)
    _, served = network.connection(family, "veth")
    known = fall_asleep(network, gate, served)
    wire = Wire(network)
    ask(network, family, known, **changes)
    held(gate, 1)
    assert wire.answers() == []


@families
def test_probe_without_the_connections_timestamps_is_held(
    network: Network, gate: Gate, family: socket.AddressFamily
) -> None:
    _, served = network.connection(family, "veth")
    known = fall_asleep(network, gate, served)
    ask(network, family, known)
    held(gate, 1)


@families
@pytest.mark.parametrize(
    "how",
    [
        lambda gate: gate.set_present(0),
        lambda gate: gate.keep_alives.forget(0),
        lambda gate: gate.keep_alives.answer_for(0, []),
        lambda gate: gate.keep_alives.answer_for(1, []) or gate.set_present(0),
    ],
    ids=["present", "forgotten", "others", "present and others'"],
)
def test_answers_end(
    network: Network,
    gate: Gate,
    family: socket.AddressFamily,
    how: Callable[[Gate], object],
) -> None:
    """With the first step of a wake, whatever the map says."""
    client, served = network.connection(family, "veth")
    fall_asleep(network, gate, served)
    wire = Wire(network)
    how(gate)
    probe(client)
    held(gate, 1)
    assert wire.answers() == []


def test_what_wakes_forgets(network: Network, gate: Gate) -> None:
    """So that it is not there when the program is absent for the next time."""
    client, served = network.connection(socket.AF_INET, "veth")
    fall_asleep(network, gate, served)
    gate.set_mode(0, Mode.OPEN)
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0)
    wire = Wire(network)
    probe(client)
    held(gate, 1)
    assert wire.answers() == []


def test_port_that_does_not_count_is_answered_for(network: Network, gate: Gate) -> None:
    """Nobody else tells the peer of an outgoing connection that it is still there."""
    gate.set_ports(0, [Port("tcp", PORT, Use.IGNORED)])
    client, served = network.connection(socket.AF_INET, "veth")
    fall_asleep(network, gate, served)
    wire = Wire(network)
    probe(client)
    assert wire.next_answer().flags == ACK
    assert gate.activity(0) == Activity(0, 0, 0, 0)


def test_another_owner_of_the_port_wakes_for_its_own(network: Network, gate: Gate) -> None:
    """A connection is one owner's; that another is absent, too, answers nothing."""
    gate.set_ports(1, [Port("tcp", PORT)])
    client, served = network.connection(socket.AF_INET, "veth")
    gate.set_mode(1, Mode.HOLD)
    gate.set_absent(1)
    gate.set_mode(0, Mode.HOLD)
    known = take_away(served)
    assert gate.keep_alives.answer_for(0, [known]) == 1
    probe(client)
    held(gate, 1, owner=1)


def test_answers_go_on_without_a_daemon(network: Network, gate: Gate) -> None:
    client, served = network.connection(socket.AF_INET, "veth")
    known = fall_asleep(network, gate, served)
    gate.close(remove=False)
    wire = Wire(network)
    probe(client)
    assert wire.next_answer().flags == ACK
    again = network.open()
    probe(client)
    assert wire.next_answer().flags == ACK
    other = known._replace(peer_port=9)
    assert again.keep_alives.answer_for(0, [other]) == 1
    probe(client)
    held(again, 1)


def test_map_has_an_end(network: Network, gate: Gate) -> None:
    """Those beyond it wake; the first ones do not."""
    client, served = network.connection(socket.AF_INET, "veth")
    known = fall_asleep(network, gate, served)
    others = [
        known._replace(local_port=1 + number // 60000, peer_port=1 + number % 60000)
        for number in range(5000)
    ]
    assert gate.keep_alives.answer_for(0, [known, *others]) == 4096
    wire = Wire(network)
    probe(client)
    assert wire.next_answer().flags == ACK
    before = time.monotonic()
    gate.keep_alives.forget(0)
    assert time.monotonic() - before < 0.5
    probe(client)
    held(gate, 1)


def test_a_gate_of_an_earlier_release_gets_the_map(network: Network, gate: Gate) -> None:
    """It is pinned without one."""
    gate.close(remove=False)
    (network.pin_dir / "connections").unlink()
    again = network.open()
    assert bpf.is_bpffs(network.pin_dir / "connections")
    client, served = network.connection(socket.AF_INET, "veth")
    fall_asleep(network, again, served)
    wire = Wire(network)
    probe(client)
    assert wire.next_answer().flags == ACK


def test_answer_has_the_probes_vlan(network: Network, gate: Gate) -> None:
    for namespace, own in ((network.pod, "10.98.8.2"), (network.client, "10.98.8.1")):
        with netns.entered(namespace):
            add = ["ip", "link", "add", "link", "eth0", "name", "vlan5", "type", "vlan", "id", "5"]
            made = subprocess.run(add, check=False, capture_output=True)
            if made.returncode:
                pytest.skip("the kernel has no VLAN devices (CONFIG_VLAN_8021Q)")
            command(f"ip address add {own}/24 dev vlan5")
            netns.bring_up("vlan5")
    gate.repair()
    server = network.server(socket.AF_INET, socket.SOCK_STREAM)
    client = network.make_socket(network.client, socket.AF_INET, socket.SOCK_STREAM)
    client.connect_ex(("10.98.8.2", PORT))
    known = fall_asleep(network, gate, network.accept(server))
    before = gate.activity(0)
    wire = Wire(network, "vlan5")
    probe(client)
    assert wire.next_answer().sequence == known.send_next
    assert gate.activity(0) == before


def datagram(
    family: socket.AddressFamily, known: Connection, payload: bytes, options: bytes, fragment: int
) -> bytes:
    """A packet of IP, for a segment; options and fragment of IPv4, or an extension header of IPv6."""
    if family == socket.AF_INET6:
        size = len(options) + len(payload)
        header = struct.pack("!IHBB", 6 << 28, size, 60 if options else 6, 3)
        return header + known.peer + known.local + options + payload
    size = 20 + len(options)
    header = struct.pack(
        "!BBHHHBBH", 0x40 | size // 4, 8, size + len(payload), 7, fragment, 3, 6, 0
    )
    header += known.peer[12:] + known.local[12:] + options
    return header[:10] + struct.pack("!H", ~total(header) & 0xFFFF) + header[12:] + payload


@pytest.mark.parametrize(
    ("family", "options", "fragment", "data", "answered"),
    [
        (socket.AF_INET, b"", 0, b"", True),
        (socket.AF_INET, b"", 0, b"x", True),
        (socket.AF_INET, bytes([1, 1, 1, 1]), 0, b"", False),
        (socket.AF_INET, b"", 0x2000, b"", False),
        (socket.AF_INET6, b"", 0, b"", True),
        (socket.AF_INET6, b"", 0, b"x", True),
        (socket.AF_INET6, bytes([6, 0, 1, 4, 0, 0, 0, 0]), 0, b"", False),
    ],
    ids=["ipv4", "byte", "options", "fragment", "ipv6", "byte of ipv6", "options of ipv6"],
)
def test_interfaces_without_ethernet_header(
    network: Network,
    gate: Gate,
    family: socket.AddressFamily,
    options: bytes,
    fragment: int,
    data: bytes,
    answered: bool,
) -> None:
    if not Path("/dev/net/tun").exists():
        pytest.skip("the kernel has no tun devices (/dev/net/tun)")
    with netns.entered(network.pod):
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
        # TUNSETIFF with IFF_TUN | IFF_NO_PI, see <linux/if_tun.h>.
        fcntl.ioctl(tun, 0x400454CA, struct.pack("16sH22x", b"tun0", 0x1001))
        command("ip address add 10.98.9.2/24 dev tun0")
        command("ip address add fd98:9::2/64 dev tun0 nodad")
        netns.bring_up("tun0")
    gate.repair()
    here, there = TUNNEL[family]
    stamp = 0x89ABCDEF
    known = Connection(address(here), address(there), PORT, 41000, 0, 0xFFFFFFFF, 500, stamp)
    gate.set_mode(0, Mode.HOLD)
    gate.set_absent(0)
    assert gate.keep_alives.answer_for(0, [known]) == 1
    asked = b"\x01\x01\x08\x0a" + struct.pack("!II", 12345, 99)
    tcp = segment(family, known, options=asked, data=data)
    os.write(tun, datagram(family, known, tcp, options, fragment))
    if not answered:
        until(lambda: gate.activity(0).held == 1, "it to be held")
    else:
        answers: list[Segment] = []

        def answer_is_there() -> bool:
            with contextlib.suppress(BlockingIOError):
                found = parse(os.read(tun, 1 << 16), outgoing=False)
                answers.extend([found] if found else [])
            return bool(answers)

        until(answer_is_there, "an answer")
        assert answers == [
            Segment(
                outgoing=False,
                hop_limit=HOP_LIMIT,
                source=PORT,
                destination=41000,
                sequence=0xFFFFFFFF,
                acknowledged=0,
                flags=ACK,
                window=500,
                options=b"\x01\x01\x08\x0a" + struct.pack("!II", stamp, 12345),
                data=b"",
                checksum="right",
            )
        ]
        assert gate.activity(0) == Activity(0, 0, 0, 0)
    os.close(tun)
