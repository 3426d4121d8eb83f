"""The image of the components: what is in it, and that PREFIX runs on a host that has nothing."""

import ast
import gzip
import io
import json
import os
import re
import subprocess
import sys
import tarfile
import tomllib
from pathlib import Path
from typing import Any

import pytest

import component_image
import elf
import install
import licences
import runtime
from architect.adapters import netfilter
from common import REPOSITORY
from tests.cluster import images

PREFIX = str(install.PREFIX)
PYTHON = f"{PREFIX}/python/bin/python3"
SETTINGS = component_image.settings()
IMAGE_MB, PREFIX_MB = 150, 104
"""What the image may have, uncompressed, and what of it goes to each node."""
DAEMON_RSS_MB = 50
"""The promise for architectd: dependencies of the components must stay out of its process."""
_START_S = 30.0


# What can be told without building.


def test_the_programs_are_those_of_the_package_and_of_the_runtime() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for name, entry in project["scripts"].items():
        module, _, function = entry.partition(":")
        assert (SETTINGS["programs"][name], "main") == (module, function)
    called = (REPOSITORY / "native/runc-architect/verbs.c").read_text()
    assert 'PREFIX_DIR "/venv/bin/architect-admit"' in called
    assert "architect-admit" in SETTINGS["programs"]


def test_a_program_is_started_by_the_kernel_and_told_by_its_command_line(tmp_path: Path) -> None:
    component_image.write_launchers(SETTINGS["programs"], tmp_path / "venv/bin")

    assert os.readlink(tmp_path / "venv/bin/python") == "../../python/bin/python3"
    for name, module in SETTINGS["programs"].items():
        launcher = tmp_path / "venv/bin" / name
        line, _, _ = launcher.read_text().partition("\n")
        assert launcher.stat().st_mode & 0o777 == 0o755
        # No shell, which a node may lack; the length is what every kernel takes (execve(2)).
        assert line == f"#!{PREFIX}/venv/bin/python -I"
        assert len(line) < 127
        imports = [
            n for n in ast.walk(ast.parse(launcher.read_text())) if isinstance(n, ast.ImportFrom)
        ]
        assert [(n.module, n.names[0].name) for n in imports] == [(module, "main")]


def test_what_the_daemon_runs_on_its_host_is_in_the_image() -> None:
    """By the names that are in the adapters' code; CRIU brings its own."""
    table = SETTINGS["runtime"]
    there = {Path(path).name for paths in table["tools"].values() for path in paths}
    there |= set(table["links"]) | {name for names in table["iptables"].values() for name in names}
    wanted = {"cat", "mount", "nft", "sh", "ss", "tar", "unshare"}
    for backend in netfilter.Backend:
        if backend is not netfilter.Backend.NFT:
            suffix = backend.value.removeprefix("iptables")
            wanted |= {
                f"{ip}tables{suffix}{end}" for ip in ("ip", "ip6") for end in ("", "-restore")
            }
    assert wanted <= there


def test_patterns_leave_out_whole_folders_and_nothing_else(tmp_path: Path) -> None:
    kept = [
        "pygments/lexers/__init__.py", "pygments/lexers/_mapping.py", "pygments/lexers/python.py",
        "pygments/styles/default.py", "_cffi_backend.cpython-313-x86_64-linux-gnu.so",
    ]  # fmt: skip
    gone = [
        "bin/uvicorn", "cffi/api.py", "pygments/lexers/c_cpp.py", "pygments/lexers/perl.py",
        "pygments/lexers/pyret.py", "msgspec/__init__.pyi", "pycparser/c_ast.py",
    ]  # fmt: skip
    for name in [*kept, *gone]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()

    runtime.remove(tmp_path, SETTINGS["runtime"]["packages_leave_out"])

    files = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()]
    assert sorted(files) == sorted(kept)
    assert not (tmp_path / "cffi").exists()


