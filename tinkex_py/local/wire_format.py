"""Converts between the engine's arrays and the protocol's protobuf and JSON."""

import base64
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from tinkex_py.errors import InvalidData, UnsupportedFeature
from tinkex_py.local.data import (
    UNUSED_LOGPROB,
    Array,
    EncodedDatum,
    EncodedImage,
    EncodedInput,
    Floats,
    Ints,
    PassResult,
    SampledTokens,
    SampleResult,
    TokenTable,
)
from tinkex_py.transport import wire
from tinkex_py.types.chunks import CHUNK_FIELDS

_PROTOBUF_DTYPES: Mapping[int, str] = {
    wire.DTYPE_FLOAT32: "<f4",
    wire.DTYPE_INT64: "<i8",
    wire.DTYPE_INT32: "<i4",
}
_JSON_DTYPES: Mapping[str, str] = {"float32": "<f4", "int64": "<i8"}


ReadImage = Callable[[bytes], Ints]
"""Returns the tokens that stand for an image."""


class DenseRoom:
    """Bounds the arrays of one request before they are built; sparse tensors are far larger than their bytes.

    Args:
        columns: maximum number of columns of a sparse tensor: the size of the vocabulary.
        bytes: maximum size of the dense forms of all sparse tensors.
        read_image: None: the model reads text only.
    """

    def __init__(self, columns: int, bytes: int, read_image: ReadImage | None = None) -> None:  # noqa: A002  (the unit)
        self.read_image = read_image
        self._columns = columns
        self._bytes = bytes
        self._left = bytes

    def take(self, where: str, shape: Sequence[int], itemsize: int) -> None:
        """Counts a sparse tensor of two dimensions; InvalidData: it is too wide, or there is no room."""
        if shape[1] > self._columns:
            raise InvalidData(
                f"{where}: a sparse tensor of shape {list(shape)} has more columns than the vocabulary has tokens, "
                f"{self._columns}"
            )
        self._left -= math.prod(shape) * itemsize
        if self._left < 0:
            raise InvalidData(
                f"{where}: the sparse tensors of this request have more than {self._bytes} bytes in dense form: send "
                "fewer datums in one request"
            )


# Requests. Functions raise InvalidData for malformed input, and UnsupportedFeature for chunks other than text.


def datums_from_protobuf(messages: Iterable[wire.Datum], room: DenseRoom) -> list[EncodedDatum]:
    """Decodes the datums of a ForwardBackwardRequest."""
    return [
        _datum(
            _protobuf_input(f"data[{index}]", message, room.read_image),
            {
                name: _protobuf_tensor(f"data[{index}]: {name}", tensor, room)
                for name, tensor in message.loss_fn_inputs.items()
            },
        )
        for index, message in enumerate(messages)
    ]


def datums_from_json(values: Sequence[Mapping[str, Any]], room: DenseRoom) -> list[EncodedDatum]:
    """Decodes the datums of a pass in JSON."""
    return [
        _datum(
            input_from_json(f"data[{index}]: model_input", value.get("model_input"), room.read_image),
            {
                name: tensor_from_json(
                    f"data[{index}]: {name}", tensor, room, "int64" if name == "target_tokens" else "float32"
                )
                for name, tensor in _object(f"data[{index}]: loss_fn_inputs", value.get("loss_fn_inputs") or {}).items()
                if tensor is not None
            },
        )
        for index, value in enumerate(values)
    ]


def _datum(model_input: EncodedInput, inputs: Mapping[str, Array]) -> EncodedDatum:
    return EncodedDatum(model_input.tokens, inputs, model_input.images)


def input_from_json(where: str, value: Any, read_image: ReadImage | None = None) -> EncodedInput:
    """Decodes a model input; `where` names it in errors."""
    chunks: object = _object(where, value).get("chunks") or []
    if not isinstance(chunks, list):
        raise InvalidData(f"{where}: chunks must be a list")
    return _joined(where, [_json_chunk(where, chunk) for chunk in cast("list[Any]", chunks)], read_image)


def ids_from_json(where: str, value: Any, room: DenseRoom) -> Ints:
    """Decodes a tensor of token ids; cells that a sparse tensor does not list become -1."""
    ids = tensor_from_json(where, value, room)
    if ids.dtype != np.int64:
        raise InvalidData(f"{where}: dtype must be int64")
    if value.get("sparse_crow_indices") is None:
        return cast("Ints", ids)
    listed = tensor_from_json(where, {**value, "data": [1] * len(value.get("data") or [])}, room)
    return np.where(listed == 1, ids, -1).astype(np.int64)


@dataclass(frozen=True)
class _Image:
    data: bytes
    expected_tokens: int | None


