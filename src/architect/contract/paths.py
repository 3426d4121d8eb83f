"""Where Architect keeps things. native/common/control.h has the same paths for the C programs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

RUN: Final = Path("/run/architect")
"""What lives until the next boot: sockets, one directory a container."""
CONTAINERS: Final = RUN / "containers"
BPF: Final = RUN / "bpf"
"""A bpffs: pinned maps and programs outlive the daemon."""
DAEMON_SOCKET: Final = RUN / "architectd.sock"
HOT: Final = RUN / "hot"
"""A tmpfs with CRIU, its loader and libraries: a wake must not wait for the disk to find them."""
KERNEL_CACHE: Final = HOT / "criu.kdat"
"""What CRIU has found out about the kernel: native/criu-compat/criu-compat.c has it read from here."""
REMOVED: Final = RUN / "removed"
"""There once architectd has woken everything because it is being removed from a cluster's node."""
STATE: Final = Path("/var/lib/architect")
DAEMON_LOCK: Final = STATE / "architectd.lock"
"""Held by the one daemon of the machine."""
RUN_LOCK: Final = STATE / "run.lock"
"""Held by whoever makes the run directory or takes it away."""
CLUSTER_MARK: Final = STATE / "cluster"
"""There while the machine is a cluster's node: what is started or stopped there may be moving."""
CHECKPOINTS: Final = STATE / "checkpoints"
BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")
"""Another one after each start of the kernel (random(4))."""
DEPARTURES: Final = STATE / "departures"
"""One directory for each pod that leaves this node, until another one has it."""
IDENTITY: Final = STATE / "identity"
"""The node's key and certificate, by which other nodes' architectds know it."""
ARRIVALS: Final = STATE / "arrivals"
"""One directory for each checkpoint that is fetched from another node, until its pod runs or it goes."""
EVENTS: Final = STATE / "events.jsonl"
PREFIX: Final = Path("/usr/local/lib/architect")
"""What `make install` puts there: see docs/reference.md."""
LIBEXEC: Final = PREFIX / "libexec"
BUNDLE: Final = PREFIX / "criu"
"""CRIU with its own loader and libraries."""
NODE_PROGRAM: Final = PREFIX / "venv/bin/architect-node"
"""Puts architect on a cluster's node, and takes it off; only where that has put it."""
GATE_PROGRAM: Final = LIBEXEC / "gate.bpf.o"
PROXY_PROGRAM: Final = LIBEXEC / "health-check-proxy"
"""Answers probes for hibernated containers: native/health-check-proxy says how."""
CRIU_HOOK: Final = LIBEXEC / "criu-hook"
CRIU_COMPAT: Final = LIBEXEC / "criu-compat.so"
"""Preloaded into CRIU: native/criu-compat says why."""
CRIU_STANDINS: Final = LIBEXEC / "standins"
"""Stand in for libraries that CRIU does not need here: native/criu-standins says why."""
