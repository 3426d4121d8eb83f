"""The pod annotations: their names, their values, and what is wrong with a bad one.

``parse`` turns the annotations of one pod into PodSettings. The runtime's door calls it when a
container is created, the admission webhook when a pod is; both refuse the same values with the same
words. Nothing under our prefix passes in silence: a value takes effect, is refused, or is warned
about. The meaning of each annotation is in docs/reference.md.
"""

from __future__ import annotations

import enum
import json
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

from architect.contract import durations
from architect.contract.errors import InvalidAnnotation, InvalidDuration, quoted

PREFIX = "architect.loopholelabs.io/"
STATUS_LABEL_PREFIX = "status.architect.loopholelabs.io/"
"""The label ``status.architect.loopholelabs.io/<container>`` holds RUNNING or SCALED_DOWN."""

MANAGED_CONTAINERS = PREFIX + "managed-containers"
SCALEDOWN_DURATIONS = PREFIX + "scaledown-durations"
INITIAL_SCALEDOWN_DELAYS = PREFIX + "initial-scaledown-delays"
NETWORK_MONITOR = PREFIX + "network-monitor"
HEALTH_CHECK_PROXY = PREFIX + "health-check-proxy"
SHADOW_PORTS = PREFIX + "shadow-ports"
IGNORE_ACTIVITY_PORTS = PREFIX + "ignore-activity-ports"
POSTMIGRATION_AUTOSCALEUP_CONTAINERS = PREFIX + "postmigration-autoscaleup-containers"
DISABLE_AUTOSCALEDOWN_CONTAINERS = PREFIX + "disable-autoscaledown-containers"
SCALEUP_TIMEOUT_CONTAINERS = PREFIX + "scaleup-timeout-containers"
MIGRATE_EMPTYDIR_CONTAINERS = PREFIX + "migrate-emptydir-containers"
SPARSE_FILES_CONTAINERS = PREFIX + "sparse-files-containers"
REWRITE_LISTENER_ADDRESSES_CONTAINERS = PREFIX + "rewrite-listener-addresses-containers"
REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS = PREFIX + "rewrite-established-addresses-containers"
MANAGED_POD = PREFIX + "managed-pod"
START_FROM_PERSISTENT_CHECKPOINT = PREFIX + "start-from-persistent-checkpoint"

CPU_REQUESTS = PREFIX + "cpu-requests"
MEMORY_REQUESTS = PREFIX + "memory-requests"
EXEC_PROBES = PREFIX + "exec-probes"
TERMINATION_GRACE_PERIOD = PREFIX + "termination-grace-period-seconds"
"""The user's own grace in seconds; admission has raised that of the spec."""
PRE_STOP = PREFIX + "pre-stop"
POST_START = PREFIX + "post-start"
"""JSON {container: LifecycleHandler}, the hooks that architectd runs in the kubelet's place."""

USER_ANNOTATIONS = (
    MANAGED_CONTAINERS,
    SCALEDOWN_DURATIONS,
    INITIAL_SCALEDOWN_DELAYS,
    NETWORK_MONITOR,
    HEALTH_CHECK_PROXY,
    SHADOW_PORTS,
    IGNORE_ACTIVITY_PORTS,
    POSTMIGRATION_AUTOSCALEUP_CONTAINERS,
    DISABLE_AUTOSCALEDOWN_CONTAINERS,
    SCALEUP_TIMEOUT_CONTAINERS,
    MIGRATE_EMPTYDIR_CONTAINERS,
    SPARSE_FILES_CONTAINERS,
    REWRITE_LISTENER_ADDRESSES_CONTAINERS,
    REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS,
    MANAGED_POD,
    START_FROM_PERSISTENT_CHECKPOINT,
)
"""All that users may write."""

