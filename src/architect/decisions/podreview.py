"""What admission says to a pod or a workload: refuse it, warn about it, or complete it.

The webhooks of architect-manager ask for each object with one of our runtime classes. Objects are
JSON as the API server sends them and are trusted in nothing, not even in their shape. The words of
a refusal are those with which the node would refuse the container (decisions.admission), only
earlier and to the one who can correct it. Nothing is refused that a user has not just written:
labels, finalizers and deletion always work, whatever an older version has let by.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Final

from architect.contract import paths
from architect.contract.annotations import (
    DEFAULTS,
    EXEC_PROBES,
    IGNORE_ACTIVITY_PORTS,
    MANAGED_CONTAINERS,
    MANAGED_POD,
    MOVING_ANNOTATIONS,
    NETWORK_MONITOR,
    OWN_ANNOTATIONS,
    PREFIX,
    START_FROM_PERSISTENT_CHECKPOINT,
    STATUS_LABEL_PREFIX,
    CheckpointName,
    ContainerSettings,
    Defaults,
    Monitor,
    PodSettings,
    parse,
)
from architect.contract.errors import ArchitectError, InvalidAnnotation, quoted
from architect.contract.kubernetes import (
    MOVE_REQUESTED,
    NODE_LABEL,
    PROXY_CONTAINER,
    RUNC_CLASS,
    RUNSC_CLASS,
    SCALED_DOWN,
    WAKE_REQUESTED,
    status_label,
)
from architect.decisions import podmoving, podtraffic
from architect.decisions.admission import Reason
from architect.decisions.distros import LAYOUTS
from architect.decisions.podobject import (
    FieldRefused,
    Object,
    as_object,
    as_objects,
    as_text,
    containers,
    ports,
    runtime_class,
    spec_of,
    strings,
)

CREATE: Final = "CREATE"
UPDATE: Final = "UPDATE"

MOST_WARNINGS: Final = 20
"""Warnings of one answer; the API server cuts them off at 4096 characters in all."""

_RESIZABLE: Final = ("cpu", "memory")
_CONTAINERD: Final = tuple(sorted({PurePosixPath(at.socket).parent for at in LAYOUTS.values()}))
"""Whoever has containerd's sockets owns every container of the node, sleeping ones included."""
_PRIVATE: Final = (
    *(PurePosixPath(p) for p in (paths.RUN, paths.STATE, paths.PREFIX)),
    *_CONTAINERD,
)


class NotTheirs(ArchitectError):
    """Somebody writes what only Architect may write, or reads what is not theirs."""


@dataclass(frozen=True, slots=True)
class Request:
    """One question of the API server."""

    operation: str
    """CREATE or UPDATE; all else is allowed."""
    object: Object
    """The object as it would be stored."""
    old: Object = field(default_factory=dict)
    """The object as it is stored now; empty at CREATE."""
    namespace: str = ""
    """The namespace of both."""
    username: str = ""
    """Who asks, as the API server has authenticated them."""


@dataclass(frozen=True, slots=True)
class Policy:
    """What the installation decides."""

    defaults: Defaults = DEFAULTS
    """What holds for containers whose annotations are silent."""
    trusted: frozenset[str] = frozenset()
    """User names of our own components, which write the states on the pods."""
    proxy: podtraffic.Proxy | None = None
    """The sidecar that answers probes; None if its image is not known."""
    move_grace_s: int = 0
    """The least grace of managed pods, so that a replacement has time to come; 0: their own."""


@dataclass(frozen=True, slots=True)
class Review:
    """The answer."""

    allowed: bool = True
    """Whether the object may be stored."""
    message: str = ""
    """Why not: one line for the user."""
    forbidden: bool = False
    """Whether the refusal is about who asks (403) and not about what is asked for (422)."""
    warnings: tuple[str, ...] = ()
    """One line each, which kubectl prints."""
    patch: tuple[Object, ...] = ()
    """JSON Patch operations (RFC 6902)."""
    needs: CheckpointName | None = None
    """A PersistentCheckpoint of another namespace, which the user must be allowed to get there."""


UNTOUCHED: Final = Review()


def _settings(pod: Object) -> dict[str, str]:
    """The annotations by which users tell us what they want."""
    ours = strings(pod, "annotations").items()
    written = {*OWN_ANNOTATIONS, WAKE_REQUESTED, MOVE_REQUESTED}
    return {k: v for k, v in ours if k.startswith(PREFIX) and k not in written}


