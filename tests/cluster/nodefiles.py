"""What stands in a node's files: settings of its programs, and the scripts that start it. Pure.

Only settings that differ from a usual node's have a comment. Called by node.py.
"""

import json
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from tests.cluster.cgroups import Hierarchy
from tests.cluster.settings import (
    DNS_ADDRESS,
    HOST_ADDRESS,
    PAUSE_IMAGE,
    POD_NET,
    Handler,
    node_address,
    node_name,
    pod_subnet,
)

KUBERNETES: Final = "/etc/kubernetes"
SUPERVISE: Final = f"{KUBERNETES}/supervise"
PROGRAMS: Final = ("containerd", "kubelet", "kube-proxy")
_RUNC: Final = "/opt/runc/runc"
_PATH: Final = (
    "/opt/kubernetes:/opt/containerd:/opt/runc:"
    "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
)
_DISABLED_PLUGINS: Final = (
    "io.containerd.internal.v1.restart",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.erofs",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
)
"""Whatever the version: containerd takes a name that it has not."""
_STATS: Final = ("stats_collect_period = 60",)


def command(program: str, number: int) -> list[str]:
    """How a node's program is called."""
    if program == "containerd":
        return ["containerd", "--config", "/etc/containerd/config.toml"]
    if program == "kube-proxy":
        return ["kube-proxy", f"--config={KUBERNETES}/proxy.json", "--v=1"]
    return [
        "kubelet",
        f"--config={KUBERNETES}/kubelet.json",
        f"--kubeconfig={KUBERNETES}/kubelet.kubeconfig",
        f"--hostname-override={node_name(number)}",
        f"--node-ip={node_address(number)}",
        "--cert-dir=/var/lib/kubelet/pki",
        # Less often than usual: most of an idle node's work is measuring itself.
        "--housekeeping-interval=30s",
        "--global-housekeeping-interval=5m",
        "--v=2",
    ]


def health(program: str) -> list[str]:
    """A command for inside the node that ends well once the program does its work."""
    if program == "containerd":
        return ["/opt/containerd/ctr", "--connect-timeout=1s", "version"]
    port = {"kubelet": 10248, "kube-proxy": 10256}[program]
    script = "import sys, urllib.request as r; r.urlopen(sys.argv[1], timeout=2)"
    return ["/usr/bin/python3", "-c", script, f"http://127.0.0.1:{port}/healthz"]


def kubelet(reserved: Mapping[str, str], more: Mapping[str, Any]) -> dict[str, Any]:
    """The KubeletConfiguration (kubelet.config.k8s.io/v1beta1)."""
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        # Kubernetes 1.35 refuses cgroup version 1 otherwise.
        "failCgroupV1": False,
        "cgroupDriver": "cgroupfs",
        # Lowering the one and raising the other takes CAP_SYS_RESOURCE, which not every root has.
        "oomScoreAdj": 0,
        "maxOpenFiles": 20000,
        "containerRuntimeEndpoint": "unix:///run/containerd/containerd.sock",
        "resolvConf": "/etc/resolv.conf",
        "clusterDNS": [DNS_ADDRESS],
        "clusterDomain": "cluster.local",
        "tlsCertFile": f"{KUBERNETES}/kubelet.crt",
        "tlsPrivateKeyFile": f"{KUBERNETES}/kubelet.key",
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{KUBERNETES}/ca.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "readOnlyPort": 0,
        "healthzBindAddress": "127.0.0.1",
        # The nodes share the host's disk, which may be fuller than a node's would be.
        "evictionHard": {
            "memory.available": "100Mi",
            "nodefs.available": "1%",
            "imagefs.available": "1%",
            "nodefs.inodesFree": "1%",
        },
        # Nothing is ever removed that could not be pulled again.
        "imageGCHighThresholdPercent": 100,
        "imageMinimumGCAge": "24h",
        "enableProfilingHandler": False,
        "enableSystemLogHandler": False,
        "nodeStatusUpdateFrequency": "10s",
        "nodeStatusReportFrequency": "5m",
        "nodeLeaseDurationSeconds": 40,
        "volumeStatsAggPeriod": "10m",
        "runtimeRequestTimeout": "2m",
        "shutdownGracePeriod": "0s",
        "systemReserved": dict(reserved),
        "enforceNodeAllocatable": ["pods"],
        "logging": {"verbosity": 2},
        **more,
    }


