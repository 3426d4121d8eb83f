"""architect-manager: program. Run by the Deployment of the same name; docs/reference.md has its options."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime as dt
import os
import signal
import socket
import ssl
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

import uvicorn

from architect.adapters import certificates
from architect.adapters.kube.client import Kube
from architect.contract import durations
from architect.contract.annotations import (
    DEFAULTS,
    MINIMUM_SCALEDOWN_NS,
    Defaults,
    Monitor,
)
from architect.contract.errors import ArchitectError
from architect.contract.kubernetes import CONTROL_PLANE, DAEMON, MANAGER, NAMESPACE
from architect.decisions.podreview import Policy
from architect.decisions.podtraffic import Proxy
from architect.processes.manager.certificates import (
    Folder,
    SharedSecret,
    Source,
    configurations,
)
from architect.processes.manager.cluster import Api
from architect.processes.manager.journal import note, take_over_logging
from architect.processes.manager.server import Webhooks

_SHORTEST_RETRY_S: Final = 0.5
"""Seconds until a failed look at the certificates is repeated; doubled each time."""
QUIET_S: Final = 2.0
"""Seconds without a question after which a draining server is taken to be forgotten by all."""


class Server(uvicorn.Server):
    """uvicorn, ended by us and not by its own signal handlers, so that it can drain before."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Captures none."""
        yield


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; on all addresses, of IPv6 too where there is any, if host is empty.

    Raises OSError.
    """
    if host:
        [family, *_] = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        # It may be switched off by sysctl all the same.
        with contextlib.suppress(OSError):
            return socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _service_account(namespace: str, name: str) -> str:
    return f"system:serviceaccount:{namespace}:{name}"


def _duration(text: str) -> int:
    try:
        found = durations.parse(text)
    except ArchitectError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    if found < MINIMUM_SCALEDOWN_NS:
        raise argparse.ArgumentTypeError("it must be 1s or more")
    return found


def _grace(text: str) -> int:
    if not (text.isascii() and text.isdecimal()):
        raise argparse.ArgumentTypeError("it must be a number of seconds, 0 or more")
    return int(text)


def options(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the options of a command line (None: of this process). Wrong usage exits with 2."""
    env = os.environ.get
    parser = argparse.ArgumentParser(prog=MANAGER, description="Architect's admission webhooks.")
    add = parser.add_argument
    add("--namespace", default=env("POD_NAMESPACE", NAMESPACE), help="where we run")
    add("--service", default=env("SERVICE_NAME", MANAGER), help="Service by which we are called")
    add("--host", default="", help="address to listen on; all, unless given")
    add("--port", type=int, default=8443, help="port to listen on; 0 takes a free one")
    add("--secret", default=f"{MANAGER}-tls", help="Secret for the certificate")
    add("--dns-name", action="append", help="name in it; the Service's, unless given")
    add("--mutating-configuration", default=MANAGER, metavar="NAME")
    add("--validating-configuration", default=MANAGER, metavar="NAME")
    add("--cert-dir", type=Path, help="use tls.crt and tls.key of this folder instead")
    add("--interval", type=float, default=30.0, help="seconds between looks at the certificates")
    add("--drain", type=float, default=15.0, help="seconds at most to go on serving when ended")
    add(
        "--trusted-user",
        action="append",
        help="who may write states on pods; our own service accounts, unless given",
    )
    add(
        "--default-network-monitor",
        choices=["", *(m.value for m in (Monitor.PACKETS, Monitor.CONNECTIONS))],
        default="",
    )
    add("--default-scaledown-duration", type=_duration, default=DEFAULTS.scaledown_ns)
    add(
        "--move-grace-period-seconds",
        type=_grace,
        default=0,
        help="least terminationGracePeriodSeconds of managed pods; 0: their own",
    )
    add("--image", default="", help="our own image, for the sidecars that answer probes")
    add(
        "--image-pull-policy",
        choices=["Always", "IfNotPresent", "Never"],
        default="IfNotPresent",
        help="of these sidecars",
    )
    return parser.parse_args(words)