def _written_by_us(pod: Object) -> dict[tuple[str, str], str]:
    """The labels and annotations that only Architect writes."""
    labels = strings(pod, "labels").items()
    annotations = strings(pod, "annotations").items()
    return {("label", k): v for k, v in labels if k.startswith(STATUS_LABEL_PREFIX)} | {
        ("annotation", k): v for k, v in annotations if k in OWN_ANNOTATIONS
    }


def _read(pod: Object, annotations: Mapping[str, str], defaults: Defaults) -> PodSettings:
    """Parse, with better words for a container that is there but ends before the others start."""
    known = containers(pod)
    try:
        return parse(annotations, tuple(known), defaults)
    except InvalidAnnotation as error:
        if error.value == PROXY_CONTAINER:
            why = "is Architect's own sidecar, which answers for hibernated containers"
            fix = "take it out: it is never hibernated itself"
            raise InvalidAnnotation(error.annotation, error.key, error.value, why, fix) from error
        init = {as_text(c.get("name")) for c in as_objects(spec_of(pod).get("initContainers"))}
        if not isinstance(error.value, str) or error.value not in init - {*known, ""}:
            raise
        raise InvalidAnnotation(
            error.annotation,
            error.key,
            error.value,
            "is an init container, which has ended when the pod serves",
            "name containers, or init containers with restartPolicy: Always (native sidecars)",
        ) from error


def _managed(pod: Object) -> tuple[str, ...]:
    """The containers that the pod lists; none if the list is bad."""
    text = _settings(pod).get(MANAGED_CONTAINERS)
    if text is None:
        return ()
    try:
        listed = parse({MANAGED_CONTAINERS: text}).managed_containers or ()
    except InvalidAnnotation:
        return ()
    known = containers(pod)
    return tuple(name for name in listed if name in known)


# What is refused.


def _refuse_forged(request: Request, policy: Policy) -> None:
    """Refuse states that somebody else writes: the scheduler and users rely on them."""
    if request.username in policy.trusted:
        return
    new = _written_by_us(request.object)
    old = _written_by_us(request.old) if request.operation == UPDATE else {}
    if request.operation == CREATE and runtime_class(request.object) == RUNC_CLASS:
        # Of a new pod it is ours, whatever its user wrote: complete_pod has seen to that.
        # The others are looked at by podmoving.refuse_forged.
        for annotation in (EXEC_PROBES, *MOVING_ANNOTATIONS):
            new.pop(("annotation", annotation), None)
    for kind, key in sorted({*new, *old}):
        value = new.get((kind, key))
        if value == old.get((kind, key)):
            continue
        shown = "removed" if value is None else f"value {quoted(value)}"
        raise NotTheirs(
            f"{kind} {quoted(key)}, {shown}",
            "it is written by Architect alone",
            "leave it out" if request.operation == CREATE else "leave it as it is",
        )


def _plain(path: str) -> PurePosixPath:
    """The path as the node sees it: ``.`` and ``..`` resolved, /var/run is /run."""
    parts: list[str] = []
    for part in path.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    if parts[:2] == ["var", "run"]:
        del parts[0]
    return PurePosixPath("/", *parts)


def _refuse_host_paths(pod: Object) -> None:
    for i, volume in enumerate(as_objects(spec_of(pod).get("volumes"))):
        source = volume.get("hostPath")
        path = as_text(as_object(source).get("path"))
        if not path:
            continue
        plain = _plain(path)
        where = f"spec.volumes[{i}].hostPath.path"
        fix = "mount a narrower path, or leave out runtimeClassName"
        # /proc/1/root is the host's / again, and so is many another link in there.
        if re.match(r"/proc/([0-9]|self\b|thread-self\b)", str(plain)):
            why = "it leads to files of other processes, Architect's among them"
            raise FieldRefused(where, path, why, fix)
        for private in _PRIVATE:
            if plain == private or plain in private.parents or private in plain.parents:
                whose = (
                    "containerd's sockets" if private in _CONTAINERD else "Architect's own files"
                )
                why = f"it shares {private} with the pod, which holds {whose}"
                raise FieldRefused(where, path, why, fix)


def _refuse_shared_namespaces(pod: Object, listed: Sequence[str]) -> None:
    """Refuse what decisions.admission refuses on the node, in the words of a manifest."""
    if not listed or runtime_class(pod) != RUNC_CLASS:
        return
    which = f"container {quoted(listed[0])} cannot be managed"
    for name, why in (
        ("hostPID", "it runs in the host's pid namespace"),
        ("shareProcessNamespace", "it shares its pid namespace with other containers"),
        ("hostNetwork", "it runs in the host's network namespace"),
    ):
        if spec_of(pod).get(name) is True:
            fix = f"remove {name}, or take it out of {MANAGED_CONTAINERS}"
            raise FieldRefused(f"spec.{name}", "true", f"{which}: {why}", fix)


