"""Can a program that was started on one machine run on another? Decided before it is stopped.

A running program has asked the CPU once what it can do, and chosen its code by that. Called by the
destination of a move with what the source says of itself (:mod:`architect.adapters.cpufeatures`).

CRIU's `criu cpuinfo check --cpu-cap=ins` (criu/arch/x86/cpu.c) asks the same of the instructions up to
AVX-512; here are the later ones too. Left out of its list are flags that only say what is fast (erms,
rep_good, hle) or what the kernel alone can use (monitor, sep, xsaves).
"""

from __future__ import annotations

import re
from typing import Final

import msgspec

_X86: Final = "x86_64"


class Features(msgspec.Struct, frozen=True, kw_only=True):
    """What a program may have come to rely on. Small, and sent to other nodes: fields are only ever added."""

    architecture: str
    """As uname(2) has it."""
    flags: list[str]
    """Of /proc/cpuinfo, sorted: all that its first CPU has."""
    page_size: int
    """Bytes."""
    kernel: str
    """Release, as uname(2) has it."""
    criu: str
    """``criu 4.1.1-1``, or ``unknown``."""


_INSTRUCTIONS: Final = frozenset({
    "fpu", "tsc", "cx8", "cmov", "clflush", "mmx", "fxsr", "syscall", "rdtscp", "nopl",
    "mmxext", "3dnow", "3dnowext", "3dnowprefetch",
    "pni", "ssse3", "fma", "cx16", "movbe", "popcnt", "aes", "pclmulqdq", "f16c", "rdrand",
    "lahf_lm",
    "xsave", "xsaveopt", "xsavec", "xgetbv1",
    "abm", "misalignsse", "xop", "fma4", "tbm", "lwp", "bmi1", "bmi2", "adx", "rtm", "mpx",
    "rdseed", "fsgsbase",
    "clflushopt", "clwb", "clzero", "rdpid", "rdpru", "mwaitx", "waitpkg", "serialize", "tsxldtrk",
    "gfni", "vaes", "vpclmulqdq", "sm3", "sm4", "movdiri", "movdir64b", "enqcmd", "cmpccxadd",
    "raoint", "pku", "ospke", "apx",
})  # fmt: skip
_FAMILIES: Final = ("sse", "avx", "amx", "sha")
"""First letters of further ones, so that the next CPU's are known: avx512_vnni, avx10_1, amx_fp16."""

_AREAS: Final = ("avx", "mpx", "avx512f")
"""Flags with an area of their own in what XSAVE writes, and which the dynamic loader asks it for."""

_NUMBERS: Final = re.compile(r"\d+(?:\.\d+)*")


def missing(source: Features, destination: Features) -> list[str]:
    """Say why a program of the source cannot run on at the destination, one reason each; empty if it can."""
    if source.architecture != destination.architecture:
        return [f"the CPU is {destination.architecture}, not {source.architecture}"]
    reasons = []
    if source.page_size != destination.page_size:
        reasons.append(f"pages are of {destination.page_size} bytes, not {source.page_size}")
    lacking = sorted(_usable(source) - _usable(destination))
    if lacking:
        reasons.append(f"the CPU lacks {', '.join(lacking)}")
    reasons += _larger_areas(source, destination)
    if _older(destination.criu, source.criu, digits=3):
        reasons.append(
            f"{destination.criu} is older than {source.criu}, and may not read its images"
        )
    return reasons


def remarks(source: Features, destination: Features) -> list[str]:
    """Say what may go wrong without being a reason to refuse, for an event or the log."""
    if _older(destination.kernel, source.kernel, digits=2):
        return [
            f"kernel {destination.kernel} is older than {source.kernel}:"
            " system calls that the program has found there may be missing"
        ]
    return []


def _usable(features: Features) -> set[str]:
    """What a program's own instructions need."""
    if features.architecture != _X86:
        # There the kernel names only what programs may use.
        return set(features.flags)
    return {one for one in features.flags if one in _INSTRUCTIONS or one.startswith(_FAMILIES)}


def _larger_areas(source: Features, destination: Features) -> list[str]:
    """XSAVE writes all areas that the CPU has, but into a buffer as large as the source's CPU said.

    The loader uses it at each function's first call, where there is no XSAVEC, which leaves out unused areas.
    """
    if source.architecture != _X86 or "xsave" not in source.flags or "xsavec" in source.flags:
        return []
    more = [one for one in _AREAS if one in destination.flags and one not in source.flags]
    if not more:
        return []
    return [
        f"the CPU's registers need more room than the program has set aside ({', '.join(more)})"
    ]


def _older(one: str, other: str, *, digits: int) -> bool:
    """Whether a version is older than another, by its first numbers; False where one is not known."""
    versions = []
    for text in (one, other):
        found = _NUMBERS.search(text)
        if found is None:
            return False
        numbers = [int(number) for number in found[0].split(".")]
        versions.append((numbers + [0] * digits)[:digits])
    return versions[0] < versions[1]
