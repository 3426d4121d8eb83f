"""The Kubernetes client, informer, lease and control plane against the real API server and kubelet.

What a stand-in is told to do in tests/unit, a real API server does here: an old version is 410, writes
conflict, tokens expire, the kubelet carries a resize out. Between client and server is a proxy of our own
that stalls, breaks off and refuses. A cluster that is up already can be used by its kubeconfig in
ARCHITECT_TEST_KUBECONFIG; everything is made in a namespace of its own.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import json
import os
import uuid
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, ClassVar, Final

import pytest

from architect.adapters.kube import pods
from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import Recorder, Reference
from architect.adapters.kube.informer import Change, Informer, Timing
from architect.adapters.kube.lease import Election, LostLease, Terms
from architect.adapters.kube.resources import ConfigMap, Event, Lease, Object, Pod
from architect.contract.annotations import CPU_REQUESTS, MEMORY_REQUESTS
from architect.contract.kubernetes import RUNNING, SCALED_DOWN, status_label
from architect.decisions import podstatus
from architect.processes.controlplane import controller
from tests.cluster.cluster import Cluster
from tests.cluster.objects import IMAGE

pytestmark = pytest.mark.cluster

DEADLINE_S: Final = 30.0
QUICK: Final = Timing(watch_s=4, stall_s=1, first_delay_s=0.05, longest_delay_s=0.5)


class Namespace(Object, frozen=True, kw_only=True):
    """A namespace."""

    plural: ClassVar[str] = "namespaces"
    namespaced: ClassVar[bool] = False


class TokenRequest(Object, frozen=True, kw_only=True):
    """A request for a token of the service account ``default``."""

    plural: ClassVar[str] = "serviceaccounts/default/token"
    status: dict[str, Any]


@pytest.fixture(scope="module")
def kubeconfig(request: pytest.FixtureRequest) -> Path:
    """Of a cluster that is up, or of the one that is brought up for the tests."""
    given = os.environ.get("ARCHITECT_TEST_KUBECONFIG")
    if given:
        return Path(given)
    cluster: Cluster = request.getfixturevalue("cluster")
    return cluster.home / "admin.kubeconfig"


@pytest.fixture(scope="module")
def namespace(kubeconfig: Path) -> Iterator[str]:
    """A namespace of the tests' own."""
    name = f"controlplane-{uuid.uuid4().hex[:8]}"

    async def make() -> None:
        async with Kube.from_kubeconfig(kubeconfig) as kube:
            await kube.create(Namespace, {"metadata": {"name": name}})
            # Pods are refused until its service account is there.
            await until("a service account", lambda: tokens(kube, name))

    async def drop() -> None:
        async with Kube.from_kubeconfig(kubeconfig) as kube:
            for pod in await kube.listed(Pod, namespace=name):
                with contextlib.suppress(KubeError):
                    await kube.delete(Pod, pod.metadata.name, name, grace=0)
            await kube.delete(Namespace, name)

    asyncio.run(make())
    yield name
    asyncio.run(drop())


async def tokens(kube: Kube, namespace: str) -> str:
    """A new token of the namespace's service account; empty while there is none."""
    try:
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {}}
        found = await kube.create(TokenRequest, body, namespace)
    except KubeError as error:
        if error.status != 404:
            raise
        return ""
    return str(found.status["token"])


async def until(what: str, condition: Callable[[], Any], seconds: float = DEADLINE_S) -> Any:
    """Waits for a condition, which may be a question to the API server; returns its first true value."""
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    while True:
        found = condition()
        if asyncio.iscoroutine(found):
            found = await found
        if found:
            return found
        if loop.time() > end:
            pytest.fail(f"not within {seconds:.0f} s: {what}")
        await asyncio.sleep(0.05)


