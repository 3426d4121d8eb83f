"""When the idle clock runs, pauses and starts anew: the table of docs/reference.md, over time.

A container's life is played in virtual time, as a sequence of events. The clock looks when it said that it
would, as processes/architectd/clock.py does; what is true at each moment is reckoned apart from it.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from architect.decisions.idle import Observed, Sleep, judge

SECOND = 10**9
IDLE = 60 * SECOND


class Event(enum.Enum):
    """What can happen to a container that is awake."""

    PACKET = "a packet to a declared port that counts"
    UNCOUNTED = "a packet to any other port, or one sent"
    EXEC = "an exec session begins"
    EXEC_END = "an exec session ends"
    CALL = "an engine's call has ended: an exec was started, the container paused"
    PAUSE = "it is paused"
    UNPAUSE = "it runs on"
    OPEN = "a connection is opened"
    VANISH = "a connection ends without a packet"
    WAKE = "it has been hibernated by a command and woken"
    START = "its program ends and is started afresh"
    DAEMON = "architectd starts anew"


ACTIVITY = (Event.PACKET, Event.OPEN, Event.CALL, Event.WAKE, Event.START, Event.DAEMON)
"""Events that start the clock anew."""
RELEASE = (Event.EXEC_END, Event.UNPAUSE, Event.VANISH)
"""Events after which it starts anew, though nobody tells the daemon of them."""


@dataclass
class Truth:
    """What is so, whoever knows it."""

    started: int = 0
    active: int = 0
    """Last activity, or last moment at which it had a session or was paused."""
    free: int = 0
    """The same, or last moment at which a connection was open."""
    sessions: int = 0
    connections: int = 0
    paused: bool = False
    seen: int = 0
    """Last activity that a packet's time or a call tells the daemon of."""

    @property
    def called(self) -> bool:
        """Whether it is held by what an engine's call began."""
        return bool(self.sessions or self.paused)

    @property
    def held(self) -> bool:
        return self.called or bool(self.connections)

    def happen(self, event: Event, now: int) -> None:
        was_called, was_held = self.called, self.held
        match event:
            case Event.EXEC:
                self.sessions += 1
            case Event.EXEC_END:
                self.sessions = max(0, self.sessions - 1)
            case Event.PAUSE | Event.UNPAUSE:
                self.paused = event is Event.PAUSE
            case Event.OPEN:
                self.connections += 1
            case Event.VANISH:
                self.connections = max(0, self.connections - 1)
            case Event.START:
                self.started, self.sessions, self.connections = now, 0, 0
                self.paused = False
        if event in ACTIVITY:
            self.seen = now
        if event in ACTIVITY or was_called or self.called:
            self.active = now
        if event in ACTIVITY or was_held or self.held:
            self.free = now


