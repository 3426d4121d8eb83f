"""Every Podman verb, on a container that is awake, on one that is hibernated, and on plain runc's.

What runc does is the measure: exit codes and outputs have to be its own.
"""

import json
import signal
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Final

import pytest

from tests.engine.support import (
    PORT,
    SUBJECT,
    TEST_IMAGE,
    Client,
    Container,
    Lab,
    annotation,
    architect,
    free_port,
    hibernate,
    must,
    podman,
    run,
    unique,
    wait_until,
)

pytestmark = pytest.mark.engine

MODES = ["plain", "awake", "hibernated"]
every_mode = pytest.mark.parametrize("mode", MODES)
managed_modes = pytest.mark.parametrize("mode", MODES[1:])
HEALTHCHECK = ["--health-cmd", "true", "--health-interval", "disable"]


def bring_to(mode: str, container: Container) -> Container:
    if mode == "hibernated":
        container.sleep()
    return container


def start(lab: Lab, mode: str, stem: str, *options: str) -> Container:
    runtime = "runc" if mode == "plain" else "runc-architect"
    container = lab.subject(f"{stem}-{mode}", runtime=runtime, options=options)
    return bring_to(mode, container)


Get = Callable[[str], Container]


@pytest.fixture(scope="module")
def trio(shared_lab: Lab) -> dict[str, Container]:
    """One container of each mode, for the verbs that end none."""
    return {mode: start(shared_lab, mode, "shared", *HEALTHCHECK) for mode in MODES}


@pytest.fixture
def get(trio: dict[str, Container]) -> Get:
    """Return the shared container of a mode, in that mode."""

    def find(mode: str) -> Container:
        if mode == "awake":
            architect("wake", trio[mode].name)
        return bring_to(mode, trio[mode])

    return find


# ---- verbs that need the program ---------------------------------------------------------------


@every_mode
@pytest.mark.parametrize(
    ("words", "options", "stdin", "code", "out", "err"),
    [
        (["sh", "-c", "echo out; echo err >&2; exit 3"], [], None, 3, "out\n", "err\n"),
        (["sh", "-c", "cat; pwd"], ["-i", "-w", "/usr"], "in", 0, "in/usr\n", ""),
        (
            ["sh", "-c", "echo $WORD; id -u"],
            ["-e", "WORD=x", "-u", "65534"],
            None,
            0,
            "x\n65534\n",
            "",
        ),
        (["sh", "-c", "kill -9 $$"], [], None, 137, "", ""),
        (["sh", "-c", "test -t 1 && echo hi"], ["-t"], None, 0, "hi\n", None),
    ],
    ids=["streams", "stdin", "user", "killed", "terminal"],
)
def test_exec(
    get: Get,
    mode: str,
    words: list[str],
    options: list[str],
    stdin: str | None,
    code: int,
    out: str,
    err: str | None,
) -> None:
    done = get(mode).exec(*words, options=options, stdin=stdin)
    assert (done.code, done.out) == (code, out)
    assert err is None or done.err == err


def test_exec_of_nothing_fails_as_with_runc(get: Get) -> None:
    codes = {mode: get(mode).exec("no-such-program").code for mode in MODES}
    assert codes == dict.fromkeys(MODES, 127)


def test_exec_in_the_background_keeps_it_awake(get: Get) -> None:
    container = get("hibernated")
    podman("exec", "-d", container.name, "sleep", "1000")
    assert container.state() == "RUNNING"
    refused = run("architect", "sleep", container.name)
    assert refused.code == 1
    assert "1 exec session(s) are open" in refused.err
    assert container.exec("pkill", "-x", "sleep").code == 0
    wait_until(lambda: run("architect", "sleep", container.name).code == 0, "the session's end")


@every_mode
def test_healthcheck(get: Get, mode: str) -> None:
    container = get(mode)
    assert run("podman", "healthcheck", "run", container.name).code == 0
    assert container.inspect("{{.State.Health.Status}}") == "healthy"


# ---- verbs that leave a sleeper asleep -----------------------------------------------------------


