"""A pod and a client, as two network namespaces of this process, for the gate's tests.

Sockets stay in the namespace in which they were made, so one process plays all
parts. Whether the pod ever sent a reset is read from its TCP counters (OutRsts
in /proc/net/snmp), not guessed from what a client saw.
"""

import contextlib
import os
import select
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from architect.adapters import netns
from architect.adapters.gate import Gate

PORT = 7000
POD = {socket.AF_INET: "10.98.7.2", socket.AF_INET6: "fd98:7::2"}
LOOPBACK = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
CLIENT = {socket.AF_INET: "10.98.7.1", socket.AF_INET6: "fd98:7::1"}


def until(condition: Callable[[], bool], what: str, seconds: float = 5.0) -> None:
    """Wait for a condition, or fail saying what was waited for."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            pytest.fail(f"after {seconds} s still waiting for {what}")
        select.select([], [], [], 0.002)


def command(line: str) -> str:
    """Run a command, which must succeed, in the calling thread's namespace."""
    done = subprocess.run(line.split(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}: {done.stderr}"
    return done.stdout


class Network:
    """A pod's namespace and a client's, joined by veth, and the pod's gate."""

    def __init__(self, pin_dir: Path, program: Path) -> None:
        self.pin_dir = pin_dir
        self.program = program
        self.sockets: list[socket.socket] = []
        self.gates: list[Gate] = []
        self.pod = self._namespace()
        self.client = self._namespace()
        with netns.entered(self.pod):
            peer = f"/proc/{os.getpid()}/fd/{self.client}"
            command(f"ip link add eth0 type veth peer name eth0 netns {peer}")
            self._addresses(POD)
        with netns.entered(self.client):
            self._addresses(CLIENT)

    @staticmethod
    def _namespace() -> int:
        with netns.scratch():
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)

    @staticmethod
    def _addresses(addresses: dict[socket.AddressFamily, str]) -> None:
        netns.bring_up("lo")
        command(f"ip address add {addresses[socket.AF_INET]}/24 dev eth0")
        command(f"ip address add {addresses[socket.AF_INET6]}/64 dev eth0 nodad")
        netns.bring_up("eth0")

    def open(self) -> Gate:
        gate = Gate.open(self.pod, self.pin_dir, self.program)
        self.gates.append(gate)
        return gate

    def make_socket(self, namespace: int, family: int, kind: int) -> socket.socket:
        with netns.entered(namespace):
            made = socket.socket(family, kind)
        made.setblocking(False)
        self.sockets.append(made)
        return made

    def server(self, family: int, kind: int, port: int = PORT) -> socket.socket:
        server = self.make_socket(self.pod, family, kind)
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("0.0.0.0" if family == socket.AF_INET else "::", port))
        if kind == socket.SOCK_STREAM:
            server.listen()
        return server

    def caller(
        self, family: socket.AddressFamily, kind: int, through: str, port: int = PORT
    ) -> socket.socket:
        """Return a socket on its way to the pod's port."""
        caller = self.make_socket(self.client if through == "veth" else self.pod, family, kind)
        with contextlib.suppress(BlockingIOError):
            caller.connect(((POD if through == "veth" else LOOPBACK)[family], port))
        return caller

    def connection(
        self, family: socket.AddressFamily, through: str
    ) -> tuple[socket.socket, socket.socket]:
        """Return both ends of a TCP connection to a new server: client's, pod's."""
        server = self.server(family, socket.SOCK_STREAM)
        client = self.caller(family, socket.SOCK_STREAM, through)
        return client, self.accept(server)

    def accept(self, server: socket.socket) -> socket.socket:
        until(lambda: readable(server), "a connection to accept")
        accepted, _ = server.accept()
        accepted.setblocking(False)
        self.sockets.append(accepted)
        return accepted

    def resets(self) -> int:
        """Return how many resets the pod has sent."""
        with netns.entered(self.pod):
            lines = Path("/proc/thread-self/net/snmp").read_text().splitlines()
        names, values = (line.split() for line in lines if line.startswith("Tcp:"))
        return int(values[names.index("OutRsts")])

    def in_pod(self, line: str) -> str:
        with netns.entered(self.pod):
            return command(line)

    def close(self) -> None:
        for gate in self.gates:
            gate.close(remove=False)
        for opened in self.sockets:
            opened.close()
        os.close(self.pod)
        os.close(self.client)


def readable(source: socket.socket | Gate) -> bool:
    return bool(select.select([source], [], [], 0)[0])


def connected(client: socket.socket) -> bool:
    return bool(select.select([], [client], [], 0)[1]) and not failure(client)


def failure(client: socket.socket) -> int:
    return client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)


def received(destination: socket.socket, size: int = 1 << 16) -> bytes:
    until(lambda: readable(destination), "data")
    return destination.recv(size)


def held(gate: Gate, count: int, owner: int = 0) -> None:
    """Wait until the gate holds so many packets of an owner, and has seen them."""
    until(lambda: gate.activity(owner).held >= count, f"{count} packets to be held")
    until(lambda: bool(gate.receive() & 1 << owner), "the queue to name the owner")
