"""Serves an ASGI application on a socket without changing the process: no signal handlers, no output."""

import asyncio
import ipaddress
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any

from tinkex_py.arguments import check_count, check_function, check_text
from tinkex_py.errors import ConfigError


def is_loopback(host: str) -> bool:
    """Whether an address is reachable from this machine only."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_listening(host: str, port: int, on_listening: Callable[[str], object]) -> None:
    """Raises ConfigError if an argument of a function that serves has the wrong type."""
    check_text("host", host, error=ConfigError)
    check_count("port", port, least=0, error=ConfigError)
    check_function("on_listening", on_listening, error=ConfigError)


def listen(host: str, port: int) -> socket.socket:
    """Returns a bound socket.

    Args:
        host: name or address.
        port: 0 chooses a free one.

    Raises:
        ConfigError: the address cannot be used.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}. Choose another host or port") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}. Choose another host or port") from error
    return listener


def address_of(listener: socket.socket) -> str:
    """Returns the base URL of a socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve_app(
    app: Any,
    listener: socket.socket,
    *,
    on_listening: Callable[[], None],
    before_shutdown: Callable[[], None],
    lifespan: bool = False,
) -> None:
    """Serves with uvicorn until cancelled. Prints nothing and installs no signal handlers.

    Args:
        app: an ASGI application.
        listener: a bound socket, which the caller closes.
        on_listening: called once, when connections are accepted.
        before_shutdown: ends endless responses; the shutdown waits for all others.
        lifespan: whether the application gets lifespan events.
    """
    import uvicorn

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Generator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_listening()

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            before_shutdown()
            await super().shutdown(sockets)

    config = uvicorn.Config(
        app,
        lifespan="on" if lifespan else "off",
        log_config=None,
        access_log=False,
        timeout_graceful_shutdown=5,
        timeout_keep_alive=60,
    )
    server = Server(config)
    # A cancelled uvicorn leaves its connections open: let it finish instead.
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        server.should_exit = True
        await running
        raise
