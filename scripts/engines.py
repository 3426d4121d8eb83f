"""What the engines are told about the runtime: contents of their configuration files.

Pure but for reading the files that are there. Called by install.py, which writes and undoes.
"""

import resource
import sys
import tomllib
from pathlib import Path

from common import REPOSITORY, Failure

# The package's own editor of the same file; it needs the standard library only.
sys.path.append(str(REPOSITORY / "src"))

from architect.contract.errors import ArchitectError
from architect.decisions import runtimeconfig

RUNTIME = Path("/usr/local/bin/runc-architect")
CONTAINERD = Path("/etc/containerd/config.toml")
PODMAN_RUNTIME = Path("/etc/containers/containers.conf.d/50-architect.conf")
PODMAN_LIMITS = Path("/etc/containers/containers.conf.d/51-architect-limits.conf")

# containers.conf(5), runtime_supports_json: the defaults of Podman 4.3 to 5.4. A list in a later
# file replaces the one before it, so a file that adds a name has to repeat all others. A name
# that some version does not have by default does no harm: each of these takes --log-format=json.
_JSON_RUNTIMES = ("crun", "runc", "kata", "runsc", "youki", "krun")
_MARK = runtimeconfig.MACHINE
_HANDLER = runtimeconfig.Handler(
    RUNTIME.name, str(RUNTIME), ("architect.loopholelabs.io/*",), ("io.kubernetes.container.*",)
)
_CAP_SYS_RESOURCE = 24


def _configured_json_runtimes(root: Path) -> list[str]:
    """Names that the administrator's own files give, in whichever of them comes last."""
    names: list[str] = []
    folder = root / "etc/containers/containers.conf.d"
    files = [root / "usr/share/containers/containers.conf", root / "etc/containers/containers.conf"]
    for path in [*files, *sorted(folder.glob("*.conf"))]:
        if path.name == PODMAN_RUNTIME.name or not path.exists():
            continue
        engine = tomllib.loads(path.read_text()).get("engine", {})
        names = [n for n in engine.get("runtime_supports_json", names) if isinstance(n, str)]
    return names


def podman_runtime(root: Path) -> bytes:
    """The drop-in that makes `podman --runtime runc-architect` known (containers.conf(5))."""
    names = dict.fromkeys([*_JSON_RUNTIMES, *_configured_json_runtimes(root), RUNTIME.name])
    listed = ", ".join(f'"{name}"' for name in names)
    return (
        "# Written by `make install` of architect, removed by `make uninstall`.\n"
        "[engine]\n"
        f"runtime_supports_json = [{listed}]\n\n"
        "[engine.runtimes]\n"
        f'{RUNTIME.name} = ["{RUNTIME}"]\n'
    ).encode()


def podman_limits() -> bytes | None:
    """A drop-in for machines whose root may not raise limits; None where it may.

    Podman gives containers limits above the usual ones (1048576 files), which takes
    CAP_SYS_RESOURCE (setrlimit(2)). Without it no container starts, whatever the runtime; so the
    limits that root has here become the default. Podman itself lowers its process limit to
    kernel.pid_max.
    """
    status = Path("/proc/self/status").read_text()
    effective = next(line.split()[1] for line in status.splitlines() if line.startswith("CapEff"))
    if int(effective, 16) >> _CAP_SYS_RESOURCE & 1:
        return None
    pid_max = int(Path("/proc/sys/kernel/pid_max").read_text())
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    processes = resource.getrlimit(resource.RLIMIT_NPROC)[1]
    processes = pid_max if processes == resource.RLIM_INFINITY else min(processes, pid_max)
    return (
        "# Written by `make install` of architect, removed by `make uninstall`: root has no\n"
        "# CAP_SYS_RESOURCE on this machine, so containers cannot have more than root has.\n"
        "[containers]\n"
        f'default_ulimits = ["nofile={files}:{files}", "nproc={processes}:{processes}"]\n'
    ).encode()


def with_containerd_runtime(text: str) -> str | None:
    """containerd's configuration with our runtime in it; None where there is another of its name.

    A drop-in by `imports` would not do: containerd 1.x lets an imported file replace the whole
    section of a plugin, the administrator's settings with it (containerd-config.toml(5)).
    Raises Failure when the file is none that can be added to.
    """
    own = without_containerd_runtime(text)
    try:
        if not runtimeconfig.parse(own, str(CONTAINERD)):
            raise Failure(f"{CONTAINERD} says nothing: fill it with `containerd config default`")
        added = runtimeconfig.with_handler(text, _HANDLER, _MARK, name=str(CONTAINERD))
    except runtimeconfig.HandlerTaken:
        return None
    except ArchitectError as problem:
        raise Failure(str(problem)) from problem
    return None if added == own else added


def without_containerd_runtime(text: str) -> str:
    """The same without our block."""
    try:
        return runtimeconfig.without_block(text, _MARK)
    except ArchitectError as problem:
        raise Failure(str(problem)) from problem
