"""What we need of libbpf: programs, maps and filters at interfaces that outlive us.

Called by the gate. Goes through ctypes to libbpf.so.1 (Debian: libbpf1, half a
megabyte) because the Python packages for eBPF bring LLVM, kernel headers and
over 100 MB. Objects are compiled beforehand (native/bpf).

Return values are libbpf 1.x's: a negative error number, or NULL with errno set.
Sources: <bpf/libbpf.h>, <bpf/bpf.h>, <linux/bpf.h>.
"""

import ctypes
import functools
import os
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint32, c_uint64, c_void_p
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

_BPF_FS_MAGIC = 0xCAFE4A11
_BPF_TC_INGRESS = 1
_BPF_TC_EGRESS = 2
_BPF_TC_F_REPLACE = 1
_BPF_TCX_INGRESS = 46
_BPF_TCX_EGRESS = 47
_BPF_LINK_TYPE_TCX = 11
_ENOENT = 2
_EEXIST = 17
_ENODEV = 19
_EINVAL = 22

Key = TypeVar("Key", int, bytes)

_libc = ctypes.CDLL(None, use_errno=True)
_PrintFunction = ctypes.CFUNCTYPE(c_int, c_int, c_char_p, c_void_p)


class BpfError(Exception):
    """An eBPF operation failed; the message says which, and libbpf's words."""


class BpfUnavailableError(BpfError):
    """libbpf.so.1 is not installed."""


class BpfLoadError(BpfError):
    """The kernel or libbpf refused an object file."""


class MapFullError(BpfError):
    """A map has no room for one more key."""


class InterfaceGoneError(BpfError):
    """The network interface vanished before a filter could be attached."""


class _TcHook(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("ifindex", c_int),
        ("attach_point", c_int),
        ("parent", c_uint32),
    )


class _TcOptions(ctypes.Structure):
    _fields_ = (
        ("sz", c_size_t),
        ("prog_fd", c_int),
        ("flags", c_uint32),
        ("prog_id", c_uint32),
        ("handle", c_uint32),
        ("priority", c_uint32),
    )


class _Log(threading.local):
    """libbpf's messages since the operation began: its return codes say too little."""

    def __init__(self) -> None:
        self.lines: list[str] = []


_log = _Log()


def _collect(level: int, pattern: bytes, arguments: int) -> int:
    if level <= 1:  # LIBBPF_WARN, LIBBPF_INFO
        text = ctypes.create_string_buffer(16384)
        # A va_list argument is passed as a pointer on x86-64 and arm64 alike.
        _libc.vsnprintf(text, c_size_t(len(text)), c_char_p(pattern), c_void_p(arguments))
        _log.lines.append(text.value.decode(errors="replace").rstrip())
    return 0


_collector = _PrintFunction(_collect)  # libbpf keeps the pointer: it must live on


