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
DAEMON_LOCK: Final = RUN / "architectd.lock"
HOT: Final = RUN / "hot"
"""A tmpfs with CRIU, its loader and libraries: a wake must not wait for the disk to find them."""
STATE: Final = Path("/var/lib/architect")
CHECKPOINTS: Final = STATE / "checkpoints"
EVENTS: Final = STATE / "events.jsonl"
PREFIX: Final = Path("/usr/local/lib/architect")
"""What `make install` puts there: see docs/reference.md."""
LIBEXEC: Final = PREFIX / "libexec"
BUNDLE: Final = PREFIX / "criu"
"""CRIU with its own loader and libraries."""
GATE_PROGRAM: Final = LIBEXEC / "gate.bpf.o"
CRIU_HOOK: Final = LIBEXEC / "criu-hook"
CRIU_COMPAT: Final = LIBEXEC / "criu-compat.so"
"""Preloaded into a dump: native/criu-compat says why."""