def test_only_an_archive_with_the_label_is_taken_for_one(tmp_path: Path) -> None:
    def archive(config: dict[str, Any]) -> Path:
        with tarfile.open(tmp_path / "image.tar", "w") as tar:
            parts: list[tuple[str, Any]] = [
                ("manifest.json", [{"Config": "c.json"}]),
                ("c.json", {"config": config}),
            ]
            for name, content in parts:
                data = json.dumps(content).encode()
                member = tarfile.TarInfo(name)
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
        return tmp_path / "image.tar"

    assert (
        component_image.recipe_of(archive({"Labels": {component_image.RECIPE_LABEL: "k"}})) == "k"
    )
    assert component_image.recipe_of(archive({"Labels": {}})) == ""
    assert component_image.recipe_of(archive({})) == ""
    (tmp_path / "image.tar").write_bytes(b"no archive")
    assert component_image.recipe_of(tmp_path / "image.tar") == ""
    assert component_image.recipe_of(tmp_path / "missing.tar") == ""


def test_programs_are_told_from_scripts(tmp_path: Path) -> None:
    (tmp_path / "script").write_text("#!/bin/sh\n")
    (tmp_path / "link").symlink_to(sys.executable)

    assert elf.is_elf(Path(sys.executable).resolve())
    assert not any(elf.is_elf(tmp_path / name) for name in ("script", "link", "missing", "."))


# The image itself: built by the first of these tests, from what `make native bundle` made.


