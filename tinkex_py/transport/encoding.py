"""Passes over data as bytes, with the packed buffers untouched.

A custom step sends the same datums twice, so their protobuf form is laid out once and only the bytes of the weights are
overwritten for the backward pass. What surrounds the numbers depends on lengths alone: it is made once for all datums
of one shape, and the numbers are copied once, from their arrays into the request.
"""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, Protocol, cast

import numpy as np

from tinkex_py.transport import wire
from tinkex_py.transport.messages import JSON, NO_HEADERS, Request, request
from tinkex_py.types import Datum, TensorData
from tinkex_py.types.tensors import Array

PROTOBUF = "application/x-protobuf"
LossConfig = Mapping[str, float | str]
EncodingName = Literal["protobuf", "json"]

_BACKWARD_PATH = "/api/v1/forward_backward"
_FORWARD_PATH = "/api/v1/forward"
_DATA_TAG = bytes([3 << 3 | 2])  # ForwardBackwardRequest.data: field 3, length-delimited
_TOKEN_BYTES = 4
_TARGET_BYTES = 8
_WEIGHT_BYTES = 4
_NUMPY_DTYPES = {wire.DTYPE_FLOAT32: np.dtype("<f4"), wire.DTYPE_INT64: np.dtype("<i8")}


@dataclass(frozen=True)
class EncodedBatch:
    """Datums as the `data` part of a ForwardBackwardRequest.

    Attributes:
        data: the datums kept for error messages and JSON servers.
        body: the bytes.
        weights_at: start of every datum's dense weights in `body`; empty if they cannot be replaced.
        weights_bytes: length of every datum's weights.
        checked_fields: the datums' own floating point fields that are sent.
    """

    data: Sequence[Datum]
    body: bytearray
    weights_at: Sequence[int]
    weights_bytes: Sequence[int]
    checked_fields = ("weights",)

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return len(self.body)

    @property
    def weight_count(self) -> int:
        """How many weights all datums have."""
        return sum(self.weights_bytes) // _WEIGHT_BYTES

    def laid_out(self) -> "EncodedBatch":
        """Itself, as `PlannedBatch.laid_out`."""
        return self

    def write_weights(self, packed: Array) -> None:
        """Gives the datums other weights, in place: no request of this batch may be under way.

        Args:
            packed: float32, all datums' weights end to end.
        """
        flat = np.ascontiguousarray(packed, dtype="<f4").reshape(-1).view(np.uint8)
        target = np.frombuffer(self.body, np.uint8)
        start = 0
        for position, size in zip(self.weights_at, self.weights_bytes, strict=True):
            target[position : position + size] = flat[start : start + size]
            start += size
        assert start == flat.size, "weights must cover the datums exactly"

    def with_advantages(self, logprobs: Array, advantages: Array) -> "EncodedBatch":
        """The same datums with `logprobs` and `advantages` instead of weights.

        Args:
            logprobs: float32, all datums' end to end, of targets with one dimension.
            advantages: the same for the advantages.
        """
        body = bytearray()
        start = 0
        for datum in self.data:
            targets = datum.loss_fn_inputs["target_tokens"]
            stop = start + math.prod(targets.shape)
            inputs = {
                "target_tokens": _tensor(targets),
                "logprobs": _floats(logprobs[start:stop], targets.shape),
                "advantages": _floats(advantages[start:stop], targets.shape),
            }
            _append(body, _input_bytes(datum) + wire.Datum(loss_fn_inputs=inputs).SerializeToString())
            start = stop
        assert start == logprobs.size == advantages.size, "logprobs and advantages must cover the datums exactly"
        return EncodedBatch(self.data, body, (), ())


@dataclass(frozen=True)
class PlannedBatch:
    """Datums that are laid out when they are sent, so that those that wait cost no memory.

    Attributes:
        data: the datums, which nobody can change.
        size: estimated bytes of the body.
        checked_fields: None; all fields are sent.
    """

    data: Sequence[Datum]
    size: int
    checked_fields = None

    def laid_out(self) -> EncodedBatch:
        """The datums with all their loss inputs."""
        return encode_batch(self.data)


NO_DATUMS = EncodedBatch((), bytearray(), (), ())


def encode_batch(data: Sequence[Datum]) -> EncodedBatch:
    """Lays out datums with all their loss inputs."""
    body = bytearray()
    for datum in data:
        inputs = {name: _tensor(tensor) for name, tensor in datum.loss_fn_inputs.items()}
        _append(body, _input_bytes(datum) + wire.Datum(loss_fn_inputs=inputs).SerializeToString())
    return EncodedBatch(data, body, (), ())


