"""Passes over data: cut into chunks, sent, awaited, and their results merged."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from tinkex_py.client.accumulation import Accumulation, GradientCall
from tinkex_py.client.batches import check_finite, merge_outputs
from tinkex_py.client.ordering import Ordering
from tinkex_py.client.queue_state import QueueWatch
from tinkex_py.client.session import ClientSession
from tinkex_py.errors import (
    APIStatusError,
    InvalidResponse,
    PartialFailure,
    RequestFailed,
    ResultLost,
    TransportError,
)
from tinkex_py.limits import time_limit
from tinkex_py.transport.api import Sent
from tinkex_py.transport.decoding import read_forward_backward
from tinkex_py.transport.encoding import EncodedBatch, Encoding, LossConfig, PassHeader, PlannedBatch
from tinkex_py.transport.messages import NO_HEADERS
from tinkex_py.types import ForwardBackwardOutput

# Work on more bytes than this leaves the event loop's thread.
SMALL_BYTES = 1 << 18
_KEEP_GRAPH = {"X-Tinkex-Keep-Graph": "1"}

Chunk = EncodedBatch | PlannedBatch
Value = TypeVar("Value")


@dataclass(frozen=True)
class Model:
    """The model that a training client's requests are about.

    Attributes:
        session: the service's.
        model_id: the service's id.
        ordering: of its requests.
        accumulation: the gradients that the service holds.
        queue: what the service says about its queue.
    """

    session: ClientSession
    model_id: str
    ordering: Ordering
    accumulation: Accumulation
    queue: QueueWatch


class Effect(Enum):
    """What became of one chunk's gradient."""

    APPLIED = auto()
    MISSING = auto()
    UNKNOWN = auto()


@dataclass(frozen=True)
class ChunkResult:
    """How one chunk ended.

    Attributes:
        start: index of its first datum in the call.
        stop: one behind its last datum.
        effect: whether the service did the work.
        output: its result, if it did.
        error: why not, or why it is unknown.
    """

    start: int
    stop: int
    effect: Effect
    output: ForwardBackwardOutput | None = None
    error: RequestFailed | APIStatusError | None = None


