"""A node of a cluster, on a user's machine: run in a guest by test_guest.py, from the payload's folder.

Debian's containerd with systemd's cgroups is driven through CRI, as a kubelet drives it: first the
pod of the chart's DaemonSet, which puts architect on the node, then a valkey, which vanishes and
comes back by all that wakes a container, and whose limits are changed around that; at the end
architectd takes architect off the node. There is no other node, and of an API server only that it
answers, and knows of nothing: without an answer architectd starts no container, whose state might
be on its way.

Ends with status 0 only if every step was seen to hold. Called as ``python3 -m
tests.guest.node_path`` with the payload on PYTHONPATH; it has the standard library only.
"""

from __future__ import annotations

import base64
import json
import os
import re
import ssl
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final

from bench import valkey
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

HERE: Final = Path.cwd()
SOCKET: Final = Path("/run/containerd/containerd.sock")
CONFIG: Final = Path("/etc/containerd/config.toml")
CONFLIST: Final = Path("/etc/cni/net.d/10-guest.conflist")
LOGS: Final = Path("/var/log/pods")
CGROUPS: Final = Path("/sys/fs/cgroup")

# Ours on a node: src/architect/contract/paths.py, which cannot be imported here.
PREFIX: Final = Path("/usr/local/lib/architect")
RUN: Final = Path("/run/architect")
STATE: Final = Path("/var/lib/architect")
HANDLER: Final = "runc-architect"

PAUSE: Final = "localhost/guest-pause:1"
VALKEY: Final = "localhost/valkey:8"
PORT: Final = 6379
MEGABYTES: Final = 10
MEMORY_LIMIT: Final = 256 << 20
TOO_LITTLE: Final = 8 << 20
"""A limit that the kubelet sets for a sleeper whose requests are given away, and that would kill it."""

PROFILE: Final = "cri-containerd.apparmor.d (enforce)"
"""containerd's own AppArmor profile, which is on where Debian's package apparmor is."""

CRI_PLUGIN: Final = 'plugins."io.containerd.grpc.v1.cri"'
SETTINGS: Final = f"""
    [{CRI_PLUGIN}.containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [{CRI_PLUGIN}.containerd.runtimes.runc.options]
        SystemdCgroup = true
"""
"""What kubernetes.io's page on container runtimes says to add for systemd's cgroups."""

POD_NETWORK: Final = {
    "cniVersion": "0.4.0",
    "name": "guest",
    "plugins": [
        {
            "type": "ptp",
            "ipam": {
                "type": "host-local",
                "ranges": [[{"subnet": "10.244.0.0/24"}]],
                "routes": [{"dst": "0.0.0.0/0"}],
            },
        }
    ],
}

POD_MODE, CONTAINER_MODE, NODE_MODE = range(3)
"""CRI's NamespaceMode."""


# ---- CRI -------------------------------------------------------------------------------------------


def cri(method: str, service: str = "RuntimeService", **request: Any) -> dict[str, Any]:
    """One call; its response. Raises Failed if it is refused, or if nobody answers."""
    said = run(HERE / "cri", SOCKET, service, method, json.dumps(request))
    found: dict[str, Any] = json.loads(said)
    return found


def patiently(method: str, **request: Any) -> None:
    """A call that is made again and again until it is taken, as a kubelet does."""

    def is_taken() -> bool:
        try:
            cri(method, **request)
        except Failed as failure:
            say(f"  {str(failure).rpartition('desc = ')[2]}")
            return False
        return True

    until(is_taken, f"{method} to be taken")


def containerd_pid() -> int:
    """The pid of containerd, as systemd knows it; 0 without one."""
    return int(run("systemctl", "show", "--property=MainPID", "--value", "containerd"))


