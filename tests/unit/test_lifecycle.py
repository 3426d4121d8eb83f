"""Hooks and ends of containers, as the kubelet and runc do them: against real processes and servers."""

from __future__ import annotations

import asyncio
import json
import os
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from architect.adapters import hooks
from architect.adapters.hooks import HookError, Target
from architect.contract.annotations import POST_START, PRE_STOP
from architect.contract.errors import ArchitectError
from architect.contract.records import ContainerRecord
from architect.contract.states import State
from architect.processes.architectd import lifecycle

DEADLINE_S = 20.0
TARGET = Target("/run/some/root", "c0ffee", "127.0.0.1", {"web": 1, "other": 2})

RUNC = """#!/bin/sh
# Stands in for runc: takes its options, then runs the command here.
[ "$1" = --root ] && [ "$2" = /run/some/root ] && [ "$3" = --log ] || exit 99
log=$4
shift 6
[ "$1" = exec ] && [ "$2" = c0ffee ] || exit 98
shift 2
if ! command -v "$1" >/dev/null; then
    echo '{"level":"warning","msg":"a warning"}' >"$log"
    echo '{"level":"error","msg":"exec failed: no such file"}' >>"$log"
    exit 255
fi
exec "$@"
"""


def in_time(work: Coroutine[Any, Any, Any]) -> Any:
    """Runs a test's coroutine."""

    async def whole() -> Any:
        async with asyncio.timeout(DEADLINE_S):
            return await work

    return asyncio.run(whole())


async def until(condition: Callable[[], object]) -> None:
    """Returns once it is true; the deadline is in_time's."""
    while not condition():  # noqa: ASYNC110 - what it looks at tells nobody
        await asyncio.sleep(0.01)


