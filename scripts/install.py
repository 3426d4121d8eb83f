"""Puts architect on this machine and takes it off again: install.py install|uninstall.

Called by the Makefile (make install, make uninstall), as root, after everything was built. All
files live in /usr/local/lib/architect:

    venv/        architectd and the command line, with the locked packages they import
    libexec/     keeper, runc-architect, criu-hook, health-check-proxy, criu-compat.so, gate.bpf.o,
                 standins/
    criu/        CRIU with its loader and libraries (bundle.py)
    share/       licences of what is linked into the programs of libexec/ (licences.py)
    record.json  what was changed outside this folder, to undo it

Outside it: links in /usr/local/bin, the runtime's registration with Podman and containerd
(engines.py), and where systemd runs a unit, which `architect up` enables. A second run changes
only what differs. Files that running programs have open are replaced, never overwritten.

FORCE=1 uninstalls although containers still need what goes away; their checkpoints are kept.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import engines
from common import (
    BUILD,
    REPOSITORY,
    Failure,
    digest,
    main,
    replace_tree,
    run,
    say,
    sha256,
)
from record import Record

PREFIX = Path("/usr/local/lib/architect")
LINKS = {
    "architect": PREFIX / "venv/bin/architect",
    "architectd": PREFIX / "venv/bin/architectd",
    "kubectl-architect": PREFIX / "venv/bin/kubectl-architect",
    "runc-architect": PREFIX / "libexec/runc-architect",
}
BIN = Path("/usr/local/bin")
UNIT = Path("/usr/local/lib/systemd/system/architectd.service")
PROGRAMS = (
    "keeper", "runc-architect", "criu-hook", "health-check-proxy", "criu-compat.so", "gate.bpf.o",
    "standins/libgnutls.so.30", "standins/libnftables.so.1",
)  # fmt: skip
MODULES = ("architect.processes.cli.main", "architect.processes.architectd.main")
RUN, STATE = Path("/run/architect"), Path("/var/lib/architect")
LOG = Path("/var/log/architectd.log")
"""Where the daemon logs without systemd."""
_DOWN_S = 30.0
"""How long architectd may take to end after it was asked to."""


def _systemd_runs() -> bool:
    return Path("/run/systemd/system").is_dir()  # sd_booted(3)


def _install_venv(record: Record) -> bool:
    """The interpreter environment: locked packages, then this package; whether it changed."""
    venv, tools = PREFIX / "venv", BUILD / "venv/bin/python"
    python = venv / "bin/python"
    locked = REPOSITORY / "requirements/runtime.txt"
    pip: list[str | Path] = [tools, "-m", "pip", "--disable-pip-version-check", "--quiet"]
    into = [*pip, "--python", python, "install"]
    packages = digest(locked.read_bytes(), run(["/usr/bin/python3", "--version"]))
    whole = python.exists() and record.parts.get("packages") == packages
    if not whole:
        for part in ("packages", "wheel"):
            record.parts.pop(part, None)
        record.save()
        shutil.rmtree(venv, ignore_errors=True)
        run(["/usr/bin/python3", "-m", "venv", "--without-pip", venv])
        run([*into, "--require-hashes", "--requirement", locked], shown="pip install (locked)")
        record.parts["packages"] = packages
        record.save()
    sources = sorted(p for p in (REPOSITORY / "src").rglob("*") if p.suffix in (".py", ".typed"))
    contents = [x for p in sources for x in (str(p.relative_to(REPOSITORY)), p.read_bytes())]
    wheel_key = digest(*contents, (REPOSITORY / "pyproject.toml").read_bytes())
    if whole and record.parts.get("wheel") == wheel_key:
        return False
    with tempfile.TemporaryDirectory(dir=BUILD, prefix=".wheel-") as folder:
        build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder]
        run([*build, REPOSITORY], shown="pip wheel")
        (wheel,) = Path(folder).glob("architect-*.whl")
        run([*into, "--no-deps", "--no-index", "--force-reinstall", wheel], shown="pip install")
    imports = "; ".join(f"import {module}" for module in MODULES)
    run([python, "-I", "-c", imports])
    record.parts["wheel"] = wheel_key
    record.save()
    return True


def _install_programs() -> bool:
    """The static programs and the eBPF object; whether one changed."""
    target = PREFIX / "libexec"
    target.mkdir(exist_ok=True)
    changed = False
    for name in PROGRAMS:
        new, old = BUILD / "native" / name, target / name
        if not new.exists():
            raise Failure(f"{new} is missing: run make native")
        if old.exists() and sha256(old) == sha256(new):
            continue
        # A new inode: keepers run from the old one until their containers end.
        old.parent.mkdir(exist_ok=True)
        unfinished = old.with_name(f".{old.name}.new")
        shutil.copyfile(new, unfinished)
        unfinished.chmod(0o644 if ".so" in name or name.endswith(".o") else 0o755)
        unfinished.replace(old)
        changed = True
    return changed


def _install_bundle() -> bool:
    """CRIU's folder; whether it changed."""
    new, old = BUILD / "bundle", PREFIX / "criu"
    if not (new / "VERSION").exists():
        raise Failure(f"{new} is missing: run make bundle")
    version = old / "VERSION"
    if version.exists() and version.read_bytes() == (new / "VERSION").read_bytes():
        return False
    unfinished = PREFIX / ".criu.new"
    shutil.rmtree(unfinished, ignore_errors=True)
    shutil.copytree(new, unfinished)
    replace_tree(unfinished, old)
    return True


