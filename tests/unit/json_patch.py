"""JSON Patch (RFC 6902) as an API server applies it, as far as the manager's patches go.

Written for the tests of what the webhooks answer: a patch that fails here would fail every pod.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any


def applied(document: Any, patch: Iterable[Mapping[str, Any]]) -> Any:
    """Return the document after the patch. Raises KeyError, IndexError or TypeError if it has no place."""
    result = copy.deepcopy(document)
    for operation in patch:
        *way, last = (
            part.replace("~1", "/").replace("~0", "~") for part in operation["path"].split("/")[1:]
        )
        at = result
        for part in way:
            at = at[int(part)] if isinstance(at, list) else at[part]
        if operation["op"] == "remove":
            del at[int(last) if isinstance(at, list) else last]
        elif operation["op"] != "add":
            raise TypeError(operation["op"])
        elif isinstance(at, list):
            if int(last) > len(at):
                raise IndexError(operation["path"])
            at.insert(int(last), copy.deepcopy(operation["value"]))
        else:
            at[last] = copy.deepcopy(operation["value"])
    return result
