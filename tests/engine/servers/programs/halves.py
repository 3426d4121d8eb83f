"""A server on port 7000, TCP and UDP, that keeps connections which its clients have half closed.

Answers each line with itself. After `half` it sends no more on that connection; `drop` ends all that
it keeps, and itself. What comes by UDP is taken and not answered.
"""

import select
import socket

listener = socket.create_server(("", 7000))
datagrams = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
datagrams.bind(("", 7000))
watched: list[socket.socket] = [listener, datagrams]
kept: list[socket.socket] = []
print("ready", flush=True)
while True:
    for one in select.select(watched, [], [])[0]:
        if one is listener:
            watched.append(one.accept()[0])
        elif one is datagrams:
            one.recv(65536)
        elif not (words := one.recv(65536)):
            watched.remove(one)
            kept.append(one)
        elif words == b"half\n":
            one.shutdown(socket.SHUT_WR)
        elif words == b"drop\n":
            for other in (*kept, *watched[2:]):
                other.close()
            kept.clear()
            del watched[2:]
            break
        else:
            one.sendall(words)
