"""/healthz and /readyz over plain HTTP, for the kubelet's probes of the control plane.

Called by :mod:`architect.processes.controlplane.main`. Healthy: the event loop answers. Ready: a leader has
listed everything once; a standby is ready as soon as it contends for the lease.
"""

from __future__ import annotations

import contextlib
from collections.abc import Awaitable, Callable, Generator, MutableMapping
from typing import Any

import uvicorn

_Message = MutableMapping[str, Any]


class _Server(uvicorn.Server):
    """Leaves the process' signals to the program."""

    @contextlib.contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        yield


async def serve(host: str, port: int, ready: Callable[[], str]) -> None:
    """Answers until cancelled. ``ready`` says why it is not ready; empty if it is.

    Raises:
        SystemExit: the port is taken.
    """

    async def application(
        scope: _Message,
        receive: Callable[[], Awaitable[_Message]],
        send: Callable[[_Message], Awaitable[None]],
    ) -> None:
        why = {"/healthz": "", "/livez": "", "/readyz": ready()}.get(scope["path"])
        status = 404 if why is None else 503 if why else 200
        text = "not found" if why is None else why or "ok"
        headers = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": f"{text}\n".encode()})

    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        lifespan="off",
        access_log=False,
        log_config=None,
        http="h11",
        ws="none",
        loop="asyncio",
        timeout_graceful_shutdown=1,
    )
    server = _Server(config)
    try:
        await server.serve()
    finally:
        # Cancelled, it leaves its socket open.
        if server.started:
            await server.shutdown()
