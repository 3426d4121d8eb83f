"""The one netfilter rule that hands marked packets to a queue, by whatever works.

Called by the gate when it is opened, repaired or removed. A node may have nft,
either iptables, or all of them, over a kernel with or without each target, so
every way is tried once, with a real packet, in a namespace of its own, and the
answer is kept for the life of the process.

The rule sits in mangle PREROUTING and nowhere else: on INPUT, early
demultiplexing has already tied the packet to a socket. It never says
--queue-bypass: without a reader packets must be dropped, for a packet that
reached a namespace whose program is gone would be answered with a reset.

Sources: iptables-extensions(8) on NFQUEUE and mark, nft(8) on queue,
socket(7) on SO_MARK.
"""

import enum
import functools
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from architect.adapters import netns, nfqueue

_COMMAND_SECONDS = 20
"""Limit for one nft or iptables call: they wait for a lock that others may hold."""
_PROBE_SECONDS = 0.5
"""Limit for a datagram's way over lo, which takes microseconds."""
_TABLE = "architect"
_CHAIN = "hold"


class NetfilterError(Exception):
    """A rule could not be installed, found or removed."""


class NoBackendError(NetfilterError):
    """Nothing on this machine can put a packet into a queue."""


class Family(enum.Enum):
    """An address family that the rule is needed for."""

    IPV4 = "IPv4"
    IPV6 = "IPv6"

    @property
    def socket_family(self) -> socket.AddressFamily:
        """The family in the socket API."""
        return socket.AF_INET if self is Family.IPV4 else socket.AF_INET6

    @property
    def loopback(self) -> str:
        """The address that lo has."""
        return "127.0.0.1" if self is Family.IPV4 else "::1"


class Backend(enum.Enum):
    """A way to install the rule, in the order of preference."""

    NFT = "nft"
    """A table of our own; `iptables -F` leaves it alone. Needs CONFIG_NFT_QUEUE."""
    IPTABLES_NFT = "iptables-nft"
    """What distributions have by default today. Needs CONFIG_NFT_COMPAT."""
    IPTABLES_LEGACY = "iptables-legacy"
    """For kernels whose nf_tables lacks both."""


class Rule(NamedTuple):
    """Packets with `packet.mark & mask == mark` go to the queue."""

    mark: int
    mask: int
    queue: int


@dataclass(frozen=True)
class Support:
    """What was found for one address family."""

    backends: tuple[Backend, ...]
    """All that work, best first; empty if none does."""
    reasons: Mapping[Backend, str]
    """Why each of the others does not."""

    @property
    def backend(self) -> Backend:
        """The one to use. Raises NoBackendError."""
        if not self.backends:
            causes = "; ".join(f"{backend.value}: {why}" for backend, why in self.reasons.items())
            raise NoBackendError(
                f"no way to queue packets ({causes}); install iptables or nftables and enable "
                "CONFIG_NETFILTER_XT_TARGET_NFQUEUE or CONFIG_NFT_QUEUE"
            )
        return self.backends[0]


class Reach(enum.Enum):
    """Where a marked datagram ended up."""

    QUEUED = "queued"
    DELIVERED = "delivered"
    """The rule is not there."""
    UNKNOWN = "unknown"
    """The family or lo is off in this namespace, or another rule dropped it."""


def _find(program: str) -> str | None:
    # Not shutil.which: daemons are often started without the sbin directories.
    directories = [*os.get_exec_path(), "/usr/local/sbin", "/usr/sbin", "/sbin"]
    paths = (Path(directory, program) for directory in directories)
    return next((str(path) for path in paths if os.access(path, os.X_OK)), None)


