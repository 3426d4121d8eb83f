"""Who is not the node of the claiming pod gets nothing of a pod that leaves, and changes nothing.

A pod waits to leave while both nodes are cordoned: its Checkpoint is offered, and nobody has claimed it.
"""

from __future__ import annotations

import json
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import pytest

from tests.cluster.base import ClusterError, run
from tests.cluster.cluster import Cluster
from tests.cluster.pki import Pki
from tests.e2e import movers, movingfaults
from tests.e2e.movingfaults import CHECKPOINTS, Scene, number
from tests.e2e.site import PREFIX, Site, managing, pod, soon

pytestmark = pytest.mark.cluster

APP = "mover"
NODE_SUFFIX: Final = ".node.architect.loopholelabs.io"
FORMAT: Final = 1
"""Of checkpoints (contract/records.py)."""
ANSWER_S: Final = 20.0
REFUSED: Final = '"what": "stranger refused"'
CLAIM: Final = {"podName": "thief", "podUID": "0b5c", "nodeName": "k8n3"}


class Offered(NamedTuple):
    """A pod that waits to leave."""

    scene: Scene
    checkpoint: dict[str, Any]

    @property
    def endpoint(self) -> tuple[str, int]:
        """Where its node hands it out."""
        host, _, port = self.checkpoint["status"]["endpoint"].rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def name(self) -> str:
        """The Checkpoint's."""
        found: str = self.checkpoint["metadata"]["name"]
        return found

    def now(self) -> dict[str, Any]:
        """The Checkpoint as it is now."""
        return self.scene.site.get(CHECKPOINTS, self.name)

    def hello(self, **other: Any) -> dict[str, Any]:
        """What the claiming node would say, had the pod that waits claimed it."""
        site = self.scene.site
        (waiting,) = site.of(APP)
        right = {
            "checkpoint": f"{site.namespace}/{self.name}",
            "uid": self.scene.pod["metadata"]["uid"],
            "claimant": waiting["metadata"]["uid"],
            "format": FORMAT,
        }
        return {**right, **other}


@pytest.fixture(scope="module")
def waiting(installed: Cluster) -> Iterator[Offered]:
    """For all tests of this file. After them it still moves, with its state and its clients."""
    installed.control_plane.start_api()
    installed.control_plane.await_api()
    with Site(installed, "default").within("moving-strangers") as site:
        site.await_components()
        movers.client_pods(site)
        site.start(movers.deployment(APP), movers.node_port(APP, APP), app=APP)
        with movingfaults.scene(site, APP, "client") as scene:
            with movers.cordoned(site, scene.destination):
                scene.leave()
                scene.logs.wait(movingfaults.STEPS["offered"])
                yield Offered(scene, soon("the offer", lambda: _available(site)))
            scene.outcome()


def _available(site: Site) -> dict[str, Any] | None:
    (found,) = movingfaults.checkpoints(site)
    return found if found["status"]["phase"] == "Available" else None


@pytest.fixture
def offered(waiting: Offered) -> Iterator[Offered]:
    """After each test nothing has changed, and the pod has served all the time."""
    yield waiting
    assert waiting.now() == waiting.checkpoint
    assert not waiting.scene.logs.about('"what": "frozen"')
    waiting.scene.crowd.go_on()


