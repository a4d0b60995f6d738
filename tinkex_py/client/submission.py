"""Sends passes over data, in chunks where they are long."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from tinkex_py.client.connection import Connection
from tinkex_py.errors import APIStatusError
from tinkex_py.losses.threads import TermThreads, run_released
from tinkex_py.transport.chunks import merge_outputs, plan_chunks
from tinkex_py.transport.codec import (
    EncodedBatch,
    LossConfig,
    PassRequest,
    encode_batch,
    encode_custom_batch,
    encode_request,
    read_forward_backward,
    request_as_json,
)
from tinkex_py.transport.lane import UNDECIDED_STATUSES
from tinkex_py.types import Datum, ForwardBackwardOutput
from tinkex_py.types.tensors import Array

# Work on more tokens than this leaves the event loop's thread.
SMALL_TOKENS = 16_384

Value = TypeVar("Value")


async def encode_chunks(data: Sequence[Datum], connection: Connection, *, custom: bool) -> list[EncodedBatch]:
    """Lays out datums in the chunks that the service takes."""
    encode = encode_custom_batch if custom else encode_batch
    parts = plan_chunks(data, max_datums=connection.max_chunk_datums, max_bytes=connection.max_chunk_bytes)
    tokens = sum(datum.model_input.length for datum in data)
    return await _off_loop_if(tokens > SMALL_TOKENS, connection.threads, lambda: [encode(part) for part in parts])


async def replace_weights(chunks: Sequence[EncodedBatch], weights: Array, threads: TermThreads) -> list[EncodedBatch]:
    """The chunks with other weights.

    Args:
        chunks: custom batches.
        weights: float32, all datums' weights end to end.
        threads: where large ones are done.
    """

    def replace() -> list[EncodedBatch]:
        replaced: list[EncodedBatch] = []
        start = 0
        for chunk in chunks:
            size = sum(chunk.weights_bytes) // weights.itemsize
            replaced.append(chunk.with_weights(weights[start : start + size]))
            start += size
        return replaced

    return await _off_loop_if(weights.size > SMALL_TOKENS, threads, replace)


async def _off_loop_if(large: bool, threads: TermThreads, work: Callable[[], Value]) -> Value:
    return await run_released(threads.arithmetic, "encode", work) if large else work()


@dataclass(frozen=True)
class ChunkedPass:
    """One forward or forward_backward call.

    Attributes:
        connection: the service.
        model_id: the model.
        chunks: encoded datums, one request each.
        loss_fn: the service's loss.
        config: its settings.
        forward_only: no gradient.
        keep_graph: a backward pass over the same datums will follow.
        accepted: request ids of the chunks that the service took so far.
    """

    connection: Connection
    model_id: str
    chunks: Sequence[EncodedBatch]
    loss_fn: str
    config: LossConfig
    forward_only: bool
    keep_graph: bool
    accepted: list[str] = field(default_factory=list[str], init=False)

    async def send(self, numbers: Sequence[int]) -> list[str]:
        """Submits every chunk under its number, in order.

        If one is refused the others are still sent, since their numbers are taken; then the refusal is raised.

        Returns:
            The futures' request ids.
        """
        refusal: APIStatusError | None = None
        for number, chunk in zip(numbers, self.chunks, strict=True):
            try:
                self.accepted.append(await self._send_one(number, chunk))
            except APIStatusError as error:
                if error.status >= 500 or error.status in UNDECIDED_STATUSES:
                    raise
                refusal = refusal or error
        if refusal is not None:
            if self.accepted and not self.forward_only:
                refusal.add_note(f"{len(self.accepted)} of {len(self.chunks)} chunks of this call were accepted")
            raise refusal
        return self.accepted

    async def result(self, request_ids: Sequence[str]) -> ForwardBackwardOutput:
        """Waits for all chunks and merges their results."""
        request_type = "Forward" if self.forward_only else "ForwardBackward"
        outputs = [
            await self.connection.result(request_id, request_type, read_forward_backward) for request_id in request_ids
        ]
        return merge_outputs(outputs)

    async def _send_one(self, number: int, chunk: EncodedBatch) -> str:
        request = PassRequest(self.model_id, number, self.loss_fn, self.config, forward_only=self.forward_only)
        if self.connection.config.wire == "json":
            endpoint = "forward" if self.forward_only else "forward_backward"
            return await self.connection.submit(f"/api/v1/{endpoint}", json=request_as_json(chunk, request))
        return await self.connection.submit(
            "/api/v1/forward_backward", protobuf=encode_request(chunk, request), keep_graph=self.keep_graph
        )
