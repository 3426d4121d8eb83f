"""A reader of one NFQUEUE: packets that netfilter holds until we say go.

Called by the gate (to hold a hibernated container's packets) and by the
netfilter probe. Written over raw netlink because of the two packages on PyPI,
both from 2023, one needs a compiler at installation and neither can leave the
packets' bytes in the kernel, where they belong: all we read is the mark, but
while a container leaves for another node, which has to have them.

Sources: <linux/netfilter/nfnetlink_queue.h>, net/netfilter/nfnetlink_queue.c,
netlink(7).
"""

import contextlib
import errno
import os
import socket
import struct
from collections.abc import Iterable
from typing import NamedTuple

_NETLINK_NETFILTER = 12
_SUBSYSTEM = 3 << 8  # NFNL_SUBSYS_QUEUE
_PACKET = _SUBSYSTEM | 0
_VERDICT = _SUBSYSTEM | 1
_CONFIG = _SUBSYSTEM | 2
_NLMSG_ERROR = 2
_NLM_F_REQUEST = 1
_NLM_F_ACK = 4

_CFG_CMD, _CFG_PARAMS, _CFG_MAXLEN, _CFG_MASK, _CFG_FLAGS = range(1, 6)
_CMD_BIND = 1
# NFQNL_COPY_META: no byte of the packet, only its attributes.
_COPY_META = 1
_COPY_PACKET = 2
_WHOLE = 0xFFFF
"""Bytes of a packet, from its network header on; the kernel has no larger ones but IPv6 jumbograms."""
# NFQA_CFG_F_GSO: aggregated segments stay one packet, not split and checksummed.
_FLAG_GSO = 4
_ATTR_PACKET, _ATTR_VERDICT, _ATTR_MARK, _ATTR_PAYLOAD = 1, 2, 3, 10
_NF_DROP, _NF_ACCEPT = 0, 1

_SOL_NETLINK = 270
_NETLINK_NO_ENOBUFS = 5
_SO_RCVBUFFORCE = 33

_HEADER = struct.Struct("=IHHII")
_FAMILY = struct.Struct("!BBH")  # struct nfgenmsg: family, version, queue number
_ATTRIBUTE = struct.Struct("=HH")
_BE32 = struct.Struct("!I")
_BODY = _HEADER.size + _FAMILY.size

# One netlink message to the kernel must fit in the socket's send buffer.
_VERDICTS_AT_ONCE = 512


class QueueError(Exception):
    """The packet queue could not be opened, read or answered."""


class QueueBusyError(QueueError):
    """Another process reads this queue."""


class QueueUnsupportedError(QueueError):
    """The kernel has no nfnetlink_queue, or we may not use it."""


class Packet(NamedTuple):
    """A packet that the kernel holds for us."""

    id: int
    """Unique in the queue while the packet is held."""
    mark: int
    """skb->mark, 0 if it had none."""
    data: bytes = b""
    """From its network header on, if it came while `copy` was on. Transport checksums may be partial."""


def _attribute(kind: int, data: bytes) -> bytes:
    return _ATTRIBUTE.pack(_ATTRIBUTE.size + len(data), kind) + data + b"\0" * (-len(data) % 4)


