"""UDP: the datagram that wakes a server is answered itself; its sender does not repeat it."""

import functools
import socket

import pytest

from tests.engine.servers.capture import Capture
from tests.engine.servers.machine import Machine
from tests.engine.servers.serving import serve
from tests.engine.support import Container, Done, Lab, wait_until

pytestmark = pytest.mark.engine


# ---- DNS ------------------------------------------------------------------------------------------

UNBOUND = """
server:
    interface: 0.0.0.0
    access-control: 0.0.0.0/0 allow
    chroot: ""
    username: ""
    directory: "/tmp"
    pidfile: ""
    use-syslog: no
    do-ip6: no
    module-config: "iterator"
    local-zone: "architect.test." static
    local-data: "www.architect.test. A 192.0.2.7"
    local-data: "long.architect.test. TXT LONG"
""".replace("LONG", " ".join([f"'{'x' * 250}'"] * 12))


def dig(client: Machine, server: Container, *words: str) -> str:
    """Ask once; after three seconds it is too late."""
    return client.must("dig", "+tries=1", "+time=3", "+short", f"@{server.address}", *words)


@pytest.fixture(scope="module")
def unbound(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "unbound",
        *("unbound", "-d", "-c", "/tmp/conf"),
        configuration=UNBOUND,
        port=53,
        expose=["53/udp"],
        ready=lambda server: (
            client.run("dig", "+tries=1", "+time=1", f"@{server.address}", "version.bind").code == 0
        ),
    )


def test_dig_asks_a_sleeper_once(unbound: Container, client: Machine, wire: Capture) -> None:
    for _ in range(5):
        unbound.sleep()
        assert dig(client, unbound, "www.architect.test") == "192.0.2.7"
    assert wire.exchanges("udp", 53) == ["><"] * 5


def test_dig_asks_a_sleeper_over_tcp(unbound: Container, client: Machine, wire: Capture) -> None:
    unbound.sleep()
    # Longer than a datagram may be here, so it is asked again over TCP; the second time at once so.
    for words in (("+bufsize=512",), ("+tcp",)):
        assert len(dig(client, unbound, "long.architect.test", "TXT", *words)) > 3000
        unbound.sleep()
    assert wire.exchanges("udp", 53) == ["><"]
    assert len(wire.exchanges("tcp", 53)) == 2


# ---- statsd ---------------------------------------------------------------------------------------

COLLECTD = """
Hostname "host"
FQDNLookup false
Interval 1
LoadPlugin logfile
<Plugin logfile>
    File STDOUT
</Plugin>
LoadPlugin csv
<Plugin csv>
    DataDir "stdout"
</Plugin>
LoadPlugin statsd
<Plugin statsd>
    Host "0.0.0.0"
    Port "8125"
</Plugin>
"""


def is_logged(server: Container, text: str) -> bool:
    return any(text in line for line in server.logs())


@pytest.fixture(scope="module")
def statsd(shared_lab: Lab) -> Container:
    return serve(
        shared_lab,
        "statsd",
        *("stdbuf", "-oL", "collectd", "-f", "-C", "/tmp/conf"),
        configuration=COLLECTD,
        port=8125,
        expose=["8125/udp"],
        ready=lambda server: is_logged(server, "Initialization complete"),
    )


def test_statsd_counts_what_came_while_it_slept(
    statsd: Container, client: Machine, wire: Capture
) -> None:
    with client.inside(), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
        sender.connect((statsd.address, 8125))
        for number in range(1, 3):
            statsd.sleep()
            for _ in range(10):
                sender.send(b"level:+1|g")
            expected = f":{10 * number}.000000"
            logged = functools.partial(is_logged, statsd, expected)
            wait_until(logged, f"a log of {expected}")
    assert wire.exchanges("udp", 8125) == [">" * 20]


# ---- QUIC -----------------------------------------------------------------------------------------

CADDY = """
{
    admin off
    auto_https disable_redirects
    skip_install_trust
}
https://localhost {
    tls internal
    respond "hello over {http.request.proto}"
}
"""


PAGE = "|hello over HTTP/|"
"""A line of the page, as the client shows it."""


def is_shown(done: Done) -> bool:
    """Whether the client got its page; it says so where it says all the rest, on stderr."""
    return PAGE in done.out + done.err


def http3(server: Container, *words: str) -> list[str]:
    """The command of a client that asks for one page; it calls a server without a name localhost."""
    return [
        *("stdbuf", "-oL", "gtlsclient", "--no-quic-dump", "--exit-on-all-streams-close"),
        *words,
        *(server.address, "443", "https://localhost/"),
    ]


@pytest.fixture(scope="module")
def caddy(shared_lab: Lab, client: Machine) -> Container:
    return serve(
        shared_lab,
        "caddy",
        *("caddy", "run", "--config", "/tmp/conf", "--adapter", "caddyfile"),
        configuration=CADDY,
        options=["--env", "HOME=/tmp"],
        port=443,
        expose=["443/udp"],
        ready=lambda server: is_shown(client.run(*http3(server, "--timeout=2s"))),
    )


def test_http3_asks_a_sleeper(caddy: Container, client: Machine, wire: Capture) -> None:
    for _ in range(3):
        caddy.sleep()
        assert is_shown(client.run(*http3(caddy)))
    flows = wire.exchanges("udp", 443)
    assert len(flows) == 3
    # The client's first flight is one datagram; a second before an answer would be a repetition.
    assert all(flow.startswith("><") for flow in flows), flows


def test_http3_connection_goes_on(caddy: Container, client: Machine, wire: Capture) -> None:
    """The client keeps silent after the handshake; its server is asleep when it asks."""
    with client.session(*http3(caddy, "--delay-stream=3s")) as connection:
        connection.until("handshake has been confirmed")
        caddy.sleep()
        connection.until(PAGE)
    assert len(wire.exchanges("udp", 443)) == 1
