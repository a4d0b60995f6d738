"""The sampling requests of all clients, in order of arrival, batched if they share weights.

A request with a seed has a batch of its own: the last bits of logprobs depend on the batch, and must be the same again.
The engine's thread samples a few tokens of one batch at a time and then queues behind other work, so that long samples
delay neither training nor other clients.
"""

import threading
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from tinkex_py.errors import InvalidData
from tinkex_py.local.data import SampleRequest, SampleResult
from tinkex_py.local.records import CheckpointInfo
from tinkex_py.local.results import Success
from tinkex_py.local.worker import EngineClosing, EngineWorker

if TYPE_CHECKING:
    from tinkex_py.local.engine import Engine
    from tinkex_py.local.sampling import SampleBatch

TOKENS_PER_TURN = 16
ROWS_PER_BATCH = 64
# The number of the engine's sampling adapters, so that turns do not load weights repeatedly.
RUNNING_BATCHES = 4
RUNNING_PER_WEIGHTS = 2


@dataclass(frozen=True)
class Weights:
    """The weights of a sampler.

    Args:
        key: equal for samplers that may share a batch.
        find: returns the checkpoint, or None for the base network; called on the engine's thread.
        live: whether the weights may change during a sample.
    """

    key: Hashable
    find: Callable[[], CheckpointInfo | None]
    live: bool = False


@dataclass
class _QueuedSample:
    weights: Weights
    request: SampleRequest
    finish: Callable[[SampleResult], Success]
    future: "Future[Success]" = field(default_factory=Future[Success])
    alone: bool = False


@dataclass
class _Running:
    weights: Weights
    source: CheckpointInfo | None
    batch: "SampleBatch"
    items: list[_QueuedSample]


class SampleQueue:
    """Accepts requests from any thread, and samples on the engine's.

    Args:
        engine: samples.
        worker: the engine's thread.
        max_waiting: maximum number of waiting requests.
        max_prompt_tokens: maximum number of padded prompt tokens of a batch.
    """

    def __init__(self, engine: "Engine", worker: EngineWorker, *, max_waiting: int, max_prompt_tokens: int) -> None:
        self._engine = engine
        self._worker = worker
        self._max_waiting = max_waiting
        self._max_prompt_tokens = max_prompt_tokens
        self._pads = engine.pads_prompts
        self._lock = threading.Lock()
        self._waiting: deque[_QueuedSample] = deque()
        self._running: deque[_Running] = deque()
        self._has_turn = False

    @property
    def is_full(self) -> bool:
        """Whether `max_waiting` requests wait."""
        with self._lock:
            return sum(not item.future.cancelled() for item in self._waiting) >= self._max_waiting

    def add(
        self, weights: Weights, request: SampleRequest, finish: Callable[[SampleResult], Success]
    ) -> "Future[Success]":
        """Queues a request; its future can be cancelled while it waits.

        Args:
            weights: what to sample from.
            request: what to sample, checked.
            finish: encodes the result, on the engine's thread.
        """
        item = _QueuedSample(weights, request, finish, alone=request.seed is not None or bool(request.images))
        with self._lock:
            self._waiting.append(item)
        self._ask_for_turn()
        return item.future

    def _ask_for_turn(self) -> None:
        with self._lock:
            wanted = bool(self._waiting or self._running) and not self._has_turn
            self._has_turn = self._has_turn or wanted
        if wanted:
            self._worker.submit(self._turn)

    def _turn(self) -> None:
        try:
            while (group := self._next_group()) is not None:
                self._start(group)
            if self._running:
                self._draw(self._running.popleft())
        finally:
            with self._lock:
                self._has_turn = False
            self._ask_for_turn()

    def _next_group(self) -> list[_QueuedSample] | None:
        """Takes the oldest request that may start, and those that can share its batch."""
        busy = [running.weights.key for running in self._running]
        if len(busy) >= RUNNING_BATCHES:
            return None
        with self._lock:
            waiting = [item for item in self._waiting if not item.future.cancelled()]
            first = next((item for item in waiting if busy.count(item.weights.key) < RUNNING_PER_WEIGHTS), None)
            if first is None:
                self._waiting = deque(waiting)
                return None
            group = self._batch_of(first, waiting)
            taken = {id(item) for item in group}
            self._waiting = deque(item for item in waiting if id(item) not in taken)
        # A request that was cancelled since drops out here.
        return [item for item in group if item.future.running() or item.future.set_running_or_notify_cancel()]

    def _batch_of(self, first: _QueuedSample, waiting: list[_QueuedSample]) -> list[_QueuedSample]:
        group, rows, longest = [first], first.request.num_samples, len(first.request.prompt)
        if first.alone:
            return group
        for item in waiting:
            length = len(item.request.prompt)
            fits = rows + item.request.num_samples <= ROWS_PER_BATCH
            fits = fits and max(longest, length) * (len(group) + 1) <= self._max_prompt_tokens
            shares = item.weights.key == first.weights.key and (self._pads or length == longest)
            if fits and shares and item is not first and not item.alone:
                group.append(item)
                rows += item.request.num_samples
                longest = max(longest, length)
        return group

    def _start(self, group: list[_QueuedSample]) -> None:
        if not group:
            return
        weights = group[0].weights
        try:
            source = weights.find()
            batch = self._engine.sample_batch([item.request for item in group])
        except InvalidData as error:
            _fail(group, error)
            return
        except BaseException as error:
            self._fail_one_by_one(group, error)
            raise
        self._running.append(_Running(weights, source, batch, group))

    def _draw(self, running: _Running) -> None:
        try:
            source = running.weights.find() if running.weights.live else running.source
            if not self._engine.draw(source, running.batch, _tokens_per_turn(running.items)):
                self._running.append(running)
                return
            results = zip(running.items, running.batch.results(), strict=True)
            finished = [(item, item.finish(result)) for item, result in results]
        except BaseException as error:
            self._fail_one_by_one(running.items, error)
            raise
        for item, result in finished:
            item.future.set_result(result)

    def _fail_one_by_one(self, items: list[_QueuedSample], error: BaseException) -> None:
        """Repeats the requests of a batch separately, because any of them may cause an unexpected error."""
        if len(items) == 1 or isinstance(error, InvalidData | EngineClosing):
            _fail(items, error)
            return
        with self._lock:
            for item in reversed(items):
                item.alone = True
                self._waiting.appendleft(item)


def _tokens_per_turn(items: list[_QueuedSample]) -> int:
    """Fewer for a request with very many samples, whose turns would be as much longer."""
    rows = sum(item.request.num_samples for item in items)
    return max(1, TOKENS_PER_TURN * ROWS_PER_BATCH // max(rows, ROWS_PER_BATCH))


def _fail(items: list[_QueuedSample], error: BaseException) -> None:
    for item in items:
        item.future.set_exception(error)
