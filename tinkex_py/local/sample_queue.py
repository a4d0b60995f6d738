"""The sampling requests of all clients, in the order in which they came, drawn together where they share weights.

A long draw must keep neither training nor other clients waiting, so the engine's thread draws a few tokens of one batch
at a time and then queues behind whatever else has come.
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
# As many as the engine keeps sampling adapters, so that turns do not load weights again and again.
RUNNING_BATCHES = 4
RUNNING_PER_WEIGHTS = 2


@dataclass(frozen=True)
class Weights:
    """What a sampler draws from.

    Args:
        key: equal for samplers that may share a batch.
        find: the checkpoint, None for the base network; called on the engine's thread.
        live: whether they may change while a sequence is drawn.
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
    """Accepts requests from any thread; draws on the engine's.

    Args:
        engine: draws.
        worker: the engine's thread.
        max_waiting: how many requests may wait to be started.
        max_prompt_tokens: how many (padded) prompt tokens one batch may start with.
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
        """Whether clients should come back later."""
        with self._lock:
            return sum(not item.future.cancelled() for item in self._waiting) >= self._max_waiting

    def add(
        self, weights: Weights, request: SampleRequest, finish: Callable[[SampleResult], Success]
    ) -> "Future[Success]":
        """Queue a request. Its future can be cancelled as long as it waits.

        Args:
            weights: what to draw from.
            request: what to draw.
            finish: makes the answer, on the engine's thread.

        Raises:
            InvalidData: the request cannot be used.
        """
        self._engine.check_sample(request)
        item = _QueuedSample(weights, request, finish)
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
        """Take the oldest request that may start, and those that can share its batch."""
        busy = [running.weights.key for running in self._running]
        if len(busy) >= RUNNING_BATCHES:
            return None
        with self._lock:
            waiting = [item for item in self._waiting if not item.future.cancelled()]
            first = next((item for item in waiting if busy.count(item.weights.key) < RUNNING_PER_WEIGHTS), None)
            if first is None:
                self._waiting = deque(waiting)
                return None
            group = self._fitting(first, waiting)
            taken = {id(item) for item in group}
            self._waiting = deque(item for item in waiting if id(item) not in taken)
        # Cancelled in this very moment: it drops out here.
        return [item for item in group if item.future.running() or item.future.set_running_or_notify_cancel()]

    def _fitting(self, first: _QueuedSample, waiting: list[_QueuedSample]) -> list[_QueuedSample]:
        group, rows, longest = [first], first.request.num_samples, len(first.request.prompt)
        for item in () if first.alone else waiting:
            length = len(item.request.prompt)
            if item is first or item.weights.key != first.weights.key or not (self._pads or length == longest):
                continue
            if item.alone:
                continue
            padded = max(longest, length) * (len(group) + 1)
            if rows + item.request.num_samples > ROWS_PER_BATCH or padded > self._max_prompt_tokens:
                continue
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
            if not self._engine.draw(source, running.batch, TOKENS_PER_TURN):
                self._running.append(running)
                return
            answers = [item.finish(result) for item, result in zip(running.items, running.batch.results(), strict=True)]
        except BaseException as error:
            self._fail_one_by_one(running.items, error)
            raise
        for item, answer in zip(running.items, answers, strict=True):
            item.future.set_result(answer)

    def _fail_one_by_one(self, items: list[_QueuedSample], error: BaseException) -> None:
        """An unexpected error may be due to any request of the batch: they are drawn again, one by one."""
        if len(items) == 1 or isinstance(error, InvalidData | EngineClosing):
            _fail(items, error)
            return
        with self._lock:
            for item in reversed(items):
                item.alone = True
                self._waiting.appendleft(item)


def _fail(items: list[_QueuedSample], error: BaseException) -> None:
    for item in items:
        item.future.set_exception(error)
