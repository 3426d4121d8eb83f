"""The core path on a user's machine: run in a guest by test_guest.py, from the payload's folder.

Installs architect as `make install` does, has systemd start it, and sees a valkey vanish and come
back by everything that wakes one, the daemon killed meanwhile included. Ends with status 0 only if
every step was seen to hold; then nothing of it is left on the machine.

Emulated code is some ten times slower: deadlines are for a hung machine, and no time is judged.
Called as ``python3 -m tests.guest.core_path`` with the payload and its scripts on PYTHONPATH; it
has the standard library only.
"""

from __future__ import annotations

import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from unittest import mock

import engines
import install
from bench import valkey
from common import REPOSITORY
from record import Record
from tests.guest.steps import (
    DEADLINE_S,
    HIBERNATED_BYTES,
    SEEN_INSIDE,
    Failed,
    Kept,
    connect,
    judged,
    lasting,
    require,
    run,
    say,
    step,
    until,
)

MEGABYTES: Final = 10

POD: Final = REPOSITORY / "examples/valkey/pod.yaml"
POD_PORT: Final = 6379
POD_CONTAINER: Final = "valkey-valkey"
LONE: Final = "solo"
LONE_PORT: Final = 6380


def architect(*words: str) -> Any:
    """Run an `architect` command that has to succeed; return its JSON."""
    return json.loads(run("architect", *words, "-o", "json"))


# ---- the machine -----------------------------------------------------------------------------------


def install_environment(_record: Record) -> bool:
    """In place of install.py's own, which takes pip: the same folder from the payload's packages."""
    venv = install.PREFIX / "venv"
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    run("/usr/bin/python3", "-m", "venv", "--without-pip", venv)
    packages = venv / "lib" / f"python{version}" / "site-packages"
    shutil.copytree(REPOSITORY / "packages" / version, packages, dirs_exist_ok=True)
    shutil.copytree(REPOSITORY / "src/architect", packages / "architect")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name, target in project["scripts"].items():
        module, _, function = target.partition(":")
        script = venv / "bin" / name
        script.write_text(
            f"#!{venv}/bin/python\nimport sys\nfrom {module} import {function}\n"
            f"sys.exit({function}())\n"
        )
        script.chmod(0o755)
    imports = "; ".join(f"import {module}" for module in install.MODULES)
    run(venv / "bin/python", "-I", "-c", imports)
    return True


def installed() -> None:
    """`make install`, on a machine without pip."""
    with mock.patch.object(install, "_install_venv", install_environment):
        install.install()
    require(install.UNIT.exists(), "systemd has no unit")
    run("podman", "load", "--quiet", "--input", REPOSITORY / "valkey.tar")


def main_pid() -> int:
    """The daemon's pid, as systemd knows it; 0 without one."""
    return int(run("systemctl", "show", "--property=MainPID", "--value", install.UNIT.name))


def started_by_systemd() -> None:
    """`architect up` and `down` are the unit's."""
    for _ in range(2):  # the second time it is there already
        words = run("architect", "up").split()
        require(words[-1] == str(main_pid()), f"`architect up` said {words}, not systemd's pid")
    require(run("systemctl", "is-enabled", install.UNIT.name) == "enabled", "not enabled")
    run("architect", "down")
    require(main_pid() == 0, "`architect down` left the daemon running")
    run("architect", "up")
    require(main_pid(), "`architect up` after a `down` started nothing")


def fit() -> None:
    """`architect check` finds nothing missing that is needed."""
    findings = architect("check")
    for finding in findings:
        say("  " + "  ".join(str(finding[key]) for key in ("verdict", "name", "found")))
    bad = [finding for finding in findings if finding["verdict"] != "ok"]
    require(not bad, f"`architect check` found {bad}")


