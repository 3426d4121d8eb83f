"""The seccomp profile with io_uring and Multipath TCP refused: stricter there, equal elsewhere.

The results are compiled by the libseccomp of this machine, as runc does it, and the BPF programs are
run here on many calls, so that what is compared is what the kernel would do.
"""

import copy
import ctypes
import errno
import functools
import os
import struct
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from architect.decisions.seccomp import IO_URING_CALLS, IPPROTO_MPTCP, harden

Profile = dict[str, Any]

ALLOW, LOG, ERRNO, KILL = "SCMP_ACT_ALLOW", "SCMP_ACT_LOG", "SCMP_ACT_ERRNO", "SCMP_ACT_KILL"
ACTIONS = {ALLOW: 0x7FFF0000, LOG: 0x7FFC0000, ERRNO: 0x00050000, KILL: 0}
"""linux/seccomp.h; greater is more permissive."""
OPERATORS = {"NE": 1, "LT": 2, "LE": 3, "EQ": 4, "GE": 5, "GT": 6, "MASKED_EQ": 7}
"""seccomp.h's enum scmp_compare."""
REFUSED = ACTIONS[ERRNO] | errno.EPROTONOSUPPORT
ABSENT = ACTIONS[ERRNO] | errno.ENOSYS


def rule(action: str, *args: dict[str, Any], names: Sequence[str] = ("socket",)) -> dict[str, Any]:
    found: dict[str, Any] = {"names": list(names), "action": action}
    return {**found, "args": list(args)} if args else found


def arg(index: int, op: str, value: int, second: int | None = None) -> dict[str, Any]:
    found = {"index": index, "value": value, "op": f"SCMP_CMP_{op}"}
    return found if second is None else {**found, "valueTwo": second}


def profile(default: str, *rules: dict[str, Any], number: int | None = None) -> Profile:
    found = {"defaultAction": default, "syscalls": list(rules)}
    return found if number is None else {**found, "defaultErrnoRet": number}


NO_AUDIT = {**rule(ERRNO, arg(0, "EQ", 16), arg(2, "EQ", 9)), "errnoRet": 22}
"""Of Podman's default profile: a container without CAP_AUDIT_WRITE gets no audit socket."""

IN_USE = {
    "Podman": profile(ERRNO, rule(ALLOW, names=["bind", "socket", "read"]), number=38),
    "Podman without CAP_AUDIT_WRITE": profile(
        ERRNO,
        rule(ALLOW, names=["bind", "read"]),
        NO_AUDIT,
        rule(ALLOW, arg(2, "NE", 9)),
        rule(ALLOW, arg(0, "NE", 16)),
        rule(ALLOW, arg(2, "NE", 9)),
        number=38,
    ),
    "Docker and containerd": profile(
        ERRNO, rule(ALLOW, arg(0, "NE", 40)), rule(ALLOW, names=["x"])
    ),
    "without AF_ALG and AF_VSOCK": profile(
        ERRNO,
        rule(ALLOW, arg(0, "LT", 38)),
        rule(ALLOW, arg(0, "EQ", 39)),
        rule(ALLOW, arg(0, "GT", 40)),
    ),
    "ORed conditions on one argument": profile(
        ERRNO, rule(ALLOW, arg(0, "EQ", 1), arg(0, "EQ", 2), arg(0, "EQ", 10))
    ),
    "killing": profile(KILL, rule(ALLOW), rule(ALLOW, names=IO_URING_CALLS)),
    "logging": profile(ERRNO, rule(LOG, arg(0, "EQ", 2))),
    "io_uring allowed": profile(ERRNO, rule(ALLOW, names=["read", *IO_URING_CALLS, "socket"])),
    "permissive": profile(ALLOW, rule(ERRNO, arg(0, "EQ", 38)), rule(ERRNO, arg(0, "EQ", 40))),
    "unconfined": profile(ALLOW),
}


class Comparison(ctypes.Structure):
    """seccomp.h's struct scmp_arg_cmp."""

    _fields_ = (
        ("arg", ctypes.c_uint),
        ("op", ctypes.c_int),
        ("datum_a", ctypes.c_uint64),
        ("datum_b", ctypes.c_uint64),
    )