@pytest.fixture(autouse=True)
def runc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in where the hooks look for runc."""
    place = tmp_path / "bin"
    place.mkdir()
    program = place / "runc"
    program.write_text(RUNC)
    program.chmod(0o755)
    monkeypatch.setattr(hooks, "RUNC_PLACES", (tmp_path / "none", place))
    return program


def hook(handler: Mapping[str, Any]) -> hooks.Handler:
    """As it is read from the annotation."""
    return hooks.parse(json.dumps({"app": handler}))["app"]


def sh(script: str) -> dict[str, Any]:
    return {"exec": {"command": ["sh", "-c", script]}}


def run(
    handler: Mapping[str, Any], target: Target = TARGET, timeout_s: float | None = DEADLINE_S
) -> None:
    in_time(hooks.run(hook(handler), target, timeout_s))


def failure(
    handler: Mapping[str, Any], target: Target = TARGET, timeout_s: float | None = DEADLINE_S
) -> str:
    with pytest.raises(HookError) as caught:
        run(handler, target, timeout_s)
    return str(caught.value)


# ---- reading ---------------------------------------------------------------------------------------------


def test_reads_what_admission_wrote() -> None:
    found = hooks.parse(
        '{"a":{"exec":{"command":["x","-y"]}},"b":{"httpGet":{"port":"web","path":"/p","scheme":"HTTPS",'
        '"httpHeaders":[{"name":"N","value":"V"}]}},"c":{"sleep":{"seconds":3}},"d":{"tcpSocket":{"port":1}}}'
    )
    assert found["a"].exec == hooks.Exec(["x", "-y"])
    assert found["b"].httpGet == hooks.HttpGet("web", "/p", "", "HTTPS", [hooks.Header("N", "V")])
    assert found["c"].sleep == hooks.Sleep(3)
    assert found["d"] == hooks.Handler()


@pytest.mark.parametrize("text", ["", "[]", '{"a":1}', '{"a":{"sleep":{"seconds":"x"}}}'])
def test_says_what_cannot_be_read(text: str) -> None:
    with pytest.raises(HookError, match=r"cannot be read.*create the pod anew"):
        hooks.parse(text)


def test_one_without_a_known_kind_fails_as_in_the_kubelet() -> None:
    assert "neither exec nor httpGet nor sleep" in failure({"tcpSocket": {"port": 1}})


# ---- exec and sleep --------------------------------------------------------------------------------------


def test_a_command_runs_in_the_container(tmp_path: Path) -> None:
    run({"exec": {"command": ["touch", str(tmp_path / "-a b")]}})
    assert (tmp_path / "-a b").exists()


def test_a_commands_exit_status_counts() -> None:
    text = failure(sh("echo SECRET; exit 3"))
    assert text.startswith('exec "sh": its exit status was 3;')
    assert "SECRET" not in text


def test_a_command_that_is_not_there_is_told_by_runc() -> None:
    assert 'exec "/no/such": exec failed: no such file' in failure(
        {"exec": {"command": ["/no/such"]}}
    )


def test_runc_is_missing(runc: Path) -> None:
    runc.unlink()
    assert "install the package runc" in failure(sh("true"))


def test_a_command_may_say_much() -> None:
    run(sh("head -c 1000000 /dev/zero; head -c 1000000 /dev/zero >&2"), timeout_s=DEADLINE_S / 2)


def test_a_command_that_takes_too_long_is_given_up(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    text = failure(sh(f"echo $$ >{pid}; exec sleep 1000"), timeout_s=1.0)
    assert 'exec "sh": it did not end within 1 s' in text
    with pytest.raises(ProcessLookupError):  # Here it was runc itself: nothing of it is left.
        os.kill(int(pid.read_text()), 0)


def test_sleeps() -> None:
    began = time.monotonic()
    run({"sleep": {"seconds": 1}})
    assert time.monotonic() - began >= 1
    assert "sleep: it did not end" in failure({"sleep": {"seconds": 100}}, timeout_s=0.1)


# ---- HTTP ------------------------------------------------------------------------------------------------


class Server:
    """A web server on loopback that writes down what it is asked."""

    def __init__(self, context: ssl.SSLContext | None = None) -> None:
        self.asked: list[tuple[str, list[tuple[str, str]]]] = []
        self.status = 200
        self.location = ""
        self.go = threading.Event()
        self.go.set()
        bench = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                bench.asked.append((self.path, list(self.headers.items())))
                bench.go.wait(DEADLINE_S)
                self.send_response(bench.status)
                if bench.location:
                    self.send_header("Location", bench.location)
                self.end_headers()

            def log_message(self, *_: Any) -> None:
                """Nothing."""

        class Quiet(ThreadingHTTPServer):
            daemon_threads = True

            def handle_error(self, request: Any, client_address: Any) -> None:
                """A client that has left is none."""

        self._server = Quiet(("127.0.0.1", 0), Handler)
        if context is not None:
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True)
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def close(self) -> None:
        self.go.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def get(self, **more: Any) -> dict[str, Any]:
        return {"httpGet": {"port": self.port, **more}}

    def headers(self) -> dict[str, str]:
        return dict(self.asked[-1][1])


@pytest.fixture
def server() -> Iterator[Server]:
    """Speaks plain HTTP."""
    one = Server()
    yield one
    one.close()


@pytest.fixture
def tls_server(tmp_path: Path) -> Iterator[Server]:
    """Speaks TLS with a certificate that nobody trusts."""
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    words = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "ec",
        "-pkeyopt",
        "ec_paramgen_curve:P-256",
        "-nodes",
    ]
    words += ["-subj", "/CN=nobody.invalid", "-keyout", str(key), "-out", str(certificate)]
    subprocess.run(words, check=True, capture_output=True, timeout=DEADLINE_S)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    one = Server(context)
    yield one
    one.close()


def test_asks_the_pod(server: Server) -> None:
    run(server.get(path="stop it?now=1&q=a b#part"))
    assert server.asked[0][0] == "/stop%20it?now=1&q=a%20b"
    assert server.headers() == {
        "Host": f"127.0.0.1:{server.port}",
        "User-Agent": "kube-lifecycle/architect",
        "Accept": "*/*",
    }


def test_headers_are_the_users(server: Server) -> None:
    given = {"Host": "me.example", "X-Key": "v", "Accept": "", "User-Agent": "mine"}
    headers = [{"name": name, "value": value} for name, value in given.items()]
    run(server.get(httpHeaders=[*headers, {"name": "X-Key", "value": "w"}]))
    assert server.asked[0] == (
        "/",
        [("Host", "me.example"), ("X-Key", "v"), ("User-Agent", "mine"), ("X-Key", "w")],
    )


def test_a_port_by_its_name_or_as_text(server: Server) -> None:
    target = Target("", "", "127.0.0.1", {"web": server.port})
    run({"httpGet": {"port": "web"}}, target)
    run({"httpGet": {"port": str(server.port)}}, target)
    assert len(server.asked) == 2
    assert 'there is no port "wep"' in failure({"httpGet": {"port": "wep"}}, target)
    assert "0 is not a port" in failure({"httpGet": {"port": 0}}, target)


def test_a_host_of_its_own(server: Server) -> None:
    elsewhere = Target("", "", "", {})
    run(server.get(host="localhost"), elsewhere)
    assert server.headers()["Host"] == f"localhost:{server.port}"
    assert "the pod has no address" in failure(server.get(), elsewhere)
    assert 'scheme "FTP" is unknown' in failure(server.get(scheme="FTP"))


def test_any_status_is_a_success_as_in_the_kubelet(server: Server) -> None:
    server.status = 500
    run(server.get(path="/stop"))


def test_nobody_listens(server: Server) -> None:
    server.close()
    text = failure(server.get(path="/stop?token=SECRET"))
    assert 'httpGet "/stop"' in text
    assert "refused" in text
    assert "SECRET" not in text


def test_an_answer_that_takes_too_long(server: Server) -> None:
    server.go.clear()
    assert "did not end within 0.3 s" in failure(server.get(), timeout_s=0.3)


def test_a_redirect_is_followed_on_its_host_only(server: Server) -> None:
    server.status, server.location = 302, f"http://localhost:{server.port}/other"
    run(server.get(path="/first"))
    assert [path for path, _ in server.asked] == ["/first"]
    server.asked.clear()
    server.location = "/again"
    assert "stopped after 10 redirects" in failure(server.get(path="/first"))
    assert [path for path, _ in server.asked] == ["/first", *["/again"] * 9]


def test_certificates_are_not_checked(tls_server: Server) -> None:
    run(tls_server.get(scheme="HTTPS", path="/stop"))
    assert tls_server.asked[0][0] == "/stop"


def test_plain_http_where_tls_was_asked_for(server: Server) -> None:
    headers = [{"name": "Authorization", "value": "SECRET"}, {"name": "X", "value": "y"}]
    run(server.get(scheme="HTTPS", path="/stop", httpHeaders=headers))
    assert server.asked[0][0] == "/stop"
    assert server.headers()["X"] == "y"
    assert "Authorization" not in server.headers()


# ---- a container's end -----------------------------------------------------------------------------------


class Clock:
    """Counts leases."""

    def __init__(self) -> None:
        self.leases = 0
        self.released = 0

    def release(self) -> None:
        self.leases -= 1
        self.released += 1


class Container:
    """Stands in for a managed one: obeys the signals that it is told to obey."""

    def __init__(self, *obeys: int, state: State = State.RUNNING) -> None:
        self.state = state
        self.name = "pod/app"
        self.record = ContainerRecord(
            id="c0ffee", namespace="default", pod="pod", container="app", bundle="",
            runtime_root="/run/some/root", annotations={}, engine=[], rootfs="", shared_ipc=False,
        )  # fmt: skip
        self.ended = asyncio.Event()
        self.clock = Clock()
        self.done: list[str] = []
        self.wake_failure: ArchitectError | None = None
        self.order_failures: list[ArchitectError] = []
        self._obeys = {f"kill {number}" for number in obeys}

    async def wake(self, why: str) -> None:
        self.done.append(f"wake: {why}")
        if self.wake_failure is not None:
            raise self.wake_failure
        self.state = State.RUNNING

    async def deliver(self, number: int) -> None:
        words = f"kill {number}"
        assert self.clock.leases, "it could be hibernated on the way"
        self.done.append(words)
        if self.order_failures:
            raise self.order_failures.pop(0)
        if words in self._obeys:
            self.end()

    def end(self) -> None:
        self.state = State.ENDED
        self.ended.set()

    def save(self) -> None:
        self.done.append(f"saved, {self.record.post_started}")


class Bench:
    """One container and the events about it."""

    def __init__(self, container: Container) -> None:
        self.container = container
        self.annotations: dict[str, str] = {}
        self.reports: list[tuple[str, str]] = []
        self.took = 0.0

    def report(self, reason: str, message: str) -> None:
        self.reports.append((reason, message))

    def pre_stop(self, handler: Mapping[str, Any]) -> None:
        self.annotations[PRE_STOP] = json.dumps({"app": handler})

    def post_start(self, handler: Mapping[str, Any]) -> None:
        self.annotations[POST_START] = json.dumps({"app": handler})

    async def end(self, grace_s: float = DEADLINE_S, signal: int = 15) -> None:
        began = time.monotonic()
        await lifecycle.end(
            self.container, self.annotations, pod_ip="127.0.0.1", ports={}, signal=signal,
            grace_s=grace_s, report=self.report,
        )  # fmt: skip
        self.took = time.monotonic() - began
        assert self.container.ended.is_set()
        assert self.container.clock.leases == 0

    async def started(self) -> None:
        await lifecycle.started(
            self.container, self.annotations, pod_ip="127.0.0.1", ports={}, grace_s=DEADLINE_S,
            report=self.report,
        )  # fmt: skip


def bench(*obeys: int, state: State = State.RUNNING) -> Bench:
    return Bench(Container(*obeys, state=state))


def test_the_kubelets_numbers() -> None:
    assert lifecycle._LEAST_GRACE_S == 2.0


def test_ends_by_its_stop_signal() -> None:
    one = bench(3)
    in_time(one.end(signal=3))
    assert one.container.done == ["kill 3"]
    assert one.reports == []


def test_pre_stop_comes_first(tmp_path: Path) -> None:
    one = bench(15)
    one.pre_stop(sh(f"touch {tmp_path}/ran"))
    in_time(one.end())
    assert (tmp_path / "ran").exists()
    assert one.container.done == ["wake: preStop", "kill 15"]
    assert one.reports == []


def test_another_containers_pre_stop_is_not_its_own() -> None:
    one = bench(15)
    one.annotations[PRE_STOP] = json.dumps({"other": sh("exit 1")})
    in_time(one.end())
    assert (one.container.done, one.reports) == (["kill 15"], [])


def test_a_failed_pre_stop_is_an_event_and_stops_nothing() -> None:
    one = bench(15)
    one.pre_stop(sh("exit 4"))
    in_time(one.end())
    assert one.container.done[-1] == "kill 15"
    [(reason, message)] = one.reports
    assert reason == "FailedPreStopHook"
    assert message.startswith('pod/app: preStop: exec "sh": its exit status was 4;')


def test_what_others_wrote_into_the_annotation_is_an_event() -> None:
    one = bench(15)
    one.annotations[PRE_STOP] = "{"
    in_time(one.end())
    assert one.container.done == ["kill 15"]
    assert [reason for reason, _ in one.reports] == ["FailedPreStopHook"]


def test_pre_stop_counts_against_the_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_LEAST_GRACE_S", 0.1)
    one = bench(9)
    one.pre_stop({"sleep": {"seconds": 1}})
    in_time(one.end(grace_s=2.0))
    assert one.container.done == ["wake: preStop", "kill 15", "kill 9"]
    assert 2.0 <= one.took < 2.9
    assert one.reports == []


def test_some_grace_is_left_after_a_long_pre_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_LEAST_GRACE_S", 0.5)
    one = bench(9)
    one.pre_stop({"sleep": {"seconds": 100}})
    in_time(one.end(grace_s=0.2))
    assert one.container.done == ["wake: preStop", "kill 15", "kill 9"]
    assert one.took >= 0.7
    assert [reason for reason, _ in one.reports] == ["FailedPreStopHook"]


def test_without_grace_there_is_no_pre_stop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_LEAST_GRACE_S", 0.1)
    one = bench(9)
    one.pre_stop(sh("exit 1"))
    in_time(one.end(grace_s=0))
    assert (one.container.done, one.reports) == (["kill 15", "kill 9"], [])


def test_a_sleeper_is_woken_for_its_signal() -> None:
    one = bench(15, state=State.SCALED_DOWN)
    in_time(one.end())
    assert one.container.done == ["wake: stop signal", "kill 15"]


def test_a_sleeper_is_not_woken_to_be_killed() -> None:
    one = bench(9, state=State.SCALED_DOWN)
    in_time(one.end(signal=9))
    assert one.container.done == ["kill 9"]


def test_one_that_was_never_started_has_no_pre_stop() -> None:
    one = bench(15, state=State.CREATED)
    one.pre_stop(sh("exit 1"))
    in_time(one.end())
    assert (one.container.done, one.reports) == (["kill 15"], [])


def test_one_that_cannot_be_woken_ends_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "_LEAST_GRACE_S", 0.1)
    one = bench(9, state=State.SCALED_DOWN)
    one.container.wake_failure = ArchitectError("pod/app", "it could not be restored")
    one.pre_stop(sh("true"))
    in_time(one.end(grace_s=0.2))
    assert one.container.done[-2:] == ["kill 15", "kill 9"]
    assert [reason for reason, _ in one.reports] == ["FailedPreStopHook"]


def test_a_signal_that_is_not_delivered_is_an_event_and_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lifecycle, "_LEAST_GRACE_S", 0.1)
    monkeypatch.setattr(lifecycle, "_AGAIN_S", 0.1)
    one = bench(9)
    refused = ArchitectError("keeper did not answer", "the container may be paused", "resume it")
    one.container.order_failures = [refused, refused]
    in_time(one.end(grace_s=0.1))
    assert one.container.done == ["kill 15", "kill 9", "kill 9"]
    assert [reason for reason, _ in one.reports] == ["FailedKillPod"] * 2
    assert "signal 9 was not delivered" in one.reports[1][1]


def test_its_end_is_not_waited_for_longer_than_it_takes() -> None:
    one = bench(15)
    one.pre_stop({"sleep": {"seconds": 1000}})

    async def whole() -> None:
        ending = asyncio.create_task(one.end(grace_s=1000))
        await until(lambda: one.container.done)
        one.container.end()
        await ending

    in_time(whole())
    assert one.reports == []


def test_a_second_end_only_waits(tmp_path: Path) -> None:
    one = bench(15)
    one.pre_stop(sh(f"echo >>{tmp_path}/ran; until [ -e {tmp_path}/go ]; do sleep 0.05; done"))

    async def whole() -> None:
        first = asyncio.create_task(one.end())
        await until((tmp_path / "ran").exists)
        second = asyncio.create_task(
            lifecycle.end(
                one.container, one.annotations, pod_ip="", ports={}, signal=15, grace_s=1,
                report=one.report,
            )
        )  # fmt: skip
        (tmp_path / "go").touch()
        await asyncio.gather(first, second)

    in_time(whole())
    assert (tmp_path / "ran").read_text() == "\n"
    assert one.container.done == ["wake: preStop", "kill 15"]


def test_can_be_cancelled_and_begun_again() -> None:
    one = bench(15)
    one.pre_stop({"sleep": {"seconds": 1000}})

    async def whole() -> None:
        first = asyncio.create_task(one.end(grace_s=1000))
        await until(lambda: one.container.done)
        first.cancel()
        with pytest.raises(asyncio.CancelledError):
            await first
        one.annotations.clear()
        await one.end()

    in_time(whole())
    assert one.container.done == ["wake: preStop", "kill 15"]


# ---- its beginning ---------------------------------------------------------------------------------------


def test_post_start_runs_once(tmp_path: Path) -> None:
    one = bench()
    one.post_start(sh(f"echo >>{tmp_path}/ran"))

    async def whole() -> None:
        await one.started()
        await one.started()

    in_time(whole())
    assert (tmp_path / "ran").read_text() == "\n"
    assert one.container.done == ["saved, True", "wake: postStart"]
    assert one.reports == []
    assert (one.container.clock.leases, one.container.clock.released) == (0, 1)


def test_without_a_hook_nothing_is_woken() -> None:
    one = bench()
    in_time(one.started())
    assert one.container.done == ["saved, True"]


def test_a_failed_post_start_ends_the_container(tmp_path: Path) -> None:
    one = bench(15)
    one.post_start(sh("exit 5"))
    one.pre_stop(sh(f"touch {tmp_path}/ran"))
    in_time(one.started())
    assert one.container.ended.is_set()
    assert one.container.done == ["saved, True", "wake: postStart", "wake: preStop", "kill 15"]
    assert (tmp_path / "ran").exists()
    [(reason, message)] = one.reports
    assert reason == "FailedPostStartHook"
    assert "its exit status was 5" in message


def test_a_post_start_that_outlives_its_container_is_given_up() -> None:
    one = bench()
    one.post_start({"sleep": {"seconds": 1000}})

    async def whole() -> None:
        starting = asyncio.create_task(one.started())
        await until(lambda: len(one.container.done) == 2)
        one.container.end()
        await starting

    in_time(whole())
    assert one.reports == []


def test_a_post_start_that_an_end_cuts_off_is_no_event(tmp_path: Path) -> None:
    one = bench(15)
    one.post_start(
        sh(f"touch {tmp_path}/ran; until [ -e {tmp_path}/go ]; do sleep 0.05; done; exit 1")
    )
    one.pre_stop(sh(f"touch {tmp_path}/go; until [ -e {tmp_path}/over ]; do sleep 0.05; done"))

    async def whole() -> None:
        starting = asyncio.create_task(one.started())
        await until((tmp_path / "ran").exists)
        ending = asyncio.create_task(
            lifecycle.end(
                one.container, one.annotations, pod_ip="", ports={}, signal=15,
                grace_s=DEADLINE_S, report=one.report,
            )
        )  # fmt: skip
        await starting
        (tmp_path / "over").touch()
        await ending

    in_time(whole())
    assert one.reports == []
    assert one.container.done.count("kill 15") == 1
