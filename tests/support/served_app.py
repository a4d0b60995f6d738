"""Serves an ASGI application with uvicorn on a free port of loopback."""

import asyncio
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import uvicorn


@asynccontextmanager
async def served_app(app: Any, server_class: type[uvicorn.Server] = uvicorn.Server) -> AsyncIterator[Any]:
    """Yields the server, with its address as `url`; stops it at the end, lifespan included."""
    started = asyncio.Event()

    class Server(server_class):  # type: ignore[misc, valid-type]
        url = ""

        @contextmanager
        def capture_signals(self) -> Iterator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            self.url = f"http://127.0.0.1:{self.servers[0].sockets[0].getsockname()[1]}"
            started.set()

    config = uvicorn.Config(app, host="127.0.0.1", port=0, log_config=None, access_log=False, lifespan="on")
    server = Server(config)
    running = asyncio.create_task(server.serve())
    try:
        async with asyncio.timeout(30):
            await started.wait()
        yield server
    finally:
        server.should_exit = True
        await running