def _joined(where: str, parts: Iterable[Ints | _Image | str], read_image: ReadImage | None) -> EncodedInput:
    """Joins tokens and images; a text is the name of another kind of chunk."""
    tokens: list[Ints] = [np.zeros(0, dtype=np.int64)]
    images: list[EncodedImage] = []
    length = 0
    for part in parts:
        if isinstance(part, str) or (isinstance(part, _Image) and read_image is None):
            raise _not_read(where, part if isinstance(part, str) else "image", reads_images=read_image is not None)
        if isinstance(part, _Image):
            own = _image_tokens(where, part, cast("ReadImage", read_image))
            images.append(EncodedImage(part.data, length, len(own)))
        else:
            own = part
        tokens.append(own)
        length += len(own)
    return EncodedInput(np.concatenate(tokens).astype(np.int64), tuple(images))


def _image_tokens(where: str, image: _Image, read_image: ReadImage) -> Ints:
    try:
        tokens = read_image(image.data)
    except InvalidData as error:
        raise InvalidData(f"{where}: {error}") from error
    if image.expected_tokens is not None and image.expected_tokens != len(tokens):
        raise InvalidData(
            f"{where}: expected_tokens={image.expected_tokens}, but the model makes {len(tokens)} tokens of the image"
        )
    return tokens


def _json_chunk(where: str, chunk: Any) -> "Ints | _Image | str":
    if not isinstance(chunk, dict):
        raise InvalidData(f"{where}: a chunk is not an object")
    given = {key: value for key, value in cast("dict[str, Any]", chunk).items() if value is not None}
    kind = given.get("type") or next((kind for key, kind in CHUNK_FIELDS.items() if key in given), None)
    if kind is None:
        raise InvalidData(f"{where}: a chunk has none of the fields {', '.join(CHUNK_FIELDS)}")
    if kind == "image":
        expected: object = given.get("expected_tokens")
        if expected is not None and (not isinstance(expected, int) or isinstance(expected, bool)):
            raise InvalidData(f"{where}: expected_tokens of an image must be a whole number")
        return _Image(_base64(where, given.get("data")), expected)
    return _array(where, given.get("tokens", []), "<i8") if kind == "encoded_text" else str(kind)


def _base64(where: str, text: object) -> bytes:
    try:
        return base64.b64decode(text if isinstance(text, str) else "*", validate=True)
    except ValueError:
        raise InvalidData(f"{where}: data of an image must be text in base64") from None


def _not_read(where: str, kind: str, *, reads_images: bool) -> UnsupportedFeature:
    read = "text and images" if reads_images else "text"
    return UnsupportedFeature(f"{where}: this model reads {read} only, not {kind!r} chunks")


def _protobuf_input(where: str, message: wire.Datum, read_image: ReadImage | None) -> EncodedInput:
    return _joined(where, [_protobuf_chunk(where, chunk) for chunk in message.model_input], read_image)


def _protobuf_chunk(where: str, chunk: wire.Chunk) -> "Ints | _Image | str":
    match chunk.WhichOneof("chunk"):
        case "encoded_text":
            return _buffer(where, chunk.encoded_text.tokens, "<i4")
        case "image":
            image = chunk.image
            return _Image(image.data, image.expected_tokens if image.HasField("expected_tokens") else None)
        case kind:
            return str(kind)


def tensor_from_json(where: str, value: Any, room: DenseRoom, default_dtype: str = "float32") -> Array:
    """Decodes a tensor, dense or CSR, to an array of its dense shape."""
    fields = _object(where, value)
    dtype = default_dtype if fields.get("dtype") is None else fields["dtype"]
    if not isinstance(dtype, str) or dtype not in _JSON_DTYPES:
        raise InvalidData(f"{where}: dtype {dtype!r} is not one of {sorted(_JSON_DTYPES)}")
    data = _array(where, fields.get("data") or [], _JSON_DTYPES[dtype])
    shape = _shape(where, fields.get("shape"))
    if fields.get("sparse_crow_indices") is not None:
        rows = _array(where, fields["sparse_crow_indices"], "<i8")
        columns = _array(where, fields.get("sparse_col_indices") or [], "<i8")
        return _dense(where, data, rows, columns, shape or [], room)
    return _shaped(where, data, [len(data)] if shape is None else shape)


def _protobuf_tensor(where: str, tensor: wire.Tensor, room: DenseRoom) -> Array:
    dtype = _PROTOBUF_DTYPES.get(tensor.dtype)
    if dtype is None:
        raise InvalidData(f"{where}: dtype {tensor.dtype} is not one of float32, int64, int32")
    if tensor.HasField("sparse_csr"):
        sparse = tensor.sparse_csr
        rows = _buffer(where, sparse.crow_indices, "<i8")
        columns = _buffer(where, sparse.col_indices, "<i8")
        return _dense(where, _buffer(where, sparse.values, dtype), rows, columns, list(tensor.shape), room)
    data = _buffer(where, tensor.dense, dtype)
    return _shaped(where, data, list(tensor.shape) or [len(data)])


