"""What must be known of a container, and seen to, before it is dumped or its idleness can be judged.

Called by :class:`.container.ManagedContainer`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from architect.adapters import bindable, criu, listeners, mounts, podman, sysvipc, warm
from architect.adapters.cgroup import Cgroup
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord
from architect.decisions import probes


class NotAsleep(ArchitectError):
    """The container could not be hibernated."""


async def prepare(record: ContainerRecord, run: Path, init: int, group: Cgroup) -> criu.Subject:
    """Everything CRIU must be told; makes sure that the restore will find what it needs.

    Raises:
        ArchitectError: the container has something that would be lost, or is not ready yet.
    """
    name = f"{record.pod}/{record.container}"
    record.own_ipc = not record.shared_ipc
    if record.shared_ipc and sysvipc.objects(record.keeper):
        others = sysvipc.neighbours(record.keeper, group.processes(), record.sandbox)
        if others:
            raise NotAsleep(
                what=f"{name} cannot be hibernated",
                why="its pod shares System V IPC objects between containers",
                fix="give it a pod of its own, or list it in disable-autoscaledown-containers",
            )
        record.own_ipc = True
    # In threads: /proc/net/tcp alone takes ten milliseconds where the kernel's tables are large.
    _, record.warm = await asyncio.gather(
        asyncio.to_thread(_make_bindable, record.keeper, group, name),
        asyncio.to_thread(warm.cached_extents, init, record.rootfs),
    )
    if record.mounts is None:
        record.mounts = await mounts.keep(init, run / "mnt")
    record.pipes = criu.stdio(init, record.keeper)
    return criu.Subject(
        init=init,
        keeper=record.keeper,
        rootfs=record.rootfs,
        netns_inode=Path(f"/proc/{record.keeper}/ns/net").stat().st_ino,
        mounts=record.mounts,
        pipes=record.pipes,
        join=[kind for kind in ("ipc", "uts") if not _is_host_namespace(init, kind)],
    )


def arriving(record: ContainerRecord, init: int, pipes: Mapping[str, int]) -> criu.Subject:
    """What CRIU must be told to restore a checkpoint of another node in the place of ``init``.

    ``pipes`` are named as at its dump: the keeper's descriptors stand for them by their numbers.
    """
    return criu.Subject(
        init=init,
        keeper=record.keeper,
        rootfs=record.rootfs,
        netns_inode=Path(f"/proc/{record.keeper}/ns/net").stat().st_ino,
        mounts=record.mounts or [],
        pipes=dict(pipes),
        join=[kind for kind in ("ipc", "uts") if not _is_host_namespace(init, kind)],
    )


def _make_bindable(keeper: int, group: Cgroup, name: str) -> None:
    """See :mod:`architect.adapters.bindable`."""
    pids = [pid for pid in group.processes() if pid != keeper]
    listened = listeners.listening(keeper, pids)
    tcp = {number for protocol, number in listened if protocol == "tcp"}
    bindable.reserve(keeper, {number for _, number in listened})
    if not bindable.allow_reuse(pids):
        return
    if bindable.unfinished(keeper, tcp):
        raise NotAsleep(
            what=f"{name} is not hibernated yet",
            why="connections that it has closed still have data on the way",
            fix="none needed: it is tried again",
        )
    bindable.clear_finished(keeper, tcp)


def _is_host_namespace(pid: int, kind: str) -> bool:
    mine = Path(f"/proc/self/ns/{kind}").stat().st_ino
    return Path(f"/proc/{pid}/ns/{kind}").stat().st_ino == mine


async def declared_ports(record: ContainerRecord, group: Cgroup) -> list[tuple[str, int]]:
    """Ports (protocol, number) that are the container's own.

    An engine knows the ports of a pod, not whose they are: all are the container's but those on which
    somebody else in the pod listens. Podman's healthcheck is noted in the record.

    Raises:
        ArchitectError: the engine cannot be asked.
    """
    if not record.engine:
        raise ArchitectError(
            what=f"{record.pod}/{record.container} stays awake",
            why="its declared ports are unknown: the kubelet's annotations do not reach the runtime",
            fix='give containerd\'s runtime handler container_annotations ["io.kubernetes.container.*"]',
        )
    ports, healthcheck = await podman.declared(record.engine, record.id)
    record.probes = probes.healthcheck(healthcheck)
    if not shares_ports(record):
        return ports
    own, others = listened(record, group)
    return [port for port in ports if port in own or port not in others]


def shares_ports(record: ContainerRecord) -> bool:
    """Whether the engine told the ports of its whole pod."""
    return bool(record.engine) and record.pod != record.container


def listened(
    record: ContainerRecord, group: Cgroup
) -> tuple[set[tuple[str, int]], set[tuple[str, int]]]:
    """Declared ports on which the container listens now, and all on which only others of its pod do."""
    own = listeners.listening(record.keeper, group.processes())
    others = listeners.listening(record.keeper) - own
    return own & set(record.ports or own), others


async def is_healthy(record: ContainerRecord) -> bool:
    """Whether its healthcheck, if it has one, was passed when Podman last made it.

    In a cluster the kubelet probes, and says so by the pod's status. An engine that gives no answer must not
    keep everything awake.
    """
    if not record.probes or not record.engine:
        return True
    try:
        return await podman.is_healthy(record.engine, record.id)
    except ArchitectError:
        return True


async def other_ports(record: ContainerRecord, group: Cgroup) -> list[tuple[str, int]]:
    """Local ports (protocol, number) of its sockets that the gate does not know yet."""
    known = {*(record.ports or ()), *record.quiet}
    found = await asyncio.to_thread(listeners.local, record.keeper, group.processes(), known)
    return sorted(found)
