"""The rules of moved connections, in network namespaces of their own: what the kernel takes and carries.

`unshare` gives each test a namespace that ends with it. How packets find their way between nodes is seen in
tests/e2e/test_moving.py.
"""

from __future__ import annotations

import errno
import os
import socket
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from architect.adapters import entrances, home, netns, rerouting, silence
from architect.adapters.entrances import Entrance
from architect.contract.flows import Flow
from architect.contract.kubernetes import HOLDING_ADDRESSES

FLOW = Flow("tcp", "10.1.0.7", 6379, "10.3.0.4", 41234)
SIX = Flow("udp", "fd00::7", 53, "fd00:3::4", 41234)
OLD, NEW = "10.1.0.7", "10.2.0.9"


@pytest.fixture(autouse=True)
def namespace() -> Iterator[None]:
    with netns.scratch():
        yield


def listed(table: str) -> str:
    done = subprocess.run(
        ["nft", "list", "table", "inet", table], capture_output=True, text=True, check=False
    )
    return done.stdout


def moved(*flows: Flow, accepting: bool = False) -> rerouting.Moved:
    return rerouting.Moved(OLD, NEW, flows, (("tcp", 6379),), accepting)


def test_the_rules_say_what_has_moved_and_nothing_else() -> None:
    rerouting.apply([moved(FLOW, accepting=True), rerouting.Moved("fd00::7", "fd00:2::9", (SIX,))])
    text = listed(rerouting.TABLE)
    assert f"{OLD} . 6379 . 10.3.0.4 . 41234 : {NEW}" in text
    assert f"{NEW} . 6379 . 10.3.0.4 . 41234 : {OLD}" in text
    assert "fd00::7 . 53 . fd00:3::4 . 41234 : fd00:2::9" in text
    assert f"{OLD} . 6379 : {NEW}" in text
    rerouting.apply([])
    assert "elements" not in listed(rerouting.TABLE)
    rerouting.remove()
    assert not listed(rerouting.TABLE)


def test_the_later_move_of_a_connection_counts() -> None:
    later = rerouting.Moved(OLD, "10.5.0.1", (FLOW,))
    rerouting.apply([moved(FLOW), later])
    text = listed(rerouting.TABLE)
    assert f"{OLD} . 6379 . 10.3.0.4 . 41234 : 10.5.0.1" in text
    assert NEW not in text


def test_rules_that_were_taken_away_come_back() -> None:
    rerouting.apply([moved(FLOW)])
    subprocess.run(["nft", "flush", "ruleset"], check=True)
    rerouting.apply([moved(FLOW)])
    assert NEW in listed(rerouting.TABLE)


def test_maps_of_another_kind_are_replaced() -> None:
    for words in ("table inet", "map inet"):
        name = rerouting.TABLE + (" open { type ipv4_addr : ipv4_addr; }" if "map" in words else "")
        subprocess.run(["nft", f"add {words} {name}"], check=True)
    rerouting.apply([moved(FLOW, accepting=True)])
    assert f"{OLD} . 6379 : {NEW}" in listed(rerouting.TABLE)


def test_a_router_that_starts_anew_knows_how_connections_entered() -> None:
    way = Entrance("192.0.2.1", 5555, "10.77.0.11", 30000)
    rerouting.apply([moved(FLOW)], {FLOW: way})
    other = FLOW._replace(peer_port=1)
    assert entrances.known(rerouting.TABLE, [FLOW, other]) == {FLOW: way}


def test_a_namespace_becomes_a_home_and_is_left_again() -> None:
    me = os.getpid()
    home.settle(me, OLD, NEW, [FLOW])
    home.settle(me, OLD, NEW, [FLOW])
    home.settle(me, "fd00::7", "fd00:2::9", [SIX])
    text = listed(home.TABLE)
    assert f"{NEW} . 6379 . 10.3.0.4 . 41234 : {OLD}" in text
    with socket.socket() as bound:
        bound.bind((OLD, 0))
    home.leave(me)
    home.leave(me)
    assert not listed(home.TABLE)
    with socket.socket() as bound, pytest.raises(OSError, match="assign") as caught:
        bound.bind((OLD, 0))
    assert caught.value.errno == errno.EADDRNOTAVAIL


def test_sockets_with_the_new_address_have_the_old_one_for_others() -> None:
    """Their datagrams' source is what the peer has known; and they count as connections of that."""
    me = os.getpid()
    home.settle(me, NEW, "10.9.9.9", [])
    with (
        socket.socket(type=socket.SOCK_DGRAM) as peer,
        socket.socket(type=socket.SOCK_DGRAM) as own,
    ):
        peer.bind(("127.0.0.1", 0))
        peer.settimeout(5)
        own.bind((NEW, 0))
        own.connect(peer.getsockname())
        flow = Flow("udp", OLD, own.getsockname()[1], *peer.getsockname())
        own.send(b"before")
        assert peer.recvfrom(100) == (b"before", (NEW, flow.local_port))
        home.disguise(me, OLD, NEW, [flow])
        own.send(b"after")
        assert peer.recvfrom(100) == (b"after", (OLD, flow.local_port))
        assert home.open_flows(me, OLD, [NEW, "fd00::9"]) == [flow]
        assert home.open_flows(me, OLD) == []


