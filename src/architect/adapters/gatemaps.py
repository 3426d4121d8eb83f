"""How the gate's maps are laid out: the structures of native/bpf/gate.bpf.c, as Python sees them.

Called by the gate alone. Owners are containers, numbered from 0; masks of them have a bit for each.
"""

import struct
from typing import NamedTuple

from architect.decisions.ports import Port, Protocol

OWNERS = 16
"""Owners a gate has room for, numbered from 0: the width of the mark's low half."""
NAMES = ("ports", "modes", "sleeps", "held", "traffic", "limits", "connections")
"""All maps, by which they are pinned."""

KEY = struct.Struct("=I")
PORT_OWNERS = struct.Struct("=III")
MODES = struct.Struct("=II")
SLEEPS = struct.Struct("=III")
HELD = struct.Struct("=QQ")
ACTIVITY = struct.Struct("=QQQQ")

_PROTOCOLS: dict[Protocol, int] = {"tcp": 6, "udp": 17}
_NAMES = {number: name for name, number in _PROTOCOLS.items()}


class Sleeps(NamedTuple):
    """Masks of owners, as in the map `sleeps`."""

    absent: int
    opening: int
    """Of TCP they hold opening SYNs alone."""
    probed: int


def bit(owner: int) -> int:
    """The owner's bit. Raises ValueError."""
    if not 0 <= owner < OWNERS:
        raise ValueError(f"owner {owner} is not between 0 and {OWNERS - 1}")
    return 1 << owner


def key(port: Port) -> int:
    """The port's key. Raises ValueError."""
    if not 0 < port.number < 1 << 16:
        raise ValueError(f"port {port.number} is not between 1 and 65535")
    return _PROTOCOLS[port.protocol] << 16 | port.number


def port_of(key: int) -> tuple[Protocol, int]:
    """Protocol and number of the port that has this key."""
    return _NAMES[key >> 16], key & 0xFFFF
