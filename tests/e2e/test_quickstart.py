"""The guide's quick start, to its last line: the example's chart, its sleep, its wake, its savings."""

from pathlib import Path

import pytest

from common import REPOSITORY
from tests.cluster import images, install
from tests.e2e.site import STATUS, Site, soon

pytestmark = pytest.mark.cluster

CHART = REPOSITORY / "charts/example-go"
IMAGE = "localhost/architect-example-go:1"


def test_example_go(site: Site, tmp_path: Path) -> None:
    site.cluster.load(images.saved(IMAGE, tmp_path / "example-go.tar"))
    where = f"--namespace={site.namespace}"
    install.helm(site.cluster, "install", "example-go", CHART, where, "--wait", "--timeout=2m")
    (one,) = site.of("example-go")
    name = one["metadata"]["name"]
    # 3. It hibernates after ten seconds of inactivity.
    site.asleep(name, "example-go")
    (line,) = site.kubectl("get", "pods", "--no-headers").splitlines()
    assert line.split()[1:3] == ["1/1", "Running"]
    # 4. A request wakes it, with what it had in memory.
    first = site.exec(name, "curl", "--silent", "localhost:8080", container="example-go")
    assert "request 1 since" in first
    site.awake(name, "example-go")
    site.asleep(name, "example-go")
    second = site.exec(name, "curl", "--silent", "localhost:8080", container="example-go")
    assert second.replace("request 2", "request 1") == first
    # 5. The savings.
    site.asleep(name, "example-go")
    soon(
        "kubectl top to show them",
        lambda: site.kubectl("top", "pods", "--no-headers").split() == [name, "0m", "0Mi"],
        120,
    )
    # As the guide looks for sleepers.
    names = site.kubectl("get", "pods", f"--selector={STATUS}example-go=SCALED_DOWN", "-o", "name")
    assert names.split() == [f"pod/{name}"]
    install.helm(site.cluster, "uninstall", "example-go", where)
