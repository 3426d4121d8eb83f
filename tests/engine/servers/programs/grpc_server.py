"""A gRPC service on port 50051, of methods that take and give bytes.

Echo gives back what it got. Publish hands it to all Watch streams. Chat numbers what comes.
"""

import concurrent.futures
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grpc  # type: ignore[import-not-found, import-untyped, unused-ignore]

watchers: list[queue.SimpleQueue[bytes]] = []


def echo(request: bytes, _: Any) -> bytes:
    return request


def publish(request: bytes, _: Any) -> bytes:
    for watcher in watchers:
        watcher.put(request)
    return b"%d" % len(watchers)


def watch(_: bytes, context: Any) -> Iterator[bytes]:
    mine: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    watchers.append(mine)
    context.add_callback(lambda: mine.put(b""))
    yield b"watching"
    while message := mine.get():
        yield message
    watchers.remove(mine)


def chat(requests: Iterator[bytes], _: Any) -> Iterator[bytes]:
    for number, request in enumerate(requests):
        yield b"%d %s" % (number, request)


class Service(grpc.GenericRpcHandler):  # type: ignore[misc, unused-ignore]
    """The methods, whatever the name of the service."""

    handlers: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {  # noqa: RUF012
        "Echo": (grpc.unary_unary_rpc_method_handler, echo),
        "Publish": (grpc.unary_unary_rpc_method_handler, publish),
        "Watch": (grpc.unary_stream_rpc_method_handler, watch),
        "Chat": (grpc.stream_stream_rpc_method_handler, chat),
    }

    def service(self, details: Any) -> Any:
        make, method = self.handlers[details.method.rpartition("/")[2]]
        return make(method)


server = grpc.server(concurrent.futures.ThreadPoolExecutor(8), [Service()])
server.add_insecure_port("0.0.0.0:50051")
server.start()
print("ready", flush=True)
threading.Event().wait()
