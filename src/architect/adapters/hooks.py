"""Runs a container's lifecycle hooks (preStop, postStart) as the kubelet does.

Called by :mod:`architect.processes.architectd.lifecycle`: admission takes the hooks of managed containers out
of the pod, because a pod that moves must see neither, and keeps them in its annotations. What counts as a
failure is as in the kubelet (pkg/kubelet/lifecycle): any answer over HTTP is a success, whatever its status.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import os
import shutil
import ssl
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from urllib.parse import SplitResult, quote, urljoin, urlsplit

import msgspec

from architect.contract import paths
from architect.contract.errors import ArchitectError, quoted

RUNC_PLACES: Final = (paths.LIBEXEC, "/usr/bin", "/usr/sbin", "/usr/local/bin", "/usr/local/sbin")
"""As native/runc-architect looks for it: the first is a link, of a node that keeps it elsewhere."""
_AGENT: Final = "kube-lifecycle/architect"
_MOST_REDIRECTS: Final = 10
_REDIRECTS: Final = (301, 302, 303, 307, 308)
_MOST_READ: Final = 10 << 10
"""Bytes of an answer's body that are awaited."""
_PLAIN_HTTP: Final = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "HTTP_REQUEST")
"""What OpenSSL calls an answer that is not TLS."""
_UNQUOTED: Final = "/%:@!$&'()*+,;=~-._"


class HookError(ArchitectError):
    """A hook has failed, or its description cannot be read."""


class Exec(msgspec.Struct, frozen=True):
    """A command in the container."""

    command: list[str] = []


class Header(msgspec.Struct, frozen=True):
    """One header of a request."""

    name: str
    value: str = ""


class HttpGet(msgspec.Struct, frozen=True):
    """A request."""

    port: int | str
    path: str = ""
    host: str = ""
    scheme: str = ""
    httpHeaders: list[Header] = []  # noqa: N815 - the API's name


class Sleep(msgspec.Struct, frozen=True):
    """A pause."""

    seconds: int


class Handler(msgspec.Struct, frozen=True):
    """The API's LifecycleHandler. Of its members one is set; tcpSocket has never done anything."""

    exec: Exec | None = None
    httpGet: HttpGet | None = None  # noqa: N815 - the API's name
    sleep: Sleep | None = None


@dataclass(frozen=True, slots=True)
class Target:
    """The container whose hook it is."""

    runtime_root: str
    id: str
    pod_ip: str
    ports: Mapping[str, int]
    """Its named ports."""


def parse(annotation: str) -> dict[str, Handler]:
    """The hooks by container, as admission wrote them down.

    Raises:
        HookError: somebody else has written there.
    """
    try:
        return msgspec.json.decode(annotation, type=dict[str, Handler])
    except msgspec.MsgspecError as error:
        raise HookError(
            what=f"lifecycle hooks {quoted(annotation)} cannot be read",
            why=str(error),
            fix="only architect's webhook writes them; create the pod anew",
        ) from error


async def run(handler: Handler, target: Target, timeout_s: float | None) -> None:
    """Returns when the hook has succeeded; ``timeout_s`` None waits for as long as it takes.

    A hook that takes longer is left alone, as by the kubelet: it ends with its container at the latest.

    Raises:
        HookError: it failed, or takes longer.
    """
    what = _name(handler)
    try:
        async with asyncio.timeout(timeout_s):
            if handler.exec is not None:
                await _execute(handler.exec.command, target, what)
            elif handler.httpGet is not None:
                await _request(handler.httpGet, target, timeout_s, what)
            elif handler.sleep is not None:
                await asyncio.sleep(handler.sleep.seconds)
            else:
                raise HookError(what, "it has neither exec nor httpGet nor sleep", "give it one")
    except TimeoutError as error:
        why = f"it did not end within {timeout_s or 0.0:.3g} s"
        fix = "shorten it, or raise terminationGracePeriodSeconds"
        raise HookError(what, why, fix) from error


def _name(handler: Handler) -> str:
    """What a message calls it. No further words, queries or headers: they may hold secrets."""
    if handler.exec is not None:
        return f"exec {quoted(next(iter(handler.exec.command), ''))}"
    if handler.httpGet is not None:
        return f"httpGet {quoted(handler.httpGet.path.partition('?')[0])}"
    return "sleep" if handler.sleep is not None else "hook"


# ---- exec ----------------------------------------------------------------------------------------------


async def _execute(words: Sequence[str], target: Target, what: str) -> None:
    runc = shutil.which("runc", path=os.pathsep.join(map(str, RUNC_PLACES)))
    if runc is None:
        raise HookError(what, "runc was not found", "install the package runc")
    with tempfile.TemporaryDirectory(prefix="architect-hook-") as directory:
        log = Path(directory) / "log"
        options = ["--root", target.runtime_root, "--log", str(log), "--log-format", "json"]
        # Its output goes nowhere: events must not show what it says. As under containerd, a background
        # process that keeps the hook's output open is waited for, by runc.
        try:
            process = await asyncio.create_subprocess_exec(
                runc, *options, "exec", target.id, *words,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.DEVNULL,
                stderr=asyncio.subprocess.DEVNULL,
            )  # fmt: skip
        except (OSError, ValueError) as error:
            raise HookError(what, f"runc cannot be started: {error}", "see the hook") from error
        try:
            status = await process.wait()
        finally:
            if process.returncode is None:
                # runc only: what it has started goes on in the container.
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
                await process.wait()
        if status:
            why = _complaint(log) or f"its exit status was {status}"
            raise HookError(what, why, "run it by `kubectl exec` to see what it says")


