"""Shadow ports: a second number under which a pod's port is reached, without counting as traffic.

Called by the daemon's gates. The kernel's address translation does it, in the pod's network namespace, so
that any protocol over TCP and UDP works and the program notices nothing: packets to the shadow port are
translated to the program's after the gate, at the ingress, has seen the number that was asked for. Packets
over lo are translated before the gate sees them; so they carry a mark, which the gate knows.

The translation tracks connections, which costs a busy pod some of its throughput; pods without shadow ports
have none of it. Sources: nft(8) on dnat, iptables-extensions(8) on DNAT and MARK.
"""

from __future__ import annotations

import functools
import re
import socket
from collections.abc import Callable, Collection
from typing import Final, NamedTuple

from architect.adapters import netns
from architect.adapters.netfilter import (
    Backend,
    Family,
    NetfilterError,
    call,
    checked,
    iptables,
    nft_family,
)
from architect.decisions.ports import Shadow

MARK: Final = 0x41730000
"""'As'; also in native/bpf/gate.bpf.c."""
_NAME: Final = "architect-ports"
_TABLE: Final = "architect_ports"
_WAIT: Final = ("-w", "10")
_TRY_S: Final = 1.0


class ShadowError(NetfilterError):
    """No shadow port can be had on this machine, or in this namespace."""


def put(backend: Backend, family: Family, shadows: Collection[Shadow]) -> None:
    """Makes these the shadow ports of the current namespace, in place of those that it had.

    Raises:
        NetfilterError: the tool failed; nothing is changed.
    """
    if not shadows:
        remove(backend, family)
        return
    if backend is Backend.NFT:
        checked("nft", "-f", "-", text=_nft_text(family, shadows))
        return
    tool = iptables(backend, family)
    checked(f"{tool}-restore", "--noflush", *_WAIT, text=_iptables_text(shadows))
    for table, chain in _JUMPS:
        jump = _jump(chain)
        if call(tool, *_WAIT, "-t", table, "-C", chain, *jump).returncode:
            checked(tool, *_WAIT, "-t", table, "-I", chain, *jump)


_JUMPS: Final = (("nat", "PREROUTING"), ("nat", "OUTPUT"), ("mangle", "OUTPUT"))


def _jump(chain: str) -> list[str]:
    return [*(("-o", "lo") if chain == "OUTPUT" else ()), "-j", _NAME]


def _iptables_text(shadows: Collection[Shadow]) -> str:
    # To declare a chain of ours empties it.
    lines = ["*nat", f":{_NAME} -"]
    lines += [
        f"-A {_NAME} -p {one.protocol} --dport {one.number} -j DNAT --to-destination :{one.port}"
        for one in shadows
    ]
    lines += ["COMMIT", "*mangle", f":{_NAME} -"]
    lines += [
        f"-A {_NAME} -p {one.protocol} --dport {one.number} -j MARK --set-mark {MARK:#x}"
        for one in shadows
    ]
    return "\n".join([*lines, "COMMIT", ""])


def _nft_text(family: Family, shadows: Collection[Shadow]) -> str:
    table = f"{nft_family(family)} {_TABLE}"
    lines = [
        f"add table {table}",
        f"delete table {table}",
        f"add table {table}",
        f"add chain {table} inbound {{ type nat hook prerouting priority -100; }}",
        f"add chain {table} marking {{ type filter hook output priority -150; }}",
        f"add chain {table} outbound {{ type nat hook output priority -100; }}",
    ]
    for one in shadows:
        what = f"{one.protocol} dport {one.number}"
        lines += [
            f"add rule {table} inbound {what} dnat to :{one.port}",
            f'add rule {table} marking oifname "lo" {what} meta mark set {MARK:#x}',
            f'add rule {table} outbound oifname "lo" {what} dnat to :{one.port}',
        ]
    return "\n".join([*lines, ""])


def present(backend: Backend, family: Family, shadows: Collection[Shadow]) -> bool:
    """Whether the current namespace has these and no others.

    Raises:
        NetfilterError: the tool cannot be run.
    """
    wanted = sorted({(one.protocol, str(one.number), str(one.port)) for one in shadows})
    marked = sorted((protocol, number) for protocol, number, _ in wanted)
    if backend is Backend.NFT:
        done = call("nft", "list", "table", nft_family(family), _TABLE)
        translating = sorted(_NFT_TRANSLATES.findall(done.stdout))
        marking = sorted(_NFT_MARKS.findall(done.stdout))
        return translating == sorted(wanted * 2) and marking == marked
    tool = iptables(backend, family)
    for table, chain in _JUMPS:
        said = call(tool, *_WAIT, "-t", table, "-S").stdout
        found = _TRANSLATES.findall(said) if table == "nat" else _MARKS.findall(said)
        if sorted(found) != (wanted if table == "nat" else marked):
            return False
        if not re.search(rf"^-A {chain} .*-j {_NAME}$", said, re.MULTILINE):
            return False
    return True