@dataclass
class Played:
    """A container and its clock."""

    scaledown: int = IDLE
    delay: int = 0
    now: int = 0
    truth: Truth = field(default_factory=Truth)
    look_at: int = 0
    touched: int = 0
    held: bool = False
    slept: int | None = None
    """When it was hibernated."""

    def __post_init__(self) -> None:
        self.look_at = self.scaledown

    def until(self, end: int) -> None:
        """Time passes."""
        while self.slept is None and self.look_at <= end:
            self.now = self.look_at
            self.look()
        self.now = end

    def look(self) -> None:
        truth = self.truth
        verdict = judge(
            Observed(
                now=self.now,
                last_activity=max(self.touched, truth.seen),
                scaledown=self.scaledown,
                not_before=truth.started + self.delay,
                sessions=truth.sessions,
                connections=truth.connections,
                paused=truth.paused,
                held_before=self.held,
            )
        )
        if isinstance(verdict, Sleep):
            self.slept = self.now
            return
        assert verdict.until > self.now
        self.look_at, self.held = verdict.until, verdict.held
        if verdict.counts:
            self.touched = self.now

    def happen(self, event: Event) -> None:
        if event is Event.WAKE and self.truth.called:
            return  # `architect sleep` refuses it, so there is nothing to wake.
        self.truth.happen(event, self.now)
        if event is Event.CALL:
            self.look_at = self.now
        elif event is Event.WAKE:
            self.held, self.look_at = False, self.now + self.scaledown
        elif event is Event.START:
            self.held, self.look_at = False, self.now
        elif event is Event.DAEMON:
            self.touched, self.held, self.look_at = self.now, False, self.now

    def play(self, events: Iterable[tuple[int, Event]]) -> None:
        """Each event comes so many nanoseconds after the one before."""
        for wait, event in events:
            self.until(self.now + wait)
            if self.slept is not None:
                return
            self.happen(event)
            if event in (Event.EXEC, Event.PAUSE):
                # Neither happens but by an engine's call, which ends when it has happened.
                self.happen(Event.CALL)

    @property
    def earliest(self) -> int:
        """When it may hibernate, if nothing more happens."""
        return max(self.truth.active + self.scaledown, self.truth.started + self.delay)

    @property
    def latest(self) -> int:
        """When it must have: ends that nobody tells of are seen at the next look."""
        late = max(self.scaledown // 4, min(self.scaledown, SECOND))
        free = self.truth.free + late
        return max(free + self.scaledown, self.truth.started + self.delay)


WAITS = st.one_of(
    st.integers(min_value=0, max_value=3 * IDLE),
    st.sampled_from([0, 1, IDLE // 4, IDLE - 1, IDLE, IDLE + 1]),
)
SCALEDOWNS = st.integers(min_value=SECOND, max_value=2 * IDLE)
DELAYS = st.one_of(st.just(0), st.integers(min_value=0, max_value=5 * IDLE))
LIVES = st.lists(st.tuples(WAITS, st.sampled_from(Event)), max_size=15)


@given(SCALEDOWNS, DELAYS, LIVES)
@example(IDLE, 0, [(10 * SECOND, Event.EXEC), (IDLE - 10 * SECOND - 1, Event.EXEC_END)])
@example(SECOND, 0, [(0, Event.EXEC), (SECOND // 2, Event.EXEC_END)])
@example(IDLE, 0, [(IDLE - 1, Event.PAUSE), (IDLE, Event.UNPAUSE)])
@example(IDLE, 0, [(0, Event.OPEN), (2 * IDLE - 1, Event.VANISH)])
def test_it_hibernates_when_it_has_been_idle_for_its_time_and_never_before(
    scaledown: int, delay: int, life: list[tuple[int, Event]]
) -> None:
    one = Played(scaledown, delay)
    one.play(life)
    if one.slept is None and one.truth.held:
        one.until(one.now + 3 * scaledown)
        assert one.slept is None
        return
    one.until(max(one.now, one.latest))
    assert one.slept is not None
    assert one.earliest <= one.slept <= one.latest
    assert not one.truth.held


@given(SCALEDOWNS, DELAYS, st.lists(st.tuples(WAITS, st.sampled_from(ACTIVITY[:1])), max_size=15))
def test_after_packets_alone_it_is_not_late_either(
    scaledown: int, delay: int, life: list[tuple[int, Event]]
) -> None:
    one = Played(scaledown, delay)
    one.play(life)
    one.until(max(one.now, one.earliest))
    assert one.slept == one.earliest


@given(SCALEDOWNS, LIVES, st.lists(WAITS, max_size=15))
def test_uncounted_packets_change_nothing(
    scaledown: int, life: list[tuple[int, Event]], waits: list[int]
) -> None:
    """Of two equal lives, one with such packets in it, both have the same end."""
    times, now = [], 0
    for wait, event in life:
        now += wait
        times.append((now, event))
    noise, now = [], 0
    for wait in waits:
        now += wait
        noise.append((now, Event.UNCOUNTED))
    every = sorted(times + noise, key=lambda one: one[0])
    end = max((at for at, _ in every), default=0) + 3 * scaledown
    ends = []
    for events in (times, every):
        one = Played(scaledown)
        one.play(
            (at - before, event)
            for (before, _), (at, event) in itertools.pairwise([(0, Event.WAKE), *events])
        )
        one.until(end)
        ends.append(one.slept)
    assert ends[0] == ends[1]


@pytest.mark.parametrize(
    ("events", "slept"),
    [
        # Nothing happens: the whole idle time after the start.
        ([], 60),
        # A packet starts it anew; one that does not count does not.
        ([(50, Event.PACKET)], 110),
        ([(50, Event.UNCOUNTED)], 60),
        # A session pauses it; it is looked for each 15 s, from the call's end on, and counts till then.
        ([(50, Event.EXEC), (31, Event.EXEC_END)], 50 + 45 + 60),
        ([(50, Event.EXEC), (299, Event.EXEC_END)], 50 + 300 + 60),
        ([(50, Event.PAUSE), (29, Event.UNPAUSE)], 50 + 30 + 60),
        # Each of two sessions counts.
        ([(0, Event.EXEC), (0, Event.EXEC), (100, Event.EXEC_END), (1, Event.EXEC_END)], 105 + 60),
        # A connection: first looked for when the clock looks anyway.
        ([(50, Event.OPEN), (61, Event.VANISH)], 60 + 60 + 60),
        # Wake, fresh start, the daemon's start.
        ([(50, Event.WAKE)], 110),
        ([(50, Event.START)], 110),
        ([(50, Event.DAEMON)], 110),
        ([(50, Event.OPEN), (10, Event.DAEMON), (10, Event.VANISH)], 75 + 60),
    ],
)
def test_the_table(events: Sequence[tuple[int, Event]], slept: int) -> None:
    one = Played()
    one.play((wait * SECOND, event) for wait, event in events)
    one.until(10**13)
    assert one.slept == slept * SECOND


@pytest.mark.parametrize(
    ("events", "slept"),
    [
        ([], 100),
        # Activity in it is over by its end, or is not.
        ([(30, Event.PACKET)], 100),
        ([(50, Event.PACKET)], 110),
        # Not armed again by a wake or by the daemon's start; by a fresh start it is.
        ([(20, Event.WAKE)], 100),
        ([(20, Event.DAEMON)], 100),
        ([(20, Event.START)], 120),
        ([(20, Event.EXEC), (100, Event.EXEC_END)], 125 + 60),
    ],
)
def test_the_table_of_the_initial_delay(events: Sequence[tuple[int, Event]], slept: int) -> None:
    one = Played(delay=100 * SECOND)
    one.play((wait * SECOND, event) for wait, event in events)
    one.until(10**13)
    assert one.slept == slept * SECOND


def test_what_is_never_let_go_never_sleeps() -> None:
    for event in (Event.EXEC, Event.PAUSE, Event.OPEN):
        one = Played()
        one.play([(SECOND, event)])
        one.until(10**13)
        assert one.slept is None
