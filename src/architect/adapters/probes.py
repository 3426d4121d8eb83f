"""What this machine can do, each thing tried once, and what is lost where it cannot.

Called by `architect check`. A probe tries the thing itself rather than reading a version, cleans up after
itself, and never raises: a refusal is its finding.
"""

from __future__ import annotations

import ctypes
import enum
import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from architect.adapters import criu, hot, netns, rundir
from architect.contract import paths
from architect.contract.errors import ArchitectError

_SYS_USERFAULTFD: Final = 323
_O_CLOEXEC: Final = 0o2000000
_CAP_SYS_ADMIN: Final = 21
_CAP_SYS_RESOURCE: Final = 24
_TIMEOUT_S: Final = 30
NODE_MANIFEST: Final = "manifest.json"
"""In our folder where architect-node has put it on a cluster's node: no Podman is wanted there."""


class Verdict(enum.StrEnum):
    """How a probe went."""

    OK = "ok"
    """There."""
    LESS = "less"
    """Not there; something works less well."""
    FAIL = "FAIL"
    """Not there, and nothing can hibernate without it."""


class Finding(msgspec.Struct, frozen=True):
    """One line of `architect check`."""

    name: str
    verdict: Verdict
    found: str
    without: str
    """What is lost without it, empty if it is there."""


def all_findings() -> list[Finding]:
    """Every probe's finding, in the order of their importance."""
    on_node = (paths.PREFIX / NODE_MANIFEST).exists()
    return [_guarded(probe) for probe in _PROBES if not (on_node and probe is _podman)]


def _guarded(probe: Callable[[], Finding]) -> Finding:
    try:
        return probe()
    except (OSError, subprocess.SubprocessError, ArchitectError, ValueError) as error:
        name = probe.__name__.strip("_").replace("_", " ")
        return Finding(name, Verdict.FAIL, f"the probe failed: {error}", "unknown")


def _finding(name: str, there: bool, found: str, without: str, *, needed: bool) -> Finding:
    if there:
        return Finding(name, Verdict.OK, found, "")
    return Finding(name, Verdict.FAIL if needed else Verdict.LESS, found, without)


def _kernel() -> Finding:
    uname = os.uname()
    release = tuple(int(part) for part in uname.release.split("-")[0].split(".")[:2])
    there = release >= (5, 11) and uname.machine == "x86_64"
    found = f"Linux {uname.release} {uname.machine}"
    return _finding("kernel", there, found, "5.11 or later on x86_64 is needed", needed=True)


def _root() -> Finding:
    capabilities = _capabilities()
    there = os.geteuid() == 0 and bool(capabilities >> _CAP_SYS_ADMIN & 1)
    found = f"uid {os.geteuid()}" + ("" if there else ", no CAP_SYS_ADMIN")
    return _finding("root", there, found, "CRIU and the gate need CAP_SYS_ADMIN", needed=True)


def _limits() -> Finding:
    there = bool(_capabilities() >> _CAP_SYS_RESOURCE & 1)
    return _finding(
        "CAP_SYS_RESOURCE",
        there,
        "held" if there else "withheld from root on this machine",
        "limits are read from /proc; CRIU is not shielded from the OOM killer",
        needed=False,
    )


def _capabilities() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def _cgroups() -> Finding:
    unified = Path("/sys/fs/cgroup/cgroup.controllers").exists()
    memory = unified or Path("/sys/fs/cgroup/memory").is_dir()
    found = "version 2" if unified else "version 1" if memory else "no memory controller"
    return _finding(
        "cgroups", memory, found, "a hibernated container's memory cannot be measured", needed=False
    )


def _criu() -> Finding:
    version = hot.criu_version()
    done = subprocess.run(
        [*criu.command(), "check"],
        capture_output=True, text=True, timeout=_TIMEOUT_S, check=False,
    )  # fmt: skip
    errors = [line for line in done.stderr.splitlines() if "Error" in line]
    good = done.returncode == 0
    found = version if good else f"{version}: {errors[-1] if errors else 'check failed'}"
    return _finding("CRIU", good, found, "nothing can hibernate", needed=True)


