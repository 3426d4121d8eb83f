"""What the modules of the test cluster share: how to fail, run a command, wait and write a file.

Everything here has a deadline. Errors are `ClusterError`; only the command line (__main__) ends the
process. Called by every module beside it.
"""

import json
import os
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final, TypeVar

from common import Failure

START_AGAIN: Final = "take the cluster away with `make cluster-down`, then start it anew"
"""What to do when nothing more particular is known."""

COMMAND_S: Final = 30.0
"""How long a command may take that has no reason to take long."""

_POLL_S: Final = 0.05

T = TypeVar("T")


class ClusterError(Failure):
    """What failed, why, and what to do about it."""

    def __init__(self, what: str, why: str, fix: str = START_AGAIN) -> None:
        super().__init__(f"{what}: {why}; {fix}")
        self.what = what
        self.why = why
        self.fix = fix


def _ended(command: Sequence[str | Path], said: str, shown: str) -> tuple[str, str]:
    words = shown or " ".join(map(str, command))
    lines = said.strip().splitlines()[-15:] or ["it said nothing"]
    return words, "\n  ".join(lines)


def run(
    *command: str | Path,
    timeout_s: float = COMMAND_S,
    stdin: str | Path | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    shown: str = "",
    fix: str = START_AGAIN,
) -> str:
    """Run a command to its good end and return what it printed.

    `stdin` is text for its standard input, or the file that is it; `env` is the whole environment,
    where given; `shown` stands for a long command in messages.
    Raises ClusterError when the command fails, is missing, or takes longer than `timeout_s`.
    """
    try:
        with ExitStack() as open_ones:
            source: IO[bytes] | int | None = subprocess.DEVNULL
            if isinstance(stdin, Path):
                source = open_ones.enter_context(stdin.open("rb"))
            done = subprocess.run(
                command,
                input=stdin if isinstance(stdin, str) else None,
                stdin=None if isinstance(stdin, str) else source,
                capture_output=True,
                text=True,
                errors="replace",
                env=env,
                cwd=cwd,
                timeout=timeout_s,
                check=False,
            )
    except FileNotFoundError as missing:
        if stdin is not None and missing.filename == str(stdin):
            raise ClusterError(str(stdin), "there is no such file", "check the path") from missing
        raise ClusterError(
            str(command[0]), f"not there ({missing})", "run `scripts/setup runtime build cluster`"
        ) from missing
    except subprocess.TimeoutExpired as late:
        said = (late.stderr or late.stdout or b"").decode(errors="replace")
        words, why = _ended(command, said, shown)
        raise ClusterError(f"{words!r}", f"not done after {timeout_s:g} s: {why}", fix) from late
    if done.returncode != 0:
        words, why = _ended(command, done.stderr.strip() or done.stdout, shown)
        raise ClusterError(f"{words!r}", f"ended with {done.returncode}: {why}", fix)
    return done.stdout


def succeeds(
    *command: str | Path, timeout_s: float = COMMAND_S, env: Mapping[str, str] | None = None
) -> bool:
    """Whether a command comes to a good end in time, whatever it says."""
    try:
        run(*command, timeout_s=timeout_s, env=env)
    except ClusterError:
        return False
    return True


def until(
    what: str,
    condition: Callable[[], T],
    seconds: float = 60.0,
    *,
    poll_s: float = _POLL_S,
    why: Callable[[], str] = lambda: "",
    fix: str = START_AGAIN,
) -> T:
    """Wait for the condition's first true value and return it.

    Raises ClusterError after `seconds`, which says what was waited for and adds `why`.
    """
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > end:
            added = why()
            raise ClusterError(
                f"waiting for {what}",
                f"not so after {seconds:g} s" + (added and f" ({added})"),
                fix,
            )
        time.sleep(poll_s)


def put(path: Path, content: str | Mapping[str, Any], mode: int = 0o644) -> None:
    """Write a file whole: text, or an object as JSON. Whoever reads it sees the old or the new."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_name(f"{path.name}.new")
    unfinished.write_text(text)
    unfinished.chmod(mode)
    unfinished.replace(path)


def tail(log: Path, lines: int = 5) -> str:
    """A log's last lines, for a message; nothing if there is none."""
    try:
        return "\n  ".join(log.read_text(errors="replace").splitlines()[-lines:])
    except OSError:
        return ""


def need_root() -> None:
    """Raise ClusterError unless this is root."""
    if os.geteuid() != 0:
        raise ClusterError("the cluster", "namespaces and mounts take root", "run it as root")
