"""The states of a managed container and what can happen to it.

Pure names, shared by the decisions (which say what follows from what, :mod:`architect.decisions.life`),
the daemon and the command line.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    """Where a container is in its life. What users see of it is :attr:`shown`."""

    CREATED = "created"
    """Its keeper exists; the engine has not started it yet."""
    RUNNING = "running"
    """The program runs and every page of it is in memory."""
    FILLING = "filling"
    """The program runs after a wake; pages are still being brought in behind it."""
    SCALING_DOWN = "scaling-down"
    """CRIU writes the checkpoint; packets are held; it can still be given up."""
    SECURING = "securing"
    """Every image is written and is being made durable; the frozen program waits for the verdict."""
    CANCELLING = "cancelling"
    """Somebody wants the program back before the dump was committed; CRIU is thawing it."""
    COMMITTED = "committed"
    """The checkpoint is whole and CRIU is ending the program."""
    COMMITTED_WANTED = "committed-wanted"
    """As COMMITTED, and somebody wants the program back as soon as it has ended."""
    SCALED_DOWN = "scaled-down"
    """Only the checkpoint exists."""
    SCALING_UP = "scaling-up"
    """CRIU restores the program; packets are held."""
    LEAVING = "leaving"
    """Its pod moves to another node: CRIU writes the checkpoint; packets wait and cancel nothing."""
    LEFT = "left"
    """As LEAVING; the checkpoint is whole and CRIU is ending the program."""
    MIGRATING = "migrating"
    """Only the checkpoint exists, and it is being moved: nothing wakes it here while that may succeed."""
    ARRIVING = "arriving"
    """A checkpoint of another node is on its way, to stand for the program that was never started."""
    STRANDED = "stranded"
    """A restore failed. The checkpoint is kept; the next packet, command or retry tries again."""
    ENDED = "ended"
    """The container is gone, together with its keeper."""

    @property
    def shown(self) -> str:
        """The state's public name: contract, `architect ps`."""
        return _SHOWN[self]


_SHOWN = {
    State.CREATED: "CREATED",
    State.RUNNING: "RUNNING",
    State.FILLING: "RUNNING",
    State.SCALING_DOWN: "SCALING_DOWN",
    State.SECURING: "SCALING_DOWN",
    State.CANCELLING: "SCALING_DOWN",
    State.COMMITTED: "SCALING_DOWN",
    State.COMMITTED_WANTED: "SCALING_DOWN",
    State.SCALED_DOWN: "SCALED_DOWN",
    State.SCALING_UP: "SCALING_UP",
    State.LEAVING: "MIGRATING",
    State.LEFT: "MIGRATING",
    State.MIGRATING: "MIGRATING",
    State.ARRIVING: "MIGRATING",
    State.STRANDED: "SCALED_DOWN",
    State.ENDED: "ENDED",
}


class Happening(enum.StrEnum):
    """What can happen to a container."""

    STARTED = "started"
    """The engine has started the program."""
    IDLE = "idle"
    """The idle clock ran out, or a user asked for hibernation."""
    WANTED = "wanted"
    """A packet for it is held, or an exec, a command or a signal needs the program."""
    LEAVE = "leave"
    """Its pod moves to another node, which is ready for it."""
    STAY_AWAKE = "stay-awake"
    STAY_ASLEEP = "stay-asleep"
    """It does not move after all, and is to be as it was before."""
    EXPECTED = "expected"
    """A checkpoint of another node is about to take the place of a container that was not started."""
    NOT_COMING = "not-coming"
    """That checkpoint does not come; the container can still be started as new."""
    LANDED = "landed"
    LANDED_ASLEEP = "landed-asleep"
    """The checkpoint of another node stands for the program, which was awake or asleep there."""
    IMAGES_WRITTEN = "images-written"
    """CRIU has written every image and asks whether to end the program."""
    IMAGES_KEPT = "images-kept"
    """The images are on the disk under their final name."""
    IMAGES_LOST = "images-lost"
    """The images could not be secured: disk full, or a file missing."""
    DUMPED = "dumped"
    """CRIU has ended the program; the keeper stands alone."""
    DUMP_FAILED = "dump-failed"
    """CRIU has given the dump up, or was told to; the program runs on."""
    RESTORED = "restored"
    """The program runs again."""
    RESTORE_FAILED = "restore-failed"
    """CRIU could not restore it, or the checkpoint is not fit to be tried."""
    FILLED = "filled"
    """Its last page is in memory."""
    EXITED = "exited"
    """The keeper is gone: the container has ended."""


class Action(enum.StrEnum):
    """What the daemon does about it. Adapters carry these out, in the order given."""

    GATE_HOLD = "hold packets"
    GATE_OPEN = "let packets pass"
    GATE_SLEEP = "hold packets if they wake, drop them if not"
    START_DUMP = "start the dump"
    KEEP_IMAGES = "secure the images"
    CONFIRM = "tell CRIU to end the program"
    REFUSE = "tell CRIU to thaw the program"
    SETTLE = "free what the program used"
    START_RESTORE = "start the restore"
    MEND_RUNTIME = "point the runtime to the new init"
    START_IDLE_CLOCK = "start the idle clock"
    STOP_IDLE_CLOCK = "stop the idle clock"
    DROP_IMAGES = "delete the images"
    REPORT_DOWN = "report the hibernation"
    REPORT_UP = "report the wake"
    REPORT_DUMP_FAILED = "report the failed dump"
    REPORT_CANCELLED = "report that the dump was given up"
    REPORT_RESTORE_FAILED = "report the failed restore"
    SCHEDULE_RETRY = "try again later"
    CLEAN_UP = "forget the container"