def test_shown_as_running(get: Get) -> None:
    for mode in MODES:
        container = get(mode)
        shown = json.loads(podman("ps", "--format", "json", "--filter", f"name={container.name}"))
        assert [(one["State"], one["Exited"]) for one in shown] == [("running", False)]
        assert container.inspect("{{.State.Status}} {{.State.Running}}") == "running true"
        assert Path(f"/proc/{container.keeper}").exists()
        stats = json.loads(podman("stats", "--no-stream", "--format", "json", container.name))
        assert int(stats[0]["pids"]) == (1 if mode == "plain" else 2 if mode == "awake" else 1)
        assert stats[0]["mem_usage"].split(" / ")[0] not in ("0B", "--")
        assert podman("port", container.name) == f"{PORT}/tcp -> 127.0.0.1:{container.host_port}"
        assert (container.state() == "SCALED_DOWN") == (mode == "hibernated")


def test_top(get: Get) -> None:
    assert "python3" in podman("top", get("awake").name, "args")
    container = get("hibernated")
    assert "python3" not in podman("top", container.name, "args")
    assert container.state() == "SCALED_DOWN"


def test_files(get: Get, tmp_path: Path) -> None:
    sent = tmp_path / "sent"
    sent.write_bytes(bytes(range(256)) * 1000)
    for mode in MODES:
        container = get(mode)
        back = tmp_path / f"back-{mode}"
        podman("cp", str(sent), f"{container.name}:/var/sent")
        podman("cp", f"{container.name}:/var/sent", str(back))
        assert back.read_bytes() == sent.read_bytes()
        assert "A /var/sent" in podman("diff", container.name).splitlines()
        place = Path(podman("mount", container.name))
        assert (place / "var/sent").read_bytes() == sent.read_bytes()
        podman("umount", container.name)
        assert (container.state() == "SCALED_DOWN") == (mode == "hibernated")
        digest = container.exec("sha256sum", "/var/sent").out.split()[0]
        assert digest == must("sha256sum", str(sent)).split()[0]


# ---- logs ------------------------------------------------------------------------------------------


def test_logs_lose_and_double_nothing(lab: Lab) -> None:
    container = lab.subject("logs")
    client = container.call()
    with subprocess.Popen(
        ["podman", "logs", "-f", container.name], stdout=subprocess.PIPE, text=True
    ) as follower:
        for number in range(4):
            client.ask(f"print before sleep {number}")
            container.sleep()
            client.ask(f"print after wake {number}")
        expected = ["ready"]
        for number in range(4):
            expected += [f"before sleep {number}", f"after wake {number}"]
        assert container.logs() == expected
        container.sleep()
        podman("stop", "-t", "5", container.name)
        assert follower.stdout
        assert follower.stdout.read().splitlines() == [*expected, "term"]
    assert container.logs() == [*expected, "term"]
    assert container.exit_code == 7


# ---- signals and ends --------------------------------------------------------------------------------


@every_mode
def test_stop(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "stop")
    with subprocess.Popen(
        ["podman", "wait", container.name], stdout=subprocess.PIPE, text=True
    ) as waiter:
        podman("stop", "-t", "5", container.name)
        assert waiter.communicate(timeout=10)[0].strip() == "7"
    assert container.inspect("{{.State.Status}} {{.State.ExitCode}}") == "exited 7"
    assert container.logs() == ["ready", "term"]
    assert container.state() == "UNMANAGED"


@every_mode
def test_restart(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "restart")
    container.call().ask("count")
    bring_to(mode, container)
    podman("restart", "-t", "5", container.name)
    lab.footprint.add(container.name)
    client = Client.when_ready("127.0.0.1", container.host_port)
    assert client.ask("count") == "1"
    if mode != "plain":
        container.sleep()
        assert client.ask("count") == "2"
    assert container.logs() == ["ready", "term", "ready"]


