"""architectd: program. Started by `architect up` (or its systemd unit), one on a machine.

In a cluster `architect-node run` starts it, with the credentials and the chart's values as arguments.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import fcntl
import gc
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

from architect.adapters import heap, hot, rundir
from architect.adapters.bpf import ensure_bpffs
from architect.adapters.events import EventLog
from architect.adapters.gate import GateError
from architect.contract import durations, paths, quantities
from architect.contract.annotations import DEFAULTS, MINIMUM_SCALEDOWN_NS, Defaults, Monitor
from architect.contract.errors import ArchitectError, InvalidDuration
from architect.contract.kubernetes import NAMESPACE, TRANSFER_PORT
from architect.contract.moving import OnRestoreFailure
from architect.processes.architectd.context import Context
from architect.processes.architectd.gates import Gates
from architect.processes.architectd.registry import Registry
from architect.processes.architectd.server import Server

_ANSWER_KEEP_ALIVE: Final = "ARCHITECT_ANSWER_KEEP_ALIVE"
"""For a lone machine, where nothing gives the daemon options."""
MIB: Final = 1 << 20
_TRIM_S: Final = 60.0
"""Seconds between two times that unused memory is given back."""


def _duration(text: str) -> int:
    try:
        return durations.parse(text)
    except InvalidDuration as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _rate(text: str) -> int | None:
    if not text:
        return None
    try:
        found = int(quantities.parse(text))
    except ArchitectError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if found < MIB:
        raise argparse.ArgumentTypeError("at least 1Mi")
    return found


def options(words: list[str]) -> argparse.Namespace:
    """Reads the command line; exit status 2 for a wrong one."""
    parser = argparse.ArgumentParser(prog="architectd", description=__doc__)
    parser.add_argument(
        "--kubernetes",
        type=Path,
        metavar="DIRECTORY",
        help="take part in a cluster, with the service account in this directory",
    )
    parser.add_argument("--node", default="", help="this node's name in the cluster")
    parser.add_argument(
        "--default-scaledown-duration",
        type=_duration,
        default=DEFAULTS.scaledown_ns,
        metavar="DURATION",
        help="idle time of containers whose pod does not say (Go duration, default 60s)",
    )
    parser.add_argument(
        "--default-network-monitor",
        choices=[one.value for one in Monitor],
        default=DEFAULTS.monitor.value,
        help="network-monitor of containers whose pod does not say (default none)",
    )
    parser.add_argument(
        "--answer-keep-alive",
        action="store_true",
        default=os.environ.get(_ANSWER_KEEP_ALIVE, "") == "1",
        help="TCP keep-alive probes to sleepers are answered and do not wake "
        f"(network-monitor packets; default off, on with {_ANSWER_KEEP_ALIVE}=1 in the environment)",
    )
    parser.add_argument(
        "--distro",
        default="auto",
        help="kubernetesDistro of the chart, for architect-node uninstall at the end",
    )
    parser.add_argument("--namespace", default=NAMESPACE, help="where Architect is installed")
    parser.add_argument("--address", default="", help="this node's, at which others fetch pods")
    parser.add_argument(
        "--transfer-port",
        type=int,
        default=TRANSFER_PORT,
        help="the port there (default %(default)s)",
    )
    parser.add_argument(
        "--transfer-bandwidth-limit",
        type=_rate,
        default=None,
        metavar="QUANTITY",
        help="bytes a second, such as 100Mi, that are fetched from other nodes (default: no limit)",
    )
    parser.add_argument(
        "--on-restore-failure",
        choices=[one.value for one in OnRestoreFailure],
        default=OnRestoreFailure.WAIT.value,
        help="of a pod that has moved here and cannot be restored: wait, and try again (default), or "
        "start fresh after the second time; its state is kept",
    )
    found = parser.parse_args(words)
    if found.kubernetes is not None and not found.node:
        parser.error("--kubernetes needs --node")
    if found.kubernetes is not None and not found.address:
        parser.error("--kubernetes needs --address")
    if found.default_scaledown_duration < MINIMUM_SCALEDOWN_NS:
        parser.error("--default-scaledown-duration: at least 1s")
    return found


async def serve(given: argparse.Namespace) -> None:
    """Runs until SIGTERM or SIGINT. Nothing is woken and nothing is lost by either.

    Raises:
        ArchitectError: the cluster's credentials cannot be read.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    defaults = Defaults(
        scaledown_ns=given.default_scaledown_duration,
        monitor=Monitor(given.default_network_monitor),
    )
    context = Context(
        Gates(),
        EventLog(paths.EVENTS),
        hot.criu_version(),
        defaults,
        answers_keep_alives=given.answer_keep_alive,
        in_cluster=given.kubernetes is not None,
    )
    registry = Registry(context)
    side = None
    if given.kubernetes is not None:
        # Not on a lone machine: the client alone takes ten megabytes.
        from architect.processes.architectd.cluster.moves import Route
        from architect.processes.architectd.cluster.side import ClusterSide

        route = Route(
            given.namespace,
            given.address,
            given.transfer_port,
            given.transfer_bandwidth_limit,
            OnRestoreFailure(given.on_restore_failure),
        )
        side = ClusterSide(given.kubernetes, given.node, registry, context, route)
    await registry.recover()
    server = await Server(registry, context, side.moves if side else None).listen()
    if side is not None:
        side.start()
    await registry.catch_up()
    # What lives now lives long: keep the collector from walking it at each wake.
    gc.collect()
    gc.freeze()
    while not stop.is_set():
        heap.trim()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TRIM_S):
                await stop.wait()
    server.close()
    paths.DAEMON_SOCKET.unlink(missing_ok=True)
    if side is not None:
        await side.stop()
    registry.close()
    context.gates.close()


def main() -> None:
    """Program; exit status 1 with one line on stderr if another daemon runs or the machine is unfit."""
    given = options(sys.argv[1:])
    heap.share_one()
    paths.STATE.mkdir(parents=True, mode=0o755, exist_ok=True)
    paths.CHECKPOINTS.mkdir(exist_ok=True)
    paths.CHECKPOINTS.chmod(0o700)
    lock = paths.DAEMON_LOCK.open("a")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        print(
            "architectd: another architectd runs on this machine; `architect down` ends it",
            file=sys.stderr,
        )
        sys.exit(1)
    try:
        with rundir.held():
            ensure_bpffs(paths.BPF)
            hot.prepare()
    except (ArchitectError, GateError, OSError, subprocess.CalledProcessError) as error:
        print(f"architectd: {error}", file=sys.stderr)
        sys.exit(1)
    try:
        asyncio.run(serve(given))
    except ArchitectError as error:
        print(f"architectd: {error}", file=sys.stderr)
        sys.exit(1)
    lock.close()
    if paths.REMOVED.exists():
        # Everything is awake: what `architect-node install` did to the node is undone. That restarts
        # containerd, which then asks for our end once more.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        words = [str(paths.NODE_PROGRAM), "uninstall", "--host", "/", "--distro", given.distro]
        os.execv(words[0], words)
    rundir.release()


if __name__ == "__main__":
    main()
