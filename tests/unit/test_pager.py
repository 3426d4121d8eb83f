"""The pager with real processes: builds native/keeper/tests and runs each of its scenarios.

Why it exists: that no page is lost or stale, whatever dies, cannot be shown without the kernel's
userfaultfd, real programs and real kills. The programs check every byte of their memory; what a
scenario covers is described where it stands, in native/keeper/tests.

Needs root, userfaultfd with fork events, and musl-gcc; says so where it is skipped.
"""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

KEEPER = Path(__file__).resolve().parents[2] / "native" / "keeper"
SOURCES = ("pager", "pager_tasks", "pager_place", "hot", "pager_criu", "pagemap", "ranges", "uffd")
TESTS = ("pager_test", "program", "keeping", "instants")
NOT_POSSIBLE = 77
"""Exit status of the test program where the kernel refuses what it needs."""
LONGEST_S = 120
"""A scenario takes about a second; its own deadline is 60 s, this one is for the machine's."""


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The test program, built as native/Makefile builds the keeper."""
    if shutil.which("musl-gcc") is None:
        pytest.skip("musl-gcc is not installed")
    multiarch = subprocess.run(
        ["gcc", "-print-multiarch"], check=True, capture_output=True, text=True
    ).stdout.strip()
    built = tmp_path_factory.mktemp("pager") / "pager_test"
    headers = ["/usr/include", f"/usr/include/{multiarch}"]
    flags = ["-std=gnu11", "-static", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]
    flags += [word for header in headers for word in ("-idirafter", header)]
    files = [str(KEEPER / f"{name}.c") for name in SOURCES]
    files += [str(KEEPER / "tests" / f"{name}.c") for name in TESTS]
    subprocess.run(["musl-gcc", *flags, "-o", str(built), *files], check=True)
    return built


def run(program: Path, directory: Path, *arguments: str) -> None:
    """Run one scenario in the empty directory; fails with what the program printed."""
    done = subprocess.run(
        [str(program), str(directory), *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=LONGEST_S,
    )
    if done.returncode == NOT_POSSIBLE:
        pytest.skip(done.stdout.strip())
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "scenario",
    ["greeting", "events", "closing", "refused", "damaged", "given-up", "abandoned", "killed"],
)
def test_a_successor_goes_on_from_any_instant(program: Path, tmp_path: Path, scenario: str) -> None:
    run(program, tmp_path, scenario)


@pytest.mark.parametrize("seed", range(1, 5))
def test_memory_is_right_however_often_pagers_are_killed(
    program: Path, tmp_path: Path, seed: int
) -> None:
    kills, programs, threads, steps, pages = "40", "2", "3", "2000", "2048"
    run(program, tmp_path, "churn", str(seed), kills, programs, threads, steps, pages)


def test_memory_is_right_without_any_death(program: Path, tmp_path: Path) -> None:
    run(program, tmp_path, "churn", "9", "0", "3", "4", "3000", "8192")