class NotCompiledError(Exception):
    """libseccomp does not take a rule."""


@functools.cache
def libseccomp() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libseccomp.so.2")
    except OSError:
        pytest.skip("libseccomp.so.2 is not on this machine: install libseccomp2")
    library.seccomp_init.restype = ctypes.c_void_p
    library.seccomp_init.argtypes = [ctypes.c_uint32]
    library.seccomp_release.argtypes = [ctypes.c_void_p]
    library.seccomp_arch_native.restype = ctypes.c_uint32
    library.seccomp_export_bpf.argtypes = [ctypes.c_void_p, ctypes.c_int]
    library.seccomp_rule_add_array.argtypes = [
        ctypes.c_void_p, ctypes.c_uint32, ctypes.c_int, ctypes.c_uint, ctypes.c_void_p,
    ]  # fmt: skip
    return library


def action_of(action: str, number: int | None) -> int:
    return ACTIONS[action] | ((errno.EPERM if number is None else number) if action == ERRNO else 0)


def alternatives(entry: Mapping[str, Any]) -> list[list[dict[str, Any]]]:
    """What runc makes of an entry whose conditions name one argument twice."""
    args = entry.get("args", [])
    if len({one["index"] for one in args}) < len(args):
        return [[one] for one in args]
    return [args]


def compiled(found: Profile) -> list[tuple[int, int, int, int]]:
    """The BPF program of a profile, made as runc makes it (libcontainer/seccomp)."""
    library = libseccomp()
    default = action_of(found["defaultAction"], found.get("defaultErrnoRet"))
    context = library.seccomp_init(default)
    try:
        for entry in found["syscalls"]:
            action = action_of(entry["action"], entry.get("errnoRet"))
            for name in entry["names"] if action != default else []:
                number = library.seccomp_syscall_resolve_name(name.encode())
                for args in alternatives(entry) if number != -1 else []:
                    array = (Comparison * max(len(args), 1))(
                        *(
                            Comparison(
                                one["index"],
                                OPERATORS[one["op"].removeprefix("SCMP_CMP_")],
                                one["value"],
                                one.get("valueTwo", 0),
                            )
                            for one in args
                        )
                    )
                    failed = library.seccomp_rule_add_array(
                        context, action, number, len(args), ctypes.byref(array)
                    )
                    if failed:
                        raise NotCompiledError(os.strerror(-failed))
        with os.fdopen(os.memfd_create("bpf"), "w+b") as file:
            assert library.seccomp_export_bpf(context, file.fileno()) == 0
            file.seek(0)
            return list(struct.iter_unpack("=HBBI", file.read()))
    finally:
        library.seccomp_release(context)


def outcome(program: Sequence[tuple[int, int, int, int]], call: str, *args: int) -> int:
    """What the kernel makes of a call (net/core/filter.c, for what libseccomp emits)."""
    library = libseccomp()
    number = library.seccomp_syscall_resolve_name(call.encode())
    padded = (*args, 0, 0, 0, 0, 0, 0)[:6]
    data = struct.pack("=iIQ6Q", number, library.seccomp_arch_native(), 0, *padded)
    at = accumulator = 0
    while True:
        code, yes, no, k = program[at]
        at += 1
        if code == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif code == 0x54:
            accumulator &= k
        elif code == 0x05:
            at += k
        elif code == 0x06:
            return k
        else:
            tests = {
                0x15: accumulator == k,
                0x25: accumulator > k,
                0x35: accumulator >= k,
                0x45: bool(accumulator & k),
            }
            at += yes if tests[code] else no


def matches(condition: Mapping[str, Any], args: Sequence[int]) -> bool:
    have: int = args[condition["index"]]
    value: int = condition["value"]
    second: int = condition.get("valueTwo", 0)
    return {
        "NE": have != value,
        "LT": have < value,
        "LE": have <= value,
        "EQ": have == value,
        "GE": have >= value,
        "GT": have > value,
        "MASKED_EQ": have & value == second & value,
    }[condition["op"].removeprefix("SCMP_CMP_")]


