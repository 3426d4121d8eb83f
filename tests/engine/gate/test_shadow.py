"""Shadow ports: they reach the program, count nothing, and are silent or refused while it sleeps."""

import errno
import functools
import os
import re
import socket
import threading
import time
from collections.abc import Collection

import pytest

from architect.adapters import listeners, netfilter, netns, shadowports
from architect.adapters.gate import Activity, Gate, GateError, Mode
from architect.adapters.netfilter import Backend, Family
from architect.decisions.ports import Port, Shadow, Use
from tests.engine.gate.podnet import (
    CLIENT,
    PORT,
    Network,
    connected,
    failure,
    held,
    readable,
    received,
    until,
)

SHADOW = 9700
OTHER_SHADOW = 9701
OTHER_PORT = 7001
SHADOWS = [Shadow("tcp", SHADOW, PORT), Shadow("udp", SHADOW, PORT)]
AT_ONCE_S = 0.5
"""Before a client repeats its SYN, which it does after a second."""

pytestmark = pytest.mark.skipif(
    os.geteuid() != 0, reason="network namespaces and eBPF programs take root"
)

families = pytest.mark.parametrize(
    "family", [socket.AF_INET, socket.AF_INET6], ids=["ipv4", "ipv6"]
)
paths = pytest.mark.parametrize("through", ["veth", "lo"])


@pytest.fixture(params=list(Backend), ids=[each.value for each in Backend])
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Backend:
    """Every backend that translates ports on this machine."""
    chosen: Backend = request.param
    for family in Family:
        if why := shadowports._works(chosen, family):
            pytest.skip(f"{chosen.value} translates no {family.value} ports here: {why}")
    monkeypatch.setattr(shadowports, "backend", lambda family: chosen)
    return chosen


@pytest.fixture
def shadowed(gate: Gate) -> Gate:
    """A gate whose owner 0 has a shadow of its port, for TCP and UDP."""
    uses = {PORT: Use.ACTIVITY, SHADOW: Use.SHADOW}
    gate.set_ports(0, [*(Port("tcp", port, use) for port, use in uses.items()), *_udp(uses)])
    assert gate.keep_shadows(SHADOWS) == []  # new ones: nobody has taken them away
    return gate


def _udp(uses: dict[int, Use]) -> list[Port]:
    return [Port("udp", port, use) for port, use in uses.items()]


def reaches(
    network: Network, family: socket.AddressFamily, through: str, shadow: int, port: int = PORT
) -> None:
    """Talk to a port by its shadow: over TCP and UDP, to and fro."""
    server = network.server(family, socket.SOCK_STREAM, port)
    client = network.caller(family, socket.SOCK_STREAM, through, shadow)
    accepted = network.accept(server)
    client.send(b"ping")
    assert received(accepted) == b"ping"
    accepted.send(b"pong")
    assert received(client) == b"pong"
    assert client.getpeername()[1] == shadow
    assert accepted.getsockname()[1] == port
    datagrams = network.server(family, socket.SOCK_DGRAM, port)
    caller = network.caller(family, socket.SOCK_DGRAM, through, shadow)
    caller.send(b"ping")
    until(lambda: readable(datagrams), "the datagram")
    message, sender = datagrams.recvfrom(64)
    assert message == b"ping"
    datagrams.sendto(b"pong", sender)
    assert received(caller) == b"pong"  # which only takes it from the shadow port
    for done in (server, client, accepted, datagrams, caller):
        done.close()


def connection(
    network: Network, family: socket.AddressFamily, through: str
) -> tuple[socket.socket, socket.socket]:
    """Both ends of a connection to the shadow port: client's, pod's. Nobody listens any more."""
    server = network.server(family, socket.SOCK_STREAM)
    client = network.caller(family, socket.SOCK_STREAM, through, SHADOW)
    accepted = network.accept(server)
    server.close()
    return client, accepted


@families
@paths
def test_shadow_port_reaches_the_program_and_counts_nothing(
    network: Network,
    backend: Backend,
    shadowed: Gate,
    family: socket.AddressFamily,
    through: str,
) -> None:
    reaches(network, family, through, SHADOW)
    assert shadowed.activity(0) == Activity(0, 0, 0, 0)
    client, server = network.connection(family, through)  # the control: its own port does count
    assert shadowed.activity(0).packets >= 2
    client.close()
    server.close()


