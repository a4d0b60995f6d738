"""A TCP proxy that delays everything that a service sends: a network with a long return path.

    python -m benchmarks.delay_proxy 127.0.0.1:8000 --seconds 0.05

Answers that come at the same time are delayed at the same time, not one after another.
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable

_PIECE = 1 << 16

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Forwards at once, until the sender ends."""
    while piece := await reader.read(_PIECE):
        writer.write(piece)
        await writer.drain()
    writer.close()


async def pass_on_later(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, seconds: float) -> None:
    """Forwards every piece some seconds after its arrival, until the sender ends."""
    pieces: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    async def deliver() -> None:
        while True:
            due, piece = await pieces.get()
            await asyncio.sleep(due - loop.time())
            if not piece:
                break
            writer.write(piece)
            await writer.drain()
        writer.close()

    async with asyncio.TaskGroup() as group:
        group.create_task(deliver())
        piece = b"more"
        while piece:
            piece = await reader.read(_PIECE)
            pieces.put_nowait((loop.time() + seconds, piece))


def handler(host: str, port: int, seconds: float) -> Handler:
    """Forwards one connection in both directions."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        service_reader, service_writer = await asyncio.open_connection(host, port)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(pass_on(reader, service_writer))
                group.create_task(pass_on_later(service_reader, writer, seconds))
        except* ConnectionError:
            # One side has closed; there is nothing more to forward.
            writer.close()
            service_writer.close()

    return handle


async def serve(host: str, port: int, seconds: float) -> None:
    server = await asyncio.start_server(handler(host, port, seconds), "127.0.0.1", 0)
    async with server:
        print(f"Listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
        await server.serve_forever()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("service", help="HOST:PORT")
    parser.add_argument("--seconds", type=float, default=0.05)
    given = parser.parse_args()
    host, _, port = given.service.rpartition(":")
    asyncio.run(serve(host, int(port), given.seconds))


if __name__ == "__main__":
    main()
