"""Connections that entered the cluster at this node: through a port of the node, or masqueraded by it.

Called by :mod:`.rerouting`. The kernel forgets how it has masqueraded a connection when the interface goes
to which that led, which for a pod of this very node is the moment at which the pod that has moved is gone. So
what the kernel's table of connections says is taken over before: such a connection is translated here without
state, both ways and past the table. IPv4's TCP only.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from architect.adapters import netfilter
from architect.contract.flows import Flow

_TABLE: Final = Path("/proc/net/nf_conntrack")
_ROOM: Final = 65536
_KIND: Final = "typeof ip saddr . tcp sport . ip daddr . tcp dport"
_PACKET: Final = "ip saddr . tcp sport . ip daddr . tcp dport"
_BEFORE: Final = (
    ("in_daddr", "ip daddr"),
    ("in_dport", "tcp dport"),
    ("in_sport", "tcp sport"),
    ("out_daddr", "ip daddr"),
    ("out_dport", "tcp dport"),
    ("out_sport", "tcp sport"),
)
"""In this order each changes one field of a packet, and so makes the key of the next."""
_AFTER: Final = (("in_saddr", "ip saddr"), ("out_saddr", "ip saddr"))
"""Behind the routing decision: what comes from outside and has the node's own address is dropped there."""
_MAPS: Final = _BEFORE + _AFTER
_DONE: Final = "entered"


class Entrance(NamedTuple):
    """What a client used to reach the pod through this node."""

    client: str
    client_port: int
    entry: str
    """The address that the client knows: a node's, or a Service's."""
    entry_port: int


def find(flows: Collection[Flow]) -> dict[Flow, Entrance]:
    """Those of the connections that this node has masqueraded, by its own table; blocking.

    Empty where the kernel does not show the table (CONFIG_NF_CONNTRACK_PROCFS).
    """
    wanted = {
        (flow.local, flow.local_port, flow.peer, flow.peer_port): flow
        for flow in flows
        if flow.protocol == "tcp" and not flow.is_v6
    }
    found: dict[Flow, Entrance] = {}
    with contextlib.suppress(OSError):
        for line in _TABLE.read_text().splitlines() if wanted else ():
            words = [word.partition("=")[::2] for word in line.split()]
            both = {
                name: [value for key, value in words if key == name]
                for name in ("src", "dst", "sport", "dport")
            }
            if ("tcp", "") not in words or any(len(values) != 2 for values in both.values()):
                continue
            reply = (both["src"][1], int(both["sport"][1]), both["dst"][1], int(both["dport"][1]))
            client, port = both["src"][0], int(both["sport"][0])
            flow = wanted.get(reply)
            if flow is not None and (client, port) != (flow.peer, flow.peer_port):
                found[flow] = Entrance(client, port, both["dst"][0], int(both["dport"][0]))
    return found


def rules(table: str) -> Iterator[str]:
    """What there is even if no connection is."""
    for name, field in _MAPS:
        yield f"add map inet {table} {name} {{ {_KIND} : {field}; size {_ROOM}; }}"
    yield f"add set inet {table} {_DONE} {{ {_KIND}; size {_ROOM}; }}"
    for chain, hook in (
        ("enter", "filter hook prerouting priority -320"),
        ("enter_here", "route hook output priority -320"),
    ):
        yield f"add chain inet {table} {chain} {{ type {hook}; }}"
        yield f"flush chain inet {table} {chain}"
        for name, field in _BEFORE:
            yield f"add rule inet {table} {chain} {field} set {_PACKET} map @{name}"
        yield f"add rule inet {table} {chain} {_PACKET} @{_DONE} notrack accept"
    yield f"add chain inet {table} entered_out {{ type filter hook postrouting priority 320; }}"
    yield f"flush chain inet {table} entered_out"
    for name, field in _AFTER:
        yield f"add rule inet {table} entered_out {field} set {_PACKET} map @{name}"


def elements(table: str, entrances: Mapping[Flow, tuple[Entrance, str]]) -> str:
    """The rules' contents: for each connection how it entered, and the address that its pod has now."""
    filled: dict[str, list[str]] = {name: [] for name, _ in _MAPS}
    done = []
    for flow, (way, new) in entrances.items():
        port, peer, peer_port = flow.local_port, flow.peer, flow.peer_port
        client, entry = f"{way.client} . {way.client_port}", f"{way.entry} . {way.entry_port}"
        filled["in_daddr"].append(f"{client} . {entry} : {new}")
        filled["in_dport"].append(f"{client} . {new} . {way.entry_port} : {port}")
        filled["in_sport"].append(f"{client} . {new} . {port} : {peer_port}")
        filled["in_saddr"].append(f"{way.client} . {peer_port} . {new} . {port} : {peer}")
        done.append(f"{way.client} . {peer_port} . {new} . {port}")
        # The pod's own node may have given it its old address back already: a client could be there too.
        for pod in (new, flow.local):
            filled["out_daddr"].append(f"{pod} . {port} . {peer} . {peer_port} : {way.client}")
            filled["out_dport"].append(
                f"{pod} . {port} . {way.client} . {peer_port} : {way.client_port}"
            )
            filled["out_sport"].append(f"{pod} . {port} . {client} : {way.entry_port}")
            filled["out_saddr"].append(f"{pod} . {way.entry_port} . {client} : {way.entry}")
            done.append(f"{pod} . {way.entry_port} . {client}")
    text = "".join(f"flush map inet {table} {name}\n" for name in filled)
    text += f"flush set inet {table} {_DONE}\n"
    for name, pairs in (*filled.items(), (_DONE, done)):
        if pairs:
            text += f"add element inet {table} {name} {{ {', '.join(dict.fromkeys(pairs))} }}\n"
    return text


def known(table: str, flows: Collection[Flow]) -> dict[Flow, Entrance]:
    """What an earlier router has found of these connections, by the rules that it left; blocking."""
    try:
        answer = netfilter.call("nft", "-j", "list", "table", "inet", table)
        listed: list[dict[str, Any]] = json.loads(answer.stdout or "{}").get("nftables", [])
    except (netfilter.NetfilterError, ValueError):
        return {}
    maps: dict[str, dict[tuple[Any, ...], Any]] = {}
    for one in listed:
        if "map" in one:
            pairs = one["map"].get("elem", [])
            maps[one["map"]["name"]] = {
                tuple(key["concat"]): value for key, value in pairs if "concat" in key
            }
    # (client, its port, entry, its port), by the connection as the pod has it, less the address there.
    found: dict[tuple[int, str, int], Entrance] = {}
    for (client, client_port, entry, entry_port), new in maps.get("in_daddr", {}).items():
        with contextlib.suppress(KeyError):
            port = maps["in_dport"][client, client_port, new, entry_port]
            peer_port = maps["in_sport"][client, client_port, new, port]
            peer = maps["in_saddr"][client, peer_port, new, port]
            found[port, peer, peer_port] = Entrance(client, client_port, entry, entry_port)
    return {
        flow: way
        for flow in flows
        if (way := found.get((flow.local_port, flow.peer, flow.peer_port))) is not None
    }
