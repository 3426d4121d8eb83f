"""The cluster of the end-to-end tests: brought up with the chart for the first, gone after the last.

The nodes that run managed pods have the two containerds that architect supports, with the two
versions of its configuration: k8n1 a 2.1, k8n2 a 1.7. So one run covers both: the scheduler puts
pods on either, and a test that is about one node's engine can name it.

A developer who has one with the chart installed already (`make cluster UP="--metrics
--old-containerd 2"`, `make cluster-load` of the images, `make cluster-install`) saves its minute with
ARCHITECT_CLUSTER=.cluster; it is then left as it was.
"""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from common import BUILD, Failure
from tests.cluster import build, images, install, machine
from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.cluster.settings import Options
from tests.e2e.site import IMAGE, TOOLS, Site, archive

HOME: Final = BUILD / "test-cluster"
OLD: Final = 2
"""The number of the node with containerd 1.7."""


def _up(folder: Path) -> Cluster:
    try:
        programs = build.programs()
        archives = [images.saved(name, archive(folder, name)) for name in (IMAGE, TOOLS)]
    except Failure as failure:
        pytest.fail(str(failure))
    made = Cluster(HOME)
    made.down()
    options = Options(
        nodes=3, images=tuple(map(str, archives)), metrics=True, old_containerd=(OLD,)
    )
    made.up(options, programs)
    return made


@pytest.fixture(scope="package")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three nodes with the chart; after the tests it is uninstalled, and nothing may be left."""
    given = os.environ.get("ARCHITECT_CLUSTER")
    if given:
        yield Cluster(Path(given))
        return
    before = machine.Record.take()
    try:
        cluster = _up(tmp_path_factory.mktemp("images"))
        install.install(cluster)
        yield cluster
    finally:
        Cluster(HOME).down()
    left = machine.leftovers(HOME, before)
    assert not left, f"left behind: {left}"


@pytest.fixture
def site(installed: Cluster, request: pytest.FixtureRequest) -> Iterator[Site]:
    """A namespace of the test's own. When the test fails, what happened in it is printed."""
    name = re.sub(r"[^a-z0-9]+", "-", request.node.name.lower()).strip("-")[-50:].strip("-")
    before = request.session.testsfailed
    # A test before this one that failed may have left no API server.
    installed.control_plane.start_api()
    installed.control_plane.await_api()
    with Site(installed, "default").within(name) as site:
        # A test before this one may have killed some.
        site.await_components()
        yield site
        if request.session.testsfailed > before:
            installed.control_plane.start_api()
            installed.control_plane.await_api()
            for words in (("get", "pods", "-o", "wide"), ("get", "events")):
                try:
                    print(site.kubectl(*words))
                except ClusterError as error:
                    print(error)
