"""The embedded service behind a real socket."""

import asyncio
import socket
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING

from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.local.addresses import is_loopback
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.service import LocalService

if TYPE_CHECKING:
    import uvicorn


async def serve(
    options: LocalOptions, host: str = "127.0.0.1", port: int = 0, *, on_listening: Callable[[str], None]
) -> None:
    """Serve until cancelled, then stop the engine. Prints nothing and leaves the process's signals alone.

    Args:
        options: settings of the service.
        host: address to listen on.
        port: TCP port; 0 takes a free one.
        on_listening: called once with the base URL when connections are accepted.

    Raises:
        ConfigError: a host that others can reach without an api_key, or an address that cannot be used.
        MissingExtra: uvicorn is not installed.
    """
    if options.api_key is None and not is_loopback(host):
        raise ConfigError(f"host {host!r} can be reached by others: set an api_key, or use 127.0.0.1")
    if find_spec("uvicorn") is None:
        raise MissingExtra("uvicorn", "local")
    import uvicorn

    service = LocalService(options)
    from tinkex_py.local.guards import LoopbackOnly

    class Server(uvicorn.Server):
        @contextmanager
        def capture_signals(self) -> Generator[None]:
            yield

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_listening(address)

        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            # Open polls would keep their connections, and so the shutdown, waiting.
            service.close_polls()
            await super().shutdown(sockets)

    listener = _listen(host, port)
    try:
        address = _address(listener)
        config = uvicorn.Config(
            service.app if options.api_key is not None else LoopbackOnly(service.app),
            lifespan="off",
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=5,
            timeout_keep_alive=60,
        )
        await service.start()
        await _run_until_cancelled(Server(config), listener)
    finally:
        listener.close()
        await service.stop()


async def _run_until_cancelled(server: "uvicorn.Server", listener: socket.socket) -> None:
    # A cancelled uvicorn leaves its connections open: let it finish instead.
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        await asyncio.shield(running)
    except asyncio.CancelledError:
        server.should_exit = True
        await running
        raise


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
    except (OSError, OverflowError) as error:
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(place)
    except OSError as error:
        listener.close()
        raise ConfigError(f"cannot listen on {host}:{port}: {error}") from error
    return listener


def _address(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
