"""One question to containerd: which runtime handlers do you know?

The kubelet asks the same (CRI's RuntimeService/Status) through gRPC, which is a large dependency for
one call. What it takes of HTTP/2 (RFC 9113) and HPACK (RFC 7541) to ask and to see the answer's
bytes is here; the answer is searched, not decoded. Called by adapters/containerd.py.
"""

from __future__ import annotations

import json
import os
import socket
import struct
from pathlib import Path
from typing import Final

_METHOD: Final = "/runtime.v1.RuntimeService/Status"
_STATUS_REQUEST: Final = b"\x08\x01"  # verbose: containerd 1.7 names its handlers only there
_PREFACE: Final = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
# Frame types and flags, RFC 9113, section 6.
_DATA, _HEADERS, _RESET, _SETTINGS, _PING, _GOAWAY, _WINDOW_UPDATE = 0, 1, 3, 4, 6, 7, 8
_ACK, _END_STREAM, _END_HEADERS = 1, 1, 4
_INITIAL_WINDOW_SIZE: Final = 4
_WINDOW: Final = 1 << 24
"""Bytes an answer may have; containerd's is some 10 KiB."""
_STREAM: Final = 1


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    head = struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream)
    return head + payload


def _field(name: str, value: str) -> bytes:
    """A literal header field without indexing, not compressed (RFC 7541, 6.2.2)."""
    parts = (name.encode(), value.encode())
    return b"\0" + b"".join(bytes([len(part)]) + part for part in parts)


def _request() -> bytes:
    headers = (
        (":method", "POST"),
        (":scheme", "http"),
        (":path", _METHOD),
        (":authority", "localhost"),
        ("content-type", "application/grpc"),
        ("te", "trailers"),
    )
    message = struct.pack(">BI", 0, len(_STATUS_REQUEST)) + _STATUS_REQUEST
    return b"".join(
        (
            _PREFACE,
            _frame(_SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, _WINDOW)),
            _frame(_WINDOW_UPDATE, 0, 0, struct.pack(">I", _WINDOW)),
            _frame(_HEADERS, _END_HEADERS, _STREAM, b"".join(_field(*one) for one in headers)),
            _frame(_DATA, _END_STREAM, _STREAM, message),
        )
    )


def _exactly(peer: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        more = peer.recv(size - len(data))
        if not more:
            raise ConnectionError("containerd closed the connection")
        data += more
    return data


def _connect(path: Path, timeout_s: float) -> socket.socket:
    """A connection; by way of the folder's descriptor, since an address has 107 bytes (unix(7))."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
    try:
        peer = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            peer.settimeout(timeout_s)
            peer.connect(f"/proc/self/fd/{folder}/{path.name}")
        except BaseException:
            peer.close()
            raise
    finally:
        os.close(folder)
    return peer


def status(path: Path, timeout_s: float) -> bytes:
    """The bytes of a StatusResponse; none if CRI is not served. OSError if nobody answers.

    ``timeout_s`` is for each step of the exchange.
    """
    answer = b""
    with _connect(path, timeout_s) as peer:
        peer.sendall(_request())
        while True:
            head = _exactly(peer, 9)
            kind, flags = head[3], head[4]
            payload = _exactly(peer, int.from_bytes(head[:3], "big"))
            if kind == _SETTINGS and not flags & _ACK:
                peer.sendall(_frame(_SETTINGS, _ACK, 0, b""))
            elif kind == _PING and not flags & _ACK:
                peer.sendall(_frame(_PING, _ACK, 0, payload))
            elif kind == _DATA:
                answer += payload
            if kind in (_RESET, _GOAWAY) or (kind in (_DATA, _HEADERS) and flags & _END_STREAM):
                return answer


def has_handler(answer: bytes, name: str) -> bool:
    """Whether a StatusResponse names the handler.

    Either as a field of runtime_handlers (Kubernetes 1.30 on) or as a key of the verbose answer's
    JSON, where containerd shows its configuration.
    """
    text = name.encode()
    return json.dumps(name).encode() in answer or b"\x0a" + bytes([len(text)]) + text in answer
