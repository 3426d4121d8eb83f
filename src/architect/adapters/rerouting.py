"""The rules of a node that send the packets of moved connections to where their pod is now.

Called by architect-router, which makes them what the cluster's Checkpoints say, in its own network namespace.
nftables, because the kernel's own hooks sit just where this has to happen: after kube-proxy's translation and
before the routing decision on the way to the pod, before the tracking of connections on the way back. The
packets' addresses are rewritten without state; a connection stays what it is for its client, for kube-proxy
and for the kernel's table of connections.

A connection is named as its pod saw it, which for the node is the reply direction of the tracked connection:
so one key serves whatever Services and masquerading have made of the client's own addresses.

New connections to the address that the pod has left (some node may still send them there) are sent on too;
each leaves an entry of its own in two maps, that ends when it has been silent for a while. IPv4 only: the
kernel's rules have no room for such an entry of IPv6.

What is sent to a holding address is dropped, always: a Service has it for an endpoint while its only pod
moves (:mod:`architect.decisions.placeholders`). It is dropped before the routing decision, so that it needs
no route, and before the connection is confirmed, so that the kernel forgets it with the packet: when the
client's kernel repeats its SYN, kube-proxy chooses anew. What a program of the node itself sends is routed
again by the translation, before it comes here; without any route to the address (a default route will do) it
is dropped there. For TCP that is the same: the kernel repeats a SYN that it could not send. A datagram's
sendto() fails, with EPERM if it was the rule.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Final, NamedTuple

from architect.adapters import entrances, netfilter
from architect.adapters.entrances import Entrance
from architect.contract.errors import ArchitectError
from architect.contract.flows import PROTOCOLS, Flow
from architect.contract.kubernetes import HOLDING_ADDRESSES

TABLE: Final = "architect_moved"

_NONE: Final[Mapping[Flow, Entrance]] = {}
_SILENT: Final = "1h"
"""After so long without a packet a connection that was made during a move is forgotten."""
_ROOM: Final = 65536


class NotRerouted(ArchitectError):
    """The kernel does not take the rules."""


class Moved(NamedTuple):
    """One address that a pod has left."""

    old: str
    new: str
    flows: tuple[Flow, ...] = ()
    """Its connections that live on."""
    ports: tuple[tuple[str, int], ...] = ()
    """Where it takes new ones."""
    accepting: bool = False
    """Whether new ones to the old address are sent on."""


_FAMILIES: Final = {"4": "ip", "6": "ip6"}
_HELD: Final = {number: HOLDING_ADDRESSES[f"IPv{number}"] for number in _FAMILIES}
_ORIGINAL: Final = "ct direction original"
_OPENING: Final = "tcp flags & (fin | syn | rst | ack) == syn"
_GOING_ON: Final = "tcp flags & (fin | syn | rst | ack) != syn"


def _kind(number: str, protocol: str) -> str:
    """Of a map from a connection to an address.

    ``typeof``, not ``type``: what nft(8) 1.1 writes beside a map of the latter kind crashes 1.0, which a
    node's kube-proxy may have.
    """
    family = _FAMILIES[number]
    packet = f"{family} saddr . {protocol} sport . {family} daddr . {protocol} dport"
    return f"typeof {packet} : {family} saddr; size {_ROOM};"


def _reply(family: str) -> str:
    """The connection as its pod has it."""
    addresses = f"ct reply {family} saddr . ct reply proto-src . ct reply {family} daddr"
    return f"{addresses} . ct reply proto-dst"


def _there() -> Iterator[str]:
    for number, family in _FAMILIES.items():
        yield f"{family} daddr {_HELD[number]} drop"
    for number, family in _FAMILIES.items():
        packet = f"{family} daddr . th dport . {family} saddr . th sport"
        for protocol in PROTOCOLS:
            name = f"@to_{protocol}{number}"
            change = f"meta l4proto {protocol} {{}} {family} daddr set {{}} map {name} accept"
            yield change.format(_ORIGINAL, _reply(family))
            # What the pod has opened itself, and what the kernel does not track.
            yield change.format("", packet)
    # Not what opens one: its ports may be those of one that is over, and another pod have the address now.
    yield f"{_GOING_ON} {_ORIGINAL} ip daddr set {_reply('ip')} map @made_to accept"
    yield f"{_OPENING} ip daddr set ip daddr . tcp dport map @open accept"


def _back() -> Iterator[str]:
    for number, family in _FAMILIES.items():
        packet = f"{family} saddr . th sport . {family} daddr . th dport"
        for protocol in PROTOCOLS:
            name = f"@from_{protocol}{number}"
            yield f"meta l4proto {protocol} {family} saddr set {packet} map {name} accept"
    packet = "ip saddr . th sport . ip daddr . th dport"
    yield f"meta l4proto tcp ip saddr set {packet} map @made_from accept"


def _made() -> Iterator[str]:
    """After masquerading, which is part of what the pod sees.

    What is known of an earlier connection of the same ports goes first: a node that masquerades uses them
    again and again, and this one may be to the new address itself.
    """
    new = f"{_OPENING} {_ORIGINAL}"
    there = f"{_reply('ip')} : ip daddr"
    back = "ip daddr . tcp dport . ct reply ip daddr . ct reply proto-dst : ct reply ip saddr"
    yield f"{new} delete @made_to {{ {there} }}"
    yield f"{new} delete @made_from {{ {back} }}"
    sent_on = f"{new} ct reply ip saddr . ct reply proto-src @opened"
    yield f"{sent_on} update @made_to {{ {there} }}"
    yield f"{sent_on} update @made_from {{ {back} }}"


def _rules() -> Iterator[str]:
    yield f"add table inet {TABLE}"
    for number in _FAMILIES:
        for protocol in PROTOCOLS:
            kind = _kind(number, protocol)
            yield f"add map inet {TABLE} to_{protocol}{number} {{ {kind} }}"
            yield f"add map inet {TABLE} from_{protocol}{number} {{ {kind} }}"
    place = "typeof ip daddr . tcp dport"
    yield f"add map inet {TABLE} open {{ {place} : ip daddr; size {_ROOM}; }}"
    yield f"add set inet {TABLE} opened {{ {place}; size {_ROOM}; }}"
    flags = f"flags dynamic,timeout; timeout {_SILENT};"
    for name in ("made_to", "made_from"):
        yield f"add map inet {TABLE} {name} {{ {_kind('4', 'tcp')} {flags} }}"
    for chain, hook, rules in (
        ("back", "filter hook prerouting priority -310", _back()),
        ("there", "filter hook prerouting priority -95", _there()),
        ("from_here", "route hook output priority -95", _there()),
        ("made", "filter hook postrouting priority 105", _made()),
    ):
        yield f"add chain inet {TABLE} {chain} {{ type {hook}; }}"
        yield f"flush chain inet {TABLE} {chain}"
        for rule in rules:
            yield f"add rule inet {TABLE} {chain} {rule}"
    yield from entrances.rules(TABLE)


_RULES: Final = "\n".join(_rules()) + "\n"


def prepare() -> None:
    """Puts the rules there, with nothing in them yet if there were none; blocking.

    Raises:
        NotRerouted: this node's kernel cannot have them.
    """
    _load(_RULES)


def apply(moves: Collection[Moved], entered: Mapping[Flow, Entrance] = _NONE) -> None:
    """Makes the rules say exactly this, in one step; blocking. Also if somebody took them away.

    Where two moves have the same connection, the later one in ``moves`` has it. ``entered`` are those that
    came through this node (:mod:`.entrances`).

    Raises:
        NotRerouted: the kernel refused; what it had before still holds.
    """
    to: dict[str, dict[str, str]] = {}
    back: dict[str, dict[str, str]] = {}
    for number in _FAMILIES:
        for protocol in PROTOCOLS:
            to[protocol + number], back[protocol + number] = {}, {}
    opened: dict[str, str] = {}
    through: dict[Flow, tuple[Entrance, str]] = {}
    for move in moves:
        for flow in move.flows:
            kind = flow.protocol + ("6" if flow.is_v6 else "4")
            port, peer = flow.local_port, f"{flow.peer} . {flow.peer_port}"
            before = to[kind].get(f"{flow.local} . {port} . {peer}")
            if before is not None:
                del back[kind][f"{before} . {port} . {peer}"]
            to[kind][f"{flow.local} . {port} . {peer}"] = move.new
            back[kind][f"{move.new} . {port} . {peer}"] = flow.local
            if flow in entered:
                through[flow] = (entered[flow], move.new)
        if move.accepting and ":" not in move.old:
            for protocol, port in move.ports:
                if protocol == "tcp":
                    opened[f"{move.old} . {port}"] = move.new
    filled = [_filled("map", f"to_{kind}", found) for kind, found in to.items()]
    filled += [_filled("map", f"from_{kind}", found) for kind, found in back.items()]
    filled += [_filled("map", "open", opened), _filled("set", "opened", opened)]
    _load(_RULES + "".join(filled) + entrances.elements(TABLE, through))


def remove() -> None:
    """Takes the rules away; nothing if there are none; blocking. Raises as :func:`apply`."""
    _load(f"add table inet {TABLE}\ndelete table inet {TABLE}\n")


def _filled(what: str, name: str, elements: dict[str, str]) -> str:
    text = f"flush {what} inet {TABLE} {name}\n"
    if elements:
        pairs = [f"{key} : {value}" if what == "map" else key for key, value in elements.items()]
        text += f"add element inet {TABLE} {name} {{ {', '.join(pairs)} }}\n"
    return text


def _load(rules: str) -> None:
    try:
        try:
            netfilter.checked("nft", "-f", "-", text=rules)
        except netfilter.NetfilterError:
            # Another version's table may have maps of our names and of another kind.
            anew = f"add table inet {TABLE}\ndelete table inet {TABLE}\n"
            netfilter.checked("nft", "-f", "-", text=anew + rules)
    except netfilter.NetfilterError as error:
        raise NotRerouted(
            "the connections of moved pods cannot be rerouted on this node",
            str(error),
            "its kernel needs nf_tables with concatenated maps (Linux 5.6 or later)",
        ) from error
