"""Keeps a pod's network namespace from answering for a program that is not there, or not there yet.

The kernel resets what is sent to a port without a socket. In a namespace that a pod is leaving, or in which
one is arriving, that would break connections which go on a moment later elsewhere, or here. Called by those
who carry out a move; the gate does the same for one container, this for the namespace as a whole.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from architect.adapters import netfilter, netns
from architect.contract.errors import ArchitectError

_TABLE: Final = "architect_silence"
_RULES: Final = f"""
table inet {_TABLE} {{}}
flush table inet {_TABLE}
table inet {_TABLE} {{
  chain out {{
    type filter hook output priority 0; policy accept;
    tcp flags & rst == rst drop
    icmp type destination-unreachable drop
    icmpv6 type destination-unreachable drop
  }}
}}
"""


class NotSilent(ArchitectError):
    """The kernel refused the rules."""


def begin(pid: int) -> None:
    """Lets no refusal out of the network namespace of a process; repeatable; blocking.

    Raises:
        NotSilent: nft(8) cannot do it, or the process has ended.
    """
    _apply(pid, _RULES)


def end(pid: int) -> None:
    """Lets refusals out again; nothing if they were; blocking. Raises as :func:`begin`."""
    _apply(pid, f"table inet {_TABLE} {{}}\ndelete table inet {_TABLE}\n")


def _apply(pid: int, rules: str) -> None:
    try:
        space = netns.open_netns(Path(f"/proc/{pid}/ns/net"))
        try:
            with netns.entered(space):
                netfilter.checked("nft", "-f", "-", text=rules)
        finally:
            os.close(space)
    except (netns.NetnsError, netfilter.NetfilterError, OSError) as error:
        raise NotSilent(
            "a pod's network cannot be silenced while it moves",
            str(error),
            "nftables (nf_tables) has to be in the node's kernel",
        ) from error
