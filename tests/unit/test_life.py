"""The life of a container: rules that the table must keep whatever happens, walked by hypothesis."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.contract.states import Action, Happening, State
from architect.decisions import life

HAPPENINGS = [one for one in Happening if one is not Happening.EXITED]
PROGRAM_IS_GONE = {
    State.COMMITTED,
    State.COMMITTED_WANTED,
    State.SCALED_DOWN,
    State.SCALING_UP,
    State.STRANDED,
    State.LEFT,
    State.MIGRATING,
    State.ARRIVING,
}
FROZEN_OR_GONE = PROGRAM_IS_GONE | {
    State.SCALING_DOWN,
    State.SECURING,
    State.CANCELLING,
    State.LEAVING,
}

walks = st.lists(st.sampled_from(HAPPENINGS), max_size=40)


def walk(happenings: list[Happening]) -> list[tuple[State, Happening, life.Step]]:
    """Every step of a life that begins at CREATED and in which these things happen."""
    state, steps = State.CREATED, []
    for happening in happenings:
        step = life.step(state, happening)
        steps.append((state, happening, step))
        state = step.state
    return steps


@given(walks)
def test_packets_pass_only_while_the_program_runs(happenings: list[Happening]) -> None:
    is_open = True
    for _, _, step in walk(happenings):
        for action in step.actions:
            if action in (Action.GATE_HOLD, Action.GATE_SLEEP):
                is_open = False
            elif action is Action.GATE_OPEN:
                is_open = True
            elif action is Action.START_DUMP:
                assert not is_open, "the gate must close before the dump"
        assert is_open == (step.state not in FROZEN_OR_GONE), step


@given(walks)
def test_images_are_dropped_only_when_the_program_runs_with_all_its_pages(
    happenings: list[Happening],
) -> None:
    for before, happening, step in walk(happenings):
        if Action.DROP_IMAGES in step.actions:
            assert step.state is State.RUNNING, (before, happening)
            assert happening in (Happening.FILLED, Happening.DUMP_FAILED)


@given(walks)
def test_criu_is_told_to_end_the_program_only_after_the_images_are_kept(
    happenings: list[Happening],
) -> None:
    kept = False
    for _, happening, step in walk(happenings):
        if Action.START_DUMP in step.actions:
            kept = False
        kept = kept or happening is Happening.IMAGES_KEPT
        if Action.CONFIRM in step.actions:
            assert kept
            assert step.state in (State.COMMITTED, State.LEFT)


@given(walks)
def test_the_idle_clock_runs_exactly_while_the_program_runs_whole(
    happenings: list[Happening],
) -> None:
    runs = False
    for _, _, step in walk(happenings):
        for action in step.actions:
            if action is Action.START_IDLE_CLOCK:
                runs = True
            elif action is Action.STOP_IDLE_CLOCK:
                runs = False
        assert runs == (step.state is State.RUNNING)


@given(walks)
def test_every_life_can_get_back_to_running(happenings: list[Happening]) -> None:
    """From wherever it is, answers that the adapters owe it lead back to a running program."""
    steps = walk([Happening.STARTED, *happenings])
    state = steps[-1][2].state
    ways = [
        Happening.DUMP_FAILED,
        Happening.DUMPED,
        Happening.STAY_AWAKE,
        Happening.NOT_COMING,
        Happening.STARTED,
        Happening.WANTED,
        Happening.RESTORED,
        Happening.FILLED,
    ]
    for _ in range(2 * len(ways)):
        for happening in ways:
            if state is not State.RUNNING:
                state = life.step(state, happening).state
    assert state is State.RUNNING


@pytest.mark.parametrize("state", [one for one in State if one is not State.ENDED])
def test_the_end_is_possible_at_any_time(state: State) -> None:
    step = life.step(state, Happening.EXITED)
    assert step.state is State.ENDED
    assert Action.CLEAN_UP in step.actions


def test_an_ended_container_stays_ended() -> None:
    for happening in Happening:
        assert life.step(State.ENDED, happening) == life.Step(State.ENDED)


@pytest.mark.parametrize(
    ("state", "action"),
    [(State.SECURING, Action.REFUSE), (State.CANCELLING, None), (State.SCALING_DOWN, None)],
)
def test_a_packet_in_mid_dump_gives_it_up(state: State, action: Action | None) -> None:
    step = life.step(state, Happening.WANTED)
    assert step.state is State.CANCELLING
    assert step.actions == (() if action is None else (action,))
    refused = life.step(State.CANCELLING, Happening.IMAGES_WRITTEN)
    assert refused.actions == (Action.REFUSE,)


def test_a_packet_after_the_commit_wakes_at_once() -> None:
    step = life.step(State.COMMITTED, Happening.WANTED)
    step = life.step(step.state, Happening.DUMPED)
    assert step.state is State.SCALING_UP
    assert step.actions[-1] is Action.START_RESTORE


def test_a_failed_restore_keeps_the_checkpoint_and_the_packets() -> None:
    step = life.step(State.SCALING_UP, Happening.RESTORE_FAILED)
    assert step.state is State.STRANDED
    assert Action.DROP_IMAGES not in step.actions
    assert Action.GATE_OPEN not in step.actions
    assert Action.SCHEDULE_RETRY in step.actions


def test_every_state_has_a_public_name() -> None:
    shown = {state.shown for state in State}
    assert shown == {
        "CREATED",
        "RUNNING",
        "SCALING_DOWN",
        "SCALED_DOWN",
        "SCALING_UP",
        "MIGRATING",
        "ENDED",
    }


@pytest.mark.parametrize("state", [State.LEAVING, State.LEFT, State.MIGRATING, State.ARRIVING])
def test_nothing_wakes_what_moves(state: State) -> None:
    """Two nodes must never run it, so only the word of the move brings it back."""
    for happening in (Happening.WANTED, Happening.IDLE, Happening.RESTORED):
        assert life.step(state, happening) == life.Step(state)


def test_what_was_asleep_arrives_asleep() -> None:
    state = life.step(State.SCALED_DOWN, Happening.LEAVE).state
    assert state is State.MIGRATING
    step = life.step(State.ARRIVING, Happening.LANDED_ASLEEP)
    assert step == life.Step(State.SCALED_DOWN, (Action.GATE_SLEEP,))


def test_the_picture_names_every_state_but_the_end() -> None:
    picture = life.mermaid()
    for state in State:
        if state is not State.ENDED:
            assert state.value.replace("-", "_") in picture