def _kernel_cache() -> Finding:
    there = paths.KERNEL_CACHE.exists()
    found = "made" if there else "missing: `architect up` makes it"
    return _finding(
        "CRIU's kernel cache", there, found, "each wake takes 25 ms longer", needed=False
    )


def _userfaultfd() -> Finding:
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.syscall(_SYS_USERFAULTFD, _O_CLOEXEC)
    if descriptor >= 0:
        os.close(descriptor)
    found = "works" if descriptor >= 0 else os.strerror(ctypes.get_errno())
    return _finding(
        "userfaultfd", descriptor >= 0, found, "wakes take 1 ms longer for each MB", needed=False
    )


def _network_gate() -> Finding:
    """Opens a gate in a scratch network namespace: eBPF, tc, mark, NFQUEUE, all at once."""
    from architect.adapters.bpf import BpfError, ensure_bpffs, has_tcx
    from architect.adapters.gate import Gate, GateError
    from architect.adapters.netns import NetnsError

    pins = paths.BPF / f"check{os.getpid()}"
    try:
        with rundir.held():
            ensure_bpffs(paths.BPF)
        # Without a name in /run/netns: the first one there is a mount that stays.
        with netns.scratch():
            own = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            try:
                Gate.open(own, pins, paths.GATE_PROGRAM).close(remove=True)
            finally:
                os.close(own)
        way = "tcx" if has_tcx() else "tc clsact"
        found, there = f"eBPF, {way} and NFQUEUE hold packets", True
    except (ArchitectError, BpfError, GateError, NetnsError, OSError) as error:
        found, there = str(error), False
    finally:
        rundir.release()
    return _finding(
        "traffic gate", there, found, "traffic cannot be watched: nothing hibernates", needed=True
    )


def _shadow_ports() -> Finding:
    """Translates a port in a scratch network namespace, for each family that the machine has."""
    from architect.adapters import shadowports
    from architect.adapters.netfilter import Family, NetfilterError
    from architect.adapters.netns import NetnsError

    try:
        missing = shadowports.missing()
        ways = {family.value: shadowports.backend(family) for family in Family}
    except (NetfilterError, NetnsError) as error:
        lost = "containers with `shadow-ports` are refused"
        return Finding("shadow ports", Verdict.LESS, str(error), lost)
    found = ", ".join(f"{family} by {way.value}" for family, way in ways.items() if way)
    if missing:
        found += f"; IPv6: {missing}"
    return _finding("shadow ports", not missing, found, "none of IPv6", needed=False)


def _runc() -> Finding:
    # As runc-architect looks for it; the link is of a node whose distribution keeps it elsewhere.
    places = f"{paths.LIBEXEC}:/usr/bin:/usr/sbin:/usr/local/bin:/usr/local/sbin"
    path = shutil.which("runc", path=places)
    found = path or "not found"
    if path:
        done = subprocess.run([path, "--version"], capture_output=True, text=True, check=False)
        found = (done.stdout.splitlines() or ["runc"])[0]
    return _finding("runc", path is not None, found, "containers cannot be created", needed=True)


def _podman() -> Finding:
    path = shutil.which("podman")
    if path is None:
        return Finding("Podman", Verdict.LESS, "not found", "`podman --runtime runc-architect`")
    words = [path, "--runtime", "runc-architect", "info", "--format", "{{.Version.Version}}"]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd="/"
    )
    good = done.returncode == 0
    found = f"{done.stdout.strip()}, knows runc-architect" if good else done.stderr.strip()
    return _finding(
        "Podman", good, found, "`podman --runtime runc-architect`; run `make install`", needed=False
    )


def _checkpoint_disk() -> Finding:
    place = paths.CHECKPOINTS
    place.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(place).free
    found = f"{free / 1e9:.1f} GB free at {place}"
    return _finding(
        "disk",
        free > 1 << 30,
        found,
        "hibernations fail when it is full; containers run on",
        needed=False,
    )


_PROBES: Final = (
    _kernel, _root, _criu, _network_gate, _shadow_ports, _runc, _userfaultfd, _kernel_cache, _cgroups,
    _limits, _podman, _checkpoint_disk,
)  # fmt: skip