@dataclass(frozen=True, slots=True)
class Sandbox:
    """A pod, without its containers."""

    id: str
    config: dict[str, Any]

    @classmethod
    def start(cls, config: dict[str, Any], handler: str = "") -> Sandbox:
        """RunPodSandbox."""
        Path(config["log_directory"]).mkdir(parents=True, exist_ok=True)
        found = cri("RunPodSandbox", config=config, runtime_handler=handler)
        return cls(found["pod_sandbox_id"], config)

    @property
    def address(self) -> str:
        """Its IP address."""
        status = cri("PodSandboxStatus", pod_sandbox_id=self.id)["status"]
        return str(status["network"]["ip"])

    def container(self, name: str, attempt: int = 0, **fields: Any) -> Container:
        """CreateContainer and StartContainer, with what the kubelet always gives."""
        labels = {**self.config["labels"], "io.kubernetes.container.name": name}
        config = {
            "metadata": {"name": name, "attempt": attempt},
            "labels": labels,
            "log_path": f"{name}/{attempt}.log",
            **fields,
        }
        config["annotations"] = {
            "io.kubernetes.container.hash": "8a2b6c1d",
            "io.kubernetes.container.restartCount": str(attempt),
            "io.kubernetes.container.terminationMessagePath": "/dev/termination-log",
            "io.kubernetes.container.terminationMessagePolicy": "File",
            "io.kubernetes.pod.terminationGracePeriod": "30",
            **fields.get("annotations", {}),
        }
        log = Path(self.config["log_directory"], config["log_path"])
        log.parent.mkdir(exist_ok=True)
        made = cri(
            "CreateContainer", pod_sandbox_id=self.id, config=config, sandbox_config=self.config
        )
        cri("StartContainer", container_id=made["container_id"])
        return Container(made["container_id"], log)

    def remove(self) -> None:
        """StopPodSandbox, which ends its containers, and RemovePodSandbox."""
        cri("StopPodSandbox", pod_sandbox_id=self.id)
        cri("RemovePodSandbox", pod_sandbox_id=self.id)


@dataclass(frozen=True, slots=True)
class Container:
    """A container of a pod."""

    id: str
    log: Path

    def status(self) -> dict[str, Any]:
        """ContainerStatus."""
        found: dict[str, Any] = cri("ContainerStatus", container_id=self.id)["status"]
        return found

    @property
    def pid(self) -> int:
        """What containerd takes for its first process."""
        info = cri("ContainerStatus", container_id=self.id, verbose=True)["info"]["info"]
        return int(json.loads(info)["pid"])

    def exited(self) -> dict[str, Any]:
        """Wait until it has, whatever happens to containerd meanwhile; its status."""

        def ended() -> dict[str, Any] | None:
            try:
                status = self.status()
            except Failed:
                return None
            return status if status["state"] == "CONTAINER_EXITED" else None

        return until(ended, "a container's end") or {}

    def execute(self, *words: str) -> str:
        """ExecSync of a command that has to succeed; what it printed."""
        found = cri("ExecSync", container_id=self.id, cmd=words, timeout=str(int(DEADLINE_S)))
        said = base64.b64decode(found["stdout"]).decode()
        wrong = base64.b64decode(found["stderr"]).decode()
        require(found["exit_code"] == 0, f"{words} ended with {found['exit_code']}: {said}{wrong}")
        return said

    def said(self, words: str) -> int:
        """In how many lines of its log it said so."""
        return self.log.read_text().count(words)


@dataclass(frozen=True, slots=True)
class Managed(Container, Kept):
    """One that hibernates."""

    keeper: int
    group: Path
    """Directory of its cgroup."""

    @classmethod
    def of(cls, container: Container, pod: str) -> Managed:
        """Look it up with containerd and in /proc."""
        keeper = container.pid
        place = Path(f"/proc/{keeper}/cgroup").read_text().strip().removeprefix("0::/")
        scope = f"{pod}/cri-containerd-{container.id}.scope"
        require(place.endswith(scope), f"the keeper is in {place}, not in {scope}")
        return cls(container.id, container.log, keeper, CGROUPS / place)

    def limit(self) -> str:
        """Its memory limit as the kernel has it."""
        return (self.group / "memory.max").read_text().strip()

    def row(self) -> dict[str, Any]:
        """Its line in `architect ps`."""
        rows = [row for row in architect("ps") if row["id"] == self.id]
        require(len(rows) == 1, f"`architect ps` lists it {len(rows)} times")
        return dict(rows[0])

    def sleep(self) -> None:
        """Hibernate it by command; again if a packet came meanwhile, as a late acknowledgement does."""
        for last in (False, False, True):
            try:
                architect("sleep", "valkey")
                break
            except Failed as failure:
                if last or "it was wanted: packet" not in str(failure):
                    raise
        require(self.vanished(), f"hibernated, it has processes {self.processes()}")

    def identity(self) -> dict[str, list[str]]:
        """What it sees of itself; wakes it."""
        seen = {name: self.execute("cat", f"/proc/1/{name}") for name in SEEN_INSIDE}
        return lasting(seen, self.group)

    def update(self, memory: int) -> None:
        """UpdateContainerResources. Raises Failed if it is refused."""
        linux = {"memory_limit_in_bytes": memory, "cpu_period": 100_000, "cpu_quota": 100_000}
        cri("UpdateContainerResources", container_id=self.id, linux=linux)