def _build() -> None:
    done = subprocess.run(
        [sys.executable, component_image.__file__],
        capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.fixture(scope="module")
def image() -> Path:
    """The built archive."""
    _build()
    return component_image.target()


@pytest.fixture(scope="module")
def whole(image: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The image's root file system."""
    root = tmp_path_factory.mktemp("whole")
    for layer in _manifest(image)["Layers"]:
        part = subprocess.Popen(["tar", "-xOf", image, layer], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-C", root, "-x"], stdin=part.stdout, check=True)
        part.communicate()
        assert part.returncode == 0
    return root


@pytest.fixture(scope="module")
def bare(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A root with PREFIX and empty mount points, and nothing else."""
    root = tmp_path_factory.mktemp("bare")
    for name in ("dev", "proc", "run", "sys", "tmp"):
        (root / name).mkdir()
    target = runtime.inside(root, install.PREFIX)
    target.parent.mkdir(parents=True)
    subprocess.run(["cp", "-a", runtime.inside(whole, install.PREFIX), target], check=True)
    return root


def _manifest(image: Path) -> dict[str, Any]:
    with tarfile.open(image) as tar:
        manifest: dict[str, Any] = json.load(tar.extractfile("manifest.json"))[0]  # type: ignore[arg-type]
    return manifest


# pivot_root(2) and not chroot(2): CRIU wants the root to be a mount. The old root is taken away
# from underneath by the interpreter that is under test, as nothing else is there to do it.
_ENTER = f"""
set -e
ip link set lo up
mount --bind "$1" "$1"
cd "$1"
shift
mount -t proc proc proc
mount --rbind /dev dev
mount --rbind /sys sys
mount -t tmpfs run run
pivot_root . .
exec {PYTHON} -I -c '
import ctypes, os, sys
ctypes.CDLL(None).umount2(b".", 2)
os.chdir("/")
os.execve(sys.argv[1], sys.argv[1:], {{k: v for k, v in os.environ.items() if k != "PATH"}})
' "$@"
"""


def _in(root: Path, *words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a program on a machine whose disk is `root`, with that environment only."""
    return subprocess.run(
        ["unshare", "--mount", "--net", "sh", "-c", _ENTER, "sh", str(root), *words],
        env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", **environment},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def _python(root: Path, code: str, **environment: str) -> str:
    # Without -I where the environment is what is tested.
    done = _in(root, PYTHON, *([] if environment else ["-I"]), "-c", code, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.engine
def test_containerd_knows_the_image_by_its_name_and_it_says_what_it_is(image: Path) -> None:
    version = component_image.version()
    assert images.names(image) == [f"localhost/architect:{version}"]
    with tarfile.open(image) as tar:
        config = json.load(tar.extractfile(_manifest(image)["Config"]))["config"]  # type: ignore[arg-type]
    labels = config["Labels"]
    assert labels["org.opencontainers.image.title"] == "architect"
    assert labels["org.opencontainers.image.version"] == version
    assert labels["org.opencontainers.image.licenses"] == "Apache-2.0"
    assert f"{PREFIX}/venv/bin" in " ".join(config["Env"])


@pytest.mark.engine
def test_the_image_is_small(image: Path, bare: Path) -> None:
    of_prefix = sum(p.lstat().st_size for p in bare.rglob("*") if p.is_file()) / 1e6
    assert image.stat().st_size / 1e6 < IMAGE_MB
    assert of_prefix < PREFIX_MB


@pytest.mark.engine
def test_the_image_has_what_people_run_in_it_and_what_nodes_get(whole: Path) -> None:
    tools = ["bash", "dash", "du", "ip", "ls", "mount", "nsenter", "ps"]
    expected = [f"usr/bin/{name}" for name in tools if name != "ip"] + ["usr/sbin/nft"]
    prefix = PREFIX.removeprefix("/")
    expected += [f"{prefix}/libexec/{name}" for name in install.PROGRAMS]
    expected += [f"{prefix}/criu/{name}" for name in ("VERSION", "bin/criu")]
    expected += [f"{prefix}/venv/bin/{name}" for name in SETTINGS["programs"]]
    expected += [f"{prefix}/VERSION", f"{prefix}/python/VERSION"]
    assert [name for name in expected if not (whole / name).exists()] == []
    for name in ("keeper", "runc-architect", "criu-hook", "health-check-proxy"):
        assert os.access(whole / prefix / "libexec" / name, os.X_OK)
    du = subprocess.run(
        ["chroot", whole, "du", "-sh", PREFIX], capture_output=True, text=True, check=True
    )
    assert du.stdout.endswith(PREFIX + "\n")
    listed = subprocess.run(
        ["chroot", whole, "iptables", "--version"], capture_output=True, text=True, check=True
    )
    assert "nf_tables" in listed.stdout


def _text(file: Path) -> str:
    data = file.read_bytes()
    return (gzip.decompress(data) if file.suffix == ".gz" else data).decode(errors="replace")


def _named(share: Path) -> set[str]:
    """The texts that licences in a folder name instead of repeating them."""
    copyrights = map(_text, share.glob("doc/*/copyright*"))
    found = re.findall(r"/usr/share/common-licenses/([\w.+-]*\w)", "\n".join(copyrights))
    return {name for name in found if (licences.COMMON / name).exists()}


@pytest.mark.engine
def test_all_that_is_not_ours_has_its_licence(whole: Path) -> None:
    prefix = runtime.inside(whole, install.PREFIX)
    packages = {prefix / "share": licences.linked()}
    for part in ("criu", "python"):
        # Each library of theirs is of one of these (elf.closure).
        lines = (prefix / part / "VERSION").read_text().splitlines()
        packages[prefix / part / "share"] = [
            line.split()[1] for line in lines if line.startswith("deb ")
        ]
    packages[whole / "usr/share"] = [*SETTINGS["root"]["packages"], "libc6", "libssl3t64"]
    for share, names in packages.items():
        assert len(names) > 5
        texts = {path.parent.name for path in share.glob("doc/*/copyright*")}
        assert set(names) - texts == set(), share
        common = {path.name.removesuffix(".gz") for path in share.glob("common-licenses/*")}
        assert _named(share) - common == set()
    assert "GNU GENERAL PUBLIC" in _text(prefix / "criu/share/common-licenses/GPL-2.gz")
    assert (prefix / "share/doc/architect/LICENSE").exists()
    wheels = runtime.inside(whole, runtime.packages_folder(SETTINGS["runtime"])).glob("*.dist-info")
    without = [one.name for one in wheels if not any(one.rglob("*LICEN[SC]E*"))]
    assert without in ([], [f"architect-{component_image.version()}.dist-info"])


@pytest.mark.engine
def test_the_prefix_runs_on_a_host_that_has_nothing(bare: Path) -> None:
    said = _python(
        bare,
        "import ssl, asyncio, ctypes, lightkube, starlette, cryptography, msgspec, blake3, uvicorn\n"
        "from cryptography import x509\n"
        "from cryptography.hazmat.primitives.asymmetric import ec\n"
        "import lightkube.resources.core_v1, rich.traceback\n"
        "ctypes.CDLL('libbpf.so.1')\n"
        "ec.generate_private_key(ec.SECP256R1())\n"
        "ssl.create_default_context()\n"
        "print(*{l.split()[-1] for l in open('/proc/self/maps') if '/' in l}, sep='\\n')",
    )

    mapped = said.split()
    assert f"{PREFIX}/python/lib/libbpf.so.1" in mapped
    assert [path for path in mapped if not path.startswith(PREFIX + "/")] == []


@pytest.mark.engine
@pytest.mark.parametrize("name", sorted(SETTINGS["programs"]))
def test_each_program_can_be_started_there(bare: Path, name: str) -> None:
    module = SETTINGS["programs"][name]
    assert _python(bare, f"import {module}; print({module}.main.__name__)") == "main\n"


@pytest.mark.engine
def test_the_command_line_works_there(bare: Path) -> None:
    done = _in(bare, f"{PREFIX}/venv/bin/architect", "--help")
    assert done.returncode == 0, done.stderr
    assert "Usage: architect" in done.stdout


@pytest.mark.engine
def test_libraries_of_the_host_are_never_loaded(bare: Path) -> None:
    """Neither from where they usually are, nor from where the environment says."""
    folder = bare / "usr/lib/x86_64-linux-gnu"
    folder.mkdir(parents=True)
    (bare / "lib").symlink_to("usr/lib")
    try:
        for name in ("libc.so.6", "libbpf.so.1", "libssl.so.3", "libz.so.1"):
            (folder / name).write_bytes(b"not this one")
        code = "import ssl, zlib, ctypes; ctypes.CDLL('libbpf.so.1'); print('whole')"
        assert _python(bare, code, LD_LIBRARY_PATH="/usr/lib/x86_64-linux-gnu") == "whole\n"
    finally:
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
        (bare / "usr/lib").rmdir()
        (bare / "lib").unlink()


@pytest.mark.engine
def test_the_programs_that_come_along_work_there(bare: Path) -> None:
    rule = "*mangle\\n-I PREROUTING -m mark --mark 0x1/0xff -j NFQUEUE --queue-num 3\\nCOMMIT\\n"
    script = f"""
set -e
PATH={PREFIX}/bin
nft --version >/dev/null
ss -V >/dev/null
unshare --version >/dev/null
mount >/dev/null
for tool in iptables-nft iptables-legacy ip6tables-nft; do
    printf '{rule}' | $tool-restore --noflush
    $tool -t mangle -S PREROUTING
done
"""
    done = _in(bare, f"{PREFIX}/bin/sh", "-c", script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("-j NFQUEUE --queue-num 3") == 3


_DAEMON = f"""
import os, signal, subprocess, sys, time
folder = "{PREFIX}/venv/bin/"
daemon = subprocess.Popen([folder + "architectd"])
deadline = time.monotonic() + {_START_S}
while subprocess.run([folder + "architect", "ps"], capture_output=True).returncode:
    if daemon.poll() is not None or time.monotonic() > deadline:
        sys.exit("architectd does not answer `architect ps`")
    time.sleep(0.05)
lines = open(f"/proc/{{daemon.pid}}/status").read().splitlines()
print(next(line.split()[1] for line in lines if line.startswith("VmRSS:")))
print(open(f"/proc/{{daemon.pid}}/cmdline").read().replace(chr(0), " "))
daemon.send_signal(signal.SIGTERM)
sys.exit(daemon.wait({_START_S}))
"""


@pytest.mark.engine
def test_architectd_starts_there_within_its_memory(bare: Path) -> None:
    done = _in(bare, PYTHON, "-I", "-c", _DAEMON)
    assert done.returncode == 0, done.stderr
    rss_kb, command = done.stdout.splitlines()[:2]
    assert int(rss_kb) / 1000 < DAEMON_RSS_MB
    # As scripts/install.py and the documentation tell it from others.
    assert command.split() == [f"{PREFIX}/venv/bin/python", "-I", f"{PREFIX}/venv/bin/architectd"]


@pytest.mark.engine
def test_a_second_run_changes_nothing_and_a_fresh_one_gives_the_same_bytes(image: Path) -> None:
    before = image.stat()
    _build()
    assert (image.stat().st_ino, image.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)
    content = image.read_bytes()
    image.unlink()
    _build()
    assert image.read_bytes() == content