def policy(chosen: argparse.Namespace) -> Policy:
    """Return what the options decide."""
    ours = [_service_account(chosen.namespace, name) for name in (DAEMON, CONTROL_PLANE, MANAGER)]
    monitor = chosen.default_network_monitor
    return Policy(
        defaults=Defaults(
            scaledown_ns=chosen.default_scaledown_duration,
            monitor=Monitor(monitor) if monitor else Monitor.NONE,
        ),
        trusted=frozenset(chosen.trusted_user or ours),
        proxy=Proxy(chosen.image, chosen.image_pull_policy) if chosen.image else None,
        move_grace_s=chosen.move_grace_period_seconds,
    )


async def _keep(source: Source, interval_s: float, stop: asyncio.Event) -> None:
    """Has the certificates looked after until the end; a failure is repeated sooner, and said once."""
    retry_s, said = _SHORTEST_RETRY_S, ""
    while not stop.is_set():
        try:
            await source.look()
            wait_s, retry_s, said = interval_s, _SHORTEST_RETRY_S, ""
        except ArchitectError as error:
            if str(error) != said:
                said = str(error)
                note("certificates", error=said)
            wait_s, retry_s = min(retry_s, interval_s), min(retry_s * 2, interval_s)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait_s)


async def drain(webhooks: Webhooks, longest_s: float) -> None:
    """Waits until nobody asks any more, ``longest_s`` at most: endpoints take a while to be forgotten."""
    webhooks.draining = True
    clock = asyncio.get_running_loop().time
    begin = clock()
    while True:
        now = clock()
        until = min(max(begin, webhooks.asked_at) + QUIET_S, begin + longest_s)
        if now >= until:
            return
        await asyncio.sleep(until - now)


async def run(
    webhooks: Webhooks,
    source: Source,
    context: ssl.SSLContext,
    chosen: argparse.Namespace,
    listening: socket.socket,
    stop: asyncio.Event,
) -> None:
    """Serves until ``stop`` is set, and then until nobody asks any more.

    ``context`` has some certificate already; ``listening`` is closed in the end.
    """
    config = uvicorn.Config(
        webhooks.app,
        ssl_context_factory=lambda _config, _default: context,
        lifespan="off",
        ws="none",
        http="h11",
        loop="asyncio",
        log_config=None,
        access_log=False,
        server_header=False,
        # Longer than the API server lets its own connections idle (90 s), so that it closes first.
        timeout_keep_alive=120,
        timeout_graceful_shutdown=10,
    )
    server = Server(config)
    serving = asyncio.create_task(server.serve([listening]))
    keeping = asyncio.create_task(_keep(source, chosen.interval, stop))
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({serving, keeping, stopping}, return_when=asyncio.FIRST_COMPLETED)
        if stopping.done():
            await drain(webhooks, chosen.drain)
    finally:
        stop.set()
        server.should_exit = True
        await asyncio.gather(serving, keeping, stopping)


async def serve(chosen: argparse.Namespace) -> None:
    """Serves until SIGTERM or SIGINT."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    service = f"{chosen.service}.{chosen.namespace}.svc"
    names = chosen.dns_name or [service, f"{service}.cluster.local"]
    context = certificates.server_context()
    # Nobody trusts this one; but without any, probes would fail for as long as the API server does.
    alone = certificates.renewed(None, names, dt.datetime.now(dt.UTC))
    certificates.put_to_use(context, alone.certificate.encode(), alone.key.encode())
    kube = Kube.found()
    api = Api(kube)
    source: Source
    if chosen.cert_dir:
        source = Folder(chosen.cert_dir, context)
    else:
        source = SharedSecret(
            api,
            context,
            chosen.namespace,
            chosen.secret,
            names,
            configurations(chosen.mutating_configuration, chosen.validating_configuration),
        )
    webhooks = Webhooks(policy(chosen), api, lambda: source.ready)
    try:
        listening = listen(chosen.host, chosen.port)
        note("listening", port=listening.getsockname()[1])
        await run(webhooks, source, context, chosen, listening, stop)
    finally:
        await kube.close()


def main() -> None:
    """Program; exit status 1 with one line on stderr if there is no API server to be had."""
    take_over_logging()
    chosen = options()
    try:
        asyncio.run(serve(chosen))
    except (ArchitectError, OSError) as error:
        print(f"{MANAGER}: {error}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
