"""When lower limits may reach a container that hibernates or has just woken."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters import cgroup
from architect.decisions.limits import Verdict, judge

MB = 1 << 20


def wanted(limit: object) -> str:
    return json.dumps({"memory": {"limit": limit}, "cpu": {"shares": 2}})


@pytest.mark.parametrize(
    ("limit", "remembered", "asleep", "settled", "expected"),
    [
        (4 * MB, 96 * MB, True, True, Verdict.SKIP),  # lowered for the sleeper
        (4 * MB, 96 * MB, False, False, Verdict.REFUSE),  # too late: it has woken
        (4 * MB, 96 * MB, False, True, Verdict.APPLY),  # a user's wish
        (96 * MB, 96 * MB, False, False, Verdict.APPLY),  # back to what it was
        (200 * MB, 96 * MB, True, True, Verdict.APPLY),  # a user raises a sleeper's
        (4 * MB, math.inf, True, True, Verdict.SKIP),
        (-1, 96 * MB, False, False, Verdict.APPLY),  # no limit
        (4 * MB, None, False, False, Verdict.APPLY),  # it has never slept
    ],
)
def test_lower_memory_limits(
    limit: int, remembered: float | None, asleep: bool, settled: bool, expected: Verdict
) -> None:
    verdict = judge(wanted(limit), remembered=remembered, asleep=asleep, settled=settled)
    assert verdict is expected


@pytest.mark.parametrize(
    "text", ["", "[]", "{", '{"memory": 1}', '{"memory": {"limit": "x"}}', '{"cpu": {"quota": 1}}']
)
def test_what_has_no_memory_limit_is_runcs_business(text: str) -> None:
    assert judge(text, remembered=MB, asleep=True, settled=False) is Verdict.APPLY


@given(limit=st.integers(1, 1 << 40), remembered=st.floats(1, 1 << 40), asleep=st.booleans())
def test_nothing_below_what_it_had_reaches_one_that_may_have_just_woken(
    limit: int, remembered: float, asleep: bool
) -> None:
    verdict = judge(wanted(limit), remembered=remembered, asleep=asleep, settled=False)
    assert (verdict is Verdict.APPLY) == (limit >= remembered)


def test_limits_are_raised_outermost_first_and_never_lowered(tmp_path: Path) -> None:
    files = {
        "pod/memory.limit_in_bytes": ("96", "4"),
        "pod/cpu.cfs_quota_us": ("-1", "1000"),
        "pod/one/memory.limit_in_bytes": ("96", "200"),
        "pod/one/cpu.shares": ("300", "2"),
        "pod/one/cpu.max": ("max 100000", "1000 100000"),
    }
    limits = []
    for name, (before, now) in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(now + "\n")
        limits.append((str(file), before))
    assert [Path(name).name for name, _ in cgroup.lowered(limits)] == [
        "memory.limit_in_bytes",
        "cpu.cfs_quota_us",
        "cpu.shares",
        "cpu.max",
    ]
    cgroup.raise_limits([*limits, (str(tmp_path / "gone"), "5")])
    assert cgroup.lowered(limits) == []
    assert (tmp_path / "pod/one/memory.limit_in_bytes").read_text() == "200\n"
    assert cgroup.memory_limit(limits) == 96
    assert cgroup.memory_limit([("/x/memory.max", "max")]) == math.inf
    assert cgroup.memory_limit([("/x/cpu.max", "max")]) is None
