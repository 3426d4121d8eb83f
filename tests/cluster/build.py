"""Builds the cluster's programs from Go modules at pinned versions: `programs()`, and what only
some clusters have: `metrics_server()`, `old_containerd()`.

Why from source: the machines that run the tests reach Debian's mirrors and the Go module proxy,
and no image registry. Each part is a folder in kube/ with go.mod and go.sum, which pin every
module; its build is kept in ${XDG_CACHE_HOME:-~/.cache}/architect/kubernetes/PART-KEY, where KEY
is a digest of that folder and of how it is built, and appears there whole or not at all. Called
by the command line before `up`.
"""

import fcntl
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from common import architecture, cache_folder, digest, keep_only, replace_tree, say
from tests.cluster import images, toolchain
from tests.cluster.base import ClusterError, run, until
from tests.cluster.settings import DNS_IMAGE, METRICS_IMAGE, PAUSE_IMAGE, Programs

SOURCES: Final = Path(__file__).resolve().parent / "kube"
_BUILD_S: Final = 3600.0
_LINK_FLAGS: Final = "-s -w"
_HELM_VERSION: Final = "helm.sh/helm/v3/internal/version.version"
_HELM_KUBERNETES_MINOR: Final = (
    "helm.sh/helm/v3/pkg/chartutil.k8sVersionMinor",
    "helm.sh/helm/v3/pkg/lint/rules.k8sVersionMinor",
)
_KUBERNETES_VERSION: Final = "k8s.io/component-base/version"
_CLIENT_VERSION: Final = "k8s.io/client-go/pkg/version.gitVersion"


@dataclass(frozen=True, slots=True)
class Part:
    """One build: packages of one module, each of which becomes a program."""

    name: str
    packages: tuple[str, ...]
    programs: tuple[str, ...]
    tags: tuple[str, ...] = ()
    cgo: bool = False
    links: tuple[str, ...] = ()
    """Further names of the first program, which looks at the name it is run under."""

    @property
    def source(self) -> Path:
        """The folder with go.mod."""
        return SOURCES / self.name

    @property
    def key(self) -> str:
        """What the build is cached under: sources, pinned versions and how they are built."""
        files = sorted(path for path in self.source.iterdir() if path.is_file())
        contents = [part for path in files for part in (path.name, path.read_bytes())]
        return digest(repr(self), self.link_flags(), architecture(), *contents)

    def required(self, module: str) -> str:
        """The version that go.mod pins a module to. Raises ClusterError if it does not."""
        text = (self.source / "go.mod").read_text()
        found = re.search(rf"^(?:require)?\s*{re.escape(module)} (v\S+)", text, re.M)
        if found is None:
            raise ClusterError(
                f"{self.source / 'go.mod'}", f"does not require {module}", "restore the file"
            )
        return found[1]

    def link_flags(self) -> str:
        """The linker's flags, with the version that the program is to show."""
        if self.name == "kubernetes":
            # Without these the API server, kubectl and the kubelets call themselves v0.0.0-master.
            full = self.required("k8s.io/kubernetes")
            major, minor = full.removeprefix("v").split(".")[:2]
            values = {"gitVersion": full, "gitMajor": major, "gitMinor": minor}
            set_ = " ".join(f"-X {_KUBERNETES_VERSION}.{k}={v}" for k, v in values.items())
            return f"{_LINK_FLAGS} {set_}"
        if self.name == "helm":
            # Without these `helm template` and `helm lint` take the cluster for version 1.20.
            minor = self.required("k8s.io/client-go").split(".")[1]
            kubernetes = " ".join(f"-X {name}={minor}" for name in _HELM_KUBERNETES_MINOR)
            version = self.required("helm.sh/helm/v3")
            return f"{_LINK_FLAGS} -X {_HELM_VERSION}={version} {kubernetes}"
        if self.name == "metrics-server":
            version = self.required("sigs.k8s.io/metrics-server")
            return f"{_LINK_FLAGS} -X {_CLIENT_VERSION}={version}"
        return f"{_LINK_FLAGS} -extldflags -static" if self.cgo else _LINK_FLAGS


_CONTAINERD: Final = "github.com/containerd/containerd/v2/cmd"
_OLD_CONTAINERD: Final = "github.com/containerd/containerd/cmd"
_CNI: Final = "github.com/containernetworking/plugins/plugins"

PARTS: Final = (
    Part(
        "kubernetes",
        (".",),
        ("kube",),
        links=(
            "kube-apiserver",
            "kube-controller-manager",
            "kube-scheduler",
            "kubelet",
            "kube-proxy",
            "kubectl",
            "etcd",
        ),
    ),
    Part(
        "containerd",
        (
            f"{_CONTAINERD}/containerd",
            f"{_CONTAINERD}/containerd-shim-runc-v2",
            f"{_CONTAINERD}/ctr",
        ),
        ("containerd", "containerd-shim-runc-v2", "ctr"),
        tags=("no_btrfs", "no_zfs", "no_devmapper", "no_dynamic_plugins"),
    ),
    # containerd gives every pod a seccomp profile: a runc without that tag starts none.
    Part(
        "runc",
        ("github.com/opencontainers/runc",),
        ("runc",),
        tags=("seccomp", "netgo", "osusergo"),
        cgo=True,
    ),
    Part(
        "cni",
        (
            f"{_CNI}/main/ptp",
            f"{_CNI}/main/loopback",
            f"{_CNI}/ipam/host-local",
            f"{_CNI}/meta/portmap",
        ),
        ("ptp", "loopback", "host-local", "portmap"),
    ),
    Part("helm", ("helm.sh/helm/v3/cmd/helm",), ("helm",)),
    Part("coredns", (".",), ("coredns",)),
)
METRICS_SERVER: Final = Part(
    "metrics-server", ("sigs.k8s.io/metrics-server/cmd/metrics-server",), ("metrics-server",)
)
"""Not one of PARTS: it is built for those clusters only that have it."""
OLD_CONTAINERD: Final = Part(
    "containerd-1.7",
    (
        f"{_OLD_CONTAINERD}/containerd",
        f"{_OLD_CONTAINERD}/containerd-shim-runc-v2",
        f"{_OLD_CONTAINERD}/ctr",
    ),
    ("containerd", "containerd-shim-runc-v2", "ctr"),
    tags=("no_aufs", "no_btrfs", "no_zfs", "no_devmapper", "no_tracing"),
)
"""Not one of PARTS either."""