MOVING_ANNOTATIONS = (TERMINATION_GRACE_PERIOD, PRE_STOP, POST_START)
"""What admission takes over from the kubelet so that a pod can move."""
OWN_ANNOTATIONS = (CPU_REQUESTS, MEMORY_REQUESTS, EXEC_PROBES, *MOVING_ANNOTATIONS)
"""Those that only we write on a pod: the requests of what sleeps, its exec probes' commands, its hooks."""

MINIMUM_SCALEDOWN_NS = durations.SECOND
MAXIMUM_INITIAL_DELAY_NS = 24 * durations.HOUR
DEFAULT_SCALEDOWN_NS = 60 * durations.SECOND
DEFAULT_SCALEUP_TIMEOUT_NS = 30 * durations.SECOND

# Not compiled here: this is imported at every create, and most patterns are then unused.
_NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,252}"
_DNS_LABEL = r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?"
_DNS_SUBDOMAIN = rf"{_DNS_LABEL}(\.{_DNS_LABEL})*"

T = TypeVar("T")


class Monitor(enum.Enum):
    """What traffic does to a container (network-monitor)."""

    NONE = "none"  # resets the idle clock while awake; only exec and our commands wake
    PACKETS = "packets"  # any TCP or UDP packet to a declared port is activity and wakes
    CONNECTIONS = "connections"  # a new TCP connection wakes, an open one keeps awake


@dataclass(frozen=True, slots=True)
class Defaults:
    """What holds for containers whose annotations say nothing (values of the chart)."""

    scaledown_ns: int = DEFAULT_SCALEDOWN_NS
    """Idle time before hibernation, in nanoseconds."""
    scaleup_timeout_ns: int = DEFAULT_SCALEUP_TIMEOUT_NS
    """How long a starting container waits for a checkpoint to be advertised, in nanoseconds."""
    monitor: Monitor = Monitor.NONE
    """The chart's ``defaultNetworkMonitor``."""


DEFAULTS = Defaults()


@dataclass(frozen=True, slots=True)
class PortMapping:
    """One mapping of shadow-ports or health-check-proxy."""

    container: str
    """Name of the managed container."""
    app_port: int
    """Port on which the application listens."""
    shadow_port: int
    """Port that reaches it without counting as activity."""


@dataclass(frozen=True, slots=True)
class CheckpointName:
    """The PersistentCheckpoint to start from."""

    namespace: str | None
    """Its namespace, None for the pod's own."""
    name: str
    """Its name."""


@dataclass(frozen=True, slots=True)
class ContainerSettings:
    """What the annotations say about one container."""

    name: str
    """Name of the container in its pod."""
    managed: bool = False
    """Whether it is managed at all; if not, nothing below applies."""
    scaledown_ns: int = DEFAULT_SCALEDOWN_NS
    """Idle time before hibernation, in nanoseconds, at least one second."""
    initial_delay_ns: int = 0
    """No hibernation for this long after the first start, in nanoseconds, at most 24 hours."""
    monitor: Monitor = Monitor.NONE
    """What traffic on the declared ports does."""
    autoscaledown: bool = True
    """Whether idleness hibernates it."""
    ignored_ports: frozenset[int] = frozenset()
    """Declared ports whose traffic is no activity."""
    shadow_ports: tuple[PortMapping, ...] = ()
    """Ports that reach the application without counting as activity."""
    health_ports: tuple[PortMapping, ...] = ()
    """Ports on which the proxy answers probes."""
    others_ports: frozenset[int] = frozenset()
    """Shadow ports of the pod, of whatever container, the proxy's included: none is the program's own."""
    autoscaleup_after_migration: bool = False
    """Whether it wakes by itself after a migration."""
    scaleup_timeout_ns: int = DEFAULT_SCALEUP_TIMEOUT_NS
    """How long its start waits for a checkpoint to be advertised, in nanoseconds."""
    migrate_emptydir: bool = False
    """Whether the contents of its emptyDir volumes move with it."""
    sparse_files: tuple[str, ...] = ()
    """Absolute paths recreated as holes at the destination."""
    rewrite_listeners: bool = False
    """Whether listeners bound to the pod's address listen on all addresses after a restore."""
    rewrite_established: bool = False
    """Whether established connections take over the new pod's address at a restore."""


