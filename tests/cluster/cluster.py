"""The cluster as a whole: up, down, one more node, images, and kubectl. `Cluster` is all of it.

`up` may be killed at any instant, and `down` still leaves nothing: the record of what the machine
was like is written first, all names are fixed (settings.py), and processes are found by what they
carry with them (machine.py, cgroups.py). Called by the command line (__main__) and by tests.
"""

import json
import shlex
import shutil
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Final

from common import say
from tests.cluster import build, cgroups, images, machine, network, node
from tests.cluster.base import ClusterError, need_root, put, run, until
from tests.cluster.controlplane import ControlPlane
from tests.cluster.node import Node
from tests.cluster.settings import (
    DNS_MANIFEST,
    HOME,
    HOST_ADDRESS,
    MAXIMUM_NODES,
    METRICS_MANIFEST,
    NODE_NAME,
    SWITCH,
    Options,
    Programs,
    node_name,
)

_STATE: Final = "cluster.json"
_READY_S: Final = 90.0
_KUBECTL_S: Final = 90.0
_METRICS_S: Final = 150.0
"""It is ready once it has measured a node twice, and a node measures itself every 30 s."""
_UNUSABLE: Final = ("overlayfs", "overlay", "tmpfs", "ramfs")


class Cluster:
    """The cluster whose state is in the folder `home`, up or not."""

    def __init__(self, home: Path = HOME) -> None:
        self.home = home.resolve()

    # What is kept.

    def _state(self) -> dict[str, Any] | None:
        try:
            found: dict[str, Any] = json.loads((self.home / _STATE).read_text())
        except FileNotFoundError:
            return None
        return found

    def _known(self) -> dict[str, Any]:
        state = self._state()
        if state is None:
            raise ClusterError(
                "the cluster", f"there is none in {self.home}", "start it with `make cluster`"
            )
        return state

    @property
    def options(self) -> Options:
        """What `up` was told."""
        return Options.from_json(self._known()["options"])

    @property
    def programs(self) -> Programs:
        """What it runs."""
        found = self._known()["programs"]
        return Programs(**{name: Path(folder) for name, folder in found.items()})

    @property
    def env(self) -> Path:
        """The file to source; it is there once the cluster was ready."""
        return self.home / "env"

    @property
    def control_plane(self) -> ControlPlane:
        """Its control plane."""
        return ControlPlane(self.home, self.programs)

    def node(self, number: int) -> Node:
        """One of its nodes, or one that it may get."""
        return Node(self.home, number, self.options, self.programs)

    def numbers(self) -> list[int]:
        """The numbers of its nodes, up or down."""
        found = (NODE_NAME.fullmatch(path.name) for path in self.home.glob("nodes/*"))
        return sorted(int(match[1]) for match in found if match)

    def nodes_up(self) -> list[int]:
        """The numbers of the nodes that are up."""
        return [number for number in self.numbers() if cgroups.first_process(node_name(number))]

    # Kubernetes.

    def kubectl(self, *words: str, stdin: str | None = None, timeout_s: float = _KUBECTL_S) -> str:
        """Run kubectl as the administrator; return what it printed. Raises ClusterError."""
        client = self.control_plane
        command: list[str | Path] = [client.programs.kubectl, "--kubeconfig", client.admin, *words]
        env = machine.environment(self.home) | {"KUBECACHEDIR": str(self.home / "kubectl-cache")}
        shown = f"kubectl {shlex.join(words)}"
        fix = f"see what went on with {client.programs.kubectl} describe, and {self.home}/log"
        return run(*command, stdin=stdin, env=env, timeout_s=timeout_s, shown=shown, fix=fix)

    def get(self, *words: str) -> dict[str, Any]:
        """`kubectl get` of one object or a list of some."""
        found: dict[str, Any] = json.loads(self.kubectl("get", "--output=json", *words))
        return found

    def apply(self, *objects: Mapping[str, Any]) -> None:
        """`kubectl apply` of objects."""
        listed = {"apiVersion": "v1", "kind": "List", "items": objects}
        self.kubectl("apply", "--filename=-", stdin=json.dumps(listed))

    def ready(self) -> set[str]:
        """The names of the nodes that are Ready."""
        return {
            one["metadata"]["name"]
            for one in self.get("nodes")["items"]
            for condition in one["status"].get("conditions", [])
            if condition["type"] == "Ready" and condition["status"] == "True"
        }

    def await_ready(self, numbers: Iterable[int], seconds: float = _READY_S) -> None:
        """Wait until these nodes are Ready."""
        wanted = {node_name(number) for number in numbers}
        until(
            f"{', '.join(sorted(wanted))} to be Ready",
            lambda: wanted <= self.ready(),
            seconds,
            poll_s=0.2,
            fix=f"look at {self.home}/nodes/*/root/var/log/kubelet.log, or "
            + "`make cluster-down`",
        )

    # Up.

    def up(self, options: Options, programs: Programs) -> None:
        """Bring the cluster up with `options.nodes` nodes, and return when all are Ready.

        A cluster that is up already is left as it is. Raises ClusterError, and leaves everything
        as it is then, for a look; `down` takes it away.
        """
        need_root()
        if not 1 <= options.nodes <= MAXIMUM_NODES:
            raise ClusterError(f"{options.nodes} nodes", "cannot be", f"1 to {MAXIMUM_NODES}")
        for archive in options.images:
            images.names(Path(archive))
        unknown = [one for one in options.old_containerd if not 1 <= one <= MAXIMUM_NODES]
        if unknown:
            raise ClusterError(
                f"node {unknown[0]} with containerd 1.7", "cannot be", f"1 to {MAXIMUM_NODES}"
            )
        # Built before others have to wait for the cluster.
        if options.metrics:
            build.metrics_server()
        if options.old_containerd:
            programs = replace(programs, old_containerd=build.old_containerd())
        with machine.alone(), machine.marking(self.home):
            if self._is_complete():
                say("cluster", f"is up already: {', '.join(sorted(self.ready()))} are Ready")
                return
            self._refuse()
            begin = time.monotonic()
            self.home.mkdir(parents=True, exist_ok=True)
            state = {
                "options": options.as_json(),
                "programs": {name: str(path) for name, path in asdict(programs).items() if path},
                "record": machine.Record.take().as_json(),
            }
            put(self.home / _STATE, state)
            self._bring_up(options)
            self._write_env(programs)
            say("cluster", f"{options.nodes} nodes Ready after {time.monotonic() - begin:.1f} s")

    def _bring_up(self, options: Options) -> None:
        record = machine.Record.from_json(self._known()["record"])
        cgroups.hand_down(record.controllers, "+")
        numbers = range(1, options.nodes + 1)
        network.create()
        control_plane = self.control_plane
        control_plane.make()
        control_plane.start_api()
        # While the API server starts.
        for number in numbers:
            self._boot_new(number)
        control_plane.await_api()
        control_plane.start_controllers()
        for number in numbers:
            self._join(number)
        self.await_ready(numbers)
        if options.dns:
            self.kubectl("apply", "--filename", str(DNS_MANIFEST))
            self.kubectl("rollout", "status", "--namespace=kube-system", "deployment/coredns")
        if options.metrics:
            self._deploy_metrics_server()

    def _deploy_metrics_server(self) -> None:
        self.kubectl("apply", "--filename", str(METRICS_MANIFEST))
        server = ("--namespace=kube-system", "deployment/metrics-server")
        self.kubectl("rollout", "status", *server, timeout_s=_METRICS_S)
        self.kubectl("wait", "--for=condition=Available", "apiservice/v1beta1.metrics.k8s.io")

    def _is_complete(self) -> bool:
        return self.env.exists() and set(self.nodes_up()) == set(self.numbers())

    def _refuse(self) -> None:
        """Raise ClusterError where no cluster can be made."""
        what = "the cluster"
        if self.home.exists() and any(self.home.iterdir()):
            raise ClusterError(
                what, f"{self.home} has one that is not whole", "`make cluster-down`"
            )
        others = machine.homes() or sorted(cgroups.named())
        if others or network.exists(SWITCH):
            raise ClusterError(
                what,
                f"this machine has another one: {', '.join(others) or SWITCH}",
                "`make cluster-down`, or `down` with the --dir that it was started with",
            )
        machine.refuse_taken_addresses()
        folder = next(path for path in (self.home, *self.home.parents) if path.exists())
        kind = run("stat", "--file-system", "--format=%T", folder).strip()
        if kind in _UNUSABLE:
            raise ClusterError(
                f"{self.home}",
                f"is on {kind}, on which the nodes' overlayfs cannot be",
                "choose a folder on ext4 or xfs with --dir",
            )

    def _write_env(self, programs: Programs) -> None:
        folder = self.home / "bin"
        folder.mkdir(exist_ok=True)
        for name, program in (("kubectl", programs.kubectl), ("helm", programs.helm / "helm")):
            (folder / name).symlink_to(program)
        place = shlex.quote(str(folder))
        lines = [
            "# Source this file: kubectl and helm then talk to the test cluster.",
            f"export KUBECONFIG={shlex.quote(str(self.control_plane.admin))}",
            f"export KUBECACHEDIR={shlex.quote(str(self.home / 'kubectl-cache'))}",
            f'case ":$PATH:" in *:{place}:*) ;; *) export PATH={place}:"$PATH" ;; esac',
            f'export NO_PROXY="${{NO_PROXY:+$NO_PROXY,}}{HOST_ADDRESS}" no_proxy="$NO_PROXY"',
        ]
        # Last of all: that it is there says that the cluster is whole.
        put(self.env, "\n".join(lines) + "\n")

    def _boot_new(self, number: int) -> None:
        made = self.node(number)
        made.make()
        made.boot([other for other in self.nodes_up() if other != number])
        network.route_services(self.nodes_up())
        made.load(self.programs.pause / "image.tar")
        if self.options.dns:
            made.load(self.programs.coredns / "image.tar")
        if self.options.metrics:
            made.load(build.metrics_server() / "image.tar")
        for archive in self.options.images:
            made.load(Path(archive))

    def _join(self, number: int) -> None:
        for program in ("kubelet", "kube-proxy"):
            self.node(number).start(program)

    def add(self, number: int | None = None) -> int:
        """Add a node, by default the next; return its number once it is Ready."""
        with machine.alone(), machine.marking(self.home):
            there = self.numbers()
            number = max(there, default=0) + 1 if number is None else number
            if number in there or not 1 <= number <= MAXIMUM_NODES:
                raise ClusterError(
                    node_name(number), "cannot be added", f"1 to {MAXIMUM_NODES}, without {there}"
                )
            self._boot_new(number)
            self._join(number)
            self.await_ready([number])
        return number

    def add_metrics_server(self) -> None:
        """Give a cluster metrics-server that was brought up without; return once it answers.

        It is built if it is not in the cache. Each pod is in it once its node has measured the
        pod twice, which takes up to a minute. Does nothing where it is already.
        """
        image = build.metrics_server() / "image.tar"
        with machine.alone(), machine.marking(self.home):
            known = self._known()
            for number in self.nodes_up():
                self.node(number).load(image)
            # Nodes that come later get the image by this.
            options = replace(self.options, metrics=True)
            put(self.home / _STATE, {**known, "options": options.as_json()})
            self._deploy_metrics_server()

    def crash(self, number: int) -> None:
        """Switch a node off as a power failure would; its disk is kept."""
        with machine.alone(), machine.marking(self.home):
            self.existing(number).crash()
            network.route_services(self.nodes_up())

    def boot(self, number: int) -> None:
        """Switch a node on again, with all its programs; does not wait until it is Ready."""
        with machine.alone(), machine.marking(self.home):
            self.existing(number).boot([n for n in self.nodes_up() if n != number])
            network.route_services(self.nodes_up())
            self._join(number)

    def existing(self, number: int) -> Node:
        """One of its nodes. Raises ClusterError if it has none of that number."""
        if number not in self.numbers():
            listed = ", ".join(map(str, self.numbers())) or "none"
            raise ClusterError(node_name(number), "there is no such node", f"there are: {listed}")
        return self.node(number)

    def load(self, archive: Path, numbers: Iterable[int] = ()) -> list[str]:
        """Import an image archive in nodes, in all that are up by default.

        Returns the images' names. Raises ClusterError when it is no archive, or names no image.
        """
        found = images.names(archive)
        self._known()
        nodes = list(numbers) or self.nodes_up()
        if not nodes:
            raise ClusterError("loading images", "no node is up", "`make cluster`")
        for number in nodes:
            self.existing(number).load(archive)
        return found

    # Down.

    def down(self) -> None:
        """Take everything away, in whatever state it is, and check that nothing is left.

        Does nothing where there is no cluster. Raises ClusterError when the folder is not a
        cluster's, or when something cannot be removed.
        """
        need_root()
        with machine.alone():
            state = self._state()
            if state is not None or machine.marked(self.home):
                self._take_away(machine.Record.from_json(state["record"]) if state else None)
            elif self.home.exists():
                self._remove_beginnings()

    def _take_away(self, record: machine.Record | None) -> None:
        machine.end_marked(self.home)
        names = {node_name(number) for number in self.numbers()} | cgroups.named()
        if machine.NAMESPACES.exists():
            names |= {path.name for path in machine.NAMESPACES.iterdir()}
        for match in filter(None, map(NODE_NAME.fullmatch, sorted(names))):
            node.switch_off(int(match[1]))
        # What a killed `up` was just starting has the mark by now.
        machine.end_marked(self.home)
        network.remove()
        if record:
            record.restore()
        mounted = [point for point in machine.mount_points() if self.home in point.parents]
        if mounted:
            raise ClusterError(f"{self.home}", f"{mounted[0]} is mounted", "unmount it first")
        self._remove_files()
        left = machine.leftovers(self.home, record)
        if left:
            raise ClusterError("something of the cluster is left", ", ".join(left))

    def _remove_files(self) -> None:
        """Remove the folder, its state last: `down` may be killed and begin again."""
        if not self.home.exists():
            return
        for path in self.home.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != _STATE:
                path.unlink()
        (self.home / _STATE).unlink(missing_ok=True)
        self.home.rmdir()

    def _remove_beginnings(self) -> None:
        """Remove the folder of an `up` that was killed before it changed anything.

        Raises ClusterError if something else is in it.
        """
        unfinished = self.home / f"{_STATE}.new"
        others = [path.name for path in self.home.iterdir() if path != unfinished]
        if others:
            why = f"is no cluster's folder: it has {others[0]}"
            raise ClusterError(f"{self.home}", why, "check --dir")
        unfinished.unlink(missing_ok=True)
        self.home.rmdir()
