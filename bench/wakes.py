"""First byte after a wake: on a connection that stayed open, by size, with a cold disk; and the peers.

A peer cannot keep the connection, so it is asked on a new one; what it does is timed from its command to the
first reply, which is what a client behind it would wait for at the least.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from bench import harness, valkey
from bench.harness import Samples

PORT = 16500
BUNDLE = Path("/usr/local/lib/architect/criu")
COMPAT = Path("/usr/local/lib/architect/libexec/criu-compat.so")


def architect(
    megabytes: int, n: int, name: str, *, cold: bool = False, pause_s: float = 1.2
) -> list[dict[str, Any]]:
    """Hibernates and wakes a valkey n times; the first byte on one connection, every reply checked.

    After a hibernation it is left alone for ``pause_s`` seconds, until its page cache has been given back:
    a wake that comes at once finds everything still in memory.
    """
    first = Samples(name, "architect", f"valkey {megabytes} MB, open connection")
    down = Samples("hibernate", "architect", f"valkey {megabytes} MB")
    pod = f"bench-wake-{megabytes}"
    with harness.container(pod, PORT):
        client = harness.connect(PORT)
        keys = valkey.fill(client, megabytes)
        for count in range(1, n + 1):
            down.ms.append(harness.sleep(pod)["last_scale_down_ms"])
            if cold:
                harness.drop_caches()
            time.sleep(pause_s)
            with first.timed():
                reply = client("INCR", "count")
            if reply != count:
                raise RuntimeError(f"the counter is {reply!r} after {count} increments")
        bad = valkey.wrong(client, keys)
        if bad:
            raise RuntimeError(f"{bad} of {keys} values are wrong")
        client.close()
    return [first.record(), down.record()]


def cold_start(n: int) -> list[dict[str, Any]]:
    """podman start of a stopped, empty valkey: what scaling to zero without checkpoints costs."""
    samples = Samples(
        "first byte", "podman start (cold start, data lost)", "valkey empty, new connection"
    )
    with harness.container("bench-cold", PORT, managed=False):
        harness.connect(PORT).close()
        for _ in range(n):
            harness.run(["podman", "stop", "-t", "2", "bench-cold"])
            with samples.timed():
                harness.run(["podman", "start", "bench-cold"])
                harness.connect(PORT).close()
    return [samples.record()]


@contextlib.contextmanager
def criu_on_path() -> Iterator[dict[str, str]]:
    """An environment in which engines find the same CRIU that architect uses."""
    folder = Path(tempfile.mkdtemp(prefix="architect-bench-"))
    wrapper = folder / "criu"
    loader = f"{BUNDLE}/lib/ld-linux-x86-64.so.2 --library-path {BUNDLE}/lib --preload {COMPAT}"
    wrapper.write_text(f'#!/bin/sh\nexec {loader} {BUNDLE}/bin/criu "$@"\n')
    wrapper.chmod(0o755)
    try:
        yield {"PATH": f"{folder}:{os.environ['PATH']}"}
    finally:
        shutil.rmtree(folder)


def podman_checkpoint(megabytes: int, n: int) -> list[dict[str, Any]]:
    """podman container checkpoint and restore, with runc."""
    up = Samples("first byte", "podman container restore", f"valkey {megabytes} MB, new connection")
    down = Samples("hibernate", "podman container checkpoint", f"valkey {megabytes} MB")
    with criu_on_path() as env, harness.container("bench-podman", PORT, managed=False):
        client = harness.connect(PORT)
        valkey.fill(client, megabytes)
        client.close()
        for _ in range(n):
            with down.timed():
                harness.run(["podman", "container", "checkpoint", "bench-podman"], env=env)
            with up.timed():
                harness.run(["podman", "container", "restore", "bench-podman"], env=env)
                harness.connect(PORT).close()
    return [up.record(), down.record()]


def runc_checkpoint(megabytes: int, n: int) -> list[dict[str, Any]]:
    """runc checkpoint and restore of a bundle of its own, in the host's network namespace."""
    up = Samples("first byte", "runc restore", f"valkey {megabytes} MB, new connection")
    down = Samples("hibernate", "runc checkpoint", f"valkey {megabytes} MB")
    with criu_on_path() as env, _bundle() as bundle:
        images = str(bundle / "images")
        # CRIU can put back a pipe, but not a file outside of the container.
        sink = subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL)

        def runc(*words: str) -> None:
            subprocess.run(
                ["runc", *words, "bench-runc"], stdin=subprocess.DEVNULL, stdout=sink.stdin,
                stderr=sink.stdin, check=True, timeout=60, env={**os.environ, **env},
            )  # fmt: skip

        runc("run", "--detach", "--bundle", str(bundle))
        try:
            client = harness.connect(PORT)
            valkey.fill(client, megabytes)
            client.close()
            for _ in range(n):
                with down.timed():
                    runc("checkpoint", "--image-path", images)
                with up.timed():
                    runc("restore", "--detach", "--image-path", images, "--bundle", str(bundle))
                    harness.connect(PORT).close()
        finally:
            subprocess.run(["runc", "delete", "-f", "bench-runc"], capture_output=True, check=False)
            sink.communicate()
    return [up.record(), down.record()]


@contextlib.contextmanager
def _bundle() -> Iterator[Path]:
    """A runc bundle of the valkey image that listens at PORT of the host's loopback."""
    folder = Path(tempfile.mkdtemp(prefix="architect-bench-"))
    holder = harness.run(["podman", "create", harness.IMAGE]).strip()
    try:
        (folder / "rootfs").mkdir()
        export = subprocess.Popen(["podman", "export", holder], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", str(folder / "rootfs")], stdin=export.stdout, check=True)
        export.wait()
        harness.run(["runc", "spec", "--bundle", str(folder)])
        spec = json.loads((folder / "config.json").read_text())
        spec["process"]["terminal"] = False
        spec["process"].pop("rlimits", None)
        spec["process"]["args"] = [*harness.SERVER, "--bind", "127.0.0.1", "--port", str(PORT)]
        spec["root"]["readonly"] = False
        spaces = spec["linux"]["namespaces"]
        spec["linux"]["namespaces"] = [space for space in spaces if space["type"] != "network"]
        (folder / "config.json").write_text(json.dumps(spec))
        yield folder
    finally:
        harness.run(["podman", "rm", holder])
        shutil.rmtree(folder)


def all_runs(quick: bool) -> list[Callable[[], list[dict[str, Any]]]]:
    """The benchmarks of this module; ``quick`` only shows that they work."""
    n, few = (5, 3) if quick else (100, 10)
    return [
        lambda: architect(50, n, "first byte"),
        lambda: architect(5, few if quick else 30, "first byte"),
        lambda: architect(1000, few, "first byte", pause_s=4.0),
        lambda: architect(50, 2 * few, "first byte, all caches dropped", cold=True),
        lambda: cold_start(few),
        lambda: podman_checkpoint(50, few),
        lambda: runc_checkpoint(50, few),
    ]