def encode_custom_batch(data: Sequence[Datum]) -> EncodedBatch:
    """Lays out datums for a custom step: only `target_tokens` and `weights`, the latter replaceable.

    Weights that the datum has are sent, else zeros; the forward pass does not depend on them.
    """
    # The arrays themselves: thousands of memoryviews of them would keep Python's garbage collection busy.
    parts: list[bytes | Array] = []
    positions: list[int] = []
    sizes: list[int] = []
    length = 0
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        if targets.sparse_crow_indices is not None:
            frame = _custom_frame_around(_head_of(datum, targets), targets.shape)
        else:
            tokens = [chunk.tokens for chunk in datum.model_input.chunks]
            lengths = [array.size for array in tokens]
            frame = _custom_frame(tuple(lengths), targets.shape)
            for before, array in zip(frame.before_chunks, tokens, strict=True):
                parts += (before, array)
            parts += (frame.before_targets, targets.data)
        weights = datum.loss_fn_inputs.get("weights")
        values = frame.zeros if weights is None else _float_values(weights)
        parts += (frame.before_weights, values, frame.after_weights)
        positions.append(length + frame.weights_at)
        sizes.append(len(frame.zeros))
        length += frame.length
    return EncodedBatch(data, bytearray().join(cast("list[bytes]", parts)), positions, sizes)


@dataclass(frozen=True)
class PassHeader:
    """What a forward or forward_backward request says beside its datums.

    Attributes:
        model_id: the model.
        seq_id: the request's number.
        loss_fn: the service's loss.
        config: its settings.
        forward_only: no gradient.
    """

    model_id: str
    seq_id: int
    loss_fn: str
    config: LossConfig
    forward_only: bool


def encode_request(batch: EncodedBatch, request: PassHeader) -> tuple[bytes, bytearray]:
    """A ForwardBackwardRequest around encoded datums, in two parts: the second is the batch's own memory."""
    head = wire.ForwardBackwardRequest(
        model_id=request.model_id,
        seq_id=request.seq_id,
        loss_fn=request.loss_fn,
        forward_only=request.forward_only,
    )
    for name, value in request.config.items():
        if isinstance(value, str):
            head.loss_fn_config_v2[name].text = value
        else:
            head.loss_fn_config[name] = value
            head.loss_fn_config_v2[name].number = value
    return head.SerializeToString(), batch.body


def request_as_json(batch: EncodedBatch, request: PassHeader) -> dict[str, Any]:
    """The same request for servers that only read JSON; it goes to `/forward` or `/forward_backward`."""
    body = wire.ForwardBackwardRequest.FromString(bytes(batch.body))
    data = [
        {
            "model_input": datum.model_input.model_dump(),
            "loss_fn_inputs": {name: _tensor_as_json(tensor) for name, tensor in message.loss_fn_inputs.items()},
        }
        for datum, message in zip(batch.data, body.data, strict=True)
    ]
    given: dict[str, Any] = {"data": data, "loss_fn": request.loss_fn}
    if request.config:
        given["loss_fn_config"] = dict(request.config)
    return {
        "model_id": request.model_id,
        "seq_id": request.seq_id,
        "forward_input" if request.forward_only else "forward_backward_input": given,
    }


class Encoding(Protocol):
    """One way to write a pass over data."""

    @property
    def name(self) -> EncodingName:
        """Which one it is."""
        ...

    @property
    def holds_any_number(self) -> bool:
        """Whether NaN and infinity can be written."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether writing much leaves the event loop's thread; a plain copy does not."""
        ...

    def encode(self, batch: EncodedBatch, header: PassHeader, headers: Mapping[str, str] = NO_HEADERS) -> Request:
        """Writes one request.

        Args:
            batch: the datums.
            header: what the request says beside them.
            headers: further HTTP headers.
        """
        ...


class ProtobufEncoding:
    """`ForwardBackwardRequest` messages to one endpoint.

    Args:
        compress: with zstd, where `zstandard` is installed (the extra `zstd`). Without it the body goes plain, which
            every service reads.
    """

    name: EncodingName = "protobuf"
    holds_any_number = True

    def __init__(self, *, compress: bool = False) -> None:
        self._zstandard: Any = _zstandard() if compress else None
        self.is_slow = self._zstandard is not None

    def encode(self, batch: EncodedBatch, header: PassHeader, headers: Mapping[str, str] = NO_HEADERS) -> Request:
        """A ForwardBackwardRequest."""
        parts = encode_request(batch, header)
        if self._zstandard is None:
            return request("POST", _BACKWARD_PATH, content=parts, content_type=PROTOBUF, headers=headers)
        body = self._zstandard.ZstdCompressor().compress(b"".join(parts))
        compressed = {**headers, "Content-Encoding": "zstd"}
        return request("POST", _BACKWARD_PATH, content=body, content_type=PROTOBUF, headers=compressed)