def _buffer(where: str, data: bytes, dtype: str) -> Any:
    try:
        return np.frombuffer(data, dtype=dtype)
    except ValueError as error:
        raise InvalidData(f"{where}: {len(data)} bytes are not a whole number of {dtype} values") from error


def _array(where: str, values: Any, dtype: str) -> Any:
    if not isinstance(values, list):
        raise InvalidData(f"{where}: data must be a flat list of numbers")
    # Before numpy: it gives every item the size of the largest, which may be a text.
    items = cast("list[Any]", values)
    kinds: set[type] = set(map(type, items))
    if kinds & {list, dict}:
        raise InvalidData(f"{where}: data must be a flat list of numbers")
    if not kinds <= ({int} if dtype == "<i8" else {int, float}):
        raise InvalidData(f"{where} contains values that are not {'whole ' if dtype == '<i8' else ''}numbers")
    array: NDArray[Any] = np.asarray(items)
    if array.size and array.dtype.kind not in ("iu" if dtype == "<i8" else "iuf"):
        raise InvalidData(
            f"{where} contains a number that does not fit into {'int64' if dtype == '<i8' else 'float32'}"
        )
    with np.errstate(over="ignore"):
        cast_array = array.astype(dtype)
    if array.dtype.kind == "f" and (np.isinf(cast_array) & np.isfinite(array)).any():
        raise InvalidData(f"{where} contains a number that does not fit into float32")
    return cast_array


def _shape(where: str, value: Any) -> list[int] | None:
    if value is None:
        return None
    sizes = cast("list[object]", value) if isinstance(value, list) else [None]
    if not all(isinstance(size, int) and not isinstance(size, bool) for size in sizes):
        raise InvalidData(f"{where}: shape must be a list of whole numbers")
    return cast("list[int]", sizes)