# What is warned about.


def _port_warnings(settings: ContainerSettings, declared: set[tuple[str, int]]) -> list[str]:
    name = quoted(settings.name)
    warnings = []
    shadows = {one.shadow_port for one in (*settings.shadow_ports, *settings.health_ports)}
    declared = {(protocol, number) for protocol, number in declared if number not in shadows}
    if settings.monitor is Monitor.NONE:
        if declared and settings.autoscaledown:
            warnings.append(
                f"container {name} declares ports but is not in {NETWORK_MONITOR}: traffic does "
                "not wake it and is dropped while it is hibernated, only kubectl exec wakes it"
            )
    elif not declared:
        warnings.append(
            f"container {name} declares no ports, so no traffic wakes it; declare them under ports"
        )
    elif settings.monitor is Monitor.CONNECTIONS and all(p != "TCP" for p, _ in declared):
        warnings.append(
            f"container {name} declares no TCP port, so no connection wakes it; "
            f'write "packets" in {NETWORK_MONITOR}'
        )
    undeclared = settings.ignored_ports - {number for _, number in declared}
    if undeclared:
        numbers = ", ".join(map(str, sorted(undeclared)))
        warnings.append(
            f"annotation {IGNORE_ACTIVITY_PORTS}, key {name}: has no effect on ports that the "
            f"container does not declare ({numbers})"
        )
    return warnings


def _resize_warnings(name: str, container: Object) -> list[str]:
    """Of resources that are not given back, because that would restart the container (resources)."""
    return [
        f"container {quoted(name)} keeps its request of {resource} while it is hibernated, because "
        f"its resizePolicy says RestartContainer; write NotRequired"
        for policy in as_objects(container.get("resizePolicy"))
        if (resource := policy.get("resourceName")) in _RESIZABLE
        and policy.get("restartPolicy") == "RestartContainer"
    ]


def _container_warnings(pod: Object, settings: PodSettings) -> list[str]:
    warnings = []
    for name, (_, container) in containers(pod).items():
        chosen = settings.container(name)
        if not chosen.managed:
            continue
        if container.get("tty") is True:
            warnings.append(
                f"container {quoted(name)} is not managed: {Reason.TERMINAL.value}, which no "
                "checkpoint can hold; leave out tty"
            )
            continue
        warnings += _port_warnings(chosen, ports(container))
        warnings += _resize_warnings(name, container)
    return warnings


def _traffic_warnings(pod: Object, settings: PodSettings) -> list[str]:
    return podtraffic.warnings(pod, settings) if runtime_class(pod) == RUNC_CLASS else []


def _class_warnings(pod: Object, settings: PodSettings) -> list[str]:
    """What the runtime class and the annotations do not agree about."""
    if runtime_class(pod) == RUNSC_CLASS:
        warnings = []
        if settings.managed_containers:
            warnings.append(
                f"annotation {MANAGED_CONTAINERS}: has no effect with runtimeClassName "
                f'{RUNSC_CLASS}, which manages whole pods; write {MANAGED_POD}: "true"'
            )
        if not settings.managed_pod:
            warnings.append(
                f"nothing is managed: runtimeClassName is {RUNSC_CLASS}, but the annotation "
                f'{MANAGED_POD} is not "true"'
            )
        return warnings
    warnings = []
    if settings.managed_pod:
        warnings.append(f"annotation {MANAGED_POD}: only the runtime {RUNSC_CLASS} honours it")
    if settings.managed_containers is None:
        warnings.append(
            f"nothing is managed: runtimeClassName is {RUNC_CLASS}, but there is no annotation "
            f"{MANAGED_CONTAINERS}; write for example '[\"app\"]'"
        )
    return warnings


def _started(pod: Object, name: str) -> bool:
    """Whether the container has been created on a node already."""
    status = as_object(pod.get("status"))
    for kind in ("containerStatuses", "initContainerStatuses"):
        for container in as_objects(status.get(kind)):
            if container.get("name") == name and container.get("containerID"):
                return True
    return False


def _few(warnings: Sequence[str]) -> tuple[str, ...]:
    """The warnings without repetitions, and no more of them than anybody reads."""
    distinct = list(dict.fromkeys(" ".join(w.split()) for w in warnings))
    if len(distinct) > MOST_WARNINGS:
        more = len(distinct) - MOST_WARNINGS + 1
        distinct[MOST_WARNINGS - 1 :] = [f"and {more} more warnings"]
    return tuple(distinct)


