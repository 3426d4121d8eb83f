"""The clients' machine, and a look at its wire in every test that asks for it."""

from collections.abc import Iterator

import pytest

from tests.engine import support
from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine
from tests.engine.servers.serving import SERVERS_IMAGE


@pytest.fixture(scope="session")
def client(footprint: support.Footprint) -> Iterator[Machine]:
    """A container of plain runc, for clients."""
    if support.run("podman", "image", "exists", SERVERS_IMAGE).code:
        pytest.fail(f"the image {SERVERS_IMAGE} is not there: `make image-servers`, then try again")
    with support.lab(footprint) as lab:
        container = lab.start(
            "client", "sleep", "infinity", image=SERVERS_IMAGE, runtime="runc", annotations={}
        )
        machine = Machine(container)
        yield machine
        machine.close()


@pytest.fixture
def wire(client: Machine) -> Iterator[Capture]:
    """Capture at the client during a test: no reset, and every SYN answered, the first time."""
    with client.capture() as capture:
        yield capture
        complaints = capture.complaints()
    if complaints:
        pytest.fail("the client could notice:\n" + "\n".join(complaints))
