"""architect-manager over TLS on the loopback, and how its replicas keep one certificate."""

import asyncio
import base64
import contextlib
import dataclasses
import datetime as dt
import http.client
import json
import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from architect.adapters import certificates
from architect.adapters.certificates import Credentials, renewed, server_context
from architect.adapters.kube.client import KubeError
from architect.contract import annotations as a
from architect.contract.annotations import CheckpointName
from architect.decisions.podtraffic import Proxy
from architect.processes.manager import main, server
from architect.processes.manager.certificates import (
    CertificateFailure,
    Folder,
    SharedSecret,
    Source,
    configurations,
)
from architect.processes.manager.cluster import (
    CONFLICT,
    MISSING,
    Configuration,
    SecretData,
    User,
)
from architect.processes.manager.server import Webhooks

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.UTC)
HERE = ["127.0.0.1"]
DAEMON = "system:serviceaccount:architect:architectd"
DEADLINE_S = 10.0
STATUS = "status.architect.loopholelabs.io/app"
Json = dict[str, Any]


class FakeApi:
    """An API server of one Secret, some webhook configurations and some pods."""

    def __init__(self) -> None:
        self.secrets: dict[str, SecretData] = {}
        self.bundles = {"hooks": "", "checks": ""}
        self.pods: dict[str, Json] = {}
        self.woken: list[tuple[str, str, str]] = []
        self.asked: list[tuple[User, CheckpointName]] = []
        self.entitled: set[str] = set()
        self.away = False
        self.before_write: Callable[[], None] = lambda: None
        self.version = 0

    def _answer(self) -> None:
        if self.away:
            raise KubeError("asking", "connection refused")

    async def secret(self, namespace: str, name: str) -> SecretData | None:
        self._answer()
        return self.secrets.get(f"{namespace}/{name}")

    async def write_secret(
        self, namespace: str, name: str, data: Mapping[str, str], version: str | None
    ) -> None:
        self._answer()
        self.before_write()
        self.put(f"{namespace}/{name}", data, version)

    def put(self, name: str, data: Mapping[str, str], version: str | None) -> None:
        there = self.secrets.get(name)
        if version != (there.version if there else None):
            raise KubeError("writing", "the object has been modified", status=CONFLICT)
        self.version += 1
        self.secrets[name] = SecretData(dict(data), str(self.version))

    async def trust(self, kind: Configuration, name: str, bundle: str) -> bool:
        self._answer()
        if name not in self.bundles:
            raise KubeError("reading", "not found", status=MISSING)
        changed = self.bundles[name] != bundle
        self.bundles[name] = bundle
        return changed

    async def may_get(self, user: User, checkpoint: CheckpointName) -> bool:
        self._answer()
        self.asked.append((user, checkpoint))
        return user.username in self.entitled

    async def pod(self, namespace: str, name: str) -> Json:
        self._answer()
        if f"{namespace}/{name}" not in self.pods:
            raise KubeError("reading", "not found", status=MISSING)
        return self.pods[f"{namespace}/{name}"]

    async def request_wake(self, namespace: str, name: str, when: str) -> None:
        self._answer()
        self.woken.append((namespace, name, when))


def https(port: int, context: ssl.SSLContext) -> http.client.HTTPSConnection:
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=DEADLINE_S, context=context)


@dataclasses.dataclass
class Running:
    """A manager that serves in a thread of its own."""

    api: FakeApi
    source: SharedSecret
    webhooks: Webhooks
    port: int
    stop: Callable[[], None]
    thread: threading.Thread
    do: Callable[[Any], Any]

    def connect(self) -> http.client.HTTPSConnection:
        """A client that trusts what the API server is told to trust."""
        text = base64.b64decode(self.api.bundles["hooks"]).decode()
        context = ssl.create_default_context(cadata=text)
        context.verify_flags |= ssl.VERIFY_X509_STRICT  # the default of later Pythons
        return https(self.port, context)

    def get(self, path: str) -> tuple[int, str]:
        with contextlib.closing(self.connect()) as client:
            client.request("GET", path)
            answer = client.getresponse()
            return answer.status, answer.read().decode()

    def post(self, path: str, body: bytes) -> tuple[int, bytes]:
        with contextlib.closing(self.connect()) as client:
            client.request("POST", path, body, {"Content-Type": "application/json"})
            answer = client.getresponse()
            return answer.status, answer.read()

    def ask(self, path: str, question: Json) -> Json:
        status, text = self.post(path, json.dumps(review(question)).encode())
        assert status == 200, text
        answer: Json = json.loads(text)
        assert answer["apiVersion"] == "admission.k8s.io/v1"
        assert answer["kind"] == "AdmissionReview"
        response: Json = answer["response"]
        assert response["uid"] == "u1"
        return response