@functools.cache
def _libbpf() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise BpfUnavailableError(
            "libbpf.so.1 cannot be loaded; install libbpf 1.x (Debian: libbpf1)"
        ) from error
    signatures: Mapping[str, tuple[Any, Sequence[Any]]] = {
        "libbpf_set_print": (c_void_p, [_PrintFunction]),
        "bpf_object__open_file": (c_void_p, [c_char_p, c_void_p]),
        "bpf_object__load": (c_int, [c_void_p]),
        "bpf_object__close": (None, [c_void_p]),
        "bpf_object__find_map_by_name": (c_void_p, [c_void_p, c_char_p]),
        "bpf_object__find_program_by_name": (c_void_p, [c_void_p, c_char_p]),
        "bpf_map__set_pin_path": (c_int, [c_void_p, c_char_p]),
        "bpf_program__fd": (c_int, [c_void_p]),
        "bpf_obj_get": (c_int, [c_char_p]),
        "bpf_obj_pin": (c_int, [c_int, c_char_p]),
        "bpf_obj_get_info_by_fd": (c_int, [c_int, c_void_p, POINTER(c_uint32)]),
        "bpf_map_lookup_elem": (c_int, [c_int, c_char_p, c_void_p]),
        "bpf_map_update_elem": (c_int, [c_int, c_char_p, c_char_p, c_uint64]),
        "bpf_map_delete_elem": (c_int, [c_int, c_char_p]),
        "libbpf_num_possible_cpus": (c_int, []),
        "bpf_map_get_next_key": (c_int, [c_int, c_char_p, c_void_p]),
        "bpf_prog_query": (
            c_int,
            [c_int, c_int, c_uint32, c_void_p, c_void_p, POINTER(c_uint32)],
        ),
        "bpf_link_create": (c_int, [c_int, c_int, c_int, c_void_p]),
        "bpf_link_detach": (c_int, [c_int]),
        "bpf_link_update": (c_int, [c_int, c_int, c_void_p]),
        "bpf_tc_hook_create": (c_int, [POINTER(_TcHook)]),
        "bpf_tc_attach": (c_int, [POINTER(_TcHook), POINTER(_TcOptions)]),
        "bpf_tc_detach": (c_int, [POINTER(_TcHook), POINTER(_TcOptions)]),
        "bpf_tc_query": (c_int, [POINTER(_TcHook), POINTER(_TcOptions)]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(library, name)
        function.restype = result
        function.argtypes = arguments
    library.libbpf_set_print(_collector)
    return library


def _failed(
    what: str, number: int, kind: Callable[[str], BpfError] = BpfError, advice: str = ""
) -> BpfError:
    said = f" (libbpf: {'; '.join(_log.lines)})" if _log.lines else ""
    error = kind(f"{what}: {os.strerror(number)}{said}{'; ' if advice else ''}{advice}")
    error.__cause__ = OSError(number, os.strerror(number))
    return error


def is_bpffs(path: Path) -> bool:
    """Whether a path lies on a bpf file system (statfs(2))."""
    answer = (c_uint64 * 32)()
    return _libc.statfs(os.fsencode(path), answer) == 0 and answer[0] == _BPF_FS_MAGIC


def ensure_bpffs(path: Path) -> None:
    """Mount a bpf file system on a directory, made if needed, unless one is there.

    Maps and programs pinned below it outlive the daemon. Raises BpfError.
    """
    if is_bpffs(path):
        return
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise BpfError(f"cannot make {path} for the bpf file system") from error
    if _libc.mount(b"bpf", os.fsencode(path), b"bpf", c_uint64(0), b"mode=0700"):
        _log.lines.clear()
        raise _failed(
            f"cannot mount the bpf file system on {path}",
            ctypes.get_errno(),
            advice="it takes CAP_SYS_ADMIN and a kernel with CONFIG_BPF_SYSCALL",
        )


def load(program: Path, maps: Mapping[str, Path], pins: Mapping[str, Path]) -> None:
    """Load an object file; pin its programs and maps where the mappings say.

    A map that is pinned already is used as it is, with its contents; it must
    have the object's layout. Raises BpfLoadError.
    """
    library = _libbpf()
    _log.lines.clear()
    handle = library.bpf_object__open_file(os.fsencode(program), None)
    if not handle:
        raise _failed(f"cannot read {program}", ctypes.get_errno(), BpfLoadError, "rebuild it")
    try:
        for name, path in maps.items():
            found = library.bpf_object__find_map_by_name(handle, name.encode())
            if not found:
                raise BpfLoadError(f"{program} has no map {name!r}; it is of another version")
            if result := library.bpf_map__set_pin_path(found, os.fsencode(path)):
                raise _failed(f"cannot set the pin of map {name!r}", -result, BpfLoadError)
        if result := library.bpf_object__load(handle):
            raise _failed(f"cannot load {program}", -result, BpfLoadError)
        for name, path in pins.items():
            found = library.bpf_object__find_program_by_name(handle, name.encode())
            if not found:
                raise BpfLoadError(f"{program} has no program {name!r}; it is of another version")
            pin(library.bpf_program__fd(found), path)
    finally:
        library.bpf_object__close(handle)


def pin(descriptor: int, path: Path) -> None:
    """Give a map or program a name on a bpf file system. Raises BpfError."""
    _log.lines.clear()
    if result := _libbpf().bpf_obj_pin(descriptor, os.fsencode(path)):
        raise _failed(
            f"cannot pin {path}", -result, advice="is its directory on a bpf file system?"
        )


def open_pinned(path: Path) -> int:
    """Return a descriptor of a pinned map or program. Raises BpfError."""
    _log.lines.clear()
    descriptor = int(_libbpf().bpf_obj_get(os.fsencode(path)))
    if descriptor < 0:
        raise _failed(f"cannot open {path}", -descriptor)
    return descriptor


def program_id(descriptor: int) -> int:
    """Return the kernel's number of a loaded program. Raises BpfError."""
    info = ctypes.create_string_buffer(256)  # struct bpf_prog_info: type, id, …
    size = c_uint32(len(info))
    _log.lines.clear()
    if result := _libbpf().bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size)):
        raise _failed("cannot ask for a program's id", -result)
    return int(struct.unpack_from("=II", info)[1])


