"""Who may be called a node: what a request for a node's certificate has to say, and who has to make it.

Called by the control plane, which signs (:mod:`architect.processes.controlplane.identities`), and by both
ends of a move, which know each other by :func:`server_name`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Final

ORGANIZATION: Final = "architect:nodes"
NODE_SUFFIX: Final = ".node.architect.loopholelabs.io"
USAGES: Final = frozenset({"digital signature", "client auth", "server auth"})
LIFE_S: Final = 86400
"""Of a certificate, in seconds. A node that is removed gets no other."""
NODE_CLAIM: Final = "authentication.kubernetes.io/node-name"
"""In the extra of who asks: the API server reads it from a token that is bound to a pod."""


def server_name(node: str) -> str:
    """The name by which a node's certificate is checked."""
    return node + NODE_SUFFIX


@dataclass(frozen=True, slots=True)
class Asked:
    """A request, as the API server and the request itself have it."""

    username: str
    node_claims: tuple[str, ...]
    """Nodes of the token's pod; one, if it is bound to a pod."""
    usages: frozenset[str]
    common_name: str
    organizations: tuple[str, ...]
    names: tuple[str, ...]
    """Subject alternative names, all of them DNS names."""
    sound: bool
    """Its signature is its key's, and the key is of a kind that we sign."""


def refusal(asked: Asked, namespace: str, nodes: Collection[str]) -> str:
    """Why a request is denied; empty if it is granted. ``nodes`` are those that exist."""
    account = f"system:serviceaccount:{namespace}:architectd"
    node = asked.common_name
    if asked.username != account:
        return f"only {account} may ask, and {asked.username} did"
    if asked.node_claims != (node,):
        at = ", ".join(asked.node_claims) or "no node"
        return f"it is for node {node}, and who asks runs on {at}"
    if node not in nodes:
        return f"there is no node {node}"
    if not asked.sound:
        return "its signature or the kind of its key is wrong"
    if asked.organizations != (ORGANIZATION,):
        return f"its organization is not {ORGANIZATION}"
    if asked.names != (server_name(node),):
        return f"its only name has to be {server_name(node)}"
    if asked.usages != USAGES:
        return f"its usages have to be {', '.join(sorted(USAGES))}"
    return ""
