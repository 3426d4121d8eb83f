"""A small stand-in of the Kubernetes API server on the loopback, for tests of what talks to one.

It keeps objects as the real one does: versions count up, watches replay from a version, what was compacted
away is 410, writes with a stale version are 409. What a real one cannot be told to do, this one can: stall,
break off, refuse, forget. The tests in tests/cluster hold the same against the real one.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

from architect.adapters.kube.client import Kube


class Standin:
    """The server. ``requests`` are the lines of all requests so far: method, path, query."""

    def __init__(self) -> None:
        self.objects: dict[str, dict[str, dict[str, Any]]] = {}
        self.history: list[tuple[int, str, str, dict[str, Any]]] = []
        self.version = 100
        self.compacted = 0
        self.page = 500
        self.stalled = False
        """Watches send nothing any more, not even their end."""
        self.resize = True
        self.refuse_resize: str | None = None
        self.fail: list[int] = []
        """Statuses that the next requests are answered with."""
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.port = 0
        self._changed = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._handlers: set[asyncio.Task[None]] = set()

    # -- what tests do to it ----------------------------------------------------------------------

    async def start(self) -> None:
        """Listens; at the port it had before, if any."""
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", self.port or None)
        self.port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Breaks all connections off and refuses new ones."""
        if self._server is not None:
            self._server.close()
        self.cut()
        # Each handler sees its connection end; nothing of them may be left when this returns.
        await asyncio.gather(*self._handlers)

    def cut(self) -> None:
        """Breaks all connections off."""
        for writer in list(self._writers):
            writer.transport.abort()

    def kube(self, directory: Path) -> Kube:
        """A client of it."""
        config = {
            "current-context": "it",
            "clusters": [{"name": "it", "cluster": {"server": f"http://127.0.0.1:{self.port}"}}],
            "contexts": [{"name": "it", "context": {"cluster": "it", "user": "it"}}],
            "users": [{"name": "it", "user": {"token": "none"}}],
        }
        path = directory / "kubeconfig"
        path.write_text(json.dumps(config))
        return Kube.from_kubeconfig(path)

    async def put(
        self, plural: str, name: str, namespace: str = "", **fields: Any
    ) -> dict[str, Any]:
        """Makes or changes an object; ``fields`` are its top fields, metadata is merged."""
        key = f"{namespace}/{name}"
        known = self.objects.setdefault(plural, {})
        old = known.get(key)
        metadata = {"name": name, "uid": f"uid-{name}", **fields.pop("metadata", {})}
        if namespace:
            metadata["namespace"] = namespace
        new = {**(old or {}), **fields, "metadata": {**(old or {}).get("metadata", {}), **metadata}}
        return await self._store(plural, key, new, "MODIFIED" if old else "ADDED")

    async def drop(self, plural: str, name: str, namespace: str = "") -> None:
        """Deletes an object."""
        key = f"{namespace}/{name}"
        await self._store(plural, key, self.objects[plural][key], "DELETED")

    def compact(self) -> None:
        """Forgets all history: watches from any earlier version are 410."""
        self.compacted = self.version
        self.history.clear()

    def asked(self, method: str, query: str = "") -> int:
        """How many requests there were; ``query`` a parameter that they had."""
        return sum(one[0] == method and (not query or query in one[2]) for one in self.requests)

    # -- the server -------------------------------------------------------------------------------

    async def _store(self, plural: str, key: str, new: dict[str, Any], what: str) -> dict[str, Any]:
        self.version += 1
        new = json.loads(json.dumps(new))
        new["metadata"]["resourceVersion"] = str(self.version)
        known = self.objects.setdefault(plural, {})
        if what == "DELETED":
            del known[key]
        else:
            known[key] = new
        self.history.append((self.version, plural, what, new))
        async with self._changed:
            self._changed.notify_all()
        return new

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._handlers.add(task)
        task.add_done_callback(self._handlers.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            with contextlib.suppress(OSError, asyncio.IncompleteReadError):
                while await self._one(reader, writer):
                    pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        method, target, _ = head.split("\r\n", 1)[0].split(" ")
        lines = head.split("\r\n")
        headers = {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])
        }
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        split = urlsplit(target)
        query = {name: values[0] for name, values in parse_qs(split.query).items()}
        self.requests.append((method, split.path, query))
        if self.fail:
            await self._answer(writer, self.fail.pop(0), {"kind": "Status", "message": "told to"})
            return True
        parts = split.path.strip("/").split("/")
        parts = parts[2:] if parts[0] == "api" else parts[3:]
        namespace = ""
        if parts[:1] == ["namespaces"]:
            namespace, parts = parts[1], parts[2:]
        if method == "GET" and query.get("watch"):
            await self._watch(writer, parts[0], namespace, query)
            return False
        status, answer = await self._do(method, split.path, parts, namespace, query, body)
        await self._answer(writer, status, answer)
        return True

    async def _answer(self, writer: asyncio.StreamWriter, status: int, answer: Any) -> None:
        data = json.dumps(answer).encode()
        head = f"HTTP/1.1 {status} X\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        await writer.drain()

    async def _do(
        self,
        method: str,
        path: str,
        parts: list[str],
        namespace: str,
        query: dict[str, str],
        body: bytes,
    ) -> tuple[int, Any]:
        if path == "/version":
            return 200, {"major": "1", "minor": "35", "gitVersion": "v1.35.4"}
        if path == "/api/v1":
            return 200, {"resources": [{"name": "pods"}] + [{"name": "pods/resize"}] * self.resize}
        plural, known = parts[0], self.objects.setdefault(parts[0], {})
        if method == "GET" and len(parts) == 1:
            return self._list(known, namespace, query)
        if method == "POST":
            new = json.loads(body)
            key = f"{namespace}/{new['metadata']['name']}"
            new["metadata"].setdefault("uid", f"uid-{self.version}")
            if key in known:
                return 409, _status(409, "AlreadyExists")
            return 201, await self._store(plural, key, new, "ADDED")
        key = f"{namespace}/{parts[1]}"
        if key not in known:
            return 404, _status(404, "NotFound")
        if method == "GET":
            return 200, known[key]
        if method == "DELETE":
            uid = json.loads(body or b"{}").get("preconditions", {}).get("uid")
            if uid not in (None, known[key]["metadata"]["uid"]):
                return 409, _status(409, "Conflict")
            await self.drop(plural, parts[1], namespace)
            return 200, {"kind": "Status"}
        new, old = json.loads(body), known[key]
        wanted = new.get("metadata", {})
        if (
            wanted.get("resourceVersion", old["metadata"]["resourceVersion"])
            != (old["metadata"]["resourceVersion"])
        ):
            return 409, _status(409, "Conflict")
        if wanted.get("uid", old["metadata"]["uid"]) != old["metadata"]["uid"]:
            return 422, _status(422, "Invalid", "metadata.uid: field is immutable")
        if parts[2:] == ["resize"]:
            if self.refuse_resize:
                return 403, _status(403, "Forbidden", self.refuse_resize)
            new = _resized(old, new)
        elif method == "PATCH":
            new = _merged(old, new)
        else:
            new["metadata"] = {**old["metadata"], **wanted}
        return 200, await self._store(plural, key, new, "MODIFIED")

    def _list(
        self, known: dict[str, dict[str, Any]], namespace: str, query: dict[str, str]
    ) -> tuple[int, Any]:
        keys = [key for key in sorted(known) if not namespace or key.startswith(f"{namespace}/")]
        at, version = 0, self.version
        if "continue" in query:
            at, version = (int(one) for one in query["continue"].split("-"))
            if version < self.compacted:
                return 410, _status(410, "Expired")
        end = at + self.page
        more = f"{end}-{version}" if end < len(keys) else ""
        metadata = {"resourceVersion": str(version), "continue": more}
        return 200, {"metadata": metadata, "items": [known[key] for key in keys[at:end]]}

    async def _watch(
        self, writer: asyncio.StreamWriter, plural: str, namespace: str, query: dict[str, str]
    ) -> None:
        version = int(query["resourceVersion"])
        if version < self.compacted:
            await self._answer(writer, 410, _status(410, "Expired"))
            return
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n")
        loop = asyncio.get_running_loop()
        end = loop.time() + float(query["timeoutSeconds"])
        sent = version
        gone = asyncio.ensure_future(writer.wait_closed())
        while not gone.done():
            if not self.stalled:
                if sent < self.compacted and not self.history:
                    _line(writer, "ERROR", _status(410, "Expired"))
                    break
                for number, kind, what, one in list(self.history):
                    if number > sent and kind == plural:
                        if not namespace or one["metadata"].get("namespace") == namespace:
                            _line(writer, what, one)
                        sent = number
                if loop.time() >= end:
                    _line(writer, "BOOKMARK", {"metadata": {"resourceVersion": str(self.version)}})
                    break
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(0.05), self._changed:
                    await self._changed.wait()
        gone.cancel()


def _line(writer: asyncio.StreamWriter, what: str, one: dict[str, Any]) -> None:
    writer.write(json.dumps({"type": what, "object": one}).encode() + b"\n")


def _status(code: int, reason: str, message: str = "") -> dict[str, Any]:
    return {"kind": "Status", "code": code, "reason": reason, "message": message or reason}


def _merged(old: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    found = dict(old) if isinstance(old, dict) else {}
    for name, value in patch.items():
        if value is None:
            found.pop(name, None)
        else:
            found[name] = _merged(found.get(name), value)
    return found


def _resized(old: dict[str, Any], patch: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(json.dumps(old))
    for where, containers in patch["spec"].items():
        for container in containers:
            for one in found["spec"][where]:
                if one["name"] == container["name"]:
                    one["resources"] = _merged(one.get("resources", {}), container["resources"])
    return found


@contextlib.asynccontextmanager
async def standin() -> AsyncIterator[tuple[Standin, Kube]]:
    """A server and a client of it."""
    server = Standin()
    await server.start()
    with tempfile.TemporaryDirectory() as directory:
        kube = server.kube(Path(directory))
        try:
            yield server, kube
        finally:
            await kube.close()
            await server.stop()
