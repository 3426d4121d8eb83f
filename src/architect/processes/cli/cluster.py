"""A cluster, as its user may ask it: by kubectl, with the rights and the kubeconfig of whoever calls.

Called by the commands of `kubectl architect`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from typing import Final

from architect.contract.errors import ArchitectError

_CALL_S: Final = 120.0
_LOGGED: Final = re.compile(r"[IWEF]\d{4} \d\d:\d\d:\d\d\.\d+ ")
"""How a line of kubectl's own log begins."""


class ClusterError(ArchitectError):
    """kubectl failed, or a node's architectd does not answer."""


def kubectl(*words: str, given: str | None = None) -> str:
    """What kubectl prints to these words, with ``given`` on its standard input.

    Raises ClusterError with what it said, if it failed.
    """
    program = shutil.which("kubectl")
    if program is None:
        raise ClusterError(
            "the cluster cannot be asked", "kubectl is not on the PATH", "install it"
        )
    try:
        done = subprocess.run(
            [program, *words],
            input=given or "",
            capture_output=True,
            text=True,
            timeout=_CALL_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(
            f"kubectl {' '.join(words)}",
            f"no answer within {_CALL_S:.0f} s",
            "see whether the API answers: `kubectl version`",
        ) from error
    if done.returncode:
        # What architect says on a node is a line of its own; kubectl's follows.
        every = done.stderr.splitlines()
        lines = [line for line in every if line.startswith("architect: ")]
        # Where the API is away kubectl logs each attempt, and says the same in its last line.
        plain = [line for line in every if not _LOGGED.match(line)]
        text = lines[0].removeprefix("architect: ") if lines else "\n".join(plain or every)
        raise ClusterError(f"kubectl {' '.join(words)}", text.strip() or "it failed")
    return done.stdout


def namespace_of(given: str) -> str:
    """The namespace that is meant: the one given, else that of the kubeconfig's context."""
    if given:
        return given
    found = kubectl("config", "view", "--minify", "--output=jsonpath={..namespace}")
    return found.strip() or "default"
