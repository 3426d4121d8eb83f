"""What the engines are told about the runtime: contents of their configuration files.

Pure but for reading the files that are there. Called by install.py, which writes and undoes.
"""

import resource
import tomllib
from pathlib import Path
from typing import Any

from common import Failure

RUNTIME = Path("/usr/local/bin/runc-architect")
CONTAINERD = Path("/etc/containerd/config.toml")
PODMAN_RUNTIME = Path("/etc/containers/containers.conf.d/50-architect.conf")
PODMAN_LIMITS = Path("/etc/containers/containers.conf.d/51-architect-limits.conf")

# containers.conf(5), runtime_supports_json: the defaults of Podman 4.3 to 5.4. A list in a later
# file replaces the one before it, so a file that adds a name has to repeat all others. A name
# that some version does not have by default does no harm: each of these takes --log-format=json.
_JSON_RUNTIMES = ("crun", "runc", "kata", "runsc", "youki", "krun")
_BEGIN, _END = "# BEGIN architect (make uninstall removes this)\n", "# END architect\n"
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


def _runtimes(config: dict[str, Any], plugin: str) -> dict[str, Any]:
    section = config.get("plugins", {}).get(plugin, {})
    found: dict[str, Any] = section.get("containerd", {}).get("runtimes", {})
    return found


def with_containerd_runtime(text: str) -> str | None:
    """containerd's configuration with our runtime appended; None where it already has one.

    A drop-in by `imports` would not do: containerd 1.x lets an imported file replace the whole
    section of a plugin, the administrator's settings with it (containerd-config.toml(5)).
    Raises Failure when the file is none that can be added to.
    """
    plugins = {2: "io.containerd.grpc.v1.cri", 3: "io.containerd.cri.v1.runtime"}
    own = without_containerd_runtime(text)
    try:
        config = tomllib.loads(own)
        version = config.get("version", 1)
        if version not in plugins:
            raise Failure(f"{CONTAINERD} has version {version}; versions 2 and 3 can be added to")
        plugin = plugins[version]
        runtimes = _runtimes(config, plugin)
        if RUNTIME.name in runtimes:
            return None
        runc = runtimes.get("runc", {}).get("options", {})
        systemd_cgroup = str(bool(runc.get("SystemdCgroup", False))).lower()
        table = f'plugins."{plugin}".containerd.runtimes.{RUNTIME.name}'
        block = (
            f"{_BEGIN}[{table}]\n"
            '  runtime_type = "io.containerd.runc.v2"\n'
            '  pod_annotations = ["architect.loopholelabs.io/*"]\n'
            f"[{table}.options]\n"
            f'  BinaryName = "{RUNTIME}"\n'
            f"  SystemdCgroup = {systemd_cgroup}\n{_END}"
        )
        added = own + ("" if own.endswith("\n") or not own else "\n") + block
        tomllib.loads(added)
    except tomllib.TOMLDecodeError as problem:
        raise Failure(f"{CONTAINERD} cannot be added to: {problem}") from problem
    return added


def without_containerd_runtime(text: str) -> str:
    """The same without our block."""
    head, begin, rest = text.partition(_BEGIN)
    _, end, tail = rest.partition(_END)
    return head + tail if begin and end else text