def _install_licences() -> None:
    new, old = BUILD / "native/share", PREFIX / "share"
    if not new.exists():
        raise Failure(f"{new} is missing: run make native")
    if _contents(new) != _contents(old):
        unfinished = PREFIX / ".share.new"
        shutil.rmtree(unfinished, ignore_errors=True)
        shutil.copytree(new, unfinished)
        replace_tree(unfinished, old)


def _contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): sha256(path) for path in files}


def _register_podman(record: Record) -> None:
    record.write(engines.PODMAN_RUNTIME, engines.podman_runtime(Path("/")))
    limits = engines.podman_limits()
    if limits is not None:
        record.write(engines.PODMAN_LIMITS, limits)
    elif str(engines.PODMAN_LIMITS) in record.files:
        record.undo_file(str(engines.PODMAN_LIMITS))
    template = "{{.Host.OCIRuntime.Path}}"
    path = run(["podman", "--runtime", "runc-architect", "info", "--format", template]).strip()
    if path != str(engines.RUNTIME):
        raise Failure(f"Podman takes {path or 'nothing'} for the runtime runc-architect")


def _register_containerd(record: Record) -> None:
    """Add the runtime where containerd has a configuration, and make it read that."""
    path = engines.CONTAINERD
    if not path.exists():
        return
    text = path.read_text()
    added = engines.with_containerd_runtime(text)
    if added is None:
        say("install", f"{path} has a runtime runc-architect of its own: left as it is")
        return
    theirs = engines.without_containerd_runtime(text).encode()
    if record.write(path, added.encode(), theirs=theirs):
        _restart_containerd("install")


def _restart_containerd(program: str) -> None:
    if _systemd_runs():
        run(["systemctl", "try-restart", "containerd.service"])
    else:
        say(program, f"restart containerd: it reads {engines.CONTAINERD} only when it starts")


def _daemons() -> list[int]:
    """Processes that run the installed architectd; those of machines made of namespaces are theirs."""
    found = []
    here = os.readlink("/proc/self/ns/mnt")
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if os.readlink(folder / "ns/mnt") != here:
                continue
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
            paths = [os.path.realpath(word) for word in words[:2] if word.startswith("/")]
            ours = any(Path(path).is_relative_to(PREFIX / "venv") for path in paths)
            ours |= words[0].startswith(str(PREFIX / "venv"))
            if ours and any("architectd" in word for word in words[1:4]):
                found.append(int(folder.name))
    return found


def _architect(*words: str) -> subprocess.CompletedProcess[str]:
    command = [str(LINKS["architect"]), *words]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


def install() -> None:
    """Everything, in an order in which each part finds what it needs."""
    record = Record.load(PREFIX / "record.json")
    # First of all: the folder that the record itself lives in.
    missing = [str(p) for p in [*reversed(PREFIX.parents), PREFIX] if not p.exists()]
    PREFIX.mkdir(parents=True, exist_ok=True)
    record.folders += missing
    record.save()
    changed = [_install_programs(), _install_bundle(), _install_venv(record)]
    _install_licences()
    for name, target in LINKS.items():
        record.link(BIN / name, target)
    _register_podman(record)
    _register_containerd(record)
    if _systemd_runs():
        unit = (REPOSITORY / "packaging/architectd.service").read_bytes()
        if record.write(UNIT, unit):
            run(["systemctl", "daemon-reload"])
    if any(changed) and _daemons():
        _stop_daemon(force=False)
        done = _architect("up")
        if done.returncode != 0:
            raise Failure(f"architectd was updated but did not start: {done.stderr.strip()}")
        say("install", "architectd was running and was restarted")
    version = (PREFIX / "criu/VERSION").read_text().partition("\n")[0]
    say("install", f"architect is in {PREFIX}, with {version}; start it with: architect up")


