"""The test cluster's command line: python -m tests.cluster [--dir DIR] COMMAND, as root.

  build                     build or find what the cluster runs
  up [OPTIONS]              bring it up; returns when all nodes are Ready
  down                      take everything away
  add [N]                   one more node
  crash N, boot N           switch a node off at once and on again; its disk is kept
  start|stop|restart|kill N PROGRAM
                            containerd, kubelet or kube-proxy of a node; killed, it comes back
  in N COMMAND...           run a command inside a node
  metrics                   add metrics-server, for `kubectl top`, to the cluster that is up
  load ARCHIVE [N...]       import an image archive in nodes, by default in all that are up
  stats [SECONDS]           memory and CPU of each program

Called by the Makefile (make cluster, cluster-load, cluster-down) and by hand, with
PYTHONPATH=.:scripts; it takes the standard library only.
"""

import argparse
import json
import os
from pathlib import Path
from typing import Any

from common import main, say
from tests.cluster import build, install, stats
from tests.cluster.base import ClusterError, need_root
from tests.cluster.cluster import Cluster
from tests.cluster.settings import HOME, Options


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as problem:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON: {problem}") from problem


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tests.cluster",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--dir", type=Path, default=HOME, help="where all state is (%(default)s)")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up")
    up.add_argument("--nodes", type=int, default=3)
    up.add_argument("--image", action="append", default=[], help="an archive that all nodes get")
    up.add_argument("--share", action="append", default=[], help="a folder that all nodes see")
    up.add_argument("--no-dns", action="store_true", help="without CoreDNS")
    up.add_argument("--metrics", action="store_true", help="with metrics-server")
    up.add_argument(
        "--old-containerd",
        type=int,
        action="append",
        default=[],
        metavar="N",
        help="a node that runs containerd 1.7",
    )
    up.add_argument(
        "--handlers",
        type=_json,
        default={},
        help='JSON: {"NAME": {"binary": PATH, "pod_annotations": [...]}}',
    )
    up.add_argument(
        "--reserved", type=_json, default={"memory": "1Gi"}, help="JSON: systemReserved"
    )
    up.add_argument("--kubelet", type=_json, default={}, help="JSON for the KubeletConfiguration")
    for name in ("build", "down", "metrics"):
        commands.add_parser(name)
    commands.add_parser("add").add_argument("node", type=int, nargs="?")
    for name in ("crash", "boot"):
        commands.add_parser(name).add_argument("node", type=int)
    for name in ("start", "stop", "restart", "kill"):
        program = commands.add_parser(name)
        program.add_argument("node", type=int)
        program.add_argument("program")
    inside = commands.add_parser("in")
    inside.add_argument("node", type=int)
    inside.add_argument("words", nargs=argparse.REMAINDER)
    install_ = commands.add_parser("install", help="architect, by helm")
    install_.add_argument("--set", action="append", default=[], help="a value of the chart")
    load = commands.add_parser("load")
    load.add_argument("archive", type=Path)
    load.add_argument("nodes", type=int, nargs="*")
    commands.add_parser("stats").add_argument("seconds", type=float, nargs="?", default=10.0)
    return parser


def _up(cluster: Cluster, given: argparse.Namespace) -> None:
    options = Options.from_json(
        {
            "nodes": given.nodes,
            "images": [str(Path(path).resolve()) for path in given.image],
            "share": [str(Path(path).resolve()) for path in given.share],
            "dns": not given.no_dns,
            "metrics": given.metrics,
            "old_containerd": given.old_containerd,
            "handlers": given.handlers,
            "reserved": given.reserved,
            "kubelet": given.kubelet,
        }
    )
    cluster.up(options, build.programs())
    say("cluster", f"`. {os.path.relpath(cluster.env)}` gives you kubectl and helm")


def _program(cluster: Cluster, given: argparse.Namespace) -> None:
    node = cluster.existing(given.node)
    if given.command == "kill":
        node.kill(given.program)
        return
    if given.command in ("stop", "restart"):
        node.stop(given.program)
    if given.command in ("start", "restart"):
        node.start(given.program)
        node.await_health(given.program)


def body(arguments: list[str]) -> None:
    given = _parser().parse_args(arguments)
    need_root()
    cluster = Cluster(given.dir)
    match given.command:
        case "build":
            build.programs()
        case "up":
            _up(cluster, given)
        case "down":
            cluster.down()
        case "add":
            say("cluster", f"node {cluster.add(given.node)} is Ready")
        case "metrics":
            cluster.add_metrics_server()
            say("cluster", "metrics-server answers")
        case "crash":
            cluster.crash(given.node)
        case "boot":
            cluster.boot(given.node)
        case "in":
            if not given.words:
                raise ClusterError("in", "no command was given", "for example: in 1 ps ax")
            command = cluster.existing(given.node).command(*given.words)
            os.execvp(command[0], command)
        case "load":
            for name in cluster.load(given.archive, given.nodes):
                say("cluster", name)
        case "install":
            install.install(cluster, *given.set)
        case "stats":
            print(stats.table(stats.measure(cluster, given.seconds)))
        case _:
            _program(cluster, given)


if __name__ == "__main__":
    main("cluster", body)
