"""The door at which a container is taken in: decides, rewrites its bundle, makes its run directory.

Called for each `create` by architectd, and by architect-admit when no daemon answers, so that both give
the same answer. Unmanaged containers leave no trace.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from architect.adapters import netfilter, netns, podman, rundir, shadowports
from architect.contract import oci, paths
from architect.contract.annotations import SHADOW_PORTS, USER_ANNOTATIONS
from architect.contract.errors import ArchitectError, ContainerRefused
from architect.contract.records import ContainerRecord
from architect.decisions import admission, naming, probes


class BadBundle(ArchitectError):
    """The engine's bundle cannot be read or written."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What is done with a container that is being created."""

    record: ContainerRecord | None
    """Its record, already on the disk; None for an unmanaged one."""
    warnings: tuple[str, ...]
    """One line each, for events."""


def admit(container: str, bundle: str, runtime_root: str, engine_pid: int) -> Answer:
    """Takes a container in, or leaves it to runc.

    Raises:
        ArchitectError: it is refused: a bad annotation, or something that cannot be checkpointed.
    """
    config = Path(bundle) / "config.json"
    spec = _read(config)
    monitor = podman.monitor_words(engine_pid)
    answer = admission.decide(spec, podman.container_name(monitor), os.uname().machine)
    if isinstance(answer, admission.Unmanaged):
        return Answer(None, answer.warnings)
    warnings = answer.warnings
    if answer.container.shadow_ports:
        warnings += _check_translation(answer.identity)
    rootfs = Path(bundle) / oci.root_path(spec)
    annotations = oci.annotations(spec)
    ours = {key: value for key, value in annotations.items() if key in USER_ANNOTATIONS}
    record = ContainerRecord(
        id=container,
        namespace=answer.identity.namespace,
        pod=answer.identity.pod,
        container=answer.identity.container,
        bundle=bundle,
        runtime_root=runtime_root,
        annotations=ours,
        engine=podman.command(monitor),
        rootfs=str(rootfs),
        since=time.time(),
        shared_ipc=oci.namespaces(spec).get("ipc") is not None,
        pod_uid=annotations.get(naming.CRI_SANDBOX_UID, ""),
        sandbox=naming.sandbox_id(annotations),
        ports=naming.kubelet_ports(annotations),
        probes=probes.commands(annotations, answer.identity.container),
    )
    try:
        fresh = config.with_name("config.json.architect")
        fresh.write_text(json.dumps(answer.spec))
        fresh.chmod(config.stat().st_mode & 0o777)
        fresh.rename(config)
        with rundir.held():
            run = paths.CONTAINERS / container
            run.mkdir(mode=0o700, exist_ok=True)
            (run / "meta.json").write_bytes(msgspec.json.encode(record))
            if record.pod_uid and paths.CLUSTER_MARK.exists():
                (run / "movable").touch()
    except OSError as error:
        raise BadBundle(
            what=f"container {answer.identity} cannot be taken in",
            why=str(error),
            fix=f"see to it that {paths.RUN} and the bundle can be written",
        ) from error
    return Answer(record, warnings)


def _check_translation(identity: naming.Identity) -> tuple[str, ...]:
    """Warnings of one that is to have shadow ports."""
    try:
        missing = shadowports.missing()
    except (netfilter.NetfilterError, netns.NetnsError) as error:
        raise ContainerRefused(
            f"container {identity} cannot have shadow ports",
            str(error),
            f"or take annotation {SHADOW_PORTS} away",
        ) from error
    return (f"{identity}: its shadow ports are of IPv4 only: {missing}",) if missing else ()


def _read(config: Path) -> dict[str, Any]:
    try:
        spec = json.loads(config.read_text())
    except (OSError, ValueError) as error:
        raise BadBundle(
            what=f"{config} cannot be read",
            why=str(error),
            fix="remove the container and try again",
        ) from error
    if not isinstance(spec, dict):
        raise BadBundle(what=f"{config} is no OCI bundle", why="it is not a JSON object", fix="")
    return spec
