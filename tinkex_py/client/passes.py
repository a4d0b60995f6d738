"""Forward and backward passes over data: sends the chunks, waits for their results and merges them."""

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import TypeVar

from tinkex_py.client.accumulation import Accumulation, GradientCall
from tinkex_py.client.batches import check_encodable, check_finite, merge_outputs, without_padding
from tinkex_py.client.ordering import Ordering, Submission
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

# Chunks of more bytes are encoded in a worker thread.
SMALL_BYTES = 1 << 18
_KEEP_GRAPH = {"X-Tinkex-Keep-Graph": "1"}

Chunk = EncodedBatch | PlannedBatch
Value = TypeVar("Value")


@dataclass(frozen=True)
class Model:
    """The model of a training client, and the state that its requests share.

    Attributes:
        base_model: name of the base model; None if it is unknown.
        key: the name under which certificates of this model are in use.
    """

    session: ClientSession
    model_id: str
    ordering: Ordering
    accumulation: Accumulation
    queue: QueueWatch
    base_model: str | None
    key: str


class Effect(Enum):
    """Whether the service applied the gradient of a chunk."""

    APPLIED = auto()
    MISSING = auto()
    UNKNOWN = auto()


@dataclass(frozen=True)
class ChunkResult:
    """The result of one chunk.

    Attributes:
        start: index of its first datum in the call.
        stop: index after its last datum.
        effect: whether the service applied it.
        output: the result of an applied chunk.
        error: the reason why a chunk is missing or unknown.
    """

    start: int
    stop: int
    effect: Effect
    output: ForwardBackwardOutput | None = None
    error: RequestFailed | APIStatusError | None = None


@dataclass(frozen=True)
class PassOutcome:
    """The results of all chunks of a call. Only this value decides which of its gradients the service holds."""

    chunks: Sequence[ChunkResult]

    @property
    def held_datums(self) -> int:
        """Number of datums whose gradients the service holds or may hold."""
        return sum(chunk.stop - chunk.start for chunk in self.chunks if chunk.effect is not Effect.MISSING)

    def output(self, *, forward_only: bool) -> ForwardBackwardOutput:
        """Returns the merged result.

        Raises:
            ResultLost: it is unknown whether the service holds the gradient of a chunk.
            PartialFailure: the service holds the gradients of some chunks, but not of others.
            RequestFailed, APIStatusError: the service holds the gradient of no chunk.
        """
        failed = [chunk for chunk in self.chunks if chunk.error is not None]
        for chunk in sorted(failed, key=lambda chunk: chunk.effect is not Effect.UNKNOWN):
            assert chunk.error is not None
            # Sending the datums of an unknown chunk again could add their gradient twice.
            if chunk.effect is Effect.UNKNOWN or forward_only or len(failed) == len(self.chunks):
                raise chunk.error
            raise self._partial_failure(failed, chunk.error) from chunk.error
        return merge_outputs([chunk.output for chunk in self.chunks if chunk.output is not None])

    def _partial_failure(self, failed: Sequence[ChunkResult], first: RequestFailed | APIStatusError) -> PartialFailure:
        applied = [(chunk.start, chunk.stop) for chunk in self.chunks if chunk.effect is Effect.APPLIED]
        missing = [(chunk.start, chunk.stop) for chunk in failed]
        return PartialFailure(
            f"{len(missing)} of {len(self.chunks)} chunks of this call failed ({type(first).__name__}: {first}). "
            f"The service holds the gradients of datums {_ranges(applied)}, but not those of {_ranges(missing)}: send "
            "the latter again before the next optim_step, or create a new client from the last checkpoint",
            applied=applied,
            missing=missing,
            category=first.category if isinstance(first, RequestFailed) else "unknown",
            request_id=first.request_id,
        )