class Table(Generic[Key]):
    """A map with keys of one field and values of fixed layouts (struct module), by descriptor."""

    def __init__(self, descriptor: int, key: struct.Struct, value: struct.Struct) -> None:
        """Take over a descriptor; `close` gives it back."""
        self.descriptor = descriptor
        self._key = key
        self._value = value
        self._library = _libbpf()

    def __getitem__(self, key: Key) -> tuple[int, ...]:
        """Return a value's fields. Raises KeyError, BpfError."""
        buffer = ctypes.create_string_buffer(self._value.size)
        result = self._library.bpf_map_lookup_elem(self.descriptor, self._key.pack(key), buffer)
        if result == -_ENOENT:
            raise KeyError(key)
        if result:
            _log.lines.clear()
            raise _failed("cannot read a map", -result)
        return self._value.unpack(buffer.raw)

    def __setitem__(self, key: Key, fields: tuple[int, ...]) -> None:
        """Write a value. Raises MapFullError, BpfError."""
        result = self._library.bpf_map_update_elem(
            self.descriptor, self._key.pack(key), self._value.pack(*fields), 0
        )
        if result:
            _log.lines.clear()
            full = result == -7  # E2BIG
            raise _failed("cannot write a map", -result, MapFullError if full else BpfError)

    def __delitem__(self, key: Key) -> None:
        """Remove a key, if it is there. Raises BpfError."""
        result = self._library.bpf_map_delete_elem(self.descriptor, self._key.pack(key))
        if result not in (0, -_ENOENT):
            _log.lines.clear()
            raise _failed("cannot delete from a map", -result)

    def __iter__(self) -> Iterator[Key]:
        """Yield every key; the map must not change meanwhile."""
        key: bytes | None = None
        buffer = ctypes.create_string_buffer(self._key.size)
        while not self._library.bpf_map_get_next_key(self.descriptor, key, buffer):
            key = buffer.raw
            found: Key = self._key.unpack(key)[0]
            yield found

    def close(self) -> None:
        """Close the descriptor; a pinned map lives on."""
        os.close(self.descriptor)


class Map(Table[int]):
    """A map with numbers as keys."""


class PerCpuMap:
    """An array map with a value for each CPU that the machine could have, by descriptor.

    The size of a value must be a multiple of 8 (bpf(2): the kernel pads each CPU's).
    """

    def __init__(self, descriptor: int, key: struct.Struct, value: struct.Struct) -> None:
        """Take over a descriptor."""
        self.descriptor = descriptor
        self._key = key
        self._value = value
        self._library = _libbpf()
        self._size = value.size * self._library.libbpf_num_possible_cpus()

    def __getitem__(self, key: int) -> list[tuple[int, ...]]:
        """Return the fields of each CPU's value. Raises BpfError."""
        buffer = ctypes.create_string_buffer(self._size)
        result = self._library.bpf_map_lookup_elem(self.descriptor, self._key.pack(key), buffer)
        if result:
            _log.lines.clear()
            raise _failed("cannot read a map", -result)
        return list(self._value.iter_unpack(buffer.raw))

    def clear(self, key: int) -> None:
        """Set all values of a key to zeros. Raises BpfError."""
        zeros = bytes(self._size)
        result = self._library.bpf_map_update_elem(self.descriptor, self._key.pack(key), zeros, 0)
        if result:
            _log.lines.clear()
            raise _failed("cannot write a map", -result)


@functools.cache
def has_tcx() -> bool:
    """Whether the kernel has tcx; asked once. Raises BpfUnavailableError."""
    count = c_uint32(0)
    _log.lines.clear()
    # Of lo, which every namespace has under this number; EINVAL: no such kind of attachment.
    return not _libbpf().bpf_prog_query(1, _BPF_TCX_INGRESS, 0, None, None, ctypes.byref(count))


