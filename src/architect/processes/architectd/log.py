"""One JSON line on stderr, which is the pod's log."""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def log(what: str, **details: Any) -> None:
    """Writes it; ``what`` says what happened in a few words that stay the same."""
    print(
        json.dumps({"time": round(time.time(), 3), "what": what, **details}),
        file=sys.stderr,
        flush=True,
    )
