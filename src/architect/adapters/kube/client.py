"""Calls to the Kubernetes API server: one method a verb, a deadline on each, one error for all of them.

lightkube reads the configuration (service account or kubeconfig), sets up TLS, and reads the token again
when the API server no longer takes it; requests go through the HTTP client that it makes. Its own verbs are
not used: an informer needs bookmarks and a deadline on a watch, which they do not have.

Used by architectd, the control plane, `architect-node` and their tests.
"""

from __future__ import annotations

import asyncio
import enum
import os
import re
import socket
import ssl
from collections.abc import AsyncGenerator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, Self, TypeVar

import httpx2
import msgspec
from lightkube.config.client_adapter import user_auth, verify_cluster
from lightkube.config.kubeconfig import KubeConfig, SingleConfig
from lightkube.config.models import User
from lightkube.core.exceptions import ConfigError

from architect.adapters.kube.resources import Object, Status, WatchBookmark
from architect.contract.errors import ArchitectError
from architect.decisions.resources import Server

SERVICE_ACCOUNT: Final = Path("/var/run/secrets/kubernetes.io/serviceaccount")
CONNECT_S: Final = 5.0
CALL_S: Final = 15.0
"""A call that has no answer by then has failed. The API server gives up mutating calls after 34 s itself,
but nothing of ours is worth waiting that long for: it is decided again and sent again."""
PAGE: Final = 500
"""Objects a page of a list: what client-go uses; some 5 MB of pods."""

_KEEPALIVE: Final = (
    (socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1),
    (socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 15),
    (socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 5),
    (socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3),
    (socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 30_000),
)
"""A server that has vanished without a word is noticed after 30 s (tcp(7)), also by a watch that only
listens; client-go finds out by HTTP/2 pings after 45 s."""

T = TypeVar("T", bound=Object)


class KubeError(ArchitectError):
    """A call to the API server failed.

    ``status`` is the HTTP status (0: no answer), ``reason`` the API's word for it ("Conflict"),
    ``retry_after`` seconds that the server asks to be left alone.
    """

    def __init__(
        self,
        what: str,
        why: str,
        fix: str = "",
        status: int = 0,
        reason: str = "",
        retry_after: float | None = None,
    ) -> None:
        super().__init__(what, why, fix)
        self.status = status
        self.reason = reason
        self.retry_after = retry_after

    @property
    def temporary(self) -> bool:
        """Whether the same call may succeed later: no answer, overload, or the server's own failure."""
        return self.status in (0, 429) or self.status >= 500

    @property
    def gone(self) -> bool:
        """The resource version, or the rest of a list, is no longer there: list again."""
        return self.status == 410 or "too large resource version" in self.why.lower()


class Style(enum.StrEnum):
    """How a patch is to be read."""

    MERGE = "application/merge-patch+json"
    STRATEGIC = "application/strategic-merge-patch+json"
    JSON = "application/json-patch+json"


class Changed(enum.StrEnum):
    """What a line of a watch says."""

    ADDED = "ADDED"
    MODIFIED = "MODIFIED"
    DELETED = "DELETED"
    BOOKMARK = "BOOKMARK"
    """Nothing happened; only the version is news."""


@dataclass(frozen=True, slots=True)
class Line(Generic[T]):
    """One line of a watch. ``object`` is None for a bookmark."""

    change: Changed
    version: str
    object: T | None


class _RawLine(msgspec.Struct, frozen=True, gc=False):
    type: str
    object: msgspec.Raw


class _ListMetadata(msgspec.Struct, frozen=True, gc=False):
    resourceVersion: str = ""  # noqa: N815 - names are those of the API
    continue_: str = msgspec.field(name="continue", default="")


class _RawPage(msgspec.Struct, frozen=True, gc=False):
    metadata: _ListMetadata = _ListMetadata()
    items: list[msgspec.Raw] | None = None


_decoders: dict[type[Object], msgspec.json.Decoder[Any]] = {}


