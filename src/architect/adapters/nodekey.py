"""Makes a node's key and the request for its certificate: a program of its own, started by :mod:`.identity`.

The library that does it would stay in the daemon's memory for good, for two calls a day.
"""

from __future__ import annotations

import json
import sys

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from architect.decisions import identity


def make(node: str) -> dict[str, str]:
    """A new key and a request for it, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, identity.ORGANIZATION),
            x509.NameAttribute(NameOID.COMMON_NAME, node),
        ]
    )
    names = x509.SubjectAlternativeName([x509.DNSName(identity.server_name(node))])
    request = (
        x509.CertificateSigningRequestBuilder()
        .subject_name(subject)
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return {
        "key": private.decode(),
        "request": request.public_bytes(serialization.Encoding.PEM).decode(),
    }


if __name__ == "__main__":
    print(json.dumps(make(sys.argv[1])))