class Pass(Submission[ForwardBackwardOutput]):
    """A forward pass.

    Args:
        model: the model of the training client.
        chunks: the datums, one request per chunk.
        loss_fn: the service's loss.
        config: settings of the loss.
        keep_graph: tells the embedded service that a backward pass over the same datums follows.
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

    async def prepare(self) -> int:
        """Gets the encoding and the key; needs one number per chunk.

        Raises:
            InvalidData: the encoding cannot represent a number or a chunk of the datums.
        """
        encoding = self._session.encoding
        self._encoding = encoding.chosen or await encoding.choose()
        data = [datum for chunk in self.chunks for datum in chunk.data]
        if not self._encoding.holds_any_number:
            check_finite(data, self._config, fields=self.chunks[0].checked_fields)
        check_encodable(data, self._encoding.name)
        await self._session.api.auth.current()
        return len(self.chunks)

    async def submit(self, numbers: Sequence[int]) -> Sequence[Sent]:
        """Sends every chunk under its number: at once if the service prefers that, else in order.

        The chunks after a refused one are sent too, because their numbers are assigned.
        """
        numbered = list(zip(numbers, self.chunks, strict=True))
        if len(numbered) == 1 or not self._session.config.parallel_fwdbwd_chunks:
            return [await self._post(number, chunk) for number, chunk in numbered]
        return await self._submit_at_once(numbered)

    async def result(self, sent: Sequence[Sent]) -> ForwardBackwardOutput:
        """Waits for all chunks and merges their results; raises like `PassOutcome.output`.

        Raises:
            InvalidResponse: a result and its chunk differ in the number of datums.
            SequenceLost: a chunk was refused on the way, and the service executes nothing after it.
        """
        return (await self._results(sent)).output(forward_only=self.forward_only)

    async def _submit_at_once(self, numbered: Sequence[tuple[int, Chunk]]) -> Sequence[Sent]:
        """Sends every chunk until it has a final response, even if another one fails."""
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
        # Encoded within the budget, so that chunks that wait occupy no memory.
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
        # Limited in time: if a proxy refused the chunk, the service waits for its number forever.
        seconds = self._session.settings.retry.deadline
        stuck = f"nothing after it was executed within {seconds:g} s"
        async with time_limit(seconds, lambda: self._model.ordering.end_behind(refused[0], stuck)):
            return await self._collect(sent)

    async def _collect(self, sent: Sequence[Sent]) -> PassOutcome:
        results: list[ChunkResult] = []
        start = 0
        for one, chunk in zip(sent, self.chunks, strict=True):
            stop = start + len(chunk.data)
            results.append(await self._result_of(one, chunk, start, stop))
            start = stop
        return PassOutcome(results)

    async def _result_of(self, sent: Sent, chunk: Chunk, start: int, stop: int) -> ChunkResult:
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
        return ChunkResult(start, stop, Effect.APPLIED, without_padding(output, chunk.data))


class GradientPass(Pass):
    """A forward_backward pass: it adds a gradient, which the accumulation records.

    Args:
        model, chunks, loss_fn, config: as for `Pass`.
        call: the record; its number of datums is updated here.
        on_hand_over: called at the hand-over, before any other code can run.
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
        self._call = call or GradientCall(sum(len(chunk.data) for chunk in chunks))
        self._on_hand_over = on_hand_over

    def handed_over(self) -> None:
        """Records the gradient, which the service may hold from now on."""
        self._model.accumulation.add(self._call)
        if self._on_hand_over is not None:
            self._on_hand_over()

    def submitted(self, sent: Sequence[Sent]) -> None:
        """Subtracts the refused chunks from the record."""
        accepted = [one.refusal is None for one in sent]
        if not any(accepted):
            self._model.accumulation.refuse(self._call)
        self._call.datums = sum(len(chunk.data) for chunk, taken in zip(self.chunks, accepted, strict=True) if taken)

    async def result(self, sent: Sequence[Sent]) -> ForwardBackwardOutput:
        """Waits for all chunks, records which of them were applied, and merges their results; raises like `Pass`."""
        result = await self._results(sent)
        self._call.datums = result.held_datums
        return result.output(forward_only=False)


async def off_loop_if(large: bool, session: ClientSession, work: Callable[[], Value]) -> Value:
    """Runs work in a worker thread if it is large, else in the calling thread."""
    return await session.workers.compute("encode", work) if large else work()


def _ranges(parts: Sequence[tuple[int, int]]) -> str:
    return ", ".join(f"{start} to {stop - 1}" if stop - start > 1 else str(start) for start, stop in parts)
