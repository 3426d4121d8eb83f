"""What the tests of drains share; used by test_moving_drain.py and test_moving_protocols.py."""

from __future__ import annotations

import contextlib
import functools
import os
import time
from collections.abc import Collection, Iterator
from typing import Any, Final

from tests.e2e import movers
from tests.e2e.movingfaults import other
from tests.e2e.site import Site, is_ready, soon

DRAINS: Final = int(os.environ.get("ARCHITECT_DRAINS", "2"))
"""How often the tests that drain from node to node do it."""
SERVED_S: Final = 60.0
DRAINED_S: Final = 120.0


def pods(site: Site, app: str, count: int, node: str = "") -> list[dict[str, Any]] | None:
    """The pods of an app if they are so many and ready, all on that node."""
    found = site.of(app)
    here = all(is_ready(one) and (not node or one["spec"]["nodeName"] == node) for one in found)
    return found if here and len(found) == count else None


def start(site: Site, node: str, *objects: dict[str, Any]) -> None:
    """Has all Deployments among the objects start on one node."""
    with movers.cordoned(site, other(node)):
        site.apply(*objects)
        for one in objects:
            if one["kind"] == "Deployment":
                name, count = one["metadata"]["name"], one["spec"]["replicas"]
                soon(
                    f"{name} to be ready",
                    functools.partial(pods, site, name, count, node),
                    DRAINED_S,
                )


@contextlib.contextmanager
def drained(site: Site, node: str) -> Iterator[float]:
    """Drains a node; gives when that began. At the end the drain has come to its good end."""

    def without_owner() -> list[str]:
        # A drain refuses to take these away, and those of a test before may be about to go.
        where = ("--all-namespaces", f"--field-selector=spec.nodeName={node}")
        return [
            one["metadata"]["name"]
            for one in site.cluster.get("pods", *where)["items"]
            if not one["metadata"].get("ownerReferences")
        ]

    soon("pods of no owner to be gone", lambda: not without_owner(), SERVED_S)
    flags = ("--ignore-daemonsets", "--delete-emptydir-data", f"--timeout={DRAINED_S:.0f}s")
    try:
        with site.running("drain", node, *flags) as process:
            yield time.monotonic()
            said, _ = process.communicate(timeout=DRAINED_S + 10)
            assert process.returncode == 0, said
    finally:
        site.kubectl("uncordon", node)


def elsewhere(site: Site, apps: dict[str, int], node: str, began: float) -> None:
    """Waits until all serve on a node."""
    for app, count in apps.items():
        left = began + SERVED_S - time.monotonic()
        soon(
            f"{app} to serve on {node}",
            functools.partial(pods, site, app, count, node),
            max(0.0, left),
        )


def migrated(site: Site, apps: Collection[str]) -> None:
    """Waits until each pod of these says that it came with its state; none has been restarted."""
    for app in apps:
        for one in site.of(app):
            name = one["metadata"]["name"]
            soon(f"the event of {name}", functools.partial(site.events, name, "Migrated"))
            assert site.restarts(name) == 0
