"""The life of a container, as one table: state x happening -> next state and actions.

Everything that changes a container's state goes through :func:`step`; nothing else decides what follows
from what. The daemon calls it (:mod:`architect.processes.architectd.container`), the tests walk it, and the
picture in docs/architecture.md is generated from it (:func:`mermaid`). It is pure: actions are carried
out by the caller, in order, and their outcome comes back as another happening.

Rules that the table keeps, checked by tests/unit/test_life.py:

- packets are held before a dump starts, and pass only after the program runs again;
- a checkpoint is deleted only once the program runs with all its pages, or the container has ended;
- every transition that can fail has a way back to a state in which nothing is lost.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from architect.contract.states import Action as A
from architect.contract.states import Happening as H
from architect.contract.states import State as S


@dataclass(frozen=True, slots=True)
class Step:
    """What follows: the next state, and what to do, in order."""

    state: S
    actions: tuple[A, ...] = ()


_DUMP_FAILED: Final = Step(
    S.RUNNING, (A.GATE_OPEN, A.DROP_IMAGES, A.REPORT_DUMP_FAILED, A.START_IDLE_CLOCK)
)
_CANCELLED: Final = Step(
    S.RUNNING, (A.GATE_OPEN, A.DROP_IMAGES, A.REPORT_CANCELLED, A.START_IDLE_CLOCK)
)
_END: Final = Step(S.ENDED, (A.STOP_IDLE_CLOCK, A.CLEAN_UP))

TABLE: Final[dict[tuple[S, H], Step]] = {
    (S.CREATED, H.STARTED): Step(S.RUNNING, (A.START_IDLE_CLOCK,)),
    (S.RUNNING, H.IDLE): Step(S.SCALING_DOWN, (A.STOP_IDLE_CLOCK, A.GATE_HOLD, A.START_DUMP)),
    # A dump that somebody interrupts is given up at CRIU's next hook, never by a signal.
    (S.SCALING_DOWN, H.WANTED): Step(S.CANCELLING),
    (S.SCALING_DOWN, H.IMAGES_WRITTEN): Step(S.SECURING, (A.KEEP_IMAGES,)),
    (S.SCALING_DOWN, H.DUMP_FAILED): _DUMP_FAILED,
    (S.SECURING, H.WANTED): Step(S.CANCELLING, (A.REFUSE,)),
    (S.SECURING, H.IMAGES_KEPT): Step(S.COMMITTED, (A.CONFIRM,)),
    (S.SECURING, H.IMAGES_LOST): Step(S.SCALING_DOWN, (A.REFUSE,)),
    (S.SECURING, H.DUMP_FAILED): _DUMP_FAILED,
    (S.CANCELLING, H.IMAGES_WRITTEN): Step(S.CANCELLING, (A.REFUSE,)),
    (S.CANCELLING, H.DUMP_FAILED): _CANCELLED,
    # CRIU's answer comes after the commit: what it says then is what is true.
    (S.COMMITTED, H.WANTED): Step(S.COMMITTED_WANTED),
    (S.COMMITTED, H.DUMPED): Step(S.SCALED_DOWN, (A.GATE_SLEEP, A.REPORT_DOWN, A.SETTLE)),
    (S.COMMITTED, H.DUMP_FAILED): _DUMP_FAILED,
    (S.COMMITTED_WANTED, H.DUMPED): Step(S.SCALING_UP, (A.REPORT_DOWN, A.START_RESTORE)),
    (S.COMMITTED_WANTED, H.DUMP_FAILED): _DUMP_FAILED,
    (S.SCALED_DOWN, H.WANTED): Step(S.SCALING_UP, (A.GATE_HOLD, A.START_RESTORE)),
    (S.SCALING_UP, H.RESTORED): Step(S.FILLING, (A.GATE_OPEN, A.MEND_RUNTIME, A.REPORT_UP)),
    # Held packets stay held: a client that is told nothing tries again, one that is reset does not.
    (S.SCALING_UP, H.RESTORE_FAILED): Step(
        S.STRANDED, (A.GATE_SLEEP, A.REPORT_RESTORE_FAILED, A.SCHEDULE_RETRY)
    ),
    # The keeper tried by itself, for a signal that came while no daemon ran, and failed.
    (S.SCALED_DOWN, H.RESTORE_FAILED): Step(
        S.STRANDED, (A.GATE_SLEEP, A.REPORT_RESTORE_FAILED, A.SCHEDULE_RETRY)
    ),
    (S.STRANDED, H.WANTED): Step(S.SCALING_UP, (A.GATE_HOLD, A.START_RESTORE)),
    # A move. The other node's architectd decides when it is over; packets wait for its word.
    (S.RUNNING, H.LEAVE): Step(S.LEAVING, (A.STOP_IDLE_CLOCK, A.GATE_HOLD, A.START_DUMP)),
    (S.LEAVING, H.IMAGES_WRITTEN): Step(S.LEAVING, (A.KEEP_IMAGES,)),
    (S.LEAVING, H.IMAGES_KEPT): Step(S.LEFT, (A.CONFIRM,)),
    (S.LEAVING, H.IMAGES_LOST): Step(S.LEAVING, (A.REFUSE,)),
    (S.LEAVING, H.DUMP_FAILED): _DUMP_FAILED,
    (S.LEFT, H.DUMPED): Step(S.MIGRATING),
    (S.LEFT, H.DUMP_FAILED): _DUMP_FAILED,
    (S.SCALED_DOWN, H.LEAVE): Step(S.MIGRATING, (A.GATE_HOLD,)),
    (S.STRANDED, H.LEAVE): Step(S.MIGRATING, (A.GATE_HOLD,)),
    (S.MIGRATING, H.STAY_AWAKE): Step(S.SCALING_UP, (A.START_RESTORE,)),
    (S.MIGRATING, H.STAY_ASLEEP): Step(S.SCALED_DOWN, (A.GATE_SLEEP,)),
    # The gate is closed before the first packet of a moved connection can be sent here.
    (S.CREATED, H.EXPECTED): Step(S.ARRIVING, (A.GATE_HOLD,)),
    (S.ARRIVING, H.NOT_COMING): Step(S.CREATED, (A.GATE_OPEN,)),
    (S.ARRIVING, H.LANDED): Step(S.SCALING_UP, (A.START_RESTORE,)),
    (S.ARRIVING, H.LANDED_ASLEEP): Step(S.SCALED_DOWN, (A.GATE_SLEEP,)),
    (S.FILLING, H.FILLED): Step(S.RUNNING, (A.DROP_IMAGES, A.START_IDLE_CLOCK)),
    # The keeper can wake by itself, for a signal that came while no daemon ran.
    (S.SCALED_DOWN, H.RESTORED): Step(S.FILLING, (A.GATE_OPEN, A.MEND_RUNTIME, A.REPORT_UP)),
    (S.STRANDED, H.RESTORED): Step(S.FILLING, (A.GATE_OPEN, A.MEND_RUNTIME, A.REPORT_UP)),
}
"""What can happen, and what follows. EXITED ends any state; all else is ignored (see :func:`step`)."""


def step(state: S, happening: H) -> Step:
    """What follows from ``happening`` in ``state``.

    A happening that a state has no row for changes nothing: a packet for a running container, a second
    wake while one is under way.
    """
    if happening is H.EXITED and state is not S.ENDED:
        return _END
    return TABLE.get((state, happening), Step(state))


def mermaid() -> str:
    """The table as a Mermaid state diagram, for docs/architecture.md."""
    lines = ["stateDiagram-v2", "    direction LR", f"    [*] --> {_name(S.CREATED)}"]
    for (state, happening), follows in TABLE.items():
        if follows.state is not state:
            lines.append(f"    {_name(state)} --> {_name(follows.state)}: {happening.value}")
    lines.append(f"    {_name(S.RUNNING)} --> [*]: exited (from any state)")
    return "\n".join(lines) + "\n"


def _name(state: S) -> str:
    return state.value.replace("-", "_")