def _context(certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A client that believes anybody."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def _says(endpoint: tuple[str, int], context: ssl.SSLContext, hello: dict[str, Any]) -> bytes:
    """What the transfer server answers; empty if it ends the connection, in whatever way."""
    link = socket.create_connection(endpoint, ANSWER_S)
    found = b""
    with link:
        try:
            with context.wrap_socket(link) as tls:
                tls.sendall(json.dumps(hello).encode() + b"\n")
                while not found.endswith(b"\n") and (more := tls.recv(1 << 16)):
                    found += more
        except TimeoutError:
            raise
        except OSError:
            return b""
    return found


def _identity(site: Site, node: str) -> ssl.SSLContext:
    """As that node's architectd: with its certificate and key."""
    machine = site.cluster.node(number(node))
    folder = machine.root / movingfaults.STATE / "identity"
    found = {path: path.read_text(errors="replace") for path in folder.rglob("*") if path.is_file()}
    texts = {path: text for path, text in found.items() if text.startswith("-----BEGIN")}
    certificates = [path for path, text in texts.items() if "BEGIN CERTIFICATE-" in text]
    keys = [path for path, text in texts.items() if "PRIVATE KEY-" in text]
    for certificate in certificates:
        shown = run("openssl", "x509", "-noout", "-text", "-in", certificate)
        if f"DNS:{node}{NODE_SUFFIX}" not in shown:
            continue
        for key in keys:
            try:
                return _context(certificate, key)
            except ssl.SSLError:
                continue
    raise AssertionError(f"{node} has no certificate of its own: {sorted(texts)} in {folder}")


def _refused(offered: Offered, hello: dict[str, Any]) -> None:
    """The other node's daemon is told why, and so is the source's log."""
    node = offered.scene.destination
    before = len(offered.scene.logs.about(REFUSED))
    said = json.loads(_says(offered.endpoint, _identity(offered.scene.site, node), hello))
    assert "may not have checkpoint" in said["problem"]["what"]
    assert node in said["problem"]["what"]
    line = soon("the refusal in the log", lambda: offered.scene.logs.about(REFUSED)[before:])[0]
    assert f'"node": "{node}"' in line


def test_client_without_certificate(offered: Offered) -> None:
    assert _says(offered.endpoint, _context(), offered.hello()) == b""


def test_client_of_another_authority(offered: Offered, tmp_path: Path) -> None:
    pki = Pki(tmp_path / "pki")
    pki.found()
    name = f"{offered.scene.destination}{NODE_SUFFIX}"
    pki.issue("stranger", name, alternatives=[f"DNS:{name}"])
    context = _context(pki.crt("stranger"), pki.key("stranger"))
    assert _says(offered.endpoint, context, offered.hello()) == b""


def test_client_with_the_certificate_of_a_kubelet(offered: Offered) -> None:
    """Of the cluster's own authority, and of the very node: yet not of a daemon of ours."""
    pki = offered.scene.site.cluster.control_plane.pki
    name = offered.scene.destination
    said = _says(offered.endpoint, _context(pki.crt(name), pki.key(name)), offered.hello())
    assert said == b"" or "problem" in json.loads(said)


def test_who_fails_the_handshake_is_in_the_log(offered: Offered) -> None:
    logs = offered.scene.logs
    before = len(logs.look())
    assert _says(offered.endpoint, _context(), offered.hello()) == b""
    soon(
        "the TLS error in the log",
        lambda: [line for line in logs.look()[before:] if "certificate" in line.lower()],
    )


def test_node_without_a_claim(offered: Offered) -> None:
    _refused(offered, offered.hello())


def test_checkpoint_of_another_namespace_or_pod(offered: Offered) -> None:
    site = offered.scene.site
    # The log is asked for lines with the namespace of the test, which this has in the middle.
    _refused(offered, offered.hello(checkpoint=f"not-{site.namespace}/{offered.name}"))
    _refused(offered, offered.hello(checkpoint=f"{site.namespace}/nosuch"))
    _refused(offered, offered.hello(uid=offered.hello()["claimant"]))
    _refused(offered, offered.hello(format=FORMAT + 1))


def test_what_is_no_greeting(offered: Offered) -> None:
    said = _says(
        offered.endpoint,
        _identity(offered.scene.site, offered.scene.destination),
        {"give": "me everything"},
    )
    assert "problem" in json.loads(said)


def test_pod_that_says_that_it_has_a_claim(offered: Offered) -> None:
    """Who claims what is the control plane's to say, never a pod's annotations."""
    site = offered.scene.site
    notes = {
        **managing(seconds=300),
        PREFIX + "checkpoint": offered.name,
        PREFIX + "claims": f"{site.namespace}/{offered.name}",
        PREFIX + "claimed-checkpoint": offered.name,
    }
    thief = pod("thief", notes=notes, nodeName=offered.scene.destination)
    thief["metadata"]["labels"]["pod-template-hash"] = offered.checkpoint["spec"]["templateHash"]
    try:
        site.apply(thief)
    except ClusterError:
        # As good as having nothing.
        return
    soon("the thief to be ready", lambda: site.ready("thief"), movers.MOVE_S)
    client = site.connect("thief")
    assert client("DBSIZE") == 0
    client.close()
    site.kubectl("delete", "pod", "thief", "--wait=false")


@pytest.mark.parametrize("role", ["", "view", "edit", "admin"])
def test_user_cannot_write_a_checkpoint(offered: Offered, role: str) -> None:
    site = offered.scene.site
    user = "--as=somebody"
    if role:
        bound = (f"--clusterrole={role}", "--user=somebody")
        site.kubectl("create", "rolebinding", f"theirs-{role}", *bound)
    patch = json.dumps({"status": {"phase": "Claimed", "claimedBy": CLAIM}})
    spec = json.dumps({"spec": {"nodeName": "k8n3"}})
    attempts = (
        ("patch", CHECKPOINTS, offered.name, "--subresource=status", "--type=merge", "-p", patch),
        ("patch", CHECKPOINTS, offered.name, "--type=merge", "-p", spec),
        ("delete", CHECKPOINTS, offered.name),
    )
    for words in attempts:
        with pytest.raises(ClusterError, match=r"[Ff]orbidden"):
            site.kubectl(*words, user)
    forged = {
        "apiVersion": "architect.loopholelabs.io/v1",
        "kind": "Checkpoint",
        "metadata": {"name": "forged"},
        "spec": offered.checkpoint["spec"],
    }
    with pytest.raises(ClusterError, match=r"[Ff]orbidden"):
        site.kubectl("create", "--filename=-", user, stdin=json.dumps(forged))
