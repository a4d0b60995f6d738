"""The running service behind the routes: sessions, the order of requests, and work for the engine."""

import asyncio
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol, TypeVar

from tinkex_py.errors import ConfigError, InvalidData, UnsupportedFeature
from tinkex_py.local.admission import Admission, Receipt, Sequencer
from tinkex_py.local.checkpoints import CheckpointStore, DownloadLinks
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.records import CheckpointInfo, SessionEnd, SessionInfo
from tinkex_py.local.results import Failure, PendingResult, ResultBook, Success
from tinkex_py.local.sample_queue import SampleQueue
from tinkex_py.local.worker import EngineClosing, EngineWorker, WorkThreads

if TYPE_CHECKING:
    from tinkex_py.local.engine import Engine

T = TypeVar("T")

INFLIGHT = "inflight"
"""Name of the unlisted checkpoint that all inflight samplers of a model share."""
MAX_MESSAGE = 4000
"""Characters of an error message, which may quote a request."""
logger = logging.getLogger("tinkex_py.local")
logger.addHandler(logging.NullHandler())


def shortened(text: str) -> str:
    """Returns an error message, cut if it quotes too much of a request."""
    return text if len(text) <= MAX_MESSAGE else f"{text[:MAX_MESSAGE]}..."


class Refused(Exception):
    """A request that gets an error response.

    Args:
        status: the HTTP status.
        detail: what is wrong and what to do.
        code: for programs, where the status is not enough.
    """

    def __init__(self, status: int, detail: str, code: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = shortened(detail)
        self.code = code


def log_failure(what: str, error: BaseException) -> None:
    """Logs the class of an error and its traceback, without its text, which may quote a request."""
    frames = "".join(traceback.format_tb(error.__traceback__))
    logger.error("%s failed: %s\n%s", what, type(error).__name__, frames)


@dataclass(frozen=True)
class SamplingSession:
    """One sampling session: on one kind of weights, or on the base model if none is set.

    Args:
        sampler_id: its id.
        model_path: named weights.
        snapshot: unnamed weights that never change.
        inflight_of: the training model whose latest inflight weights are used.
    """

    sampler_id: str
    model_path: str | None = None
    snapshot: CheckpointInfo | None = None
    inflight_of: str | None = None


@dataclass(frozen=True)
class Loaded:
    """The loaded engine, and the sessions and runs of earlier runs of the service."""

    engine: "Engine"
    sessions: Iterable[SessionInfo]
    run_ids: Iterable[str]


class Startable(Protocol):
    """The service behind an app; its core is None unless it runs."""

    options: LocalOptions
    core: "Core | None"

    async def start(self) -> None:
        """Loads the model."""
        ...

    async def stop(self) -> None:
        """Stops the engine."""
        ...


class Core:
    """State and operations that the routes share; lives on one event loop."""

    def __init__(
        self, options: LocalOptions, loaded: Loaded, worker: EngineWorker, state: WorkThreads, bodies: WorkThreads
    ) -> None:
        self.options = options
        self.engine = loaded.engine
        self.store = loaded.engine.store
        self.results = ResultBook(options.max_results, options.max_result_bytes)
        self.sessions = {session.session_id: session for session in loaded.sessions}
        self.samplers: dict[str, SamplingSession] = {}
        self.sampler_clients: dict[str, int] = {}
        self.sequencers: dict[str, Sequencer] = {}
        self.last_requests: dict[str, datetime] = {}
        self.samples = SampleQueue(
            loaded.engine,
            worker,
            max_waiting=options.max_waiting_samples,
            max_prompt_tokens=options.max_tokens_per_microbatch,
        )
        self.links = DownloadLinks()
        self.expiry_changed = asyncio.Event()
        self._active: set[str] = set()
        limits = options.max_waiting_requests, options.max_waiting_bytes
        self._queued = Admission("wait for the engine", *limits)
        # Counted separately: requests that wait for a number must never keep that number out.
        self._held = Admission("wait for earlier numbers", *limits)
        # Runs without a model: unloaded, or from before the service started.
        self._gone = set(loaded.run_ids)
        self._worker = worker
        self._state = state
        self._bodies = bodies
        self._receipts: dict[tuple[str, str, int], Receipt] = {}
        self._loop = asyncio.get_running_loop()
        self.store.on_expiry = lambda: self._on_loop(self.expiry_changed.set)

    async def stored(self, work: Callable[[CheckpointStore], T]) -> T:
        """Accesses the store off the event loop.

        Raises:
            Refused: 404, it is not there; 503, the service is stopping; 507, the state folder cannot be used.
        """
        try:
            return await self._state.run(lambda: work(self.store))
        except InvalidData as error:
            raise Refused(404, str(error)) from error
        except (EngineClosing, sqlite3.ProgrammingError) as error:
            raise Refused(503, "the service is stopping") from error
        except (OSError, sqlite3.Error) as error:
            log_failure("access to the state folder", error)
            raise Refused(507, _storage_failure(error)) from error

    async def aside(self, work: Callable[[], T]) -> T:
        """Runs work on large data off the event loop; Refused (503) if the service is stopping."""
        try:
            return await self._bodies.run(work)
        except EngineClosing as error:
            raise Refused(503, "the service is stopping") from error

    # Sessions

    def session(self, session_id: str) -> SessionInfo:
        """Returns a session; Refused (404) if it is unknown."""
        session = self.sessions.get(session_id)
        if session is None:
            raise Refused(404, f"session {session_id!r} is not known here: create one first")
        return session

    def open_session(self, session_id: str) -> SessionInfo:
        """Returns the session of a request and marks it as active; Refused: 404 unknown, 410 finished."""
        session = self.session(session_id)
        if session.finished:
            raise Refused(410, f"session {session_id!r} is over: create a new one")
        self.mark_active(session_id)
        return session

    def sampling_session(self, sampler_id: str) -> SamplingSession:
        """Returns the sampling session of a request and marks its session as active; Refused (404) if unknown."""
        sampler = self.samplers.get(sampler_id)
        if sampler is None:
            raise Refused(404, f"sampling session {sampler_id!r} is not known here: create one first")
        self.mark_active(sampler_id)
        return sampler

    def mark_active(self, owned: str) -> None:
        """Marks the session as active that has this id or owns the object with this id."""
        self._active.add(owned.partition(":")[0])

    def take_active_sessions(self) -> set[str]:
        """Returns the ids of sessions with requests since the last call."""
        active, self._active = self._active, set()
        return active

    async def remember(self, session: SessionInfo) -> None:
        """Adds or changes a session, in memory and on disk."""
        await self.stored(lambda store: store.records.put_session(session))
        self.sessions[session.session_id] = session

    async def finish_session(self, session: SessionInfo, end: SessionEnd) -> None:
        """Finishes a session, and frees its models, samplers and losses."""
        session_id = session.session_id
        ended = session.model_copy(update={"end": end})
        self.sessions[session_id] = ended
        self._worker.submit(lambda: self.engine.custom_losses.forget(session_id))
        for model_id in [model_id for model_id in self.sequencers if _owner(model_id) == session_id]:
            self.unload(model_id)
        for sampler_id in [sampler_id for sampler_id in self.samplers if _owner(sampler_id) == session_id]:
            del self.samplers[sampler_id]
            self.sampler_clients.pop(sampler_id, None)
        self._receipts = {scope: receipt for scope, receipt in self._receipts.items() if _owner(scope[1]) != session_id}
        await self.remember(ended)

    # Training models

    def sequencer(self, model_id: str) -> Sequencer:
        """Returns the sequencer of a training model and marks its session as active; Refused (404) if not loaded."""
        sequencer = self.sequencers.get(model_id)
        if sequencer is not None:
            self.mark_active(model_id)
            return sequencer
        if model_id in self._gone:
            raise Refused(
                404,
                f"model {model_id!r} is no longer loaded (it was unloaded, its session ended or the service "
                "restarted): unsaved weights and gradients are gone; create a new training client from its last "
                "checkpoint",
            )
        raise Refused(404, f"model {model_id!r} not found")

    def submit_model(self, model_id: str, work: Callable[[], Success], size: int) -> "Future[Success]":
        """Queues the creation of a training model, which later requests may follow at once.

        Raises:
            Refused: 429, too many training models are loaded, or too much waits.
        """
        most = self.options.max_models
        if len(self.sequencers) >= most:
            raise Refused(429, f"{most} training models are loaded already: unload one, or finish a session")
        future = self.submit(work, size)
        sequencer = self.sequencers[model_id] = Sequencer()
        future.add_done_callback(lambda done: self._on_loop(self._drop_failed_model, model_id, sequencer, done))
        return future

    def _drop_failed_model(self, model_id: str, sequencer: Sequencer, future: "Future[Success]") -> None:
        """Gives back the place of a model that was not created, and fails the requests that wait for it."""
        if not future.cancelled() and future.exception() is None:
            return
        if self.sequencers.get(model_id) is sequencer:
            del self.sequencers[model_id]
        sequencer.release()

    def spend(self, model_id: str, number: int) -> None:
        """Uses up the number of a refused request; of numbers that come too early, only as many as may wait."""
        sequencer = self.sequencers.get(model_id)
        if sequencer is not None and sequencer.waiting < self.options.max_waiting_requests:
            sequencer.spend(number)

    def unload(self, model_id: str) -> str:
        """Frees a training model after its queued work; returns a request id."""
        sequencer = self.sequencers.pop(model_id, None)
        self._gone.add(model_id)

        def work() -> Success:
            self.engine.unload_model(model_id)
            return Success(lambda: {"model_id": model_id, "type": "unload_model"})

        request_id = self._launch(self.results.open(), work)
        if sequencer is not None:
            # Requests that wait for a missing number fail now; their polls would never return.
            sequencer.release()
        return request_id

    # Work for the engine

    def in_order(self, model_id: str, number: int, digest: bytes, size: int, work: Callable[[], Success]) -> str:
        """Accepts a training request of `size` bytes; returns its request id. Number 0 starts at once.

        Raises:
            Refused: 404, unknown model; 400, the number belongs to another request; 429, too much waits, and the
                number is still free.
        """
        sequencer = self.sequencer(model_id)
        self.last_requests[model_id] = datetime.now(UTC)
        if number <= 0:
            _check_room(self._queued, size)
            return self._launch(self.results.open(), work, size)
        known = self._repeated(sequencer.receipts.get(number), digest, f"seq_id {number} of model {model_id!r}")
        if known is not None:
            return known
        if sequencer.is_spent(number):
            raise Refused(400, f"seq_id {number} of model {model_id!r} was refused before and is spent: use the next")
        _check_room(self._queued if number <= sequencer.next_number else self._held, size)
        pending = self.results.open()
        pending.note = lambda: sequencer.gap(number)
        self._held.enter(size)

        def begin() -> None:
            self._held.leave(size)
            self._launch(pending, work, size)

        sequencer.enter(number, Receipt(digest, pending.request_id), begin)
        return pending.request_id

    def numbered(self, scope: tuple[str, str, int], digest: bytes, submit: Callable[[], "Future[Success]"]) -> str:
        """Accepts a request that has a number but no order; a repeat returns the request id of the first.

        Args:
            scope: name of the number, owner, and number.
            digest: equal for repeats.
            submit: queues the work.

        Raises:
            Refused: 400, the number belongs to another request; or by `submit`, and the number is still free.
        """
        kind, owner, number = scope
        known = self._repeated(self._receipts.get(scope), digest, f"{kind} number {number} of {owner!r}")
        if known is not None:
            return known
        request_id = self.follow(submit())
        self._receipts[scope] = Receipt(digest, request_id)
        return request_id

    def submit(self, work: Callable[[], Success], size: int = 0) -> "Future[Success]":
        """Queues work of a request of `size` bytes for the engine; Refused (429) if too much waits."""
        _check_room(self._queued, size)
        return self._queue(work, size)

    def follow(self, future: "Future[Success]") -> str:
        """Creates a cancellable future of the protocol for queued work; returns its request id."""
        pending = self.results.open()
        pending.cancel = future.cancel
        self._follow(pending, future)
        return pending.request_id

    @staticmethod
    def _repeated(receipt: Receipt | None, digest: bytes, name: str) -> str | None:
        if receipt is None:
            return None
        if receipt.digest != digest:
            raise Refused(400, f"{name} was already used for a request with other content")
        return receipt.request_id

    def _launch(self, pending: PendingResult, work: Callable[[], Success], size: int = 0) -> str:
        pending.note = None
        self._follow(pending, self._queue(work, size))
        return pending.request_id

    def _queue(self, work: Callable[[], Success], size: int) -> "Future[Success]":
        future = self._worker.submit(work)
        self._queued.enter(size)
        future.add_done_callback(lambda _: self._on_loop(self._queued.leave, size))
        return future

    def _follow(self, pending: PendingResult, future: "Future[Success]") -> None:
        future.add_done_callback(lambda done: self._on_loop(self._settle, pending, done))

    def _settle(self, pending: PendingResult, future: "Future[Success]") -> None:
        if future.cancelled():
            self.results.settle(pending, Failure("the request was cancelled before it was started", "user"))
            return
        error = future.exception()
        if error is None:
            result = future.result()
            if result.then is not None:
                result.then()
            self.results.settle(pending, result)
        elif isinstance(error, InvalidData | ConfigError | UnsupportedFeature):
            self.results.settle(pending, Failure(shortened(str(error)), "user"))
        elif isinstance(error, EngineClosing):
            self.results.settle(pending, Failure(str(error), "server"))
        else:
            log_failure(f"request {pending.request_id}", error)
            stores = isinstance(error, OSError | sqlite3.Error)
            message = _storage_failure(error) if stores else f"{type(error).__name__}: {error}"
            self.results.settle(pending, Failure(shortened(message), "server"))

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            logger.debug("the event loop closed before work of the service was done")


def _owner(owned: str) -> str:
    return owned.partition(":")[0]


def _storage_failure(error: BaseException) -> str:
    # The text of an OSError names files of this machine.
    reason = error.strerror if isinstance(error, OSError) and error.strerror else error
    return f"the service cannot use its state folder ({reason}): free space there or repair it, then repeat the call"


def _check_room(admission: Admission, size: int) -> None:
    refusal = admission.refusal(size)
    if refusal is not None:
        raise Refused(429, refusal)