@dataclass(frozen=True, slots=True)
class PodSettings:
    """What the annotations say about one pod."""

    managed_containers: tuple[str, ...] | None = None
    """The managed containers in the user's order; None without the annotation."""
    managed_pod: bool = False
    """Whether the pod is managed as a whole (runsc-architect)."""
    start_from: CheckpointName | None = None
    """The PersistentCheckpoint to restore from at start."""
    warnings: tuple[str, ...] = ()
    """One line each: what has no effect, and what to write instead."""
    containers: Mapping[str, ContainerSettings] = field(default_factory=dict)
    """The settings of the managed containers by name."""

    def container(self, name: str) -> ContainerSettings:
        """Return the settings of a container; one that is not managed has ``managed`` False."""
        return self.containers.get(name) or ContainerSettings(name)


def _did_you_mean(word: str, known: Collection[str], otherwise: str) -> str:
    import difflib  # only for the few pods that have a mistake in them

    close = difflib.get_close_matches(word, sorted(known), n=1)
    return f"did you mean {close[0]}?" if close else otherwise


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object, refusing a repeated key, of which JSON would drop all but the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"it has the key {quoted(key)} twice")
            seen.add(key)
    return found


class _Reader:
    """Reads single annotations of one pod and collects the warnings."""

    def __init__(self, annotations: Mapping[str, str], containers: Collection[str] | None) -> None:
        self._annotations = annotations
        self._containers = containers
        self.warnings: list[str] = []

    def text(self, annotation: str) -> str | None:
        return self._annotations.get(annotation)

    def json(self, annotation: str, kind: type[T], example: str) -> T | None:
        """Return the annotation's JSON value, which must be a ``kind``; None without it."""
        text = self.text(annotation)
        if text is None:
            return None
        fix = f"write for example '{example}'"
        try:
            value = json.loads(text, object_pairs_hook=_unique)
        except RecursionError:
            raise InvalidAnnotation(annotation, None, text, "is nested too deeply", fix) from None
        except ValueError as error:
            raise InvalidAnnotation(annotation, None, text, f"is not JSON: {error}", fix) from error
        if not isinstance(value, kind):
            wanted = "list" if kind is list else "object"
            raise InvalidAnnotation(annotation, None, text, f"is not a JSON {wanted}", fix)
        return value

    def name(self, annotation: str, key: str | None, name: object) -> str:
        """Return ``name`` if it can be, and as far as is known is, a container of this pod."""
        if not isinstance(name, str) or not re.fullmatch(_NAME, name):
            why = "is not the name of a container"
            raise InvalidAnnotation(annotation, key, name, why, "write the name from the manifest")
        if self._containers is not None and name not in self._containers:
            known = ", ".join(sorted(self._containers)) or "none"
            fix = _did_you_mean(name, self._containers, "name one of its containers")
            raise InvalidAnnotation(
                annotation, key, name, f"the pod has no such container (it has: {known})", fix
            )
        return name

    def names(self, annotation: str) -> tuple[str, ...] | None:
        """Return a JSON list of container names without repetitions; None without it."""
        value = self.json(annotation, list, '["app"]')
        if value is None:
            return None
        names = [self.name(annotation, f"[{i}]", name) for i, name in enumerate(value)]
        return tuple(dict.fromkeys(names))

    def by_container(
        self, annotation: str, example: str, read: Callable[[str, str, Any], T]
    ) -> dict[str, T]:
        """Return a JSON object by container, each value as ``read`` returns it."""
        value = self.json(annotation, dict, example)
        return {
            self.name(annotation, key, key): read(annotation, key, item)
            for key, item in (value or {}).items()
        }

    def mappings(self, annotation: str) -> list[PortMapping]:
        """Return the port mappings of shadow-ports or health-check-proxy."""
        example = '{"mappings":[{"containerName":"app","appPort":8080,"shadowPort":9080}]}'
        value = self.json(annotation, dict, example)
        if value is None:
            return []
        fix = f"write for example '{example}'"
        self._unknown_members(annotation, "", value, ("mappings",))
        entries = value.get("mappings")
        if not isinstance(entries, list):
            shown = self.text(annotation)
            raise InvalidAnnotation(annotation, "mappings", shown, "is not a list", fix)
        found = []
        for i, entry in enumerate(entries):
            key = f"mappings[{i}]"
            if not isinstance(entry, dict):
                raise InvalidAnnotation(annotation, key, entry, "is not a JSON object", fix)
            members = ("containerName", "appPort", "shadowPort")
            self._unknown_members(annotation, f"{key}.", entry, members)
            for member in members:
                if member not in entry:
                    why = f"{member} is missing"
                    raise InvalidAnnotation(annotation, key, json.dumps(entry), why, fix)
            mapping = PortMapping(
                self.name(annotation, f"{key}.containerName", entry["containerName"]),
                _port(annotation, f"{key}.appPort", entry["appPort"]),
                _port(annotation, f"{key}.shadowPort", entry["shadowPort"]),
            )
            if mapping.app_port == mapping.shadow_port:
                port, why = mapping.shadow_port, "is the appPort itself"
                fix = "choose a port on which nothing listens"
                raise InvalidAnnotation(annotation, f"{key}.shadowPort", port, why, fix)
            found.append(mapping)
        return found

    def _unknown_members(
        self, annotation: str, path: str, entry: Mapping[str, Any], known: tuple[str, ...]
    ) -> None:
        for member in entry:
            if member not in known:
                hint = _did_you_mean(member, known, f"known are {', '.join(known)}")
                where = f"annotation {annotation}, key {quoted(path + member)}"
                self.warnings.append(f"{where}: unknown, ignored; {hint}")