# ---- a container -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Container(Kept):
    """A managed container."""

    name: str
    pod: str
    id: str
    keeper: int
    group: Path
    """Directory of its cgroup."""

    @classmethod
    def of(cls, name: str, pod: str) -> Container:
        """Look it up with Podman and in /proc."""
        found = json.loads(run("podman", "container", "inspect", name))[0]
        keeper = found["State"]["Pid"]
        place = Path(f"/proc/{keeper}/cgroup").read_text().strip().removeprefix("0::/")
        require(place.endswith(f"libpod-{found['Id']}.scope"), f"the keeper is in {place}")
        return cls(name, pod, found["Id"], keeper, Path("/sys/fs/cgroup") / place)

    def row(self) -> dict[str, Any]:
        """Its line in `architect ps`."""
        rows = [row for row in architect("ps") if row["id"] == self.id]
        require(len(rows) == 1, f"`architect ps` lists {self.name} {len(rows)} times")
        return dict(rows[0])

    def sleep(self) -> None:
        """Hibernate it by command; again if a packet came meanwhile, as a late acknowledgement does."""
        for last in (False, False, True):
            try:
                run("architect", "sleep", self.pod)
                break
            except Failed as failure:
                if last or "it was wanted: packet" not in str(failure):
                    raise
        require(self.vanished(), f"hibernated, {self.name} has processes {self.processes()}")

    def identity(self) -> dict[str, list[str]]:
        """What it sees of itself; wakes it."""
        seen = {
            name: run("podman", "exec", self.name, "cat", f"/proc/1/{name}") for name in SEEN_INSIDE
        }
        return lasting(seen, self.group)

    def status(self) -> str:
        """What `podman ps` says of it."""
        return run("podman", "ps", "--filter", f"name={self.name}", "--format", "{{.Status}}")


def play_pod() -> Container:
    """The demo's pod."""
    run("podman", "--runtime", "runc-architect", "kube", "play", POD)
    return Container.of(POD_CONTAINER, "valkey")


def run_alone() -> Container:
    """The same image by `podman run`, which hibernates by command only."""
    settings = {"managed-containers": [LONE], "disable-autoscaledown-containers": [LONE]}
    plain = [
        f"architect.loopholelabs.io/{key}={json.dumps(value, separators=(',', ':'))}"
        for key, value in settings.items()
    ]
    # Podman 4 reads each as a line of CSV, Podman 5 as it is (docs/guide.md).
    if run("podman", "version", "--format", "{{.Client.Version}}").startswith("4."):
        plain = ['"' + text.replace('"', '""') + '"' for text in plain]
    annotations = [word for text in plain for word in ("--annotation", text)]
    publish = ["--publish", f"127.0.0.1:{LONE_PORT}:{POD_PORT}"]
    words = ["--runtime", "runc-architect", "run", "--detach", "--name", LONE, *publish]
    run("podman", *words, *annotations, "localhost/valkey:8")
    return Container.of(LONE, LONE)


# ---- what happens to it ----------------------------------------------------------------------------


def vanishes_by_itself(pod: Container) -> None:
    """Idle, it ends; its memory comes back, and Podman has not noticed."""
    before = pod.memory()
    require(before > MEGABYTES << 20, f"awake, it has {before} bytes")
    until(pod.vanished, f"{pod.name} to vanish")
    until(lambda: pod.memory() < HIBERNATED_BYTES, "its memory to come back")
    row = until(lambda: (row := pod.row())["state"] == "SCALED_DOWN" and row, "SCALED_DOWN")
    require(row and row["checkpoint_bytes"] > MEGABYTES << 20, f"its row is {row}")
    status = pod.status()
    require(status.startswith("Up"), f"podman says {status!r} of a hibernated container")
    say(f"  {before} bytes in its cgroup before, {pod.memory()} now; podman: {status}")


def wakes_on_open_connection(pod: Container, client: valkey.Valkey, keys: int) -> None:
    """The client's next request is answered, with every value as it was written."""
    require(client("GET", "key:7") == valkey.value(7), "the first answer is wrong")
    require(not pod.vanished(), "it answers, but no program is there")
    require(valkey.wrong(client, keys) == 0, "values differ from what was written")
    until(lambda: pod.row()["state"] == "RUNNING", "RUNNING")