@every_mode
@pytest.mark.parametrize("name", ["KILL", "TERM", "HUP"])
def test_kill(lab: Lab, mode: str, name: str) -> None:
    container = start(lab, mode, f"kill-{name.lower()}")
    podman("kill", "-s", name, container.name)
    if name == "HUP":
        wait_until(lambda: container.logs() == ["ready", "hup"], "the program to see the signal")
        assert container.call().ask("alive") == "alive"
        return
    assert podman("wait", container.name) == {"KILL": "137", "TERM": "7"}[name]
    assert container.logs() == (["ready"] if name == "KILL" else ["ready", "term"])
    if mode == "hibernated":
        assert len(container.events("ScaledUp")) == (name == "TERM")


def test_unknown_signal_does_nothing(get: Get) -> None:
    container = get("hibernated")
    assert run("podman", "kill", "-s", "NOSUCH", container.name).code != 0
    assert container.state() == "SCALED_DOWN"


@every_mode
def test_removed_by_force(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "rm")
    assert run("podman", "rm", container.name).code == 2
    assert container.call().ask("alive") == "alive"
    bring_to(mode, container)
    podman("rm", "-f", "-t", "2", container.name)
    assert run("podman", "container", "exists", container.name).code == 1
    assert not [one for one in lab.footprint.left() if one.startswith(f"{container.name}:")]


@managed_modes
def test_removes_itself(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "itself", "--rm")
    podman("stop", "-t", "5", container.name)
    wait_until(
        lambda: run("podman", "container", "exists", container.name).code == 1, "--rm to remove it"
    )
    assert container.state() == "UNMANAGED"


@managed_modes
def test_pause(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "pause")
    podman("pause", container.name)
    assert container.inspect("{{.State.Status}}") == "paused"
    refused = run("architect", "sleep", container.name)
    assert refused.code == 1
    assert "paused" in refused.err
    client = container.call()
    client.socket.settimeout(0.3)
    with pytest.raises(TimeoutError):
        client.ask("paused")
    podman("unpause", container.name)
    client.socket.settimeout(10)
    assert client.line() == "paused"
    container.sleep()
    assert client.ask("count") == "1"


def test_paused_container_can_be_removed(lab: Lab) -> None:
    container = start(lab, "hibernated", "paused-rm")
    podman("pause", container.name)
    podman("rm", "-f", "-t", "0", container.name)
    assert container.state() == "UNMANAGED"


# ---- the program's own end -----------------------------------------------------------------------


@every_mode
def test_exit_code_of_the_program(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "exit")
    container.call().socket.sendall(b"exit 41\n")
    assert podman("wait", container.name) == "41"


@every_mode
def test_death_by_a_signal_from_inside(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "inside", "--init")
    assert container.call().ask("alive") == "alive"
    done = container.exec("pkill", "-SEGV", "-f", "import os, select")
    # the pid namespace may end before pkill has: with its first process every other is killed
    assert done.code in (0, 128 + signal.SIGKILL), done.err
    assert podman("wait", container.name) == str(128 + signal.SIGSEGV)


@managed_modes
def test_restart_policy(lab: Lab, mode: str) -> None:
    container = start(lab, mode, "always", "--restart", "always")
    client = container.call()
    assert client.ask("count") == "1"
    bring_to(mode, container)
    client.socket.sendall(b"exit 5\n")
    wait_until(lambda: container.inspect("{{.RestartCount}}") == "1", "the restart")
    lab.footprint.add(container.name)
    client = Client.when_ready("127.0.0.1", container.host_port)
    assert client.ask("count") == "1"
    container.sleep()
    assert client.ask("count") == "2"


def test_restart_policy_counts_failures(lab: Lab) -> None:
    container = start(lab, "hibernated", "failures", "--restart", "on-failure:1")
    container.call().socket.sendall(b"exit 6\n")
    wait_until(lambda: container.inspect("{{.RestartCount}}") == "1", "the restart")
    lab.footprint.add(container.name)
    client = Client.when_ready("127.0.0.1", container.host_port)
    container.sleep()
    client.socket.sendall(b"exit 6\n")
    assert podman("wait", "--condition", "exited", container.name) == "6"
    assert container.inspect("{{.RestartCount}}") == "1"


