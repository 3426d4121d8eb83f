"""The webhooks over HTTP (admission.k8s.io/v1): reads the question, asks podreview, answers.

Whoever reaches the port can ask; so an answer changes nothing but what it is about: reviews have no
effects of their own, and all that a forged CONNECT can do is to wake a sleeping pod.
"""

from __future__ import annotations

import asyncio
import base64
import datetime as dt
import re
from collections.abc import Awaitable, Callable
from typing import Any, Final, Literal, Protocol

import msgspec
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from architect.adapters.kube.client import KubeError
from architect.contract.annotations import CheckpointName
from architect.contract.errors import ArchitectError, quoted
from architect.decisions import podreview
from architect.decisions.podreview import Policy, Review
from architect.processes.manager.cluster import MISSING, User
from architect.processes.manager.journal import note

LARGEST_BODY: Final = 8 << 20
"""Bytes. etcd takes objects of 1.5 MiB; a question holds two, the old and the new."""
ANSWER_S: Final = 5.0
"""Seconds for what a review asks of the API server; webhooks have timeoutSeconds of 10."""
WAKE_S: Final = 1.5
"""Seconds for a wake; its webhook has timeoutSeconds of 2."""

_NAME: Final = "[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?"
PODS: Final = "pods"
WORKLOADS: Final = {
    ("apps", "deployments"),
    ("apps", "statefulsets"),
    ("apps", "daemonsets"),
    ("apps", "replicasets"),
    ("batch", "jobs"),
    ("batch", "cronjobs"),
}


class Cluster(Protocol):
    """The part of :class:`.cluster.Api` that is needed here."""

    async def may_get(self, user: User, checkpoint: CheckpointName) -> bool:
        """Whether RBAC lets the user get a PersistentCheckpoint."""

    async def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """A pod as JSON."""

    async def request_wake(self, namespace: str, name: str, when: str) -> None:
        """Has the pod woken."""


class _Resource(msgspec.Struct):
    resource: str
    group: str = ""


class _UserInfo(msgspec.Struct):
    username: str = ""
    uid: str = ""
    groups: list[str] | None = None
    extra: dict[str, list[str]] | None = None


class _Question(msgspec.Struct, rename="camel"):
    uid: str
    operation: str
    resource: _Resource
    sub_resource: str = ""
    namespace: str = ""
    name: str = ""
    dry_run: bool | None = None
    user_info: _UserInfo = msgspec.field(default_factory=_UserInfo)
    object: dict[str, Any] | None = None
    old_object: dict[str, Any] | None = None


class _AdmissionReview(msgspec.Struct, rename="camel"):
    api_version: Literal["admission.k8s.io/v1"]
    kind: Literal["AdmissionReview"]
    request: _Question


class Malformed(ArchitectError):
    """A request that no API server with our webhook configurations sends."""


_DECODER: Final = msgspec.json.Decoder(_AdmissionReview)


async def _body(request: Request) -> bytes:
    """The request's body. Raises Malformed beyond LARGEST_BODY, before it is all in memory."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LARGEST_BODY:
            raise Malformed(
                "reading the AdmissionReview", f"it is larger than {LARGEST_BODY} bytes"
            )
    return bytes(body)


async def _question(request: Request) -> _Question:
    what = "reading the AdmissionReview"
    body = await _body(request)
    try:
        question = _DECODER.decode(body).request
    except RecursionError:
        raise Malformed(what, "it is nested too deeply") from None
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise Malformed(what, str(error)) from error
    if not question.uid:
        raise Malformed(what, "request.uid is empty")
    return question


def _require_object(question: _Question, kind: str | None) -> None:
    """Refuse questions of webhooks that are not configured as ours are."""
    if question.operation not in (podreview.CREATE, podreview.UPDATE):
        return
    wanted = {"object": question.object}
    if question.operation == podreview.UPDATE:
        wanted["oldObject"] = question.old_object
    for name, value in wanted.items():
        if value is None:
            raise Malformed("reading the AdmissionReview", f"request.{name} is missing")
        found = value.get("kind")
        if kind is not None and found != kind:
            why = f"request.{name}.kind is {quoted(found)}, not {kind}"
            raise Malformed("reading the AdmissionReview", why)


def _require_resource(question: _Question, known: set[tuple[str, str]], sub: str = "") -> None:
    found = question.resource.group, question.resource.resource
    if found not in known or question.sub_resource != sub:
        shown = "/".join(filter(None, (*found, question.sub_resource)))
        why = f"this webhook does not review {quoted(shown)}"
        raise Malformed("reading the AdmissionReview", why, "correct the rules of the webhook")


def _asked(question: _Question) -> podreview.Request:
    return podreview.Request(
        operation=question.operation,
        object=question.object or {},
        old=question.old_object or {},
        namespace=question.namespace,
        username=question.user_info.username,
    )


def _answer(question: _Question, review: Review) -> Response:
    response: dict[str, Any] = {"uid": question.uid, "allowed": review.allowed}
    if not review.allowed:
        code, reason = (403, "Forbidden") if review.forbidden else (422, "Invalid")
        response["status"] = {"code": code, "reason": reason, "message": review.message}
    if review.warnings:
        response["warnings"] = review.warnings
    if review.patch:
        patch = base64.b64encode(msgspec.json.encode(review.patch))
        response |= {"patchType": "JSONPatch", "patch": patch.decode()}
    reply = {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "response": response}
    return Response(msgspec.json.encode(reply), media_type="application/json")


def _name(question: _Question) -> str:
    """The object's name, or of those that a controller creates what it begins with."""
    metadata = (question.object or {}).get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    name = question.name or metadata.get("name") or metadata.get("generateName")
    return name if isinstance(name, str) else ""