def _elsewhere(settings: PodSettings, namespace: str) -> CheckpointName | None:
    start = settings.start_from
    return start if start and start.namespace and start.namespace != namespace else None


# The questions.


def _created(request: Request, policy: Policy) -> Review:
    pod = request.object
    _refuse_forged(request, policy)
    _refuse_host_paths(pod)
    if runtime_class(pod) == RUNC_CLASS:
        podtraffic.refuse_namesake(pod)
    settings = _read(pod, _settings(pod), policy.defaults)
    listed = settings.managed_containers or ()
    _refuse_shared_namespaces(pod, listed)
    moving: list[str] = []
    if runtime_class(pod) == RUNC_CLASS:
        podmoving.refuse_forged(pod, settings)
        podmoving.refuse_other_moves(pod, None)
        moving = podmoving.left_to_the_kubelet(pod, settings)
    return Review(
        warnings=_few(
            [
                *settings.warnings,
                *_class_warnings(pod, settings),
                *_container_warnings(pod, settings),
                *moving,
                *_traffic_warnings(pod, settings),
                *podtraffic.uninjected(settings, policy.proxy),
            ]
        ),
        needs=_elsewhere(settings, request.namespace),
    )


def _updated(request: Request, policy: Policy) -> Review:
    _refuse_forged(request, policy)
    pod = request.object
    if runtime_class(pod) == RUNC_CLASS:
        podmoving.refuse_other_moves(pod, request.old)
    old, new = _settings(request.old), _settings(pod)
    if old == new:
        return UNTOUCHED
    warnings: list[str] = []
    left = dict(new)
    while True:
        try:
            settings = _read(pod, left, policy.defaults)
            break
        except InvalidAnnotation as error:
            # Was it let by before we were installed? Then whoever changes another is not to blame.
            if old.get(error.annotation) != new[error.annotation]:
                raise
            del left[error.annotation]
            warnings.append(str(error))
    before = _managed(request.old)
    added = [name for name in settings.managed_containers or () if name not in before]
    _refuse_shared_namespaces(pod, added)
    warnings += settings.warnings
    warnings += _container_warnings(pod, settings)
    warnings += _traffic_warnings(pod, settings)
    if runtime_class(pod) == RUNC_CLASS:
        warnings += podtraffic.fixed(pod, settings)
        warnings += [
            f"container {quoted(name)} has started unmanaged; it becomes managed at its next start"
            for name in added
            if _started(pod, name)
        ]
    touched = old.get(START_FROM_PERSISTENT_CHECKPOINT) != new.get(START_FROM_PERSISTENT_CHECKPOINT)
    return Review(
        warnings=_few(warnings),
        needs=_elsewhere(settings, request.namespace) if touched else None,
    )


_POD_CHECKS: Final[Mapping[str, Callable[[Request, Policy], Review]]] = {
    CREATE: _created,
    UPDATE: _updated,
}


def review_pod(request: Request, policy: Policy) -> Review:
    """Return whether a pod may be stored, and the warnings. Never raises, whatever the shape."""
    check = _POD_CHECKS.get(request.operation)
    if check is None or runtime_class(request.object) is None:
        return UNTOUCHED
    try:
        return check(request, policy)
    except ArchitectError as refusal:
        forbidden = isinstance(refusal, NotTheirs)
        return Review(allowed=False, message=str(refusal), forbidden=forbidden)


def complete_pod(request: Request, policy: Policy) -> Review:
    """Return the patch that a new pod needs. Patched once, it needs no more.

    Only what its node cannot do, because it is fixed at creation: the resize policies that let a
    sleeper give back its requests without being restarted, the hooks and the grace that a move must not meet
    (decisions.podmoving), and what decisions.podtraffic adds. Defaults
    are the node's (its flags), and Go programs, which would otherwise use io_uring or Multipath TCP,
    need nothing here either: the node's seccomp rules see to it (decisions.seccomp).
    """
    pod = request.object
    if request.operation != CREATE or runtime_class(pod) != RUNC_CLASS:
        return UNTOUCHED
    try:
        settings = _read(pod, _settings(pod), policy.defaults)
    except InvalidAnnotation:
        settings = None  # review_pod refuses it, in its own words.
    patch = _resizable(pod)
    if settings is not None:
        patch += podmoving.operations(pod, settings, policy.move_grace_s)
    # Last: it moves the init containers, by whose indexes the others are.
    patch += podtraffic.operations(pod, settings, policy.proxy)
    return Review(patch=tuple(patch), warnings=podtraffic.overwritten(pod))