class Proxy:
    """A TCP proxy on the loopback between us and the API server."""

    def __init__(self, host: str, port: int) -> None:
        self._target = (host, port)
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._flows = asyncio.Event()
        self._flows.set()
        self.port = 0
        self.connections = 0

    async def start(self) -> None:
        """Takes connections; at its earlier port, if it had one."""
        self._server = await asyncio.start_server(self._begin, "127.0.0.1", self.port or None)
        self.port = self._server.sockets[0].getsockname()[1]

    def refuse(self) -> None:
        """Breaks all connections off and takes none."""
        if self._server is not None:
            self._server.close()
        self.reset()

    def reset(self) -> None:
        """Breaks all connections off."""
        for task in list(self._tasks):
            task.cancel()

    def stall(self) -> None:
        """Keeps all connections, and carries nothing."""
        self._flows.clear()

    def flow(self) -> None:
        """Carries again, what was held back included."""
        self._flows.set()

    async def stop(self) -> None:
        """Leaves nothing."""
        self.refuse()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _begin(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        ends = [writer]
        try:
            there, back = await asyncio.open_connection(*self._target)
            ends.append(back)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._carry(reader, back))
                both.create_task(self._carry(there, writer))
        except* OSError:
            pass
        finally:
            for one in ends:
                one.transport.abort()

    async def _carry(self, source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while data := await source.read(65536):
            await self._flows.wait()
            sink.write(data)
            await sink.drain()
        raise ConnectionResetError("one side has ended")


@contextlib.asynccontextmanager
async def proxied(kubeconfig: Path, directory: Path) -> AsyncIterator[tuple[Proxy, Kube]]:
    """A client that reaches the API server through a proxy."""
    config = json.loads(kubeconfig.read_text())
    cluster = config["clusters"][0]["cluster"]
    host, _, port = cluster["server"].removeprefix("https://").partition(":")
    proxy = Proxy(host, int(port))
    await proxy.start()
    cluster["server"] = f"https://127.0.0.1:{proxy.port}"
    path = directory / "kubeconfig"
    path.write_text(json.dumps(config))
    try:
        async with Kube.from_kubeconfig(path) as kube:
            yield proxy, kube
    finally:
        await proxy.stop()


@contextlib.asynccontextmanager
async def watching(
    kube: Kube, namespace: str, timing: Timing = QUICK
) -> AsyncIterator[tuple[Informer[ConfigMap], list[tuple[str, str]]]]:
    """A running informer of the tests' ConfigMaps, synced, and what it has told."""
    informer = Informer(kube, ConfigMap, namespace=namespace, labels="by=test", timing=timing)
    told: list[tuple[str, str]] = []

    def note(change: Change[ConfigMap]) -> None:
        told.append((change.what.value, change.object.metadata.name))

    informer.add_handler(note)
    task = asyncio.create_task(informer.run())
    try:
        async with asyncio.timeout(DEADLINE_S):
            await informer.synced.wait()
        yield informer, told
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def config_map(name: str, value: str = "") -> dict[str, Any]:
    """A ConfigMap of the tests'."""
    return {"metadata": {"name": name, "labels": {"by": "test"}}, "data": {"value": value}}


Test = Callable[[Kube], Coroutine[Any, Any, None]]


@pytest.fixture
def play(kubeconfig: Path, namespace: str) -> Callable[[Test], None]:
    """Runs a test with a client, and leaves no ConfigMap."""

    async def whole(test: Test) -> None:
        async with Kube.from_kubeconfig(kubeconfig) as kube:
            try:
                await test(kube)
            finally:
                for one in await kube.listed(ConfigMap, namespace=namespace, labels="by=test"):
                    await kube.delete(ConfigMap, one.metadata.name, namespace)

    return lambda test: asyncio.run(whole(test))


# -- the informer -------------------------------------------------------------------------------------


def test_changes_of_the_real_thing_are_told(play: Callable[[Test], None], namespace: str) -> None:
    async def test(kube: Kube) -> None:
        await kube.create(ConfigMap, config_map("a"), namespace)
        async with watching(kube, namespace) as (informer, told):
            assert told == [("added", "a")]
            await kube.patch(ConfigMap, "a", {"data": {"value": "2"}}, namespace)
            await kube.create(ConfigMap, config_map("b"), namespace)
            await kube.delete(ConfigMap, "a", namespace)
            await until("three changes", lambda: len(told) == 4)
            assert told[1:] == [("updated", "a"), ("added", "b"), ("deleted", "a")]
            await until("a watch that ended", lambda: informer.watches >= 2)
            await kube.create(ConfigMap, config_map("c"), namespace)
            await until("c", lambda: ("added", "c") in told)
            assert informer.lists == 1

    play(test)


def test_a_version_that_is_too_old_is_410_and_everything_is_listed(
    play: Callable[[Test], None], kubeconfig: Path, namespace: str, tmp_path: Path
) -> None:
    """With Leases: no other kind changes as often, so the API server soon forgets their old versions."""

    def lease(name: str) -> dict[str, Any]:
        return {"metadata": {"name": name, "labels": {"by": "test"}}, "spec": {}}

    async def forgotten(kube: Kube) -> bool:
        async with contextlib.aclosing(
            kube.watch(Lease, "1", namespace=namespace, seconds=1, stall_s=1)
        ) as lines:
            try:
                await anext(lines, None)
            except KubeError as error:
                return error.gone
        # Its memory of changes grows while they are younger than 75 s (watch_cache.go), and then rolls.
        for number in range(50):
            spec = {"leaseTransitions": number}
            await kube.patch(Lease, "old", {"spec": spec}, namespace)
        return False

    async def test(kube: Kube) -> None:
        await kube.create(Lease, lease("old"), namespace)
        await until("the API server to forget its first versions", lambda: forgotten(kube), 180)
        async with proxied(kubeconfig, tmp_path) as (proxy, through):
            informer = Informer(through, Lease, namespace=namespace, labels="by=test", timing=QUICK)
            task = asyncio.create_task(informer.run())
            await until("a watch", lambda: informer.watches == 1)
            proxy.refuse()
            await until("an error", lambda: informer.last_error is not None)
            informer._version = "1"
            await kube.delete(Lease, "old", namespace)
            await kube.create(Lease, lease("new"), namespace)
            await proxy.start()
            await until("a second list", lambda: informer.lists == 2)
            assert list(informer.objects) == [f"{namespace}/new"]
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    play(test)


@pytest.mark.parametrize("fault", ["stall", "reset", "refuse"])
def test_a_connection_that_fails_loses_nothing(
    play: Callable[[Test], None], kubeconfig: Path, namespace: str, tmp_path: Path, fault: str
) -> None:
    async def test(kube: Kube) -> None:
        await kube.create(ConfigMap, config_map("goes"), namespace)
        async with (
            proxied(kubeconfig, tmp_path) as (proxy, through),
            watching(through, namespace) as (informer, told),
        ):
            getattr(proxy, fault)()
            before = proxy.connections
            await kube.create(ConfigMap, config_map("comes"), namespace)
            await kube.delete(ConfigMap, "goes", namespace)
            if fault != "reset":
                await until("an error", lambda: informer.last_error is not None)
                assert told == [("added", "goes")]
            proxy.flow()
            if fault == "refuse":
                await proxy.start()
            await until("both changes", lambda: len(told) == 3)
            assert told[1:] == [("added", "comes"), ("deleted", "goes")]
            assert proxy.connections > before
            assert list(informer.objects) == [f"{namespace}/comes"]

    play(test)


# -- the client ---------------------------------------------------------------------------------------


def test_a_rotated_token_is_read_again_even_through_a_descriptor(
    play: Callable[[Test], None],
    kubeconfig: Path,
    namespace: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The old token is no longer taken; the new one is in the same directory, as the kubelet has it."""
    config = json.loads(kubeconfig.read_text())["clusters"][0]["cluster"]
    host, _, port = config["server"].removeprefix("https://").partition(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    (tmp_path / "ca.crt").write_bytes(base64.b64decode(config["certificate-authority-data"]))
    (tmp_path / "namespace").write_text(namespace)
    (tmp_path / "token").write_text("out-of-date")

    async def test(kube: Kube) -> None:
        descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
        try:
            async with Kube.in_cluster(Path(f"/proc/self/fd/{descriptor}")) as pod:
                with pytest.raises(KubeError) as caught:
                    await pod.raw("apis")
                assert caught.value.status == 401
                assert "service account" in caught.value.fix
                (tmp_path / "new").write_text(await tokens(kube, namespace))
                (tmp_path / "new").rename(tmp_path / "token")
                assert (await pod.raw("apis"))["kind"] == "APIGroupList"
                with pytest.raises(KubeError, match="ClusterRole") as caught:
                    await pod.listed(Pod, namespace=namespace)
                assert caught.value.status == 403
        finally:
            os.close(descriptor)

    play(test)


def test_the_server_says_what_it_can_do(play: Callable[[Test], None]) -> None:
    async def test(kube: Kube) -> None:
        able = await kube.abilities()
        assert able.resize
        assert able.lower_memory_limits

    play(test)


def test_repeated_events_are_one_with_a_count(play: Callable[[Test], None], namespace: str) -> None:
    async def test(kube: Kube) -> None:
        recorder = Recorder(kube, "architectd", "somewhere")
        task = asyncio.create_task(recorder.run())
        about = Reference("Pod", "somebody", str(uuid.uuid4()), namespace, "app")
        for message in ("hibernated in 310 ms", "hibernated in 290 ms"):
            recorder.record(about, "ScaledDown", message)
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        found = await kube.listed(Event, namespace=namespace, fields="involvedObject.name=somebody")
        assert [(one.count, one.message) for one in found] == [(2, "hibernated in 290 ms")]

    play(test)


# -- the lease ----------------------------------------------------------------------------------------


def test_one_of_three_leads(
    play: Callable[[Test], None], kubeconfig: Path, namespace: str, tmp_path: Path
) -> None:
    """They follow each other: one ends in good order, one is cut off from the API server."""
    terms = Terms(duration_s=3, renew_deadline_s=2, retry_s=0.3)
    leaders: list[str] = []

    def contend(kube: Kube, name: str) -> asyncio.Task[None]:
        async def work() -> None:
            leaders.append(name)
            try:
                assert leaders == [name], "two leaders"
                await asyncio.Event().wait()
            finally:
                leaders.remove(name)

        election = Election(kube, "control", namespace, name, terms)
        return asyncio.create_task(election.lead(work))

    async def test(kube: Kube) -> None:
        loop = asyncio.get_running_loop()
        async with contextlib.AsyncExitStack() as stack:
            proxies, tasks = {}, {}
            for name in "abc":
                (tmp_path / name).mkdir()
                proxies[name], through = await stack.enter_async_context(
                    proxied(kubeconfig, tmp_path / name)
                )
                tasks[name] = contend(through, name)
            await until("a leader", lambda: leaders)
            first = leaders[0]
            tasks[first].cancel()
            begun = loop.time()
            await asyncio.gather(tasks.pop(first), return_exceptions=True)
            await until("the next", lambda: leaders)
            # It was given up: nobody had to wait for its end.
            assert loop.time() - begun < terms.duration_s
            second = leaders[0]
            proxies[second].stall()
            with pytest.raises(LostLease):
                await tasks.pop(second)
            await until("the last", lambda: leaders)
            (third,) = tasks
            assert leaders == [third]
            lease = await kube.get(Lease, "control", namespace)
            assert lease.spec.holderIdentity == third
            assert lease.spec.leaseTransitions == 2
            tasks[third].cancel()
            await asyncio.gather(tasks[third], return_exceptions=True)

    play(test)


# -- requests and labels ------------------------------------------------------------------------------

FULL: Final = {"cpu": "50m", "memory": "64Mi"}
KINDS: Final[dict[str, dict[str, Any]]] = {
    "guaranteed": {"requests": FULL, "limits": FULL},
    "burstable": {"requests": FULL, "limits": {"cpu": "1", "memory": "128Mi"}},
    "requests-only": {"requests": FULL},
    "cpu-only": {"requests": {"cpu": "50m"}},
    "best-effort": {},
}
LOWEST: Final[dict[str, dict[str, str]]] = {
    "guaranteed": {"cpu": "1m", "memory": "4Mi"},
    "burstable": {"cpu": "0", "memory": "1"},
    "requests-only": {"cpu": "0", "memory": "1"},
    "cpu-only": {"cpu": "1m"},
    "best-effort": {},
}


def pod(name: str, resources: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A pod whose program uses as little as a hibernated one's keeper."""
    container = {"name": "app", "image": IMAGE, "imagePullPolicy": "Never"}
    spec = {
        "terminationGracePeriodSeconds": 0,
        "containers": [{**container, "command": ["sleep", "infinity"], "resources": resources}],
    }
    return {"metadata": {"name": name, **more}, "spec": spec}


async def running(kube: Kube, name: str, namespace: str) -> Pod:
    """The pod, once it runs."""

    async def look() -> Pod | None:
        found = await kube.get(Pod, name, namespace)
        return found if found.status.phase == "Running" else None

    found: Pod = await until(f"{name} to run", look)
    return found


async def reported(kube: Kube, name: str, namespace: str, requests: dict[str, str]) -> None:
    """Returns when the kubelet says that the pod's container has these requests."""

    async def look() -> bool:
        found = await kube.get(Pod, name, namespace)
        return [
            (one.resources.requests if one.resources else None) or {}
            for one in found.status.containerStatuses or []
        ] == [requests]

    await until(f"the kubelet to report {requests} of {name}", look)


@pytest.mark.parametrize("kind", list(KINDS))
def test_requests_go_down_and_come_back(
    play: Callable[[Test], None], namespace: str, kind: str
) -> None:
    async def test(kube: Kube) -> None:
        server = await kube.abilities()
        await kube.create(Pod, pod(kind, KINDS[kind]), namespace)
        before = await running(kube, kind, namespace)
        truth = {"app": SCALED_DOWN}
        asleep = await pods.settle(kube, before, truth, server)
        assert asleep.refused is None
        assert asleep.pod is not None
        assert asleep.pod.labels[status_label("app")] == SCALED_DOWN
        await reported(kube, kind, namespace, LOWEST[kind])
        again = await pods.settle(kube, asleep.pod, truth, server)
        assert again.writes == ()
        awake = await pods.settle(kube, asleep.pod, {"app": RUNNING}, server)
        assert awake.refused is None
        assert awake.pod is not None
        await reported(kube, kind, namespace, KINDS[kind].get("requests", {}))
        assert awake.pod.labels[status_label("app")] == RUNNING
        assert not podstatus.remembered(awake.pod.annotations)
        found = await kube.get(Pod, kind, namespace)
        assert found.status.qosClass == before.status.qosClass
        assert pods.seen(found).resources == pods.seen(before).resources
        assert len(asleep.writes) + len(awake.writes) + 2 <= 6
        await kube.delete(Pod, kind, namespace, grace=0)

    play(test)


def test_another_pod_of_that_name_is_refused_by_the_server(
    play: Callable[[Test], None], namespace: str
) -> None:
    async def test(kube: Kube) -> None:
        server = await kube.abilities()
        body = pod("twice", KINDS["burstable"])
        body["spec"]["schedulerName"] = "nobody"
        old = await kube.create(Pod, body, namespace)
        await kube.delete(Pod, "twice", namespace, uid=old.metadata.uid, grace=0)
        new = await kube.create(Pod, body, namespace)
        outcome = await pods.settle(kube, old, {"app": SCALED_DOWN}, server)
        assert outcome.pod is None
        found = await kube.get(Pod, "twice", namespace)
        assert found.metadata.resourceVersion == new.metadata.resourceVersion
        await kube.delete(Pod, "twice", namespace, grace=0)

    play(test)


def test_what_architectd_left_undone_is_mended(
    play: Callable[[Test], None], namespace: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways round, on pods whose writes were broken off in the middle."""
    ours = controller.is_ours

    def of_this_test(one: Pod) -> bool:
        return ours(one) and one.metadata.namespace == namespace

    monkeypatch.setattr(controller, "is_ours", of_this_test)

    async def test(kube: Kube) -> None:
        notes = {CPU_REQUESTS: '{"app":"50m"}', MEMORY_REQUESTS: '{"app":"64Mi"}'}
        limits = KINDS["burstable"]["limits"]
        low = {"requests": {"cpu": "0", "memory": "1"}, "limits": limits}
        for name, state, resources in (
            ("woken", RUNNING, low),
            ("slept", SCALED_DOWN, KINDS["burstable"]),
        ):
            more = {"labels": {status_label("app"): state}, "annotations": notes}
            await kube.create(Pod, pod(name, resources, **more), namespace)
            await running(kube, name, namespace)
        recorder = Recorder(kube, "architect-control-plane", "somewhere")
        mends = controller.Controller(kube, "architect", recorder, patience_s=0.5)
        tasks = [asyncio.create_task(mends.run()), asyncio.create_task(recorder.run())]
        try:
            await reported(kube, "woken", namespace, FULL)
            await reported(kube, "slept", namespace, {"cpu": "0", "memory": "1"})
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        woken = await kube.get(Pod, "woken", namespace)
        slept = await kube.get(Pod, "slept", namespace)
        assert not podstatus.remembered(woken.annotations)
        assert podstatus.originals(slept.annotations)["memory"] == {"app": "64Mi"}
        events = await kube.listed(Event, namespace=namespace)
        reasons = {one.reason for one in events}
        assert {"RequestsRestored", "RequestsLowered"} <= reasons
        for name in ("woken", "slept"):
            await kube.delete(Pod, name, namespace, grace=0)

    play(test)
