"""A program that calls others: talker.py HOST PORT. Ten times a second it sends on one connection.

With each goes a datagram to the same port, where nobody listens, so that ICMP comes back; and, where
a server of its own listens on port 9000, a line over lo.
"""

import contextlib
import socket
import sys
import threading

host, port = sys.argv[1], int(sys.argv[2])
connection = socket.create_connection((host, port))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
own = socket.create_server(("", 9000))
local = socket.create_connection(("127.0.0.1", 9000))
answers = own.accept()[0]
print("ready", flush=True)
number = 0
while not threading.Event().wait(0.1):
    number += 1
    connection.sendall(b"%d\n" % number)
    with contextlib.suppress(ConnectionRefusedError):
        datagrams.sendto(b"%d" % number, (host, port))
    local.sendall(b"%d\n" % number)
    answers.recv(100)
