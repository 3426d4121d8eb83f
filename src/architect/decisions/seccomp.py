"""Seccomp rules that keep a container's program away from what CRIU cannot checkpoint.

CRIU 4 refuses a process that holds an io_uring ring or a Multipath TCP socket. Programs that use
them (Node.js, Go from 1.24 on) fall back by themselves when the kernel does not have them, so the
container's profile is made to answer as such a kernel would: ENOSYS for the io_uring calls,
EPROTONOSUPPORT for ``socket(…, IPPROTO_MPTCP)``. Called by ``decisions.admission``.

The profile is never loosened: each rule that lets such a call through is split in two, one for all
other calls with the rule's own action, one for just these calls with an errno. What the profile
refuses already, it goes on refusing in its own way. Where that cannot be had, the rules of the call
stay as they are, and the caller is told.

How the rules are written is decided by runc and libseccomp (2.5.4 was tried):

- A rule's conditions are ANDed and may name each argument once. runc (``matchCall``) and crun take
  a rule that names one twice as several rules of one condition each, ORed. So "not 9 and not 262"
  cannot be written as two conditions; it becomes the ranges 0..8, 10..261 and 263.., and a range
  with two ends becomes aligned blocks, each a masked comparison.
- A filter is the union of its rules (seccomp_rule_add(3)). Which of two overlapping rules with
  different actions wins depends on how libseccomp sorts them, and some such pairs it refuses.
- libseccomp makes a tree, one level an argument. When a call matches a node but nothing below it,
  the node's next sibling may be compared with the wrong argument; a rule may vanish when a more
  general one repeats its last condition; and some ranges under a common node make it loop for ever.
  So both halves of a split rule repeat its other conditions word for word: they share the node, and
  below it every protocol matches. Ranges are used without other conditions only.
- Masks and values are cut to their lower half for 32-bit architectures, so a condition that looks
  at the upper half only would hold always there. None is written.

Hence only the shapes that profiles in use have are treated (``_split_socket``), and a profile whose
rules for a call overlap with different actions is not. The tests compile the results with the
libseccomp of the machine and compare every outcome.

Out of reach, as for every profile: 32-bit x86 programs that open sockets through socketcall(2),
whose arguments lie in memory. They get their Multipath TCP socket, and the dump fails as before.
"""

import errno
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Profile = Mapping[str, Any]
"""``linux.seccomp`` of an OCI runtime specification."""
Condition = Mapping[str, Any]
"""One entry of a rule's ``args``: index, value, valueTwo, op."""

IO_URING_CALLS = ("io_uring_setup", "io_uring_enter", "io_uring_register")
IPPROTO_MPTCP = 262
"""linux/in.h"""
_PROTOCOL = 2
"""Index of socket(2)'s protocol among its arguments."""

_ERRNO = "SCMP_ACT_ERRNO"
_EQ = "SCMP_CMP_EQ"
_NE = "SCMP_CMP_NE"
_PERMISSIVE = frozenset(
    {
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_LOG",
        "SCMP_ACT_TRACE",
        "SCMP_ACT_NOTIFY",  # the supervisor may let the call continue
    }
)
"""The actions that seccomp(2) ranks below an errno: a call may get through."""

_ARCHITECTURES = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
"""By uname(2)'s machine: what to name in a new profile; calls of any other would kill."""