def wakes_on_new_connection(pod: Container, keys: int) -> None:
    """A stranger's SYN is answered: through the published port, and at the pod's own address."""
    infra = run("podman", "pod", "inspect", "--format", "{{.InfraContainerID}}", pod.pod)
    networks = json.loads(run("podman", "inspect", infra))[0]["NetworkSettings"]["Networks"]
    address = next(iter(networks.values()))["IPAddress"]
    for host in ("127.0.0.1", address):
        pod.sleep()
        client = valkey.Valkey(host, POD_PORT, DEADLINE_S)
        require(valkey.wrong(client, keys) == 0, f"through {host}: values differ")
        client.close()


def wakes_by_exec(pod: Container, client: valkey.Valkey, before: dict[str, list[str]]) -> None:
    """`podman exec` wakes it, in the namespaces and the cgroup it had."""
    pod.sleep()
    require(run("podman", "exec", pod.name, "valkey-cli", "PING") == "PONG", "exec went wrong")
    after = pod.identity()
    changed = {name: sorted(set(before[name]) ^ set(after[name])) for name in before}
    require(after == before, f"what it sees of itself has changed: {changed}")
    require(client("PING") == b"PONG", "the open connection is lost")


def kill_daemon() -> int:
    """End the daemon without warning; return the pid that it had."""
    killed = main_pid()
    process = os.pidfd_open(killed)
    os.kill(killed, signal.SIGKILL)
    select.select([process], [], [], DEADLINE_S)
    os.close(process)
    return killed


def comes_back_after(killed: int, pod: Container, client: valkey.Valkey, keys: int) -> None:
    """systemd brings the killed daemon back, and it answers what was sent meanwhile."""
    require(client("GET", "key:9") == valkey.value(9), "the first answer is wrong")
    again = until(main_pid, "systemd to start the daemon again")
    require(again != killed, f"the daemon is still {killed}")
    require(valkey.wrong(client, keys) == 0, "values differ from what was written")
    until(lambda: pod.row()["state"] == "RUNNING", "RUNNING")


def survives_a_death_in_mid_dump(pod: Container, client: valkey.Valkey, keys: int) -> None:
    """CRIU goes on without the daemon; the next one finds out which way it ended."""
    dump = install.RUN / "containers" / pod.id / "dump.pid"
    with subprocess.Popen(["architect", "sleep", pod.pod], stderr=subprocess.DEVNULL) as command:
        until(dump.exists, "CRIU to start")
        killed = kill_daemon()
        require(command.wait(DEADLINE_S) != 0, "`architect sleep` saw no daemon die")
    comes_back_after(killed, pod, client, keys)


def pauses(pod: Container, client: valkey.Valkey) -> None:
    """`podman pause` freezes it, keeper and all, and it does not hibernate meanwhile."""
    run("podman", "pause", pod.name)
    refused = subprocess.run(
        ["architect", "sleep", pod.pod], capture_output=True, text=True, check=False
    )
    require(refused.returncode == 1 and "paused" in refused.stderr, f"paused: {refused}")
    run("podman", "unpause", pod.name)
    require(client("PING") == b"PONG", "unpaused, the open connection is lost")


def waits_for_a_stopped_daemon(pod: Container, client: valkey.Valkey, keys: int) -> None:
    """`architect down` wakes nothing; what is sent then is answered after `architect up`."""
    pod.sleep()
    run("architect", "down")
    require(pod.vanished(), "`architect down` woke it")
    client.socket.sendall(valkey.encode(["INCR", "count"]))
    status = pod.status()
    require(status.startswith("Up"), f"without a daemon podman says {status!r}")
    require(pod.vanished(), "it woke without a daemon")
    run("architect", "up")
    answer = client.socket.recv(64)
    require(answer == b":1\r\n", f"what was sent without a daemon got the answer {answer!r}")
    require(valkey.wrong(client, keys) == 0, "values differ from what was written")


