"""Waiting with an end, and trying again, as the parts of moving do it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Final, TypeVar

from architect.adapters.kube.client import KubeError
from architect.adapters.kube.informer import Backoff, Timing

T = TypeVar("T")
_UNREAD: Final = (401, 403)
"""HTTP statuses of an API server that has just started, and has not read yet who may do what."""


async def within(seconds: float, wait: Awaitable[object]) -> None:
    """Returns when that has happened, or after ``seconds`` at the latest."""
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(wait, max(0.0, seconds))


async def insist(call: Callable[[], Awaitable[T]], until: Callable[[], bool] = lambda: False) -> T:
    """Calls the API again and again while it does not answer, or as one does that has just started.

    Raises:
        KubeError: it answered with another refusal, or ``until`` became true meanwhile.
    """
    backoff = Backoff(Timing())
    while True:
        try:
            return await call()
        except KubeError as error:
            if not (error.temporary or error.status in _UNREAD) or until():
                raise
            await asyncio.sleep(backoff.next(error.retry_after))
