"""architectd's options, and what stands for them in the environment of a machine without a cluster."""

import pytest

from architect.contract.moving import OnRestoreFailure
from architect.processes.architectd import main

VARIABLE = "ARCHITECT_ANSWER_KEEP_ALIVE"


@pytest.mark.parametrize(
    ("words", "variable", "answers"),
    [
        ([], None, False),
        (["--answer-keep-alive"], None, True),
        ([], "1", True),
        ([], "0", False),
        ([], "", False),
        (["--answer-keep-alive"], "0", True),
    ],
)
def test_keep_alives_are_answered_if_that_is_wanted(
    monkeypatch: pytest.MonkeyPatch, words: list[str], variable: str | None, answers: bool
) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert main.options(words).answer_keep_alive is answers


def test_idle_times_below_a_second_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main.options(["--default-scaledown-duration", "999ms"])
    assert "at least 1s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ([], OnRestoreFailure.WAIT),
        (["--on-restore-failure=wait"], OnRestoreFailure.WAIT),
        (["--on-restore-failure=fresh"], OnRestoreFailure.FRESH),
    ],
)
def test_what_follows_a_failed_restore(words: list[str], found: OnRestoreFailure) -> None:
    assert main.options(words).on_restore_failure == found


@pytest.mark.parametrize("value", ["", "never", "Wait"])
def test_another_word_for_what_follows_is_refused(
    capsys: pytest.CaptureFixture[str], value: str
) -> None:
    with pytest.raises(SystemExit):
        main.options([f"--on-restore-failure={value}"])
    told = capsys.readouterr().err
    for part in ("--on-restore-failure", repr(value), *OnRestoreFailure):
        assert part in told
