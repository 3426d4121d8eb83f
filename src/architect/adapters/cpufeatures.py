"""What this machine offers to a program that comes from another one.

Called by the daemon, for a pod that leaves and for one that arrives; compared in
:mod:`architect.decisions.cpufeatures`.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Final

from architect.adapters import hot
from architect.contract.errors import ArchitectError
from architect.decisions.cpufeatures import Features

_CPUINFO: Final = Path("/proc/cpuinfo")
_NAMES: Final = ("flags", "Features")
"""Of the line that counts, on x86 and on ARM."""


@functools.cache
def here() -> Features:
    """Return this machine's, which stay the same for as long as the daemon runs.

    Raises ArchitectError if the kernel does not tell them.
    """
    kernel = os.uname()
    return Features(
        architecture=kernel.machine,
        flags=flags(_CPUINFO),
        page_size=os.sysconf("SC_PAGE_SIZE"),
        kernel=kernel.release,
        criu=hot.criu_version(),
    )


def flags(cpuinfo: Path) -> list[str]:
    """Return the flags of the first CPU, sorted; Linux runs no CPU that has fewer. Raises ArchitectError."""
    try:
        with cpuinfo.open() as lines:
            for line in lines:
                name, _, value = line.partition(":")
                if name.strip() in _NAMES:
                    return sorted(set(value.split()))
    except OSError as error:
        why = error.strerror or str(error)
    else:
        why = "it has no line of flags"
    raise ArchitectError(
        what="the CPU's features are not known",
        why=f"{cpuinfo}: {why}",
        fix="see that /proc is mounted as the kernel has it",
    )