def review(question: Json) -> Json:
    return {"apiVersion": "admission.k8s.io/v1", "kind": "AdmissionReview", "request": question}


def pod(annotations: dict[str, str] | None = None, labels: dict[str, str] | None = None) -> Json:
    metadata = {"generateName": "web-", "annotations": annotations or {}, "labels": labels or {}}
    spec = {"runtimeClassName": "runc-architect", "containers": [{"name": "app"}]}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def asked(made: Json | None, resource: str = "pods", group: str = "", **more: Any) -> Json:
    """A question; `more` are fields of its request."""
    return {
        "uid": "u1",
        "operation": "CREATE",
        "kind": {"group": group, "version": "v1", "kind": "Pod"},
        "resource": {"group": group, "version": "v1", "resource": resource},
        "namespace": "shop",
        "userInfo": {"username": "jane", "groups": ["devs"], "extra": {"k": ["v"]}},
        "object": made,
        "oldObject": None,
        "dryRun": False,
        "options": None,
        **more,
    }


MANAGED = {a.MANAGED_CONTAINERS: '["app"]'}


def shared(api: FakeApi, context: ssl.SSLContext, when: Callable[[], dt.datetime]) -> SharedSecret:
    hooks = configurations("hooks", "checks")
    return SharedSecret(api, context, "architect", "tls", HERE, hooks, when)


def utc() -> dt.datetime:
    return dt.datetime.now(dt.UTC)


@contextlib.contextmanager
def serving(api: FakeApi, *words: str) -> Iterator[Running]:
    """A manager on a free port; the test has to end within the deadline after stop."""
    chosen = main.options(["--host", "127.0.0.1", "--port", "0", "--drain", "0", *words])
    context = server_context()
    alone = renewed(None, HERE, utc())
    certificates.put_to_use(context, alone.certificate.encode(), alone.key.encode())
    source = shared(api, context, utc)
    webhooks = Webhooks(main.policy(chosen), api, lambda: source.ready)
    started = threading.Event()
    place: dict[str, Any] = {}

    async def whole() -> None:
        place["stop"] = asyncio.Event()
        place["loop"] = asyncio.get_running_loop()

        listening = main.listen(chosen.host, chosen.port)
        place["port"] = listening.getsockname()[1]
        started.set()
        await main.run(webhooks, source, context, chosen, listening, place["stop"])

    thread = threading.Thread(target=lambda: asyncio.run(whole()))
    thread.start()

    def stop() -> None:
        place["loop"].call_soon_threadsafe(place["stop"].set)

    def do(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, place["loop"]).result(DEADLINE_S)

    assert started.wait(DEADLINE_S), "it did not listen in time"
    try:
        yield Running(api, source, webhooks, place["port"], stop, thread, do)
    finally:
        if thread.is_alive():
            stop()
        thread.join(2 * DEADLINE_S)
        assert not thread.is_alive(), "it did not end in time"


@pytest.fixture(scope="module")
def module_manager() -> Iterator[Running]:
    with serving(FakeApi()) as running:
        running.do(running.source.look())
        yield running


@pytest.fixture
def manager(module_manager: Running) -> Running:
    """One manager for all tests that leave it as it is, its API server as new."""
    fresh = FakeApi()
    fresh.secrets, fresh.bundles = module_manager.api.secrets, module_manager.api.bundles
    fresh.version = module_manager.api.version
    module_manager.api.__dict__.update(fresh.__dict__)
    return module_manager