class JsonEncoding:
    """JSON objects; forward passes have an endpoint of their own."""

    name: EncodingName = "json"
    holds_any_number = False
    is_slow = True

    def encode(self, batch: EncodedBatch, header: PassHeader, headers: Mapping[str, str] = NO_HEADERS) -> Request:
        """A `forward_input` or `forward_backward_input`."""
        path = _FORWARD_PATH if header.forward_only else _BACKWARD_PATH
        written = json.dumps(request_as_json(batch, header), allow_nan=False, separators=(",", ":")).encode()
        return request("POST", path, content=written, content_type=JSON, headers=headers)


@dataclass(frozen=True)
class _CustomFrame:
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


@lru_cache(maxsize=256)
def _custom_frame(chunk_lengths: tuple[int, ...], shape: tuple[int, ...]) -> _CustomFrame:
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
    opening = _data_opening(message)
    # An input without chunks has no part that could hold the opening.
    first = [opening + before_chunks[0], *before_chunks[1:]] if before_chunks else []
    return _CustomFrame(
        before_chunks=first,
        before_targets=before_targets if before_chunks else opening + before_targets,
        before_weights=after_targets + before_weights,
        after_weights=after_weights,
        zeros=bytes(_WEIGHT_BYTES * size),
        weights_at=len(opening) + inputs + targets + len(before_weights),
        length=len(opening) + message,
    )


def _custom_frame_around(head: bytes, shape: tuple[int, ...]) -> _CustomFrame:
    """The frame of an element whose input and targets are laid out already, in `head`.

    Args:
        head: the two, serialized.
        shape: of the targets.
    """
    size = _WEIGHT_BYTES * math.prod(shape)
    before, after = _around_tensor("weights", wire.DTYPE_FLOAT32, size, shape)
    message = len(head) + len(before) + size + len(after)
    before_weights = _data_opening(message) + head + before
    return _CustomFrame(
        before_chunks=(),
        before_targets=b"",
        before_weights=before_weights,
        after_weights=after,
        zeros=bytes(size),
        weights_at=len(before_weights),
        length=len(before_weights) + size + len(after),
    )


def _data_opening(length: int) -> bytes:
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


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None


def _append(body: bytearray, message: bytes) -> None:
    body += _data_opening(len(message))
    body += message


def _head_of(datum: Datum, targets: TensorData) -> bytes:
    return _input_bytes(datum) + wire.Datum(loss_fn_inputs={"target_tokens": _tensor(targets)}).SerializeToString()


def _input_bytes(datum: Datum) -> bytes:
    chunks = [
        wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=chunk.tokens.tobytes()))
        for chunk in datum.model_input.chunks
    ]
    return wire.Datum(model_input=chunks).SerializeToString()


def _tensor(tensor: TensorData) -> wire.Tensor:
    dtype = wire.DTYPE_INT64 if tensor.dtype == "int64" else wire.DTYPE_FLOAT32
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if crow is None or col is None:
        return wire.Tensor(dense=tensor.data.tobytes(), dtype=dtype, shape=tensor.shape)
    sparse = wire.SparseCsr(values=tensor.data.tobytes(), crow_indices=crow.tobytes(), col_indices=col.tobytes())
    return wire.Tensor(sparse_csr=sparse, dtype=dtype, shape=tensor.shape)


def _float_values(tensor: TensorData) -> Array:
    """All values of a tensor as the wire's float32, contiguous."""
    if tensor.dtype == "float32" and not tensor.is_sparse:
        return tensor.data
    return np.ascontiguousarray(tensor.to_numpy(), dtype="<f4")


def _floats(values: Array, shape: tuple[int, ...]) -> wire.Tensor:
    numbers = np.ascontiguousarray(values, dtype="<f4").tobytes()
    return wire.Tensor(dense=numbers, dtype=wire.DTYPE_FLOAT32, shape=shape)


def _tensor_as_json(tensor: wire.Tensor) -> dict[str, Any]:
    dtype = "int64" if tensor.dtype == wire.DTYPE_INT64 else "float32"
    element = _NUMPY_DTYPES[tensor.dtype]
    if tensor.WhichOneof("encoding") == "sparse_csr":
        sparse = tensor.sparse_csr
        return {
            "data": np.frombuffer(sparse.values, element).tolist(),
            "dtype": dtype,
            "shape": list(tensor.shape),
            "sparse_crow_indices": np.frombuffer(sparse.crow_indices, "<i8").tolist(),
            "sparse_col_indices": np.frombuffer(sparse.col_indices, "<i8").tolist(),
        }
    return {"data": np.frombuffer(tensor.dense, element).tolist(), "dtype": dtype, "shape": list(tensor.shape)}