def _note(question: _Question, review: Review) -> None:
    """Logs what was more than a plain yes."""
    what = "refused" if not review.allowed else "patched" if review.patch else "warned"
    if what == "warned" and not review.warnings:
        return
    note(
        what,
        uid=question.uid,
        operation=question.operation,
        resource=question.resource.resource,
        namespace=question.namespace,
        name=_name(question),
        user=question.user_info.username,
        message=review.message,
        warnings=review.warnings,
        patch=[operation["path"] for operation in review.patch],
        dry_run=question.dry_run or None,
    )


Handler = Callable[[Request], Awaitable[Response]]


class Webhooks:
    """The application, and whether it is to be sent requests."""

    def __init__(self, policy: Policy, cluster: Cluster, ready: Callable[[], bool]) -> None:
        """``ready`` says whether the server's certificate is in use and trusted."""
        self._policy = policy
        self._cluster = cluster
        self._ready = ready
        self.draining = False
        """Set when the server is about to end: connections are closed after their answer."""
        self.asked_at = 0.0
        """Time of the last question, by the loop's clock."""
        self.app = Starlette(
            routes=[
                Route("/mutate", self._guarded(self._mutate), methods=["POST"]),
                Route("/validate", self._guarded(self._validate), methods=["POST"]),
                Route("/validate-workload", self._guarded(self._workload), methods=["POST"]),
                Route("/attach", self._guarded(self._attach), methods=["POST"]),
                Route("/healthz", self._healthz),
                Route("/readyz", self._readyz),
            ]
        )

    def _guarded(self, handler: Handler) -> Handler:
        """Answers 400 to what cannot be read, and has connections closed when draining."""

        async def guarded(request: Request) -> Response:
            self.asked_at = asyncio.get_running_loop().time()
            try:
                response = await handler(request)
            except Malformed as error:
                note("malformed", path=request.url.path, message=str(error))
                # What is left of the body is not read, so nothing else can come after it.
                headers = {"Connection": "close"}
                return PlainTextResponse(f"{error}\n", status_code=400, headers=headers)
            except ClientDisconnect:
                return Response(status_code=400)
            if self.draining:
                response.headers["Connection"] = "close"
            return response

        return guarded

    async def _healthz(self, _: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def _readyz(self, _: Request) -> Response:
        if self.draining:
            return PlainTextResponse("ending\n", status_code=503)
        if not self._ready():
            why = "no certificate that the API server trusts yet"
            return PlainTextResponse(f"{why}\n", status_code=503)
        return PlainTextResponse("ok\n")

    async def _mutate(self, request: Request) -> Response:
        question = await _question(request)
        _require_resource(question, {("", PODS)})
        _require_object(question, "Pod")
        review = podreview.complete_pod(_asked(question), self._policy)
        _note(question, review)
        return _answer(question, review)

    async def _validate(self, request: Request) -> Response:
        question = await _question(request)
        _require_resource(question, {("", PODS)})
        _require_object(question, "Pod")
        review = podreview.review_pod(_asked(question), self._policy)
        if review.allowed and review.needs is not None:
            review = await self._checked(question, review, review.needs)
        _note(question, review)
        return _answer(question, review)

    async def _checked(self, question: _Question, review: Review, needs: CheckpointName) -> Review:
        """The review, or a refusal if the user may not get the checkpoint that the pod needs."""
        info = question.user_info
        user = User(info.username, info.uid, tuple(info.groups or ()), info.extra or {})
        try:
            async with asyncio.timeout(ANSWER_S):
                if await self._cluster.may_get(user, needs):
                    return review
        except KubeError as error:
            return podreview.refuse_checkpoint(needs, user.username, str(error))
        except TimeoutError:
            why = f"no answer of the API server within {ANSWER_S:g} s"
            return podreview.refuse_checkpoint(needs, user.username, why)
        return podreview.refuse_checkpoint(needs, user.username)

    async def _workload(self, request: Request) -> Response:
        question = await _question(request)
        _require_resource(question, WORKLOADS)
        _require_object(question, None)
        review = podreview.review_workload(_asked(question), self._policy)
        _note(question, review)
        return _answer(question, review)

    async def _attach(self, request: Request) -> Response:
        """Has a sleeping pod woken that somebody attaches to: attach does not reach its runtime."""
        question = await _question(request)
        _require_resource(question, {("", PODS)}, "attach")
        if question.operation == "CONNECT":
            for part in (question.namespace, question.name):
                # They become part of the path of a call.
                if not re.fullmatch(_NAME, part):
                    why = f"{quoted(part)} is no name of a pod or its namespace"
                    raise Malformed("reading the AdmissionReview", why)
            await self._wake(question)
        return _answer(question, podreview.UNTOUCHED)

    async def _wake(self, question: _Question) -> None:
        where = {"uid": question.uid, "namespace": question.namespace, "name": question.name}
        container = (question.object or {}).get("container")
        try:
            async with asyncio.timeout(WAKE_S):
                pod = await self._cluster.pod(question.namespace, question.name)
                chosen = container if isinstance(container, str) else None
                if not podreview.is_asleep(pod, chosen) or question.dry_run:
                    return
                now = dt.datetime.now(dt.UTC).isoformat(timespec="microseconds")
                when = now.replace("+00:00", "Z")
                await self._cluster.request_wake(question.namespace, question.name, when)
                note("wake", **where, user=question.user_info.username)
        except (KubeError, TimeoutError) as error:
            # The attach goes on: it waits until something else wakes the container.
            if not isinstance(error, KubeError) or error.status != MISSING:
                why = str(error) or f"no answer within {WAKE_S:g} s"
                note("wake failed", **where, message=why)
