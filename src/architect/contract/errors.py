"""The words for what can go wrong, as a user reads them.

Every layer raises these (or subclasses of its own) so that the command line, the runtime's error
file and the events all print one line that says what happened, why, and what to do about it.
"""

from __future__ import annotations

_SHOWN = 80
"""Characters of a user's value repeated in a message; the rest would only hide the reason."""


def quoted(value: object) -> str:
    """Return ``value`` in double quotes, cut short and free of control characters and newlines."""
    text = value if isinstance(value, str) else str(value)
    if len(text) > _SHOWN:
        text = text[: _SHOWN - 1] + "…"
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text)
    return f'"{safe}"'


def _one_line(text: str) -> str:
    return " ".join(text.split())


class ArchitectError(Exception):
    """Base of all expected failures: ``what`` failed, ``why``, and the ``fix`` (may be empty)."""

    def __init__(self, what: str, why: str, fix: str = "") -> None:
        super().__init__(what, why, fix)
        self.what = _one_line(what)
        self.why = _one_line(why)
        self.fix = _one_line(fix)

    def __str__(self) -> str:
        """One line: ``what: why; fix``."""
        line = f"{self.what}: {self.why}"
        return f"{line}; {self.fix}" if self.fix else line


def as_error(error: Exception, what: str) -> ArchitectError:
    """Any failure as one of ours; ``what`` failed if it does not say so itself."""
    if isinstance(error, ArchitectError):
        return error
    return ArchitectError(what=what, why=str(error), fix="see docs/troubleshooting.md")


class InvalidDuration(ArchitectError):
    """Text that Go's ``time.ParseDuration`` would not take."""

    def __init__(self, text: str, why: str) -> None:
        fix = 'write for example "90s", "1m30s" or "1.5h"'
        super().__init__(f"duration {quoted(text)}", why, fix)
        self.text = text


class InvalidAnnotation(ArchitectError):
    """A pod annotation that is refused at admission.

    ``key`` is the container name or the path inside the JSON value that is wrong (None: the whole
    value), ``value`` what was found there.
    """

    def __init__(self, annotation: str, key: str | None, value: object, why: str, fix: str) -> None:
        where = f"annotation {annotation}"
        if key is not None:
            where += f", key {quoted(key)}"
        super().__init__(f"{where}, value {quoted(value)}", why, fix)
        self.annotation = annotation
        self.key = key
        self.value = value


class ContainerRefused(ArchitectError):
    """A container that asks to be managed but cannot be checkpointed the way it is set up."""