def _refuse_type(annotation: str, key: str, value: object, why: str, fix: str) -> NoReturn:
    shown = value if isinstance(value, str) else json.dumps(value)
    raise InvalidAnnotation(annotation, key, shown, why, fix)


def _port(annotation: str, key: str, value: object) -> int:
    # JSON's true is an int to Python.
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        _refuse_type(annotation, key, value, "is not a port", "write a number from 1 to 65535")
    return value


def _ports(annotation: str, key: str, value: object) -> frozenset[int]:
    if not isinstance(value, list):
        _refuse_type(annotation, key, value, "is not a list of ports", "write for example [9090]")
    return frozenset(_port(annotation, f"{key}[{i}]", port) for i, port in enumerate(value))


def _paths(annotation: str, key: str, value: object) -> tuple[str, ...]:
    if not isinstance(value, list):
        fix = 'write for example ["/var/cache/app.db"]'
        _refuse_type(annotation, key, value, "is not a list of paths", fix)
    for i, path in enumerate(value):
        where = f"{key}[{i}]"
        if not isinstance(path, str) or not path.startswith("/") or "\0" in path:
            _refuse_type(annotation, where, path, "is not an absolute path", "begin it with /")
        if path.endswith("/") or {".", ".."} & set(path.split("/")):
            why = "is not the plain path of a file"
            _refuse_type(annotation, where, path, why, "leave out . and .. and a closing /")
    return tuple(dict.fromkeys(value))


def _duration(annotation: str, key: str, value: object) -> int:
    if not isinstance(value, str):
        _refuse_type(annotation, key, value, "is not a duration", 'write for example "90s"')
    try:
        found = durations.parse(value)
    except InvalidDuration as error:
        raise InvalidAnnotation(annotation, key, value, error.why, error.fix) from error
    if found < 0:
        raise InvalidAnnotation(annotation, key, value, "is negative", "write 0s or more")
    return found