@pytest.fixture
def lines(capfd: pytest.CaptureFixture[str]) -> Callable[[], list[Json]]:
    """What was logged since the last call."""
    return lambda: [json.loads(line) for line in capfd.readouterr().err.splitlines()]


# Answers.


def test_a_good_pod_is_let_by_in_silence(manager: Running, lines: Callable[[], list[Json]]) -> None:
    lines()
    assert manager.ask("/validate", asked(pod(MANAGED))) == {"uid": "u1", "allowed": True}
    assert lines() == []


def test_a_refusal_says_what_and_is_logged_once(
    manager: Running, lines: Callable[[], list[Json]]
) -> None:
    lines()
    bad = pod({a.MANAGED_CONTAINERS: '["ap"]'})
    response = manager.ask("/validate", asked(bad))
    status = response["status"]
    assert not response["allowed"]
    assert (status["code"], status["reason"]) == (422, "Invalid")
    assert a.MANAGED_CONTAINERS in status["message"]
    [line] = lines()
    assert line["message"] == status["message"]
    wanted = {"what": "refused", "uid": "u1", "namespace": "shop", "name": "web-", "user": "jane"}
    assert wanted.items() <= line.items()


def test_a_forged_state_is_forbidden_to_all_but_our_own(manager: Running) -> None:
    forged = asked(pod(MANAGED, {STATUS: "SCALED_DOWN"}), operation="UPDATE")
    forged["oldObject"] = pod(MANAGED)
    assert manager.ask("/validate", forged)["status"]["code"] == 403
    forged["userInfo"] = {"username": DAEMON}
    assert manager.ask("/validate", forged)["allowed"]
    del forged["userInfo"]
    assert not manager.ask("/validate", forged)["allowed"]


def test_warnings_and_patches_arrive(manager: Running) -> None:
    assert "nothing is managed" in manager.ask("/validate", asked(pod()))["warnings"][0]
    response = manager.ask("/mutate", asked(pod(MANAGED), dryRun=True))
    assert response["patchType"] == "JSONPatch"
    [operation] = json.loads(base64.b64decode(response["patch"]))
    assert operation["path"] == "/spec/containers/0/resizePolicy"
    assert "patch" not in manager.ask("/mutate", asked(pod()))


def test_the_sidecar_that_answers_probes_is_started_from_our_own_image() -> None:
    mapping = {"containerName": "app", "appPort": 8080, "shadowPort": 9080}
    probed = pod(
        {
            **MANAGED,
            a.NETWORK_MONITOR: '{"app":"packets"}',
            a.HEALTH_CHECK_PROXY: json.dumps({"mappings": [mapping]}),
        }
    )
    with serving(FakeApi(), "--image", "mine/a:2", "--image-pull-policy", "Never") as manager:
        manager.do(manager.source.look())
        response = manager.ask("/mutate", asked(probed))
    last = json.loads(base64.b64decode(response["patch"]))[-1]
    assert last["path"] == "/spec/initContainers"
    [sidecar] = last["value"]
    assert (sidecar["image"], sidecar["imagePullPolicy"]) == ("mine/a:2", "Never")


def test_workloads_are_only_warned(manager: Running) -> None:
    bad = pod({a.MANAGED_CONTAINERS: "x"})
    made = {"kind": "Deployment", "metadata": {"name": "web"}, "spec": {"template": bad}}
    response = manager.ask("/validate-workload", asked(made, "deployments", "apps"))
    assert response["allowed"]
    assert "will be refused" in response["warnings"][0]


def test_another_namespaces_checkpoint_is_asked_about(manager: Running) -> None:
    wanting = asked(pod({**MANAGED, a.START_FROM_PERSISTENT_CHECKPOINT: "bank/warm"}))
    refused = manager.ask("/validate", wanting)
    assert "may not get persistentcheckpoints" in refused["status"]["message"]
    user, checkpoint = manager.api.asked[-1]
    assert checkpoint == CheckpointName("bank", "warm")
    assert (user.username, user.groups, user.extra) == ("jane", ("devs",), {"k": ["v"]})
    manager.api.entitled.add("jane")
    assert manager.ask("/validate", wanting)["allowed"]
    manager.api.away = True
    unknown = manager.ask("/validate", wanting)
    assert not unknown["allowed"]
    assert "connection refused" in unknown["status"]["message"]


