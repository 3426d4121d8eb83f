"""For which connections of a program that is not there the kernel answers TCP's keep-alive probes.

Called by the gate, which has the map; answered is by native/bpf/keepalive.h, whose structures are repeated
here, and for absent owners alone. The map is pinned: answers go on while no daemon runs.
"""

import struct
from collections.abc import Collection
from typing import Final

from architect.adapters import bpf
from architect.adapters.criuimages import Connection

NAME: Final = "connections"
"""Of the map."""
MOST: Final = 4096
"""Connections that the map has room for, of all owners together."""

_ENDS: Final = struct.Struct("!16s16sHH")
_KEY: Final = struct.Struct(f"={_ENDS.size}s")
_VALUE: Final = struct.Struct("=IIIIHH")


class KeepAlives:
    """See the module. Methods raise bpf.BpfError."""

    def __init__(self, descriptor: int) -> None:
        """Use a map's descriptor, which stays the caller's."""
        self._map = bpf.Table[bytes](descriptor, _KEY, _VALUE)
        self._owners: dict[bytes, int] = {}

    def find(self) -> None:
        """Take over what an earlier daemon has put there."""
        self._owners = {key: self._map[key][0] for key in list(self._map)}

    def answer_for(self, owner: int, connections: Collection[Connection]) -> int:
        """Have the probes of exactly these connections of an owner answered while it is absent.

        Returns how many there was room for; probes of the others wake.
        """
        wanted = set()
        for one in connections:
            key = _ENDS.pack(one.local, one.peer, one.local_port, one.peer_port)
            stamped = one.timestamp is not None
            value = (
                1 << owner, one.receive_next, one.send_next, one.timestamp or 0, one.window, stamped
            )  # fmt: skip
            try:
                self._map[key] = value
            except bpf.MapFullError:
                break
            self._owners[key] = 1 << owner
            wanted.add(key)
        # Last: those that are there for an earlier daemon's sake are not missed for a moment.
        self._keep(owner, wanted)
        return len(wanted)

    def forget(self, owner: int) -> None:
        """Have no probe to this owner answered; a few microseconds for each connection."""
        self._keep(owner, ())

    def _keep(self, owner: int, wanted: Collection[bytes]) -> None:
        for key in [key for key, owners in self._owners.items() if owners == 1 << owner]:
            if key not in wanted:
                del self._map[key]
                del self._owners[key]
