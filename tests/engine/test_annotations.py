"""Each annotation of an engine's container: good values take effect, bad ones refuse the create."""

import contextlib
import json
import socket
import time

import pytest

from architect.contract.annotations import (
    DISABLE_AUTOSCALEDOWN_CONTAINERS,
    IGNORE_ACTIVITY_PORTS,
    INITIAL_SCALEDOWN_DELAYS,
    MANAGED_CONTAINERS,
    NETWORK_MONITOR,
    SCALEDOWN_DURATIONS,
)
from tests.engine.support import (
    PORT,
    SUBJECT,
    TEST_IMAGE,
    Client,
    Container,
    Lab,
    Unmet,
    annotation,
    architect,
    run,
    settings,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine


def stays_awake(container: Container, seconds: float, since: int = 0) -> None:
    """See to it that a container does not hibernate for so long, after ``since`` times."""
    with contextlib.suppress(Unmet):
        wait_until(lambda: container.hibernations() > since, "nothing", seconds)
        pytest.fail(f"{container.name} has hibernated")


# ---- good values -----------------------------------------------------------------------------------


def test_managed_containers_lists_who_is_managed(lab: Lab) -> None:
    for names, state in (([], "UNMANAGED"), (["somebody-else"], None)):
        name = unique("listed")
        words = ["podman", "--runtime", "runc-architect", "run", "-d", "--name", name]
        words += annotation(MANAGED_CONTAINERS, names)
        lab.closing.callback(run, "podman", "rm", "-f", "-i", "-t", "0", name)
        done = run(*words, TEST_IMAGE, "sleep", "100")
        if state is None:
            assert done.code != 0
            assert "no such container" in done.err
        else:
            assert done.code == 0, done.err
            lab.footprint.add(name)
            assert not [row for row in architect("ps") if row["pod"] == name]


def test_scaledown_durations(lab: Lab) -> None:
    quick, slow = lab.subject("quick", idle="1s"), lab.subject("slow", idle="3s500ms")
    for container, seconds in ((quick, 1.0), (slow, 3.5)):
        client = container.call()
        began = time.monotonic()
        client.ask("awake")
        container.await_state("SCALED_DOWN")
        assert seconds <= time.monotonic() - began < seconds + 2


def test_scaledown_is_a_minute_by_default(lab: Lab) -> None:
    container = lab.subject("default", idle=None)
    stays_awake(container, 2.5)


def test_initial_scaledown_delay_holds_once(lab: Lab) -> None:
    began = time.monotonic()
    container = _with(lab, "delayed", INITIAL_SCALEDOWN_DELAYS, "4s")
    container.await_state("SCALED_DOWN")
    assert time.monotonic() - began > 4
    client = container.call()
    woken = time.monotonic()
    client.ask("awake")
    container.await_state("SCALED_DOWN")
    assert time.monotonic() - woken < 4


def _with(
    lab: Lab, stem: str, key: str, value: object, idle: str = "1s", monitor: str | None = "packets"
) -> Container:
    """Start SUBJECT with one more annotation: an object by its name, or (None) a list of it."""
    name = unique(stem)
    annotations = settings(name, idle=idle, monitor=monitor)
    annotations[key] = [name] if value is None else {name: value}
    container = lab.start(stem, "python3", "-c", SUBJECT, annotations=annotations, name=name)
    Client.when_ready("127.0.0.1", container.host_port).close()
    return container


def test_disable_autoscaledown(lab: Lab) -> None:
    container = _with(lab, "never", DISABLE_AUTOSCALEDOWN_CONTAINERS, None)
    stays_awake(container, 3)
    client = container.call()
    client.ask("count")
    container.sleep()
    assert client.ask("count") == "2"
    stays_awake(container, 2, since=1)


def test_ignored_port_is_no_activity(lab: Lab) -> None:
    container = _with(lab, "ignored", IGNORE_ACTIVITY_PORTS, [PORT], idle="2s")
    client = container.call()

    def asked_and_asleep() -> bool:
        client.socket.settimeout(1)
        with contextlib.suppress(TimeoutError):
            assert client.ask("noise") == "noise"
            return False
        return container.state() == "SCALED_DOWN"

    wait_until(asked_and_asleep, "the container to hibernate in spite of traffic", 8)
    stays = container.hibernations()
    with pytest.raises(TimeoutError):
        client.ask("knock")
    assert container.state() == "SCALED_DOWN"
    assert container.hibernations() == stays
    assert container.exec("true").code == 0
    # The clients' own retransmissions reach it now: nothing was reset.
    client.socket.settimeout(15)
    assert "knock" in [client.line() for _ in range(2)]


def test_activity_keeps_awake(lab: Lab) -> None:
    container = lab.subject("active", idle="1s")
    client = container.call()
    for number in range(12):
        assert client.ask("count") == str(number + 1)
        with contextlib.suppress(Unmet):
            wait_until(lambda: False, "the next request", 0.3)
    assert container.hibernations() == 0


def test_monitor_packets_wakes(lab: Lab) -> None:
    container = lab.subject("packets", monitor="packets", idle="1s")
    client = container.call()
    container.await_state("SCALED_DOWN")
    assert client.ask("count") == "1"
    container.await_state("SCALED_DOWN")
    assert container.call().ask("count") == "2"


def test_without_monitor_packets_are_dropped_never_reset(lab: Lab) -> None:
    container = lab.subject("silent", monitor=None, idle="1s")
    client = container.call()
    container.await_state("SCALED_DOWN")
    client.socket.settimeout(1.5)
    with pytest.raises(TimeoutError):
        client.ask("count")
    with socket.socket() as another:
        another.settimeout(1.5)
        with pytest.raises(TimeoutError):
            another.connect(("127.0.0.1", container.host_port))
    assert container.state() == "SCALED_DOWN"
    assert container.exec("true").code == 0
    client.socket.settimeout(15)
    assert client.line() == "1"


def test_without_monitor_traffic_still_counts(lab: Lab) -> None:
    container = lab.subject("counts", monitor=None, idle="1s")
    client = container.call()
    for number in range(8):
        assert client.ask("count") == str(number + 1)
        with contextlib.suppress(Unmet):
            wait_until(lambda: False, "the next request", 0.3)
    assert container.hibernations() == 0


def test_monitor_connections(lab: Lab) -> None:
    container = lab.subject("connections", monitor="connections", idle="1s")
    client = container.call()
    client.ask("count")
    stays_awake(container, 3)
    assert client.ask("count") == "2"
    client.close()
    container.await_state("SCALED_DOWN")
    assert container.call().ask("count") == "3"


# ---- bad values ------------------------------------------------------------------------------------

BAD = [
    (MANAGED_CONTAINERS, "not json", "not json", "is not JSON", '["app"]'),
    (MANAGED_CONTAINERS, {"app": 1}, '{"app":1}', "is not a JSON list", '["app"]'),
    (SCALEDOWN_DURATIONS, {"NAME": "-5s"}, "-5s", "negative", ""),
    (SCALEDOWN_DURATIONS, {"NAME": "5 parsecs"}, "5 parsecs", "", ""),
    (SCALEDOWN_DURATIONS, {"NAME": 5}, "5", "is not a duration", "90s"),
    (SCALEDOWN_DURATIONS, {"stranger": "5s"}, "stranger", "no such container", ""),
    (INITIAL_SCALEDOWN_DELAYS, {"NAME": "soon"}, "soon", "", ""),
    (NETWORK_MONITOR, {"NAME": "packet"}, "packet", "", "packets"),
    (NETWORK_MONITOR, ["NAME"], "NAME", "is not a JSON object", ""),
    (DISABLE_AUTOSCALEDOWN_CONTAINERS, ["stranger"], "stranger", "no such container", ""),
    (IGNORE_ACTIVITY_PORTS, {"NAME": [70000]}, "70000", "is not a port", "1 to 65535"),
    (IGNORE_ACTIVITY_PORTS, {"NAME": 80}, "80", "is not a list of ports", "[9090]"),
]


@pytest.mark.parametrize(
    ("key", "value", "shown", "why", "fix"),
    BAD,
    ids=[f"{key.rpartition('/')[2]}-{number}" for number, (key, *_) in enumerate(BAD)],
)
def test_bad_value_refuses_the_create(
    lab: Lab, key: str, value: object, shown: str, why: str, fix: str
) -> None:
    name = unique("bad")
    annotations = settings(name)
    text = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
    annotations[key] = text.replace("NAME", name)
    words = ["podman", "--runtime", "runc-architect", "run", "-d", "--name", name]
    for one, setting in annotations.items():
        words += annotation(one, setting)
    lab.closing.callback(run, "podman", "rm", "-f", "-i", "-t", "0", name)
    done = run(*words, TEST_IMAGE, "sleep", "100")
    lab.footprint.add(name)
    assert done.code == 126, done.err
    assert key in done.err
    for word in (shown, why, fix):
        assert word.replace("NAME", name) in done.err.replace('\\"', '"')
    if isinstance(value, dict) and "NAME" in value:
        assert f"key '{name}" in done.err or f'key "{name}' in done.err.replace("\\", "")
    # Podman itself keeps what it could not start, until it is removed.
    assert run("podman", "rm", "-f", name).code == 0
    assert not [row for row in architect("ps") if row["pod"] == name]
    assert not [one for one in lab.footprint.left() if one.startswith(f"{name}:")]