@families
@paths
@pytest.mark.parametrize("mode", [Mode.HOLD, Mode.DROP])
def test_shadow_port_is_silent_during_a_dump(
    network: Network, shadowed: Gate, family: socket.AddressFamily, through: str, mode: Mode
) -> None:
    client, server = connection(network, family, through)
    datagrams = network.server(family, socket.SOCK_DGRAM)
    shadowed.set_mode(0, mode)
    client.send(b"late")
    newcomer = network.caller(family, socket.SOCK_STREAM, through, SHADOW)
    caller = network.caller(family, socket.SOCK_DGRAM, through, SHADOW)
    caller.send(b"lost")
    until(lambda: shadowed.activity(0).dropped >= 3, "all three packets to be dropped")
    assert not connected(newcomer)
    assert not readable(server)
    assert not readable(datagrams)
    assert failure(client) == failure(newcomer) == failure(caller) == 0
    assert shadowed.receive() == 0
    assert shadowed.activity(0)[:3] == (0, 0, 0)
    assert network.resets() == 0
    shadowed.set_mode(0, Mode.OPEN)
    assert received(server) == b"late"  # repeated by the client's TCP


@families
@paths
@pytest.mark.parametrize("mode", [Mode.HOLD, Mode.DROP])
def test_shadow_port_of_a_sleeper_refuses_at_once(
    network: Network, shadowed: Gate, family: socket.AddressFamily, through: str, mode: Mode
) -> None:
    client, server = connection(network, family, through)
    shadowed.set_mode(0, mode)
    shadowed.set_absent(0)
    begin = time.monotonic()
    newcomer = network.caller(family, socket.SOCK_STREAM, through, SHADOW)
    until(lambda: failure(newcomer) == errno.ECONNREFUSED, "the refusal")
    assert time.monotonic() - begin < AT_ONCE_S
    client.send(b"late")
    caller = network.caller(family, socket.SOCK_DGRAM, through, SHADOW)
    caller.send(b"lost")
    until(lambda: shadowed.activity(0).dropped >= 2, "both packets to be dropped")
    assert not readable(server)
    assert failure(client) == failure(caller) == 0
    assert shadowed.receive() == 0
    assert shadowed.activity(0)[:3] == (0, 0, 0)
    assert network.resets() == 1  # the refusal's
    shadowed.set_mode(0, Mode.OPEN)
    assert received(server) == b"late"
    server.send(b"goes on")
    assert received(client) == b"goes on"
    client.close()
    server.close()
    reaches(network, family, through, SHADOW)


@families
def test_sleeper_with_a_shadow_port_is_still_woken_by_its_own(
    network: Network, shadowed: Gate, family: socket.AddressFamily
) -> None:
    shadowed.set_mode(0, Mode.HOLD)
    shadowed.set_absent(0)
    client = network.caller(family, socket.SOCK_STREAM, "veth")
    held(shadowed, 1)
    network.server(family, socket.SOCK_STREAM)
    shadowed.set_mode(0, Mode.OPEN)
    shadowed.release(0, accept=True)
    until(lambda: connected(client), "the held connection")
    assert network.resets() == 0


@families
def test_tracked_datagrams_are_held_like_others(
    network: Network, backend: Backend, shadowed: Gate, family: socket.AddressFamily
) -> None:
    """With a translation the kernel tracks and reassembles; a flow that is not known yet comes out whole."""
    server = network.server(family, socket.SOCK_DGRAM)
    caller = network.caller(family, socket.SOCK_DGRAM, "veth")
    shadowed.set_mode(0, Mode.HOLD)
    messages = [b"%d" % number for number in range(100)]
    messages.append(bytes(4000))  # more than fits into one packet of a veth
    for message in messages:
        caller.send(message)
    held(shadowed, len(messages))
    shadowed.set_mode(0, Mode.OPEN)
    assert shadowed.release(0, accept=True) == len(messages)
    assert [received(server) for _ in messages] == messages


def ours(network: Network) -> str:
    """All rules of ours, whichever backend put them there; empty without any."""
    tools = ("nft list ruleset", "iptables-legacy-save", "ip6tables-legacy-save")
    lines = [line for tool in tools for line in network.in_pod(tool).splitlines()]
    return "\n".join(line for line in lines if re.search(r"architect.ports|:70|0x4173", line))


def flush(network: Network, backend: Backend, family: Family) -> None:
    """What a user's firewall does when it is loaded anew."""
    if backend is Backend.NFT:
        network.in_pod(f"nft flush table {netfilter.nft_family(family)} architect_ports")
        return
    for table in ("nat", "mangle"):
        network.in_pod(f"{netfilter.iptables(backend, family)} -t {table} -F")


