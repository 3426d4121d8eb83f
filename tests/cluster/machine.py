"""What the cluster changes on the machine itself, and how that is undone and found.

`Record` is written before anything is changed. Every process that the cluster starts outside its
nodes carries a mark in its environment, because a pid file cannot be written in the instant in
which a process is made: so `down` finds them all however `up` ended. Called by cluster.py.
"""

import ipaddress
import json
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final, Self

from tests.cluster import cgroups
from tests.cluster.base import COMMAND_S, ClusterError, run, tail, until
from tests.cluster.settings import HOST_LINK, NETWORKS, NODE_NAME, SWITCH

NAMESPACES: Final = Path("/run/netns")
_MARK: Final = "ARCHITECT_TEST_CLUSTER"
_LOCK: Final = "\0architect-test-cluster"
_BUSY_S: Final = 2.0
_ENDED_S: Final = 20.0
_LOOKS: Final = 3
_STATE: Final = 0
_ENV_START: Final = 47
"""Fields of /proc/PID/stat after the program's name, which are fields 3 and 50 of it."""
_SYSCTLS: Final = (
    "kernel/keys/root_maxbytes",
    "kernel/keys/root_maxkeys",
    "kernel/panic",
    "kernel/panic_on_oops",
    "vm/overcommit_memory",
    "vm/panic_on_oom",
)
"""What the kubelet sets for the whole machine (pkg/kubelet/cm, setupKernelTunables)."""


def is_mount(path: Path) -> bool:
    """Whether something is mounted exactly there."""
    return any(point == path for point in mount_points())


def mount_points() -> list[Path]:
    """All mount points of this mount namespace."""
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    return [Path(line.split()[4].replace("\\040", " ")) for line in lines]


@dataclass(frozen=True, slots=True)
class Record:
    """The machine's state before."""

    sysctls: Mapping[str, str]
    controllers: tuple[str, ...]
    """What cgroup version 2 has to hand down for us, and did not."""
    namespaces_mounted: bool
    """ip-netns(8) mounts /run/netns when it is first used."""

    @classmethod
    def take(cls) -> Self:
        """Read it."""
        sysctls = {name: Path("/proc/sys", name) for name in _SYSCTLS}
        return cls(
            {name: path.read_text().strip() for name, path in sysctls.items() if path.exists()},
            tuple(cgroups.missing_controllers()),
            is_mount(NAMESPACES),
        )

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> Self:
        """Read what `as_json` gave."""
        return cls(found["sysctls"], tuple(found["controllers"]), bool(found["namespaces_mounted"]))

    def as_json(self) -> dict[str, Any]:
        """For the cluster's state."""
        return asdict(self)

    def changed(self) -> list[str]:
        """Sysctls that are not as they were."""
        now = {name: Path("/proc/sys", name).read_text().strip() for name in self.sysctls}
        return [
            f"sysctl {name} is {now[name]}, was {was}"
            for name, was in self.sysctls.items()
            if now[name] != was
        ]

    def restore(self) -> None:
        """Put everything back, with no node and no namespace of ours left."""
        for name, value in self.sysctls.items():
            path = Path("/proc/sys", name)
            if path.read_text().strip() != value:
                path.write_text(value)
        handed = set(self.controllers) - set(cgroups.missing_controllers())
        cgroups.hand_down(sorted(handed), "-")
        if not self.namespaces_mounted and is_mount(NAMESPACES) and not os.listdir(NAMESPACES):
            run("umount", NAMESPACES)


def environment(home: Path) -> dict[str, str]:
    """The whole environment of the cluster's programs: no proxy of the user's, and the mark."""
    return {
        "PATH": "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "LC_ALL": "C.UTF-8",
        _MARK: str(home),
    }


@contextmanager
def marking(home: Path) -> Iterator[None]:
    """Give the mark to every command that this process runs meanwhile.

    One that outlives it for a moment, when it is killed, would else still write to what `down` is
    removing.
    """
    os.environ[_MARK] = str(home)
    try:
        yield
    finally:
        del os.environ[_MARK]


def launch(home: Path, log: Path, command: Sequence[str | Path]) -> None:
    """Start a program of the cluster at `home` that outlives this process; it writes to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        done = subprocess.run(
            ["setsid", "--fork", *command],
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=file,
            cwd=home,
            env=environment(home),
            timeout=COMMAND_S,
            check=False,
        )
    if done.returncode:
        raise ClusterError(f"starting {command[0]}", tail(log))


def _marks() -> Iterator[tuple[Path, str]]:
    """Every process that has a mark, as its folder in /proc, with the cluster's home."""
    start = f"{_MARK}=".encode()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit() or int(folder.name) == os.getpid():
            continue
        with suppress(OSError):
            for word in (folder / "environ").read_bytes().split(b"\0"):
                if word.startswith(start):
                    yield folder, os.fsdecode(word.removeprefix(start))


