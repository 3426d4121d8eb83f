"""Which commands in a container are probes: they count for nothing, and are answered while it sleeps.

Called by the runtime's door (commands of a pod's exec probes, which the webhook has written down) and by the
daemon (Podman's healthchecks, and each exec).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from architect.contract.annotations import EXEC_PROBES


def commands(annotations: Mapping[str, str], container: str) -> list[list[str]]:
    """The commands of a container's exec probes; none if the annotation is not there or makes no sense."""
    try:
        found = json.loads(annotations.get(EXEC_PROBES, "{}"))[container]
    except (ValueError, LookupError, TypeError):
        return []
    if not isinstance(found, list):
        return []
    return [one for one in found if _is_command(one)]


def healthcheck(test: Any) -> list[list[str]]:
    """The command of a Podman healthcheck, from the container's configuration (podman-run(1))."""
    if not _is_command(test) or test[0] == "NONE":
        return []
    kind, *words = test
    if kind == "CMD-SHELL":
        return [["sh", "-c", " ".join(words)], ["/bin/sh", "-c", " ".join(words)]]
    return [words if kind == "CMD" else test]


def is_probe(process: str, known: Collection[Sequence[str]]) -> bool:
    """Whether an exec's process, an OCI specification's Process as JSON, is one of the known commands.

    One with a terminal is somebody's session, whatever it runs.
    """
    try:
        found = json.loads(process)
        return bool(known) and not found.get("terminal") and found["args"] in known
    except (ValueError, LookupError, TypeError, AttributeError):
        return False


def _is_command(found: Any) -> bool:
    return isinstance(found, list) and bool(found) and all(isinstance(one, str) for one in found)