@dataclass(frozen=True)
class PassOutcome:
    """How a call ended. This value alone decides what the service holds of it."""

    chunks: Sequence[ChunkResult]

    @property
    def held_datums(self) -> int:
        """Datums whose gradients the service holds or may hold."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks if chunk.effect is not Effect.MISSING)

    def output(self, *, forward_only: bool) -> ForwardBackwardOutput:
        """The merged result.

        Raises:
            ResultLost: it is not known whether a chunk has left a gradient.
            PartialFailure: the service holds the gradients of some chunks and not of others.
            RequestFailed, APIStatusError: no chunk has left a gradient.
        """
        failed = [chunk for chunk in self.chunks if chunk.error is not None]
        for chunk in sorted(failed, key=lambda chunk: chunk.effect is not Effect.UNKNOWN):
            assert chunk.error is not None
            # To send the datums of an unknown one again might add their gradient twice.
            if chunk.effect is Effect.UNKNOWN or forward_only or len(failed) == len(self.chunks):
                raise chunk.error
            raise self._partial_failure(failed, chunk.error) from chunk.error
        return merge_outputs([chunk.output for chunk in self.chunks if chunk.output is not None])

    def _partial_failure(self, failed: Sequence[ChunkResult], first: RequestFailed | APIStatusError) -> PartialFailure:
        applied = [(chunk.start, chunk.stop) for chunk in self.chunks if chunk.effect is Effect.APPLIED]
        missing = [(chunk.start, chunk.stop) for chunk in failed]
        return PartialFailure(
            f"{len(missing)} of {len(self.chunks)} chunks of this call failed ({type(first).__name__}: {first}). "
            f"The service holds the gradients of datums {_ranges(applied)} and, as far as is known, not those of "
            f"{_ranges(missing)}: send the latter again before the next optim_step, or make a new client from the last "
            "checkpoint",
            applied=applied,
            missing=missing,
            category=first.category if isinstance(first, RequestFailed) else "unknown",
            request_id=first.request_id,
        )


class Pass:
    """One forward call; see `Submission`.

    Args:
        model: of the training client.
        chunks: datums, one request each.
        loss_fn: the service's loss.
        config: its settings.
        keep_graph: tells the embedded service that a backward pass over the same datums will follow.
    """

    forward_only = True

    def __init__(
        self,
        model: Model,
        chunks: Sequence[Chunk],
        loss_fn: str = "cross_entropy",
        config: LossConfig | None = None,
        *,
        keep_graph: bool = False,
    ) -> None:
        self.chunks = chunks
        self._model = model
        self._session = model.session
        self._loss_fn = loss_fn
        self._config: LossConfig = config or {}
        self._headers = _KEEP_GRAPH if keep_graph else NO_HEADERS
        self._encoding: Encoding | None = None

    @property
    def datum_count(self) -> int:
        """Datums of all chunks."""
        return sum(len(chunk.data) for chunk in self.chunks)

    async def prepare(self) -> int:
        """Asks for the encoding and the key before a number is taken; gives one number per chunk.

        Raises:
            InvalidData: a number of the datums cannot be written in that encoding.
        """
        encoding = self._session.encoding
        self._encoding = encoding.chosen or await encoding.choose()
        if not self._encoding.holds_any_number:
            data = [datum for chunk in self.chunks for datum in chunk.data]
            check_finite(data, self._config, fields=self.chunks[0].checked_fields)
        await self._session.api.auth.current()
        return len(self.chunks)

    def handed_over(self) -> None:
        """Nothing follows from it."""

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """Sends every chunk under its number: at the same time where the service likes it, else in order.

        A refused chunk keeps none of the others back, since their numbers are taken; see `Submission.submit`.
        """
        numbered = list(zip(numbers, self.chunks, strict=True))
        if len(numbered) == 1 or not self._session.config.parallel_fwdbwd_chunks:
            return [await self._post(number, chunk) for number, chunk in numbered]
        return await self._submit_at_once(numbered)

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Nothing follows from it."""

    async def result(self, sent: Sequence[Sent]) -> ForwardBackwardOutput:
        """Waits for all chunks and merges their results; raises like `PassOutcome.output`.

        Raises:
            InvalidResponse: a result has another number of datums than its chunk.
            SequenceLost: a chunk was refused, and the service does not go on behind it.
        """
        return (await self._results(sent)).output(forward_only=self.forward_only)

    async def _submit_at_once(self, numbered: Sequence[tuple[int, Chunk]]) -> Sequence[Sent]:
        """Every chunk is posted to its end, whatever becomes of the others."""
        undecided: list[APIStatusError | TransportError] = []

        async def outcome(number: int, chunk: Chunk) -> Sent | None:
            try:
                return await self._post(number, chunk)
            except (APIStatusError, TransportError) as error:
                undecided.append(error)
                return None

        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(outcome(*one), name="tinkex.chunk") for one in numbered]
        if undecided:
            raise undecided[0]
        return [sent for task in tasks if (sent := task.result()) is not None]

    async def _post(self, number: int, chunk: Chunk) -> Sent:
        assert self._encoding is not None, "prepared first"
        sent = await self._post_in(self._encoding, number, chunk)
        if sent.refusal is None or self._encoding.name != "protobuf":
            return sent
        if not self._session.encoding.falls_back_to_json(sent.refusal):
            return sent
        return await self._post_in(await self._session.encoding.choose(), number, chunk)

    async def _post_in(self, encoding: Encoding, number: int, chunk: Chunk) -> Sent:
        header = PassHeader(self._model.model_id, number, self._loss_fn, self._config, forward_only=self.forward_only)
        # Written within the budget: of what waits for it there are no bytes yet.
        async with self._session.pass_bytes.hold(chunk.size):
            slow = (encoding.is_slow or isinstance(chunk, PlannedBatch)) and chunk.size > SMALL_BYTES
            written = await off_loop_if(
                slow, self._session, lambda: encoding.encode(chunk.laid_out(), header, self._headers)
            )
            return await self._session.api.submit(number, written)

    async def _results(self, sent: Sequence[Sent]) -> PassOutcome:
        refused = [one.number for one in sent if one.refusal is not None]
        if not refused or len(refused) == len(sent):
            return await self._collect(sent)
        # Not without a bound: where something on the way refused the chunk, the service waits for it for ever.
        seconds = self._session.settings.retry.deadline
        stuck = f"nothing after it was executed within {seconds:g} s"
        async with time_limit(seconds, lambda: self._model.ordering.end_behind(refused[0], stuck)):
            return await self._collect(sent)

    async def _collect(self, sent: Sequence[Sent]) -> PassOutcome:
        results: list[ChunkResult] = []
        start = 0
        for one, chunk in zip(sent, self.chunks, strict=True):
            stop = start + len(chunk.data)
            results.append(await self._result_of(one, start, stop))
            start = stop
        return PassOutcome(results)

    async def _result_of(self, sent: Sent, start: int, stop: int) -> ChunkResult:
        if sent.refusal is not None:
            return ChunkResult(start, stop, Effect.MISSING, error=sent.refusal)
        request_type = "Forward" if self.forward_only else "ForwardBackward"
        try:
            output = await self._session.api.result(
                sent.request_id, request_type, read_forward_backward, self._model.queue.pending
            )
        except ResultLost as error:
            return ChunkResult(start, stop, Effect.UNKNOWN, error=error)
        except RequestFailed as error:
            return ChunkResult(start, stop, Effect.MISSING, error=error)
        if self._model.queue.is_waiting:
            self._model.queue.done()
        if output.num_datums not in (0, stop - start):  # some services strip the outputs
            raise InvalidResponse(
                f"the result of {request_type} has {output.num_datums} datums, but {stop - start} were sent"
            )
        return ChunkResult(start, stop, Effect.APPLIED, output)