# ---- ways to start --------------------------------------------------------------------------------


def test_init(lab: Lab) -> None:
    container = start(lab, "awake", "init", "--init")
    client = container.call()
    client.ask("count")
    container.sleep()
    assert client.ask("count") == "2"
    assert len(container.processes()) == 3
    podman("stop", "-t", "5", container.name)
    assert container.exit_code == 7


def test_terminal_is_not_managed(lab: Lab) -> None:
    container = lab.subject("terminal", options=["-t"])
    assert container.state() == "UNMANAGED"
    warnings = [event["message"] for event in container.events("Warning")]
    assert len(warnings) == 1
    assert container.name in warnings[0]
    assert "(-t)" in warnings[0]
    assert container.exec("true").code == 0
    podman("stop", "-t", "5", container.name)
    assert container.exit_code == 7


def test_failed_create_leaves_nothing(lab: Lab) -> None:
    name = unique("nothing")
    lab.closing.callback(run, "podman", "rm", "-f", "-i", name)
    words = annotation("managed-containers", [name])
    for mode, runtime in (("plain", "runc"), ("managed", "runc-architect")):
        command = ["podman", "--runtime", runtime, "run", "--rm", "--name", name, *words]
        done = run(*command, TEST_IMAGE, "no-such")
        assert done.code == 127, mode
        assert "no-such" in done.err, mode
    assert not [row for row in architect("ps") if row["pod"] == name]


def test_foreground_run_gives_output_and_code(lab: Lab) -> None:
    name = unique("foreground")
    words = ["podman", "--runtime", "runc-architect", "run", "--rm", "--name", name]
    words += annotation("managed-containers", [name])
    done = run(*words, "-i", TEST_IMAGE, "sh", "-c", "cat; echo err >&2; exit 9", stdin="in")
    assert (done.code, done.out, done.err) == (9, "in", "err\n")


def test_many_short_lives(lab: Lab) -> None:
    name = unique("short")
    words = ["podman", "--runtime", "runc-architect", "run", "--rm", "--name", name]
    words += annotation("managed-containers", [name])
    for number in range(5):
        done = run(*words, TEST_IMAGE, "sh", "-c", f"echo {number}; exit {number}")
        assert (done.code, done.out) == (number, f"{number}\n")
    assert not [row for row in architect("ps") if row["pod"] == name]


# ---- pods -------------------------------------------------------------------------------------------


class Pod:
    """A pod of ``kube play`` with two containers of SUBJECT, ``one`` and ``two``."""

    def __init__(self, lab: Lab, managed: list[str], program: str = SUBJECT) -> None:
        self.name = unique("pod")
        self.ports = {"one": free_port(), "two": free_port()}
        self.lab = lab
        manifest = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": self.name,
                "annotations": {
                    "architect.loopholelabs.io/managed-containers": json.dumps(managed),
                    "architect.loopholelabs.io/network-monitor": json.dumps(
                        dict.fromkeys(managed, "packets")
                    ),
                    "architect.loopholelabs.io/scaledown-durations": json.dumps(
                        dict.fromkeys(managed, "10m")
                    ),
                },
            },
            "spec": {
                "terminationGracePeriodSeconds": 2,
                "containers": [
                    {
                        "name": name,
                        "image": TEST_IMAGE,
                        "command": ["python3", "-c", program.strip()],
                        "env": [{"name": "SUBJECT_PORT", "value": str(7000 + number)}],
                        "ports": [{"containerPort": 7000 + number, "hostPort": self.ports[name]}],
                    }
                    for number, name in enumerate(self.ports)
                ],
            },
        }
        lab.closing.callback(run, "podman", "pod", "rm", "-f", "-i", "-t", "0", self.name)
        podman("--runtime", "runc-architect", "kube", "play", "-", stdin=json.dumps(manifest))
        self.containers = {}
        for name in self.ports:
            full = f"{self.name}-{name}"
            identity = podman("container", "inspect", "-f", "{{.Id}}", full)
            self.containers[name] = Container(full, identity, self.ports[name], pod=self.name)
        self.remember()

    def remember(self) -> None:
        for container in self.containers.values():
            self.lab.footprint.add(container.name)

    def ready(self, name: str) -> Client:
        return Client.when_ready("127.0.0.1", self.ports[name])


