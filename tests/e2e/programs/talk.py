"""Websockets over TLS: `talk.py serve CERTIFICATE`, an echo that numbers; `talk.py call HOST PORT`, a client.

CERTIFICATE is a PEM with its key. The client prints each message, and sends each line that it reads. Runs in
the servers' image, which has the package websockets.
"""

import asyncio
import ssl
import sys
import tempfile

import websockets  # type: ignore[import-not-found, unused-ignore]

PORT = 8443


async def serve(certificate: str) -> None:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(certificate)
        file.flush()
        context.load_cert_chain(file.name)

    async def talk(connection: websockets.WebSocketServerProtocol) -> None:
        number = 0
        async for message in connection:
            await connection.send(f"{number} {message}")
            number += 1

    async with websockets.serve(talk, "0.0.0.0", PORT, ssl=context, ping_interval=1):
        print("ready", flush=True)
        await asyncio.Future()


async def call(host: str, port: str) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    async with websockets.connect(f"wss://{host}:{port}/", ssl=context) as connection:
        print("open", flush=True)

        async def listen() -> None:
            async for message in connection:
                print(message, flush=True)

        listening = asyncio.create_task(listen())
        while line := await lines.readline():
            await connection.send(line.decode().rstrip("\n"))
        listening.cancel()


asyncio.run(serve(*sys.argv[2:]) if sys.argv[1] == "serve" else call(*sys.argv[2:]))