def stops_asleep(lone: Container) -> None:
    """`podman stop` of a sleeper reaches the program: it ends by itself, with its own status."""
    connect(LONE_PORT).close()
    lone.sleep()
    run("podman", "stop", "--time", str(int(DEADLINE_S)), lone.name)
    found = json.loads(run("podman", "container", "inspect", lone.name))[0]["State"]
    require((found["Status"], found["ExitCode"]) == ("exited", 0), f"stopped, it is {found}")
    words = run("podman", "logs", lone.name)
    require("Received SIGTERM" in words or "User requested shutdown" in words, words)


def starts_again_and_is_removed(name: str) -> Container:
    """The stopped container starts anew, hibernates, and `podman rm -f` of a sleeper leaves nothing."""
    run("podman", "start", name)
    lone = Container.of(name, name)
    connect(LONE_PORT).close()
    lone.sleep()
    run("podman", "rm", "--force", "--time", "0", name)
    return lone


def nothing_left(*containers: Container) -> None:
    """Neither processes, cgroups, checkpoints nor run directories."""
    folders = (install.RUN / "containers", install.STATE / "checkpoints")

    def left() -> list[Path]:
        groups = [container.group for container in containers if container.group.exists()]
        return groups + [path for folder in folders for path in folder.glob("*")]

    until(lambda: not left(), f"{left()} to go")
    require(architect("ps") == [], "`architect ps` lists something")


def uninstalled() -> None:
    """`make uninstall`."""
    install.uninstall()
    places = (install.PREFIX, install.UNIT, install.RUN, engines.PODMAN_RUNTIME)
    left = [place for place in places if place.exists()]
    require(not left, f"after uninstall there still is {left}")


# ---- all of it -------------------------------------------------------------------------------------


def core_path() -> None:
    """Every step in its order."""
    with step("install"):
        installed()
    with step("architect up, down"):
        started_by_systemd()
    with step("architect check"):
        fit()
    with step("podman kube play, fill"):
        pod = play_pod()
        client = connect(POD_PORT)
        keys = valkey.fill(client, MEGABYTES)
        before = pod.identity()
        require(before["cgroup"] == ["0::/"], f"its cgroup namespace is not its own: {before}")
    with step("idle, it vanishes"):
        vanishes_by_itself(pod)
    with step("wakes by a packet on an open connection"):
        wakes_on_open_connection(pod, client, keys)
    with step("wakes by a new connection"):
        wakes_on_new_connection(pod, keys)
    with step("wakes by podman exec"):
        wakes_by_exec(pod, client, before)
    with step("the daemon is killed while it sleeps"):
        pod.sleep()
        comes_back_after(kill_daemon(), pod, client, keys)
    with step("the daemon is killed in mid-dump"):
        survives_a_death_in_mid_dump(pod, client, keys)
    with step("the daemon is stopped and started while it sleeps"):
        waits_for_a_stopped_daemon(pod, client, keys)
    with step("podman pause"):
        pauses(pod, client)
    with step("podman run, stop asleep, start, rm -f asleep"):
        stops_asleep(run_alone())
        lone = starts_again_and_is_removed(LONE)
    with step("podman kube down"):
        pod.sleep()
        run("podman", "kube", "down", POD)
        nothing_left(pod, lone)
    with step("uninstall"):
        uninstalled()


def main() -> int:
    """Program."""
    say(" ".join((os.uname().release, run("podman", "--version"), sys.version.split()[0])))
    commands = {
        "architectd.log": ["journalctl", "-b", "-u", install.UNIT.name, "-o", "cat", "--no-pager"],
        "podman": ["podman", "ps", "--all"],
    }
    return judged(core_path, commands, (install.RUN / "containers", install.STATE))


if __name__ == "__main__":
    sys.exit(main())
