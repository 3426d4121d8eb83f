"""What the manager asks of the API server. Called by :mod:`.server` and :mod:`.certificates`.

Every failure, of the network too, is a KubeError that says which call failed.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import msgspec

from architect.adapters.kube.client import Kube, KubeError, Style
from architect.adapters.kube.resources import Object
from architect.contract.annotations import CheckpointName
from architect.contract.kubernetes import GROUP, MANAGER, WAKE_REQUESTED

CONFLICT: Final = 409
"""HTTP status: somebody else was faster. Look again."""
MISSING: Final = 404
"""HTTP status: there is no such object."""

_REGISTRATION: Final = "apis/admissionregistration.k8s.io/v1"


class _Secret(Object, frozen=True, kw_only=True):
    plural: ClassVar[str] = "secrets"

    data: dict[str, str] | None = None


class _ClientConfig(msgspec.Struct, frozen=True):
    caBundle: str | None = None  # noqa: N815 - names are those of the API


class _Webhook(msgspec.Struct, frozen=True):
    name: str
    clientConfig: _ClientConfig  # noqa: N815


class _Mutating(Object, frozen=True, kw_only=True):
    api: ClassVar[str] = _REGISTRATION
    plural: ClassVar[str] = "mutatingwebhookconfigurations"
    namespaced: ClassVar[bool] = False

    webhooks: list[_Webhook] | None = None


class _Validating(_Mutating, frozen=True, kw_only=True):
    plural: ClassVar[str] = "validatingwebhookconfigurations"


class Configuration(enum.Enum):
    """The two kinds of webhook configurations."""

    MUTATING = _Mutating
    VALIDATING = _Validating

    @property
    def plural(self) -> str:
        """Its name in the API, for messages."""
        plural: str = self.value.plural
        return plural


class _Verdict(msgspec.Struct, frozen=True):
    allowed: bool


class _AccessReview(Object, frozen=True, kw_only=True):
    api: ClassVar[str] = "apis/authorization.k8s.io/v1"
    plural: ClassVar[str] = "subjectaccessreviews"
    namespaced: ClassVar[bool] = False

    status: _Verdict = _Verdict(allowed=False)


class _Pod(Object, frozen=True, kw_only=True):
    plural: ClassVar[str] = "pods"

    spec: dict[str, Any]


@dataclass(frozen=True, slots=True)
class User:
    """Somebody as the API server has authenticated them."""

    username: str = ""
    uid: str = ""
    groups: tuple[str, ...] = ()
    extra: Mapping[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class SecretData:
    """A Secret's content and the version to give when it is replaced."""

    data: Mapping[str, str] = field(repr=False)
    """Base64 by key."""
    version: str
    """metadata.resourceVersion."""


class Api:
    """The API server, in the words of what we need from it."""

    def __init__(self, kube: Kube) -> None:
        """``kube`` stays the caller's to close."""
        self._kube = kube

    async def secret(self, namespace: str, name: str) -> SecretData | None:
        """Return a Secret; None if there is none. Raises KubeError."""
        try:
            found = await self._kube.get(_Secret, name, namespace)
        except KubeError as error:
            if error.status == MISSING:
                return None
            raise
        return SecretData(found.data or {}, found.metadata.resourceVersion)

    async def write_secret(
        self, namespace: str, name: str, data: Mapping[str, str], version: str | None
    ) -> None:
        """Creates a Secret (``version`` None) or replaces its content if it is still ``version``.

        Raises KubeError; CONFLICT if somebody else was faster.
        """
        if version is None:
            metadata = {"name": name, "namespace": namespace, "labels": {"app": MANAGER}}
            await self._kube.create(_Secret, {"metadata": metadata, "data": data}, namespace)
            return
        patch = {"metadata": {"resourceVersion": version}, "data": data}
        await self._kube.patch(_Secret, name, patch, namespace)

    async def trust(self, kind: Configuration, name: str, bundle: str) -> bool:
        """Has all webhooks of a configuration trust ``bundle`` (a caBundle).

        Return whether anything had to be changed. Raises KubeError; MISSING if there is no such
        configuration.
        """
        found = await self._kube.get(kind.value, name)
        patch: list[dict[str, Any]] = []
        for i, hook in enumerate(found.webhooks or []):
            if hook.clientConfig.caBundle != bundle:
                at = f"/webhooks/{i}"
                # The list may have been changed since: then none of this may be done.
                patch.append({"op": "test", "path": f"{at}/name", "value": hook.name})
                patch.append({"op": "add", "path": f"{at}/clientConfig/caBundle", "value": bundle})
        if patch:
            await self._kube.patch(kind.value, name, patch, style=Style.JSON)
        return bool(patch)

    async def may_get(self, user: User, checkpoint: CheckpointName) -> bool:
        """Whether RBAC lets ``user`` get a PersistentCheckpoint. Raises KubeError."""
        attributes = {
            "group": GROUP,
            "resource": "persistentcheckpoints",
            "verb": "get",
            "namespace": checkpoint.namespace,
            "name": checkpoint.name,
        }
        spec = {
            "user": user.username,
            "uid": user.uid,
            "groups": user.groups,
            "extra": user.extra,
            "resourceAttributes": attributes,
        }
        return (await self._kube.create(_AccessReview, {"spec": spec})).status.allowed

    async def pod(self, namespace: str, name: str) -> dict[str, Any]:
        """Return what of a pod tells whether it sleeps, as JSON. Raises KubeError; MISSING."""
        found = await self._kube.get(_Pod, name, namespace)
        return {"metadata": {"labels": found.labels}, "spec": found.spec}

    async def request_wake(self, namespace: str, name: str, when: str) -> None:
        """Writes on a pod that it was asked for at ``when`` (RFC 3339). Raises KubeError."""
        patch = {"metadata": {"annotations": {WAKE_REQUESTED: when}}}
        await self._kube.patch(_Pod, name, patch, namespace)
