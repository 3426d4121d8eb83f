"""How each port of a container is treated at its gate: does its traffic count, and can it be held?

Called by the daemon whenever a container's ports or annotations have changed; the answer is put into the
gate's maps.
"""

from __future__ import annotations

import enum
from collections.abc import Collection
from typing import Literal, NamedTuple, cast

from architect.contract.annotations import ContainerSettings, Monitor

Protocol = Literal["tcp", "udp"]


class Use(enum.IntEnum):
    """How a port is treated; the number is its place in the value of the gate's map."""

    ACTIVITY = 0
    """Its packets count, and wait while the container is to be woken by them."""
    IGNORED = 1
    """They do not count; they wait while a transition runs, and are dropped while the program is absent."""
    SHADOW = 2
    """They do not count, and are dropped unless the gate is open; but an opening SYN passes once the program
    is absent: it is refused."""


class Port(NamedTuple):
    """A port of the pod that belongs to a container."""

    protocol: Protocol
    number: int
    use: Use = Use.ACTIVITY


class Shadow(NamedTuple):
    """Packets to ``number`` go to the program's ``port``."""

    protocol: Protocol
    number: int
    port: int


def at_gate(
    declared: Collection[tuple[str, int]],
    settings: ContainerSettings,
    quiet: Collection[tuple[str, int]] = (),
) -> list[Port]:
    """The ports of a container, each once.

    ``quiet`` ones were declared by nobody: their traffic does not count, but while the gate is shut it must
    not pass, or the kernel would reset the connections that the sleeper has open.
    """
    uses: dict[tuple[str, int], Use] = dict.fromkeys(quiet, Use.IGNORED)
    for protocol, number in declared:
        ignored = number in settings.ignored_ports or (
            # Of datagrams the kernel knows no connection.
            protocol == "udp" and settings.monitor is Monitor.CONNECTIONS
        )
        uses[protocol, number] = Use.IGNORED if ignored else Use.ACTIVITY
    for number in settings.others_ports:
        # The engine declares them for the pod; the gate asks whose they are.
        uses.pop(("tcp", number), None)
        uses.pop(("udp", number), None)
    for shadow in shadows(declared, settings):
        uses[shadow.protocol, shadow.number] = Use.SHADOW
    return [
        Port(cast("Protocol", protocol), number, use) for (protocol, number), use in uses.items()
    ]


def shadows(declared: Collection[tuple[str, int]], settings: ContainerSettings) -> list[Shadow]:
    """What is to be translated: TCP always, UDP where the program's port is declared for it."""
    return [
        Shadow(protocol, one.shadow_port, one.app_port)
        for one in settings.shadow_ports
        for protocol in ("tcp", "udp")
        if protocol == "tcp" or (protocol, one.app_port) in declared
    ]
