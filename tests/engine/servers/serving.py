"""Starts real servers as managed containers, for the tests beside it.

A server hibernates when a test says so, unless the test gives its idle time. Its configuration comes
with the test, in the environment: the image has the programs only, and databases ready to be served.
"""

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Final

from tests.engine.servers.machine import Machine
from tests.engine.support import Container, Lab, Unmet, wait_until

SERVERS_IMAGE: Final = "localhost/architect-test-servers:1"
_READY_S: Final = 30.0

NGINX: Final = """\
load_module /usr/lib/nginx/modules/ngx_nchan_module.so;
daemon off;
user www-data;
worker_processes 2;
error_log stderr;
pid /tmp/pid;
events {}
http {
    access_log off;
    client_max_body_size 0;
    server {
        listen 80;
        listen 81 http2;
        location = / {
            return 200 "hello over $server_protocol";
        }
        location = /upload {
            proxy_pass http://127.0.0.1:82/;
        }
        location ~ ^/pub/(\\w+)$ {
            nchan_publisher;
            nchan_channel_id $1;
        }
        location ~ ^/sub/(\\w+)$ {
            nchan_subscriber;
            nchan_channel_id $1;
        }
        location ~ ^/both/(\\w+)$ {
            nchan_pubsub;
            nchan_channel_id $1;
        }
    }
    server {
        listen 127.0.0.1:82;
        location / {
            return 200 "took $content_length";
        }
    }
}
"""
"""Pages on port 80, and on 81 over HTTP/2; channels to publish and subscribe to; a taker of long bodies."""


def serve(
    lab: Lab,
    stem: str,
    *command: str,
    port: int,
    ready: Callable[[Container], Any],
    expose: Sequence[str] = (),
    configuration: str = "",
    options: Sequence[str] = (),
    **keywords: Any,
) -> Container:
    """Start a server and wait until it is ready.

    `port` is its TCP port, and `expose` names more, as 53/udp. The configuration is the file `/tmp/conf`.
    `keywords` are those of Lab.start.
    """
    words = [*options]
    for one in expose:
        words += ["--expose", one]
    if configuration:
        words += ["--env", f"CONFIGURATION={configuration}"]
        script = 'printf %s "$CONFIGURATION" > /tmp/conf; exec "$@"'
        command = ("sh", "-c", script, "sh", *command)
    container = lab.start(
        stem, *command, image=SERVERS_IMAGE, options=words, program_port=port, **keywords
    )

    def logged() -> str:
        return "\n".join(container.logs()[-20:])

    try:
        wait_until(lambda: ready(container), f"{stem} to serve", _READY_S)
    except AssertionError as error:
        error.add_note(logged())
        raise
    return container


def serve_pages(lab: Lab, client: Machine, stem: str, **keywords: Any) -> Container:
    """Start an nginx with the configuration NGINX."""
    return serve(
        lab,
        stem,
        *("nginx", "-e", "stderr", "-c", "/tmp/conf"),
        configuration=NGINX,
        port=80,
        expose=["81"],
        ready=lambda server: client.run("curl", "-sf", f"http://{server.address}/").code == 0,
        **keywords,
    )


def stays(container: Container, state: str, seconds: float) -> None:
    """See to it that a container is in a state, and in it the whole time."""
    before = container.hibernations()
    assert container.state() == state
    with contextlib.suppress(Unmet):
        wait_until(lambda: container.state() != state, "nothing", seconds)
        raise AssertionError(f"{container.name} is {container.state()}, not {state}")
    assert container.hibernations() == before