@pytest.fixture
def pod(lab: Lab) -> Callable[[list[str]], Pod]:
    """Return what makes a pod with these managed containers."""
    return lambda managed: Pod(lab, managed)


def test_pod_with_one_managed_container(pod: Callable[[list[str]], Pod]) -> None:
    made = pod(["one"])
    one, two = made.containers["one"], made.containers["two"]
    clients = {name: made.ready(name) for name in made.ports}
    assert two.state() == "UNMANAGED"
    one.sleep()
    for number in range(1, 4):
        assert clients["two"].ask("count") == str(number)
    assert one.state() == "SCALED_DOWN"
    assert clients["one"].ask("count") == "1"
    one.sleep()
    podman("pod", "stop", "-t", "5", made.name)
    assert [container.exit_code for container in (one, two)] == [7, 7]
    podman("pod", "start", made.name)
    made.remember()
    clients = {name: made.ready(name) for name in made.ports}
    one.sleep()
    assert [clients[name].ask("count") for name in made.ports] == ["1", "1"]
    one.sleep()
    podman("pod", "restart", made.name)
    assert one.events("RestoreFailed") == []
    made.remember()
    clients = {name: made.ready(name) for name in made.ports}
    one.sleep()
    assert [clients[name].ask("count") for name in made.ports] == ["1", "1"]
    one.sleep()
    podman("pod", "rm", "-f", "-t", "2", made.name)
    assert one.state() == "UNMANAGED"


def learned_ports(container: Container) -> Any:
    """What the daemon has noted; null until the engine has answered."""
    record = Path(f"/run/architect/containers/{container.id}/meta.json")
    return json.loads(record.read_text())["ports"]


LATE: Final = """
import os, time
while not os.path.exists("/listen"):
    time.sleep(0.02)
"""


def test_ports_of_containers_that_listen_late(lab: Lab) -> None:
    """Podman knows a pod's ports, not whose they are, and nobody listens yet when it is asked."""
    made = Pod(lab, ["one", "two"], LATE + SUBJECT)
    for container in made.containers.values():
        ports = wait_until(partial(learned_ports, container), "its ports to be known")
        assert {number for _, number in ports} == {7000, 7001}
    for name in made.containers:
        podman("exec", f"{made.name}-{name}", "touch", "/listen")
    clients = {name: made.ready(name) for name in made.ports}
    hibernate(made.name)
    assert int(clients["one"].ask("count"))
    assert made.containers["two"].state() == "SCALED_DOWN"
    assert int(clients["two"].ask("count"))


def test_pod_with_two_managed_containers(pod: Callable[[list[str]], Pod]) -> None:
    made = pod(["one", "two"])
    clients = {name: made.ready(name) for name in made.ports}
    for first, second in (("one", "two"), ("two", "one")):
        counts = {name: int(clients[name].ask("count")) for name in made.ports}
        hibernate(made.name)
        states = {name: made.containers[name].state() for name in made.ports}
        assert states == {"one": "SCALED_DOWN", "two": "SCALED_DOWN"}
        assert int(clients[first].ask("count")) == counts[first] + 1
        assert made.containers[first].state() == "RUNNING"
        assert made.containers[second].state() == "SCALED_DOWN"
        assert int(clients[second].ask("count")) == counts[second] + 1
        assert made.containers[second].state() == "RUNNING"
    hibernate(made.name, "-c", "one")
    assert made.containers["two"].state() == "RUNNING"
    hibernate(made.name)
    podman("pod", "rm", "-f", "-t", "2", made.name)
    assert not [row for row in architect("ps") if row["pod"] == made.name]