# Attach.


def attaching(**more: Any) -> Json:
    options = {"kind": "PodAttachOptions", "apiVersion": "v1", "container": "app"}
    return asked(options, operation="CONNECT", subResource="attach", name="web-1", **more)


def test_attaching_wakes_a_sleeper(manager: Running) -> None:
    api = manager.api
    api.pods["shop/web-1"] = pod(MANAGED, {STATUS: "SCALED_DOWN"})
    assert manager.ask("/attach", attaching(dryRun=True))["allowed"]
    assert api.woken == []
    assert manager.ask("/attach", attaching())["allowed"]
    [(namespace, name, when)] = api.woken
    assert (namespace, name) == ("shop", "web-1")
    assert abs(dt.datetime.fromisoformat(when) - utc()) < dt.timedelta(seconds=DEADLINE_S)


@pytest.mark.parametrize(
    "there", [None, pod(MANAGED, {STATUS: "RUNNING"}), {"metadata": {}, "spec": {}}]
)
def test_attaching_to_others_does_nothing(manager: Running, there: Json | None) -> None:
    if there is not None:
        manager.api.pods["shop/web-1"] = there
    assert manager.ask("/attach", attaching())["allowed"]
    assert manager.api.woken == []


def test_attaching_never_fails_with_the_api(manager: Running) -> None:
    manager.api.away = True
    assert manager.ask("/attach", attaching())["allowed"]


# What cannot be read.


@pytest.mark.parametrize(
    ("path", "body", "words"),
    [
        ("/validate", b"", "truncated"),
        ("/validate", b"\xff\xfe", "malformed"),
        ("/validate", b"[" * 100_000, "AdmissionReview"),
        ("/validate", b'{"request":{"object":{"a":' + b"[" * 100_000, "nested too deeply"),
        ("/validate", json.dumps({"kind": "AdmissionReview"}).encode(), "apiVersion"),
        ("/validate", json.dumps(review({"uid": "u1"})).encode(), "operation"),
        ("/validate", json.dumps(review(asked(pod(), uid=""))).encode(), "uid is empty"),
        ("/validate", json.dumps(review(asked(None))).encode(), "object is missing"),
        ("/validate", json.dumps(review(asked({"kind": "Node"}))).encode(), "not Pod"),
        ("/validate", json.dumps(review(asked(pod(), "nodes"))).encode(), "does not review"),
        ("/mutate", json.dumps(review(asked(pod(), subResource="exec"))).encode(), "pods/exec"),
        (
            "/validate",
            json.dumps(review(asked(pod(), operation="UPDATE"))).encode(),
            "oldObject is missing",
        ),
        ("/validate-workload", json.dumps(review(asked(pod()))).encode(), "does not review"),
        ("/attach", json.dumps(review(asked(pod()))).encode(), "does not review"),
        (
            "/attach",
            json.dumps(
                review(
                    asked(
                        None,
                        operation="CONNECT",
                        subResource="attach",
                        name="../../../kube-system/pods/x",
                    )
                )
            ).encode(),
            "is no name of a pod",
        ),
    ],
)
def test_malformed_requests_are_answered_with_their_fault(
    manager: Running, path: str, body: bytes, words: str
) -> None:
    status, text = manager.post(path, body)
    assert status == 400
    assert words in text.decode()
    assert len(text.splitlines()) == 1


def test_a_body_without_end_is_cut_off(manager: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "LARGEST_BODY", 1000)
    status, text = manager.post("/validate", b" " * 2000)
    assert (status, text) == (
        400,
        b"reading the AdmissionReview: it is larger than 1000 bytes\n",
    )


def test_other_paths_and_methods_are_unknown(manager: Running) -> None:
    assert manager.get("/")[0] == 404
    assert manager.get("/validate")[0] == 405
    assert manager.get("/healthz") == (200, "ok\n")
    assert manager.get("/readyz") == (200, "ok\n")


# The life of the server.


