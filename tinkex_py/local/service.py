"""The life of the embedded service: in this process, or behind a socket."""

import asyncio
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tinkex_py.arguments import check_kind, check_text
from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.limits import running_loop
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.worker import EngineWorker, WorkThreads
from tinkex_py.serving import address_of, check_listening, is_loopback, listen, serve_app
from tinkex_py.threads import import_before_threads

if TYPE_CHECKING:
    from tinkex_py.local.core import Core, Loaded
    from tinkex_py.types import Tokenizer


class LocalService:
    """A torch engine and its ASGI app. The constructor does no I/O and loads nothing.

    `start` and `stop` may be called repeatedly, and from several tasks of one event loop. After a cancelled `start`,
    `stop` is still required.

    Args:
        options: model, device, folders, key and limits.

    Raises:
        MissingExtra: fastapi is not installed.
    """

    def __init__(self, options: LocalOptions | None = None) -> None:
        try:
            from tinkex_py.local.app import build_app
        except ModuleNotFoundError as error:
            raise MissingExtra(str(error.name).partition(".")[0], "local") from error

        self.options = _checked(LocalOptions() if options is None else options)
        self.core: Core | None = None
        self._app = build_app(self, self.options.api_key)
        self._changing = asyncio.Lock()
        self._worker: EngineWorker | None = None
        self._loading: asyncio.Future[Loaded] | None = None
        self._threads: tuple[WorkThreads, ...] = ()
        self._housekeeping: list[asyncio.Task[None]] = []
        self._folder: TemporaryDirectory[str] | None = None

    @property
    def app(self) -> Any:
        """The ASGI app; it returns 503 unless the service runs."""
        return self._app

    @property
    def model_name(self) -> str:
        """The name of the model for clients."""
        return self.options.model

    @property
    def tokenizer(self) -> "Tokenizer":
        """The tokenizer of the model.

        Raises:
            ConfigError: the service is not running.
        """
        if self.core is None:
            raise ConfigError("the embedded service is not running: await service.start() first")
        return self.core.engine.model.tokenizer

    def tokenizer_for(self, name: str) -> "Tokenizer":
        """Returns the tokenizer of a model by name.

        Raises:
            ConfigError: the service does not serve this model, or is not running.
        """
        if check_text("name", name, error=ConfigError) != self.model_name:
            raise ConfigError(f"model {name!r} is not served here. Served: {self.model_name!r}")
        return self.tokenizer

    async def start(self) -> None:
        """Loads the model on the engine's thread, and accepts requests.

        Raises:
            ConfigError: there is no such model or device.
            MissingExtra: a library is missing.
        """
        running_loop()
        async with self._changing:
            if self.core is not None:
                return
            import_before_threads("transformers")
            if self._worker is None or self._loading is None:
                self._worker = EngineWorker()
                self._loading = asyncio.wrap_future(self._worker.submit(self._load))
            await asyncio.wait([self._loading])
            if self._loading.exception() is not None:
                failed = self._loading
                await self._end()
                failed.result()
                return
            from tinkex_py.local.core import Core
            from tinkex_py.local.housekeeping import delete_expired, end_inactive_sessions

            state, bodies = self._threads = WorkThreads("tinkex-state"), WorkThreads("tinkex-bodies")
            self.core = Core(self.options, self._loading.result(), self._worker, state, bodies)
            self._housekeeping = [asyncio.create_task(delete_expired(self.core), name="tinkex.local.expiry")]
            if self.options.session_timeout is not None:
                ending = end_inactive_sessions(self.core, self.options.session_timeout)
                self._housekeeping.append(asyncio.create_task(ending, name="tinkex.local.sessions"))

    async def stop(self) -> None:
        """Ends the engine, its thread and its temporary folder, after a `start` in progress.

        Open polls return; unfinished work fails.
        """
        running_loop()
        async with self._changing:
            await self._end()

    def close_polls(self) -> None:
        """Lets every open poll return; the first step of a server's shutdown."""
        if self.core is not None:
            self.core.results.close_polls()

    async def _end(self) -> None:
        core, self.core = self.core, None
        if core is not None:
            core.results.close()
        for task in self._housekeeping:
            task.cancel()
        if self._housekeeping:
            await asyncio.wait(self._housekeeping)
            self._housekeeping = []
        if self._worker is not None:
            await self._worker.stop()
            self._worker = None
        for threads in self._threads:
            await threads.stop()
        self._threads = ()
        if self._loading is not None:
            # A cancelled start leaves a load whose error nothing has read.
            await asyncio.wait([self._loading])
            if self._loading.exception() is None:
                self._loading.result().engine.store.close()
            self._loading = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _load(self) -> "Loaded":
        from tinkex_py.local.checkpoints import CheckpointStore
        from tinkex_py.local.core import Loaded
        from tinkex_py.local.engine import Engine
        from tinkex_py.local.models import load_model, private_folder

        assert self._worker is not None
        if self.options.state_dir is None:
            self._folder = private_folder()
            root = Path(self._folder.name)
        else:
            root = self.options.state_dir.resolve()
        store = CheckpointStore(root)
        try:
            model = load_model(self.options.model, self.options.device, root)
            engine = Engine(model, store, self.options, self._worker.closing)
            return Loaded(engine, list(store.records.sessions()), store.records.run_ids())
        except BaseException:
            store.close()
            raise


async def serve(
    options: LocalOptions, host: str = "127.0.0.1", port: int = 0, *, on_listening: Callable[[str], None]
) -> None:
    """Serves until cancelled, then stops the engine. Prints nothing and installs no signal handlers.

    Args:
        options: settings of the service.
        host: address to listen on.
        port: TCP port; 0 chooses a free one.
        on_listening: called once with the base URL when connections are accepted.

    Raises:
        ConfigError: other machines can reach the host and there is no api_key, or the address cannot be used.
        MissingExtra: uvicorn is not installed.
    """
    running_loop()
    check_listening(host, port, on_listening)
    if _checked(options).api_key is None and not is_loopback(host):
        raise ConfigError(f"other machines can reach host {host!r}: set an api_key, or use 127.0.0.1")
    if find_spec("uvicorn") is None:
        raise MissingExtra("uvicorn", "local")
    service = LocalService(options)
    from tinkex_py.local.middleware import LoopbackOnly

    listener = listen(host, port)
    try:
        address = address_of(listener)
        await service.start()
        # Open polls would delay the shutdown.
        await serve_app(
            service.app if options.api_key is not None else LoopbackOnly(service.app),
            listener,
            on_listening=lambda: on_listening(address),
            before_shutdown=service.close_polls,
        )
    finally:
        listener.close()
        await service.stop()


def _checked(options: LocalOptions) -> LocalOptions:
    return check_kind("options", options, LocalOptions, error=ConfigError)