def _podman_containers() -> list[str]:
    """Running containers that Podman started through our runtime."""
    if shutil.which("podman") is None:
        return []
    ids = run(["podman", "ps", "--quiet", "--no-trunc"]).split()
    if not ids:
        return []
    template = "{{.OCIRuntime}} {{.Name}}"
    lines = run(["podman", "inspect", "--type=container", "--format", template, *ids]).splitlines()
    return [
        name for runtime, _, name in (x.partition(" ") for x in lines) if "architect" in runtime
    ]


def _dependents() -> list[str]:
    """What would be lost or stranded if architect went away now, one description each."""
    found = [f"{name} (Podman)" for name in _podman_containers()]
    done = _architect("ps", "-o", "json") if LINKS["architect"].exists() else None
    if done is not None and done.returncode == 0:
        rows = json.loads(done.stdout)
        return [*found, *(f"{r['pod']}/{r['container']} ({r['state']})" for r in rows)]
    for folder in (RUN / "containers", STATE / "checkpoints"):
        if folder.is_dir():
            found += [str(path) for path in sorted(folder.iterdir())]
    return found


def _stop_daemon(*, force: bool) -> None:
    """`architect down`, then wait until the process is gone."""
    pids = _daemons()
    if not pids:
        return
    done = _architect("down")
    if done.returncode != 0:
        if not force:
            raise Failure(f"architect down failed: {done.stderr.strip() or done.stdout.strip()}")
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
    deadline = time.monotonic() + _DOWN_S
    while remaining := _daemons():
        if time.monotonic() > deadline:
            raise Failure(f"architectd ({remaining[0]}) did not end within {_DOWN_S:.0f} s")
        time.sleep(0.05)


def _mounts() -> list[str]:
    """Mount points below /run/architect, in the order in which they were made."""
    points = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return [point for point in points if Path(point).is_relative_to(RUN)]


def _remove_state(*, force: bool) -> None:
    """What architectd kept at run time; after FORCE only what no container needs."""
    if force and any((STATE / "checkpoints").glob("*")):
        say("uninstall", f"{STATE} and {RUN} are kept: they hold checkpoints")
        return
    for point in reversed(_mounts()):
        run(["umount", point])
    if left := _mounts():
        # Below are containers' own mounts: removing the folders would reach into their files.
        raise Failure(f"{left[-1]} is still mounted: end what uses it, then uninstall again")
    for folder in (RUN, STATE):
        shutil.rmtree(folder, ignore_errors=True)
    LOG.unlink(missing_ok=True)


def uninstall() -> None:
    """Undo `install`; raises Failure while containers need it, unless FORCE=1."""
    force = os.environ.get("FORCE") == "1"
    record = Record.load(PREFIX / "record.json")
    if not record.path.exists():
        say("uninstall", "architect is not installed")
        return
    dependents = _dependents()
    if dependents and not force:
        raise Failure(
            "containers still need architect: " + ", ".join(dependents) + ". Remove them "
            "(podman rm, podman kube down), or set FORCE=1 and leave them behind"
        )
    _stop_daemon(force=force)
    if str(UNIT) in record.files and _systemd_runs():
        run(["systemctl", "disable", "--now", UNIT.name])
    for name in list(record.files):
        ours_gone = None
        if Path(name) == engines.CONTAINERD and engines.CONTAINERD.exists():
            text = engines.without_containerd_runtime(engines.CONTAINERD.read_text())
            ours_gone = text.encode()
        record.undo_file(name, ours_gone)
        if Path(name) == engines.CONTAINERD:
            _restart_containerd("uninstall")
    if _systemd_runs():
        run(["systemctl", "daemon-reload"])
    record.undo_links()
    _remove_state(force=force)
    shutil.rmtree(PREFIX)
    record.undo_folders()
    say("uninstall", f"{PREFIX} and everything that it had changed are gone")


def body(arguments: list[str]) -> None:
    verbs = {"install": install, "uninstall": uninstall}
    if len(arguments) != 1 or arguments[0] not in verbs:
        raise Failure("usage: install.py install|uninstall")
    if os.geteuid() != 0:
        raise Failure("run as root")
    verbs[arguments[0]]()


if __name__ == "__main__":
    main("uninstall" if "uninstall" in sys.argv[1:] else "install", body)
