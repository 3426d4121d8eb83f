"""architect-node: install, run, status and uninstall, on the node that this pod is on.

The chart's DaemonSet calls it; see the package. Errors are one line on standard error and exit
status 1. What was done is printed, a line each; nothing if nothing had to be.
"""

from __future__ import annotations

import argparse
import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NoReturn

from architect.adapters import hostns
from architect.adapters.hostfiles import Host
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.decisions import distros
from architect.processes.node import place, status
from architect.processes.node.install import install
from architect.processes.node.uninstall import uninstall

_FIXES: Final = {
    errno.EROFS: "the node's file system has to be writable there",
    errno.ENOSPC: "make room on the node's disk",
    errno.EACCES: "run this as root, in a privileged pod",
    errno.EPERM: "run this as root, in a privileged pod",
}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="architect-node", description=__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    parsers = {
        "install": verbs.add_parser("install", help="put architect on the node"),
        "uninstall": verbs.add_parser("uninstall", help="take it off the node"),
        "status": verbs.add_parser("status", help="what is on the node, as JSON"),
    }
    for verb, one in parsers.items():
        root = "/proc/1/root" if verb == "install" else "/"
        one.add_argument("--host", type=Path, default=Path(root), help="the node's root directory")
        one.add_argument("--distro", default=distros.AUTO, help="kubernetesDistro of the chart")
        one.add_argument("--prefix", default=str(paths.PREFIX), help="our folder on the node")
    parsers["install"].add_argument(
        "--source", type=Path, default=paths.PREFIX, help="our folder in the image"
    )
    run = verbs.add_parser("run", help="become the daemon on the node", add_help=False)
    run.add_argument("arguments", nargs=argparse.REMAINDER, help="for architectd")
    return parser


def run(verb: str, options: argparse.Namespace) -> list[str]:
    """One of the verbs but `run`; what there is to print. Raises ArchitectError or OSError."""
    node = place.find(Host(options.host), options.prefix.rstrip("/"), options.distro)
    if verb == "install":
        return install(node, options.source)
    if verb == "uninstall":
        return uninstall(node)
    return [json.dumps(status.status(node), indent=2)]


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["run"]:
        # argparse takes options behind REMAINDER for its own.
        return argparse.Namespace(verb="run", arguments=list(words[1:]))
    return _parser().parse_args(words)


def main(words: Sequence[str] | None = None) -> NoReturn:
    """Program; see the module."""
    options = _arguments(words)
    try:
        if options.verb == "run":
            hostns.become_daemon(paths.PREFIX, options.arguments)
        for line in run(options.verb, options):
            print(line, flush=True)
    except ArchitectError as error:
        sys.exit(f"architect-node: {error}")
    except OSError as error:
        fix = _FIXES.get(error.errno or 0, "")
        sys.exit(f"architect-node: {ArchitectError(options.verb, str(error), fix)}")
    sys.exit(0)


if __name__ == "__main__":
    main()
