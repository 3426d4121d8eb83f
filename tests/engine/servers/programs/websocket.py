"""A websocket client: websocket.py URI. Prints each message; sends each line that it reads."""

import asyncio
import sys

import websockets  # type: ignore[import-not-found, unused-ignore]


async def main(uri: str) -> None:
    lines = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(
        lambda: asyncio.StreamReaderProtocol(lines), sys.stdin
    )
    # No ping of its own: who only listens sends nothing.
    async with websockets.connect(uri, ping_interval=None) as connection:
        print("open", flush=True)

        async def listen() -> None:
            async for message in connection:
                print(message, flush=True)

        listening = asyncio.create_task(listen())
        while line := await lines.readline():
            await connection.send(line.decode().rstrip("\n"))
        listening.cancel()


asyncio.run(main(sys.argv[1]))
