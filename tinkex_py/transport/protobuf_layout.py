"""What stands around the numbers of a custom step's datum in its protobuf form.

The bytes around the numbers depend on lengths alone, so they are made once for all datums of one shape, and the
numbers themselves are copied once, from their arrays into the request.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tinkex_py.transport import wire

# ForwardBackwardRequest.data: field 3, length-delimited.
_DATA_TAG = bytes([3 << 3 | 2])
_TOKEN_BYTES = 4
_TARGET_BYTES = 8
_WEIGHT_BYTES = 4


@dataclass(frozen=True)
class CustomFrame:
    """The frame of all datums whose inputs and targets have the same lengths.

    Attributes:
        before_chunks: before the int32 tokens of every chunk of the input.
        before_targets: between them and the int64 targets.
        before_weights: between those and the float32 weights.
        after_weights: the end.
        zeros: weights for a datum that has none.
        weights_at: where the weights start.
        length: of the whole element.
    """

    before_chunks: Sequence[bytes]
    before_targets: bytes
    before_weights: bytes
    after_weights: bytes
    zeros: bytes
    weights_at: int
    length: int


def custom_frame(chunk_lengths: Sequence[int], shape: tuple[int, ...]) -> CustomFrame:
    """The frame of an element of ForwardBackwardRequest.data with `target_tokens` and `weights`.

    Args:
        chunk_lengths: tokens of every chunk of the input.
        shape: of the targets.
    """
    before_chunks = [_before_tokens(length) for length in chunk_lengths]
    size = math.prod(shape)
    before_targets, after_targets = _around_tensor("target_tokens", wire.DTYPE_INT64, _TARGET_BYTES * size, shape)
    before_weights, after_weights = _around_tensor("weights", wire.DTYPE_FLOAT32, _WEIGHT_BYTES * size, shape)
    inputs = sum(map(len, before_chunks)) + _TOKEN_BYTES * sum(chunk_lengths)
    targets = len(before_targets) + _TARGET_BYTES * size + len(after_targets)
    message = inputs + targets + len(before_weights) + _WEIGHT_BYTES * size + len(after_weights)
    opening = data_opening(message)
    # An input without chunks has no part that could hold the opening.
    first = [opening + before_chunks[0], *before_chunks[1:]] if before_chunks else []
    return CustomFrame(
        before_chunks=first,
        before_targets=before_targets if before_chunks else opening + before_targets,
        before_weights=after_targets + before_weights,
        after_weights=after_weights,
        zeros=bytes(_WEIGHT_BYTES * size),
        weights_at=len(opening) + inputs + targets + len(before_weights),
        length=len(opening) + message,
    )


def custom_frame_around(head: bytes, shape: tuple[int, ...]) -> CustomFrame:
    """The frame of an element whose input and targets are laid out already, in `head`.

    Args:
        head: the two, serialized.
        shape: of the targets.
    """
    size = _WEIGHT_BYTES * math.prod(shape)
    before, after = _around_tensor("weights", wire.DTYPE_FLOAT32, size, shape)
    message = len(head) + len(before) + size + len(after)
    before_weights = data_opening(message) + head + before
    return CustomFrame(
        before_chunks=(),
        before_targets=b"",
        before_weights=before_weights,
        after_weights=after,
        zeros=bytes(size),
        weights_at=len(before_weights),
        length=len(before_weights) + size + len(after),
    )


def data_opening(length: int) -> bytes:
    """Opens one element of `data`. Lengths are base-128 varints, low bits first (protobuf encoding guide)."""
    opening = bytearray(_DATA_TAG)
    while length > 0x7F:
        opening.append(length & 0x7F | 0x80)
        length >>= 7
    opening.append(length)
    return bytes(opening)


def _before_tokens(length: int) -> bytes:
    numbers = bytes(_TOKEN_BYTES * length)
    chunk = wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=numbers))
    message = wire.Datum(model_input=[chunk]).SerializeToString()
    return message[: len(message) - len(numbers)]


def _around_tensor(name: str, dtype: "wire.DType", size: int, shape: tuple[int, ...]) -> tuple[bytes, bytes]:
    """What stands before and after the numbers of a loss input.

    In the serialized entry the numbers are followed by dtype and shape only, since fields are written in
    the order of their numbers.
    """
    tensor = wire.Tensor(dense=bytes(size), dtype=dtype, shape=shape)
    entry = wire.Datum(loss_fn_inputs={name: tensor}).SerializeToString()
    after = wire.Tensor(dtype=dtype, shape=shape).SerializeToString()
    return entry[: len(entry) - len(after) - size], after
