"""Encodes passes over data; packed buffers stay packed.

A custom step sends the same datums twice: their protobuf form is laid out once, and the backward pass overwrites only
the bytes of the weights. The bytes around the numbers depend only on lengths: they are cached for all datums of one
shape, and the numbers are copied once, from their arrays into the request.
"""

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, cast

import numpy as np

from tinkex_py.transport import wire
from tinkex_py.transport.messages import JSON, NO_HEADERS, Request, request
from tinkex_py.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    SampledProvenanceSpan,
    TensorData,
)
from tinkex_py.types.chunks import Chunk
from tinkex_py.types.provenance import Span
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
        data: the datums, for error messages and JSON.
        body: the bytes.
        weights_at: start of each datum's dense weights in `body`; empty if they cannot be replaced.
        weights_bytes: length of each datum's weights.
        checked_fields: the floating point fields of the datums that are sent.
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
        """Number of weights of all datums."""
        return sum(self.weights_bytes) // _WEIGHT_BYTES

    def laid_out(self) -> "EncodedBatch":
        """Returns itself; see `PlannedBatch.laid_out`."""
        return self

    def write_weights(self, packed: Array) -> None:
        """Replaces the weights in place. No request of this batch may be in flight.

        Args:
            packed: float32, the weights of all datums concatenated.
        """
        flat = np.ascontiguousarray(packed, dtype="<f4").reshape(-1).view(np.uint8)
        target = np.frombuffer(self.body, np.uint8)
        start = 0
        for position, size in zip(self.weights_at, self.weights_bytes, strict=True):
            target[position : position + size] = flat[start : start + size]
            start += size
        assert start == flat.size, "weights must cover the datums exactly"

    def with_advantages(self, logprobs: Array, advantages: Array) -> "EncodedBatch":
        """Returns the same datums with `logprobs` and `advantages` instead of weights.

        Args:
            logprobs: float32, of all datums concatenated, of targets with one dimension.
            advantages: of the same form.
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
            _append(body, _head_of(datum, inputs) + _spans_of(datum))
            start = stop
        assert start == logprobs.size == advantages.size, "logprobs and advantages must cover the datums exactly"
        return EncodedBatch(self.data, body, (), ())


@dataclass(frozen=True)
class PlannedBatch:
    """Datums that are laid out when they are sent, so that waiting ones need no memory.

    Attributes:
        data: the datums, which are immutable.
        size: estimated bytes of the body.
        checked_fields: None: all fields are sent.
    """

    data: Sequence[Datum]
    size: int
    checked_fields = None

    def laid_out(self) -> EncodedBatch:
        """Returns the datums with all their loss inputs."""
        return encode_batch(self.data)


NO_DATUMS = EncodedBatch((), bytearray(), (), ())


def encode_batch(data: Sequence[Datum]) -> EncodedBatch:
    """Lays out datums with all their loss inputs."""
    body = bytearray()
    for datum in data:
        inputs = {name: _tensor(tensor) for name, tensor in datum.loss_fn_inputs.items()}
        _append(body, _head_of(datum, inputs) + _spans_of(datum))
    return EncodedBatch(data, body, (), ())


def encode_custom_batch(data: Sequence[Datum]) -> EncodedBatch:
    """Lays out datums for a custom step: only `target_tokens` and replaceable `weights`.

    Weights of a datum are sent, else zeros; the forward pass does not depend on them.
    """
    # The arrays themselves: thousands of memoryviews of them would slow down Python's garbage collection.
    parts: list[bytes | Array] = []
    positions: list[int] = []
    sizes: list[int] = []
    length = 0
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        arrays: list[bytes | Array] = []
        tokens = [chunk.tokens for chunk in datum.model_input.chunks if isinstance(chunk, EncodedTextChunk)]
        has_spans = datum.model_input_spans is not None
        if targets.sparse_crow_indices is not None or has_spans or len(tokens) < len(datum.model_input.chunks):
            head = _head_of(datum, {"target_tokens": _tensor(targets)})
            frame = _frame([head], 0, targets.shape, _spans_of(datum))
        else:
            frame = _dense_frame(tuple([array.size for array in tokens]), targets.shape)
            arrays += (*tokens, targets.data)
        weights = datum.loss_fn_inputs.get("weights")
        arrays.append(frame.zeros if weights is None else _float_values(weights))
        for before, array in zip(frame.before, arrays, strict=True):
            parts += (before, array)
        parts.append(frame.after)
        positions.append(length + frame.weights_at)
        sizes.append(len(frame.zeros))
        length += frame.length
    return EncodedBatch(data, bytearray().join(cast("list[bytes]", parts)), positions, sizes)


@dataclass(frozen=True)
class PassHeader:
    """The fields of a forward or forward_backward request beside its datums.

    Attributes:
        model_id: the model.
        seq_id: sequence number of the request.
        loss_fn: name of the service's loss.
        config: settings of the loss.
        forward_only: compute no gradient.
    """

    model_id: str
    seq_id: int
    loss_fn: str
    config: LossConfig
    forward_only: bool


def encode_request(batch: EncodedBatch, request: PassHeader) -> tuple[bytes, bytearray]:
    """Returns a ForwardBackwardRequest in two parts, the second of which is the batch's own memory."""
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
    """Returns the same request as a JSON object, for `/forward` or `/forward_backward`."""
    body = wire.ForwardBackwardRequest.FromString(bytes(batch.body))
    data = [
        {
            "model_input": datum.model_input.model_dump(exclude_none=True),
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


class ProtobufEncoding:
    """Sends `ForwardBackwardRequest` messages to one endpoint.

    Args:
        compress: compress with zstd if `zstandard` is installed (the extra `zstd`); every service accepts plain bodies.

    Attributes:
        name: name of the encoding.
        holds_any_number: whether it can represent NaN and infinity.
        is_slow: whether large requests should be encoded outside of the event loop's thread.
    """

    name: EncodingName = "protobuf"
    holds_any_number = True

    def __init__(self, *, compress: bool = False) -> None:
        self._zstandard: Any = _zstandard() if compress else None
        self.is_slow = self._zstandard is not None

    def encode(self, batch: EncodedBatch, header: PassHeader, headers: Mapping[str, str] = NO_HEADERS) -> Request:
        """Returns the request of one pass, with further HTTP headers."""
        parts = encode_request(batch, header)
        if self._zstandard is None:
            return request("POST", _BACKWARD_PATH, content=parts, content_type=PROTOBUF, headers=headers)
        body = self._zstandard.ZstdCompressor().compress(b"".join(parts))
        compressed = {**headers, "Content-Encoding": "zstd"}
        return request("POST", _BACKWARD_PATH, content=body, content_type=PROTOBUF, headers=compressed)


class JsonEncoding:
    """Sends JSON objects; forward passes have their own endpoint. The attributes are those of `ProtobufEncoding`."""

    name: EncodingName = "json"
    holds_any_number = False
    is_slow = True

    def encode(self, batch: EncodedBatch, header: PassHeader, headers: Mapping[str, str] = NO_HEADERS) -> Request:
        """Returns the request of one pass, with further HTTP headers."""
        path = _FORWARD_PATH if header.forward_only else _BACKWARD_PATH
        written = json.dumps(request_as_json(batch, header), allow_nan=False, separators=(",", ":")).encode()
        return request("POST", path, content=written, content_type=JSON, headers=headers)


Encoding = ProtobufEncoding | JsonEncoding


@dataclass(frozen=True)
class _Frame:
    """The constant bytes of one element of ForwardBackwardRequest.data, around its arrays.

    Attributes:
        before: the bytes before each array: the int32 tokens of every chunk, the int64 targets, the float32 weights.
        after: the bytes after the weights.
        zeros: weights for a datum without weights.
        weights_at: start of the weights.
        length: length of the element.
    """

    before: Sequence[bytes]
    after: bytes
    zeros: bytes
    weights_at: int
    length: int


@lru_cache(maxsize=256)
def _dense_frame(chunk_lengths: tuple[int, ...], shape: tuple[int, ...]) -> _Frame:
    """Returns the frame for chunks of these lengths and dense targets of this shape."""
    target_bytes = _TARGET_BYTES * math.prod(shape)
    before_targets, after_targets = _around_tensor("target_tokens", wire.DTYPE_INT64, target_bytes, shape)
    before = [*map(_before_tokens, chunk_lengths), before_targets, after_targets]
    return _frame(before, _TOKEN_BYTES * sum(chunk_lengths) + target_bytes, shape)


def _frame(before: Sequence[bytes], array_bytes: int, shape: tuple[int, ...], end: bytes = b"") -> _Frame:
    """Adds the weights, and the opening of the element, to the bytes before them.

    Args:
        before: the bytes before each array, and those between the last array and the weights.
        array_bytes: bytes of the arrays before the weights.
        shape: shape of the targets.
        end: the fields behind the loss inputs.
    """
    weight_bytes = _WEIGHT_BYTES * math.prod(shape)
    before_weights, after_weights = _around_tensor("weights", wire.DTYPE_FLOAT32, weight_bytes, shape)
    after = after_weights + end
    pieces = [*before[:-1], before[-1] + before_weights]
    message = sum(map(len, pieces)) + array_bytes + weight_bytes + len(after)
    opening = _data_opening(message)
    length = len(opening) + message
    return _Frame(
        before=[opening + pieces[0], *pieces[1:]],
        after=after,
        zeros=bytes(weight_bytes),
        weights_at=length - len(after) - weight_bytes,
        length=length,
    )


def _data_opening(length: int) -> bytes:
    """Returns tag and length of one element of `data`; the length is a base-128 varint (protobuf encoding guide)."""
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
    """Returns the bytes before and after the numbers of a loss input.

    Fields are serialized in the order of their numbers, so that only dtype and shape follow the numbers.
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


def _head_of(datum: Datum, inputs: Mapping[str, wire.Tensor]) -> bytes:
    chunks = list(map(_chunk, datum.model_input.chunks))
    return wire.Datum(model_input=chunks, loss_fn_inputs=inputs).SerializeToString()


def _chunk(chunk: Chunk) -> wire.Chunk:
    match chunk:
        case EncodedTextChunk():
            return wire.Chunk(encoded_text=wire.EncodedTextChunk(tokens=chunk.tokens.tobytes()))
        case ImageChunk():
            image = wire.ImageChunk(data=chunk.data, format=chunk.format)
            if chunk.expected_tokens is not None:
                image.expected_tokens = chunk.expected_tokens
            return wire.Chunk(image=image)
        case DmelChunk():
            return wire.Chunk(dmel=wire.DmelChunk(dmel=chunk.dmel))
        case ImageAssetPointerChunk():
            return wire.Chunk()  # only in JSON, which is written from the chunk itself


def _spans_of(datum: Datum) -> bytes:
    """Returns the fields behind the loss inputs: where the tokens come from."""
    if datum.model_input_spans is None or datum.loss_fn_input_spans is None:
        return b""
    return wire.Datum(
        model_input_spans=[_span(span) for span in datum.model_input_spans],
        loss_fn_input_spans=[_span(span) for span in datum.loss_fn_input_spans],
    ).SerializeToString()


def _span(span: Span) -> wire.ProvenanceSpan:
    fields = span.model_dump()
    if isinstance(span, SampledProvenanceSpan):
        return wire.ProvenanceSpan(sampled_tokens=wire.SampledProvenanceSpan(**fields))
    return wire.ProvenanceSpan(prompt_tokens=wire.PromptProvenanceSpan(**fields))


def _tensor(tensor: TensorData) -> wire.Tensor:
    dtype = wire.DTYPE_INT64 if tensor.dtype == "int64" else wire.DTYPE_FLOAT32
    crow, col = tensor.sparse_crow_indices, tensor.sparse_col_indices
    if crow is None or col is None:
        return wire.Tensor(dense=tensor.data.tobytes(), dtype=dtype, shape=tensor.shape)
    sparse = wire.SparseCsr(values=tensor.data.tobytes(), crow_indices=crow.tobytes(), col_indices=col.tobytes())
    return wire.Tensor(sparse_csr=sparse, dtype=dtype, shape=tensor.shape)


def _float_values(tensor: TensorData) -> Array:
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