_IMAGES: Final = {"coredns": DNS_IMAGE, METRICS_SERVER.name: METRICS_IMAGE}
"""Parts whose first program runs in a pod."""


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Let one build at a time use the cache, however many processes want one."""
    with (folder / ".lock").open("w") as lock:

        def taken() -> bool:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return False
            return True

        until("another build", taken, _BUILD_S, poll_s=0.5, fix="end it, or wait for it")
        yield


def _compile(part: Part, go: Path, new: Path) -> None:
    """Build the part's programs into the folder `new`."""
    # What go leaves in there when it is killed goes away with the folder.
    scratch = new.with_name(f"{new.name}-scratch")
    scratch.mkdir()
    env = toolchain.environment() | {
        "CGO_ENABLED": "1" if part.cgo else "0",
        "GOTMPDIR": str(scratch),
    }
    flags = ["-trimpath", "-ldflags", part.link_flags()]
    if part.tags:
        flags += ["-tags", ",".join(part.tags)]
    run(
        go,
        "build",
        *flags,
        "-o",
        f"{new}/",
        *part.packages,
        cwd=part.source,
        env=env,
        timeout_s=_BUILD_S,
        shown=f"go build of {part.name}",
        fix="if modules could not be fetched, check GOPROXY and the network; then try again",
    )
    missing = [name for name in part.programs if not os.access(new / name, os.X_OK)]
    if missing:
        raise ClusterError(f"go build of {part.name}", f"made no {', '.join(missing)}")
    for link in part.links:
        (new / link).symlink_to(part.programs[0])


def _builds(folder: Path, name: str) -> list[Path]:
    """Every build of that part in the cache, and none of a part whose name begins the same."""
    return [path for path in folder.glob(f"{name}-*") if path.name.rpartition("-")[0] == name]


@contextmanager
def _replacing(folder: Path, name: str, key: str) -> Iterator[Path]:
    """A new folder that becomes folder/NAME-KEY when the block ends well."""
    with tempfile.TemporaryDirectory(dir=folder, prefix=".new-") as made:
        new = Path(made) / "tree"
        new.mkdir()
        yield new
        target = folder / f"{name}-{key}"
        replace_tree(new, target)
        keep_only(target, _builds(folder, name))


def _pause(folder: Path) -> Path:
    """The image of the process that holds a pod's namespaces: one small static program."""
    source = SOURCES / "pause" / "pause.c"
    flags = ("-static", "-Os", "-s", "-Wall", "-Wextra", "-Werror")
    key = digest(PAUSE_IMAGE, repr(flags), architecture(), source.read_bytes())
    target = folder / f"pause-{key}"
    if not target.exists():
        with _replacing(folder, "pause", key) as new:
            run("musl-gcc", *flags, "-o", new / "pause", source)
            images.of_program(new / "pause", PAUSE_IMAGE, new / "image.tar")
    return target


def _part(part: Part, folder: Path, go: list[Path]) -> Path:
    target = folder / f"{part.name}-{part.key}"
    if not target.exists():
        if not go:
            go.append(toolchain.go())
        begin = time.monotonic()
        say("cluster", f"building {part.name} (all that is built here: some ten minutes)")
        with _replacing(folder, part.name, part.key) as new:
            _compile(part, go[0], new)
            if part.name in _IMAGES:
                images.of_program(new / part.programs[0], _IMAGES[part.name], new / "image.tar")
        say("cluster", f"{part.name} built in {time.monotonic() - begin:.0f} s")
    return target


@contextmanager
def _cache() -> Iterator[Path]:
    """The cache's folder, for this process alone, without what killed builds left there."""
    folder = cache_folder("kubernetes")
    with _alone(folder):
        for unfinished in folder.glob(".new-*"):
            shutil.rmtree(unfinished)
        yield folder


def metrics_server() -> Path:
    """The folder with metrics-server's image.tar, built if it is not in the cache.

    Raises Failure.
    """
    with _cache() as folder:
        return _part(METRICS_SERVER, folder, [])


def old_containerd() -> Path:
    """The folder with containerd 1.7 and its shim and ctr, built if it is not in the cache.

    Raises Failure.
    """
    with _cache() as folder:
        return _part(OLD_CONTAINERD, folder, [])


def programs() -> Programs:
    """Everything that every cluster runs, built if it is not in the cache. Raises Failure."""
    go: list[Path] = []
    with _cache() as folder:
        return Programs(
            pause=_pause(folder), **{part.name: _part(part, folder, go) for part in PARTS}
        )