def _complaint(log: Path) -> str:
    """The last error in runc's log: there if the command could not be started."""
    found = ""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        for line in log.read_text(errors="replace").splitlines():
            entry = json.loads(line)
            if entry.get("level") in ("error", "fatal"):
                found = str(entry.get("msg", ""))
    return found


# ---- HTTP ----------------------------------------------------------------------------------------------


async def _request(get: HttpGet, target: Target, timeout_s: float | None, what: str) -> None:
    url = _url(get, target, what)
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Exception | None] = loop.create_future()

    def finish(error: Exception | None) -> None:
        if not done.done():
            done.set_result(error)

    def work() -> None:
        error: Exception | None = None
        try:
            _get(url, get.httpHeaders, timeout_s)
        except (OSError, http.client.HTTPException, ValueError) as caught:
            error = caught
        with contextlib.suppress(RuntimeError):  # The daemon has ended meanwhile.
            loop.call_soon_threadsafe(finish, error)

    # A thread of its own: hooks may take minutes, and the loop's few threads serve wakes.
    threading.Thread(target=work, name="hook", daemon=True).start()
    failure = await done
    if isinstance(failure, TimeoutError) and timeout_s is not None:
        raise failure
    if failure is not None:
        why = str(failure) or repr(failure)
        raise HookError(what, why, "see the container's log") from failure


def _url(get: HttpGet, target: Target, what: str) -> SplitResult:
    host = get.host or target.pod_ip
    if not host:
        raise HookError(what, "the pod has no address", "give httpGet a host")
    scheme = get.scheme.lower() or "http"
    if scheme not in ("http", "https"):
        raise HookError(what, f"scheme {quoted(get.scheme)} is unknown", "write HTTP or HTTPS")
    host = host.strip("[]")
    netloc = f"[{host}]" if ":" in host else host
    try:
        # Only what follows the host counts, as in the kubelet.
        parts = urlsplit(get.path)
    except ValueError:
        parts = SplitResult("", "", get.path, "", "")
    return SplitResult(scheme, f"{netloc}:{_port(get, target, what)}", parts.path, parts.query, "")


def _port(get: HttpGet, target: Target, what: str) -> int:
    text = str(get.port)
    if not text.isdecimal() and text not in target.ports:
        fix = "name a port of the container, or write its number"
        raise HookError(what, f"there is no port {quoted(text)}", fix)
    port = int(text) if text.isdecimal() else target.ports[text]
    if not 1 <= port <= 65535:
        raise HookError(what, f"{port} is not a port", "write a number from 1 to 65535")
    return port


def _get(url: SplitResult, given: Sequence[Header], timeout_s: float | None) -> None:
    """Asks and follows redirects, but not to other hosts. Raises OSError, HTTPException, ValueError."""
    headers = _headers(given)
    origin = url.hostname
    for _ in range(_MOST_REDIRECTS):
        try:
            location = _ask(url, headers, timeout_s)
        except ssl.SSLError as error:
            if error.reason not in _PLAIN_HTTP:
                raise
            # It was plain HTTP before the kubelet knew schemes here; no password goes out in the clear.
            url = url._replace(scheme="http")
            headers = [one for one in headers if one[0].lower() != "authorization"]
            location = _ask(url, headers, timeout_s)
        found = urlsplit(urljoin(url.geturl(), location))
        if not location or found.hostname != origin or found.scheme not in ("http", "https"):
            return
        if urlsplit(location).netloc:
            headers = [one for one in headers if one[0].lower() != "host"]
        url = found
    raise OSError(f"stopped after {_MOST_REDIRECTS} redirects")


def _headers(given: Sequence[Header]) -> list[tuple[str, str]]:
    """What is sent: an empty Accept means none."""
    headers = [(one.name, one.value) for one in given]
    names = {name.lower() for name, _ in headers}
    if "user-agent" not in names:
        headers.append(("User-Agent", _AGENT))
    if "accept" not in names:
        headers.append(("Accept", "*/*"))
    return [(name, value) for name, value in headers if value or name.lower() != "accept"]


def _ask(url: SplitResult, headers: Sequence[tuple[str, str]], timeout_s: float | None) -> str:
    """One request; returns where its answer redirects to, or nothing."""
    host = url.hostname or ""
    connection: http.client.HTTPConnection
    if url.scheme == "https":
        connection = http.client.HTTPSConnection(
            host, url.port, timeout=timeout_s, context=_unverified()
        )
    else:
        connection = http.client.HTTPConnection(host, url.port, timeout=timeout_s)
    path = "/" + quote(url.path, safe=_UNQUOTED).lstrip("/")
    if url.query:
        path += "?" + quote(url.query, safe=_UNQUOTED + "?")
    own_host = any(name.lower() == "host" for name, _ in headers)
    with contextlib.closing(connection):
        connection.putrequest("GET", path, skip_host=own_host, skip_accept_encoding=True)
        for name, value in headers:
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        if answer.status in _REDIRECTS:
            return answer.headers.get("Location", "")
        with contextlib.suppress(OSError, http.client.HTTPException):
            answer.read(_MOST_READ)
        return ""


def _unverified() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