_NFT_TRANSLATES: Final = re.compile(r"(tcp|udp) dport (\d+) dnat to :(\d+)")
_NFT_MARKS: Final = re.compile(r"(tcp|udp) dport (\d+) meta mark set")
_RULE: Final = rf"^-A {_NAME} -p (tcp|udp) .*--dport (\d+) -j "
_TRANSLATES: Final = re.compile(rf"{_RULE}DNAT --to-destination :(\d+)$", re.MULTILINE)
_MARKS: Final = re.compile(rf"{_RULE}MARK ", re.MULTILINE)


def remove(backend: Backend, family: Family) -> None:
    """Takes all of ours away, if there is any.

    Raises:
        NetfilterError: the tool failed.
    """
    if backend is Backend.NFT:
        table = f"{nft_family(family)} {_TABLE}"
        # Adding first makes the deletion good for an absent table, too.
        checked("nft", "-f", "-", text=f"add table {table}\ndelete table {table}\n")
        return
    tool = iptables(backend, family)
    for table, chain in _JUMPS:
        while not call(tool, *_WAIT, "-t", table, "-D", chain, *_jump(chain)).returncode:
            pass
    for table in ("nat", "mangle"):
        call(tool, *_WAIT, "-t", table, "-F", _NAME)
        call(tool, *_WAIT, "-t", table, "-X", _NAME)
    if backend is Backend.IPTABLES_NFT:
        # Empty chains are on each packet's way too, and those of nat have the kernel track connections.
        # Refused, rightly, while they have others' rules.
        for table, chain in _JUMPS:
            call(tool, *_WAIT, "-t", table, "-X", chain)


def _listener(family: Family) -> socket.socket | None:
    """A listener on lo of the current namespace; none on a machine without the family."""
    try:
        return socket.create_server((family.loopback, 0), family=family.socket_family)
    except OSError:
        return None


def _works(backend: Backend, family: Family) -> str:
    """Tries a backend in a scratch namespace; returns why it does not work, or nothing."""
    try:
        with netns.scratch():
            listener = _listener(family)
            if listener is None:
                return f"the machine has no {family.value}"
            with listener:
                port = listener.getsockname()[1]
                shadow = port - 1 if port > 1 << 15 else port + 1
                put(backend, family, [Shadow("tcp", shadow, port)])
                with socket.create_connection((family.loopback, shadow), _TRY_S):
                    return ""
    except (NetfilterError, OSError) as error:
        return str(error)


def backend(family: Family) -> Backend | None:
    """What works on this machine, tried once with a connection; takes some 30 ms.

    None where the machine lacks the family: then there is nothing to be translated. None, too, for IPv6 where
    IPv4 can be translated and IPv6 cannot; :func:`missing` says why.

    Raises:
        ShadowError: nothing does; the message says what is missing.
    """
    found = _support(family)
    if found.why_not and (family is Family.IPV4 or _support(Family.IPV4).backend is None):
        raise ShadowError(found.why_not)
    return found.backend


def missing() -> str:
    """Why pods have no IPv6 shadow ports on a machine that has both families; empty if they have some.

    Raises:
        ShadowError: none can be had at all.
    """
    for family in Family:
        backend(family)
    return _support(Family.IPV6).why_not


class _Support(NamedTuple):
    """What was found for a family."""

    backend: Backend | None
    why_not: str
    """Why there is none; empty, too, on a machine without the family."""


@functools.cache
def _support(family: Family) -> _Support:
    with netns.scratch():
        listener = _listener(family)
    if listener is None:
        return _Support(None, "")
    listener.close()
    return _first(lambda each: _works(each, family))


def _first(why_not: Callable[[Backend], str]) -> _Support:
    reasons = {}
    for each in Backend:
        why = why_not(each)
        if not why:
            return _Support(each, "")
        reasons[each] = why
    causes = "; ".join(f"{each.value}: {why}" for each, why in reasons.items())
    return _Support(
        None,
        f"no way to translate ports ({causes}); install nftables or iptables and enable CONFIG_NF_NAT "
        "with CONFIG_NFT_NAT, or CONFIG_NETFILTER_XT_NAT",
    )
