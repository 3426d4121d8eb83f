"""A pod with a gate, on this kernel: what the tests beside it share.

Each test has its own pod and client, joined by veth: see podnet.
"""

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from architect.adapters import bpf
from architect.adapters.gate import Gate
from architect.decisions.ports import Port
from tests.engine.gate.podnet import (
    PORT,
    Network,
    command,
)

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def program() -> Path:
    built = ROOT / "build/native/gate.bpf.o"
    done = subprocess.run(
        ["make", "-s", "-C", str(ROOT / "native/bpf")], capture_output=True, text=True, check=False
    )
    # Without a compiler what is there has to do; with one, an old object must not be tested for a new one.
    assert built.exists(), f"no {built}, and it cannot be built: {done.stderr}"
    assert not done.returncode or "no clang found" in done.stderr, done.stderr
    return built


@pytest.fixture(scope="session")
def bpffs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("bpffs")
    bpf.ensure_bpffs(path)
    bpf.ensure_bpffs(path)  # a second mount on top would need a second umount
    yield path
    command(f"umount {path}")
    assert not bpf.is_bpffs(path)


@pytest.fixture
def network(bpffs: Path, program: Path, request: pytest.FixtureRequest) -> Iterator[Network]:
    name = re.sub(r"\W", "_", request.node.name)
    made = Network(bpffs / name, program)
    yield made
    made.close()
    if made.pin_dir.exists():
        for path in made.pin_dir.iterdir():
            path.unlink()
        made.pin_dir.rmdir()


@pytest.fixture(autouse=True, params=["tcx", "clsact"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test once with each way of attaching to an interface."""
    tcx = request.param == "tcx"
    if tcx and not bpf.has_tcx():
        pytest.skip("the kernel has no tcx (Linux 6.6)")
    monkeypatch.setattr(bpf, "has_tcx", lambda: tcx)


@pytest.fixture
def gate(network: Network) -> Gate:
    opened = network.open()
    opened.set_ports(0, [Port("tcp", PORT), Port("udp", PORT)])
    return opened
