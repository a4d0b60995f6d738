"""The running service behind the routes: who is known, and how work gets to the engine and back."""

import asyncio
import sqlite3
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, TypeVar

from tinkex_py.errors import ConfigError, InvalidData, UnsupportedFeature
from tinkex_py.local.admission import Admission
from tinkex_py.local.archives import DownloadLinks
from tinkex_py.local.checkpoints import CheckpointStore
from tinkex_py.local.failures import log_failure, logger
from tinkex_py.local.options import LocalOptions
from tinkex_py.local.records import CheckpointInfo, SessionEnd, SessionInfo
from tinkex_py.local.results import Failure, PendingResult, ResultBook, Success
from tinkex_py.local.sample_queue import SampleQueue
from tinkex_py.local.sequencer import Receipt, Sequencer
from tinkex_py.local.worker import EngineClosing, EngineWorker, StateThreads

if TYPE_CHECKING:
    from tinkex_py.local.engine import Engine

T = TypeVar("T")

# Name of the nameless checkpoint that all inflight samplers of a model share.
INFLIGHT = "inflight"


class Refused(Exception):
    """A request that gets an error status at once; `code` is for programs, where the status is not enough."""

    def __init__(self, status: int, detail: str, code: str | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.code = code


@dataclass(frozen=True)
class SamplingSession:
    """One sampling session: on one kind of weights, or on the base model if it names none.

    Args:
        sampler_id: its id.
        model_path: named weights.
        snapshot: nameless weights that stay as they are.
        inflight_of: the training model whose latest inflight weights it follows.
    """

    sampler_id: str
    model_path: str | None = None
    snapshot: CheckpointInfo | None = None
    inflight_of: str | None = None


@dataclass(frozen=True)
class Loaded:
    """What starting brought: the engine, and what earlier runs of the service left."""

    engine: "Engine"
    sessions: Iterable[SessionInfo]
    run_ids: Iterable[str]


class Core:
    """Everything the routes need; lives on one event loop."""

    def __init__(self, options: LocalOptions, loaded: Loaded, worker: EngineWorker, state: StateThreads) -> None:
        self.options = options
        self.engine = loaded.engine
        self.store = loaded.engine.store
        self.results = ResultBook(options.max_results, options.max_result_bytes)
        self.sessions = {session.session_id: session for session in loaded.sessions}
        self._active: set[str] = set()
        self.samplers: dict[str, SamplingSession] = {}
        self.sampler_clients: dict[str, int] = {}
        self.sequencers: dict[str, Sequencer] = {}
        self.samples = SampleQueue(
            loaded.engine,
            worker,
            max_waiting=options.max_waiting_samples,
            max_prompt_tokens=options.max_tokens_per_microbatch,
        )
        self.last_requests: dict[str, datetime] = {}
        limits = options.max_waiting_requests, options.max_waiting_bytes
        self._queued = Admission("wait for the engine", *limits)
        # What the engine has would never be done if the request that it waits for were refused: counted apart.
        self._held = Admission("wait for earlier numbers", *limits)
        self.links = DownloadLinks()
        self.expiry_changed = asyncio.Event()
        # Runs without a model: unloaded, or from before the service was started.
        self._gone = set(loaded.run_ids)
        self._worker = worker
        self._state = state
        self._receipts: dict[tuple[str, str, int], Receipt] = {}
        self._loop = asyncio.get_running_loop()
        self.store.on_expiry = self._wake_expiry

    async def stored(self, work: Callable[[CheckpointStore], T]) -> T:
        """Ask the store for something, off the event loop.

        Raises:
            Refused: 404, the store says that it has no such thing; 503, the service is stopping.
        """
        try:
            return await self._state.run(lambda: work(self.store))
        except InvalidData as error:
            raise Refused(404, str(error)) from error
        except (EngineClosing, sqlite3.ProgrammingError) as error:
            raise Refused(503, "the service is stopping") from error

    def session(self, session_id: str) -> SessionInfo:
        """A session by id.

        Raises:
            Refused: 404, unknown here.
        """
        session = self.sessions.get(session_id)
        if session is None:
            raise Refused(404, f"session {session_id!r} is not known here: create one first")
        return session

    def open_session(self, session_id: str) -> SessionInfo:
        """The session of a request.

        Raises:
            Refused: 404, unknown here; 410, over.
        """
        session = self.session(session_id)
        if session.finished:
            raise Refused(410, f"session {session_id!r} is over: create a new one")
        self.mark_active(session_id)
        return session

    def sampling_session(self, sampler_id: str) -> SamplingSession:
        """The sampling session of a request.

        Raises:
            Refused: 404, unknown here.
        """
        sampler = self.samplers.get(sampler_id)
        if sampler is None:
            raise Refused(404, f"sampling session {sampler_id!r} is not known here")
        self.mark_active(sampler_id)
        return sampler

    def mark_active(self, owned: str) -> None:
        """The client of a session asked for something: for the session itself, or for what belongs to it, by its id."""
        self._active.add(owned.partition(":")[0])

    def take_active_sessions(self) -> set[str]:
        """Ids of the sessions whose clients asked for anything since this was called last."""
        active, self._active = self._active, set()
        return active

    async def remember(self, session: SessionInfo) -> None:
        """Add or change a session, here and on disk."""
        self.sessions[session.session_id] = session
        await self.stored(lambda store: store.records.put_session(session))

    def sequencer(self, model_id: str) -> Sequencer:
        """The sequencer of a training model.

        Raises:
            Refused: 404, unknown, or known only from before a restart.
        """
        sequencer = self.sequencers.get(model_id)
        if sequencer is not None:
            self.mark_active(model_id)
            return sequencer
        if model_id in self._gone:
            raise Refused(
                404,
                f"model {model_id!r} is not loaded any more (it was unloaded, its session ended "
                "or the service restarted): "
                "unsaved weights and gradients are gone; create a new training client from its last checkpoint",
            )
        raise Refused(404, f"model {model_id!r} not found")

    def in_order(self, model_id: str, number: int, digest: bytes, size: int, work: Callable[[], Success]) -> str:
        """Hand in a training request of `size` bytes; returns its request id. Number 0 means now, out of order.

        Raises:
            Refused: 404 unknown model; 400 the number was used for something else; 429 too much waits, and then the
                number is still free.
        """
        sequencer = self.sequencer(model_id)
        self.last_requests[model_id] = datetime.now(UTC)
        if number <= 0:
            self._check_room(self._queued, size)
            return self.start(self.results.open(), work, size)
        known = self._repeated(sequencer.receipts.get(number), digest, f"seq_id {number} of model {model_id!r}")
        if known is not None:
            return known
        if sequencer.is_spent(number):
            raise Refused(
                400, f"seq_id {number} of model {model_id!r} was refused before and is spent: take the next one"
            )
        self._check_room(self._queued if number <= sequencer.next_number else self._held, size)
        pending = self.results.open()
        pending.note = lambda: sequencer.gap(number)
        self._held.enter(size)

        def begin() -> None:
            self._held.leave(size)
            self._launch(pending, work, size)

        sequencer.enter(number, Receipt(digest, pending.request_id), begin)
        return pending.request_id

    def numbered(self, scope: tuple[str, str, int], digest: bytes, submit: Callable[[], "Future[Success]"]) -> str:
        """Hand in a request that has a number but no order; a repeat gets the request id of the first.

        Raises:
            Refused: 400, the number was used for something else; or what `submit` refuses with, and then the number
                is still free.
        """
        kind, owner, number = scope
        known = self._repeated(self._receipts.get(scope), digest, f"{kind} number {number} of {owner!r}")
        if known is not None:
            return known
        request_id = self.follow(submit())
        self._receipts[scope] = Receipt(digest, request_id)
        return request_id

    def submit(self, work: Callable[[], Success], size: int = 0) -> "Future[Success]":
        """Queue work for the engine that came as a request of `size` bytes.

        Raises:
            Refused: 429, too much waits.
        """
        self._check_room(self._queued, size)
        return self._queue(work, size)

    def follow(self, future: "Future[Success]") -> str:
        """Make a future of the protocol of work that is under way; returns its request id."""
        pending = self.results.open()
        pending.cancel = future.cancel
        self._follow(pending, future)
        return pending.request_id

    def start(self, pending: PendingResult, work: Callable[[], Success], size: int = 0) -> str:
        """Queue work for the engine now."""
        self._launch(pending, work, size)
        return pending.request_id

    def check_models(self, model_id: str) -> None:
        """Whether there is room for a training model; one that is there already needs none.

        Raises:
            Refused: 429.
        """
        most = self.options.max_models
        if model_id not in self.sequencers and len(self.sequencers) >= most:
            raise Refused(429, f"{most} training models are loaded already: unload one, or finish a session")

    async def finish_session(self, session: SessionInfo, end: SessionEnd) -> None:
        """Mark a session as over and free what it holds."""
        ended = session.model_copy(update={"end": end})
        self.sessions[session.session_id] = ended
        self._free(session)
        await self.remember(ended)

    def _free(self, session: SessionInfo) -> None:
        self._worker.submit(lambda: self.engine.custom_losses.forget(session.session_id))
        prefix = f"{session.session_id}:"
        for model_id in [model_id for model_id in self.sequencers if model_id.startswith(prefix)]:
            self.unload(model_id)
        for sampler_id in [sampler_id for sampler_id in self.samplers if sampler_id.startswith(prefix)]:
            del self.samplers[sampler_id]
            self.sampler_clients.pop(sampler_id, None)
        self._receipts = {
            scope: receipt for scope, receipt in self._receipts.items() if not _belongs(scope[1], session)
        }

    def unload(self, model_id: str) -> str:
        """Free a training model after the work that it still has; returns a request id."""
        sequencer = self.sequencers.pop(model_id, None)
        self._gone.add(model_id)

        def work() -> Success:
            self.engine.unload_model(model_id)
            return Success(lambda: {"model_id": model_id, "type": "unload_model"})

        request_id = self.start(self.results.open(), work)
        if sequencer is not None:
            # What waited for a missing number now fails, instead of leaving its polls waiting for ever.
            sequencer.release()
        return request_id

    def _wake_expiry(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self.expiry_changed.set)
        except RuntimeError:
            logger.debug("the event loop was closed before a checkpoint's expiry was noted")

    def _repeated(self, receipt: Receipt | None, digest: bytes, name: str) -> str | None:
        if receipt is None:
            return None
        if receipt.digest != digest:
            raise Refused(400, f"{name} was already used for a request with other content")
        return receipt.request_id

    def _launch(self, pending: PendingResult, work: Callable[[], Success], size: int) -> None:
        pending.note = None
        self._follow(pending, self._queue(work, size))

    def _queue(self, work: Callable[[], Success], size: int) -> "Future[Success]":
        self._queued.enter(size)
        future = self._worker.submit(work)
        future.add_done_callback(lambda _: self._on_loop(self._queued.leave, size))
        return future

    def _check_room(self, admission: Admission, size: int) -> None:
        refusal = admission.refusal(size)
        if refusal is not None:
            raise Refused(429, refusal)

    def _follow(self, pending: PendingResult, future: "Future[Success]") -> None:
        future.add_done_callback(lambda done: self._on_loop(self._settle, pending, done))

    def _settle(self, pending: PendingResult, future: "Future[Success]") -> None:
        if future.cancelled():
            self.results.settle(pending, Failure("the request was cancelled before it was started", "user"))
            return
        error = future.exception()
        if error is None:
            answer = future.result()
            if answer.then is not None:
                answer.then()
            self.results.settle(pending, answer)
        elif isinstance(error, InvalidData | ConfigError | UnsupportedFeature):
            self.results.settle(pending, Failure(str(error), "user"))
        elif isinstance(error, EngineClosing):
            self.results.settle(pending, Failure(str(error), "server"))
        else:
            log_failure(f"request {pending.request_id}", error)
            self.results.settle(pending, Failure(f"{type(error).__name__}: {error}", "server"))

    def _on_loop(self, call: Callable[..., None], *arguments: object) -> None:
        try:
            self._loop.call_soon_threadsafe(call, *arguments)
        except RuntimeError:
            logger.debug("the event loop was closed before a request was done")


def _belongs(owner: str, session: SessionInfo) -> bool:
    return owner.partition(":")[0] == session.session_id