def proxy(number: int) -> dict[str, Any]:
    """The KubeProxyConfiguration (kubeproxy.config.k8s.io/v1alpha1)."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "clientConnection": {"kubeconfig": f"{KUBERNETES}/proxy.kubeconfig"},
        "hostnameOverride": node_name(number),
        "oomScoreAdj": 0,
        # What comes from outside the pods is masqueraded, the host's requests among it.
        "clusterCIDR": f"{POD_NET}.0.0/16",
        "detectLocalMode": "ClusterCIDR",
        "healthzBindAddress": "127.0.0.1:10256",
        "metricsBindAddress": "127.0.0.1:10249",
        "nodePortAddresses": ["primary"],
        # Sysctls of the whole machine; 0 leaves them alone.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
        "nftables": {"syncPeriod": "1h", "minSyncPeriod": "200ms"},
    }


def cni(number: int) -> dict[str, Any]:
    """The pods' network: point to point with the node, which routes."""
    addresses = {
        "type": "host-local",
        # On a tmpfs, as the namespaces are: a power failure would leak every lease elsewhere.
        "dataDir": "/run/cni",
        "routes": [{"dst": "0.0.0.0/0"}],
        "ranges": [[{"subnet": pod_subnet(number)}]],
    }
    return {
        "cniVersion": "1.0.0",
        "name": "pods",
        "plugins": [
            {"type": "ptp", "ipMasq": False, "mtu": 1500, "ipam": addresses},
            {"type": "portmap", "capabilities": {"portMappings": True}},
        ],
    }


def containerd(handlers: Mapping[str, Handler]) -> str:
    """containerd's configuration, version 3 (containerd 2)."""
    image = 'plugins."io.containerd.cri.v1.images"'
    return "\n".join(
        [
            *_top(3),
            f"[{image}]",
            *_STATS,
            f"[{image}.pinned_images]",
            f"sandbox = {json.dumps(PAUSE_IMAGE)}",
            *_runtime('plugins."io.containerd.cri.v1.runtime"', (), handlers),
            'bin_dirs = ["/opt/cni/bin"]',
            "",
        ]
    )


def old_containerd(handlers: Mapping[str, Handler]) -> str:
    """The same settings in version 2 (containerd 1.7), where one plugin has them all."""
    images = (*_STATS, f"sandbox_image = {json.dumps(PAUSE_IMAGE)}")
    return "\n".join(
        [
            *_top(2),
            *_runtime('plugins."io.containerd.grpc.v1.cri"', images, handlers),
            'bin_dir = "/opt/cni/bin"',
            "",
        ]
    )


def _top(version: int) -> list[str]:
    return [
        f"version = {version}",
        'root = "/var/lib/containerd"',
        'state = "/run/containerd"',
        "oom_score = 0",
        f"disabled_plugins = {json.dumps(_DISABLED_PLUGINS)}",
        "[debug]",
        'level = "warn"',
    ]


def _runtime(plugin: str, more: Sequence[str], handlers: Mapping[str, Handler]) -> list[str]:
    """The tables of the plugin that runs pods, `more` settings in the first; the last is its cni."""
    lines = [
        f"[{plugin}]",
        *more,
        # Without CAP_SYS_RESOURCE no Guaranteed pod's sandbox would start otherwise: runc may not
        # lower its OOM score ("can't get final child's PID from pipe: EOF").
        "restrict_oom_score_adj = true",
        "disable_apparmor = true",
        "tolerate_missing_hugetlb_controller = true",
        "disable_hugetlb_controller = true",
        f"[{plugin}.containerd]",
        'default_runtime_name = "runc"',
    ]
    for name, handler in {"runc": Handler(_RUNC), **handlers}.items():
        lines += [
            f"[{plugin}.containerd.runtimes.{name}]",
            'runtime_type = "io.containerd.runc.v2"',
            f"pod_annotations = {json.dumps(handler.pod_annotations)}",
            f"container_annotations = {json.dumps(handler.container_annotations)}",
            f"[{plugin}.containerd.runtimes.{name}.options]",
            "SystemdCgroup = false",
            f"BinaryName = {json.dumps(handler.binary)}",
        ]
    # Last, for where the plugins are has a name of its own in each version.
    return [*lines, f"[{plugin}.cni]", 'conf_dir = "/etc/cni/net.d"']


