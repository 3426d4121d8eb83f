"""A gRPC client: grpc_client.py HOST:PORT METHOD. Calls the method and prints what it gives.

METHOD is Echo or Publish (each line that is read is a call), Watch (one call, no input) or Chat (one
call, each line a message of it).
"""

import sys

import grpc  # type: ignore[import-not-found, import-untyped, unused-ignore]

target, method = sys.argv[1:]
lines = (line.rstrip("\n").encode() for line in iter(sys.stdin.readline, ""))
with grpc.insecure_channel(target) as channel:
    path = f"/architect.Test/{method}"
    if method == "Watch":
        answers = channel.unary_stream(path)(b"")
    elif method == "Chat":
        answers = channel.stream_stream(path)(lines)
    else:
        answers = map(channel.unary_unary(path), lines)
    for answer in answers:
        print(answer.decode(), flush=True)
