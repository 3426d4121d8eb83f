"""One JSON line on stderr for each thing worth knowing. Called by every module beside it."""

from __future__ import annotations

import json
import logging
import sys
import time
from typing import Any


def note(what: str, **details: Any) -> None:
    """Writes a line; details that are empty are left out."""
    line = {"time": round(time.time(), 3), "what": what}
    line |= {key: value for key, value in details.items() if value not in (None, "", [], ())}
    print(json.dumps(line, default=str), file=sys.stderr, flush=True)


class Lines(logging.Handler):
    """Has the libraries' warnings written in the same form."""

    def emit(self, record: logging.LogRecord) -> None:
        """Writes the message, and of an exception its class and text, never a traceback."""
        error = record.exc_info[1] if record.exc_info else None
        shown = None if error is None else f"{type(error).__name__}: {error}"
        note("log", logger=record.name, message=record.getMessage().strip(), error=shown)


def take_over_logging() -> None:
    """Sends the libraries' warnings and errors here, and drops what is less."""
    logging.basicConfig(handlers=[Lines()], level=logging.WARNING, force=True)