def decode(kind: type[T], data: bytes | msgspec.Raw) -> T:
    """An object out of its JSON.

    Raises:
        KubeError: it is no such object.
    """
    decoder = _decoders.get(kind)
    if decoder is None:
        # Requests may be numbers in what a client sent long ago; everything else is as the API defines it.
        decoder = _decoders[kind] = msgspec.json.Decoder(kind)
    try:
        found: T = decoder.decode(data)
    except msgspec.MsgspecError as error:
        raise KubeError(f"an answer about {kind.plural}", str(error), status=502) from error
    return found


class Kube:
    """A connection to one API server. Safe to be used by many tasks of one event loop."""

    def __init__(self, config: SingleConfig) -> None:
        limits = httpx2.Timeout(CALL_S, connect=CONNECT_S)
        user = config.user or User()
        try:
            # Proxies are for the outside world; what the environment says of them is not for this server.
            trust = verify_cluster(config.cluster, user, config.abs_file, trust_env=False)
            transport = httpx2.AsyncHTTPTransport(
                verify=trust, trust_env=False, socket_options=_KEEPALIVE
            )
            self._http = httpx2.AsyncClient(
                base_url=config.cluster.server,
                auth=user_auth(user),
                timeout=limits,
                transport=transport,
                trust_env=False,
            )
        except (ConfigError, OSError, ssl.SSLError) as error:
            raise KubeError(
                "the API server's certificate cannot be read", str(error) or type(error).__name__
            ) from error
        self.server = config.cluster.server
        self.namespace = config.namespace

    @classmethod
    def in_cluster(cls, directory: Path = SERVICE_ACCOUNT) -> Self:
        """With a pod's service account: ``directory`` has token, ca.crt and namespace.

        It may be ``/proc/self/fd/N``, for a program that has entered another mount namespace. The kubelet
        replaces the token in it; it is read again when the API server refuses the old one.

        Raises:
            KubeError: it is none, or the environment does not say where the API server is.
        """
        try:
            config = KubeConfig.from_service_account(directory).get()
        except KeyError as error:
            raise KubeError(
                "no API server is known",
                f"the environment has no {error.args[0]}",
                "this program is meant to run in a pod",
            ) from error
        except (ConfigError, OSError) as error:
            raise KubeError(
                f"the service account in {directory} cannot be read",
                str(error),
                "see whether the pod has automountServiceAccountToken: true",
            ) from error
        assert config is not None
        return cls(config)

    @classmethod
    def from_kubeconfig(cls, path: Path) -> Self:
        """With the current context of a kubeconfig.

        Raises:
            KubeError: it cannot be read.
        """
        try:
            config = KubeConfig.from_file(path).get()
        except (ConfigError, OSError, KeyError, msgspec.MsgspecError) as error:
            raise KubeError(f"the kubeconfig {path} cannot be used", str(error)) from error
        assert config is not None
        return cls(config)

    @classmethod
    def found(cls, directory: Path = SERVICE_ACCOUNT) -> Self:
        """In a pod as its service account, elsewhere as KUBECONFIG says.

        Raises:
            KubeError: neither.
        """
        kubeconfig = os.environ.get("KUBECONFIG")
        if kubeconfig and not directory.exists():
            return cls.from_kubeconfig(Path(kubeconfig))
        return cls.in_cluster(directory)

    async def close(self) -> None:
        """Ends all connections; watches fail."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # -- verbs ------------------------------------------------------------------------------------

    async def get(self, kind: type[T], name: str, namespace: str = "") -> T:
        """One object. Raises KubeError; 404 if it does not exist."""
        return decode(kind, await self._call("GET", _path(kind, namespace, name)))

    async def page(
        self,
        kind: type[T],
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        after: str = "",
    ) -> tuple[list[T], str, str]:
        """A part of a list: the objects, the version of the list, and where the next part begins.

        ``namespace`` empty means all. The last part has nothing after it. Raises KubeError; 410 if the
        list has become too old to go on with.
        """
        query = {"limit": str(PAGE), "labelSelector": labels, "fieldSelector": fields}
        query["continue"] = after
        data = await self._call("GET", _path(kind, namespace), query=query)
        try:
            raw = msgspec.json.decode(data, type=_RawPage)
        except msgspec.MsgspecError as error:
            raise KubeError(f"a list of {kind.plural}", str(error), status=502) from error
        objects = [decode(kind, one) for one in raw.items or ()]
        return objects, raw.metadata.resourceVersion, raw.metadata.continue_

    async def listed(
        self, kind: type[T], *, namespace: str = "", labels: str = "", fields: str = ""
    ) -> list[T]:
        """All objects of a kind. Raises KubeError."""
        found: list[T] = []
        after = ""
        while True:
            objects, _, after = await self.page(
                kind, namespace=namespace, labels=labels, fields=fields, after=after
            )
            found += objects
            if not after:
                return found

    async def watch(
        self,
        kind: type[T],
        version: str,
        *,
        namespace: str = "",
        labels: str = "",
        fields: str = "",
        seconds: int,
        stall_s: float,
    ) -> AsyncGenerator[Line[T], None]:
        """What has happened since ``version``; ends after ``seconds``, by the server.

        A server that does not end it by then, or does not answer, is taken for dead ``stall_s`` later:
        a connection that no longer carries anything looks like one where nothing happens.

        Raises:
            KubeError: it could not be started (410: the version is gone), or it broke off.
        """
        query = {
            "watch": "1",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(seconds),
            "labelSelector": labels,
            "fieldSelector": fields,
        }
        path = _path(kind, namespace)
        what = f"watch of {kind.plural}"
        limits = httpx2.Timeout(CALL_S, connect=CONNECT_S, read=seconds + stall_s)
        request = self._http.build_request(
            "GET", path, params=_without_empty(query), timeout=limits
        )
        loop = asyncio.get_running_loop()
        end = loop.time() + seconds + stall_s
        response: httpx2.Response | None = None
        rest = b""
        try:
            async with asyncio.timeout(CALL_S):
                response = await self._http.send(request, stream=True)
            if response.is_error:
                data = await response.aread()
                raise _refused(what, response, data)
            chunks = response.aiter_bytes()
            while True:
                async with asyncio.timeout_at(end):
                    chunk = await anext(chunks, None)
                if chunk is None:
                    return
                *lines, rest = (rest + chunk).split(b"\n")
                for line in lines:
                    if line:
                        yield _line(kind, what, line)
        except TimeoutError as error:
            raise KubeError(
                what, f"nothing for {seconds + stall_s:.0f} s, not even its end"
            ) from error
        except httpx2.HTTPError as error:
            raise _unreachable(what, error) from error
        finally:
            if response is not None:
                await response.aclose()

    async def create(
        self, kind: type[T], body: Mapping[str, Any] | Object, namespace: str = ""
    ) -> T:
        """Makes an object. Raises KubeError; 409 if there is one of that name."""
        return decode(kind, await self._call("POST", _path(kind, namespace), body=body))

    async def replace(
        self, kind: type[T], name: str, body: Mapping[str, Any] | Object, namespace: str = ""
    ) -> T:
        """Writes a whole object. Raises KubeError; 409 if its resourceVersion is no longer the newest."""
        return decode(kind, await self._call("PUT", _path(kind, namespace, name), body=body))

    async def patch(
        self,
        kind: type[T],
        name: str,
        body: Mapping[str, Any] | list[dict[str, Any]],
        namespace: str = "",
        *,
        subresource: str = "",
        style: Style = Style.MERGE,
    ) -> T:
        """Changes an object and returns it as it is then.

        With ``metadata.uid`` or ``metadata.resourceVersion`` in the body, only that object, or only that
        version of it, is changed. Raises KubeError; 409 if it is another one.
        """
        path = _path(kind, namespace, name, subresource)
        return decode(kind, await self._call("PATCH", path, body=body, media=style.value))

    async def delete(
        self,
        kind: type[T],
        name: str,
        namespace: str = "",
        *,
        uid: str = "",
        grace: int | None = None,
    ) -> None:
        """Deletes an object, that with this ``uid`` alone if given. Raises KubeError."""
        body: dict[str, Any] = {"kind": "DeleteOptions", "apiVersion": "v1"}
        if uid:
            body["preconditions"] = {"uid": uid}
        if grace is not None:
            body["gracePeriodSeconds"] = grace
        await self._call("DELETE", _path(kind, namespace, name), body=body)

    async def raw(self, path: str) -> Any:
        """The JSON at any path of the API server, such as ``version``. Raises KubeError."""
        try:
            return msgspec.json.decode(await self._call("GET", path))
        except msgspec.MsgspecError as error:
            raise KubeError(path, str(error), status=502) from error

    async def abilities(self) -> Server:
        """What the server can do about resources of running pods. Raises KubeError.

        That there is pods/resize is asked of the server; that it takes lower memory limits without a
        restart is a rule of its validation and shows in nothing but its version (Kubernetes 1.34).
        """
        version = await self.raw("version")
        core = await self.raw("api/v1")
        names = {one.get("name") for one in core.get("resources", [])}
        minor = re.match(r"[0-9]+", str(version.get("minor", "")))
        newer = str(version.get("major", "1")) != "1" or (minor is not None and int(minor[0]) >= 34)
        return Server(resize="pods/resize" in names, lower_memory_limits=newer)

    # -- transport --------------------------------------------------------------------------------

    async def _call(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Any = None,
        media: str = "application/json",
    ) -> bytes:
        what = f"{method} {path}"
        request = self._http.build_request(
            method,
            path,
            params=_without_empty(query or {}),
            content=None if body is None else msgspec.json.encode(body),
            headers={"Content-Type": media} if body is not None else None,
        )
        try:
            async with asyncio.timeout(CALL_S):
                response = await self._http.send(request)
        except TimeoutError as error:
            raise KubeError(what, f"no answer within {CALL_S:.0f} s") from error
        except httpx2.HTTPError as error:
            raise _unreachable(what, error) from error
        except (ConfigError, OSError) as error:
            raise KubeError(what, f"the token cannot be read: {error}") from error
        if response.is_error:
            raise _refused(what, response, response.content)
        return response.content


def _without_empty(query: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in query.items() if value}


def _path(kind: type[Object], namespace: str = "", name: str = "", subresource: str = "") -> str:
    parts = [kind.api]
    if namespace and kind.namespaced:
        parts += ["namespaces", namespace]
    parts.append(kind.plural)
    parts += [part for part in (name, subresource) if part]
    return "/".join(parts)


def _line(kind: type[T], what: str, line: bytes) -> Line[T]:
    try:
        raw = msgspec.json.decode(line, type=_RawLine)
        if raw.type == "ERROR":
            raise _from_status(what, 500, msgspec.json.decode(raw.object, type=Status))
        change = Changed(raw.type)
        if change is Changed.BOOKMARK:
            bookmark = msgspec.json.decode(raw.object, type=WatchBookmark)
            return Line(change, bookmark.metadata.resourceVersion, None)
    except (msgspec.MsgspecError, ValueError) as error:
        raise KubeError(what, f"a line that is no event: {error}", status=502) from error
    found = decode(kind, raw.object)
    return Line(change, found.metadata.resourceVersion, found)


def _unreachable(what: str, error: httpx2.HTTPError) -> KubeError:
    why = str(error) or type(error).__name__
    return KubeError(what, why, "see whether the API server is up and can be reached from here")


def _refused(what: str, response: httpx2.Response, data: bytes) -> KubeError:
    try:
        status = msgspec.json.decode(data, type=Status)
    except msgspec.MsgspecError:
        status = Status(message=data[:200].decode(errors="replace"))
    after = response.headers.get("Retry-After", "")
    return _from_status(
        what, response.status_code, status, float(after) if after.isdigit() else None
    )


_NO_MATTER_OF_RIGHTS: Final = ("exceeded quota", "usage per ")
"""Parts of the messages of ResourceQuota and LimitRange, which refuse with the status of a missing right."""


def _from_status(
    what: str, code: int, status: Status, retry_after: float | None = None
) -> KubeError:
    code = status.code or code
    fix = ""
    if code == 401:
        fix = "the token is no longer taken: see whether the service account still exists"
    elif code == 403 and not any(word in status.message for word in _NO_MATTER_OF_RIGHTS):
        fix = "see whether the component's ClusterRole and its binding are as the chart made them"
    if retry_after is None:
        retry_after = (status.details or {}).get("retryAfterSeconds")
    why = status.message or status.reason or f"HTTP status {code}"
    return KubeError(what, why, fix, status=code, reason=status.reason, retry_after=retry_after)
