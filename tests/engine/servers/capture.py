"""What passed a client's interface, so that a test can say that nothing was reset or sent twice.

Used by the tests beside it, on the side of the client, who is the one that must not notice. A packet
socket (packet(7)) is opened in the client's network namespace; its packets are read when somebody asks.
"""

import contextlib
import dataclasses
import enum
import socket
import struct
from dataclasses import dataclass
from typing import Final, Self

from architect.adapters import netns

_EVERY_PROTOCOL: Final = 0x0003
"""ETH_P_ALL of <linux/if_ether.h>."""
_IPV4: Final = 0x0800
_IPV6: Final = 0x86DD
_SOL_PACKET: Final = 263
_PACKET_STATISTICS: Final = 6
_STATISTICS: Final = struct.Struct("=II")
"""struct tpacket_stats of <linux/if_packet.h>: all packets, those that did not fit; read once."""
_SO_RCVBUFFORCE: Final = 33
_BUFFER_BYTES: Final = 32 << 20
_OUTGOING: Final = 4
"""PACKET_OUTGOING of <linux/if_packet.h>."""
_OTHER_HOST: Final = 3
"""PACKET_OTHERHOST of it: for somebody else on the bridge, which floods what it has not learnt yet."""
_HEADER_BYTES: Final = 128
"""As much of a packet as is looked at."""


class Flag(enum.IntFlag):
    """Bits of a TCP header that are looked at (RFC 9293, section 3.1)."""

    FIN = 0x01
    SYN = 0x02
    RST = 0x04
    ACK = 0x10


NO_FLAG: Final = Flag(0)


@dataclass(frozen=True, slots=True)
class Packet:
    """One TCP segment or UDP datagram."""

    outgoing: bool
    """From the client."""
    protocol: str
    """tcp or udp."""
    peer: str
    """Address of the server."""
    peer_port: int
    own_port: int
    flags: Flag = NO_FLAG
    sequence: int = 0

    @property
    def opening(self) -> bool:
        """Whether it is the client's first of a connection."""
        return self.outgoing and self.flags & (Flag.SYN | Flag.ACK) == Flag.SYN


class Capture:
    """All TCP and UDP packets of one interface of a network namespace, from now on."""

    def __init__(self, place: int, interface: str = "eth0") -> None:
        """`place` is a descriptor of the namespace. Raises OSError."""
        with netns.entered(place):
            self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0)
            with contextlib.ExitStack() as closing:
                closing.callback(self._socket.close)
                self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, _BUFFER_BYTES)
                self._socket.setblocking(False)
                self._socket.bind((interface, _EVERY_PROTOCOL))
                closing.pop_all()
        self._packets: list[Packet] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Look no more. What was seen is forgotten, unless it was asked for before."""
        self._socket.close()

    @property
    def packets(self) -> list[Packet]:
        """All so far, in the order in which they passed."""
        with contextlib.suppress(BlockingIOError):
            while True:
                data, sender = self._socket.recvfrom(_HEADER_BYTES)
                packet = _parse(data, sender[1], outgoing=sender[2] == _OUTGOING)
                if packet and sender[2] != _OTHER_HOST:
                    self._packets.append(packet)
        lost = _STATISTICS.unpack(
            self._socket.getsockopt(_SOL_PACKET, _PACKET_STATISTICS, _STATISTICS.size)
        )[1]
        assert not lost, f"{lost} packets did not fit into the capture"
        return self._packets

    def resets(self) -> list[Packet]:
        """Return the resets that came from servers. A client's own is how it may end a connection."""
        return [one for one in self.packets if one.flags & Flag.RST and not one.outgoing]

    def repeated_openings(self) -> list[Packet]:
        """Return the SYNs that were sent again, because nobody had answered the first for a second."""
        openings = [one for one in self.packets if one.opening]
        return [one for number, one in enumerate(openings) if one in openings[:number]]

    def unanswered_openings(self) -> list[Packet]:
        """Return the SYNs without a SYN-ACK."""
        answers = {
            (one.peer, one.peer_port, one.own_port)
            for one in self.packets
            if not one.outgoing and Flag.SYN | Flag.ACK in one.flags
        }
        openings = [one for one in self.packets if one.opening]
        return [one for one in openings if (one.peer, one.peer_port, one.own_port) not in answers]

    def exchanges(self, protocol: str, peer_port: int) -> list[str]:
        """Return the directions in each flow with a server's port: > for a packet to it, < for one back.

        Without what is left of the flows that began before the capture.
        """
        flows: dict[int, str] = {}
        for one in self.packets:
            if (one.protocol, one.peer_port) != (protocol, peer_port):
                continue
            begins = one.opening if protocol == "tcp" else one.outgoing
            if begins or one.own_port in flows:
                flows[one.own_port] = flows.get(one.own_port, "") + "<>"[one.outgoing]
        return list(flows.values())

    def complaints(self) -> list[str]:
        """Return what a client could have noticed, a line each: nothing, if all is well."""
        found = {
            "reset": self.resets(),
            "SYN sent again": self.repeated_openings(),
            "SYN without an answer": self.unanswered_openings(),
        }
        return [
            f"{what}: {dataclasses.astuple(one)}" for what, ones in found.items() for one in ones
        ]


def _parse(data: bytes, kind: int, *, outgoing: bool) -> Packet | None:
    """Return a packet of TCP or UDP; anything else, later fragments among it, is None."""
    if kind == _IPV4 and len(data) >= 20 and not (data[6] & 0x1F or data[7]):
        protocol, header = data[9], (data[0] & 0x0F) * 4
        ends = [socket.inet_ntop(socket.AF_INET, data[at : at + 4]) for at in (12, 16)]
    elif kind == _IPV6 and len(data) >= 40:
        protocol, header = data[6], 40
        ends = [socket.inet_ntop(socket.AF_INET6, data[at : at + 16]) for at in (8, 24)]
    else:
        return None
    rest = data[header:]
    if protocol not in (socket.IPPROTO_TCP, socket.IPPROTO_UDP) or len(rest) < 8:
        return None
    source, destination = struct.unpack("!HH", rest[:4])
    peer, peer_port, own_port = (
        (ends[1], destination, source) if outgoing else (ends[0], source, destination)
    )
    if protocol == socket.IPPROTO_UDP:
        return Packet(outgoing, "udp", peer, peer_port, own_port)
    if len(rest) < 20:
        return None
    (sequence,) = struct.unpack("!I", rest[4:8])
    return Packet(outgoing, "tcp", peer, peer_port, own_port, Flag(rest[13]), sequence)
