"""The embedded service behind a real socket."""

from collections.abc import Callable
from importlib.util import find_spec

from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.service import LocalService
from tinkex_py.serving import address_of, is_loopback, listen, serve_app


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
    from tinkex_py.local.middleware import LoopbackOnly

    service = LocalService(options)
    listener = listen(host, port)
    try:
        address = address_of(listener)
        await service.start()
        # Open polls would keep their connections, and so the shutdown, waiting.
        await serve_app(
            service.app if options.api_key is not None else LoopbackOnly(service.app),
            listener,
            on_listening=lambda: on_listening(address),
            before_shutdown=service.close_polls,
        )
    finally:
        listener.close()
        await service.stop()
