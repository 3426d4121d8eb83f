"""A connection of a pod, as it is written in a Checkpoint and read by the routers of all nodes.

``protocol|local address|local port|peer's address|peer's port``, as the pod's own socket has them; IPv6
addresses without brackets.
"""

from __future__ import annotations

from ipaddress import ip_address
from typing import Final, NamedTuple, Self

from architect.contract.errors import ArchitectError, quoted

PROTOCOLS: Final = ("tcp", "udp")


class BadFlow(ArchitectError):
    """A text is no flow."""


class Flow(NamedTuple):
    """See the module."""

    protocol: str
    local: str
    local_port: int
    peer: str
    peer_port: int

    def __str__(self) -> str:
        """The text that :meth:`parse` reads."""
        return "|".join(map(str, self))

    @property
    def is_v6(self) -> bool:
        """Whether its addresses are of IPv6."""
        return ":" in self.local

    @classmethod
    def parse(cls, text: str) -> Self:
        """Reads what ``str()`` writes. Raises BadFlow."""
        try:
            protocol, local, local_port, peer, peer_port = text.split("|")
            found = cls(protocol, local, int(local_port), peer, int(peer_port))
            families = {ip_address(found.local).version, ip_address(found.peer).version}
        except ValueError as error:
            raise _bad(text, str(error)) from error
        if protocol not in PROTOCOLS:
            raise _bad(text, f"{quoted(protocol)} is neither tcp nor udp")
        if len(families) > 1:
            raise _bad(text, "its addresses are of different families")
        if not all(0 < port < 65536 for port in (found.local_port, found.peer_port)):
            raise _bad(text, "a port is not between 1 and 65535")
        return found


def _bad(text: str, why: str) -> BadFlow:
    return BadFlow(f"flow {quoted(text)}", why, "write it as tcp|10.0.1.7|6379|10.0.3.4|41234")
