"""Fixtures of the engine's tests: the installed Architect, a lab, and nothing left at the end."""

import shutil
from collections.abc import Iterator

import pytest

from tests.engine import support


@pytest.fixture(scope="session")
def daemon() -> str:
    """Have architectd of the installed tree run."""
    for program, origin in (("architect", "make install"), ("podman", "apt install podman")):
        if shutil.which(program) is None:
            pytest.fail(f"{program} is not installed: `{origin}`, then run the tests again")
    for image in (support.TEST_IMAGE, support.VALKEY_IMAGE):
        if support.run("podman", "image", "exists", image).code:
            pytest.fail(f"the image {image} is not there: `make images`, then run the tests again")
    return support.must("architect", "up")


@pytest.fixture(scope="session")
def footprint(daemon: str) -> Iterator[support.Footprint]:
    """Remember every container of the session, and fail if anything of one is left at its end."""
    footprint = support.Footprint()
    yield footprint
    try:
        support.wait_until(lambda: not footprint.left(), "all traces to vanish", 5.0)
    except support.Unmet:
        pytest.fail("left behind:\n" + "\n".join(footprint.left()))


@pytest.fixture
def lab(footprint: support.Footprint) -> Iterator[support.Lab]:
    """Containers of one test."""
    with support.lab(footprint) as made:
        yield made


@pytest.fixture(scope="module")
def shared_lab(footprint: support.Footprint) -> Iterator[support.Lab]:
    """Containers that the tests of one module share."""
    with support.lab(footprint) as made:
        yield made


@pytest.fixture(autouse=True)
def connections() -> Iterator[None]:
    """Close the test's connections, however it ends."""
    yield
    while support.Client.open_ones:
        support.Client.open_ones.pop().close()