def architect(*words: str) -> Any:
    """Run an `architect` command on the node that has to succeed; return its JSON."""
    return json.loads(run(PREFIX / "venv/bin/architect", *words, "-o", "json"))


def slice_of(uid: str) -> str:
    """The cgroup of a Burstable pod as the kubelet names it for systemd."""
    return f"kubepods-burstable-pod{uid.replace('-', '_')}.slice"


def pod(
    name: str, uid: str, annotations: dict[str, str] | None = None, *, is_host: bool = False
) -> dict[str, Any]:
    """A PodSandboxConfig; `is_host` for a privileged pod in the host's network and pid namespace."""
    mode = NODE_MODE if is_host else POD_MODE
    spaces = {"network": mode, "pid": NODE_MODE if is_host else CONTAINER_MODE, "ipc": POD_MODE}
    # RuntimeDefault, the profile that a restored program must have again.
    security = {"namespace_options": spaces, "privileged": is_host, "seccomp": {}}
    return {
        "metadata": {"name": name, "uid": uid, "namespace": "default"},
        "hostname": "" if is_host else name,
        "log_directory": str(LOGS / f"default_{name}_{uid}"),
        "dns_config": {},
        "labels": {
            "io.kubernetes.pod.name": name,
            "io.kubernetes.pod.namespace": "default",
            "io.kubernetes.pod.uid": uid,
        },
        "annotations": {"kubernetes.io/config.source": "api", **(annotations or {})},
        "linux": {
            "cgroup_parent": f"/kubepods.slice/kubepods-burstable.slice/{slice_of(uid)}",
            "security_context": security,
        },
    }


# ---- the node --------------------------------------------------------------------------------------


def prepared() -> None:
    """containerd as the administrator of a Debian node sets it up, and images; without a registry."""
    text = CONFIG.read_text()
    table = f"[{CRI_PLUGIN}]\n"
    require(table in text, f"{CONFIG} is not Debian's: {text}")
    CONFIG.write_text(text.replace(table, f'{table}    sandbox_image = "{PAUSE}"\n') + SETTINGS)
    CONFLIST.write_text(json.dumps(POD_NETWORK))
    # Many Debian nodes forward; without it the kubelet would not start.
    Path("/proc/sys/net/ipv4/ip_forward").write_text("1")
    run("systemctl", "start", "containerd")
    version = cri("Version", version="v1")
    say(f"  {version['runtime_name']} {version['runtime_version']}")
    for name in ("pause", "valkey", "architect"):
        run("ctr", "--namespace=k8s.io", "images", "import", "--local", HERE / f"{name}.tar")


def components_image() -> str:
    """The name of the image of the components, as it came."""
    images = cri("ListImages", "ImageService")["images"]
    names: list[str] = [name for one in images for name in one["repo_tags"]]
    return next(name for name in names if name.startswith("localhost/architect:"))


def installed(sandbox: Sandbox, image: str, attempt: int) -> str:
    """The init container of the chart's DaemonSet; what it said."""
    container = sandbox.container(
        "install",
        attempt,
        image={"image": image},
        command=[str(PREFIX / "venv/bin/architect-node"), "install"],
        args=["--distro=auto"],
        linux=_privileged(),
    )
    status = container.exited()
    said: str = container.log.read_text()
    require(status["exit_code"] == 0, f"architect-node install: {status['exit_code']}: {said}")
    return said


def _privileged() -> dict[str, Any]:
    spaces = {"network": NODE_MODE, "pid": NODE_MODE, "ipc": POD_MODE}
    return {"security_context": {"privileged": True, "namespace_options": spaces}}


