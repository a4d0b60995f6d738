"""The one TLS context of all connections of a client."""

import asyncio
import ssl
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tinkex_py.errors import ConfigError


class SharedTlsContext:
    """Loaded at the first use, in a thread because that reads the certificate store; after a failure once more.

    Args:
        load: reads the certificate store.
    """

    def __init__(self, load: Callable[[], ssl.SSLContext]) -> None:
        self._load = load
        self._loading: asyncio.Future[ssl.SSLContext] | None = None

    async def get(self, *, with_certificates: bool) -> ssl.SSLContext:
        """The context.

        Args:
            with_certificates: some connection may need TLS; else nothing is loaded.

        Raises:
            ConfigError: the certificate store cannot be loaded.
        """
        failed = self._loading is not None and self._loading.done() and self._loading.exception()
        if self._loading is None or failed:
            self._loading = self._start(with_certificates=with_certificates)
        try:
            return await asyncio.shield(self._loading)
        except OSError as error:
            raise ConfigError(
                f"the certificate store cannot be loaded ({type(error).__name__}); check SSL_CERT_FILE and SSL_CERT_DIR"
            ) from error

    async def aclose(self) -> None:
        """Waits for the thread, if it still runs."""
        if self._loading is not None:
            await asyncio.wait([self._loading])

    def _start(self, *, with_certificates: bool) -> asyncio.Future[ssl.SSLContext]:
        loop = asyncio.get_running_loop()
        if not with_certificates:
            ready: asyncio.Future[ssl.SSLContext] = loop.create_future()
            ready.set_result(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
            return ready
        # A thread that ends with its only work; the loop's default executor would keep one.
        executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="tinkex.tls")
        try:
            return loop.run_in_executor(executor, self._load)
        finally:
            executor.shutdown(wait=False)
