"""Builds example-go into build/example-go, a static program for its image (scripts/images.toml).

Called by the Makefile (make example-go) and by the tests, with PYTHONPATH=.:scripts. Go is the one
that builds the test cluster; go itself keeps what it compiled, so a second run takes no time.
"""

from pathlib import Path
from typing import Final

from common import BUILD, main, say
from tests.cluster import toolchain
from tests.cluster.base import run

SOURCE: Final = Path(__file__).resolve().parent
PROGRAM: Final = BUILD / "example-go" / "example-go"
_BUILD_S: Final = 600.0


def build() -> Path:
    """Build the program and return where it is. Raises Failure."""
    run(
        toolchain.go(),
        "build",
        *("-trimpath", "-ldflags", "-s -w", "-o", PROGRAM, "."),
        cwd=SOURCE,
        env=toolchain.environment() | {"CGO_ENABLED": "0"},
        timeout_s=_BUILD_S,
        shown="go build of example-go",
        fix="see what the compiler said",
    )
    return PROGRAM


def body(_: list[str]) -> None:
    say("example-go", str(build()))


if __name__ == "__main__":
    main("example-go", body)