class TcxFilter:
    """A program at the ingress of an interface, by a pinned link (tcx, Linux 6.6).

    Cheaper for each packet than a classifier, and nobody can take it away by
    accident. All methods act in the calling thread's network namespace.
    """

    _hook: ClassVar = _BPF_TCX_INGRESS

    def __init__(self, interface: int, pin: Path) -> None:
        """Name the interface by its index, and the link; nothing is changed yet."""
        self._interface = interface
        self._pin = pin
        self._library = _libbpf()

    def _open(self) -> tuple[int, int] | None:
        """The link's descriptor and its program's id; None if it is of no interface of today."""
        if not self._pin.exists():
            return None
        descriptor = open_pinned(self._pin)
        info = ctypes.create_string_buffer(256)
        size = c_uint32(len(info))
        _log.lines.clear()
        result = self._library.bpf_obj_get_info_by_fd(descriptor, info, ctypes.byref(size))
        # struct bpf_link_info: type, id, prog_id, padding, tcx.ifindex (0: the interface is gone)
        kind, _, program, _, interface = struct.unpack_from("=5I", info)
        if result or kind != _BPF_LINK_TYPE_TCX or interface != self._interface:
            os.close(descriptor)
            return None
        return descriptor, program

    def attached(self) -> int | None:
        """Return the id of the program that is attached here, None without one."""
        found = self._open()
        if found is None:
            return None
        os.close(found[0])
        return found[1]

    def attach(self, descriptor: int) -> None:
        """Attach a program, in place of one that is here.

        Raises InterfaceGoneError, BpfError.
        """
        found = self._open()
        _log.lines.clear()
        if found is not None:
            result = self._library.bpf_link_update(found[0], descriptor, None)
            os.close(found[0])
        else:
            self._pin.unlink(missing_ok=True)
            result = self._library.bpf_link_create(descriptor, self._interface, self._hook, None)
            if result >= 0:
                try:
                    pin(result, self._pin)
                finally:
                    os.close(result)
                return
        if result == -_ENODEV:
            raise _failed(f"interface {self._interface} is gone", -result, kind=InterfaceGoneError)
        if result:
            raise _failed(f"cannot attach to interface {self._interface}", -result)

    def detach(self) -> None:
        """Take the program away, if it is there. Raises BpfError."""
        found = self._open()
        if found is not None:
            # The pin's end alone would take it away some moments later.
            _log.lines.clear()
            result = self._library.bpf_link_detach(found[0])
            os.close(found[0])
            if result:
                raise _failed(f"cannot detach from interface {self._interface}", -result)
        self._pin.unlink(missing_ok=True)


class TcxExitFilter(TcxFilter):
    """The same at the egress."""

    _hook: ClassVar = _BPF_TCX_EGRESS


class IngressFilter:
    """One place for a direct-action filter at the ingress of an interface (tc clsact).

    Handle and priority are ours alone, so that other programs stay where they
    are. All methods act in the calling thread's network namespace.
    """

    _point: ClassVar = _BPF_TC_INGRESS

    def __init__(self, interface: int, *, handle: int, priority: int) -> None:
        """Name the place by the interface's index; nothing is changed yet."""
        self._interface = interface
        self._handle = handle
        self._priority = priority
        self._library = _libbpf()

    def _hook(self) -> _TcHook:
        return _TcHook(sz=ctypes.sizeof(_TcHook), ifindex=self._interface, attach_point=self._point)

    def _options(self, descriptor: int = 0, flags: int = 0) -> _TcOptions:
        return _TcOptions(
            sz=ctypes.sizeof(_TcOptions),
            prog_fd=descriptor,
            flags=flags,
            handle=self._handle,
            priority=self._priority,
        )

    def attached(self) -> int | None:
        """Return the id of the program that is attached here, None without one."""
        hook, options = self._hook(), self._options()
        _log.lines.clear()
        result = self._library.bpf_tc_query(ctypes.byref(hook), ctypes.byref(options))
        # EINVAL: the interface has no clsact qdisc.
        if result in (-_ENOENT, -_EINVAL, -_ENODEV):
            return None
        if result:
            raise _failed(f"cannot ask for the filter of interface {self._interface}", -result)
        return int(options.prog_id)

    def attach(self, descriptor: int) -> None:
        """Attach a program, in place of one that is here.

        Raises InterfaceGoneError, BpfError.
        """
        hook, options = self._hook(), self._options(descriptor, _BPF_TC_F_REPLACE)
        _log.lines.clear()
        result = self._library.bpf_tc_hook_create(ctypes.byref(hook))
        if result in (0, -_EEXIST):
            _log.lines.clear()
            result = self._library.bpf_tc_attach(ctypes.byref(hook), ctypes.byref(options))
        if result == -_ENODEV:
            raise _failed(f"interface {self._interface} is gone", -result, kind=InterfaceGoneError)
        if result:
            raise _failed(
                f"cannot attach to interface {self._interface}",
                -result,
                advice="it takes CAP_NET_ADMIN and a kernel with NET_CLS_BPF and NET_SCH_INGRESS",
            )

    def detach(self) -> None:
        """Take the program away, if it and the interface are there. Raises BpfError."""
        hook, options = self._hook(), self._options()
        _log.lines.clear()
        result = self._library.bpf_tc_detach(ctypes.byref(hook), ctypes.byref(options))
        if result not in (0, -_ENOENT, -_EINVAL, -_ENODEV):
            raise _failed(f"cannot detach from interface {self._interface}", -result)


class EgressFilter(IngressFilter):
    """The same at the egress."""

    _point: ClassVar = _BPF_TC_EGRESS