_OPERATORS = tuple(f"SCMP_CMP_{name}" for name in ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"))

_LOW = (1 << 32) - 1
_TOP = (1 << 64) - 1


class _InexpressibleError(Exception):
    """The rules needed have no form that libseccomp is known to take as it is meant."""


@dataclass(frozen=True, slots=True)
class Hardened:
    """A profile after the treatment."""

    profile: dict[str, Any]
    """The new ``linux.seccomp``."""
    untouched: tuple[str, ...]
    """Calls whose rules could not be split safely, and so are as they were."""


@dataclass(frozen=True, slots=True)
class _Mask:
    """The numbers that agree with ``value`` in the bits of ``mask``."""

    mask: int
    value: int


_Ranges = tuple[tuple[int, int], ...]
"""A set of numbers: sorted inclusive ranges that do not touch."""
_Values = _Ranges | _Mask
_ALL: _Ranges = ((0, _TOP),)


@dataclass(frozen=True, slots=True)
class _Rule:
    """One rule of one call, as libseccomp gets it."""

    action: str
    errno: int
    args: tuple[Condition, ...]
    """ANDed, each of another argument."""
    entry: Mapping[str, Any]
    """The entry of the profile from which it comes."""

    def part(self, args: Sequence[Condition]) -> dict[str, Any]:
        """Return an entry for part of what it matches, with the same action."""
        return {**self.entry, "names": ["socket"], "args": list(args)}

    def values(self, index: int) -> _Values:
        """Return the values of an argument that it matches."""
        return next((_values(arg) for arg in self.args if arg["index"] == index), _ALL)


def harden(profile: Profile | None, machine: str) -> Hardened:
    """Return ``profile`` with io_uring and Multipath TCP refused, everything else as it was.

    None stands for an unconfined container, which gets a profile that refuses just these.
    ``machine`` is uname(2)'s, as in ``platform.machine()``.
    """
    if profile is None:
        new: dict[str, Any] = {"defaultAction": "SCMP_ACT_ALLOW"}
        if machine in _ARCHITECTURES:
            new["architectures"] = list(_ARCHITECTURES[machine])
    else:
        new = dict(profile)
    untouched = []
    found = new.get("syscalls")
    entries: list[Any] = found if isinstance(found, list) else []
    for call in (*IO_URING_CALLS, "socket"):
        try:
            entries = _refuse(entries, new, call)
        except _InexpressibleError:
            untouched.append(call)
    new["syscalls"] = entries
    return Hardened(new, tuple(untouched))


def _refuse(entries: list[Any], profile: Profile, call: str) -> list[Any]:
    """Return the profile's ``entries`` with what is to be refused of ``call`` refused."""
    default = str(profile.get("defaultAction"))
    rules = _effective(entries, call, default, _errno_of(default, profile.get("defaultErrnoRet")))
    permissive = [rule for rule in rules if rule.action in _PERMISSIVE]
    if default in _PERMISSIVE and not _needs_refusal(rules, call):
        return entries
    _require_unambiguous(rules)
    if default in _PERMISSIVE:
        if permissive:
            raise _InexpressibleError  # beside these the refusal would be the more general one
        parts = [_refusal(call, [_protocol(IPPROTO_MPTCP)] if call == "socket" else [])]
    elif call == "socket":
        if not any(_admits(rule.values(_PROTOCOL), IPPROTO_MPTCP) for rule in permissive):
            return entries
        _require_plain(rules)
        parts = _split_socket(permissive)
    else:
        parts = [_refusal(call, rule.args) for rule in permissive]
    split = {id(rule.entry) for rule in permissive}
    new: list[Any] = []
    for entry in entries:
        if id(entry) not in split:
            new.append(entry)
        elif others := [name for name in _names(entry) if name != call]:
            new.append({**entry, "names": others})
    # Profiles repeat rules, and libseccomp would take the memory for each.
    return new + [part for i, part in enumerate(parts) if part not in parts[:i]]


def _split_socket(rules: Sequence[_Rule]) -> list[dict[str, Any]]:
    """Return entries that let through what ``rules`` do, but for Multipath TCP, which they refuse.

    The shapes: one rule without conditions; rules with conditions on other arguments than the
    protocol; beside these, one that admits all protocols but one (the audit rules of Podman).
    """
    general = [rule for rule in rules if not rule.args]
    if general:
        rules = general[:1]  # unambiguous, so of one action: the others add nothing to it
    parts: list[dict[str, Any]] = []
    but_one: dict[int, _Rule] = {}
    for rule in rules:
        own = next((arg for arg in rule.args if arg["index"] == _PROTOCOL), None)
        if own is None:
            parts.append(rule.part([*rule.args, _protocol(IPPROTO_MPTCP, _NE)]))
            parts.append(_refusal("socket", [*rule.args, _protocol(IPPROTO_MPTCP)]))
        elif not _admits(_values(own), IPPROTO_MPTCP):
            parts.append(rule.part(rule.args))
        elif len(rule.args) == 1 and own["op"] == _NE and own.get("value", 0) < _LOW:
            but_one.setdefault(own.get("value", 0), rule)
        else:
            raise _InexpressibleError
    # The general ones come last: libseccomp drops more of a rule than it should if it repeats a
    # condition of one that is there already.
    if len(but_one) > 1:
        raise _InexpressibleError
    for number, rule in but_one.items():
        parts += [rule.part([piece]) for piece in _all_but(number, IPPROTO_MPTCP)]
        parts.append(_refusal("socket", [_protocol(IPPROTO_MPTCP)]))
    return parts


def _refusal(call: str, args: Sequence[Condition]) -> dict[str, Any]:
    number = errno.EPROTONOSUPPORT if call == "socket" else errno.ENOSYS
    found: dict[str, Any] = {"names": [call], "action": _ERRNO, "errnoRet": number}
    return {**found, "args": list(args)} if args else found


def _effective(entries: Sequence[Any], call: str, default: str, default_errno: int) -> list[_Rule]:
    """Return the rules of ``call`` that runc hands on: not those that say what the default says."""
    found = []
    for entry in entries:
        if call in _names(entry):
            action = str(entry.get("action"))
            number = _errno_of(action, entry.get("errnoRet"))
            if (action, number) != (default, default_errno):
                found += [
                    _Rule(action, number, args, entry) for args in _alternatives(entry.get("args"))
                ]
    return found


def _names(entry: object) -> list[Any]:
    names = entry.get("names") if isinstance(entry, Mapping) else None
    return names if isinstance(names, list) else []


def _errno_of(action: str, number: object) -> int:
    if action not in (_ERRNO, "SCMP_ACT_TRACE"):
        return 0
    return number if isinstance(number, int) else errno.EPERM


def _alternatives(args: object) -> list[tuple[Condition, ...]]:
    """Return the conditions of the rules that runc makes of one entry."""
    if not args:
        return [()]
    if not isinstance(args, list) or not all(map(_well_formed, args)):
        raise _InexpressibleError  # runc will say what is wrong
    if len({arg["index"] for arg in args}) < len(args):
        return [(arg,) for arg in args]
    return [tuple(args)]


def _well_formed(arg: object) -> bool:
    return (
        isinstance(arg, Mapping)
        and arg.get("op") in _OPERATORS
        and all(
            isinstance(number, int) and 0 <= number <= _TOP
            for number in (arg.get("index"), arg.get("value", 0), arg.get("valueTwo", 0))
        )
    )


def _values(arg: Condition) -> _Values:
    """Return the values that a condition admits (comparisons are of unsigned 64-bit numbers)."""
    value: int = arg.get("value", 0)
    match arg.get("op"):
        case "SCMP_CMP_EQ":
            return ((value, value),)
        case "SCMP_CMP_NE":
            return _complement(((value, value),))
        case "SCMP_CMP_LT":
            return ((0, value - 1),) if value else ()
        case "SCMP_CMP_LE":
            return ((0, value),)
        case "SCMP_CMP_GE":
            return ((value, _TOP),)
        case "SCMP_CMP_GT":
            return ((value + 1, _TOP),) if value < _TOP else ()
        case _:  # SCMP_CMP_MASKED_EQ
            return _Mask(value, arg.get("valueTwo", 0) & value)


def _complement(ranges: _Ranges) -> _Ranges:
    found, start = [], 0
    for low, high in ranges:
        if start < low:
            found.append((start, low - 1))
        start = high + 1
    if start <= _TOP:
        found.append((start, _TOP))
    return tuple(found)


def _intersection(a: _Ranges, b: _Ranges) -> _Ranges:
    pairs = ((max(al, bl), min(ah, bh)) for al, ah in a for bl, bh in b)
    return tuple((low, high) for low, high in pairs if low <= high)


def _admits(values: _Values, number: int) -> bool:
    if isinstance(values, _Mask):
        return number & values.mask == values.value
    return any(low <= number <= high for low, high in values)


def _disjoint(a: _Values, b: _Values) -> bool:
    """Whether no number is in both; False where a mask and a range leave that open."""
    if isinstance(a, _Mask) and isinstance(b, _Mask):
        return bool((a.value ^ b.value) & a.mask & b.mask)
    if isinstance(a, _Mask) or isinstance(b, _Mask):
        for one, other in ((a, b), (b, a)):
            if not isinstance(one, _Mask) and all(low == high for low, high in one):
                return not any(_admits(other, low) for low, _ in one)
        return False
    return not _intersection(a, b)


def _require_unambiguous(rules: Sequence[_Rule]) -> None:
    """Give up on rules that overlap although their actions differ."""
    for i, rule in enumerate(rules):
        for other in rules[:i]:
            if (rule.action, rule.errno) != (other.action, other.errno) and not any(
                _disjoint(_values(arg), other.values(arg["index"])) for arg in rule.args
            ):
                raise _InexpressibleError


def _require_plain(rules: Sequence[_Rule]) -> None:
    """Give up on rules beside which libseccomp would not take ours as they are meant.

    Found by trial to work: nothing about Multipath TCP itself, and conditions on one other argument
    only. If some of these have a protocol of their own, all must test for the same number, so that
    its node has no siblings.
    """
    protocols = [(rule, arg) for rule in rules for arg in rule.args if arg["index"] == _PROTOCOL]
    others = [arg for rule in rules for arg in rule.args if arg["index"] != _PROTOCOL]
    nested = [arg for rule, arg in protocols if len(rule.args) > 1]
    if (
        any(arg.get("value", 0) == IPPROTO_MPTCP for _, arg in protocols)
        or len({arg["index"] for arg in others}) > 1
        or (nested and len({arg.get("value", 0) for arg in others}) > 1)
        or (nested and any(arg["op"] not in (_EQ, _NE) for arg in (*nested, *others)))
    ):
        raise _InexpressibleError


def _needs_refusal(rules: Sequence[_Rule], call: str) -> bool:
    """Whether a permissive default lets calls through that are to be refused."""
    wanted = ((IPPROTO_MPTCP, IPPROTO_MPTCP),) if call == "socket" else _ALL
    for rule in rules:
        if rule.action in _PERMISSIVE or _disjoint(rule.values(_PROTOCOL), wanted):
            continue
        if rule.action != _ERRNO:
            raise _InexpressibleError  # the refusal would overlap something stricter
        if not rule.args or (
            call == "socket" and {arg["index"] for arg in rule.args} == {_PROTOCOL}
        ):
            return False  # all of them are refused already
        if any(arg["index"] == _PROTOCOL for arg in rule.args) and call == "socket":
            raise _InexpressibleError  # libseccomp refuses the same condition at two levels
    return True


def _protocol(number: int, op: str = _EQ) -> Condition:
    return {"index": _PROTOCOL, "value": number, "op": op}


def _all_but(*numbers: int) -> list[Condition]:
    """Return conditions that together admit all protocols but two different ones."""
    low, high = sorted(numbers)
    found: list[Condition] = [_protocol(low - 1, "SCMP_CMP_LE")] if low else []
    found += _blocks(low + 1, high - 1)
    return [*found, _protocol(high + 1, "SCMP_CMP_GE")]


def _blocks(low: int, high: int) -> list[Condition]:
    """Return masked comparisons for the fewest aligned power-of-two blocks that make low..high."""
    found: list[Condition] = []
    while low <= high:
        size = low & -low if low else _LOW + 1
        while low + size - 1 > high:
            size >>= 1
        mask = _TOP ^ (size - 1)
        found.append({**_protocol(mask, "SCMP_CMP_MASKED_EQ"), "valueTwo": low})
        low += size
    return found
