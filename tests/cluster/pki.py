"""The cluster's certificates and kubeconfigs, made by openssl(1) in one folder.

One authority signs everything, for a year: a test cluster lives for minutes. Called by the control
plane, by each node, and by tests that need a server that the API server trusts.
"""

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster.base import put, run
from tests.cluster.settings import API

_DAYS: Final = "365"
_CURVE: Final = "ec_paramgen_curve:P-256"
_CONFIGURATION: Final = """\
[req]
distinguished_name = dn
[dn]
[ca]
basicConstraints = critical,CA:TRUE
keyUsage = critical,keyCertSign,cRLSign,digitalSignature
subjectKeyIdentifier = hash
[leaf]
basicConstraints = critical,CA:FALSE
keyUsage = critical,digitalSignature
extendedKeyUsage = serverAuth,clientAuth
"""


@dataclass(frozen=True, slots=True)
class Pki:
    """A folder with NAME.crt and NAME.key for everyone who has one."""

    folder: Path

    def crt(self, name: str) -> Path:
        """A certificate's file."""
        return self.folder / f"{name}.crt"

    def key(self, name: str) -> Path:
        """A key's file."""
        return self.folder / f"{name}.key"

    def found(self) -> None:
        """Make the authority, and the key that signs service account tokens."""
        put(self.folder / "openssl.cnf", _CONFIGURATION)
        self._request("ca", "/CN=architect-test-ca", ["-extensions", "ca"])
        curve = ("-genkey", "-noout", "-name", "prime256v1")
        run("openssl", "ecparam", *curve, "-out", self.key("sa"))

    def issue(
        self, name: str, user: str, group: str = "", alternatives: Sequence[str] = ()
    ) -> None:
        """Make NAME's certificate, for a server and a client, again if there is one.

        `user` and `group` are what Kubernetes takes from the subject's CN and O; `alternatives`
        are its other names as openssl writes them: IP:..., DNS:...
        """
        words = ["-extensions", "leaf", "-CA", str(self.crt("ca")), "-CAkey", str(self.key("ca"))]
        if alternatives:
            words += ["-addext", f"subjectAltName={','.join(alternatives)}"]
        self._request(name, (f"/O={group}" if group else "") + f"/CN={user}", words)

    def _request(self, name: str, subject: str, words: Sequence[str]) -> None:
        files = ("-keyout", str(self.key(name)), "-out", str(self.crt(name)))
        key = ("-newkey", "ec", "-pkeyopt", _CURVE, "-nodes")
        configuration = ("-config", str(self.folder / "openssl.cnf"))
        request = ("openssl", "req", "-new", "-x509", *configuration, *key, "-days", _DAYS)
        run(*request, "-subj", subject, *words, *files, shown=f"openssl req of {name}")

    def kubeconfig(self, name: str, target: Path) -> None:
        """Write the kubeconfig of the one who has NAME's certificate."""

        def data(path: Path) -> str:
            return base64.b64encode(path.read_bytes()).decode()

        cluster = {"server": API, "certificate-authority-data": data(self.crt("ca"))}
        user = {
            "client-certificate-data": data(self.crt(name)),
            "client-key-data": data(self.key(name)),
        }
        context = {"cluster": "architect-test", "user": name}
        put(
            target,
            {
                "apiVersion": "v1",
                "kind": "Config",
                "current-context": "architect-test",
                "clusters": [{"name": "architect-test", "cluster": cluster}],
                "users": [{"name": name, "user": user}],
                "contexts": [{"name": "architect-test", "context": context}],
            },
            0o600,
        )
