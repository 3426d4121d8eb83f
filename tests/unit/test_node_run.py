"""architect-node run: the pod's process becomes the node's architectd, with the pod's identity."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to make namespaces")

# Process 1 is the node's: it has our folder. The pod has a mount namespace of its own, with a
# service account and a folder of the same name with something else in it.
NODE = """\
set -e
mount --make-rprivate /
mount --bind {home}/node /usr/local/lib
unshare --mount sh -e {home}/pod
"""
POD = """\
mount --bind {home}/image /usr/local/lib
mount -t tmpfs tmpfs /run
account=/run/secrets/kubernetes.io/serviceaccount
mkdir -p $account/..1
printf token-1 >$account/..1/token
ln -s ..1 $account/..data
ln -s ..data/token $account/token
cd /run
exec {python} -m architect.processes.node.main run --socket /run/x --verbose
"""
DAEMON = """\
#!/bin/sh
echo "$@"
readlink /proc/self/ns/mnt /proc/1/ns/mnt
pwd
ls /run/secrets 2>/dev/null
echo "${PYTHONPATH-none}"
cat "$2/token"
"""


def run(home: Path) -> subprocess.CompletedProcess[str]:
    for name, text in (("pid1", NODE), ("pod", POD)):
        (home / name).write_text(text.format(home=home, python=sys.executable))
    (home / "image").mkdir()
    return subprocess.run(
        ["unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", home / "pid1"],
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY / "src")},
    )


def test_the_nodes_daemon_runs_in_the_nodes_namespace_with_the_pods_token(tmp_path: Path) -> None:
    program = tmp_path / "node/architect/venv/bin/architectd"
    program.parent.mkdir(parents=True)
    program.write_text(DAEMON)
    program.chmod(0o755)
    done = run(tmp_path)
    assert done.stderr == ""
    words, mine, node, folder, path, token = done.stdout.splitlines()
    option, account, *rest = words.split()
    assert option == "--kubernetes"
    assert account.startswith("/proc/self/fd/")
    assert rest == ["--socket", "/run/x", "--verbose"]
    assert mine == node
    assert (folder, path, token) == ("/", "none", "token-1")


def test_a_node_without_our_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "node").mkdir()
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stderr == (
        "architect-node: /usr/local/lib/architect/venv/bin/architectd: No such file or directory;"
        " the init container `architect-node install` puts it there\n"
    )