def call(program: str, *arguments: str, text: str = "") -> subprocess.CompletedProcess[str]:
    """Run a tool with a text as its input. Raises NetfilterError if it cannot be run."""
    path = _find(program)
    if path is None:
        raise NetfilterError(f"{program} is not installed")
    try:
        return subprocess.run(
            [path, *arguments],
            input=text,
            capture_output=True,
            text=True,
            check=False,
            timeout=_COMMAND_SECONDS,
            env={"PATH": os.defpath, "LC_ALL": "C"},
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NetfilterError(f"{program} could not be run: {error}") from error


def checked(program: str, *arguments: str, text: str = "") -> None:
    """Run a tool to its good end. Raises NetfilterError with what it said."""
    done = call(program, *arguments, text=text)
    if done.returncode:
        said = " ".join(done.stderr.split())
        raise NetfilterError(f"{program} failed with status {done.returncode}: {said}")


def iptables(backend: Backend, family: Family) -> str:
    """The name of the backend's tool for a family."""
    suffix = backend.value.removeprefix("iptables")
    return ("iptables" if family is Family.IPV4 else "ip6tables") + suffix


def _iptables_rule(rule: Rule) -> list[str]:
    mark = f"{rule.mark:#x}/{rule.mask:#x}"
    return f"-m mark --mark {mark} -j NFQUEUE --queue-num {rule.queue}".split()


def nft_family(family: Family) -> str:
    """The family's name for nft."""
    return "ip" if family is Family.IPV4 else "ip6"


def install(backend: Backend, family: Family, rule: Rule) -> None:
    """Install the rule, first in its chain, in the current namespace.

    It must not be there yet. Raises NetfilterError.
    """
    if backend is Backend.NFT:
        table = f"{nft_family(family)} {_TABLE}"
        checked(
            "nft",
            "-f",
            "-",
            text=(
                f"add table {table}\n"
                f"add chain {table} {_CHAIN} "
                "{ type filter hook prerouting priority -150; policy accept; }\n"
                f"flush chain {table} {_CHAIN}\n"
                f"add rule {table} {_CHAIN} "
                f"meta mark & {rule.mask:#x} == {rule.mark:#x} queue num {rule.queue}\n"
            ),
        )
        return
    checked(
        f"{iptables(backend, family)}-restore",
        "--noflush",
        "-w",
        str(_COMMAND_SECONDS // 2),
        text=f"*mangle\n-I PREROUTING {' '.join(_iptables_rule(rule))}\nCOMMIT\n",
    )


def present(backend: Backend, family: Family, rule: Rule) -> bool:
    """Whether this backend has the rule in the current namespace.

    Raises NetfilterError if the tool cannot be run.
    """
    if backend is Backend.NFT:
        done = call("nft", "list", "chain", nft_family(family), _TABLE, _CHAIN)
        return done.returncode == 0 and "queue" in done.stdout
    arguments = ["-w", str(_COMMAND_SECONDS // 2), "-t", "mangle", "-C", "PREROUTING"]
    return not call(iptables(backend, family), *arguments, *_iptables_rule(rule)).returncode


def remove(backend: Backend, family: Family, rule: Rule) -> None:
    """Remove the rule, and whatever else of ours is there. Raises NetfilterError."""
    if backend is Backend.NFT:
        table = f"{nft_family(family)} {_TABLE}"
        # Adding first makes the deletion good for an absent table, too.
        checked("nft", "-f", "-", text=f"add table {table}\ndelete table {table}\n")
        return
    tool, wait = iptables(backend, family), ("-w", str(_COMMAND_SECONDS // 2))
    while present(backend, family, rule):
        checked(tool, *wait, "-t", "mangle", "-D", "PREROUTING", *_iptables_rule(rule))
    if backend is Backend.IPTABLES_NFT:
        # An empty chain is on each packet's way too. Refused, rightly, while it has others' rules.
        call(tool, *wait, "-t", "mangle", "-X", "PREROUTING")


def reach(
    family: Family,
    rule: Rule,
    queue: int,
    arrived: Callable[[], bool],
    avoid: Collection[int] = (),
) -> Reach:
    """Send a datagram with the rule's mark over lo and see where it ends up.

    This costs microseconds, where a call of iptables costs milliseconds.
    `queue` is the descriptor of the queue's reader; `arrived` reads from it and
    tells whether a packet with exactly the rule's mark was there, and drops it.
    `avoid` are UDP ports not to use. Acts in the current namespace.
    """
    receivers: list[socket.socket] = []
    kind = socket.SOCK_DGRAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    try:
        while True:
            receiver = socket.socket(family.socket_family, kind)
            receivers.append(receiver)
            receiver.bind((family.loopback, 0))
            if receiver.getsockname()[1] not in avoid:
                break
        with socket.socket(family.socket_family, kind) as sender:
            sender.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, rule.mark)
            sender.sendto(b"", receiver.getsockname())
        poll = select.poll()
        poll.register(receiver, select.POLLIN)
        poll.register(queue, select.POLLIN)
        deadline = time.monotonic() + _PROBE_SECONDS
        while (left := deadline - time.monotonic()) > 0:
            ready = [descriptor for descriptor, _ in poll.poll(left * 1000)]
            if queue in ready and arrived():
                return Reach.QUEUED
            if receiver.fileno() in ready:
                return Reach.DELIVERED
    except OSError:  # no such family, no such address
        return Reach.UNKNOWN
    finally:
        for receiver in receivers:
            receiver.close()
    return Reach.UNKNOWN


def _works(backend: Backend, family: Family, rule: Rule) -> str:
    """Try a backend in a scratch namespace; return why it does not work, or nothing."""
    try:
        with netns.scratch():
            install(backend, family, rule)
            if not present(backend, family, rule):
                return "the rule vanished"
            queue = nfqueue.Queue(rule.queue, capacity=16, buffer_bytes=1 << 16)
            try:

                def arrived() -> bool:
                    return any(packet.mark == rule.mark for packet in queue.receive(16))

                reached = reach(family, rule, queue.fileno(), arrived)
            finally:
                queue.close()
            # A kernel without the family cannot be probed with a packet; there
            # the rule's acceptance has to do.
            return "packets pass the rule" if reached is Reach.DELIVERED else ""
    except (NetfilterError, nfqueue.QueueError) as error:
        return str(error)


@functools.cache
def probe(family: Family, rule: Rule) -> Support:
    """Find out what works on this machine, once; takes up to about 0.1 s.

    Raises NetnsError without the right to make a network namespace.
    """
    backends = []
    reasons = {}
    for backend in Backend:
        if why := _works(backend, family, rule):
            reasons[backend] = why
        else:
            backends.append(backend)
    return Support(tuple(backends), reasons)