def test_open_connections_of_an_address_are_found() -> None:
    me = os.getpid()
    home.settle(me, OLD, NEW, [])
    with socket.create_server((OLD, 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection((OLD, port), source_address=("127.0.0.1", 0)) as client:
            accepted, _ = listener.accept()
            with accepted:
                peer_port = client.getsockname()[1]
                found = home.open_flows(me, OLD)
                assert found == [Flow("tcp", OLD, port, "127.0.0.1", peer_port)]


def test_a_silent_namespace_refuses_nobody() -> None:
    me = os.getpid()
    with socket.socket() as asking, pytest.raises(ConnectionRefusedError):
        asking.connect(("127.0.0.1", 1))
    silence.begin(me)
    with pytest.raises(TimeoutError):
        socket.create_connection(("127.0.0.1", 1), timeout=0.5)
    silence.end(me)
    silence.end(me)
    with socket.socket() as asking, pytest.raises(ConnectionRefusedError):
        asking.connect(("127.0.0.1", 1))


def test_what_is_known_of_a_connection_ends_with_the_next_of_its_ports() -> None:
    """One to the new address itself: its answers must not be given the old one."""
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    rerouting.apply([moved(accepting=True)])
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as client:
        client.bind(("127.0.0.1", 0))
        here, there = server.getsockname()[1], client.getsockname()[1]
        back = f"127.0.0.1 . {here} . 127.0.0.1 . {there}"
        for name in ("made_from", "made_to"):
            words = f"add element inet {rerouting.TABLE} {name} {{ {back} : {OLD} }}"
            subprocess.run(["nft", words], check=True)
        assert listed(rerouting.TABLE).count(back) == 2
        client.settimeout(5)
        client.connect(("127.0.0.1", here))
        assert back not in listed(rerouting.TABLE)


HOLDING = list(HOLDING_ADDRESSES.values())
WAITS_S = 0.3
SERVICE = "10.96.0.9"


def here(*addresses: str) -> None:
    """This namespace has these addresses: where no rule is, they refuse."""
    for address in addresses:
        length = "128" if ":" in address else "32"
        words = ["ip", "address", "add", f"{address}/{length}", "dev", "lo", "nodad"]
        subprocess.run(words[: None if ":" in address else -1], check=True)


def asked(address: str, patience_s: float = 5.0) -> str:
    """What becomes of a connect()."""
    try:
        socket.create_connection((address, 80), timeout=patience_s).close()
    except TimeoutError:
        return "waits"
    except ConnectionRefusedError:
        return "refused"
    return "accepted"


@pytest.mark.parametrize("moves", [[], [moved(FLOW, accepting=True)]], ids=["idle", "moving"])
def test_who_connects_to_a_holding_address_waits(moves: list[rerouting.Moved]) -> None:
    neighbours = ["192.0.2.221", "2001:db8::223"]
    here(*HOLDING, *neighbours)
    assert [asked(address) for address in HOLDING] == ["refused", "refused"]
    rerouting.prepare()
    rerouting.apply(moves)
    assert [asked(address, WAITS_S) for address in HOLDING] == ["waits", "waits"]
    assert [asked(address) for address in (*neighbours, "127.0.0.1")] == ["refused"] * 3
    rerouting.remove()
    assert [asked(address) for address in HOLDING] == ["refused", "refused"]


@pytest.mark.parametrize("chain", ["there", "from_here"])
def test_it_waits_wherever_its_packets_come_from(chain: str) -> None:
    """On lo a packet passes both chains: each is seen alone."""
    here(*HOLDING)
    rerouting.prepare()
    subprocess.run(["nft", "flush", "chain", "inet", rerouting.TABLE, chain], check=True)
    assert [asked(address, WAITS_S) for address in HOLDING] == ["waits", "waits"]


def lead_to(address: str) -> None:
    """What kube-proxy does: new connections to the Service go there."""
    rules = f"""
        table ip services {{}}
        delete table ip services
        table ip services {{
            chain out {{
                type nat hook output priority -100;
                ip daddr {SERVICE} tcp dport 80 dnat to {address}
            }}
        }}
    """
    subprocess.run(["nft", "-f", "-"], input=rules, text=True, check=True)


@pytest.mark.parametrize("routed", [True, False], ids=["route", "no route"])
def test_who_has_waited_finds_the_endpoint_that_comes(routed: bool) -> None:
    rerouting.prepare()
    for words in (
        "link add d0 type veth peer name d1",
        "address add 10.9.9.9/24 dev d0",
        "link set d0 up",
    ):
        subprocess.run(["ip", *words.split()], check=True)
    # To the Service there is a way always; not to everything, without a default route.
    way = "default" if routed else SERVICE
    subprocess.run(["ip", "route", "add", way, "dev", "d0"], check=True)
    with ExitStack() as stack:
        listener = stack.enter_context(socket.create_server(("10.9.9.9", 0)))
        listener.settimeout(10)
        client = stack.enter_context(socket.socket())
        client.setblocking(False)
        lead_to(HOLDING[0])
        assert client.connect_ex((SERVICE, 80)) == errno.EINPROGRESS
        lead_to(f"10.9.9.9:{listener.getsockname()[1]}")
        # When the client's kernel repeats itself: after a second.
        accepted, _ = listener.accept()
        stack.enter_context(accepted)
        client.settimeout(10)
        client.sendall(b"x")
        assert accepted.recv(1) == b"x"
