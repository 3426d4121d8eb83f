"""What only Podman knows of a container: its name and its declared ports.

Called by the daemon at create (name) and after start (ports). Neither is in the OCI bundle: the name is
an argument of conmon (conmon(8)), and so is the command with which conmon reports an exit, which has the
flags that reach this Podman's storage. Ports are in `podman inspect` only.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from architect.contract.errors import ArchitectError


class EngineError(ArchitectError):
    """Podman could not be asked, or gave an answer that makes no sense."""


def monitor_words(pid: int) -> list[str]:
    """The command line of conmon, empty if the process is gone."""
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")[:-1]
    except OSError:
        return []


def container_name(words: Sequence[str]) -> str | None:
    """The container's name out of conmon's command line; None for another engine's monitor."""
    for flag, value in pairwise(words):
        if flag in ("-n", "--name"):
            return value
    return None


def command(words: Sequence[str]) -> list[str]:
    """``podman`` with the global flags of the instance that started this conmon; empty if not found."""
    found = [value for flag, value in pairwise(words) if flag == "--exit-command"]
    flags = []
    for flag, value in pairwise(words):
        if flag == "--exit-command-arg":
            if value == "container":
                break
            flags.append(value)
    return [*found[:1], *flags] if found else []


class Declared(NamedTuple):
    """What a container's configuration says."""

    ports: list[tuple[str, int]]
    """Protocol and number; published or exposed, its pod's included."""
    healthcheck: Any
    """As in the configuration: a list of words, or None."""


async def declared(podman: Sequence[str], container: str) -> Declared:
    """What the container declares.

    Blocks while Podman holds the container's lock, that is until a start under way is over.

    Raises:
        EngineError: Podman failed.
    """
    found = await _inspect(podman, "container", container)
    ports = _ports(found.get("Config", {}).get("ExposedPorts"))
    ports |= _ports(found.get("HostConfig", {}).get("PortBindings"))
    ports |= _ports(found.get("NetworkSettings", {}).get("Ports"))
    if found.get("Pod"):
        pod = await _inspect(podman, "pod", found["Pod"])
        ports |= _ports((pod.get("InfraConfig") or {}).get("PortBindings"))
    healthcheck = found.get("Config", {}).get("Healthcheck") or {}
    return Declared(sorted(ports), healthcheck.get("Test"))


async def is_healthy(podman: Sequence[str], container: str) -> bool:
    """Whether the container's healthcheck was passed when it was last made.

    Raises:
        EngineError: Podman failed.
    """
    found = (await _inspect(podman, "container", container)).get("State", {})
    # Podman before 4.4 calls it Healthcheck.
    health = found.get("Health") or found.get("Healthcheck") or {}
    return health.get("Status") == "healthy"


def _ports(bindings: dict[str, Any] | None) -> set[tuple[str, int]]:
    found = set()
    for name in bindings or {}:
        number, _, protocol = name.partition("/")
        if number.isdigit() and protocol in ("tcp", "udp", ""):
            found.add((protocol or "tcp", int(number)))
    return found


async def _inspect(podman: Sequence[str], kind: str, name: str) -> dict[str, Any]:
    words = [*podman, kind, "inspect", name]
    process = await asyncio.create_subprocess_exec(
        *words,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    output, errors = await process.communicate()
    try:
        if process.returncode:
            raise ValueError(errors.decode(errors="replace").strip().rpartition("\n")[2])
        answer = json.loads(output)
        found: dict[str, Any] = answer[0] if isinstance(answer, list) else answer
    except (ValueError, LookupError) as error:
        raise EngineError(
            what=f"{' '.join(words)} failed",
            why=str(error),
            fix="the container stays awake until its ports are known; see whether podman works",
        ) from error
    return found
