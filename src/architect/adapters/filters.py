"""One program of the gate at every interface of a namespace, on the way in or on the way out.

Called by the gate. An interface has its filter by tcx, or by a classifier where the kernel has no tcx;
filters of others stay where they are. All methods act in the calling thread's network namespace, and
raise BpfError and NetnsError.
"""

import enum
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from architect.adapters import bpf, netns

_HANDLE: Final = 1
_PRIORITY: Final = 21
"""Of our classifiers: those of others come before or after them."""


class Side(enum.Enum):
    """Where at an interface; the value begins the names of its filters' pins."""

    INGRESS = "ingress-"
    EGRESS = "egress-"


PINS: Final = tuple(side.value for side in Side)
"""How the names of these pins begin."""

_Place = bpf.TcxFilter | bpf.IngressFilter


class Filters:
    """See the module."""

    def __init__(self, pins: Path, side: Side, *, ethernet: int, raw: int) -> None:
        """`ethernet` and `raw` are descriptors of programs: for packets with that header, and without one."""
        self._pins = pins
        self._side = side
        self._ethernet, self._raw = ethernet, raw

    @functools.cached_property
    def _ids(self) -> dict[int, int]:
        return {one: bpf.program_id(one) for one in (self._ethernet, self._raw)}

    def put(self) -> list[str]:
        """Have a filter at every interface; return the names of those that lacked it."""
        lacking = []
        for interface in netns.interfaces():
            program = self._ethernet if interface.ethernet else self._raw
            place, other = self._places(interface.number)
            if place.attached() == self._ids[program]:
                continue
            try:
                place.attach(program)
            except bpf.InterfaceGoneError:
                continue
            other.detach()  # of a daemon or a kernel that did it the other way
            lacking.append(interface.name)
        return lacking

    def take(self) -> None:
        """Take them all away. The kernel waits until no CPU runs them any more."""
        for place in self._all_places():
            place.detach()

    def _all_places(self) -> Iterator[_Place]:
        for interface in netns.interfaces():
            yield from self._places(interface.number)

    def _places(self, interface: int) -> tuple[_Place, _Place]:
        """Where the filter belongs on this kernel, and where it may be from another time."""
        pin = self._pins / f"{self._side.value}{interface}"
        if self._side is Side.INGRESS:
            link = bpf.TcxFilter(interface, pin)
            classifier = bpf.IngressFilter(interface, handle=_HANDLE, priority=_PRIORITY)
        else:
            link = bpf.TcxExitFilter(interface, pin)
            classifier = bpf.EgressFilter(interface, handle=_HANDLE, priority=_PRIORITY)
        return (link, classifier) if bpf.has_tcx() else (classifier, link)