def etc(number: int) -> dict[str, str]:
    """Files of /etc that are this node's own."""
    return {
        "hostname": f"{node_name(number)}\n",
        "hosts": f"127.0.0.1 localhost\n{node_address(number)} {node_name(number)}\n",
        # Nobody answers there: a pod that asks for the node's DNS gets an answer of none at once.
        "resolv.conf": f"nameserver {HOST_ADDRESS}\noptions timeout:1 attempts:1\n",
    }


SUPERVISOR: Final = f"""\
#!/bin/sh
# supervise PROGRAM COMMAND...: runs the command in its own session, and half a second after its
# end again, as a service manager would (Restart=always), until /run/PROGRAM.stop is there.
program=$1
shift
export PATH={_PATH} HOME=/root
unset ARCHITECT_TEST_CLUSTER
echo $$ >/run/$program.supervisor
exec </dev/null >>/var/log/$program.log 2>&1
while ! [ -e /run/$program.stop ]; do
    "$@" &
    echo $! >/run/$program.pid
    wait $!
    sleep 0.5
done
"""


def init_script(
    name: str,
    root: Path,
    hierarchies: Sequence[Hierarchy],
    programs: Mapping[str, Path],
    shared: Sequence[str],
) -> str:
    """What a node's first process runs before it becomes the init; its namespaces are made.

    The node's root is a bind mount that is not recursive, and everything else is dropped after
    pivot_root(2): a copy of all mounts of the host would keep other programs' file systems and
    network namespaces busy. `programs` are the folders that appear in /opt.
    """

    def quoted(path: object) -> str:
        return shlex.quote(str(path))

    steps = [
        "set -e",
        f"echo {name} >/proc/sys/kernel/hostname",
        # Twice: the mount appears under a working directory that was there before it.
        f"cd {quoted(root)}",
        "mount --bind . .",
        f"cd {quoted(root)}",
        "mount -t proc proc proc",
        "mount -t sysfs sysfs sys",
    ]
    if not any(one.is_v2_alone for one in hierarchies):
        steps.append("mount -t tmpfs -o mode=755 tmpfs sys/fs/cgroup")
    for one in hierarchies:
        named = "none," if any(option.startswith("name=") for option in one.options) else ""
        options = f"-o {named}{','.join(one.options)} " if one.options else ""
        steps.append(f"mkdir -p {one.place}")
        steps.append(f"mount -t {one.kind} {options}cgroup {one.place}")
        if len(one.options) > 1:
            steps += [f"ln -s {one.folder.name} sys/fs/cgroup/{each}" for each in one.options]
    steps += [
        "mount --rbind /dev dev",
        "mount -t tmpfs -o mode=1777 tmpfs dev/shm",
        "mount -t tmpfs -o mode=755 tmpfs run",
        "mkdir -p run/netns run/lock run/containerd run/secrets",
        "mount --bind /usr usr",
        "mount -o remount,bind,ro usr",
        "mount --bind usr-local usr/local",
    ]
    for place, folder in programs.items():
        steps += [f"mkdir -p opt/{place}", f"mount --bind {quoted(folder)} opt/{place}"]
        steps.append(f"mount -o remount,bind,ro opt/{place}")
    for path in shared:
        here = quoted("./" + path.lstrip("/"))
        steps += [f"mkdir -p {here}", f"mount --bind {quoted(path)} {here}"]
    steps += [
        "pivot_root . .",
        "umount -l .",
        "cd /",
        # hostPath volumes with mountPropagation: Bidirectional need it, as on a usual machine.
        "mount --make-rshared /",
        "echo 1 >/proc/sys/net/ipv4/ip_forward",
        "echo 0 >/proc/sys/net/ipv4/conf/all/rp_filter",
        "exec catatonit -P",
    ]
    return "\n".join(steps) + "\n"