def test_it_is_ready_when_the_api_server_trusts_it() -> None:
    api = FakeApi()
    api.away = True
    with serving(api, "--interval", "600") as manager:
        context = ssl.create_default_context()
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        probe = https(manager.port, context)
        with contextlib.closing(probe):
            for path, wanted in (("/healthz", 200), ("/readyz", 503)):
                probe.request("GET", path)
                answer = probe.getresponse()
                answer.read()
                assert answer.status == wanted
        api.away = False
        manager.do(manager.source.look())
        assert manager.get("/readyz") == (200, "ok\n")


def test_a_new_certificate_cuts_no_connection() -> None:
    with serving(FakeApi()) as manager:
        manager.do(manager.source.look())
        with contextlib.closing(manager.connect()) as client:

            def served_with() -> str | None:
                client.request("GET", "/readyz")
                client.getresponse().read()
                assert isinstance(client.sock, ssl.SSLSocket)
                found = client.sock.getpeercert()
                assert found
                return str(found["serialNumber"])

            before = served_with()
            kept = client.sock
            del manager.api.secrets["architect/tls"]
            credentials = renewed(None, HERE, utc())
            manager.api.put("architect/tls", credentials.to_secret(), None)
            manager.do(manager.source.look())
            assert served_with() == before
            assert client.sock is kept
            # Who connects now meets the new one, which only the new authorities vouch for.
            client.close()
            with contextlib.closing(manager.connect()) as client:
                assert served_with() != before


def test_an_ending_server_finishes_what_it_has_and_sends_others_away() -> None:
    with serving(FakeApi(), "--drain", "5") as manager:
        manager.do(manager.source.look())
        client = manager.connect()
        client.request("GET", "/readyz")
        client.getresponse().read()
        manager.stop()
        # Still served, told to connect to another; probes have it taken out of the endpoints.
        body = json.dumps(review(asked(pod(MANAGED)))).encode()
        until = utc() + dt.timedelta(seconds=DEADLINE_S)
        while not manager.webhooks.draining and utc() < until:
            manager.do(asyncio.sleep(0.01))
        client.request("POST", "/validate", body)
        answer = client.getresponse()
        assert json.loads(answer.read())["response"]["allowed"]
        assert answer.headers["Connection"] == "close"
        assert manager.get("/readyz")[0] == 503
        manager.thread.join(DEADLINE_S)
        assert not manager.thread.is_alive()
        with pytest.raises(OSError, match="refused"):
            manager.get("/readyz")