def _object(where: str, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InvalidData(f"{where} is not a JSON object")
    return cast("dict[str, Any]", value)


def _shaped(where: str, data: Any, shape: Sequence[int]) -> Array:
    if any(size < 0 for size in shape) or math.prod(shape) != len(data):
        raise InvalidData(f"{where}: {len(data)} values do not fill the shape {list(shape)}")
    return data.reshape(shape)


def _dense(where: str, values: Any, rows: Any, columns: Any, shape: Sequence[int], room: DenseRoom) -> Array:
    if len(shape) != 2 or min(shape) < 0:
        raise InvalidData(f"{where}: a sparse tensor needs a shape of two dimensions, not {list(shape)}")
    counts = np.diff(rows)
    fits = (
        len(rows) == shape[0] + 1
        and len(values) == len(columns)
        and rows[0] == 0
        and rows[-1] == len(values)
        and bool((counts >= 0).all())
        and (len(columns) == 0 or (columns.min() >= 0 and columns.max() < shape[1]))
    )
    if not fits:
        raise InvalidData(f"{where}: the sparse indices do not fit the shape {list(shape)}")
    room.take(where, shape, values.itemsize)
    dense: Any = np.zeros(shape, dtype=values.dtype)
    dense[np.repeat(np.arange(shape[0]), counts), columns] = values
    return dense


# Results of passes


def pass_protobuf(result: PassResult) -> bytes:
    """Encodes a result as ForwardBackwardOutput; consecutive datums with the same trailing shape share a tensor."""
    records = [_record(list(group)) for _, group in groupby(_outputs(result), key=_trailing_shape)]
    return wire.ForwardBackwardOutput(
        loss_fn_output_type="ArrayRecord", loss_fn_outputs=records, metrics=dict(result.metrics)
    ).SerializeToString()


def pass_json(result: PassResult) -> dict[str, Any]:
    """Encodes a result in JSON, without metrics that are NaN or infinite, which JSON cannot represent."""
    outputs = [{name: _tensor_json(array, "float32") for name, array in output.items()} for output in _outputs(result)]
    metrics = {name: value for name, value in result.metrics.items() if math.isfinite(value)}
    return {"loss_fn_output_type": "ArrayRecord", "loss_fn_outputs": outputs, "metrics": metrics}


def _outputs(result: PassResult) -> list[dict[str, Floats]]:
    """The outputs of each datum by name, all of one shape."""
    if result.elementwise_loss is None:
        return [{"logprobs": logprobs} for logprobs in result.logprobs]
    return [
        {"logprobs": logprobs, "elementwise_loss": losses}
        for logprobs, losses in zip(result.logprobs, result.elementwise_loss, strict=True)
    ]


def _trailing_shape(output: Mapping[str, Floats]) -> tuple[int, ...]:
    return output["logprobs"].shape[1:]


def _record(outputs: Sequence[Mapping[str, Floats]]) -> wire.ArrayRecord:
    fields = {name: _batched([output[name] for output in outputs]) for name in outputs[0]}
    return wire.ArrayRecord(type_tag="ArrayRecord", fields=fields, num_datums=len(outputs))


def _batched(arrays: Sequence[Floats]) -> wire.BatchedTensor:
    offsets = np.zeros(len(arrays) + 1, dtype="<i8")
    offsets[1:] = np.cumsum([array.size * 4 for array in arrays])
    return wire.BatchedTensor(
        data=_bytes(np.concatenate([array.reshape(-1) for array in arrays])),
        offsets=offsets.tobytes(),
        dtype=wire.DTYPE_FLOAT32,
        trailing_shape=arrays[0].shape[1:],
    )


# Samples


def sample_protobuf(result: SampleResult) -> bytes:
    """Encodes a result as SampleResponse."""
    prompt = result.prompt
    response = wire.SampleResponse(
        sequences=[
            wire.SampledSequence(
                stop_reason=wire.STOP_REASON_STOP if sequence.stopped else wire.STOP_REASON_LENGTH,
                tokens=_bytes(sequence.tokens),
                logprobs=_bytes(sequence.logprobs),
                topk_sampled_logprobs=_topk_message(sequence.topk),
            )
            for sequence in result.sequences
        ],
        prompt_cache_hit_tokens=0,
        topk_prompt_logprobs=_topk_message(prompt.topk),
    )
    if prompt.logprobs is not None:
        response.prompt_logprobs = _bytes(prompt.logprobs)
    if prompt.targets is not None:
        response.target_prompt_logprobs.CopyFrom(_tensor_message(prompt.targets))
    if prompt.alternatives is not None:
        response.prompt_alt_tokens.tokens.CopyFrom(_tensor_message(prompt.alternatives.ids))
        response.prompt_alt_tokens.logprobs.CopyFrom(_tensor_message(prompt.alternatives.logprobs))
    return response.SerializeToString()


def sample_json(result: SampleResult) -> dict[str, Any]:
    """Encodes a result in JSON."""
    prompt = result.prompt
    sequences = [_sequence_json(sequence) for sequence in result.sequences]
    body: dict[str, Any] = {"type": "sample", "sequences": sequences, "prompt_cache_hit_tokens": 0}
    if prompt.logprobs is not None:
        body["prompt_logprobs"] = _numbers(prompt.logprobs)
    if prompt.topk is not None:
        body["topk_prompt_logprobs"] = _topk_json(prompt.topk)
    if prompt.targets is not None:
        body["target_prompt_logprobs"] = _tensor_json(prompt.targets, "float32")
    if prompt.alternatives is not None:
        body["prompt_alt_tokens"] = {
            "tokens": _tensor_json(prompt.alternatives.ids, "int64"),
            "logprobs": _tensor_json(prompt.alternatives.logprobs, "float32"),
        }
    return body


def _sequence_json(sequence: SampledTokens) -> dict[str, Any]:
    body: dict[str, Any] = {
        "tokens": sequence.tokens.tolist(),
        "logprobs": _numbers(sequence.logprobs),
        "stop_reason": "stop" if sequence.stopped else "length",
    }
    if sequence.topk is not None:
        body["topk_sampled_logprobs"] = _topk_json(sequence.topk)
    return body


def _topk_json(table: TokenTable) -> list[list[list[Any]] | None]:
    """Rows of [id, logprob]; None for an unused row."""
    return [
        None if values[:1] == [UNUSED_LOGPROB] else [list(pair) for pair in zip(ids, values, strict=True)]
        for ids, values in zip(table.ids.tolist(), map(_numbers, table.logprobs), strict=True)
    ]


def _topk_message(table: TokenTable | None) -> wire.TopkLogprobs | None:
    if table is None:
        return None
    length, k = table.ids.shape
    return wire.TopkLogprobs(token_ids=_bytes(table.ids), logprobs=_bytes(table.logprobs), k=k, length=length)


def _tensor_message(array: NDArray[np.int32] | Floats) -> wire.Tensor:
    dtype = wire.DTYPE_INT32 if array.dtype.kind == "i" else wire.DTYPE_FLOAT32
    return wire.Tensor(dense=_bytes(array), dtype=dtype, shape=array.shape)


def _bytes(array: NDArray[np.int32] | Floats) -> bytes:
    return array.astype("<i4" if array.dtype.kind == "i" else "<f4").tobytes()


def _tensor_json(array: NDArray[Any], dtype: str) -> dict[str, Any]:
    data = array.reshape(-1).tolist() if dtype == "int64" else _numbers(array)
    return {"data": data, "dtype": dtype, "shape": list(array.shape)}


def _numbers(array: Floats) -> list[float | None]:
    # JSON has neither NaN nor infinity.
    return [value if math.isfinite(value) else None for value in array.reshape(-1).tolist()]