def takes_architect(sandbox: Sandbox, image: str) -> None:
    """The handler gets into containerd's configuration, and systemd restarts containerd once."""
    before = containerd_pid()
    said = installed(sandbox, image, 0)
    for words in (f"{PREFIX} was installed", f"{CONFIG} was edited", "containerd was restarted"):
        require(words in said, f"architect-node install did not say that {words}: {said}")
    after = containerd_pid()
    require(after not in (0, before), f"containerd has pid {after}, it had {before}")
    ours = CONFIG.read_text().partition("# BEGIN architect")[2]
    for words in (f"runtimes.{HANDLER}", f"{PREFIX}/libexec/{HANDLER}", "SystemdCgroup = true"):
        require(words in ours, f"{words} is not in what {CONFIG} got: {ours}")
    again = installed(sandbox, image, 1)
    require(" was " not in again, f"the second time there was something to do: {again}")
    require(containerd_pid() == after, "the second time containerd was restarted")


def runs_architectd(sandbox: Sandbox, image: str) -> Container:
    """The main container of the DaemonSet."""
    api = knows_nothing()
    account = Path("/root/serviceaccount")
    account.mkdir()
    for name, text in (("token", "nobody's"), ("namespace", "default")):
        (account / name).write_text(text)
    (account / "ca.crt").write_bytes((HERE / "ca.crt").read_bytes())
    place = "/var/run/secrets/kubernetes.io/serviceaccount"
    nobody = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(api)}
    container = sandbox.container(
        "architectd",
        image={"image": image},
        command=[str(PREFIX / "venv/bin/architect-node"), "run"],
        args=["--node=guest", "--distro=auto", "--address=127.0.0.1"],
        envs=[{"key": key, "value": value} for key, value in nobody.items()],
        mounts=[{"container_path": place, "host_path": str(account), "readonly": True}],
        linux=_privileged(),
    )
    socket = RUN / "architectd.sock"

    def answers() -> bool:
        state = container.status()["state"]
        require(state == "CONTAINER_RUNNING", f"{state}: {container.log.read_text()}")
        return socket.exists()

    until(answers, "architectd")
    require(architect("ps") == [], "architectd knows a container already")
    return container


