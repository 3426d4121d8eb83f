"""What the benchmark of moves makes of reports and metrics, and its clients, before a stand-in of valkey."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Callable, Iterator
from subprocess import PIPE, Popen
from typing import Any

import pytest

from architect.adapters.kube.informer import Change, What
from architect.adapters.kube.resources import (
    Checkpoint,
    CheckpointSpec,
    CheckpointStatus,
    Condition,
    Metadata,
    Pod,
    PodSpec,
    PodStatus,
)
from bench import moving, movingclients
from bench.movingclients import Spans, Work, last_report, longest
from tests.e2e.site import Site

METRICS = """\
# TYPE apiserver_request_total counter
apiserver_request_total{code="201",group="architect.loopholelabs.io",resource="checkpoints",verb="POST"} 3
apiserver_request_total{code="200",group="architect.loopholelabs.io",resource="checkpoints",\
subresource="status",verb="PATCH"} 1.2e+01
apiserver_request_total{code="409",group="architect.loopholelabs.io",resource="checkpoints",\
subresource="status",verb="PATCH"} 1
apiserver_request_total{code="200",group="architect.loopholelabs.io",resource="checkpoints",verb="LIST"} 99
apiserver_request_total{code="200",group="example.com",resource="checkpoints",verb="POST"} 99
apiserver_request_total{code="200",group="",resource="pods",subresource="",verb="PATCH"} 5
apiserver_request_total{code="200",group="",resource="pods",subresource="resize",verb="PATCH"} 2
apiserver_request_total{code="200",group="",resource="pods",subresource="status",verb="PATCH"} 99
apiserver_request_total{code="201",group="",resource="pods",subresource="",verb="POST"} 99
apiserver_request_duration_seconds_count{resource="checkpoints",verb="POST"} 99
"""


# ---- reports --------------------------------------------------------------------------------------


def test_the_longest_span_of_a_window_is_any_that_overlaps_it() -> None:
    spans = [[0.0, 0.1], [1.0, 3.0], [4.0, 4.5], [8.0, 8.1], [9.0, 9.9]]
    assert longest(spans, (2.0, 5.0)) == pytest.approx(2000)
    assert longest(spans, (3.5, 5.0)) == pytest.approx(500)
    assert longest(spans, (4.2, 4.3)) == pytest.approx(500)
    assert longest(spans, (5.0, 6.0)) is None


@pytest.mark.parametrize("window", [(0.0, 5.0), (2.0, 10.0)])
def test_a_client_that_was_not_there_has_no_longest_span(window: tuple[float, float]) -> None:
    assert longest([[1.0, 1.1], [8.0, 9.0]], window) is None
    assert longest([], window) is None


def test_of_each_tenth_of_a_second_the_longest_span_is_kept() -> None:
    spans = Spans()
    for begin, end in ((0.01, 0.02), (0.03, 0.06), (0.07, 0.08), (0.05, 0.15)):
        spans.add(begin, end)
    assert spans.count == 4
    assert spans.listed() == [[0.03, 0.06], [0.05, 0.15]]


def test_the_report_is_found_whatever_kubectl_says_around_it() -> None:
    said = 'Warning: {odd}\n{"count": 1}\n{"count": 2}\ncommand terminated\n{ no\n'
    assert last_report(said) == {"count": 2}
    with pytest.raises(ValueError, match="not reported"):
        last_report("connected\nerror: lost connection\n")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConnectionRefusedError(), "refused"),
        (ConnectionResetError(), "reset"),
        (EOFError(), "reset"),
        (TimeoutError(), "timed out"),
        (OSError(113, "no route"), "unreachable"),
        (ValueError(), "wrong reply"),
    ],
)
def test_each_error_is_of_a_kind_that_is_reported(error: Exception, kind: str) -> None:
    assert movingclients.kind_of(error) == kind
    assert kind in moving.KINDS


# ---- figures --------------------------------------------------------------------------------------


def test_only_the_writes_of_architect_are_counted() -> None:
    events: list[dict[str, Any]] = [
        {"source": {"component": "architectd"}, "count": 2},
        {"source": {"component": "architect-control-plane"}},
        {"source": {"component": "kubelet"}, "count": 99},
        {"reportingComponent": "scheduler"},
    ]
    assert moving.api_writes(METRICS, events) == {"Checkpoint": 16, "Pod": 7, "Event": 3}


def test_parts_are_those_whose_both_ends_were_seen() -> None:
    times = {"deleted": 1.0, "gone": 3.5, "made": 4.0, "ready": 6.0}
    assert moving.parts(times, ("deleted", "gone", "made", "bound", "ready")) == {
        "deleted to gone": 2500,
        "gone to made": 500,
    }


def test_no_sample_is_no_line() -> None:
    assert moving.samples("wait", "architect", "work", [None]) == []
    (line,) = moving.samples("wait", "architect", "work", [None, 3.0, 5.0])
    assert (line["n"], line["p50_ms"]) == (2, 4)


MOVES = [
    moving.Moved((1.0, 2.0), {"deleted": 1.0, "ready": 1.5}, 120, 50_000_000),
    moving.Moved((3.0, 4.0), {"deleted": 3.0}, None, None),
]


def test_what_checkpoints_say() -> None:
    lines = {one["name"]: one for one in moving.of_checkpoints(MOVES, "work")}
    assert lines["stood still (Checkpoint's downtimeMs)"]["p50_ms"] == 120
    assert lines["deletion to ready on the other node"]["p50_ms"] == 500
    assert (lines["transferred a move"]["value"], lines["transferred a move"]["n"]) == (50, 1)


def _report(spans: list[list[float]], **more: Any) -> dict[str, Any]:
    kinds: dict[str, int] = {}
    return {"key": "k", "count": 7, "kinds": kinds, "troubles": [], "spans": spans, "connects": [],
            **more}  # fmt: skip


@pytest.mark.parametrize(("counter", "wrong"), [(b"7", 0), (b"8", 1), (None, 0)])
def test_a_counter_that_is_another_than_its_clients_is_wrong(
    counter: bytes | None, wrong: int
) -> None:
    said = {"counter": _report([[0.5, 0.6], [1.2, 1.7], [3.5, 3.6], [5.0, 5.1]])}
    lines = moving.of_clients(said, {"k": counter}, MOVES, [(2.0, 3.0)], "work")
    found = {one["name"]: one for one in lines}
    around = found["longest request around a move"]
    assert (around["n"], around["max_ms"], around["min_ms"]) == (2, 500, 100)
    assert found["lost, doubled or reset"]["value"] == wrong


def test_refused_connects_are_counted_by_kind() -> None:
    spans = [[0.5, 0.6], [1.2, 1.7], [3.5, 3.6], [5.0, 5.1]]
    said = {"new": _report(spans, kinds={"refused": 2, "reset": 1}, connects=spans)}
    found = {one["name"]: one for one in moving.of_clients(said, {}, MOVES, [], "work")}
    assert (found["connects refused"]["value"], found["connects refused"]["n"]) == (2, 10)
    assert found["connects reset"]["value"] == 1
    assert found["connects timed out"]["value"] == 0
    assert found["longest connect around a move"]["max_ms"] == 500
    assert "lost, doubled or reset" not in found


def test_a_run_that_fails_leaves_a_line_that_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> moving.Results:
        raise RuntimeError("no node")

    (line,) = moving.guarded("drain", fail)
    assert line["name"] == "NOT MEASURED: drain failed"
    assert "no node" in capsys.readouterr().err


# ---- what the API shows ---------------------------------------------------------------------------


def _pod(uid: str, *, ready: bool, leaving: bool = False) -> Pod:
    state = Condition("Ready", "True" if ready else "False")
    meta = Metadata("db-0", "ns", uid, labels={"app": "db"})
    if leaving:
        meta = Metadata("db-0", "ns", uid, labels={"app": "db"}, deletionTimestamp="now")
    return Pod(metadata=meta, spec=PodSpec(nodeName="k8n1"), status=PodStatus(conditions=(state,)))


def test_a_pod_of_the_same_name_is_another(cluster_less: Site) -> None:
    watch = moving.Watch(cluster_less)
    first, going, second = (
        _pod("1", ready=True),
        _pod("1", ready=True, leaving=True),
        _pod("2", ready=True),
    )
    watch.pod(Change(What.ADDED, None, first))
    assert watch.only("db") is first
    watch.pod(Change(What.UPDATED, first, going))
    assert watch.live("db") == []
    # As after a list that has replaced a watch.
    watch.pod(Change(What.UPDATED, going, second))
    assert watch.only("db") is second
    assert set(watch.times["1"]) == {"made", "bound", "ready", "deleted", "gone"}
    assert watch.times["1"]["deleted"] <= watch.times["1"]["gone"] <= watch.times["2"]["made"]


def test_a_checkpoint_that_is_gone_is_still_known(cluster_less: Site) -> None:
    watch = moving.Watch(cluster_less)
    spec = CheckpointSpec(podUID="1")
    meta = Metadata("db-0-1", "ns", "c")
    one = Checkpoint(metadata=meta, spec=spec)
    done = Checkpoint(
        metadata=meta, spec=spec, status=CheckpointStatus(phase="Restored", downtimeMs=9)
    )
    watch.checkpoint(Change(What.ADDED, None, one))
    assert watch.present == {"ns/db-0-1"}
    watch.checkpoint(Change(What.UPDATED, one, done))
    watch.checkpoint(Change(What.DELETED, done, None))
    assert not watch.present
    assert watch.checkpoints["1"].status.downtimeMs == 9
    assert set(watch.times["1"]) == {"Restored"}


@pytest.fixture
def cluster_less() -> Site:
    """A site that is asked nothing."""
    return Site(None, "ns")  # type: ignore[arg-type]


# ---- clients --------------------------------------------------------------------------------------


class _Handler(socketserver.StreamRequestHandler):
    """Answers INCR, PING and ECHO; the server says what is to be wrong."""

    server: _Server

    def handle(self) -> None:
        with contextlib.suppress(OSError):
            while (line := self.rfile.readline()) and not self.server.broken.is_set():
                self._answer(line)

    def _answer(self, line: bytes) -> None:
        if line == b"PING\r\n":
            self.wfile.write(b"+PONG\r\n")
        elif line.startswith(b"INCR "):
            self.server.counter += 1
            if self.server.counter == self.server.pause_at:
                self.server.paused.set()
                self.server.go_on.wait(5)
            doubled = self.server.counter == self.server.double_at
            self.server.counter += doubled
            self.wfile.write(b":%d\r\n" % self.server.counter)
        else:
            assert line == b"*2\r\n"
            self.rfile.read(len(b"$4\r\nECHO\r\n"))
            size = self.rfile.readline()
            body = self.rfile.read(int(size[1:]) + 2)
            self.server.echoed += 1
            if self.server.echoed == self.server.spoil_at:
                body = b"x" + body[1:]
            self.wfile.write(size + body)


class _Server(socketserver.ThreadingTCPServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_address = True

    def __init__(self, port: int = 0) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.counter = self.echoed = 0
        self.pause_at = self.double_at = self.spoil_at = -1
        self.paused, self.go_on, self.broken = (threading.Event() for _ in range(3))


@contextlib.contextmanager
def _serving(port: int = 0) -> Iterator[_Server]:
    with _Server(port) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.broken.set()
            server.shutdown()
            thread.join()


def _work(server: _Server, seconds: float = 10, pause_s: float = 0.001) -> Work:
    return Work("k", seconds, pause_s, ("127.0.0.1", server.server_address[1]))


def _until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.001)


@contextlib.contextmanager
def _running(mode: str, work: Work) -> Iterator[list[BaseException]]:
    failed: list[BaseException] = []

    def run() -> None:
        try:
            movingclients.MODES[mode](work)
        except (OSError, EOFError, ValueError) as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield failed
    finally:
        work.ended.set()
        thread.join(10)
        assert not thread.is_alive()


@pytest.mark.parametrize("mode", ["count", "stream", "connect", "again"])
def test_a_client_says_that_it_is_connected_and_what_it_asked(
    mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with _serving() as server:
        work = _work(server)
        with _running(mode, work) as failed:
            _until(lambda: work.spans.count >= 20)
    assert not failed
    report = work.report()
    assert report["count"] >= 20
    assert report["spans"]
    assert not report["kinds"]
    assert bool(report["connects"]) == (mode == "connect")
    assert capsys.readouterr().out == "connected\n"


def test_a_pause_of_the_server_is_the_longest_request() -> None:
    with _serving() as server:
        server.pause_at = 10
        work = _work(server)
        with _running("count", work) as failed:
            assert server.paused.wait(10)
            began = time.monotonic()
            time.sleep(0.3)
            server.go_on.set()
            _until(lambda: work.spans.count >= 20)
            ended = time.monotonic()
    assert not failed
    found = longest(work.report()["spans"], (began, ended - 0.2))
    assert found is not None
    assert 290 <= found < 2000


def test_a_doubled_reply_is_an_error() -> None:
    with _serving() as server:
        server.double_at = 5
        with pytest.raises(ValueError, match="reply 5 is b':6"):
            movingclients.count(_work(server))


def test_a_spoiled_value_is_an_error() -> None:
    with _serving() as server:
        server.spoil_at = 5
        with pytest.raises(ValueError, match="value 4 is another"):
            movingclients.stream(_work(server))


@pytest.mark.parametrize("mode", ["count", "stream"])
def test_a_lost_connection_ends_what_has_but_one(mode: str) -> None:
    with _serving() as server:
        work = _work(server)
        with _running(mode, work) as failed:
            _until(lambda: work.spans.count >= 5)
            server.broken.set()
            _until(lambda: failed)
    assert movingclients.kind_of(failed[0]) == "reset"


def test_the_program_ends_with_its_report_when_it_is_told() -> None:
    with _serving() as server:
        place = ("127.0.0.1", str(server.server_address[1]))
        command = [sys.executable, "-c", moving.PROGRAM, "count", "k", "30", "1", *place]
        with Popen(command, stdin=PIPE, stdout=PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "connected\n"
            said, _ = process.communicate("end\n", timeout=20)
        assert process.returncode == 0
        assert last_report(said)["count"] == server.counter > 0


def test_refused_connects_are_counted_and_survived() -> None:
    with _serving() as server:
        port = server.server_address[1]
        work = _work(server)
        with _running("connect", work) as failed:
            _until(lambda: work.spans.count >= 5)
            server.broken.set()
            server.shutdown()
            server.socket.close()
            _until(lambda: work.kinds["refused"] >= 5)
            with _serving(port):
                before = work.spans.count
                _until(lambda: work.spans.count >= before + 5)
                work.ended.set()
    assert not failed
    assert set(work.kinds) <= {"refused", "reset"}


def test_who_connects_again_measures_from_reply_to_reply() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
    with _serving(port) as server:
        work = _work(server)
        with _running("again", work) as failed:
            _until(lambda: work.spans.count >= 5)
            server.broken.set()
            server.shutdown()
            server.socket.close()
            _until(lambda: work.kinds["refused"] >= 3)
            began = time.monotonic()
            time.sleep(0.2)
            with _serving(port):
                before = work.spans.count
                _until(lambda: work.spans.count >= before + 200)
                ended = time.monotonic()
                work.ended.set()
    assert not failed
    found = longest(work.report()["spans"], (began, ended - 0.15))
    assert found is not None
    assert found >= 190
