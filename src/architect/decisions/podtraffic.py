"""What admission does about a pod's traffic: shadow ports, the probes' sidecar, exec probes.

Called by decisions.podreview. ``operations`` are the JSON Patch that a new pod needs so that probes and
scrapes neither wake its containers nor fail while they are hibernated; ``warnings`` say which of them
still would. docs/reference.md has the rules as users read them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any, Final

from architect.contract import paths
from architect.contract.annotations import (
    EXEC_PROBES,
    HEALTH_CHECK_PROXY,
    ContainerSettings,
    PodSettings,
    PortMapping,
)
from architect.contract.errors import quoted
from architect.contract.kubernetes import MANAGER, PROXY_CONTAINER
from architect.contract.quantities import InvalidQuantity
from architect.decisions import resources
from architect.decisions.podobject import (
    CONTAINERS,
    INIT_CONTAINERS,
    FieldRefused,
    Object,
    as_object,
    as_objects,
    as_text,
    containers,
    is_sidecar,
    ports,
    spec_of,
    strings,
)

_COMMAND: Final = (str(paths.PROXY_PROGRAM),)
"""By this a sidecar is known as ours: others may have changed its image (to a mirror's), its resources
and its mounts."""
_USER: Final = 65532
"""As the components; the chart's pods have the same."""
_REQUESTED: Final = {"cpu": "1m", "memory": "4Mi"}
"""What it uses, rounded up: it sleeps between probes."""
_LIMITED: Final = {"cpu": "20m", "memory": "16Mi"}
"""Where it must have limits. They hold for runc's own start in it too, a Go program of some 10 MiB and
10 ms of CPU, which is what makes them larger than the program."""
_ZERO: Final = dict.fromkeys(resources.GIVEN, "0")
_LASTING: Final = ("readinessProbe", "livenessProbe")
_PROBES: Final = ("startupProbe", *_LASTING)
_UNPRIVILEGED_PORT: Final = 1024
"""The lowest port that a program without privileges may listen on: ip_unprivileged_port_start."""
_REFERENCE: Final = re.compile(r"\$(?:\$|\(([^)]*)\))")


@dataclass(frozen=True, slots=True)
class Proxy:
    """What the sidecar is started from."""

    image: str
    """The components' image."""
    pull_policy: str = "IfNotPresent"
    """imagePullPolicy, the manager's own: the nodes have the image already, for architectd's sake."""


# What is there.


def _own(pod: Object) -> tuple[str, Object] | None:
    """The sidecar if the pod has it already, and its place as a JSON pointer."""
    for kind in (INIT_CONTAINERS, CONTAINERS):
        for i, container in enumerate(as_objects(spec_of(pod).get(kind))):
            runs = kind == CONTAINERS or is_sidecar(container)
            ours = container.get("command") == list(_COMMAND)
            if container.get("name") == PROXY_CONTAINER and runs and ours:
                return f"/spec/{kind}/{i}", container
    return None


def _every(pod: Object) -> list[Object]:
    """All containers but the sidecar; those that end are counted for requests too."""
    spec = spec_of(pod)
    both = as_objects(spec.get(INIT_CONTAINERS)) + as_objects(spec.get(CONTAINERS))
    return [one for one in both if one.get("name") != PROXY_CONTAINER]


def refuse_namesake(pod: Object) -> None:
    """Refuse a container of the sidecar's name that is none of ours. Raises FieldRefused."""
    if _own(pod) is not None:
        return
    for kind in (INIT_CONTAINERS, CONTAINERS):
        for i, container in enumerate(as_objects(spec_of(pod).get(kind))):
            if container.get("name") == PROXY_CONTAINER:
                where = f"spec.{kind}[{i}].name"
                why = "it is the name of the sidecar that Architect adds for health-check-proxy"
                raise FieldRefused(where, PROXY_CONTAINER, why, "give the container another name")


def health_mappings(settings: PodSettings) -> tuple[PortMapping, ...]:
    """The mappings that the sidecar serves, container by container."""
    return tuple(chain.from_iterable(one.health_ports for one in settings.containers.values()))


# What is added.


def exec_probes(pod: Object) -> dict[str, list[list[str]]]:
    """The commands of the containers' exec probes, as the kubelet runs them, by container.

    Of every container that can be managed: which of them are is the user's to change later.
    """
    found: dict[str, list[list[str]]] = {}
    for name, (_, container) in containers(pod).items():
        values = {
            as_text(one.get("name")): as_text(one.get("value"))
            for one in as_objects(container.get("env"))
        }
        for kind in _PROBES:
            command = as_object(as_object(container.get(kind)).get("exec")).get("command")
            if not isinstance(command, list) or not command:
                continue
            argv = [_expanded(word, values) for word in command if isinstance(word, str)]
            known = found.setdefault(name, [])
            if len(argv) == len(command) and argv not in known:
                known.append(argv)
    return {name: known for name, known in found.items() if known}


def _expanded(word: str, values: Mapping[str, str]) -> str:
    """The word as the kubelet runs it: $(NAME) replaced if env has it, $$ for a dollar.

    Source: third_party/forked/golang/expansion and ExpandContainerCommandOnlyStatic of Kubernetes.
    """

    def read(found: re.Match[str]) -> str:
        name = found[1]
        return "$" if name is None else values.get(name, found[0])

    return _REFERENCE.sub(read, word)


def operations(pod: Object, settings: PodSettings | None, proxy: Proxy | None) -> list[Object]:
    """Return the JSON Patch (RFC 6902) that the pod needs; none if it has been patched.

    ``settings`` is None for annotations that will be refused; ``proxy`` is None if the sidecar's
    image is not known.
    """
    patch = _annotated(pod)
    if settings is not None:
        patch += _with_ports(pod, settings)
        # Last: it moves the init containers, by whose indexes the others are.
        patch += _with_sidecar(pod, settings, proxy)
    return patch


def _annotation(pod: Object) -> str | None:
    """The annotation's value; None if there is nothing to write."""
    probes = exec_probes(pod)
    return json.dumps(probes, separators=(",", ":"), ensure_ascii=False) if probes else None


def _annotated(pod: Object) -> list[Object]:
    value, there = _annotation(pod), strings(pod, "annotations").get(EXEC_PROBES)
    path = "/metadata/annotations/" + EXEC_PROBES.replace("/", "~1")
    if value == there:
        return []
    if value is None:
        return [{"op": "remove", "path": path}]
    if not as_object(pod.get("metadata")).get("annotations"):
        return [{"op": "add", "path": "/metadata/annotations", "value": {EXEC_PROBES: value}}]
    return [{"op": "add", "path": path, "value": value}]


def _with_ports(pod: Object, settings: PodSettings) -> list[Object]:
    """Declare the shadow ports, so that Services and monitors find them by number and by name.

    Those that the sidecar serves are declared by the container that they stand for: a probe's named
    port is looked for there alone, and one declared twice would be warned of at each pod.
    """
    every = [port for one in _every(pod) for port in as_objects(one.get("ports"))]
    taken = {as_text(port.get("name")) for port in every}
    patch: list[Object] = []
    for name, (place, container) in containers(pod).items():
        chosen, declared = settings.container(name), ports(container)
        there = container.get("ports") or []
        if not isinstance(there, list):
            continue
        added: list[Object] = []
        for label, protocol, number in _shadows(chosen, declared):
            if (protocol, number) in declared:
                continue
            port: dict[str, Any] = {"containerPort": number, "protocol": protocol}
            # A port needs no name, and a Service finds the first of two by one name only.
            if label not in taken:
                port["name"] = label
                taken.add(label)
            added.append(port)
        if added:
            patch.append({"op": "add", "path": f"{place}/ports", "value": [*there, *added]})
    return patch


def _shadows(
    chosen: ContainerSettings, declared: set[tuple[str, int]]
) -> Iterator[tuple[str, str, int]]:
    """Name (of 15 characters at most), protocol and number of the ports to declare."""
    numbers = {mapping.shadow_port for mapping in chosen.shadow_ports}
    for mapping in chosen.shadow_ports:
        yield f"shadow-{mapping.shadow_port}", "TCP", mapping.shadow_port
        if ("UDP", mapping.app_port) in declared and mapping.app_port not in numbers:
            yield f"shadow-{mapping.shadow_port}-u", "UDP", mapping.shadow_port
    for mapping in chosen.health_ports:
        yield f"probe-{mapping.shadow_port}", "TCP", mapping.shadow_port


def _with_sidecar(pod: Object, settings: PodSettings, proxy: Proxy | None) -> list[Object]:
    mappings, found = health_mappings(settings), _own(pod)
    if found is not None:
        place, container = found
        if not mappings:
            return [{"op": "remove", "path": place}]
        if container.get("args") == _arguments(mappings):
            return []
        return [{"op": "add", "path": f"{place}/args", "value": _arguments(mappings)}]
    spec = spec_of(pod)
    there = spec.get(INIT_CONTAINERS) or []
    if not mappings or proxy is None or not isinstance(there, list):
        return []
    others = as_objects(there) + as_objects(spec.get(CONTAINERS))
    if any(one.get("name") == PROXY_CONTAINER for one in others):
        return []  # Somebody else's: it will be refused.
    sidecar = _sidecar(pod, mappings, proxy)
    if not there:
        return [{"op": "add", "path": f"/spec/{INIT_CONTAINERS}", "value": [sidecar]}]
    return [{"op": "add", "path": f"/spec/{INIT_CONTAINERS}/0", "value": sidecar}]


def _arguments(mappings: Sequence[PortMapping]) -> list[str]:
    texts = [f"{one.container}:{one.shadow_port}:{one.app_port}" for one in mappings]
    return [word for text in texts for word in ("--map", text)]


def _sidecar(pod: Object, mappings: Sequence[PortMapping], proxy: Proxy) -> Object:
    """The sidecar: an init container that goes on running, the first of them.

    So it listens before anything is probed, and a Job's pod ends when its own containers have. Every
    API server that the chart can be installed on knows these (Kubernetes 1.29).
    """
    sidecar: dict[str, Any] = {
        "name": PROXY_CONTAINER,
        "image": proxy.image,
        "imagePullPolicy": proxy.pull_policy,
        "restartPolicy": "Always",
        "command": list(_COMMAND),
        "args": _arguments(mappings),
        # As Pod Security's "restricted" asks, whatever the pod says for its other containers.
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "privileged": False,
            "readOnlyRootFilesystem": True,
            "runAsGroup": _USER,
            "runAsNonRoot": True,
            "runAsUser": _USER,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    asked = _resources(pod)
    return {**sidecar, "resources": asked} if asked else sidecar


def _resources(pod: Object) -> Object:
    """Requests and limits with which the pod keeps its class of service and passes its quota.

    - It asks for a resource only if another container does: a BestEffort pod stays one. In a namespace
      whose LimitRange has defaults, all containers have them by now, so it asks for little instead of
      being given those defaults. It cannot know the LimitRange's minimum.
    - It has a limit only if all others have: a ResourceQuota on limits asks them of every container,
      and so does the class Guaranteed, in which request and limit are equal.
    - A pod with resources of its own needs none: those of its containers are parts of them.
    """
    if any(_quantities(spec_of(pod))):
        return {}
    others = [_quantities(one) for one in _every(pod)]
    class_ = _qos(others)
    requested, limited = {
        # Where zeros are written out.
        resources.Qos.BEST_EFFORT: (_ZERO, _ZERO),
        resources.Qos.BURSTABLE: (_REQUESTED, _LIMITED),
        resources.Qos.GUARANTEED: (_LIMITED, _LIMITED),
    }[class_]
    asked: dict[str, dict[str, str]] = {}
    for name in resources.GIVEN:
        if others and all(name in limits for _, limits in others):
            asked.setdefault("limits", {})[name] = limited[name]
        if any(name in requests for requests, _ in others):
            asked.setdefault("requests", {})[name] = requested[name]
    return asked


def _quantities(container: Object) -> tuple[dict[str, str], dict[str, str]]:
    """Requests and limits of a container or a pod; a limit alone is both, as for the API server."""
    found = as_object(container.get("resources"))
    requests, limits = (
        {k: str(v) for k, v in as_object(found.get(kind)).items() if k in resources.GIVEN}
        for kind in ("requests", "limits")
    )
    return {**limits, **requests}, limits


def _qos(others: Sequence[tuple[dict[str, str], dict[str, str]]]) -> resources.Qos:
    parts = tuple(resources.Container("", requests, limits) for requests, limits in others)
    try:
        return resources.qos(resources.PodResources(parts))
    except InvalidQuantity:
        return resources.Qos.BURSTABLE  # The API server is about to refuse the pod.


# What is warned about.


def warnings(pod: Object, settings: PodSettings) -> list[str]:
    """Return what of the pod's probes will wake, keep awake, or fail; one line each.

    Called with what has been patched, or with a workload's template, which has not.
    """
    found: list[str] = []
    probed = {
        port for _, container in containers(pod).values() for _, _, port in _probes(container)
    }
    every = settings.containers.values()
    apps = {one.app_port for any_ in every for one in (*any_.health_ports, *any_.shadow_ports)}
    for name, (_, container) in containers(pod).items():
        chosen = settings.container(name)
        if chosen.managed:
            found += _mapping_warnings(pod, chosen, probed, apps)
            found += _probe_warnings(container, chosen)
    return found


def uninjected(settings: PodSettings, proxy: Proxy | None) -> list[str]:
    """Return the warning about a sidecar that should be there and whose image nobody has told us."""
    if proxy is not None or not health_mappings(settings):
        return []
    return [
        f"annotation {HEALTH_CHECK_PROXY}: not injected, {MANAGER} was started without --image; "
        "upgrade the chart"
    ]


def overwritten(pod: Object) -> tuple[str, ...]:
    """Return the warning about exec probes' commands that somebody else wrote, which are lost."""
    there = strings(pod, "annotations").get(EXEC_PROBES)
    if there is None or there == _annotation(pod):
        return ()
    return (f"annotation {EXEC_PROBES}: replaced, it is written by Architect alone; leave it out",)


def fixed(pod: Object, settings: PodSettings) -> list[str]:
    """Return the warning about mappings that a live pod's sidecar does not have."""
    found, mappings = _own(pod), health_mappings(settings)
    served = found[1].get("args") if found else []
    if served == _arguments(mappings):
        return []
    return [
        f"annotation {HEALTH_CHECK_PROXY}: the sidecar of a live pod cannot be changed; the mappings "
        "hold for pods that are created from now on"
    ]


def _mapping_warnings(
    pod: Object, chosen: ContainerSettings, probed: set[int], apps: set[int]
) -> list[str]:
    found = []
    for mapping in chosen.health_ports:
        port, app = mapping.shadow_port, mapping.app_port
        where = f"annotation {HEALTH_CHECK_PROXY}, shadowPort {port}"
        if port not in probed:
            found.append(
                f"{where}: no probe uses it; write port: {port} in the probes of container "
                f"{quoted(chosen.name)} that use {app}"
            )
        if port < _UNPRIVILEGED_PORT:
            found.append(
                f"{where}: the sidecar has no privilege to listen on a port below "
                f"{_UNPRIVILEGED_PORT} where the node's runtime asks for one; choose a higher one"
            )
    for mapping in (*chosen.health_ports, *chosen.shadow_ports):
        if mapping.shadow_port in apps:
            found.append(
                f"shadowPort {mapping.shadow_port} of container {quoted(chosen.name)} is the appPort of "
                "another mapping, which it cuts off; choose a port on which nothing listens"
            )
        for other, (_, container) in containers(pod).items():
            if other != chosen.name and ("TCP", mapping.shadow_port) in ports(container):
                found.append(
                    f"shadowPort {mapping.shadow_port} of container {quoted(chosen.name)} is "
                    f"declared by container {quoted(other)}, which it cuts off if that listens "
                    "on it; choose a port on which nothing listens"
                )
    return found


def _probe_warnings(container: Object, chosen: ContainerSettings) -> list[str]:
    """Of probes that go on for as long as the container runs: a startup probe ends before it sleeps."""
    if not chosen.autoscaledown:
        return []
    answered = {mapping.shadow_port for mapping in chosen.health_ports}
    shadows = {mapping.shadow_port for mapping in chosen.shadow_ports}
    counted = {number for protocol, number in ports(container) if protocol == "TCP"}
    counted -= shadows | answered | chosen.ignored_ports
    found = []
    for kind, how, port in _probes(container):
        if kind not in _LASTING or port in answered:
            continue
        if port in counted:
            effect = "which is activity: it wakes the container or keeps it awake"
        elif kind == "livenessProbe":
            effect = "which nobody answers while it is hibernated: the kubelet then restarts it"
        else:
            effect = "which nobody answers while it is hibernated: the pod is not Ready then"
        found.append(
            f"container {quoted(chosen.name)}: its {kind} ({how}) uses port {port}, {effect}; "
            f"give that port a shadowPort in {HEALTH_CHECK_PROXY} and let the probe use it"
        )
    return found


def _probes(container: Object) -> Iterator[tuple[str, str, int]]:
    """The probes over the pod's network: which, how, and the port."""
    for kind in _PROBES:
        probe = as_object(container.get(kind))
        for how in ("httpGet", "tcpSocket", "grpc"):
            action = as_object(probe.get(how))
            port = _number(action.get("port"), container)
            # With a host it asks somebody else.
            if port is not None and not action.get("host"):
                yield kind, how, port


def _number(port: object, container: Object) -> int | None:
    """A probe's port as the kubelet reads it: a number, or the name of a port of its container."""
    for one in as_objects(container.get("ports")):
        if port and one.get("name") == port:
            port = one.get("containerPort")
            break
    if isinstance(port, str) and port.isdecimal():
        port = int(port)
    return port if isinstance(port, int) else None