def _idle_time(annotation: str, key: str, value: object) -> int:
    found = _duration(annotation, key, value)
    if found < MINIMUM_SCALEDOWN_NS:
        least = durations.render(MINIMUM_SCALEDOWN_NS)
        why = f"is below the minimum of {least}"
        raise InvalidAnnotation(annotation, key, value, why, f"write {least} or more")
    return found


def _monitor(annotation: str, key: str, value: object) -> Monitor:
    for mode in (Monitor.PACKETS, Monitor.CONNECTIONS):
        if value == mode.value:
            return mode
    fix = 'write "packets" or "connections", or leave the container out'
    _refuse_type(annotation, key, value, "is not a mode", fix)


def _checkpoint_name(text: str | None) -> CheckpointName | None:
    if text is None:
        return None
    namespace, slash, name = text.rpartition("/")
    if not re.fullmatch(_DNS_SUBDOMAIN, name) or len(name) > 253:
        why = "is not the name of a PersistentCheckpoint"
    elif slash and not re.fullmatch(_DNS_LABEL, namespace):
        why = "does not begin with the name of a namespace"
    else:
        return CheckpointName(namespace or None, name)
    fix = "write its name, or namespace/name, in lower case"
    raise InvalidAnnotation(START_FROM_PERSISTENT_CHECKPOINT, None, text, why, fix)


def _managed_pod(text: str | None) -> bool:
    if text not in (None, "true", "false"):
        fix = 'write "true", or leave it out'
        raise InvalidAnnotation(MANAGED_POD, None, text, "is neither true nor false", fix)
    return text == "true"


def _unknown(annotations: Mapping[str, str]) -> list[str]:
    known = {*USER_ANNOTATIONS, *OWN_ANNOTATIONS}
    warnings = []
    for key in annotations:
        if key.startswith(PREFIX) and key not in known:
            hint = _did_you_mean(key, USER_ANNOTATIONS, "docs/reference.md lists the known ones")
            warnings.append(f"annotation {quoted(key)}: unknown, ignored; {hint}")
    return warnings