def test_flushed_rules_are_put_back_and_reported(
    network: Network, backend: Backend, shadowed: Gate
) -> None:
    assert shadowed.keep_shadows(SHADOWS) == []
    flush(network, backend, Family.IPV6)
    assert shadowed.keep_shadows(SHADOWS) == ["IPv6 shadow ports"]
    flush(network, backend, Family.IPV4)
    assert shadowed.keep_shadows(SHADOWS) == ["IPv4 shadow ports"]
    network.in_pod("nft flush ruleset")
    expected = (
        [] if backend is Backend.IPTABLES_LEGACY else ["IPv4 shadow ports", "IPv6 shadow ports"]
    )
    assert shadowed.keep_shadows(SHADOWS) == expected
    assert shadowed.keep_shadows(SHADOWS) == []
    for family in CLIENT:
        for through in ("veth", "lo"):
            reaches(network, family, through, SHADOW)
    assert shadowed.activity(0) == Activity(0, 0, 0, 0)


@pytest.mark.parametrize("what", ["nat -F PREROUTING", "nat -F OUTPUT", "mangle -F OUTPUT"])
def test_flushed_chains_of_others_are_noticed(
    network: Network, backend: Backend, shadowed: Gate, what: str
) -> None:
    """Ours are called from there; an nft table of our own is called by nobody."""
    expected = []
    if backend is not Backend.NFT:
        network.in_pod(f"{netfilter.iptables(backend, Family.IPV4)} -t {what}")
        expected = ["IPv4 shadow ports"]
    assert shadowed.keep_shadows(SHADOWS) == expected
    assert shadowed.keep_shadows(SHADOWS) == []
    for through in ("veth", "lo"):
        reaches(network, socket.AF_INET, through, SHADOW)
    assert shadowed.activity(0).packets == 0


THEIRS = {
    Backend.NFT: (
        "nft add table ip theirs",
        "nft add chain ip theirs nat { type nat hook prerouting priority -90 ; }",
        "nft add rule ip theirs nat tcp dport 9999 dnat to :7999",
    ),
    Backend.IPTABLES_NFT: (
        "iptables-nft -t nat -A PREROUTING -p tcp --dport 9999 -j DNAT --to-destination :7999",
    ),
    Backend.IPTABLES_LEGACY: (
        "iptables-legacy -t nat -A PREROUTING -p tcp --dport 9999 -j DNAT --to-destination :7999",
    ),
}


def test_rules_go_with_the_last_shadow_and_others_stay(
    network: Network, backend: Backend, shadowed: Gate
) -> None:
    for line in THEIRS[backend]:
        network.in_pod(line)
    assert ours(network)
    assert shadowed.keep_shadows(SHADOWS) == []
    assert shadowed.keep_shadows([]) == []
    assert not ours(network)
    assert shadowed.keep_shadows([]) == []
    everything = network.in_pod("nft list ruleset") + network.in_pod("iptables-legacy-save")
    assert ":7999" in everything
    shadowed.keep_shadows(SHADOWS)
    assert ":7999" in network.in_pod("nft list ruleset") + network.in_pod("iptables-legacy-save")