def marked(home: Path) -> dict[int, str]:
    """Processes with the mark of the cluster at `home`: their pids and programs."""
    found = {}
    for folder, mark in _marks():
        if mark == str(home):
            with suppress(OSError):
                program = (folder / "cmdline").read_bytes().split(b"\0")[0]
                found[int(folder.name)] = Path(os.fsdecode(program)).name
    return found


def homes() -> list[str]:
    """The homes of all clusters that run on this machine."""
    return sorted({mark for _, mark in _marks()})


def end_marked(home: Path) -> None:
    """End all processes with the cluster's mark, and wait until they are gone.

    One that is just being made can be overlooked twice: when the child of a process that is gone was not
    in the list, and while it is between two programs. So nobody must have been found three times.
    """
    looks = 0

    def ended() -> bool:
        nonlocal looks
        left = marked(home)
        end(left)
        looks = 0 if left or any(map(_between_programs, _pids())) else looks + 1
        return looks == _LOOKS

    until("the cluster's processes to end", ended, _ENDED_S)


def _pids() -> set[int]:
    return {int(name) for name in os.listdir("/proc") if name.isdigit()}


def _between_programs(pid: int) -> bool:
    """Whether a process is amid execve(2): its new memory has no environment yet.

    Without one for good are threads of the kernel and zombies, which have no program; a program
    that was given an empty environment has an address of it (proc_pid_stat(5), `env_start`).
    """
    with suppress(OSError):
        os.readlink(f"/proc/{pid}/exe")
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return after_name[_STATE] not in "ZX" and after_name[_ENV_START] == "0"
    return False


def end(pids: Iterable[int]) -> None:
    """End processes with SIGKILL, and wait until the last of their threads is gone.

    A process that is being killed loses its memory first, with which its mark goes, and its sockets
    after that: who goes by the mark alone starts the next one while the address is still taken.
    Raises ClusterError.
    """
    with ExitStack() as opened:
        waiting: dict[int, int] = {}
        for pid in pids:
            with suppress(ProcessLookupError):
                descriptor = os.pidfd_open(pid)
                opened.callback(os.close, descriptor)
                signal.pidfd_send_signal(descriptor, signal.SIGKILL)
                waiting[descriptor] = pid
        poll = select.poll()
        for descriptor in waiting:
            poll.register(descriptor, select.POLLIN)
        deadline = time.monotonic() + _ENDED_S
        while waiting:
            for descriptor, _ in poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                poll.unregister(descriptor)
                del waiting[descriptor]
            if waiting and time.monotonic() > deadline:
                left = ", ".join(map(str, waiting.values()))
                raise ClusterError(
                    f"the end of {left}", f"not so after {_ENDED_S:g} s", "look at it"
                )


@contextmanager
def alone() -> Iterator[None]:
    """Let one command at a time change the machine's cluster.

    A name in the abstract namespace of unix(7) is taken, which goes away with the process.
    """
    with socket.socket(socket.AF_UNIX) as lock:

        def taken() -> bool:
            try:
                lock.bind(_LOCK)
            except OSError:
                return False
            return True

        why = "another command that changes the cluster runs"
        until("the cluster", taken, _BUSY_S, why=lambda: why, fix="wait for it, or end it")
        yield


def refuse_taken_addresses() -> None:
    """Raise ClusterError if the machine has routes to the addresses that the cluster uses."""
    ours = [ipaddress.IPv4Network(network) for network in NETWORKS]
    for route in json.loads(run("ip", "-json", "-4", "route", "show", "table", "all")):
        to = route["dst"]
        if to == "default" or route.get("dev") == HOST_LINK:
            continue
        there = ipaddress.IPv4Network(to, strict=False)
        if any(there.overlaps(own) and there.prefixlen for own in ours):
            raise ClusterError(
                "the cluster's addresses",
                f"the machine has a route to {to} by {route.get('dev', 'no device')}",
                f"free {', '.join(NETWORKS)}: they are fixed (tests/cluster/settings.py)",
            )


def leftovers(home: Path, record: Record | None) -> list[str]:
    """What is on the machine of a cluster that should be gone, in words."""
    found = [f"process {pid} ({name})" for pid, name in marked(home).items()]
    found += [f"cgroup {name}" for name in sorted(cgroups.named())]
    found += [f"mount {point}" for point in mount_points() if home in (point, *point.parents)]
    if NAMESPACES.exists():
        spaces = [path.name for path in NAMESPACES.iterdir()]
        found += [
            f"network namespace {name}"
            for name in spaces
            if name == SWITCH or NODE_NAME.fullmatch(name)
        ]
    links = [link["ifname"] for link in json.loads(run("ip", "-json", "link"))]
    found += [f"link {name}" for name in links if name == HOST_LINK or NODE_NAME.fullmatch(name)]
    ours = [ipaddress.IPv4Network(network) for network in NETWORKS]
    for route in json.loads(run("ip", "-json", "-4", "route", "show", "table", "all")):
        to = route["dst"]
        if to != "default" and any(
            ipaddress.IPv4Network(to, strict=False).subnet_of(network) for network in ours
        ):
            found.append(f"route to {to}")
    found += record.changed() if record else []
    return found + ([f"files in {home}"] if home.exists() else [])
