"""`LocalService`: the embedded service's life from start to stop."""

import asyncio
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.worker import EngineWorker, StateThreads

if TYPE_CHECKING:
    from tinkex_py.local.core import Core, Loaded
    from tinkex_py.local.tokenizers import ModelTokenizer


class LocalService:
    """A torch engine and the ASGI app in front of it. The constructor does no I/O and loads nothing.

    `start` and `stop` may be called again and from several tasks of one event loop; a stopped service can be started
    again. After a cancelled `start`, `stop` is still needed.

    Args:
        options: model, device, folders, key and budgets.

    Raises:
        MissingExtra: fastapi is not installed.
    """

    def __init__(self, options: LocalOptions | None = None) -> None:
        try:
            from tinkex_py.local.app import build_app
        except ModuleNotFoundError as error:
            raise MissingExtra(str(error.name).partition(".")[0], "local") from error

        self.options = options or LocalOptions()
        self.core: Core | None = None
        self._app = build_app(self, self.options.api_key)
        self._changing = asyncio.Lock()
        self._worker: EngineWorker | None = None
        self._loading: asyncio.Future[Loaded] | None = None
        self._state: StateThreads | None = None
        self._housekeeping: list[asyncio.Task[None]] = []
        self._folder: TemporaryDirectory[str] | None = None

    @property
    def app(self) -> Any:
        """The ASGI app; before `start` and after `stop` it answers 503."""
        return self._app

    @property
    def model_name(self) -> str:
        """The name by which clients ask for the model."""
        return self.options.model

    @property
    def tokenizer(self) -> "ModelTokenizer":
        """The model's tokenizer.

        Raises:
            ConfigError: the service is not running.
        """
        if self.core is None:
            raise ConfigError("the embedded service is not running: await service.start() first")
        return self.core.engine.model.tokenizer

    def tokenizer_for(self, name: str) -> "ModelTokenizer":
        """The tokenizer of a model by name.

        Raises:
            ConfigError: no such model here, or the service is not running.
        """
        if name != self.model_name:
            raise ConfigError(f"model {name!r} is not served here. Served: {self.model_name!r}")
        return self.tokenizer

    async def start(self) -> None:
        """Load the model on the engine's thread and begin to serve.

        Raises:
            ConfigError: there is no such model or device.
            MissingExtra: a library is missing.
        """
        async with self._changing:
            if self.core is not None:
                return
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

            self._state = StateThreads()
            self.core = Core(self.options, self._loading.result(), self._worker, self._state)
            self._housekeeping = [asyncio.create_task(delete_expired(self.core), name="tinkex.local.expiry")]
            if self.options.session_timeout is not None:
                ending = end_inactive_sessions(self.core, self.options.session_timeout)
                self._housekeeping.append(asyncio.create_task(ending, name="tinkex.local.sessions"))

    async def stop(self) -> None:
        """End the engine, its thread and its temporary folder; open polls return, unfinished work fails.

        Waits for a `start` that is under way.
        """
        async with self._changing:
            await self._end()

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
        if self._state is not None:
            await self._state.stop()
            self._state = None
        if self._loading is not None:
            # The load of a cancelled start may have failed without a reader.
            await asyncio.wait([self._loading])
            if self._loading.exception() is None:
                self._loading.result().engine.store.close()
            self._loading = None
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def close_polls(self) -> None:
        """Let every open poll return now; the first step of a server's shutdown."""
        if self.core is not None:
            self.core.results.close_polls()

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
            root = self.options.state_dir.expanduser().resolve()
        store = CheckpointStore(root)
        try:
            model = load_model(self.options.model, self.options.device, root)
            engine = Engine(model, store, self.options, self._worker.closing)
            return Loaded(engine, list(store.records.sessions()), store.records.run_ids())
        except BaseException:
            store.close()
            raise