CHANGES: dict[str, tuple[list[Shadow], int, int]] = {
    "another number": ([shadow._replace(number=OTHER_SHADOW) for shadow in SHADOWS], 0, PORT),
    "another port": ([shadow._replace(port=OTHER_PORT) for shadow in SHADOWS], 0, OTHER_PORT),
    "one more": (
        [*SHADOWS, *(Shadow(each.protocol, OTHER_SHADOW, OTHER_PORT) for each in SHADOWS)],
        2,
        OTHER_PORT,
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_shadows_can_change(
    network: Network, backend: Backend, shadowed: Gate, change: str
) -> None:
    changed, index, port = CHANGES[change]
    assert shadowed.keep_shadows(changed) == []
    for through in ("veth", "lo"):
        reaches(network, socket.AF_INET, through, changed[index].number, port)
    assert shadowed.keep_shadows(changed[index:]) == []
    gone = {SHADOW, OTHER_SHADOW} - {shadow.number for shadow in changed[index:]}
    for number in gone:
        assert str(number) not in ours(network)


@pytest.mark.parametrize("also_gate", [False, True], ids=["left", "removed"])
def test_rules_of_an_earlier_daemon_go_too(
    network: Network, backend: Backend, shadowed: Gate, also_gate: bool
) -> None:
    shadowed.close(remove=False)
    successor = network.open()
    assert ours(network)
    if also_gate:
        successor.close(remove=True)
    else:
        assert successor.keep_shadows([]) == []
    assert not ours(network)
    # Chains that are left have the kernel track connections as if there still were shadow ports.
    assert "hook" not in network.in_pod("nft list ruleset")


def test_machine_that_cannot_translate_is_told() -> None:
    found = shadowports._first(lambda backend: "no, no")
    assert found.backend is None
    assert re.search(r"nft: no, no; .*install nftables", found.why_not)


def test_machine_without_ipv6_needs_no_tool_for_it(
    network: Network, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with ipv6.disable=1, and without nft: those of IPv4 must not suffer."""
    create, find = socket.create_server, netfilter._find

    def without(address: tuple[str, int], *, family: int) -> socket.socket:
        if family == socket.AF_INET6:
            raise OSError(errno.EAFNOSUPPORT, os.strerror(errno.EAFNOSUPPORT))
        return create(address, family=family)

    monkeypatch.setattr(socket, "create_server", without)
    missing = ("nft", "ip6tables-nft", "ip6tables-legacy")
    monkeypatch.setattr(netfilter, "_find", lambda name: None if name in missing else find(name))
    tried_anew(monkeypatch)
    gate.set_ports(0, [Port("tcp", PORT), *_udp({SHADOW: Use.SHADOW})])
    for _ in range(2):
        assert gate.keep_shadows(SHADOWS) == []
    reaches(network, socket.AF_INET, "veth", SHADOW)
    assert shadowports.missing() == ""
    assert gate.keep_shadows([]) == []
    assert not ours(network)


def tried_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """What works is found out once more, and for this test alone."""
    fresh = functools.cache(shadowports._support.__wrapped__)
    monkeypatch.setattr(shadowports, "_support", fresh)


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Backend, Family]]:
    """A kernel without CONFIG_NF_NAT for IPv6: nft refuses the chain, ip6tables has no table; all tries."""
    put, tries = shadowports.put, list[tuple[Backend, Family]]()

    def put_if_possible(backend: Backend, family: Family, shadows: Collection[Shadow]) -> None:
        if family is Family.IPV6:
            tries.append((backend, family))
            raise netfilter.NetfilterError(f"{backend.value} failed with status 1: no such table")
        put(backend, family, shadows)

    monkeypatch.setattr(shadowports, "put", put_if_possible)
    tried_anew(monkeypatch)
    return tries


def test_machine_with_ipv6_that_cannot_translate_it_has_shadow_ports_of_ipv4(
    network: Network, gate: Gate, refused: list[tuple[Backend, Family]]
) -> None:
    uses = {PORT: Use.ACTIVITY, SHADOW: Use.SHADOW}
    gate.set_ports(0, [*(Port("tcp", port, use) for port, use in uses.items()), *_udp(uses)])
    for _ in range(3):
        assert gate.keep_shadows(SHADOWS) == []
    assert refused == [(backend, Family.IPV6) for backend in Backend], "once each, not every time"
    reaches(network, socket.AF_INET, "veth", SHADOW)
    newcomer = network.caller(socket.AF_INET6, socket.SOCK_STREAM, "veth", SHADOW)
    until(lambda: failure(newcomer) == errno.ECONNREFUSED, "the refusal")
    chosen = shadowports.backend(Family.IPV4)
    assert chosen is not None
    flush(network, chosen, Family.IPV4)
    assert gate.keep_shadows(SHADOWS) == ["IPv4 shadow ports"]
    assert "no such table" in shadowports.missing()
    assert gate.keep_shadows([]) == []
    assert not ours(network)


def test_machine_that_can_translate_neither_has_none(
    gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried_anew(monkeypatch)
    monkeypatch.setattr(shadowports, "_works", lambda backend, family: "no, no")
    with pytest.raises(GateError, match="nft: no, no; "):
        gate.keep_shadows(SHADOWS)
    for ask in (shadowports.missing, lambda: shadowports.backend(Family.IPV6)):
        with pytest.raises(shadowports.ShadowError):
            ask()


@families
@paths
def test_translated_connections_are_told_from_others(
    network: Network, shadowed: Gate, family: socket.AddressFamily, through: str
) -> None:
    """Even with one source port for both, of which the kernel then changes one."""
    with netns.entered(network.pod):
        pid = threading.get_native_id()
        try:
            open(f"/proc/{pid}/net/nf_conntrack").close()  # noqa: PTH123
        except OSError as error:
            pytest.skip(f"the kernel does not show tracked connections: {error}")
    server = network.server(family, socket.SOCK_STREAM)
    direct = network.caller(family, socket.SOCK_STREAM, through)
    accepted = [network.accept(server)]
    address = direct.getsockname()
    for _ in range(2):  # one with the same source port, one with another
        client = network.make_socket(
            network.client if through == "veth" else network.pod, family, socket.SOCK_STREAM
        )
        client.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if len(accepted) == 1:
            direct.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            client.bind((address[0], address[1]))
        client.connect_ex((direct.getpeername()[0], SHADOW))
        accepted.append(network.accept(server))
    with netns.entered(network.pod):
        opened = listeners.connections(pid, {PORT})
        shadows = listeners.translated(pid, {SHADOW})
        assert listeners.translated(pid, {OTHER_SHADOW}) == set()
    seen = [
        listeners.Connection(PORT, each.getpeername()[0], each.getpeername()[1])
        for each in accepted
    ]
    assert opened == set(seen)
    assert shadows == set(seen[1:])
