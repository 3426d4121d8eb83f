"""Informers, work queue and events against a stand-in API server that does what clusters do."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest

from architect.adapters.kube.client import Kube, KubeError
from architect.adapters.kube.events import WARNING, Recorder, Reference
from architect.adapters.kube.informer import Backoff, Change, Informer, Timing, What
from architect.adapters.kube.resources import ConfigMap, Event
from architect.adapters.kube.workqueue import Pace, WorkQueue
from tests.unit.api_standin import Standin, standin

QUICK = Timing(watch_s=60, stall_s=0.3, first_delay_s=0.01, longest_delay_s=0.05, quiet_s=60)
SHORT = Timing(watch_s=1, stall_s=0.3, first_delay_s=0.01, longest_delay_s=0.05, quiet_s=60)
DEADLINE_S = 10.0


async def until(what: str, condition: Callable[[], bool]) -> None:
    """Waits until a condition holds."""
    loop = asyncio.get_running_loop()
    end = loop.time() + DEADLINE_S
    while not condition():
        if loop.time() > end:
            pytest.fail(f"not within {DEADLINE_S:.0f} s: {what}")
        await asyncio.sleep(0.005)


class Seen:
    """What an informer has told."""

    def __init__(self) -> None:
        self.changes: list[tuple[str, str]] = []
        self.raw: list[Change[ConfigMap]] = []

    def __call__(self, change: Change[ConfigMap]) -> None:
        self.changes.append((change.what.value, change.object.metadata.name))
        self.raw.append(change)


@contextlib.asynccontextmanager
async def watching(
    kube: Kube, timing: Timing = QUICK, **more: Any
) -> AsyncIterator[tuple[Informer[ConfigMap], Seen]]:
    """A running informer of ConfigMaps that has synced."""
    informer = Informer(kube, ConfigMap, timing=timing, **more)
    seen = Seen()
    informer.add_handler(seen)
    task = asyncio.create_task(informer.run())
    try:
        await asyncio.wait_for(informer.synced.wait(), DEADLINE_S)
        yield informer, seen
        assert not task.done()
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def with_server(test: Callable[[Standin, Kube], Coroutine[Any, Any, None]]) -> None:
    """Runs a test with a server."""

    async def whole() -> None:
        async with asyncio.timeout(30), standin() as (server, kube):
            await test(server, kube)

    asyncio.run(whole())


def test_what_is_there_and_what_changes_is_told() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns", data={"x": "1"})
        async with watching(kube) as (informer, seen):
            assert seen.changes == [("added", "a")]
            await server.put("configmaps", "a", "ns", data={"x": "2"})
            await server.put("configmaps", "b", "ns")
            await server.drop("configmaps", "a", "ns")
            await until("three changes", lambda: len(seen.changes) == 4)
            assert seen.changes[1:] == [("updated", "a"), ("added", "b"), ("deleted", "a")]
            updated = seen.raw[1]
            assert updated.old is not None
            assert updated.new is not None
            assert (updated.old.data, updated.new.data) == ({"x": "1"}, {"x": "2"})
            assert seen.raw[3].new is None
            assert list(informer.objects) == ["ns/b"]
            late = Seen()
            informer.add_handler(late)
            assert late.changes == [("added", "b")]

    with_server(test)


def test_a_list_of_many_pages_is_whole() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        server.page = 7
        for number in range(40):
            await server.put("configmaps", f"m{number}", "ns")
        async with watching(kube) as (informer, _):
            assert len(informer.objects) == 40
            assert server.asked("GET", "continue") == 5

    with_server(test)


def test_only_what_is_kept_is_told() -> None:
    def wanted(one: ConfigMap) -> bool:
        return one.labels.get("ours") == "yes"

    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns")
        await server.put("configmaps", "b", "ns", metadata={"labels": {"ours": "yes"}})
        async with watching(kube, keep=wanted) as (informer, seen):
            assert list(informer.objects) == ["ns/b"]
            await server.put("configmaps", "a", "ns", metadata={"labels": {"ours": "yes"}})
            await server.put("configmaps", "b", "ns", metadata={"labels": {"ours": "no"}})
            await until("both changes", lambda: len(seen.changes) == 3)
            assert seen.changes[1:] == [("added", "a"), ("deleted", "b")]

    with_server(test)


def test_a_watch_that_ends_goes_on_where_it_was() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns")
        async with watching(kube, SHORT) as (informer, seen):
            await until("a second watch", lambda: informer.watches >= 2)
            await server.put("configmaps", "b", "ns")
            await until("b", lambda: ("added", "b") in seen.changes)
            assert informer.lists == 1

    with_server(test)


def test_after_410_everything_is_listed_and_the_differences_are_told() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns")
        await server.put("configmaps", "b", "ns")
        await server.put("configmaps", "same", "ns")
        async with watching(kube) as (informer, seen):
            stale = server.version
            server.stalled = True
            await server.put("configmaps", "b", "ns", data={"x": "2"})
            await server.drop("configmaps", "a", "ns")
            await server.put("configmaps", "c", "ns")
            server.compact()
            server.stalled = False
            await until("the differences", lambda: len(seen.changes) == 6)
            assert sorted(seen.changes[3:]) == [("added", "c"), ("deleted", "a"), ("updated", "b")]
            assert informer.lists == 2
            versions = [
                int(query["resourceVersion"])
                for _, _, query in server.requests
                if query.get("watch")
            ]
            # The version that was gone is not asked for again.
            assert versions.count(stale) == 1
            await until("no error any more", lambda: informer.last_error is None)

    with_server(test)


def test_410_at_the_begin_of_a_watch_is_the_same() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with watching(kube) as (informer, seen):
            await server.stop()
            await server.put("configmaps", "a", "ns")
            server.compact()
            await server.start()
            await until("a", lambda: seen.changes == [("added", "a")])
            assert informer.lists == 2

    with_server(test)


def test_an_expired_list_is_begun_anew() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        server.page = 1
        await server.put("configmaps", "a", "ns")
        await server.put("configmaps", "b", "ns")
        answered = server._list
        done: list[bool] = []

        def expiring(*words: Any) -> tuple[int, Any]:
            if "continue" in words[2] and not done:
                done.append(True)
                server.version += 1
                server.compact()
            return answered(*words)

        server._list = expiring  # type: ignore[method-assign,assignment]
        async with watching(kube) as (informer, seen):
            assert done
            assert sorted(seen.changes) == [("added", "a"), ("added", "b")]
            assert len(informer.objects) == 2

    with_server(test)


def test_an_object_made_anew_under_its_name_is_another() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns")
        async with watching(kube) as (_, seen):
            await server.stop()
            await server.drop("configmaps", "a", "ns")
            await server.put("configmaps", "a", "ns", metadata={"uid": "another"})
            server.compact()
            await server.start()
            await until("both", lambda: len(seen.changes) == 3)
            assert seen.changes[1:] == [("deleted", "a"), ("added", "a")]

    with_server(test)


def test_a_stalled_watch_is_left() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with watching(kube, SHORT) as (informer, seen):
            server.stalled = True
            await server.put("configmaps", "a", "ns")
            await until("an error", lambda: informer.last_error is not None)
            assert "nothing for" in str(informer.last_error)
            server.stalled = False
            await until("a", lambda: seen.changes == [("added", "a")])
            assert informer.lists == 1

    with_server(test)


def test_an_api_server_that_is_away_is_waited_for() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with watching(kube) as (informer, seen):
            await server.stop()
            await until("an error", lambda: informer.last_error is not None)
            await server.put("configmaps", "a", "ns")
            await server.start()
            await until("a", lambda: seen.changes == [("added", "a")])
            # It went on with its version, which is still there.
            assert informer.lists == 1

    with_server(test)


def test_a_connection_that_is_cut_is_made_again() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with watching(kube) as (informer, seen):
            for name in "abc":
                server.cut()
                await server.put("configmaps", name, "ns")
                await until(name, lambda name=name: ("added", name) in seen.changes)  # type: ignore[misc]
            assert len(informer.objects) == 3

    with_server(test)


@pytest.mark.parametrize("status", [401, 403, 429, 500, 503])
def test_errors_of_the_server_pass(status: int) -> None:
    async def test(server: Standin, kube: Kube) -> None:
        server.fail = [status] * 3
        await server.put("configmaps", "a", "ns")
        async with watching(kube) as (_, seen):
            assert seen.changes == [("added", "a")]

    with_server(test)


def test_a_handler_that_fails_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async def test(server: Standin, kube: Kube) -> None:
        def failing(change: Change[ConfigMap]) -> None:
            raise ValueError(change.object.key)

        await server.put("configmaps", "a", "ns")
        async with watching(kube) as (informer, _):
            late = Seen()
            informer.add_handler(failing)
            informer.add_handler(late)
            await server.put("configmaps", "b", "ns")
            await until("b", lambda: ("added", "b") in late.changes)

    with_server(test)
    assert "handler failed for ns/b" in caplog.text


def test_the_answer_to_a_write_is_not_undone_by_an_older_line() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns", data={"x": "1"})
        async with watching(kube) as (informer, seen):
            server.stalled = True
            await server.put("configmaps", "a", "ns", data={"x": "2"})
            answer = await kube.patch(ConfigMap, "a", {"data": {"x": "3"}}, "ns")
            informer.note(answer)
            assert seen.changes[1:] == [("updated", "a")]
            server.stalled = False
            await server.put("configmaps", "b", "ns")
            await until("b", lambda: ("added", "b") in seen.changes)
            assert len(seen.changes) == 3
            found = informer.get("ns/a")
            assert found is not None
            assert found.data == {"x": "3"}

    with_server(test)


def test_delays_grow_and_begin_anew() -> None:
    backoff = Backoff(Timing(first_delay_s=1, longest_delay_s=8))
    for bound in (1, 2, 4, 8, 8):
        assert bound / 2 <= backoff.next() <= bound
    assert backoff.next(at_least=60) == 60
    backoff.reset()
    assert backoff.next() <= 1


# -- the client ---------------------------------------------------------------------------------------


def test_errors_say_what_and_carry_the_status() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        with pytest.raises(KubeError, match="configmaps/none") as caught:
            await kube.get(ConfigMap, "none", "ns")
        assert (caught.value.status, caught.value.temporary) == (404, False)
        await server.stop()
        with pytest.raises(KubeError, match="see whether the API server is up") as caught:
            await kube.get(ConfigMap, "none", "ns")
        assert (caught.value.status, caught.value.temporary) == (0, True)

    with_server(test)


def test_an_answer_that_is_no_json_is_an_error() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await server.put("configmaps", "a", "ns", data=["no", "map"])
        with pytest.raises(KubeError, match="Expected `object") as caught:
            await kube.get(ConfigMap, "a", "ns")
        assert caught.value.temporary

    with_server(test)


def test_a_server_that_vanishes_is_noticed_by_tcp() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        await kube.listed(ConfigMap)
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as one:
                if one.getpeername()[1:2] == (server.port,):
                    idle = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE)
                    found.append((one.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE), idle))
        assert found == [(1, 15)]

    with_server(test)


# -- events -------------------------------------------------------------------------------------------

ABOUT = Reference("Pod", "p", "uid-p", "ns", "app")


@contextlib.asynccontextmanager
async def recording(kube: Kube) -> AsyncIterator[Recorder]:
    """A running recorder."""
    recorder = Recorder(kube, "architectd", "node")
    task = asyncio.create_task(recorder.run())
    try:
        yield recorder
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


def test_events_that_repeat_are_counted() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with recording(kube) as recorder:
            for message in ("in 38 ms", "in 41 ms"):
                recorder.record(ABOUT, "ScaledUp", message)
                await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
            recorder.record(ABOUT, "RestoreFailed", "no", WARNING)
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
        up, failed = await kube.listed(Event)
        assert (up.reason, up.count, up.message, up.type) == ("ScaledUp", 2, "in 41 ms", "Normal")
        assert up.involvedObject is not None
        assert up.involvedObject["fieldPath"] == "spec.containers{app}"
        assert (failed.reason, failed.count, failed.type) == ("RestoreFailed", 1, "Warning")
        assert (server.asked("POST"), server.asked("PATCH")) == (2, 1)

    with_server(test)


def test_an_event_that_the_server_has_forgotten_is_made_anew() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with recording(kube) as recorder:
            recorder.record(ABOUT, "ScaledUp", "one")
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
            server.objects["events"].clear()
            recorder.record(ABOUT, "ScaledUp", "two")
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
        (event,) = await kube.listed(Event)
        assert (event.count, event.message) == (1, "two")

    with_server(test)


def test_events_wait_for_the_server_and_are_merged_meanwhile() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with recording(kube) as recorder:
            await server.stop()
            for number in range(5):
                recorder.record(ABOUT, "ScaledUp", str(number))
            other = Reference("Pod", "q", "uid-q", "ns")
            recorder.record(other, "ScaledDown", "x")
            assert recorder.dropped == 0
            await server.start()
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
        found = {one.reason: (one.count, one.message) for one in await kube.listed(Event)}
        assert found == {"ScaledUp": (5, "4"), "ScaledDown": (1, "x")}

    with_server(test)


def test_a_refused_event_does_not_hold_up_the_others() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with recording(kube) as recorder:
            server.fail = [404]
            recorder.record(ABOUT, "ScaledUp", "one")
            recorder.record(ABOUT, "ScaledDown", "two")
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
            assert recorder.dropped == 1
        (event,) = await kube.listed(Event)
        assert event.reason == "ScaledDown"

    with_server(test)


def test_a_server_that_knows_no_roles_yet_gets_the_event_again() -> None:
    async def test(server: Standin, kube: Kube) -> None:
        async with recording(kube) as recorder:
            server.fail = [403, 401]
            recorder.record(ABOUT, "ScaledUp", "one")
            await asyncio.wait_for(recorder.flushed(), DEADLINE_S)
            assert recorder.dropped == 0
        (event,) = await kube.listed(Event)
        assert event.reason == "ScaledUp"

    with_server(test)


# -- the work queue -----------------------------------------------------------------------------------


def test_a_key_is_there_once_and_again_after_it_was_worked_on() -> None:
    async def test() -> None:
        queue = WorkQueue()
        queue.add("a")
        queue.add("a")
        queue.add("b")
        assert [await queue.get(), await queue.get()] == ["a", "b"]
        queue.add("a")
        queue.add("a")
        assert len(queue) == 0
        queue.done("b")
        assert len(queue) == 0
        queue.done("a")
        assert len(queue) == 1

    asyncio.run(test())


def test_the_earliest_of_several_delays_counts() -> None:
    async def test() -> None:
        queue = WorkQueue()
        queue.add_after("a", 60)
        queue.add_after("b", 0.03)
        queue.add_after("a", 0.01)
        queue.add_after("a", 30)
        async with asyncio.timeout(DEADLINE_S):
            assert [await queue.get(), await queue.get()] == ["a", "b"]
        assert queue.delayed == 0

    asyncio.run(test())


def test_delays_of_a_failing_key_grow_until_it_succeeds() -> None:
    async def test() -> None:
        queue = WorkQueue(Pace(1, 8))
        for bound in (1, 2, 4, 8, 8):
            assert bound / 2 <= queue.failed("a") <= bound
        assert queue.failed("b") <= 1
        queue.succeeded("a")
        assert queue.failed("a") <= 1

    asyncio.run(test())


def test_changes_have_names() -> None:
    assert [one.value for one in What] == ["added", "updated", "deleted"]
