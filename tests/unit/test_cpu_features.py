"""What keeps a program from moving to another machine."""

import json
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from architect.adapters import cpufeatures
from architect.contract.errors import ArchitectError
from architect.decisions.cpufeatures import Features, missing, remarks

BASE = ["avx", "avx2", "fpu", "pni", "sse", "sse2", "xsave", "xsavec"]


def features(
    *more: str,
    less: str = "",
    machine: str = "x86_64",
    page: int = 4096,
    kernel: str = "6.1.0",
    criu: str = "criu 4.1.1-1",
) -> Features:
    flags = sorted({*BASE, *more} - set(less.split()))
    return Features(architecture=machine, flags=flags, page_size=page, kernel=kernel, criu=criu)


@pytest.mark.parametrize(
    ("source", "destination", "reason"),
    [
        # The same, and a richer one.
        (features(), features(), ""),
        (features(), features("avx512f", "sha_ni", "amx_tile"), ""),
        # Instructions, those that CRIU knows and later ones.
        (features(), features(less="avx2"), "lacks avx2"),
        (features("avx512f"), features(), "lacks avx512f"),
        (features("avx10_1"), features(), "lacks avx10_1"),
        (features("amx_tile"), features(), "lacks amx_tile"),
        (features("sha512"), features(), "lacks sha512"),
        (features("sse4_2"), features(), "lacks sse4_2"),
        (features("rtm"), features(), "lacks rtm"),
        (features("ospke"), features(), "lacks ospke"),
        (features("abm", "bmi1"), features("bmi1"), "lacks abm"),
        (features("bmi2", "adx"), features(), "lacks adx, bmi2"),
        # What is only fast, or the kernel's own.
        (features("erms", "fsrm", "rep_good", "hle"), features(), ""),
        (features("monitor", "xsaves", "smep", "pcid", "hypervisor"), features(), ""),
        (features("constant_tsc"), features(), ""),
        # XSAVE without XSAVEC writes what its buffer has no room for.
        (features(less="xsavec"), features("avx512f"), "more room"),
        (features(less="xsavec"), features(), ""),
        (features("avx512f", less="xsavec"), features("avx512f"), ""),
        (features(less="xsavec xsave avx avx2"), features("avx512f"), ""),
        # Another machine altogether.
        (features(), features(machine="aarch64"), "aarch64, not x86_64"),
        (features("sve2", machine="aarch64"), features(machine="aarch64"), "lacks sve2"),
        (features(machine="aarch64"), features(machine="aarch64", page=65536), "65536"),
        # CRIU.
        (features(), features(criu="criu 4.1-1"), "criu 4.1-1 is older than criu 4.1.1-1"),
        (features(), features(criu="criu 3.20"), "is older"),
        (features(), features(criu="criu 4.10"), ""),
        (features(), features(criu="criu 4.1.1-7"), ""),
        (features(), features(criu="unknown"), ""),
        (features(criu="unknown"), features(), ""),
        # A kernel is no reason.
        (features(), features(kernel="5.10.1"), ""),
    ],
)
def test_missing(source: Features, destination: Features, reason: str) -> None:
    found = missing(source, destination)
    assert len(found) == bool(reason)
    assert reason in "".join(found)


def test_all_reasons_are_given() -> None:
    found = missing(features("rtm"), features(page=65536, criu="criu 4.0"))
    assert len(found) == 3


@pytest.mark.parametrize(
    ("source", "destination", "older"),
    [
        ("6.18.44-fc", "6.18.44-fc", False),
        ("6.18.44-fc", "6.18.3", False),
        ("6.1.141", "6.12.0-amd64", False),
        ("6.12.0-amd64", "6.1.141", True),
        ("6.12.0", "5.15", True),
        ("6.0", "6", False),
        ("6.1", "6", True),
        ("strange", "6.1", False),
        ("6.1", "strange", False),
    ],
)
def test_older_kernel_is_remarked(source: str, destination: str, older: bool) -> None:
    found = remarks(features(kernel=source), features(kernel=destination))
    assert len(found) == older
    if older:
        assert destination in found[0]
        assert source in found[0]


FLAGS = st.sets(st.sampled_from([*BASE, "avx512f", "mpx", "rtm", "erms", "pku", "sha_ni"]))


@given(FLAGS, FLAGS)
def test_nothing_is_missing_at_home_or_where_xsavec_has_more(
    flags: set[str], more: set[str]
) -> None:
    one = msgspec.structs.replace(features(), flags=sorted(flags))
    assert missing(one, one) == []
    compact = msgspec.structs.replace(one, flags=sorted(flags | {"xsavec"}))
    richer = msgspec.structs.replace(one, flags=sorted(flags | more | {"xsavec"}))
    assert missing(compact, richer) == []


def test_here() -> None:
    """And it comes through JSON as :class:`architect.contract.moving.Needs` carries it."""
    found = cpufeatures.here()
    assert len(found.flags) > 5
    sent = json.loads(msgspec.json.encode(msgspec.to_builtins(found)))
    assert msgspec.convert(sent, Features) == found
    assert len(json.dumps(sent)) < 8192
    assert missing(found, found) == []
    assert remarks(found, found) == []


def test_newer_nodes_may_say_more() -> None:
    sent = msgspec.to_builtins(features()) | {"later": 1}
    assert msgspec.convert(sent, Features) == features()


@pytest.mark.parametrize("name", ["flags\t\t", "Features\t"])
def test_flags_are_the_first_cpus(tmp_path: Path, name: str) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"model name\t: flags\n{name}: sse fpu\nvmx flags\t: ept\n\n{name}: later\n")
    assert cpufeatures.flags(file) == ["fpu", "sse"]


@pytest.mark.parametrize("contents", [None, "", "processor : 0\n"])
def test_flags_that_are_not_told(tmp_path: Path, contents: str | None) -> None:
    file = tmp_path / "cpuinfo"
    if contents is not None:
        file.write_text(contents)
    with pytest.raises(ArchitectError, match="not known"):
        cpufeatures.flags(file)