def _resizable(pod: Object) -> list[Object]:
    """Resize policies that restart nothing, for the managed containers that have none."""
    listed = _managed(pod)
    patch: list[Object] = []
    for name, (place, container) in containers(pod).items():
        there = container.get("resizePolicy") or []
        if name not in listed or not isinstance(there, list):
            continue
        known = [policy.get("resourceName") for policy in as_objects(there)]
        missing = [
            {"resourceName": resource, "restartPolicy": "NotRequired"}
            for resource in _RESIZABLE
            if resource not in known
        ]
        if missing:
            value = [*there, *missing]
            patch.append({"op": "add", "path": f"{place}/resizePolicy", "value": value})
    return patch


def _template(workload: Object) -> Object:
    spec = spec_of(workload)
    if "jobTemplate" in spec:
        spec = spec_of(as_object(spec.get("jobTemplate")))
    return as_object(spec.get("template"))


def _is_owned(workload: Object) -> bool:
    """Whether a controller has written it, which reads no warnings: its own template was warned of."""
    owners = as_objects(as_object(workload.get("metadata")).get("ownerReferences"))
    return any(owner.get("controller") is True for owner in owners)


def review_workload(request: Request, policy: Policy) -> Review:
    """Return the warnings about a workload's pod template; it is never refused. Never raises.

    A Deployment's pods are created by a controller, whose events few people read: what will be
    refused or without effect then is said now.
    """
    workload = request.object
    if request.operation not in _POD_CHECKS or _is_owned(workload):
        return UNTOUCHED
    template, misplaced = _template(workload), _settings(workload)
    before = _template(request.old), _settings(request.old)
    if request.operation == UPDATE and before == (template, misplaced):
        return UNTOUCHED
    kind = as_text(workload.get("kind")) or "workload"
    settings = _settings(template)
    warnings = [
        f"annotation {quoted(key)} on the {kind} itself has no effect; "
        "write it under metadata of the pod template"
        for key in misplaced
        if key not in settings
    ]
    if runtime_class(template) is None:
        if settings:
            names = ", ".join(quoted(key) for key in settings)
            warnings.append(
                f"annotations have no effect without runtimeClassName: {RUNC_CLASS} ({names})"
            )
    else:
        review = review_pod(Request(CREATE, template, namespace=request.namespace), policy)
        if runtime_class(template) == RUNC_CLASS:
            warnings += podtraffic.overwritten(template)
        warnings += review.warnings
        if not review.allowed:
            warnings.append(f"pods of this {kind} will be refused: {review.message}")
        elif runtime_class(template) == RUNC_CLASS:
            read = _read(template, settings, policy.defaults)
            warnings += podmoving.warnings(kind, template, read)
        if kind == "DaemonSet" and _node_selector(template).get(NODE_LABEL) != "true":
            # Its controller makes a pod for each node that the template allows; it knows no classes.
            warnings.append(
                f"its pods stay Pending on nodes without the label {NODE_LABEL}=true: add it to "
                "the pod template's spec.nodeSelector"
            )
    return Review(warnings=_few(warnings))


def _node_selector(template: Object) -> Object:
    return as_object(as_object(template.get("spec")).get("nodeSelector"))


def refuse_checkpoint(needed: CheckpointName, username: str, failure: str = "") -> Review:
    """Return the refusal of a pod that would start from a checkpoint that is not its user's.

    ``failure`` is why the user's rights could not be found out, if that is so.
    """
    shown = f"{needed.namespace}/{needed.name}"
    why = (
        f"whether {quoted(username)} may get it could not be found out: {failure}"
        if failure
        else f"{quoted(username)} may not get persistentcheckpoints in namespace "
        f"{quoted(needed.namespace)}"
    )
    fix = (
        "try again"
        if failure
        else "grant that verb there by a RoleBinding (for pods of a Deployment: to those who "
        "create them, or create the pod yourself), or use a checkpoint of the pod's own namespace"
    )
    where = f"annotation {START_FROM_PERSISTENT_CHECKPOINT}, value {quoted(shown)}"
    return Review(allowed=False, message=str(NotTheirs(where, why, fix)), forbidden=True)


def is_asleep(pod: Object, container: str | None = None) -> bool:
    """Whether the container (None: any) of a pod of ours is hibernated, by the pod's label."""
    if runtime_class(pod) is None:
        return False
    labels = strings(pod, "labels")
    if container:
        return labels.get(status_label(container)) == SCALED_DOWN
    return any(k.startswith(STATUS_LABEL_PREFIX) and v == SCALED_DOWN for k, v in labels.items())
