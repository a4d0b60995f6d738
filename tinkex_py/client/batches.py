"""The datums of one call, checked and cut into the chunks that the service takes."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from tinkex_py.client.training_data import check_data, check_inputs, check_loss
from tinkex_py.transport.chunks import bytes_of, plan_chunks
from tinkex_py.transport.codec import EncodedBatch, LossConfig, PlannedBatch, encode_custom_batch
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.types import Datum
from tinkex_py.types.tensors import Array


@dataclass(frozen=True)
class CustomBatch:
    """A custom step's datums, laid out.

    Attributes:
        data: the datums as they are sent; the caller's list may change meanwhile.
        chunks: their bytes, one request each.
    """

    data: Sequence[Datum]
    chunks: Sequence[EncodedBatch]

    @property
    def size(self) -> int:
        """Numbers in all targets, and so in all weights."""
        return sum(chunk.weight_count for chunk in self.chunks)

    def write_weights(self, weights: Array) -> None:
        """Gives the datums other weights, in place: no request of theirs may be under way.

        Args:
            weights: float32, all datums' weights end to end.
        """
        for chunk, part in zip(self.chunks, self._parts(), strict=True):
            chunk.write_weights(weights[part])

    def with_advantages(self, logprobs: Array, advantages: Array) -> "CustomBatch":
        """The same datums with logprobs and advantages instead of weights.

        Args:
            logprobs: float32, all datums' end to end, of targets with one dimension.
            advantages: the same for the advantages.
        """
        return CustomBatch(
            self.data,
            [
                chunk.with_advantages(logprobs[part], advantages[part])
                for chunk, part in zip(self.chunks, self._parts(), strict=True)
            ],
        )

    def _parts(self) -> list[slice]:
        """Where each chunk's numbers lie among those of all chunks."""
        stops = itertools.accumulate((chunk.weight_count for chunk in self.chunks), initial=0)
        return [slice(start, stop) for start, stop in itertools.pairwise(stops)]


def checked_chunks(
    data: Sequence[Datum], loss_fn: str, config: LossConfig, limits: ServerConfig
) -> Sequence[PlannedBatch]:
    """Datums for one of the service's losses, in chunks that are laid out when they are sent.

    Args:
        data: the datums.
        loss_fn: the loss.
        config: its settings.
        limits: of chunks.

    Raises:
        InvalidData: they cannot be used.
    """
    datums = checked_data(data, loss_fn, config)
    parts = plan_chunks(datums, max_datums=limits.fwdbwd_max_chunk_len, max_bytes=limits.fwdbwd_max_chunk_bytes_count)
    return [PlannedBatch(part, sum(map(bytes_of, part))) for part in parts]


def checked_data(
    data: Sequence[Datum], loss_fn: str = "cross_entropy", config: LossConfig | None = None
) -> Sequence[Datum]:
    """Datums that one of the service's losses can take.

    Raises:
        InvalidData: they cannot be used.
    """
    datums = check_data(data)
    check_loss(loss_fn, config or {})
    check_inputs(datums, loss_fn)
    return datums


def custom_batch(data: Sequence[Datum], limits: ServerConfig) -> CustomBatch:
    """Lays out checked datums of a custom step: targets and weights only."""
    parts = plan_chunks(
        data,
        max_datums=limits.fwdbwd_max_chunk_len,
        max_bytes=limits.fwdbwd_max_chunk_bytes_count,
        custom=True,
    )
    return CustomBatch(data, [encode_custom_batch(part) for part in parts])
