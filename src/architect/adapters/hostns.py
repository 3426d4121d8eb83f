"""From the daemon's pod onto its node: the namespaces of process 1, then the node's own architectd.

The daemon works with mounts, processes and programs of the node, as it does on a single machine, but
lives as the pod's process: its log, its signals, its end are the pod's. Called by processes/node.
`os.setns` exists from Python 3.12 on only, hence ctypes.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from architect.contract.errors import ArchitectError

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""The pod's identity for the API. The kubelet renews the token in it, so the folder is taken along."""
_NAMESPACES: Final = {"cgroup": 0x02000000, "mnt": 0x00020000}  # <linux/sched.h>
_PATH: Final = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_OF_THE_IMAGE: Final = ("LD_LIBRARY_PATH", "LD_PRELOAD", "PYTHONHOME", "PYTHONPATH")

_libc = ctypes.CDLL(None, use_errno=True)


def _enter(kind: str) -> None:
    path = f"/proc/1/ns/{kind}"
    number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(number, _NAMESPACES[kind]) != 0:
            code = ctypes.get_errno()
            raise ArchitectError(
                path,
                f"it cannot be entered: {os.strerror(code)}",
                "the pod has to be privileged and to have hostPID",
            )
    finally:
        os.close(number)


def become_daemon(prefix: Path, arguments: Sequence[str]) -> NoReturn:
    """Become the node's architectd, with ``--kubernetes`` and the pod's service account.

    It reads token and ca.crt below a descriptor, since the node has no such folder. Returns never;
    raises ArchitectError or OSError.
    """
    try:
        account = os.open(SERVICE_ACCOUNT, os.O_PATH | os.O_DIRECTORY)
    except OSError as error:
        raise ArchitectError(
            str(SERVICE_ACCOUNT),
            os.strerror(error.errno or 0),
            "the pod needs a service account (automountServiceAccountToken)",
        ) from error
    os.set_inheritable(account, True)
    for kind in _NAMESPACES:
        # Entering the mount namespace makes its root the working directory as well.
        _enter(kind)
    program = prefix / "venv/bin/architectd"
    environment = {k: v for k, v in os.environ.items() if k not in _OF_THE_IMAGE}
    environment["PATH"] = _PATH
    words = [str(program), "--kubernetes", f"/proc/self/fd/{account}", *arguments]
    try:
        os.execve(program, words, environment)
    except OSError as error:
        raise ArchitectError(
            str(program),
            os.strerror(error.errno or 0),
            "the init container `architect-node install` puts it there",
        ) from error
