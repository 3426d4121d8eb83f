"""Language runtimes with sockets and rings that CRIU refuses hibernate and wake all the same.

Node.js with io_uring asked for, Go whose listeners are Multipath TCP by default, and Python: each
serves HTTP, and one keep-alive connection lives through its cycles.
"""

import http.client
import os
import re
import shutil
from pathlib import Path

import pytest

from tests.engine.support import PORT, Container, Lab, must, run, wait_until

pytestmark = pytest.mark.engine

profiles = pytest.mark.parametrize(
    "profile", [[], ["--security-opt", "seccomp=unconfined"]], ids=["default", "unconfined"]
)
ROOT = Path(__file__).resolve().parents[2]
CYCLES = 4

NODE = """
const timers = [];
let count = 0, ticks = 0;
setInterval(() => { ticks++; }, 10);
require('http').createServer((request, response) => {
  require('fs').readFile('/etc/hostname', () => {
    count++;
    response.end(`${count} ${ticks > 0}`);
  });
}).listen(7000, '::').keepAliveTimeout = 0;
"""

GO = """
package main

import (
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

func main() {
	var count, ticks atomic.Int64
	go func() {
		for range time.Tick(10 * time.Millisecond) {
			ticks.Add(1)
		}
	}()
	listener, err := net.Listen("tcp", ":7000")
	if err != nil {
		panic(err)
	}
	http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		fmt.Fprintf(w, "%d %v", count.Add(1), ticks.Load() > 0)
	}))
}
"""

PYTHON = """
import http.server, itertools, threading, time
counter, ticks = itertools.count(1), itertools.count()
def tick():
    while True:
        next(ticks)
        time.sleep(0.01)
threading.Thread(target=tick, daemon=True).start()
class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    def do_GET(self):
        words = f"{next(counter)} {next(ticks) > 0}".encode().replace(b"True", b"true")
        self.send_response(200)
        self.send_header("Content-Length", str(len(words)))
        self.end_headers()
        self.wfile.write(words)
http.server.ThreadingHTTPServer(("", 7000), Handler).serve_forever()
"""


def cycles(container: Container) -> None:
    """Let it hibernate again and again under one connection; its count must go on."""

    def connected() -> http.client.HTTPConnection | None:
        connection = http.client.HTTPConnection("127.0.0.1", container.host_port, timeout=15)
        try:
            connection.request("GET", "/")
            assert connection.getresponse().read().startswith(b"1 ")
        except OSError:
            connection.close()
            return None
        return connection

    connection = wait_until(connected, "the server to answer")
    try:
        mine = connection.sock
        for number in range(2, CYCLES + 2):
            container.sleep()
            assert container.processes() == [container.keeper]
            connection.request("GET", "/")
            assert connection.getresponse().read() == f"{number} true".encode()
            assert connection.sock is mine, "the server has closed the connection"
        assert container.hibernations() == CYCLES
    finally:
        connection.close()


@pytest.fixture(scope="session")
def node() -> list[str]:
    """Podman's options that bring this machine's Node.js into a container."""
    found = shutil.which("node")
    if found is None:
        pytest.skip("this machine has no node (`apt install nodejs`)")
    program = Path(found).resolve()
    options = ["-v", f"{program}:{program}:ro"]
    for library in re.findall(r"=> (\S*/lib(?:stdc\+\+|gcc_s)\.\S+)", must("ldd", str(program))):
        options += ["-v", f"{Path(library).resolve()}:{library}:ro"]
    return [*options, "-e", f"NODE={program}"]


@pytest.fixture(scope="session")
def go_server(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The program GO, static."""
    go = shutil.which("go", path=f"{os.environ['PATH']}:/usr/local/go/bin")
    if go is None:
        pytest.skip("this machine has no go")
    place = tmp_path_factory.mktemp("go")
    (place / "main.go").write_text(GO)
    built = place / "server"
    environment = ["env", "CGO_ENABLED=0", f"GOCACHE={ROOT}/build/go-cache", "GO111MODULE=off"]
    environment.append("GOTOOLCHAIN=local")
    done = run(*environment, go, "build", "-o", str(built), str(place / "main.go"), deadline=180)
    assert done.code == 0, done.err
    return built


@profiles
def test_node_with_io_uring(lab: Lab, node: list[str], profile: list[str]) -> None:
    options = [*node, *profile, "-e", "UV_USE_IO_URING=1"]
    program = node[-1].removeprefix("NODE=")
    cycles(lab.start("node", program, "-e", NODE, options=options))


@profiles
def test_go_with_mptcp_listeners(lab: Lab, go_server: Path, profile: list[str]) -> None:
    options = ["-v", f"{go_server}:/server:ro", *profile]
    cycles(lab.start("go", "/server", options=options))


def test_python_with_threads(lab: Lab) -> None:
    assert PORT == 7000
    cycles(lab.start("python", "python3", "-c", PYTHON))