def test_draining_lasts_until_nobody_asks(
    manager: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(main, "QUIET_S", 0.1)
    before = manager.webhooks.asked_at
    manager.ask("/validate", asked(pod(MANAGED)))
    assert manager.webhooks.asked_at > before

    async def drained(asked_after_s: float, longest_s: float) -> float:
        clock = asyncio.get_running_loop().time
        begin = clock()
        webhooks = Webhooks(main.policy(main.options([])), manager.api, lambda: True)
        webhooks.asked_at = begin + asked_after_s
        await asyncio.wait_for(main.drain(webhooks, longest_s), DEADLINE_S)
        return clock() - begin

    assert asyncio.run(drained(-1e6, 1e6)) >= 0.1
    assert asyncio.run(drained(0.2, 1e6)) >= 0.3
    assert asyncio.run(drained(1e6, 0.2)) >= 0.2


# One certificate for all replicas.


def looked(source: Source) -> None:
    asyncio.run(source.look())


def is_ready(source: Source) -> bool:
    return source.ready


def test_the_first_makes_it_and_the_others_take_it() -> None:
    api = FakeApi()
    one, two = (shared(api, server_context(), lambda: NOW) for _ in range(2))
    looked(one)
    made = Credentials.from_secret(api.secrets["architect/tls"].data)
    looked(two)
    assert made is not None
    assert api.version == 1
    assert api.bundles == {"hooks": made.bundle, "checks": made.bundle}
    assert one.ready
    assert two.ready


def test_who_comes_second_gives_way() -> None:
    api = FakeApi()
    other = renewed(None, HERE, NOW)
    api.before_write = lambda: api.put("architect/tls", other.to_secret(), None)
    looked(shared(api, server_context(), lambda: NOW))
    assert Credentials.from_secret(api.secrets["architect/tls"].data) == other
    assert api.bundles["checks"] == other.bundle


def test_a_chart_may_bring_an_empty_secret() -> None:
    api = FakeApi()
    api.put("architect/tls", {}, None)
    looked(shared(api, server_context(), lambda: NOW))
    assert Credentials.from_secret(api.secrets["architect/tls"].data) is not None


def test_what_an_upgrade_resets_and_what_gets_lost_is_put_back() -> None:
    api = FakeApi()
    source = shared(api, server_context(), lambda: NOW)
    looked(source)
    before, kept = dict(api.bundles), dict(api.secrets)
    api.bundles["checks"] = ""
    api.secrets.clear()
    looked(source)
    assert api.bundles == before
    assert api.secrets["architect/tls"].data == kept["architect/tls"].data


def test_it_is_renewed_in_time() -> None:
    api, time = FakeApi(), [NOW]
    source = shared(api, server_context(), lambda: time[0])
    looked(source)
    first = api.secrets["architect/tls"]
    time[0] += dt.timedelta(days=59)
    looked(source)
    assert api.secrets["architect/tls"] is first
    time[0] += dt.timedelta(days=1)
    looked(source)
    second = api.secrets["architect/tls"].data
    assert second["tls.crt"] != first.data["tls.crt"]
    assert second["ca.crt"] == first.data["ca.crt"]


def test_without_trust_it_is_not_ready_and_serves_all_the_same() -> None:
    api = FakeApi()
    del api.bundles["checks"]
    source = shared(api, server_context(), lambda: NOW)
    with pytest.raises(KubeError, match="not found"):
        looked(source)
    assert not is_ready(source)
    assert api.bundles["hooks"]
    api.bundles["checks"] = ""
    looked(source)
    assert is_ready(source)
    api.away = True
    with pytest.raises(KubeError, match="refused"):
        looked(source)
    assert is_ready(source)


def test_files_of_others_are_followed(tmp_path: Path) -> None:
    context = server_context()
    source = Folder(tmp_path, context)
    with pytest.raises(CertificateFailure, match="No such file"):
        looked(source)
    assert not is_ready(source)

    def write(made: Credentials) -> None:
        (tmp_path / "tls.crt").write_text(made.certificate)
        (tmp_path / "tls.key").write_text(made.key)

    one, two = renewed(None, HERE, NOW), renewed(None, HERE, NOW)
    write(one)
    looked(source)
    assert is_ready(source)
    write(two)
    looked(source)
    (tmp_path / "tls.key").write_text(one.key)
    with pytest.raises(CertificateFailure, match="no pair") as caught:
        looked(source)
    assert "PRIVATE" not in str(caught.value)


# The command line.


def test_options() -> None:
    chosen = main.options(["--namespace", "x", "--default-network-monitor", "packets"])
    policy = main.policy(chosen)
    assert policy.trusted == {
        f"system:serviceaccount:x:{name}"
        for name in ("architectd", "architect-control-plane", "architect-manager")
    }
    assert policy.defaults.monitor is a.Monitor.PACKETS
    assert main.policy(main.options(["--trusted-user", "me"])).trusted == {"me"}
    assert policy.proxy is None
    assert main.policy(main.options(["--image", "a"])).proxy == Proxy("a", "IfNotPresent")
    assert configurations("", "checks") != configurations("hooks", "")
    assert configurations("hooks", "") == [(Configuration.MUTATING, "hooks")]


def test_it_listens_on_all_addresses_or_on_one() -> None:
    with main.listen("", 0) as everywhere:
        port = everywhere.getsockname()[1]
        with contextlib.closing(socket.create_connection(("127.0.0.1", port), DEADLINE_S)):
            pass
    with main.listen("127.0.0.1", 0) as here:
        assert here.getsockname()[0] == "127.0.0.1"
        with pytest.raises(OSError, match="in use"):
            main.listen("127.0.0.1", here.getsockname()[1])


@pytest.mark.parametrize("text", ["1", "0s", "-5s"])
def test_bad_options_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main.options(["--default-scaledown-duration", text])
    assert caught.value.code == 2
    assert "--default-scaledown-duration" in capsys.readouterr().err