def meant(found: Profile, args: Sequence[int]) -> set[int]:
    """The actions that a profile's rules say for a call of socket(2)."""
    return {
        action_of(entry["action"], entry.get("errnoRet"))
        for entry in found["syscalls"]
        if "socket" in entry["names"]
        and any(all(matches(one, args) for one in some) for some in alternatives(entry))
    } or {action_of(found["defaultAction"], found.get("defaultErrnoRet"))}


def calls(*profiles: Profile) -> Iterable[tuple[int, int, int]]:
    """Calls of socket(2) around every number that the profiles name."""
    numbers: dict[int, set[int]] = {0: {1, 2, 10, 16}, 1: {1}, 2: {0, 6, 400, 2**31, IPPROTO_MPTCP}}
    for found in profiles:
        for entry in found["syscalls"]:
            for one in entry.get("args", []) if "socket" in entry["names"] else []:
                value = one["valueTwo"] if one["op"].endswith("MASKED_EQ") else one["value"]
                numbers[one["index"]] |= {max(value - 1, 0), value, value + 1}
    return [(a, b, c) for a in numbers[0] for b in numbers[1] for c in numbers[2]]


def permissive(action: int) -> bool:
    return action >= 0x7FF00000


def compare(before: Profile, after: Profile) -> None:
    """Assert that exactly the calls meant are refused, with libseccomp's own reading of both."""
    old, new = compiled(before), compiled(after)
    for args in calls(before, after):
        had, has = outcome(old, "socket", *args), outcome(new, "socket", *args)
        if args[2] == IPPROTO_MPTCP and permissive(had):
            assert has == REFUSED, args
        elif before["defaultAction"] == ALLOW and args[2] == IPPROTO_MPTCP:
            assert has in (had, REFUSED), args  # which errno wins is libseccomp's choice
        else:
            assert has == had, args
    for call in IO_URING_CALLS:
        had, has = outcome(old, call), outcome(new, call)
        assert has == (ABSENT if permissive(had) else had)


@pytest.mark.parametrize("name", IN_USE)
def test_profiles_in_use(name: str) -> None:
    before = IN_USE[name]
    untouched_input = copy.deepcopy(before)
    found = harden(before, "x86_64")
    assert before == untouched_input
    assert found.untouched == ()
    compare(before, found.profile)


def test_what_podman_allows_without_the_audit_capability_stays_allowed() -> None:
    program = compiled(harden(IN_USE["Podman without CAP_AUDIT_WRITE"], "x86_64").profile)
    assert outcome(program, "socket", 16, 3, 9) == ACTIONS[ERRNO] | 22
    assert outcome(program, "socket", 16, 3, 0) == ACTIONS[ALLOW]
    assert outcome(program, "socket", 2, 1, 9) == ACTIONS[ALLOW]
    assert outcome(program, "socket", 40, 1, 0) == ACTIONS[ALLOW]
    assert outcome(program, "socket", 2, 1, IPPROTO_MPTCP) == REFUSED
    assert outcome(program, "socket", 2, 1, IPPROTO_MPTCP + 1) == ACTIONS[ALLOW]


@pytest.mark.parametrize("name", IN_USE)
def test_a_second_time_changes_nothing(name: str) -> None:
    once = harden(IN_USE[name], "x86_64")
    assert harden(once.profile, "x86_64") == once


def test_other_calls_and_members_stay() -> None:
    before = {
        **profile(ERRNO, rule(ALLOW, names=["read", "socket", "io_uring_enter", "write"])),
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG"],
        "listenerPath": "/x",
    }
    after = harden(before, "aarch64").profile
    assert after["syscalls"][0] == rule(ALLOW, names=["read", "write"])
    assert all(
        set(entry["names"]) <= {"socket", "io_uring_enter"} for entry in after["syscalls"][1:]
    )
    assert {**after, "syscalls": before["syscalls"]} == before


def test_what_is_refused_already_is_refused_in_the_same_way() -> None:
    before = profile(
        KILL,
        {**rule(ERRNO, names=IO_URING_CALLS), "errnoRet": errno.EPERM},
        rule(ALLOW, arg(2, "EQ", 0)),
        rule(ALLOW, arg(0, "EQ", 1), arg(2, "LT", 200)),
    )
    assert harden(before, "x86_64").profile == before


