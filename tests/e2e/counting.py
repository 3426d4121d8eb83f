"""A client that counts: runs as it is, in a pod of the tests and on the host.

`python counting.py KEY SECONDS PAUSE_MS ADDRESS PORT` keeps one connection to a valkey, increments a key of
its own again and again and checks each reply. The last line it prints is JSON: how many were answered, the
longest time that an answer took in ms, what went wrong ("" for nothing). Standard library only: pods have
nothing else.
"""

import json
import socket
import sys
import time


def main() -> None:
    key, seconds, pause_ms, address, port = sys.argv[1:6]
    end = time.monotonic() + float(seconds)
    pause = float(pause_ms) / 1000
    count, longest, error, at = 0, 0.0, "", 0.0
    began = time.time()
    try:
        with socket.create_connection((address, int(port)), timeout=30) as link:
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            link.settimeout(60)
            replies = link.makefile("rb")
            request = f"INCR {key}\r\n".encode()
            print("connected", flush=True)
            while time.monotonic() < end:
                before = time.monotonic()
                link.sendall(request)
                reply = replies.readline()
                taken = time.monotonic() - before
                if reply != b":%d\r\n" % (count + 1):
                    raise ValueError(f"after {count} came {reply!r}")
                count += 1
                if taken > longest:
                    longest, at = taken, time.time() - began
                time.sleep(pause)
    except (OSError, ValueError) as trouble:
        error = repr(trouble)
    done = {
        "key": key,
        "count": count,
        "longest_ms": round(longest * 1000, 1),
        "at_s": round(at, 2),
    }
    print(json.dumps({**done, "error": error}), flush=True)


if __name__ == "__main__":
    main()
