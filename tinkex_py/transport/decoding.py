"""Parses responses: their fields, and the results of passes and samples, whose buffers stay packed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from google.protobuf.descriptor import Descriptor
from google.protobuf.message import DecodeError, Message

from tinkex_py.errors import InvalidData, InvalidResponse
from tinkex_py.transport import wire
from tinkex_py.transport.messages import Response
from tinkex_py.types import (
    ForwardBackwardOutput,
    PackedTensor,
    PromptAltTokens,
    SampledSequence,
    SampleResponse,
    TensorData,
)
from tinkex_py.types.samples import TopLogprobs
from tinkex_py.types.tensors import Array
from tinkex_py.unicode import REPLACED

_OUTPUT_FIELDS = ("loss_fn_output_type", "loss_fn_outputs", "metrics")
_MOST_DIMENSIONS = 8
# A few bytes can declare any number of datums.
_MOST_DATUMS = 2**24
# Parsed, an empty part of 2 bytes needs a hundred. Results have some parts for each datum of a chunk, or each sequence.
_MOST_PARTS = 2**16
_FEW_BYTES = 2**18
# Wire types of protobuf.
_VARINT, _DELIMITED = 0, 2
_FIXED_SIZES = {1: 8, 5: 4}
_LONGEST_VARINT = 10
# Marks an unused cell of a top-k row.
_UNUSED_LOGPROB = -99999.0

DTYPES = {
    wire.DTYPE_FLOAT32: np.dtype("<f4"),
    wire.DTYPE_INT64: np.dtype("<i8"),
    wire.DTYPE_INT32: np.dtype("<i4"),
    wire.DTYPE_BFLOAT16: np.dtype("<u2"),
}


@dataclass(frozen=True)
class Result:
    """A finished future: protobuf bytes, or a JSON object."""

    body: bytes
    fields: Mapping[str, Any] | None


def read_forward_backward(result: Result) -> ForwardBackwardOutput:
    """Parses the result of forward or forward_backward in either encoding.

    Raises:
        InvalidResponse: it is invalid.
    """
    if result.fields is None:
        return decode_forward_backward(result.body)
    return ForwardBackwardOutput.read({name: result.fields[name] for name in _OUTPUT_FIELDS if name in result.fields})


def decode_forward_backward(body: bytes) -> ForwardBackwardOutput:
    """Parses a protobuf ForwardBackwardOutput; its numbers stay packed.

    Raises:
        InvalidResponse: the message is invalid, or its parts contradict each other.
    """
    if len(body) > _FEW_BYTES:
        _check_parts(body, wire.ForwardBackwardOutput)
    try:
        message = wire.ForwardBackwardOutput.FromString(body)
    except DecodeError as error:
        raise InvalidResponse(f"the result is not a ForwardBackwardOutput ({len(body)} bytes)") from error
    records = list(message.loss_fn_outputs)
    counts = [record.num_datums for record in records]
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    if any(count < 0 for count in counts) or sum(counts) * max(1, len(names)) > _MOST_DATUMS:
        raise InvalidResponse(f"the result declares {sum(counts)} datums of {len(names)} fields")
    return ForwardBackwardOutput(
        loss_fn_output_type=message.loss_fn_output_type.rsplit(":", 1)[-1] or "ArrayRecord",
        num_datums=sum(counts),
        packed={
            name: PackedTensor.join([_packed(record.fields.get(name), record.num_datums, name) for record in records])
            for name in names
        },
        metrics=dict(message.metrics),
    )


def _check_parts(body: bytes, kind: type[Message]) -> None:
    """Raises InvalidResponse for a message of more parts than a result has, before any of them is allocated."""
    parts = 0
    messages = [(0, len(body), cast("Descriptor", kind.DESCRIPTOR))]
    while messages:
        position, end, descriptor = messages.pop()
        while position < end and parts <= _MOST_PARTS:
            parts += 1
            tag, position = _varint(body, position)
            if tag & 7 in _FIXED_SIZES:
                position += _FIXED_SIZES[tag & 7]
            elif tag & 7 == _VARINT:
                _, position = _varint(body, position)
            elif tag & 7 == _DELIMITED:
                size, position = _varint(body, position)
                field = descriptor.fields_by_number.get(tag >> 3)
                if field is not None and field.message_type is not None:
                    messages.append((position, min(position + size, end), field.message_type))
                elif field is not None and field.type not in (field.TYPE_BYTES, field.TYPE_STRING):
                    parts += size  # packed numbers
                position += size
    if parts > _MOST_PARTS:
        raise InvalidResponse(f"the result is a message of more than {_MOST_PARTS} parts ({len(body)} bytes)")


def _varint(body: bytes, position: int) -> tuple[int, int]:
    """Returns the number at a position, and the position behind it."""
    value = 0
    for index in range(position, min(position + _LONGEST_VARINT, len(body))):
        byte = body[index]
        value |= (byte & 0x7F) << 7 * (index - position)
        if byte < 0x80:
            return value, index + 1
    raise InvalidResponse(f"the result is not a protobuf message ({len(body)} bytes)")


def numbers_of(buffer: bytes, dtype: "str | np.dtype[Any]", name: str) -> Array:
    """Returns a buffer of a response as an array; `name` is for the message.

    Raises:
        InvalidResponse: the buffer ends within a number.
    """
    if len(buffer) % np.dtype(dtype).itemsize:
        raise InvalidResponse(f"{name} have {len(buffer)} bytes, which is not a whole number of {dtype}")
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
    data = field.data  # every access copies it
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


def read_sample(result: Result) -> SampleResponse:
    """Parses the result of a sample in either encoding.

    Raises:
        InvalidResponse: it is invalid.
    """
    return decode_sample(result.body) if result.fields is None else SampleResponse.read(result.fields)


def decode_sample(body: bytes) -> SampleResponse:
    """Parses a protobuf SampleResponse.

    Raises:
        InvalidResponse: the message is invalid, or its parts contradict each other.
    """
    if len(body) > _FEW_BYTES:
        _check_parts(body, wire.SampleResponse)
    try:
        message = wire.SampleResponse.FromString(body)
    except DecodeError as error:
        raise InvalidResponse(f"the result is not a SampleResponse ({len(body)} bytes)") from error
    prompt = numbers_of(message.prompt_logprobs, "<f4", "prompt_logprobs") if message.prompt_logprobs else None
    topk = message.topk_prompt_logprobs if message.HasField("topk_prompt_logprobs") else None
    targets = message.target_prompt_logprobs if message.HasField("target_prompt_logprobs") else None
    return SampleResponse(
        sequences=[_sequence(sequence) for sequence in message.sequences],
        prompt_logprobs=None if prompt is None else [None if np.isnan(value) else float(value) for value in prompt],
        topk_prompt_logprobs=None if topk is None else _top(topk, "topk_prompt_logprobs"),
        target_prompt_logprobs=None if targets is None else _sampled_tensor(targets, "target_prompt_logprobs"),
        prompt_alt_tokens=_alternatives(message.prompt_alt_tokens) if message.HasField("prompt_alt_tokens") else None,
        prompt_cache_hit_tokens=message.prompt_cache_hit_tokens,
    )


def _sequence(sequence: wire.SampledSequence) -> SampledSequence:
    tokens = numbers_of(sequence.tokens, "<i4", "the tokens of a sequence")
    logprobs = numbers_of(sequence.logprobs, "<f4", "the logprobs of a sequence")
    if logprobs.size not in (0, tokens.size):
        raise InvalidResponse(f"a sequence of {tokens.size} tokens has {logprobs.size} logprobs")
    topk = sequence.topk_sampled_logprobs if sequence.HasField("topk_sampled_logprobs") else None
    return SampledSequence(
        tokens=tokens.tolist(),
        logprobs=logprobs.tolist() if logprobs.size else None,
        stop_reason="length" if sequence.stop_reason == wire.STOP_REASON_LENGTH else "stop",
        topk_logprobs=None if topk is None else _top(topk, "topk_sampled_logprobs"),
    )


def _top(message: wire.TopkLogprobs, name: str) -> TopLogprobs | None:
    """Returns rows of (token, logprob) without their unused cells; a row without any other cell is None."""
    if not message.length or not message.k:
        return None
    ids = numbers_of(message.token_ids, "<i4", f"the ids of {name}")
    logprobs = numbers_of(message.logprobs, "<f4", f"the logprobs of {name}")
    if ids.size != message.length * message.k or logprobs.size != ids.size:
        raise InvalidResponse(
            f"{name} of {message.length} x {message.k} has {ids.size} ids and {logprobs.size} logprobs"
        )
    rows = zip(ids.reshape(-1, message.k).tolist(), logprobs.reshape(-1, message.k).tolist(), strict=True)
    return [_row(list(zip(*row, strict=True))) for row in rows]


def _row(cells: list[tuple[int, float]]) -> list[tuple[int, float]] | None:
    used = next((index for index, cell in enumerate(cells) if cell == (0, _UNUSED_LOGPROB)), len(cells))
    return cells[:used] or None


def _alternatives(message: wire.PromptAltTokens) -> PromptAltTokens:
    return PromptAltTokens(
        tokens=_sampled_tensor(message.tokens, "tokens of prompt_alt_tokens"),
        logprobs=_sampled_tensor(message.logprobs, "logprobs of prompt_alt_tokens"),
    )


def _sampled_tensor(message: wire.Tensor, name: str) -> TensorData:
    dtype = DTYPES.get(message.dtype)
    shape = tuple(message.shape)
    if dtype is None or message.dtype == wire.DTYPE_BFLOAT16:  # not allowed in plain tensors (protocol: 4.4)
        raise InvalidResponse(f"{name} has the dtype {message.dtype}, which is not a dtype of tensors")
    if any(size < 0 for size in shape) or math.prod(shape) > 2**40:
        raise InvalidResponse(f"{name} has the shape {shape}")
    parts: dict[str, Any] = {"dtype": "float32" if dtype.kind == "f" else "int64", "shape": shape}
    if message.WhichOneof("encoding") == "sparse_csr":
        sparse = message.sparse_csr
        parts["data"] = numbers_of(sparse.values, dtype, name)
        parts["sparse_crow_indices"] = numbers_of(sparse.crow_indices, "<i8", f"the rows of {name}")
        parts["sparse_col_indices"] = numbers_of(sparse.col_indices, "<i8", f"the columns of {name}")
    else:
        parts["data"] = numbers_of(message.dense, dtype, name)
    try:
        return TensorData(**parts)
    except InvalidData as error:
        raise InvalidResponse(f"{name}: {error}") from None


def fields_of(response: Response) -> dict[str, Any]:
    """Returns the fields of a successful response; an empty body has none.

    Raises:
        InvalidResponse: the body is not a JSON object.
    """
    fields: object = response.json() if response.body.strip() else {}
    if isinstance(fields, dict):
        return cast("dict[str, Any]", fields)
    del fields  # the error keeps this frame, and a service may quote the key
    raise InvalidResponse(f"{response.request} returned JSON that is not an object")


def text_of(fields: Mapping[str, Any], name: str, path: str) -> str:
    """Returns a required string field, such as an id, that later requests send back.

    Raises:
        InvalidResponse: it is missing, or cannot be sent.
    """
    value = fields.get(name)
    problem = f"no {name}"
    if isinstance(value, str) and value:
        if value.isprintable() and REPLACED not in value:
            return value
        problem = f"a {name} with characters that cannot be sent"
    del fields, value  # as in `fields_of`
    raise InvalidResponse(f"{path} returned {problem}")


def request_id_of(response: Response) -> str:
    """Returns the id of the future that a submission created.

    Raises:
        InvalidResponse: it is missing.
    """
    fields = fields_of(response)
    given = fields.get("request_id")
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    return text_of(fields, "request_id", response.request)
