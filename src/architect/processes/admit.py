"""architect-admit: the door for a container that is created while no daemon runs.

Called by runc-architect with ID BUNDLE RUNTIME_ROOT ENGINE_PID. Prints one line, as the daemon would:
"ok managed", "ok unmanaged" or "error TEXT". The daemon finds the container when it starts.
"""

from __future__ import annotations

import sys

from architect.contract.errors import ArchitectError
from architect.processes import door


def main() -> None:
    """Program; see the module."""
    container, bundle, root, engine = sys.argv[1:5]
    try:
        answer = door.admit(container, bundle, root, int(engine))
    except ArchitectError as error:
        print(f"error {error}")
        return
    print("ok managed" if answer.record is not None else "ok unmanaged")


if __name__ == "__main__":
    main()
