"""When a gate may stop looking at the packets of a busy program, and for how long.

Why: each packet that is looked at costs it a tenth of a microsecond or two, which is felt at many thousand a
second, and says nothing then that the one before did not say. A program that is flooded is active; it is
taken for active while nobody looks, so it hibernates a little later than it could, never earlier.

Called by the daemon's gates (:mod:`architect.processes.architectd.gates`). Pure.
"""

from __future__ import annotations

from typing import Final

LOOK_S: Final = 5.0
"""Seconds between two looks at the number of packets."""
BUSY_PER_S: Final = 1000.0
"""Packets a second from which on a program is flooded."""
_SHARE: Final = 0.05
"""Of the idle time before hibernation: how much later it may come."""
_LONGEST_S: Final = 10.0
_SHORTEST_S: Final = 1.0
_WINDOW: Final = 0.05
"""Of the rest: how long the packets are then counted."""


def rest_s(scaledown_s: float) -> float:
    """Seconds that the filters may rest, for the shortest idle time of a gate's owners; 0 for never."""
    longest = min(scaledown_s * _SHARE, _LONGEST_S)
    return longest if longest >= _SHORTEST_S else 0.0


def window_s(rest: float) -> float:
    """Seconds that packets are counted between two rests."""
    return rest * _WINDOW


def is_busy(packets: int, seconds: float) -> bool:
    """Whether so many packets in so many seconds are a flood."""
    return packets >= BUSY_PER_S * seconds
