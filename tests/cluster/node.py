"""One node: a small machine of namespaces with a root directory and a disk of its own.

It has network, mount, PID, IPC, UTS and cgroup namespaces, and every program at its usual path, so
that hostPath, hostPID, hostNetwork and Bidirectional mounts behave as on a machine. Its process 1
is catatonit: ending it is a power failure, which ends all processes and mounts of the node at
once. No file says which process that is; it is found by the node's cgroup. Called by cluster.py.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster import cgroups, machine, network, nodefiles
from tests.cluster.base import COMMAND_S, ClusterError, put, run, succeeds, tail, until
from tests.cluster.pki import Pki
from tests.cluster.settings import Options, Programs, node_address, node_name

_BOOT_S: Final = 20.0
_HEALTHY_S: Final = 60.0
_STARTED_S: Final = 10.0
_STOPPED_S: Final = 30.0
_IMPORT_S: Final = 120.0
_COPY_S: Final = 60.0
_FOLDERS: Final = (
    *("usr", "proc", "sys", "dev", "run", "mnt", "srv", "root", "home", "opt"),
    *("usr-local/bin", "usr-local/lib", "usr-local/sbin", "usr-local/share"),
    *("etc/cni/net.d", "etc/containerd", "etc/kubernetes"),
    *("var/lib/kubelet", "var/lib/containerd", "var/log/pods", "var/log/containers", "var/cache"),
)
_STICKY: Final = ("tmp", "var/tmp")
_USR_LINKS: Final = ("bin", "sbin", "lib", "lib32", "lib64", "libx32")


def switch_off(number: int) -> None:
    """End all of a node but its disk, whatever of it there is."""
    name = node_name(number)
    cgroups.end_all(name)
    network.remove_node(number)
    cgroups.remove(name)


@dataclass(frozen=True, slots=True)
class Node:
    """A node of the cluster at `home`; it may be up, down, or not made yet."""

    home: Path
    number: int
    options: Options
    programs: Programs

    @property
    def name(self) -> str:
        """Its name, for everyone."""
        return node_name(self.number)

    @property
    def has_old_containerd(self) -> bool:
        """Whether it runs containerd 1.7."""
        return self.number in self.options.old_containerd

    @property
    def containerd(self) -> Path:
        """The folder that is its /opt/containerd. Raises ClusterError if it was not built."""
        if not self.has_old_containerd:
            return self.programs.containerd
        if self.programs.old_containerd is None:
            raise ClusterError(
                f"{self.name}'s containerd 1.7", "was not built", "`down`, then `up`"
            )
        return self.programs.old_containerd

    @property
    def folder(self) -> Path:
        """What it has on the host: its root, its boot script and log."""
        return self.home / "nodes" / self.name

    @property
    def root(self) -> Path:
        """Its disk, also while it is down."""
        return self.folder / "root"

    def pid(self) -> int | None:
        """The host's number of its process 1; None while it is down."""
        return cgroups.first_process(self.name)

    def make(self) -> None:
        """Lay out its disk, with files and certificates of its own."""
        self._lay_out()
        pki = Pki(self.home / "pki")
        names = (f"IP:{node_address(self.number)}", f"DNS:{self.name}")
        pki.issue(self.name, f"system:node:{self.name}", "system:nodes", names)
        etc = self.root / "etc"
        kubernetes = self.root / nodefiles.KUBERNETES.lstrip("/")
        for name, text in nodefiles.etc(self.number).items():
            put(etc / name, text)
        put(etc / "machine-id", os.urandom(16).hex() + "\n")
        pki.kubeconfig(self.name, kubernetes / "kubelet.kubeconfig")
        pki.kubeconfig("proxy", kubernetes / "proxy.kubeconfig")
        shutil.copy(pki.crt("ca"), kubernetes / "ca.crt")
        shutil.copy(pki.crt(self.name), kubernetes / "kubelet.crt")
        shutil.copy(pki.key(self.name), kubernetes / "kubelet.key")
        configuration = nodefiles.kubelet(self.options.reserved, self.options.kubelet)
        put(kubernetes / "kubelet.json", configuration)
        put(kubernetes / "proxy.json", nodefiles.proxy(self.number))
        put(kubernetes / "supervise", nodefiles.SUPERVISOR, 0o755)
        configuration_of = (
            nodefiles.old_containerd if self.has_old_containerd else nodefiles.containerd
        )
        put(etc / "containerd/config.toml", configuration_of(self.options.handlers))
        put(etc / "cni/net.d/10-pods.conflist", nodefiles.cni(self.number))

    def _lay_out(self) -> None:
        self.root.mkdir(parents=True)
        run("cp", "--archive", "/etc", self.root / "etc", timeout_s=_COPY_S)
        # The machine's own settings for the pods' network are none of the node's.
        shutil.rmtree(self.root / "etc/cni", ignore_errors=True)
        for name in ("hostname", "hosts", "resolv.conf", "machine-id"):
            (self.root / "etc" / name).unlink(missing_ok=True)
        for name in (*_FOLDERS, *_STICKY):
            (self.root / name).mkdir(parents=True, exist_ok=True)
        for name in _STICKY:
            (self.root / name).chmod(0o1777)
        for link in (Path("/", name) for name in _USR_LINKS):
            if link.is_symlink():
                (self.root / link.name).symlink_to(link.readlink())
        (self.root / "var/run").symlink_to("/run")

    def boot(self, up: list[int]) -> None:
        """Switch it on, containerd with it; `up` are the other nodes that are.

        Raises ClusterError when it is up already or does not come up.
        """
        if self.pid():
            raise ClusterError(self.name, "it is up already", f"`crash {self.number}` first")
        network.add_node(self.number, up)
        cgroups.create(self.name)
        places = {
            "kubernetes": self.programs.kubernetes,
            "containerd": self.containerd,
            "runc": self.programs.runc,
            "cni/bin": self.programs.cni,
        }
        found = cgroups.hierarchies()
        script = self.folder / "init.sh"
        shared = self.options.share
        put(script, nodefiles.init_script(self.name, self.root, found, places, shared))
        spaces = ("-m", "-p", "-u", "-i", "-C", "--fork", "--propagation", "private")
        enter = ("nsenter", f"--net={machine.NAMESPACES / self.name}", "unshare", *spaces)
        log = self.folder / "init.log"
        machine.launch(self.home, log, cgroups.joining(self.name, (*enter, "sh", script)))
        until(f"{self.name} to boot", self.pid, _BOOT_S, why=lambda: tail(log))
        cgroups.settle(self.name)
        self.start("containerd")

    def crash(self) -> None:
        """Switch it off as a power failure would."""
        switch_off(self.number)

    def command(self, *words: str) -> list[str]:
        """A command line that runs these words inside. Raises ClusterError if the node is down."""
        pid = self.pid()
        if pid is None:
            raise ClusterError(self.name, "it is down", f"`boot {self.number}`")
        return ["nsenter", "-t", str(pid), "-m", "-n", "-p", "-u", "-i", "-C", *words]

    def run(self, *words: str, timeout_s: float = COMMAND_S) -> str:
        """Run a command inside the node to its good end; return what it printed."""
        return run(*self.command(*words), timeout_s=timeout_s, env=machine.environment(self.home))

    def path(self, inside: str) -> Path:
        """Where the host sees a path of the node that is up, its mounts included."""
        return Path(f"/proc/{self.pid()}/root", inside.lstrip("/"))

    def processes(self, program: str) -> dict[int, str]:
        """The node's processes of that name: the host's numbers, and when each was started."""
        found = {}
        for pid in cgroups.members(self.name):
            try:
                left, _, right = Path(f"/proc/{pid}/stat").read_text().rpartition(")")
            except OSError:
                continue
            if left.partition("(")[2] == program[:15]:
                found[pid] = right.split()[19]
        return found

    def is_healthy(self, program: str) -> bool:
        """Whether a program does its work."""
        return succeeds(*self.command(*nodefiles.health(program)), timeout_s=5.0)

    def start(self, program: str) -> None:
        """Start one of its programs, in a cgroup of its own; wait for containerd to answer."""
        self._check(program)
        for mark in ("stop", "pid"):
            self.path(f"/run/{program}.{mark}").unlink(missing_ok=True)
        within = f"{self.name}/{program}"
        cgroups.create(within)
        words = (nodefiles.SUPERVISE, program, *nodefiles.command(program, self.number))
        inside = self.command("setsid", "--fork", *words)
        # The cgroup is entered first: from within the namespace version 2 would refuse it.
        run(*cgroups.joining(within, inside), env=machine.environment(self.home))
        until(f"{program} of {self.name} to start", lambda: self._main(program), _STARTED_S)
        if program == "containerd":
            self.await_health(program)

    @staticmethod
    def _check(program: str) -> None:
        if program not in nodefiles.PROGRAMS:
            known = ", ".join(nodefiles.PROGRAMS)
            raise ClusterError(program, "a node has no such program", f"it has {known}")

    def await_health(self, program: str) -> None:
        """Wait until the program does its work."""
        log = self.root / f"var/log/{program}.log"
        until(
            f"{program} of {self.name}",
            lambda: self.is_healthy(program),
            _HEALTHY_S,
            why=lambda: tail(log, 2),
        )

    def _main(self, program: str) -> str:
        """The node's number of the program's process; nothing if it was never started."""
        try:
            return self.path(f"/run/{program}.pid").read_text().strip()
        except FileNotFoundError:
            return ""

    def _running(self, program: str) -> str:
        self._check(program)
        pid = self._main(program)
        if not pid or not self._is_there(pid):
            fix = f"`start {self.number} {program}`"
            raise ClusterError(f"{program} of {self.name}", "it does not run", fix)
        return pid

    def _is_there(self, pid: str) -> bool:
        return self.path(f"/proc/{pid}").exists()

    def stop(self, program: str) -> None:
        """End a program with SIGTERM; its supervisor, which sees it is wanted no more, ends too."""
        self._running(program)
        self.path(f"/run/{program}.stop").touch()
        supervisor = self.path(f"/run/{program}.supervisor").read_text().strip()
        self._signal("TERM", self._main(program))
        until(f"{program} to end", lambda: not self._is_there(supervisor), _STOPPED_S)

    def kill(self, program: str) -> None:
        """End a program with SIGKILL and wait until it is back: its supervisor starts it again."""
        before = self._running(program)
        self._signal("KILL", before)
        until(f"{program} to be back", lambda: self._main(program) not in ("", before), _STOPPED_S)
        self.await_health(program)

    def _signal(self, name: str, pid: str) -> None:
        if self._is_there(pid):
            self.run("kill", f"-{name}", pid)

    def load(self, archive: Path) -> None:
        """Give its containerd the images of an archive. Raises ClusterError if it takes none."""
        run(
            *self.command("/opt/containerd/ctr", "-n", "k8s.io", "images", "import", "-"),
            stdin=archive,
            timeout_s=_IMPORT_S,
            env=machine.environment(self.home),
            shown=f"ctr images import {archive} in {self.name}",
            fix="make the archive with `podman save --format docker-archive`",
        )
