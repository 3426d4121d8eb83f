"""The cluster's network: a bridge in a network namespace of its own, the host and nodes plugged in.

The bridge is not in the host's namespace, so that neither the host's firewall nor br_netfilter
sees the frames. Each node is the gateway of its own pods' subnet; routes are plain ones. A
partition is `ip -n k8sw link set NODE down`, and tc(8) works on the same port. Called by cluster.py
and node.py.
"""

from contextlib import suppress

from tests.cluster.base import ClusterError, run, succeeds
from tests.cluster.machine import NAMESPACES, is_mount
from tests.cluster.settings import (
    HOST_ADDRESS,
    HOST_LINK,
    SERVICE_NET,
    SWITCH,
    node_address,
    node_name,
    pod_subnet,
)

_PORT_OF_HOST = "host"
_BRIDGE = "br0"


def ip(*words: str, netns: str = "") -> str:
    """Run ip(8), in a network namespace if one is named."""
    return run("ip", *(("-n", netns) if netns else ()), *words)


def exists(name: str) -> bool:
    """Whether there is a network namespace of that name, or what is left of one."""
    return (NAMESPACES / name).exists()


def drop(name: str) -> None:
    """Remove a network namespace, also one that was only half made."""
    path = NAMESPACES / name
    if is_mount(path):
        run("umount", "--lazy", path)
    path.unlink(missing_ok=True)


def _plug(port: str, netns: str, device: str, address: str) -> None:
    """Connect `device` of a namespace (or of the host) with a new port of the bridge."""
    # Both ends are born with their name in their place: whenever this is interrupted, what there
    # is has a name that `down` knows.
    ip("link", "add", device, "type", "veth", "peer", "name", port, "netns", SWITCH, netns=netns)
    ip("link", "set", port, "master", _BRIDGE, "up", netns=SWITCH)
    ip("address", "add", f"{address}/24", "dev", device, netns=netns)
    ip("link", "set", device, "up", netns=netns)


def create() -> None:
    """Make the bridge and plug the host in."""
    ip("netns", "add", SWITCH)
    ip("link", "add", _BRIDGE, "type", "bridge", netns=SWITCH)
    ip("link", "set", _BRIDGE, "up", netns=SWITCH)
    _plug(_PORT_OF_HOST, "", HOST_LINK, HOST_ADDRESS)


def remove() -> None:
    """Take the bridge and the host's device away; its routes go with it."""
    if succeeds("ip", "link", "show", HOST_LINK):
        ip("link", "delete", HOST_LINK)
    drop(SWITCH)


def add_node(number: int, up: list[int]) -> None:
    """Make a node's network namespace and the routes between it and the host and nodes `up`."""
    name, address = node_name(number), node_address(number)
    ip("netns", "add", name)
    _plug(name, name, "eth0", address)
    ip("link", "set", "lo", "up", netns=name)
    ip("route", "add", "default", "via", HOST_ADDRESS, netns=name)
    for other in up:
        to_other = (pod_subnet(other), "via", node_address(other))
        ip("route", "replace", *to_other, netns=name)
        ip("route", "replace", pod_subnet(number), "via", address, netns=node_name(other))
    ip("route", "replace", pod_subnet(number), "via", address)


def remove_node(number: int) -> None:
    """Unplug a node and remove its namespace."""
    name = node_name(number)
    with suppress(ClusterError):
        ip("link", "delete", name, netns=SWITCH)
    with suppress(ClusterError):
        ip("route", "delete", pod_subnet(number))
    drop(name)


def route_services(up: list[int]) -> None:
    """Let the host reach Services through a node that is up, which translates and masquerades."""
    if up:
        ip("route", "replace", f"{SERVICE_NET}.0.0/16", "via", node_address(up[0]))
