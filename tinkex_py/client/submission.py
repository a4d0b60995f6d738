"""Sends passes over data, in chunks where they are long."""

import asyncio
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from tinkex_py.client.connection import Connection
from tinkex_py.client.queue import QueueWatch
from tinkex_py.errors import (
    APIStatusError,
    InvalidResponse,
    PartialFailure,
    RequestFailed,
    ResultLost,
    TinkexError,
    TransportError,
)
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.transport.chunks import bytes_of, merge_outputs, plan_chunks
from tinkex_py.transport.codec import (
    WEIGHT_BYTES,
    EncodedBatch,
    LossConfig,
    PassRequest,
    PlannedBatch,
    encode_custom_batch,
    read_forward_backward,
)
from tinkex_py.transport.dialects import Dialect
from tinkex_py.transport.lane import is_undecided
from tinkex_py.types import Datum, ForwardBackwardOutput
from tinkex_py.types.tensors import Array

# Work on more tokens, or more bytes, than this leaves the event loop's thread.
SMALL_TOKENS = 16_384
SMALL_BYTES = 1 << 18

Value = TypeVar("Value")
Batch = EncodedBatch | PlannedBatch
Sent = str | APIStatusError
"""What became of one chunk: its future, or a final refusal."""
Outcome = ForwardBackwardOutput | RequestFailed | APIStatusError
"""What it came to in the end."""


def planned_chunks(data: Sequence[Datum], connection: Connection) -> list[PlannedBatch]:
    """Datums in the chunks that the service takes."""
    parts = _cut(data, connection, custom=False)
    return [PlannedBatch(part, sum(bytes_of(datum) for datum in part)) for part in parts]


async def encode_custom_chunks(data: Sequence[Datum], connection: Connection) -> list[EncodedBatch]:
    """Lays out a custom step's datums in the chunks that the service takes."""
    parts = _cut(data, connection, custom=True)
    tokens = sum(datum.model_input.length for datum in data)
    large = tokens > SMALL_TOKENS
    return await _off_loop_if(large, connection.threads, lambda: [encode_custom_batch(part) for part in parts])


def _cut(data: Sequence[Datum], connection: Connection, *, custom: bool) -> list[Sequence[Datum]]:
    flags = connection.flags
    return plan_chunks(
        data, max_datums=flags.fwdbwd_max_chunk_len, max_bytes=flags.fwdbwd_max_chunk_bytes_count, custom=custom
    )


async def write_weights(chunks: Sequence[EncodedBatch], weights: Array, threads: WorkerPool) -> None:
    """Gives the chunks other weights, in place: no request of theirs may be under way.

    Args:
        chunks: custom batches.
        weights: float32, all datums' weights end to end.
        threads: where large ones are done.
    """

    def write() -> None:
        for chunk, part in zip(chunks, _parts(chunks), strict=True):
            chunk.write_weights(weights[part])

    await _off_loop_if(weights.size > SMALL_TOKENS, threads, write)


async def replace_by_advantages(
    chunks: Sequence[EncodedBatch], logprobs: Array, advantages: Array, threads: WorkerPool
) -> list[EncodedBatch]:
    """The chunks with logprobs and advantages instead of weights.

    Args:
        chunks: custom batches, targets of one dimension.
        logprobs: float32, all datums' end to end.
        advantages: the same for the advantages.
        threads: where large ones are done.
    """

    def replace() -> list[EncodedBatch]:
        return [
            chunk.with_advantages(logprobs[part], advantages[part])
            for chunk, part in zip(chunks, _parts(chunks), strict=True)
        ]

    return await _off_loop_if(advantages.size > SMALL_TOKENS, threads, replace)


def count_numbers(chunks: Sequence[EncodedBatch]) -> int:
    """How many weights custom batches have."""
    return sum(sum(chunk.weights_bytes) for chunk in chunks) // WEIGHT_BYTES


