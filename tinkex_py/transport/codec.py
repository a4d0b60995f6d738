"""Requests and results of forward and backward as bytes, with the packed buffers untouched.

The protobuf form of a datum is laid out once. A custom step sends the same datums twice, first for the forward
pass and then with other weights, so `EncodedBatch.write_weights` only overwrites the weights' bytes. Where the gradient
travels as advantages, `EncodedBatch.with_advantages` lays other fields beside the targets.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from google.protobuf.message import DecodeError

from tinkex_py.errors import InvalidResponse
from tinkex_py.transport import wire
from tinkex_py.transport.protobuf_layout import CustomFrame, custom_frame, custom_frame_around, data_opening
from tinkex_py.types import Datum, ForwardBackwardOutput, PackedTensor, TensorData
from tinkex_py.types.tensors import Array

PROTOBUF = "application/x-protobuf"
LossConfig = Mapping[str, float | str]
_WEIGHT_BYTES = 4

_OUTPUT_FIELDS = ("loss_fn_output_type", "loss_fn_outputs", "metrics")
# No loss gives tensors of more dimensions than this.
_MOST_DIMENSIONS = 8
# More than any service answers at once; a few bytes can claim any number.
_MOST_DATUMS = 2**24

DTYPES = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
    wire.DTYPE_BFLOAT16: np.dtype("<u2"),
}


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
        """It is already."""
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
    frames: dict[object, CustomFrame] = {}
    length = 0
    for datum in data:
        targets = datum.loss_fn_inputs["target_tokens"]
        if targets.is_sparse:
            frame = custom_frame_around(_head_of(datum, targets), targets.shape)
        else:
            tokens = [chunk.tokens for chunk in datum.model_input.chunks]
            lengths = [array.size for array in tokens]
            key = (*lengths, targets.shape)
            frame = frames.get(key) or frames.setdefault(key, custom_frame(lengths, targets.shape))
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


@dataclass(frozen=True)
class Result:
    """A finished future: protobuf bytes, or a JSON object."""

    body: bytes
    fields: Mapping[str, Any] | None


def read_forward_backward(result: Result) -> ForwardBackwardOutput:
    """The result of forward or forward_backward, whichever way it is written.

    Raises:
        InvalidResponse: it is neither.
    """
    if result.fields is None:
        return decode_forward_backward(result.body)
    told = {name: result.fields[name] for name in _OUTPUT_FIELDS if name in result.fields}
    return ForwardBackwardOutput.read(told)


def decode_forward_backward(body: bytes) -> ForwardBackwardOutput:
    """A protobuf ForwardBackwardOutput, its numbers still packed.

    Raises:
        InvalidResponse: the bytes are no such message, or its parts contradict each other.
    """
    try:
        message = wire.ForwardBackwardOutput.FromString(body)
    except DecodeError as error:
        raise InvalidResponse(f"the result is no ForwardBackwardOutput ({len(body)} bytes)") from error
    records = list(message.loss_fn_outputs)
    counts = [record.num_datums for record in records]
    if any(count < 0 for count in counts) or sum(counts) > _MOST_DATUMS:
        raise InvalidResponse(f"the result claims to hold {counts} datums")
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    return ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type.rsplit(":", 1)[-1] or "ArrayRecord",
        num_datums=sum(counts),
        packed={
            name: PackedTensor.join([_packed(record.fields.get(name), record.num_datums, name) for record in records])
            for name in names
        },
        metrics=dict(message.metrics),
    )


def numbers_of(buffer: bytes, dtype: "str | np.dtype[Any]", name: str) -> Array:
    """A buffer of an answer as numbers.

    Raises:
        InvalidResponse: it is cut off within a number.
    """
    if len(buffer) % np.dtype(dtype).itemsize:
        raise InvalidResponse(f"{name} have {len(buffer)} bytes, which is no whole number of {dtype}")
    return np.frombuffer(buffer, dtype)


def _packed(field: "wire.BatchedTensor | None", num_datums: int, name: str) -> PackedTensor:
    if field is None:
        return PackedTensor.empty(num_datums)
    dtype = DTYPES.get(field.dtype)
    if dtype is None:
        raise InvalidResponse(f"output field {name!r} has the unknown dtype {field.dtype}")
    trailing = tuple(field.trailing_shape)
    if len(trailing) > _MOST_DIMENSIONS or any(size < 1 for size in trailing) or math.prod(trailing) > 2**31:
        raise InvalidResponse(f"output field {name!r} has the trailing shape {trailing}")
    size = dtype.itemsize * math.prod(trailing)
    data = field.data  # each look copies it
    offsets = numbers_of(field.offsets, "<i8", f"the offsets of output field {name!r}")
    if (
        offsets.size != num_datums + 1
        or offsets[0] != 0
        or offsets[-1] != len(data)
        or (np.diff(offsets) < 0).any()
        or (offsets % size).any()
    ):
        raise InvalidResponse(f"the offsets of output field {name!r} do not fit its {len(data)} bytes")
    values = np.frombuffer(data, dtype)
    if field.dtype == wire.DTYPE_BFLOAT16:
        values = (values.astype(np.uint32) << 16).view(np.float32)
    elif field.dtype == wire.DTYPE_INT32:
        values = values.astype(np.int64)
    return PackedTensor(values, offsets // dtype.itemsize, [trailing] * num_datums)


def _append(body: bytearray, message: bytes) -> None:
    body += data_opening(len(message))
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
    element = DTYPES[tensor.dtype]
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