class Queue:
    """The only reader of one queue in the namespace in which it was made.

    When it is closed, also by the death of the process, the kernel drops what
    the queue holds, and further packets as long as no reader is there.
    """

    def __init__(self, number: int, *, capacity: int, buffer_bytes: int) -> None:
        """Bind queue `number` in the calling thread's network namespace.

        The kernel drops packets beyond `capacity`, or beyond what fits as
        messages of about 1 KB in `buffer_bytes` until they are read.
        Raises QueueBusyError, QueueUnsupportedError, QueueError.
        """
        self._number = number
        self._sequence = 0
        self._buffer = bytearray(1 << 17)  # a whole packet, and its attributes
        self._early: list[Packet] = []
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK,
                socket.SOCK_RAW | socket.SOCK_NONBLOCK | socket.SOCK_CLOEXEC,
                _NETLINK_NETFILTER,
            )
        except OSError as error:
            raise QueueUnsupportedError(
                f"no netfilter netlink socket: {error.strerror}; "
                "the kernel needs CONFIG_NETFILTER_NETLINK_QUEUE"
            ) from error
        try:
            self._configure(capacity, buffer_bytes)
        except BaseException:
            self._socket.close()
            raise

    def _configure(self, capacity: int, buffer_bytes: int) -> None:
        try:
            self._socket.bind((0, 0))
            # Unlike SO_RCVBUF not limited by net.core.rmem_max.
            self._socket.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, buffer_bytes)
            # A lost message is a dropped packet, which its sender repeats;
            # ENOBUFS would only cost a wakeup.
            self._socket.setsockopt(_SOL_NETLINK, _NETLINK_NO_ENOBUFS, 1)
            self._send(
                _CONFIG,
                _NLM_F_REQUEST | _NLM_F_ACK,
                _attribute(_CFG_CMD, struct.pack("!BxH", _CMD_BIND, socket.AF_UNSPEC)),
                _attribute(_CFG_PARAMS, struct.pack("!IB", 0, _COPY_META)),
                _attribute(_CFG_MAXLEN, _BE32.pack(capacity)),
                _attribute(_CFG_MASK, _BE32.pack(_FLAG_GSO)),
                _attribute(_CFG_FLAGS, _BE32.pack(_FLAG_GSO)),
            )
            self._await_acknowledgement()
        except OSError as error:
            what = f"cannot read packet queue {self._number}: {error.strerror}"
            # The kernel answers EPERM both to a second reader and to a process
            # without the capability.
            if error.errno in (errno.EPERM, errno.EBUSY):
                raise QueueBusyError(
                    f"{what}; another process reads it (see /proc/net/netfilter/nfnetlink_queue), "
                    "or CAP_NET_ADMIN is missing"
                ) from error
            if error.errno in (errno.EINVAL, errno.EOPNOTSUPP, errno.EPROTONOSUPPORT):
                raise QueueUnsupportedError(
                    f"{what}; the kernel needs CONFIG_NETFILTER_NETLINK_QUEUE"
                ) from error
            raise QueueError(what) from error

    def copy(self, *, on: bool) -> None:
        """From now on packets come with their bytes, or (at first) without.

        Raises QueueError.
        """
        mode = struct.pack("!IB", _WHOLE if on else 0, _COPY_PACKET if on else _COPY_META)
        try:
            self._send(_CONFIG, _NLM_F_REQUEST | _NLM_F_ACK, _attribute(_CFG_PARAMS, mode))
            self._await_acknowledgement()
        except OSError as error:
            raise QueueError(
                f"cannot change packet queue {self._number}: {error.strerror}"
            ) from error

    def _send(self, kind: int, flags: int, *attributes: bytes) -> None:
        self._socket.send(self._message(kind, flags, *attributes))

    def _message(self, kind: int, flags: int, *attributes: bytes) -> bytes:
        self._sequence = self._sequence + 1 & 0xFFFFFFFF
        body = _FAMILY.pack(socket.AF_UNSPEC, 0, self._number) + b"".join(attributes)
        return _HEADER.pack(_HEADER.size + len(body), kind, flags, self._sequence, 0) + body

    def _await_acknowledgement(self) -> None:
        # The kernel answers before send() returns, but packets may come first.
        while True:
            size = self._socket.recv_into(self._buffer)
            length, kind, _, sequence, _ = _HEADER.unpack_from(self._buffer)
            if kind == _PACKET:
                self._early.append(self._parse(_HEADER.size, min(size, length)))
            elif kind == _NLMSG_ERROR and sequence == self._sequence:
                (number,) = struct.unpack_from("=i", self._buffer, _HEADER.size)
                if number:
                    raise OSError(-number, os.strerror(-number))
                return

    def fileno(self) -> int:
        """Return the socket's descriptor; it polls readable when packets wait."""
        return self._socket.fileno()

    def receive(self, limit: int) -> list[Packet]:
        """Return up to `limit` new packets in the order of their arrival.

        Does not block; fewer than `limit` means that there are no more.
        Raises QueueError.
        """
        packets, self._early = self._early, []
        while len(packets) < limit:
            try:
                size = self._socket.recv_into(self._buffer)
            except BlockingIOError:
                break
            except OSError as error:
                raise QueueError(f"cannot read packet queue {self._number}") from error
            # NFQUEUE sends one message a datagram.
            length, kind, _, _, _ = _HEADER.unpack_from(self._buffer)
            if kind == _PACKET:
                packets.append(self._parse(_HEADER.size, min(size, length)))
            elif kind == _NLMSG_ERROR:
                (number,) = struct.unpack_from("=i", self._buffer, _HEADER.size)
                # ENOENT: the packet of a verdict is gone with its interface.
                if number not in (0, -errno.ENOENT):
                    cause = OSError(-number, os.strerror(-number))
                    raise QueueError(
                        f"packet queue {self._number} refused a verdict: {cause.strerror}"
                    ) from cause
        return packets

    def _parse(self, start: int, end: int) -> Packet:
        offset = start + _FAMILY.size
        number = mark = 0
        data = b""
        while offset + _ATTRIBUTE.size <= end:
            length, kind = _ATTRIBUTE.unpack_from(self._buffer, offset)
            if length < _ATTRIBUTE.size:
                break
            if kind == _ATTR_PACKET:
                (number,) = _BE32.unpack_from(self._buffer, offset + _ATTRIBUTE.size)
            elif kind == _ATTR_MARK:
                (mark,) = _BE32.unpack_from(self._buffer, offset + _ATTRIBUTE.size)
            elif kind == _ATTR_PAYLOAD:
                data = bytes(self._buffer[offset + _ATTRIBUTE.size : offset + length])
            offset += length + 3 & ~3
        return Packet(number, mark, data)

    def decide(self, packets: Iterable[int], *, accept: bool) -> None:
        """Let packets go on, their mark cleared, or drop them, in the given order.

        An accepted packet is delivered before this returns. A packet that is
        no longer there is passed over. Raises QueueError.
        """
        verdict = _NF_ACCEPT if accept else _NF_DROP
        unmarked = _attribute(_ATTR_MARK, _BE32.pack(0))
        messages: list[bytes] = []
        for number in packets:
            decision = _attribute(_ATTR_VERDICT, struct.pack("!II", verdict, number))
            messages.append(self._message(_VERDICT, _NLM_F_REQUEST, decision, unmarked))
            if len(messages) == _VERDICTS_AT_ONCE:
                self._send_verdicts(messages)
                messages = []
        if messages:
            self._send_verdicts(messages)

    def _send_verdicts(self, messages: list[bytes]) -> None:
        try:
            self._socket.send(b"".join(messages))
        except OSError as error:
            raise QueueError(
                f"cannot send verdicts to packet queue {self._number}: {error.strerror}"
            ) from error

    def close(self) -> None:
        """Give the queue up; the kernel drops the packets it still holds."""
        with contextlib.suppress(OSError):
            self._socket.close()