@pytest.mark.parametrize(
    ("machine", "architectures"),
    [
        ("x86_64", ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]),
        ("aarch64", ["SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"]),
        ("riscv64", None),
    ],
)
def test_an_unconfined_container(machine: str, architectures: list[str] | None) -> None:
    found = harden(None, machine)
    assert found.untouched == ()
    assert found.profile.get("architectures") == architectures
    compare(profile(ALLOW), found.profile)


@pytest.mark.parametrize(
    "rules",
    [
        # Contradictions, which libseccomp settles in its own way.
        [rule(ALLOW), rule(KILL, arg(0, "EQ", 40))],
        [rule(ALLOW, arg(0, "NE", 40)), rule(LOG, arg(0, "EQ", 2))],
        # Beside these libseccomp 2.5.4 loops for ever, drops rules or reads the wrong argument.
        [rule(ALLOW, arg(0, "GT", 2)), rule(ALLOW, arg(0, "GT", 2), arg(2, "GT", 262))],
        [rule(ALLOW, arg(0, "NE", 40)), rule(ALLOW, arg(0, "NE", 10), arg(2, "EQ", 263))],
        [rule(ALLOW, arg(0, "NE", 16)), rule(ALLOW, arg(0, "NE", 10), arg(1, "LT", 10))],
        # Not known to the specification.
        [rule(ALLOW, arg(0, "??", 1))],
        [rule(ALLOW, {"index": 0})],
    ],
)
def test_entangled_rules_are_left_alone_and_reported(rules: list[dict[str, Any]]) -> None:
    before = profile(ERRNO, *rules, rule(ALLOW, names=IO_URING_CALLS))
    found = harden(before, "x86_64")
    assert found.untouched == ("socket",)
    assert found.profile["syscalls"][: len(rules)] == rules
    assert all(entry["action"] == ERRNO for entry in found.profile["syscalls"][len(rules) :])


numbers = {0: [2, 10, 16, 38, 40], 1: [1, 2], 2: [0, 6, 9, 255, 261, 262, 263, 300, 1000, 2**31]}


@st.composite
def conditions(draw: st.DrawFn, index: int) -> dict[str, Any]:
    op = draw(st.sampled_from(["EQ", "NE", "LT", "LE", "GE", "GT", "MASKED_EQ"]))
    value = draw(st.sampled_from(numbers[index]))
    if op != "MASKED_EQ":
        return arg(index, op, value)
    mask = draw(st.sampled_from([0xFF, 0x106, 0xF, 0xFFFFFFFF]))
    return arg(index, op, mask, value & mask)


@st.composite
def rules(draw: st.DrawFn, default: str) -> dict[str, Any]:
    action = draw(st.sampled_from([one for one in ACTIONS if one != default] + [ERRNO]))
    indices = draw(st.sampled_from([[], [0], [0], [2], [0, 2], [1], [2, 2]]))
    return rule(action, *(draw(conditions(index)) for index in indices))


@st.composite
def profiles(draw: st.DrawFn) -> Profile:
    default = draw(st.sampled_from([ALLOW, ERRNO, ERRNO, KILL]))
    found = draw(st.lists(rules(default), max_size=3))
    if draw(st.booleans()):
        number, family = draw(st.sampled_from(numbers[2])), draw(st.sampled_from(numbers[0]))
        found += [
            {**rule(ERRNO, arg(0, "EQ", family), arg(2, "EQ", number)), "errnoRet": 22},
            rule(ALLOW, arg(2, "NE", number)),
            rule(ALLOW, arg(0, "NE", family)),
        ]
    return profile(default, *draw(st.permutations(found)), number=38 if default == ERRNO else None)


@settings(derandomize=True, deadline=None, max_examples=400)
@given(profiles())
def test_any_profile_is_as_strict_as_before_or_left_alone(before: Profile) -> None:
    found = harden(before, "x86_64")
    if "socket" in found.untouched:
        own = [entry for entry in found.profile["syscalls"] if "socket" in entry["names"]]
        assert own == before["syscalls"]
        return
    # What libseccomp itself gets wrong, or does not take, is no measure.
    try:
        program = compiled(before)
    except NotCompiledError:
        assume(False)
    assume(all({outcome(program, "socket", *a)} == meant(before, a) for a in calls(before)))
    compare(before, found.profile)
