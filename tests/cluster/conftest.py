"""A cluster for the tests of this package: brought up for the first, gone after the last.

One at a time: names and addresses are fixed. So test_abort.py, which wants none, comes first. Its
state is in build/, so that a developer's own cluster in .cluster is not taken away; while that is
up, these tests fail and say so.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from common import BUILD, Failure
from tests.cluster import build, images, machine
from tests.cluster.cluster import Cluster
from tests.cluster.objects import RECORDER
from tests.cluster.settings import Handler, Options, Programs

HOME: Final = BUILD / "test-cluster"


@pytest.fixture(scope="session")
def programs() -> Programs:
    """What a cluster runs; built if it has to be, which takes some ten minutes."""
    try:
        return build.programs()
    except Failure as failure:
        pytest.fail(str(failure))


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An archive of the valkey image."""
    try:
        return images.saved("localhost/valkey:8", tmp_path_factory.mktemp("images") / "valkey.tar")
    except Failure as failure:
        pytest.fail(str(failure))


@pytest.fixture(scope="package")
def cluster(programs: Programs, valkey: Path) -> Iterator[Cluster]:
    """Three nodes with valkey's image, and a runtime handler that is a program on the node."""
    made = Cluster(HOME)
    handler = Handler(RECORDER, pod_annotations=("architect.loopholelabs.io/*",))
    before = machine.Record.take()
    made.down()
    try:
        made.up(Options(nodes=3, images=(str(valkey),), handlers={"recorder": handler}), programs)
        yield made
    finally:
        made.down()
    left = machine.leftovers(HOME, before)
    assert not left, f"left behind: {left}"
