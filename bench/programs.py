"""eBPF programs as the benchmarks need them: one that does nothing, and the time that a run of one takes.

Called by :mod:`bench.tracking`. The kernel runs a loaded program on a given packet as often as it is told
(BPF_PROG_TEST_RUN of bpf(2)) and says how long each run took; no packet passes anywhere. Goes through libbpf
as :mod:`architect.adapters.bpf` does. Source: <bpf/bpf.h>, <linux/bpf.h>.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_void_p
from typing import Final, NamedTuple

PASS: Final = 0xFFFFFFFF
"""TC_ACT_UNSPEC, as an unsigned number: the filters after this one decide."""
_SCHED_CLS: Final = 3
"""BPF_PROG_TYPE_SCHED_CLS."""
_INSTRUCTION: Final = struct.Struct("=BBhi")
_EMPTY: Final = _INSTRUCTION.pack(0xB7, 0, 0, -1) + _INSTRUCTION.pack(0x95, 0, 0, 0)
"""``return TC_ACT_UNSPEC``: r0 = -1; exit."""
_CONTEXT: Final = struct.Struct("=40xI")
"""struct __sk_buff, up to and with ``ifindex``."""


class _Options(ctypes.Structure):
    """struct bpf_test_run_opts."""

    _fields_ = (
        ("sz", c_size_t),
        ("data_in", c_char_p),
        ("data_out", c_void_p),
        ("data_size_in", c_uint32),
        ("data_size_out", c_uint32),
        ("ctx_in", c_char_p),
        ("ctx_out", c_void_p),
        ("ctx_size_in", c_uint32),
        ("ctx_size_out", c_uint32),
        ("retval", c_uint32),
        ("repeat", c_int),
        ("duration", c_uint32),
        ("flags", c_uint32),
        ("cpu", c_uint32),
        ("batch_size", c_uint32),
    )


class Run(NamedTuple):
    """What a program answered, and how long it took."""

    verdict: int
    ns: int
    """The mean of all runs, with the kernel's own loop around them."""


@functools.cache
def _libbpf() -> ctypes.CDLL:
    library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    library.bpf_prog_load.argtypes = [c_int, c_char_p, c_char_p, c_char_p, c_size_t, c_void_p]
    library.bpf_prog_test_run_opts.argtypes = [c_int, POINTER(_Options)]
    return library


def empty() -> int:
    """Loads a classifier that lets every packet pass; returns its descriptor. Raises OSError."""
    count = len(_EMPTY) // _INSTRUCTION.size
    found = int(_libbpf().bpf_prog_load(_SCHED_CLS, b"empty", b"Apache-2.0", _EMPTY, count, None))
    if found < 0:
        raise OSError(-found, f"the empty program: {os.strerror(-found)}")
    return found


def run(program: int, frame: bytes, interface: int, repeat: int) -> Run:
    """Runs a classifier on a frame that came in on an interface of the thread's network namespace.

    Raises OSError.
    """
    context = _CONTEXT.pack(interface)
    options = _Options(
        sz=ctypes.sizeof(_Options),
        data_in=frame,
        data_size_in=len(frame),
        ctx_in=context,
        ctx_size_in=len(context),
        repeat=repeat,
    )
    result = _libbpf().bpf_prog_test_run_opts(program, ctypes.byref(options))
    if result:
        raise OSError(-result, f"BPF_PROG_TEST_RUN: {os.strerror(-result)}")
    return Run(options.retval, options.duration)
