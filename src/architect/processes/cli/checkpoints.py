"""Checkpoints as a table for people: whose state is where, on its way to whom, and what it waits for.

Called by `kubectl architect checkpoints` with what the API server has; it asks nobody itself.
"""

from __future__ import annotations

from architect.adapters.kube.resources import Checkpoint, Claimant, Condition
from architect.decisions.pairing import Phase
from architect.processes.cli import main as local


def show(found: list[Checkpoint], namespaces: bool, wide: bool) -> None:
    """Prints a line for each, in the order given."""
    head = ["NAMESPACE"] if namespaces else []
    head += ["NAME", "POD", "CONTAINERS", "FROM", "PHASE", "CLAIMED-BY", "TO"]
    head += ["SIZE", "CONNECTIONS", "AGE"]
    head += ["OWNER", "DOWNTIME", "ENDPOINT"] if wide else []
    # Free text stands last, where it moves no other column.
    local.table([*head, "WHY"], [_cells(one, namespaces, wide) for one in found])


def _cells(one: Checkpoint, namespaces: bool, wide: bool) -> list[str]:
    spec, status = one.spec, one.status
    claim = status.claimedBy or Claimant()
    cells = [one.metadata.namespace] if namespaces else []
    cells += [
        one.metadata.name,
        spec.podName,
        ",".join(container.name for container in spec.containers),
        spec.nodeName,
        status.phase,
        claim.podName,
        claim.nodeName,
        _size(one),
        str(len(status.move.flows)) if status.move else "",
        local.age(one.metadata.creationTimestamp) if one.metadata.creationTimestamp else "",
    ]
    if wide:
        owner = spec.owner
        cells.append(f"{owner.kind}/{owner.name}" if owner else "")
        cells.append("" if status.downtimeMs is None else f"{status.downtimeMs} ms")
        cells.append(status.endpoint or "")
    return [*cells, why(one)]


def _size(one: Checkpoint) -> str:
    """What its containers take if that is written there, else what has crossed the network."""
    sizes = [container.bytes for container in one.spec.containers]
    known = [size for size in sizes if size is not None]
    size = sum(known) if known and len(known) == len(sizes) else one.status.transferredBytes
    return "" if size is None else f"{size / 2**20:.1f} MiB"


def why(one: Checkpoint) -> str:
    """What a checkpoint waits for, and what has gone wrong on its way; nothing of one that is restored."""
    status = one.status
    claim = status.claimedBy or Claimant()
    waits = {
        Phase.NEW.value: f"waits for {one.spec.nodeName} to offer it",
        Phase.AVAILABLE.value: "waits for a replacement to claim it",
        Phase.CLAIMED.value: f"waits for {claim.nodeName} to start {claim.podName} and fetch it",
        Phase.COMMITTED.value: f"waits for {claim.nodeName} to restore it",
    }
    if status.phase == Phase.RESTORED:
        return ""
    trouble = _trouble(status.conditions or ()) or status.message or ""
    return _printable("; ".join(filter(None, (waits.get(status.phase, ""), trouble))))


def _trouble(conditions: tuple[Condition, ...]) -> str:
    """The last condition that does not hold. Of one second, the last written: it stands last."""
    broken = [one for one in conditions if one.status != "True"]
    if not broken:
        return ""
    last = max(reversed(broken), key=lambda one: one.lastTransitionTime or "")
    return ": ".join(filter(None, (last.reason, last.message)))


def _printable(text: str) -> str:
    """One line. Messages come from other nodes: nothing in them may steer the reader's terminal."""
    line = " ".join(text.split())
    return "".join(letter if letter.isprintable() else "?" for letter in line)