def parse(
    annotations: Mapping[str, str],
    containers: Collection[str] | None = None,
    defaults: Defaults = DEFAULTS,
) -> PodSettings:
    """Return what the ``annotations`` of a pod ask for.

    ``containers`` are the names of all the pod's containers; None, where they are not known, leaves
    names unchecked. Annotations of others are not looked at. Raises InvalidAnnotation for a value
    that the contract refuses; what merely has no effect is in the result's ``warnings``.
    """
    read = _Reader(annotations, containers)
    managed_list = read.names(MANAGED_CONTAINERS)
    managed = managed_list or ()
    lists = {
        annotation: read.names(annotation) or ()
        for annotation in (
            DISABLE_AUTOSCALEDOWN_CONTAINERS,
            POSTMIGRATION_AUTOSCALEUP_CONTAINERS,
            MIGRATE_EMPTYDIR_CONTAINERS,
            REWRITE_LISTENER_ADDRESSES_CONTAINERS,
            REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS,
        )
    }
    idle = read.by_container(SCALEDOWN_DURATIONS, '{"app":"30s"}', _idle_time)
    delays = read.by_container(INITIAL_SCALEDOWN_DELAYS, '{"app":"90s"}', _duration)
    monitors = read.by_container(NETWORK_MONITOR, '{"app":"packets"}', _monitor)
    ignored = read.by_container(IGNORE_ACTIVITY_PORTS, '{"app":[9090]}', _ports)
    timeouts = read.by_container(SCALEUP_TIMEOUT_CONTAINERS, '{"app":"60s"}', _duration)
    sparse = read.by_container(SPARSE_FILES_CONTAINERS, '{"app":["/var/cache/app.db"]}', _paths)
    mappings = {
        annotation: read.mappings(annotation) for annotation in (HEALTH_CHECK_PROXY, SHADOW_PORTS)
    }
    managed_pod = _managed_pod(read.text(MANAGED_POD))
    start_from = _checkpoint_name(read.text(START_FROM_PERSISTENT_CHECKPOINT))

    warnings = read.warnings
    for annotation, named in {
        **lists,
        SCALEDOWN_DURATIONS: idle,
        INITIAL_SCALEDOWN_DELAYS: delays,
        NETWORK_MONITOR: monitors,
        IGNORE_ACTIVITY_PORTS: ignored,
        SCALEUP_TIMEOUT_CONTAINERS: timeouts,
        SPARSE_FILES_CONTAINERS: sparse,
    }.items():
        for name in named:
            if name not in managed:
                warnings.append(
                    f"annotation {annotation}, key {quoted(name)}: has no effect, the container is "
                    f"not managed; add it to {MANAGED_CONTAINERS}"
                )
    for name, delay in delays.items():
        if delay > MAXIMUM_INITIAL_DELAY_NS:
            warnings.append(
                f"annotation {INITIAL_SCALEDOWN_DELAYS}, key {quoted(name)}: "
                f"{durations.render(delay)} is beyond the maximum; 24h is used"
            )
    effective = {name: monitors.get(name, defaults.monitor) for name in managed}
    kept = _usable_mappings(mappings, effective, warnings)
    others = frozenset(one.shadow_port for found in kept.values() for one in found)
    warnings.extend(_unknown(annotations))

    return PodSettings(
        managed_containers=managed_list,
        managed_pod=managed_pod,
        start_from=start_from,
        warnings=tuple(warnings),
        containers={
            name: ContainerSettings(
                name=name,
                managed=True,
                scaledown_ns=idle.get(name, defaults.scaledown_ns),
                initial_delay_ns=min(delays.get(name, 0), MAXIMUM_INITIAL_DELAY_NS),
                monitor=effective[name],
                autoscaledown=name not in lists[DISABLE_AUTOSCALEDOWN_CONTAINERS],
                ignored_ports=ignored.get(name, frozenset()),
                shadow_ports=tuple(m for m in kept[SHADOW_PORTS] if m.container == name),
                health_ports=tuple(m for m in kept[HEALTH_CHECK_PROXY] if m.container == name),
                others_ports=others,
                autoscaleup_after_migration=name in lists[POSTMIGRATION_AUTOSCALEUP_CONTAINERS],
                scaleup_timeout_ns=timeouts.get(name, defaults.scaleup_timeout_ns),
                migrate_emptydir=name in lists[MIGRATE_EMPTYDIR_CONTAINERS],
                sparse_files=sparse.get(name, ()),
                rewrite_listeners=name in lists[REWRITE_LISTENER_ADDRESSES_CONTAINERS],
                rewrite_established=name in lists[REWRITE_ESTABLISHED_ADDRESSES_CONTAINERS],
            )
            for name in managed
        },
    )


def _usable_mappings(
    mappings: Mapping[str, list[PortMapping]],
    monitors: Mapping[str, Monitor],
    warnings: list[str],
) -> dict[str, list[PortMapping]]:
    """Return the mappings that can be injected, with a warning for each that cannot.

    ``monitors`` holds the managed containers. One port cannot be the shadow of two, not even of two
    annotations: the pod has one network namespace.
    """
    kept: dict[str, list[PortMapping]] = {annotation: [] for annotation in mappings}
    taken: set[int] = set()
    for annotation, entries in mappings.items():
        for i, mapping in enumerate(entries):
            if mapping.container not in monitors:
                why = f"needs {quoted(mapping.container)} in {MANAGED_CONTAINERS}"
            elif monitors[mapping.container] is Monitor.NONE:
                why = f"needs {quoted(mapping.container)} in {NETWORK_MONITOR}"
            elif mapping.shadow_port in taken:
                why = f"shadowPort {mapping.shadow_port} is taken by another mapping"
            else:
                taken.add(mapping.shadow_port)
                kept[annotation].append(mapping)
                continue
            warnings.append(f"annotation {annotation}, mappings[{i}]: not injected, {why}")
    return kept
