"""architect-control-plane: program. `run` (default) in its Deployment, `remove` in the chart's hook.

`run` ends with status 1 when it loses its lease, so that its pod's next start begins clean; with 0 on
SIGTERM, after giving the lease up.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import logging
import os
import signal
import socket
import sys
import uuid
from pathlib import Path
from typing import Final

from architect.adapters.kube.client import SERVICE_ACCOUNT, Kube
from architect.adapters.kube.events import Recorder
from architect.adapters.kube.lease import Election, LostLease, Terms
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import CONTROL_PLANE, NAMESPACE
from architect.decisions.reconcile import PATIENCE_S
from architect.processes.controlplane import health, log, remove
from architect.processes.controlplane.controller import Controller

_log: Final = logging.getLogger("architect.processes.controlplane.main")

_FLUSH_S: Final = 2.0
"""For events that are still to be sent at the end."""


async def run(kube: Kube, options: argparse.Namespace, stop: asyncio.Event) -> None:
    """Contends for the lease, leads, until ``stop``.

    Raises:
        LostLease: somebody else may lead now.
    """
    recorder = Recorder(kube, CONTROL_PLANE, os.environ.get("NODE_NAME", socket.gethostname()))
    election = Election(
        kube,
        options.lease,
        options.namespace,
        options.identity,
        Terms(options.lease_duration, options.renew_deadline, options.retry_period),
    )
    controller: Controller | None = None

    async def lead() -> None:
        nonlocal controller
        controller = Controller(
            kube,
            options.namespace,
            recorder,
            patience_s=options.patience,
            may_act=lambda: election.leading,
        )
        await controller.run()

    def ready() -> str:
        if controller is not None and election.leading and not controller.synced:
            return "not everything has been listed yet"
        return ""

    sending = asyncio.create_task(recorder.run())
    leading = asyncio.create_task(election.lead(lead))
    serving = asyncio.create_task(health.serve(options.host, options.port, ready))
    stopping = asyncio.create_task(stop.wait())
    tasks = {sending, leading, serving, stopping}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if stopping in done:
            _log.info("told to stop")
        for task in done:
            task.result()
    finally:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_S):
                await recorder.flushed()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _arguments(words: list[str]) -> argparse.Namespace:
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument(
        "--namespace",
        default=os.environ.get("POD_NAMESPACE", NAMESPACE),
        help="where Architect is installed (default: POD_NAMESPACE, else %(default)s)",
    )
    common.add_argument(
        "--service-account",
        type=Path,
        default=SERVICE_ACCOUNT,
        help="directory with token and ca.crt; where there is none, KUBECONFIG is used",
    )
    common.add_argument("--log-level", default="info", help="debug, info, warning or error")
    parser = argparse.ArgumentParser(prog=CONTROL_PLANE)
    commands = parser.add_subparsers(dest="command", required=True)
    leads = commands.add_parser("run", parents=[common], help="reconcile (the default)")
    leads.add_argument("--host", default="", help="address of the probes' port (default: all)")
    leads.add_argument("--port", type=int, default=8081, help="for /healthz and /readyz")
    leads.add_argument(
        "--patience",
        type=float,
        default=PATIENCE_S,
        metavar="SECONDS",
        help="how long something is left to architectd (default: %(default)g)",
    )
    terms = Terms()
    leads.add_argument("--lease", default=CONTROL_PLANE, help="name of the Lease")
    leads.add_argument("--identity", default=f"{socket.gethostname()}_{uuid.uuid4()}")
    leads.add_argument("--lease-duration", type=float, default=terms.duration_s, metavar="SECONDS")
    leads.add_argument(
        "--renew-deadline", type=float, default=terms.renew_deadline_s, metavar="SECONDS"
    )
    leads.add_argument("--retry-period", type=float, default=terms.retry_s, metavar="SECONDS")
    ends = commands.add_parser("remove", parents=[common], help="wake all, before an uninstall")
    ends.add_argument(
        "--deadline",
        type=float,
        default=remove.DEADLINE_S,
        metavar="SECONDS",
        help="give up after that long, and let hibernation go on (default: %(default)g)",
    )
    ends.add_argument(
        "--force-after",
        type=float,
        metavar="SECONDS",
        help="go on without nodes that have not answered for that long; what sleeps there stays asleep",
    )
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        words = ["run", *words]
    options = parser.parse_args(words)
    if options.command == "run" and not (
        options.lease_duration > options.renew_deadline > options.retry_period > 0
    ):
        parser.error("--lease-duration > --renew-deadline > --retry-period > 0 has to hold")
    return options


async def _main(options: argparse.Namespace) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with Kube.found(options.service_account) as kube:
        if options.command == "run":
            await run(kube, options, stop)
        else:
            await remove.remove(
                kube,
                options.namespace,
                deadline_s=options.deadline,
                force_after_s=options.force_after,
                stop=stop,
            )


def main() -> None:
    """Program; exit status 0 done, 1 failed with one line on stderr, 2 wrong usage."""
    options = _arguments(sys.argv[1:])
    log.to_stderr(options.log_level)
    try:
        asyncio.run(_main(options))
    except (ArchitectError, LostLease) as error:
        print(f"{CONTROL_PLANE}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
