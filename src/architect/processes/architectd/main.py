"""architectd: program. Started by `architect up` (or its systemd unit), one on a machine."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import gc
import signal
import subprocess
import sys

from architect.adapters import hot, rundir
from architect.adapters.bpf import ensure_bpffs
from architect.adapters.events import EventLog
from architect.adapters.gate import GateError
from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.processes.architectd.context import Context
from architect.processes.architectd.gates import Gates
from architect.processes.architectd.registry import Registry
from architect.processes.architectd.server import Server


async def serve() -> None:
    """Runs until SIGTERM or SIGINT. Nothing is woken and nothing is lost by either."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    context = Context(Gates(), EventLog(paths.EVENTS), hot.criu_version())
    registry = Registry(context)
    await registry.recover()
    server = await Server(registry, context).listen()
    # What lives now lives long: keep the collector from walking it at each wake.
    gc.collect()
    gc.freeze()
    await stop.wait()
    server.close()
    paths.DAEMON_SOCKET.unlink(missing_ok=True)
    registry.close()
    context.gates.close()


def main() -> None:
    """Program; exit status 1 with one line on stderr if another daemon runs or the machine is unfit."""
    paths.STATE.mkdir(parents=True, mode=0o755, exist_ok=True)
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
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(serve())
    lock.close()
    rundir.release()


if __name__ == "__main__":
    main()
