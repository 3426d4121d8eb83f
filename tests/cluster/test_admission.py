"""Webhooks, runtime classes and annotations: the way by which a pod comes under management.

A webhook of the test's own annotates pods, and a handler of containerd's that records what it is
given stands for runc-architect.
"""

import base64
import http.server
import json
import ssl
import threading
from collections.abc import Iterator
from typing import Final

import pytest

from tests.cluster.base import ClusterError
from tests.cluster.cluster import Cluster
from tests.cluster.objects import RECORDER, named, pod, soon
from tests.cluster.settings import HOST_ADDRESS

pytestmark = pytest.mark.cluster

ANNOTATION: Final = "architect.loopholelabs.io/seen"
HOOK: Final = "hook"
_RECORDS: Final = "/var/log/recorder"
_PATCH: Final = [{"op": "add", "path": "/metadata/annotations", "value": {ANNOTATION: "1"}}]
_RECORDER: Final = f"""\
#!/bin/sh
# An OCI runtime that keeps each container's config.json, and is runc otherwise.
before=
for word; do
    case $before in
    --bundle | -b) mkdir -p {_RECORDS} && cp "$word/config.json" {_RECORDS}/"${{word##*/}}.json" ;;
    esac
    before=$word
done
exec /opt/runc/runc "$@"
"""


class Hook(http.server.BaseHTTPRequestHandler):
    """Annotates whatever it is asked about (admission.k8s.io/v1)."""

    def do_POST(self) -> None:
        review = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        patch = base64.b64encode(json.dumps(_PATCH).encode()).decode()
        answer = {
            "uid": review["request"]["uid"],
            "allowed": True,
            "patchType": "JSONPatch",
            "patch": patch,
        }
        reply = {"apiVersion": review["apiVersion"], "kind": review["kind"], "response": answer}
        body = json.dumps(reply).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        """Say nothing."""


@pytest.fixture
def webhook(cluster: Cluster) -> Iterator[None]:
    """A webhook on the host for pods that carry a label."""
    pki = cluster.control_plane.pki
    pki.issue(HOOK, HOOK, alternatives=[f"IP:{HOST_ADDRESS}"])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(pki.crt(HOOK), pki.key(HOOK))
    with http.server.ThreadingHTTPServer((HOST_ADDRESS, 0), Hook) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        client = {
            "url": f"https://{HOST_ADDRESS}:{server.server_port}/",
            "caBundle": base64.b64encode(pki.crt("ca").read_bytes()).decode(),
        }
        pods = {
            "apiGroups": [""],
            "apiVersions": ["v1"],
            "resources": ["pods"],
            "operations": ["CREATE"],
        }
        hook = {
            "name": "hook.example.com",
            "admissionReviewVersions": ["v1"],
            "sideEffects": "None",
            "clientConfig": client,
            "objectSelector": {"matchLabels": {HOOK: "please"}},
            "rules": [pods],
        }
        kind, version = "MutatingWebhookConfiguration", "admissionregistration.k8s.io/v1"
        try:
            cluster.apply(named(kind, HOOK, version, webhooks=[hook]))
            yield
        finally:
            cluster.kubectl("delete", kind.lower(), HOOK, "--ignore-not-found")
            server.shutdown()
            thread.join(10.0)


@pytest.fixture
def recorder(cluster: Cluster) -> Iterator[str]:
    """A runtime class whose handler is the recorder, on the first node; return its name."""
    node = cluster.node(1)
    node.run("sh", "-c", f'printf %s "$1" >{RECORDER}; chmod 755 {RECORDER}', "sh", _RECORDER)
    cluster.apply(named("RuntimeClass", "recorder", "node.k8s.io/v1", handler="recorder"))
    yield "recorder"
    cluster.kubectl("delete", "runtimeclass", "recorder")
    node.run("rm", "-rf", RECORDER, _RECORDS)


@pytest.mark.usefixtures("webhook")
def test_a_webhooks_annotation_reaches_the_runtime(cluster: Cluster, recorder: str) -> None:
    subject = pod("annotated", {HOOK: "please"}, cluster.node(1).name, runtime=recorder)

    def made() -> bool:
        # The API server takes a moment to learn of a new webhook; a pod made before has to go.
        cluster.apply(subject)
        found = cluster.get("pod", "annotated")["metadata"].get("annotations", {})
        if ANNOTATION not in found:
            cluster.kubectl("delete", "pod", "annotated", "--grace-period=0", "--force")
        return ANNOTATION in found

    try:
        soon("the webhook's annotation", made)
        cluster.kubectl("wait", "--for=condition=Ready", "pod/annotated", "--timeout=30s")
        listed = cluster.node(1).run("sh", "-c", f"cat {_RECORDS}/*.json")
        configurations = list(_objects(listed))
        kinds = [one["annotations"]["io.kubernetes.cri.container-type"] for one in configurations]
        assert sorted(kinds) == ["container", "sandbox"]
        assert [one["annotations"][ANNOTATION] for one in configurations] == ["1", "1"]
    finally:
        cluster.kubectl("delete", "pod", "annotated", "--grace-period=1", "--ignore-not-found")


def _objects(text: str) -> Iterator[dict[str, dict[str, str]]]:
    """The JSON objects that follow each other in a text."""
    decoder, rest = json.JSONDecoder(), text.strip()
    while rest:
        found, end = decoder.raw_decode(rest)
        yield found
        rest = rest[end:].lstrip()


def test_a_node_may_not_touch_another(cluster: Cluster) -> None:
    """Rules of access hold as on a real cluster (NodeRestriction), so agents' rights are tested."""
    words = ("/opt/kubernetes/kubectl", "--kubeconfig=/etc/kubernetes/kubelet.kubeconfig")
    node = cluster.node(1)
    node.run(*words, "annotate", "node", "k8n1", "architect.loopholelabs.io/own=1", "--overwrite")
    with pytest.raises(ClusterError, match="only its own Node object"):
        node.run(*words, "annotate", "node", "k8n2", "architect.loopholelabs.io/own=1")