class GradientPass(Pass):
    """One forward_backward call: it adds a gradient, which the accumulation keeps account of.

    Args:
        model, chunks, loss_fn, config: as for `Pass`.
        call: how the accumulation knows it; its datums are counted here.
        on_hand_over: called at hand-over, before anything else can run.
    """

    forward_only = False

    def __init__(
        self,
        model: Model,
        chunks: Sequence[Chunk],
        loss_fn: str,
        config: LossConfig | None = None,
        *,
        call: GradientCall | None = None,
        on_hand_over: Callable[[], None] | None = None,
    ) -> None:
        super().__init__(model, chunks, loss_fn, config)
        self._call = call or GradientCall(self.datum_count)
        self._on_hand_over = on_hand_over

    def handed_over(self) -> None:
        """From here on the service may hold the gradient."""
        self._model.accumulation.add(self._call)
        if self._on_hand_over is not None:
            self._on_hand_over()

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Of refused chunks it holds none."""
        accepted = [one.refusal is None for one in sent]
        if not any(accepted):
            self._model.accumulation.refuse(self._call)
        self._call.datums = sum(len(chunk.data) for chunk, taken in zip(self.chunks, accepted, strict=True) if taken)

    async def result(self, sent: Sequence[Sent]) -> ForwardBackwardOutput:
        """Waits for all chunks, keeps account of what they left, and merges their results; raises like `Pass`."""
        result = await self._results(sent)
        self._call.datums = result.held_datums
        return result.output(forward_only=False)


async def off_loop_if(large: bool, session: ClientSession, work: Callable[[], Value]) -> Value:
    """Runs work in a worker thread if it is large, else here."""
    return await session.workers.compute("encode", work) if large else work()


def _ranges(parts: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start} to {stop - 1}" if stop - start > 1 else str(start) for start, stop in parts)