class NothingThere(BaseHTTPRequestHandler):
    """What an API server says of an object that it does not have."""

    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """404, and why."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = {"kind": "Status", "status": "Failure", "reason": "NotFound", "code": 404}
        body = json.dumps({**status, "message": f"{self.path} not found"}).encode()
        self.send_response(404)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = answer  # noqa: N815

    def log_message(self, *_: object) -> None:
        """Nothing: architectd says what it was not given."""


def knows_nothing() -> int:
    """The port of a server that says so of everything, till this program ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), NothingThere)
    server.daemon_threads = True
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(HERE / "ca.crt", HERE / "ca.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server.server_port


def fit() -> None:
    """`architect check` finds nothing missing that is needed."""
    findings = architect("check")
    for finding in findings:
        say("  " + "  ".join(str(finding[key]) for key in ("verdict", "name", "found")))
    bad = [finding for finding in findings if finding["verdict"] == "fail"]
    require(not bad, f"`architect check` found {bad}")


# ---- a container -----------------------------------------------------------------------------------

UID: Final = "6f3e2c1a-5d84-4b0e-9c57-2a1b3c4d5e6f"


def valkey_pod() -> Sandbox:
    """The demo's pod, as the kubelet hands it on."""
    ours = {
        "managed-containers": ["valkey"],
        "scaledown-durations": {"valkey": "10s"},
        "network-monitor": {"valkey": "packets"},
    }
    annotations = {f"architect.loopholelabs.io/{k}": json.dumps(v) for k, v in ours.items()}
    return Sandbox.start(pod("valkey", UID, annotations), HANDLER)


def valkey_in(sandbox: Sandbox, attempt: int = 0) -> Managed:
    """Its container: CreateContainer as the kubelet makes it of the pod's specification."""
    ports = [{"name": "valkey", "containerPort": PORT, "protocol": "TCP"}]
    resources = {
        "memory_limit_in_bytes": MEMORY_LIMIT,
        "cpu_period": 100_000,
        "cpu_quota": 100_000,
        "cpu_shares": 102,
        "oom_score_adj": 996,
    }
    spaces = sandbox.config["linux"]["security_context"]["namespace_options"]
    container = sandbox.container(
        "valkey",
        attempt,
        image={"image": VALKEY},
        command=["valkey-server", "--save", "", "--bind", "0.0.0.0", "--protected-mode", "no"],
        annotations={"io.kubernetes.container.ports": json.dumps(ports)},
        linux={
            "resources": resources,
            "security_context": {"namespace_options": spaces, "seccomp": {}},
        },
    )
    return Managed.of(container, slice_of(UID))


def right(client: valkey.Valkey, keys: int) -> None:
    """Every value is as it was written, on the connection that is open."""
    require(valkey.wrong(client, keys) == 0, "values differ from what was written")


# ---- what happens to it ----------------------------------------------------------------------------


def vanishes_by_itself(pod: Managed) -> None:
    """Idle, it ends; its memory comes back, and for CRI it runs, with some memory in use."""
    before = pod.memory()
    require(before > MEGABYTES << 20, f"awake, it has {before} bytes")
    until(pod.vanished, "it to vanish")
    until(lambda: pod.memory() < HIBERNATED_BYTES, "its memory to come back")
    row = until(lambda: (row := pod.row())["state"] == "SCALED_DOWN" and row, "SCALED_DOWN")
    require(row and row["checkpoint_bytes"] > MEGABYTES << 20, f"its row is {row}")
    state = pod.status()["state"]
    require(state == "CONTAINER_RUNNING", f"hibernated, it is {state} for CRI")
    stats = cri("ContainerStats", container_id=pod.id)["stats"]
    used = int(stats["memory"]["working_set_bytes"]["value"])
    cpu = int(stats["cpu"]["usage_core_nano_seconds"]["value"])
    # A metrics-server leaves out a pod where one of them is zero.
    require(used > 0 and cpu > 0, f"hibernated, its statistics are {stats}")
    require(pod.vanished(), "being asked for its state woke it")
    say(f"  {before} bytes in its cgroup before, {pod.memory()} now; CRI's working set: {used}")


def wakes_by_packets(pod: Managed, address: str, client: valkey.Valkey, keys: int) -> None:
    """On the open connection, then, asleep once more, by a stranger's."""
    require(client("GET", "key:7") == valkey.value(7), "the first answer is wrong")
    require(not pod.vanished(), "it answers, but no program is there")
    right(client, keys)
    until(lambda: pod.row()["state"] == "RUNNING", "RUNNING")
    pod.sleep()
    stranger = valkey.Valkey(address, PORT, DEADLINE_S)
    right(stranger, keys)
    stranger.close()


def wakes_by_exec(pod: Managed, client: valkey.Valkey, before: dict[str, list[str]]) -> None:
    """ExecSync wakes it, in the namespaces and the cgroup it had."""
    pod.sleep()
    require(pod.execute("valkey-cli", "PING") == "PONG\n", "exec went wrong")
    after = pod.identity()
    changed = {name: sorted(set(before[name]) ^ set(after[name])) for name in before}
    require(after == before, f"what it sees of itself has changed: {changed}")
    require(client("PING") == b"PONG", "the open connection is lost")


def goes_on_logging(pod: Managed, client: valkey.Valkey) -> None:
    """What a woken program prints gets into the same log."""
    words = "DB saved on disk"
    before = pod.said(words)
    require(pod.said("Ready to accept connections") == 1, "its first words are not in its log")
    require(client("SAVE") == b"OK", "SAVE failed")
    until(lambda: pod.said(words) == before + 1, "its words in its log")


def outlives_lower_limits(pod: Managed, client: valkey.Valkey, keys: int) -> None:
    """Of limits that are lowered while it sleeps, its own and its pod's, a wake frees it."""
    outer = pod.group.parent
    roomy = str(2 * MEMORY_LIMIT)
    run("systemctl", "set-property", "--runtime", outer.name, f"MemoryMax={roomy}")
    pod.sleep()
    pod.update(TOO_LITTLE)
    require(pod.vanished(), "the update woke it")
    require(pod.limit() == str(MEMORY_LIMIT), f"asleep, its limit became {pod.limit()}")
    # The kubelet changes the pod's own cgroup as well, through systemd.
    run("systemctl", "set-property", "--runtime", outer.name, f"MemoryMax={TOO_LITTLE}")
    limit = (outer / "memory.max").read_text().strip()
    require(limit == str(TOO_LITTLE), f"the pod's limit is {limit}")
    right(client, keys)
    until(lambda: pod.limit() == str(MEMORY_LIMIT), "its limit to be put back")
    limit = (outer / "memory.max").read_text().strip()
    require(limit == roomy, f"the pod's limit is {limit}, and it was {roomy} before it slept")
    # As the kubelet does when the API has the old limits again.
    run("systemctl", "set-property", "--runtime", outer.name, f"MemoryMax={roomy}")
    right(client, keys)


def takes_new_limits_awake(pod: Managed, client: valkey.Valkey) -> None:
    """Higher ones at once; lower ones once it has been awake for a while, so the kubelet tries on."""
    require(client("PING") == b"PONG", "it does not answer")
    higher, lower = 2 * MEMORY_LIMIT, MEMORY_LIMIT // 2
    pod.update(higher)
    require(pod.limit() == str(higher), f"its limit is {pod.limit()}")

    def lowered() -> bool:
        require(client("PING") == b"PONG", "it does not answer")
        try:
            pod.update(lower)
        except Failed as failure:
            require("has just woken" in str(failure), str(failure))
            return False
        return pod.limit() == str(lower)

    until(lowered, "a lower limit")
    pod.update(MEMORY_LIMIT)
    shown = pod.status()["resources"]["linux"]["memory_limit_in_bytes"]
    require(int(shown) == MEMORY_LIMIT, f"CRI shows a limit of {shown}")


def outlives(what: Callable[[], object], pod: Managed, client: valkey.Valkey, keys: int) -> None:
    """Something happens to the machine while it sleeps; then it wakes by a packet and by exec."""
    pod.sleep()
    what()
    require(pod.vanished(), "it woke")
    status = cri("ContainerStatus", container_id=pod.id)["status"]
    require(status["state"] == "CONTAINER_RUNNING", f"for CRI it is {status['state']}")
    right(client, keys)
    require(pod.execute("valkey-cli", "PING") == "PONG\n", "exec went wrong")
    require(pod.pid == pod.keeper, f"containerd takes {pod.pid} for it, the keeper is {pod.keeper}")
    require(pod.limit() == str(MEMORY_LIMIT), f"its limit is {pod.limit()}")


def restart_containerd() -> None:
    """By the administrator."""
    before = containerd_pid()
    run("systemctl", "restart", "containerd")
    require(containerd_pid() not in (0, before), "containerd was not restarted")
    patiently("Version", version="v1")


def stops_asleep(pod: Managed) -> None:
    """StopContainer of a sleeper reaches the program: it ends by itself, with its own status."""
    pod.sleep()
    cri("StopContainer", container_id=pod.id, timeout=str(int(DEADLINE_S)))
    status = pod.exited()
    found = (status["exit_code"], status["reason"])
    require(found == (0, "Completed"), f"stopped, it is {status}")
    until(lambda: pod.said("User requested shutdown") == 1, "its last words in its log")
    cri("RemoveContainer", container_id=pod.id)
    require(not pod.group.exists(), f"{pod.group} is still there")


def removed_asleep(sandbox: Sandbox, address: str) -> Managed:
    """The next attempt in the same pod, which then is removed while it sleeps."""
    again = valkey_in(sandbox, attempt=1)
    connect(PORT, address).close()
    again.sleep()
    sandbox.remove()
    return again


def nothing_left(container: Managed) -> None:
    """Neither processes, cgroups, checkpoints nor run directories."""
    folders = (RUN / "containers", STATE / "checkpoints")

    # The pod's own cgroup is the kubelet's.
    run("systemctl", "stop", container.group.parent.name)

    def left() -> list[Path]:
        groups = [container.group.parent] if container.group.parent.exists() else []
        return groups + [path for folder in folders for path in folder.glob("*")]

    until(lambda: not left(), f"{left()} to go")
    require(architect("ps") == [], "`architect ps` lists something")
    units = run("systemctl", "list-units", "--all", "--plain", "--no-legend", "cri-containerd-*")
    require(container.id not in units, f"systemd still has {units}")


def gives_the_node_back(sandbox: Sandbox, daemon: Container, before: str) -> None:
    """The pre-delete hook has been heard, and the DaemonSet goes: its pod's end undoes everything."""
    old = containerd_pid()
    (RUN / "removed").touch()  # architectd's own mark, once it has woken everything
    patiently("StopContainer", container_id=daemon.id, timeout="90")
    status = daemon.exited()
    said = daemon.log.read_text()
    require(status["exit_code"] == 0, f"architectd ended with {status['exit_code']}: {said}")
    require(f"{PREFIX} was removed" in said, f"it did not say that it was removed: {said}")
    require(CONFIG.read_text() == before, f"{CONFIG} is not as it was before")
    require(containerd_pid() not in (0, old), "containerd was not restarted")
    left = [place for place in (PREFIX, RUN, STATE) if place.exists()]
    left += [*CONFIG.parent.glob(f"{CONFIG.name}?*"), *PREFIX.parent.glob(".architect*")]
    require(not left, f"after uninstalling there still is {left}")
    patiently("StopPodSandbox", pod_sandbox_id=sandbox.id)
    cri("RemovePodSandbox", pod_sandbox_id=sandbox.id)
    try:
        valkey_pod()
    except Failed as failure:
        require(re.search(rf'no runtime for "{HANDLER}"', str(failure)), str(failure))
    else:
        raise Failed(f"containerd still knows {HANDLER}")


# ---- all of it -------------------------------------------------------------------------------------


def node_path() -> None:
    """Every step in its order."""
    with step("containerd, images"):
        prepared()
        image = components_image()
        before = CONFIG.read_text()
    with step("architect-node install, in a container"):
        own = Sandbox.start(pod("architectd", "0d1e2f3a-1111-2222-3333-445566778899", is_host=True))
        takes_architect(own, image)
    with step("architect-node run, in a container"):
        daemon = runs_architectd(own, image)
    with step("architect check"):
        fit()
    with step("RunPodSandbox, CreateContainer, StartContainer, fill"):
        sandbox = valkey_pod()
        subject = valkey_in(sandbox)
        address = sandbox.address
        client = connect(PORT, address)
        keys = valkey.fill(client, MEGABYTES)
        seen = subject.identity()
        profile = seen["attr/current"]
        require(profile == [PROFILE], f"its AppArmor profile is {profile}")
    with step("idle, it vanishes"):
        vanishes_by_itself(subject)
    with step("wakes by packets"):
        wakes_by_packets(subject, address, client, keys)
    with step("wakes by ExecSync"):
        wakes_by_exec(subject, client, seen)
        goes_on_logging(subject, client)
    with step("UpdateContainerResources while it sleeps"):
        outlives_lower_limits(subject, client, keys)
    with step("UpdateContainerResources while it runs"):
        takes_new_limits_awake(subject, client)
    with step("containerd is restarted while it sleeps"):
        outlives(restart_containerd, subject, client, keys)
        goes_on_logging(subject, client)
    with step("systemd is reloaded while it sleeps"):
        outlives(lambda: run("systemctl", "daemon-reload"), subject, client, keys)
    with step("StopContainer, RemoveContainer asleep"):
        stops_asleep(subject)
    with step("StopPodSandbox asleep"):
        nothing_left(removed_asleep(sandbox, address))
    with step("architectd takes architect off the node"):
        gives_the_node_back(own, daemon, before)


def main() -> int:
    """Program."""
    say(" ".join((os.uname().release, run("containerd", "--version"), sys.version.split()[0])))
    commands = {
        "containerd.log": ["journalctl", "-b", "-u", "containerd", "-o", "cat", "--no-pager"],
        "journal": ["journalctl", "-b", "-o", "short-monotonic", "--no-pager"],
        "config.toml": ["cat", str(CONFIG)],
    }
    return judged(node_path, commands, (LOGS, RUN / "containers", STATE))


if __name__ == "__main__":
    sys.exit(main())
