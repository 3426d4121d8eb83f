"""Whether a container that an engine is about to create is managed, and with which specification.

``decide`` is asked once per ``create`` by the runtime's door. It reads nothing but the OCI
specification and the engine's own name for the container, and has three answers: leave it to runc
as it is (Unmanaged), take it with a changed specification (Managed), or refuse the create
(InvalidAnnotation, ContainerRefused), which the engine shows to its user.
"""

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from architect.contract import oci
from architect.contract.annotations import (
    DEFAULTS,
    MANAGED_CONTAINERS,
    MANAGED_POD,
    PREFIX,
    ContainerSettings,
    Defaults,
    PodSettings,
    parse,
)
from architect.contract.errors import ContainerRefused
from architect.decisions import naming, seccomp


class Reason(enum.Enum):
    """Why a container is left to runc as it is."""

    NOT_ASKED = "no managed-containers annotation"  # the pod has nothing to do with us
    SANDBOX = "the pod's own infrastructure container"  # pause or infra: it runs no program
    NO_NAME = "the engine does not tell the container's name"  # Docker keeps it to itself
    NOT_LISTED = "not listed in managed-containers"  # a neighbour of managed containers
    TERMINAL = "it has a terminal"  # the other end is the user's, outside every checkpoint


_REASONS = {
    naming.Nameless.SANDBOX: Reason.SANDBOX,
    naming.Nameless.NO_NAME: Reason.NO_NAME,
    naming.Nameless.NOT_LISTED: Reason.NOT_LISTED,
}


@dataclass(frozen=True, slots=True)
class Unmanaged:
    """The container is runc's alone."""

    reason: Reason
    """Why."""
    warnings: tuple[str, ...] = ()
    """One line each, for the log and the events: what the user may have meant otherwise."""


@dataclass(frozen=True, slots=True)
class Managed:
    """The container is ours."""

    identity: naming.Identity
    """Who it is."""
    settings: PodSettings
    """What its pod's annotations say."""
    container: ContainerSettings
    """What they say about itself."""
    spec: dict[str, Any]
    """The specification to create it from."""
    warnings: tuple[str, ...] = ()
    """One line each, for the log and the events."""


Admission = Unmanaged | Managed


def decide(
    spec: Mapping[str, Any],
    engine_name: str | None,
    machine: str,
    defaults: Defaults = DEFAULTS,
) -> Admission:
    """Return what to do with the container that ``spec`` (a parsed config.json) describes.

    ``engine_name`` is the engine's own name for it (conmon's ``-n``), None where there is none;
    ``machine`` is uname(2)'s; ``defaults`` hold where annotations are silent. ``spec`` is not
    changed. Raises InvalidAnnotation for an annotation's bad value and ContainerRefused for a
    managed container that cannot be checkpointed.
    """
    annotations = oci.annotations(spec)
    if not any(key.startswith(PREFIX) for key in annotations):
        return Unmanaged(Reason.NOT_ASKED)
    if naming.is_known_sandbox(annotations):
        return Unmanaged(Reason.SANDBOX)
    lone = naming.lone_container(annotations, engine_name)
    settings = parse(annotations, None if lone is None else (lone,), defaults)
    warnings = settings.warnings
    if settings.managed_pod:
        warnings += (f"annotation {MANAGED_POD}: only the runtime runsc-architect honours it",)
    if settings.managed_containers is None:
        return Unmanaged(Reason.NOT_ASKED, warnings)
    identity = naming.resolve(annotations, engine_name, settings.managed_containers)
    if isinstance(identity, naming.Nameless):
        reason = _REASONS[identity]
        if reason is Reason.NO_NAME and settings.managed_containers:
            warnings += (f"annotation {MANAGED_CONTAINERS}: has no effect, {reason.value}",)
        return Unmanaged(reason, warnings)
    if oci.terminal(spec):
        warnings += (
            f"container {identity} is not managed: {Reason.TERMINAL.value}, which no checkpoint "
            "can hold; leave out tty (-t)",
        )
        return Unmanaged(Reason.TERMINAL, warnings)
    _require_own_namespaces(spec, identity)
    hardened = seccomp.harden(oci.seccomp(spec), machine)
    if hardened.untouched:
        calls = ", ".join(hardened.untouched)
        warnings += (
            f"container {identity}: the seccomp profile's rules for {calls} were left as they are; "
            "a program that uses io_uring or Multipath TCP will not hibernate",
        )
    return Managed(
        identity=identity,
        settings=settings,
        container=settings.container(identity.container),
        spec=oci.with_seccomp(spec, hardened.profile),
        warnings=warnings,
    )


def _require_own_namespaces(spec: Mapping[str, Any], identity: naming.Identity) -> None:
    """Refuse a container whose processes or sockets are not its own (or its pod's) alone.

    CRIU restores a process under the pid it had, which must be free, and its connections under the
    addresses they had, whose packets we must be able to hold without holding those of the host.
    """
    namespaces = oci.namespaces(spec)
    what = f"container {identity} cannot be managed"
    remove = f"or take it out of {MANAGED_CONTAINERS}"
    if "pid" not in namespaces:
        why = "it runs in the host's pid namespace"
        raise ContainerRefused(what, why, f"remove hostPID (--pid host), {remove}")
    if namespaces["pid"] is not None:
        why = "it shares its pid namespace with other containers"
        fix = f"remove shareProcessNamespace (--pid container:…), {remove}"
        raise ContainerRefused(what, why, fix)
    if "network" not in namespaces:
        why = "it runs in the host's network namespace"
        raise ContainerRefused(what, why, f"remove hostNetwork (--network host), {remove}")
