"""The control plane: etcd, API server, controller manager and scheduler, in the host's namespaces.

It answers on the host's address on the cluster's own bridge only; etcd on the loopback. Nobody
starts these again when they end: a test that kills one says when. Called by cluster.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from tests.cluster import machine
from tests.cluster.base import ClusterError, succeeds, tail, until
from tests.cluster.pki import Pki
from tests.cluster.settings import API_PORT, HOST_ADDRESS, SERVICE_NET, Programs

_ETCD: Final = "http://127.0.0.1:23790"
_ETCD_PEER: Final = "http://127.0.0.1:23800"
_READY_S: Final = 90.0
_STARTED_S: Final = 10.0


@dataclass(frozen=True, slots=True)
class ControlPlane:
    """The control plane of the cluster at `home`."""

    home: Path
    programs: Programs

    @property
    def pki(self) -> Pki:
        """Its certificates."""
        return Pki(self.home / "pki")

    @property
    def admin(self) -> Path:
        """The kubeconfig that may do anything."""
        return self.home / "admin.kubeconfig"

    def _log(self, program: str) -> Path:
        return self.home / "log" / f"{program}.log"

    def _start(self, program: str, *flags: str) -> None:
        if self._runs(program):
            return
        command: list[str | Path] = [self.programs.kubernetes / program, *flags]
        machine.launch(self.home, self._log(program), command)
        until(f"{program} to start", lambda: self._runs(program), _STARTED_S)

    def _runs(self, program: str) -> bool:
        return program in machine.marked(self.home).values()

    def kill(self, *programs: str) -> None:
        """End programs with SIGKILL; nobody starts them again but `start_api`."""
        found = machine.marked(self.home)
        machine.end(pid for pid, program in found.items() if program in programs)

    def make(self) -> None:
        """Make the authority, everyone's certificates and kubeconfigs."""
        pki = self.pki
        pki.found()
        service = "kubernetes.default.svc"
        names = ("kubernetes", "kubernetes.default", service, f"{service}.cluster.local")
        addresses = (HOST_ADDRESS, f"{SERVICE_NET}.0.1", "127.0.0.1")
        known = [f"IP:{one}" for one in addresses] + [f"DNS:{one}" for one in names]
        pki.issue("apiserver", "kube-apiserver", alternatives=known)
        pki.issue("apiserver-kubelet", "kube-apiserver-kubelet-client", "system:masters")
        pki.issue("front-proxy", "front-proxy-client")
        pki.issue("admin", "admin", "system:masters")
        pki.issue("controller-manager", "system:kube-controller-manager")
        pki.issue("scheduler", "system:kube-scheduler")
        pki.issue("proxy", "system:kube-proxy")
        for name in ("admin", "controller-manager", "scheduler"):
            pki.kubeconfig(name, self.home / f"{name}.kubeconfig")

    def start_api(self) -> None:
        """Start etcd and the API server where they do not run, without waiting for them."""
        self._start(
            "etcd",
            "--name=e",
            f"--data-dir={self.home}/etcd",
            f"--listen-client-urls={_ETCD}",
            f"--advertise-client-urls={_ETCD}",
            f"--listen-peer-urls={_ETCD_PEER}",
            f"--initial-advertise-peer-urls={_ETCD_PEER}",
            f"--initial-cluster=e={_ETCD_PEER}",
            # Nothing of a test cluster has to survive the machine.
            "--unsafe-no-fsync",
            "--log-level=warn",
            "--heartbeat-interval=500",
            "--election-timeout=5000",
        )
        pki = self.pki
        issuer = "https://kubernetes.default.svc.cluster.local"
        self._start(
            "kube-apiserver",
            f"--etcd-servers={_ETCD}",
            f"--bind-address={HOST_ADDRESS}",
            f"--advertise-address={HOST_ADDRESS}",
            f"--secure-port={API_PORT}",
            f"--service-cluster-ip-range={SERVICE_NET}.0.0/16",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction",
            "--allow-privileged=true",
            f"--client-ca-file={pki.crt('ca')}",
            f"--tls-cert-file={pki.crt('apiserver')}",
            f"--tls-private-key-file={pki.key('apiserver')}",
            f"--kubelet-certificate-authority={pki.crt('ca')}",
            f"--kubelet-client-certificate={pki.crt('apiserver-kubelet')}",
            f"--kubelet-client-key={pki.key('apiserver-kubelet')}",
            "--kubelet-preferred-address-types=InternalIP",
            f"--service-account-issuer={issuer}",
            f"--service-account-key-file={pki.key('sa')}",
            f"--service-account-signing-key-file={pki.key('sa')}",
            f"--requestheader-client-ca-file={pki.crt('ca')}",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--proxy-client-cert-file={pki.crt('front-proxy')}",
            f"--proxy-client-key-file={pki.key('front-proxy')}",
            "--enable-aggregator-routing=true",
            "--profiling=false",
            "--v=1",
        )

    def await_api(self) -> None:
        """Wait until the API server is ready. Raises ClusterError at once if it or etcd ended."""
        ask = (self.programs.kubectl, "--kubeconfig", self.admin, "get", "--raw", "/readyz")
        env = machine.environment(self.home)

        def ready() -> bool:
            for program in ("etcd", "kube-apiserver"):
                if not self._runs(program):
                    raise ClusterError(program, f"it ended: {tail(self._log(program))}")
            return succeeds(*ask, timeout_s=10.0, env=env)

        log = self._log("kube-apiserver")
        until("the API server", ready, _READY_S, why=lambda: tail(log, 2))

    def start_controllers(self) -> None:
        """Start the controller manager and the scheduler."""
        pki = self.pki
        self._start(
            "kube-controller-manager",
            f"--kubeconfig={self.home}/controller-manager.kubeconfig",
            "--leader-elect=false",
            "--secure-port=0",
            f"--service-account-private-key-file={pki.key('sa')}",
            f"--root-ca-file={pki.crt('ca')}",
            "--use-service-account-credentials=true",
            f"--cluster-signing-cert-file={pki.crt('ca')}",
            f"--cluster-signing-key-file={pki.key('ca')}",
            "--allocate-node-cidrs=false",
            # Half of the usual time until a silent node counts as gone, for shorter tests.
            "--node-monitor-grace-period=20s",
            "--profiling=false",
            "--v=1",
        )
        self._start(
            "kube-scheduler",
            f"--kubeconfig={self.home}/scheduler.kubeconfig",
            "--leader-elect=false",
            "--secure-port=0",
            "--profiling=false",
            "--v=1",
        )
