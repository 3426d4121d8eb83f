"""Starts and stops the daemon: its systemd unit where systemd runs, else a background process."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from architect.contract import paths
from architect.contract.errors import ArchitectError
from architect.processes.cli import client

LOG: Final = Path("/var/log/architectd.log")
_UNIT: Final = "architectd.service"
_DEADLINE_S: Final = 60.0


class ServiceError(ArchitectError):
    """The daemon did not start or stop."""


def has_systemd() -> bool:
    """Whether systemd is this machine's init (sd_booted(3))."""
    return Path("/run/systemd/system").is_dir()


def up() -> int:
    """Starts the daemon unless it runs; returns its pid once it answers.

    Raises:
        ServiceError: it did not answer in time, with the last line it logged.
    """
    running = client.daemon_pid()
    if running is not None:
        return running
    process: subprocess.Popen[bytes] | None = None
    if has_systemd():
        done = subprocess.run(
            ["systemctl", "enable", "--now", _UNIT], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise ServiceError(
                "architectd was not started", done.stderr, "`journalctl -u architectd`"
            )
    else:
        with LOG.open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-I", "-m", "architect.processes.architectd.main"],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd="/", start_new_session=True,
            )  # fmt: skip
    deadline = time.monotonic() + _DEADLINE_S
    while time.monotonic() < deadline:
        pid = client.daemon_pid()
        if pid is not None:
            return pid
        if process is not None and process.poll() is not None:
            break
        time.sleep(0.01)
    raise ServiceError("architectd did not start", _last_words(), f"see {_where()}")


def down() -> bool:
    """Stops the daemon; hibernated containers stay as they are. False if none ran.

    Raises:
        ServiceError: it did not end in time.
    """
    pid = client.daemon_pid()
    if has_systemd():
        subprocess.run(["systemctl", "disable", "--now", _UNIT], capture_output=True, check=False)
    if pid is None:
        return False
    process = _pidfd(pid)
    if process is None:
        return True
    try:
        signal.pidfd_send_signal(process, signal.SIGTERM)
        if not _ended(process):
            raise ServiceError(f"architectd ({pid}) did not end", "it is busy", f"see {_where()}")
    except ProcessLookupError:
        pass
    finally:
        os.close(process)
    return True


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except ProcessLookupError:
        return None


def _ended(process: int) -> bool:
    import select

    return bool(select.select([process], [], [], _DEADLINE_S)[0])


def _where() -> str:
    return "`journalctl -u architectd`" if has_systemd() else str(LOG)


def _last_words() -> str:
    try:
        return LOG.read_text(errors="replace").strip().splitlines()[-1]
    except (OSError, IndexError):
        return f"nothing at {paths.DAEMON_SOCKET}"
