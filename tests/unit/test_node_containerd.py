"""A whole node's life with a real containerd: install, restarts, what goes wrong, uninstall.

The node is a set of namespaces with an /etc, /run, /var/lib and /usr/local/lib of its own, in which a
loop starts containerd again half a second after its end, as on the nodes of tests/cluster.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cluster import build
from tests.unit import trees

pytestmark = pytest.mark.cluster

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 30.0
CONFIG = "/etc/containerd/config.toml"
V3 = """\
version = 3
disabled_plugins = ["io.containerd.nri.v1.nri"]
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"""
BOOT = """\
set -e
mount --make-rprivate /
mount --bind {home}/etc /etc
mount --bind {home}/lib /var/lib
mount --bind {home}/local /usr/local/lib
mount -t tmpfs tmpfs /run
mount --rbind / /mnt
{home}/containerd-shim-runc-v2 1000 &
echo $! >{home}/shim
touch {home}/booted
while :; do
    {home}/start --config /etc/containerd/config.toml >>{home}/log 2>&1 &
    wait $! || :
    sleep 0.5
done
"""
START = """\
#!/bin/sh
if [ -e {home}/broken ] && grep -q runc-architect /etc/containerd/config.toml; then exit 1; fi
exec {program} "$@"
"""
SYSTEMCTL = """\
#!/bin/sh
echo "$@" >>{home}/systemctl.log
case "$1" in
is-active) [ "$2" = containerd ] && echo active;;
restart) kill $(pidof containerd);;
esac
"""


def until(what: str, condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT_S
    while not condition():
        assert time.monotonic() < deadline, f"waited for {what}"
        time.sleep(0.02)


class Node:
    """The node, its process 1 and its files."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.config = home / CONFIG.lstrip("/")
        self.process = subprocess.Popen(
            ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "bash", home / "boot"],
            stdin=subprocess.DEVNULL,
            env={"PATH": f"{home}/bin:{os.environ['PATH']}"},
        )
        try:
            until("the node to boot", (home / "booted").exists)
            until("containerd", lambda: "containerd successfully booted" in self.log())
        except BaseException:
            self.end()
            raise

    def end(self) -> None:
        """A power failure: process 1 ends, and so do all others."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        for pid in children.split():
            os.kill(int(pid), signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        path = self.home / "log"
        return path.read_text() if path.exists() else ""

    @property
    def boots(self) -> int:
        """How often containerd has come up."""
        return self.log().count("containerd successfully booted")

    def architect(self, *words: str, first: str = "") -> subprocess.CompletedProcess[str]:
        """Run architect-node in the node, with Python statements before."""
        code = f"{first}\nfrom architect.processes.node.main import main\nmain()"
        (init,) = (
            Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        )
        return subprocess.run(
            ["nsenter", "-t", init, "-m", "-p", sys.executable, "-c", code, *words],
            capture_output=True,
            text=True,
            timeout=100,
            check=False,
            env={
                "PATH": f"{self.home}/bin:{os.environ['PATH']}",
                "PYTHONPATH": str(REPOSITORY / "src"),
            },
        )

    def install(self, first: str = "") -> subprocess.CompletedProcess[str]:
        source = str(self.home / "image")
        return self.architect("install", "--host", "/mnt", "--source", source, first=first)

    def status(self) -> dict[str, object]:
        found: dict[str, object] = json.loads(self.architect("status").stdout)
        return found


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    program = build.programs().containerd / "containerd"
    for folder in ("etc", "local", "lib", "bin", "image"):
        (tmp_path / folder).mkdir()
    trees.lay_out({CONFIG: V3, "/etc/hosts": "", "/etc/passwd": ""}, tmp_path)
    trees.lay_out({"/libexec/runc-architect": "x", "/venv/bin/architectd": "x"}, tmp_path / "image")
    for name, text in (("boot", BOOT), ("start", START)):
        (tmp_path / name).write_text(text.format(home=tmp_path, program=program))
        (tmp_path / name).chmod(0o755)
    shutil.copy("/bin/sleep", tmp_path / "containerd-shim-runc-v2")
    found = Node(tmp_path)
    yield found
    found.end()


def test_one_restart_then_nothing_then_everything_back(node: Node) -> None:
    done = node.install()
    assert (done.stderr, done.returncode) == ("", 0)
    assert done.stdout.splitlines() == [
        "/usr/local/lib/architect was installed",
        "/etc/containerd/config.toml was edited",
        "containerd was restarted",
    ]
    assert node.boots == 2
    found = node.status()
    assert found["handler"] is True
    assert found["installed"] is True
    assert found["edited"] == [CONFIG]
    assert (node.install().stdout, node.boots) == ("", 2)
    # What the daemon keeps in memory is mounted there.
    mounted = "mkdir -p /run/architect/hot && mount -t tmpfs tmpfs /run/architect/hot"
    node.architect(first=f"import os, sys; sys.exit(os.system('{mounted}'))")
    gone = node.architect("uninstall", "--host", "/mnt")
    assert gone.stdout.splitlines() == [
        "/etc/containerd/config.toml is as it was before",
        "containerd was restarted",
        "/usr/local/lib/architect was removed",
    ]
    assert node.boots == 3
    assert trees.contents(node.home / "etc").keys() == {
        "/containerd/config.toml",
        "/hosts",
        "/passwd",
    }
    assert node.config.read_text() == V3
    assert os.listdir(node.home / "local") == []
    assert not (node.home / "lib/architect").exists()
    left = "import os, sys; sys.exit(os.path.exists('/run/architect'))"
    assert node.architect(first=left).returncode == 0
    assert node.architect("uninstall").stdout == ""
    assert node.boots == 3


def test_shims_are_left_alone(node: Node) -> None:
    node.install()
    processes = subprocess.run(["pgrep", "-f", node.home / "containerd-shim-runc-v2"], check=False)
    assert processes.returncode == 0


def test_by_systemd_where_it_runs(node: Node) -> None:
    systemctl = node.home / "bin/systemctl"
    systemctl.write_text(SYSTEMCTL.format(home=node.home))
    systemctl.chmod(0o755)
    done = node.install("import pathlib; pathlib.Path('/run/systemd/system').mkdir(parents=True)")
    assert (done.stderr, done.returncode) == ("", 0)
    calls = (node.home / "systemctl.log").read_text().splitlines()
    assert calls == ["is-active containerd", "is-active containerd", "restart containerd"]
    assert node.boots == 2


def test_killed_before_the_restart_it_is_restarted_once_by_the_next(node: Node) -> None:
    first = (
        "import os; from architect.adapters.containerd import Restarter as R\n"
        "R.restart = lambda *_: os._exit(7)"
    )
    assert node.install(first).returncode == 7
    assert "runc-architect" in node.config.read_text()
    assert node.boots == 1
    assert node.status()["restart_wanted"] is True
    assert node.install().stdout == "containerd was restarted\n"
    assert node.boots == 2
    assert node.install().stdout == ""


def test_a_containerd_that_was_not_started_again_is_not_taken_for_one_that_was(node: Node) -> None:
    first = (
        "from architect.adapters import containerd as c; from architect.processes.node import place\n"
        "c.UP_S = 0.5; here = place.find(place.Host(place.Path('/')), '/x', 'kubeadm').restarter\n"
        "try: here.await_up(c.boot_time(), None)\n"
        "except Exception as error: sys.exit(str(error))"
    )
    done = node.architect(first="import sys\n" + first)
    assert "it was not started again" in done.stderr


def test_restarted_by_somebody_else_it_is_not_restarted_again(node: Node) -> None:
    first = (
        "import os; from architect.adapters.containerd import Restarter as R\n"
        "R.restart = lambda *_: os._exit(7)"
    )
    node.install(first)
    node.architect(first="import os, sys; os.system('kill $(pidof containerd)'); sys.exit()")
    until("containerd to be back", lambda: node.boots == 2)
    assert node.install().stdout == ""
    assert node.boots == 2


def test_a_containerd_that_does_not_come_up_gets_its_configuration_back(node: Node) -> None:
    (node.home / "broken").touch()
    first = "from architect.adapters import containerd; containerd.UP_S = 3.0"
    done = node.install(first)
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert "did not come up within 3 s with the runtime handler runc-architect" in line
    assert "config.toml is as it was before, and containerd runs with it" in line
    assert node.config.read_text() == V3
    assert node.boots == 2
    again = node.install(first)
    assert "did not come up with architect's runtime handler in it before" in again.stderr
    assert node.boots == 2
    (node.home / "broken").unlink()
    (node.home / "lib/architect/node/failed.json").unlink()
    assert node.install().returncode == 0
    assert node.boots == 3


KILLED_AT = {
    "waiting": (
        "from architect.adapters.containerd import Restarter as R\n"
        "R.await_up = lambda *_: os._exit(7)"
    ),
    "noting": (
        "from architect.processes.node.place import Notes as N; note = N.note_failure\n"
        "N.note_failure = lambda *args: (note(*args), os._exit(7))"
    ),
    "taking back": (
        "from architect.adapters import hostfiles as h; unedit = h.unedit_file\n"
        "h.unedit_file = lambda *args: (unedit(*args), os._exit(7))"
    ),
}


@pytest.mark.parametrize("at", KILLED_AT)
def test_killed_while_it_goes_wrong_the_next_run_takes_it_back(at: str, node: Node) -> None:
    (node.home / "broken").touch()
    first = "import os; from architect.adapters import containerd; containerd.UP_S = 2.0\n"
    assert node.install(first + KILLED_AT[at]).returncode == 7
    if at == "taking back":
        until("containerd to be back by itself", lambda: node.boots == 2)
    done = node.install(first)
    assert done.returncode == 1
    assert "architect's runtime handler" in done.stderr or "as it was before" in done.stderr
    assert node.config.read_text() == V3
    assert node.boots == (3 if at == "taking back" else 2)
    assert not (node.home / "lib/architect/node/restart.json").exists()
    assert node.architect("uninstall").returncode == 0


def test_a_file_that_cannot_be_read_is_refused_before_anything_is_done(node: Node) -> None:
    node.config.write_text("version = 3\n[")
    done = node.install()
    assert done.returncode == 1
    assert done.stderr.startswith("architect-node: /etc/containerd/config.toml: it is no TOML")
    assert len(done.stderr.splitlines()) == 1
    assert node.boots == 1
    assert os.listdir(node.home / "local") == []


def test_what_containers_need_stays_until_they_have_ended(node: Node) -> None:
    node.install()
    meta = json.dumps({"namespace": "shop", "pod": "cart-1", "container": "web"})
    make = (
        "import pathlib, sys; p = pathlib.Path('/run/architect/containers/abc')\n"
        f"p.mkdir(parents=True); (p / 'meta.json').write_text('{meta}'); sys.exit()"
    )
    assert node.architect(first=make).returncode == 0
    done = node.architect("uninstall", "--host", "/mnt")
    assert done.returncode == 1
    assert done.stderr == (
        "architect-node: architect stays on this node: containers need it: shop/cart-1/web;"
        " uninstall again when they have ended\n"
    )
    found = node.status()
    assert (found["handler"], found["installed"], node.boots) == (True, True, 2)
    gone = "import shutil, sys; shutil.rmtree('/run/architect/containers/abc'); sys.exit()"
    assert node.architect(first=gone).returncode == 0
    assert node.architect("uninstall", "--host", "/mnt").returncode == 0
    assert node.boots == 3
    assert not node.status()["installed"]