def _parts(chunks: Sequence[EncodedBatch]) -> list[slice]:
    """Where each chunk's numbers lie among those of all chunks."""
    stops = list(itertools.accumulate((count_numbers([chunk]) for chunk in chunks), initial=0))
    return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


async def _off_loop_if(large: bool, threads: WorkerPool, work: Callable[[], Value]) -> Value:
    return await threads.compute("encode", work) if large else work()


@dataclass(frozen=True)
class ChunkedPass:
    """One forward or forward_backward call.

    Attributes:
        connection: the service.
        model_id: the model.
        chunks: datums, one request each.
        dialect: how they are written.
        loss_fn: the service's loss.
        config: its settings.
        forward_only: no gradient.
        keep_graph: a backward pass over the same datums will follow.
        refused: told which numbers were refused where others of the call were taken.
        stuck: told how many seconds the others had no result then; ends the client, and gives the error.
        queue: hears about the queue in front of the service.
    """

    connection: Connection
    model_id: str
    chunks: Sequence[Batch]
    dialect: Dialect
    loss_fn: str
    config: LossConfig
    forward_only: bool
    keep_graph: bool
    refused: Callable[[Sequence[int]], None]
    stuck: Callable[[float], TinkexError]
    queue: QueueWatch

    async def send(self, numbers: Sequence[int]) -> list[Sent]:
        """Submits every chunk under its number: at the same time where the service likes it, else in order.

        A refused chunk keeps none of the others back, since their numbers are taken.

        Returns:
            For every chunk its future, or the refusal.

        Raises:
            APIStatusError: every chunk was refused, or it is open whether one arrived.
            TransportError: it is open whether a chunk arrived.
        """
        if self.connection.flags.parallel_fwdbwd_chunks and len(self.chunks) > 1:
            sent = await self._send_at_once(numbers)
        else:
            sent = [await self._outcome(number, chunk) for number, chunk in zip(numbers, self.chunks, strict=True)]
        refusals = [outcome for outcome in sent if isinstance(outcome, APIStatusError)]
        if len(refusals) == len(sent):
            raise refusals[0]
        if refusals:
            self.refused([number for number, outcome in zip(numbers, sent, strict=True) if outcome in refusals])
        return sent

    async def result(self, sent: Sequence[Sent]) -> ForwardBackwardOutput:
        """Waits for all chunks and merges their results.

        Raises:
            PartialFailure: the service holds the gradients of some chunks and not of others.
            ResultLost: it is not known whether a chunk has left a gradient.
            RequestFailed, APIStatusError: no chunk has left a gradient.
            InvalidResponse: a result has another number of datums than its chunk.
            SequenceLost: a chunk was refused, and the service does not go on behind it.
        """
        refused = any(isinstance(outcome, APIStatusError) for outcome in sent)
        outcomes = await (self._outcomes_behind_a_refusal(sent) if refused else self._outcomes(sent))
        failures = [outcome for outcome in outcomes if not isinstance(outcome, ForwardBackwardOutput)]
        if not failures:
            return merge_outputs([outcome for outcome in outcomes if isinstance(outcome, ForwardBackwardOutput)])
        lost = [failure for failure in failures if isinstance(failure, ResultLost)]
        if lost:  # to send its datums again might add their gradient twice
            raise lost[0]
        if self.forward_only or len(failures) == len(outcomes):
            raise failures[0]
        raise self._partial_failure(outcomes) from failures[0]

    async def _outcomes(self, sent: Sequence[Sent]) -> list[Outcome]:
        return [await self._result_of(outcome, chunk) for outcome, chunk in zip(sent, self.chunks, strict=True)]

    async def _outcomes_behind_a_refusal(self, sent: Sequence[Sent]) -> list[Outcome]:
        """Not without a bound: where somebody on the way refused the chunk, the service waits for it for ever."""
        deadline = self.connection.config.retry.deadline
        scope = asyncio.timeout(deadline if math.isfinite(deadline) else None)
        try:
            async with scope:
                return await self._outcomes(sent)
        except TimeoutError as error:
            if isinstance(error, TransportError) or not scope.expired():
                raise
            raise self.stuck(deadline) from error

    async def _send_at_once(self, numbers: Sequence[int]) -> list[Sent]:
        """Every chunk is posted to its end, whatever becomes of the others."""
        undecided: list[TinkexError] = []

        async def outcome(number: int, chunk: Batch) -> Sent | None:
            try:
                return await self._outcome(number, chunk)
            except (APIStatusError, TransportError) as error:
                undecided.append(error)
                return None

        async with asyncio.TaskGroup() as group:
            tasks = [
                group.create_task(outcome(number, chunk), name="tinkex.chunk")
                for number, chunk in zip(numbers, self.chunks, strict=True)
            ]
        if undecided:
            raise undecided[0]
        return [sent for task in tasks if (sent := task.result()) is not None]

    async def _outcome(self, number: int, chunk: Batch) -> Sent:
        try:
            return await self._send_one(number, chunk)
        except APIStatusError as error:
            if is_undecided(error):
                raise
            return error

    async def _send_one(self, number: int, chunk: Batch) -> str:
        request = PassRequest(self.model_id, number, self.loss_fn, self.config, forward_only=self.forward_only)
        try:
            return await self._post(self.dialect, chunk, request)
        except APIStatusError as error:
            if self.dialect.name != "protobuf" or not self.connection.falls_back_to_json(error):
                raise
            return await self._post(await self.connection.dialect(), chunk, request)

    async def _post(self, dialect: Dialect, chunk: Batch, request: PassRequest) -> str:
        # Written within the budget: of what waits for it there are no bytes yet.
        async with self.connection.pass_bytes.hold(chunk.size):
            slow = dialect.is_slow or isinstance(chunk, PlannedBatch)
            encoded = await _off_loop_if(
                slow and chunk.size > SMALL_BYTES,
                self.connection.threads,
                lambda: dialect.encode(chunk.laid_out(), request),
            )
            return await self.connection.submit_pass(encoded, keep_graph=self.keep_graph)

    async def _result_of(self, sent: Sent, chunk: Batch) -> Outcome:
        if isinstance(sent, APIStatusError):
            return sent
        request_type = "Forward" if self.forward_only else "ForwardBackward"
        try:
            output = await self.connection.result(sent, request_type, read_forward_backward, self.queue)
        except RequestFailed as error:
            return error
        if output.num_datums not in (0, len(chunk.data)):  # some services strip the outputs
            raise InvalidResponse(
                f"the result of {request_type} has {output.num_datums} datums, but {len(chunk.data)} were sent"
            )
        return output

    def _partial_failure(self, outcomes: Sequence[object]) -> PartialFailure:
        applied: list[tuple[int, int]] = []
        missing: list[tuple[int, int]] = []
        start = 0
        first: RequestFailed | APIStatusError | None = None
        for chunk, outcome in zip(self.chunks, outcomes, strict=True):
            stop = start + len(chunk.data)
            failed = isinstance(outcome, RequestFailed | APIStatusError)
            (missing if failed else applied).append((start, stop))
            first = first or (outcome if isinstance(outcome, RequestFailed | APIStatusError) else None)
            start = stop
        assert first is not None
        return PartialFailure(
            f"{len(missing)} of {len(outcomes)} chunks of this call failed ({type(first).__name__}: {first}). "
            f"The service holds the gradients of datums {_ranges(applied)} and, as far as is known, not those of "
            f"{_ranges(missing)}: send the latter again before the next optim_step, or make a new client from the last "
            "checkpoint",
            applied=applied,
            missing=missing,
            category=first.category if isinstance(first, RequestFailed) else "unknown",
            request_id=first.request_id,
        )


def _ranges(parts: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start} to {stop - 1}" if stop - start > 1 else str(start) for start, stop in parts)
