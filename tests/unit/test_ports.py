"""How each port of a container is treated at its gate: by a table, and for any annotations at all."""

from __future__ import annotations

from itertools import product
from typing import Literal, NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.annotations import ContainerSettings, Monitor, PortMapping
from architect.decisions.ports import Port, Shadow, Use, at_gate, shadows

TCP, UDP = ("tcp", 80), ("udp", 80)


class Case(NamedTuple):
    """What is declared and asked for, and what the gate is told."""

    declared: list[tuple[str, int]]
    expected: list[Port]
    monitor: Monitor = Monitor.PACKETS
    ignored: frozenset[int] = frozenset()
    mappings: tuple[tuple[int, int], ...] = ()
    """appPort, shadowPort"""
    others: frozenset[int] = frozenset()
    quiet: tuple[tuple[str, int], ...] = ()


TABLE = {
    "nothing": Case([], []),
    "packets": Case([TCP, UDP], [Port("tcp", 80), Port("udp", 80)]),
    "none": Case([TCP, UDP], [Port("tcp", 80), Port("udp", 80)], monitor=Monitor.NONE),
    "connections: of UDP the kernel knows none": Case(
        [TCP, UDP], [Port("tcp", 80), Port("udp", 80, Use.IGNORED)], monitor=Monitor.CONNECTIONS
    ),
    "an ignored port, of both protocols": Case(
        [TCP, UDP, ("tcp", 81)],
        [Port("tcp", 80, Use.IGNORED), Port("udp", 80, Use.IGNORED), Port("tcp", 81)],
        ignored=frozenset({80}),
    ),
    "an ignored port that nobody declares": Case([], [], ignored=frozenset({80})),
    "a shadow of TCP": Case(
        [TCP], [Port("tcp", 80), Port("tcp", 90, Use.SHADOW)], mappings=((80, 90),)
    ),
    "a shadow of both": Case(
        [TCP, UDP],
        [
            Port("tcp", 80),
            Port("udp", 80),
            Port("tcp", 90, Use.SHADOW),
            Port("udp", 90, Use.SHADOW),
        ],
        mappings=((80, 90),),
    ),
    "a shadow of a port that is not declared": Case(
        [], [Port("tcp", 90, Use.SHADOW)], mappings=((80, 90),)
    ),
    "a shadow that the image declares": Case(
        [TCP, ("tcp", 90)],
        [Port("tcp", 80), Port("tcp", 90, Use.SHADOW)],
        mappings=((80, 90),),
    ),
    "a shadow of an ignored port": Case(
        [TCP],
        [Port("tcp", 80, Use.IGNORED), Port("tcp", 90, Use.SHADOW)],
        ignored=frozenset({80}),
        mappings=((80, 90),),
    ),
    "shadows of another container, or the proxy's": Case(
        [TCP, ("tcp", 90), ("udp", 90)], [Port("tcp", 80)], others=frozenset({90})
    ),
    "ports that the program uses without a declaration": Case(
        [TCP],
        [Port("tcp", 4000, Use.IGNORED), Port("udp", 80, Use.IGNORED), Port("tcp", 80)],
        quiet=(("tcp", 4000), UDP, TCP),
    ),
    "such a one of the proxy": Case([], [], others=frozenset({90}), quiet=(("tcp", 90),)),
}


def settings(
    monitor: Monitor,
    ignored: frozenset[int],
    mappings: tuple[tuple[int, int], ...],
    others: frozenset[int],
) -> ContainerSettings:
    return ContainerSettings(
        name="app",
        managed=True,
        monitor=monitor,
        ignored_ports=ignored,
        shadow_ports=tuple(PortMapping("app", app, shadow) for app, shadow in mappings),
        others_ports=others,
    )


@pytest.mark.parametrize("case", TABLE.values(), ids=TABLE)
def test_table(case: Case) -> None:
    asked = settings(case.monitor, case.ignored, case.mappings, case.others)
    assert sorted(at_gate(case.declared, asked, case.quiet)) == sorted(case.expected)


def test_shadows_are_of_udp_where_the_program_has_it() -> None:
    asked = settings(Monitor.PACKETS, frozenset(), ((80, 90), (53, 91)), frozenset({90, 91}))
    assert shadows([TCP, ("udp", 53)], asked) == [
        Shadow("tcp", 90, 80),
        Shadow("tcp", 91, 53),
        Shadow("udp", 91, 53),
    ]
    assert shadows([], settings(Monitor.PACKETS, frozenset(), (), frozenset())) == []


# Few numbers, so that every kind meets every other.
numbers = st.integers(1, 8)
endpoints = st.lists(st.tuples(st.sampled_from(["tcp", "udp"]), numbers), max_size=10)


@st.composite
def asked_for(draw: st.DrawFn) -> ContainerSettings:
    """Annotations as the contract lets them through: no port is the shadow of two."""
    shadow_ports = draw(st.lists(numbers, unique=True, max_size=4))
    mappings = tuple((draw(numbers), shadow) for shadow in shadow_ports)
    mappings = tuple((app, shadow) for app, shadow in mappings if app != shadow)
    own = frozenset(shadow for _, shadow in mappings)
    return settings(
        draw(st.sampled_from(Monitor)),
        draw(st.frozensets(numbers, max_size=4)),
        mappings,
        own | draw(st.frozensets(numbers, max_size=3)),
    )


@given(endpoints, asked_for(), endpoints)
def test_every_port_has_exactly_the_use_that_is_due(
    declared: list[tuple[str, int]], asked: ContainerSettings, quiet: list[tuple[str, int]]
) -> None:
    told = at_gate(declared, asked, quiet)
    uses = {(port.protocol, port.number): port.use for port in told}
    assert len(uses) == len(told)  # the gate refuses a port with two uses
    shadowed = {(one.protocol, one.number) for one in shadows(declared, asked)}
    protocols: tuple[Literal["tcp", "udp"], ...] = ("tcp", "udp")
    for place in product(protocols, range(1, 9)):
        protocol, number = place
        if place in shadowed:
            due: Use | None = Use.SHADOW
        elif number in asked.others_ports:
            due = None
        elif place in declared and (
            number in asked.ignored_ports
            or (protocol == "udp" and asked.monitor is Monitor.CONNECTIONS)
        ):
            due = Use.IGNORED
        elif place in declared:
            due = Use.ACTIVITY
        else:
            due = Use.IGNORED if place in quiet else None
        assert uses.get(place) is due, place


@given(endpoints, asked_for())
def test_shadows_follow_the_mappings(
    declared: list[tuple[str, int]], asked: ContainerSettings
) -> None:
    found = shadows(declared, asked)
    assert len({(one.protocol, one.number) for one in found}) == len(found)
    wanted = {(one.shadow_port, one.app_port) for one in asked.shadow_ports}
    assert {(one.number, one.port) for one in found if one.protocol == "tcp"} == wanted
    assert {(one.number, one.port) for one in found if one.protocol == "udp"} == {
        (shadow, app) for shadow, app in wanted if ("udp", app) in declared
    }


@given(endpoints, asked_for(), endpoints)
def test_what_is_quiet_never_changes_what_is_declared(
    declared: list[tuple[str, int]], asked: ContainerSettings, quiet: list[tuple[str, int]]
) -> None:
    with_them = set(at_gate(declared, asked, quiet))
    without = set(at_gate(declared, asked))
    assert without <= with_them
    assert all(port.use is Use.IGNORED for port in with_them - without)
