"""Encoded requests and results equal those of the official SDK."""

import base64
import contextlib
import importlib
from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2
from hypothesis import given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from tinkex_py.errors import InvalidResponse
from tinkex_py.transport import wire
from tinkex_py.transport.decoding import Result, decode_forward_backward, decode_sample, read_forward_backward
from tinkex_py.transport.encoding import PassHeader, encode_batch, encode_custom_batch, encode_request, request_as_json
from tinkex_py.types import (
    Datum,
    DmelChunk,
    EncodedTextChunk,
    ImageChunk,
    ModelInput,
    PromptProvenanceSpan,
    SampledProvenanceSpan,
    TensorData,
)

tinker_types = importlib.import_module("tinker.types")
official_pb = importlib.import_module("tinker.proto.tinker_public_pb2")
request_conv = importlib.import_module("tinker.proto.request_conv")
response_conv = importlib.import_module("tinker.proto.response_conv")
FB_REQUEST = importlib.import_module("tinker.types.forward_backward_request").ForwardBackwardRequest
FB_INPUT = importlib.import_module("tinker.types.forward_backward_input").ForwardBackwardInput

floats = st.floats(width=32, allow_nan=False)
lengths = st.none() | st.integers(1, 2**20)
pictures = st.builds(
    ImageChunk, data=st.binary(min_size=1), format=st.sampled_from(["png", "jpeg"]), expected_tokens=lengths
)
sounds = st.builds(DmelChunk, dmel=st.binary(min_size=1))
SPAN_FIELDS = ("model_input_spans", "loss_fn_input_spans")
SPANS = (
    PromptProvenanceSpan(sequence_id="a", length=3),
    SampledProvenanceSpan(sequence_id="ü", offset=2**40, length=0),
)
finite = st.floats(-1e6, 1e6, width=32)


@st.composite
def tensors(draw: Any, shape: tuple[int, ...], dtype: str) -> TensorData:
    """A tensor of this shape, dense or, where it has two dimensions, CSR."""
    elements = floats if dtype == "float32" else st.integers(-(2**63), 2**63 - 1)
    dense = draw(arrays.arrays(np.dtype(dtype), shape, elements=elements))
    if len(shape) != 2 or draw(st.booleans()):
        return TensorData(data=dense, dtype=dtype)
    mask = draw(arrays.arrays(np.bool_, shape))
    rows, cols = np.nonzero(mask)
    crow = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=shape[0]))])
    return TensorData(data=dense[mask], dtype=dtype, shape=shape, sparse_crow_indices=crow, sparse_col_indices=cols)


@st.composite
def datums(draw: Any, *, custom: bool = False) -> Datum:
    length = draw(st.integers(1, 4))
    shape = (length,) if draw(st.booleans()) else (length, draw(st.integers(1, 3)))
    pieces = draw(st.lists(st.integers(0, 2**31 - 1), min_size=length, max_size=length))
    cut = draw(st.integers(0, length))
    chunks: list[Any] = [EncodedTextChunk(tokens=part) for part in (pieces[:cut], pieces[cut:]) if part]
    if draw(st.booleans()):
        chunks += draw(st.lists(st.one_of(pictures, sounds), max_size=2))
    spans = draw(st.none() | st.just((SPANS, SPANS)))
    inputs = {"target_tokens": draw(tensors(shape, "int64")), "weights": draw(tensors(shape, "float32"))}
    if custom and draw(st.booleans()):
        del inputs["weights"]
    for name in draw(st.lists(st.sampled_from(["advantages", "logprobs", "mask", "ünï"]), unique=True)):
        inputs[name] = draw(tensors(shape, "float32"))
    datum = Datum(model_input=ModelInput(chunks=tuple(chunks)), loss_fn_inputs=inputs)
    return datum if spans is None else datum.model_copy(update=dict(zip(SPAN_FIELDS, spans, strict=True)))


def official_chunk(chunk: Any) -> Any:
    kind = getattr(tinker_types, type(chunk).__name__)
    return kind(**{name: value.tolist() if name == "tokens" else value for name, value in chunk})


def official_spans(spans: Any) -> Any:
    if spans is None:
        return None
    return [
        getattr(tinker_types, type(span).__name__)(sequence_id=span.sequence_id, offset=span.offset, length=span.length)
        for span in spans
    ]


def official_tensor(tensor: TensorData) -> Any:
    sparse = {}
    if tensor.sparse_crow_indices is not None:
        sparse["sparse_crow_indices"] = tensor.sparse_crow_indices.tolist()
        sparse["sparse_col_indices"] = tensor.sparse_col_indices.tolist()
    return tinker_types.TensorData(data=tensor.data.copy(), dtype=tensor.dtype, shape=list(tensor.shape), **sparse)


def official_request(data: list[Datum], config: Any = None, **fields: Any) -> Any:
    """What the official SDK makes of the same call."""
    items = [
        tinker_types.Datum(
            model_input=tinker_types.ModelInput(chunks=list(map(official_chunk, item.model_input.chunks))),
            loss_fn_inputs={name: official_tensor(tensor) for name, tensor in item.loss_fn_inputs.items()},
            **{name: official_spans(getattr(item, name)) for name in SPAN_FIELDS},
        )
        for item in data
    ]
    given_input = FB_INPUT(data=items, loss_fn="cross_entropy", loss_fn_config=config)
    request = FB_REQUEST(forward_backward_input=given_input, model_id="s:train:0", seq_id=7)
    message = request_conv.forward_backward_request_to_proto(request)
    for name, value in fields.items():
        setattr(message, name, value)
    return message


def ours(batch: Any, config: Any = None, *, forward_only: bool = False) -> wire.ForwardBackwardRequest:
    request = PassHeader("s:train:0", 7, "cross_entropy", config or {}, forward_only=forward_only)
    return wire.ForwardBackwardRequest.FromString(b"".join(encode_request(batch, request)))


def canonical(message: Any) -> bytes:
    return message.SerializeToString(deterministic=True)


@settings(max_examples=50)
@given(st.lists(datums(), min_size=0, max_size=3), st.booleans())
def test_a_request_equals_the_official_one(data, forward_only):
    config = {"beta": 0.25, "mode": "strict", "clip_low_threshold": 1.0}
    official = official_request(data, config, forward_only=forward_only)
    assert canonical(ours(encode_batch(data), config, forward_only=forward_only)) == canonical(official)


@settings(max_examples=50)
@given(st.lists(datums(custom=True), min_size=1, max_size=3), st.data())
def test_a_custom_request_equals_the_official_one_with_those_weights(data, drawn):
    batch = encode_custom_batch(data)
    shapes = [item.loss_fn_inputs["target_tokens"].shape for item in data]

    def expected(weights: list[np.ndarray]) -> bytes:
        replaced = [
            item.model_copy(
                update={
                    "loss_fn_inputs": {
                        "target_tokens": item.loss_fn_inputs["target_tokens"],
                        "weights": TensorData.of(values),
                    }
                }
            )
            for item, values in zip(data, weights, strict=True)
        ]
        return canonical(official_request(replaced))

    own = [
        item.loss_fn_inputs["weights"].to_numpy() if "weights" in item.loss_fn_inputs else np.zeros(shape, np.float32)
        for item, shape in zip(data, shapes, strict=True)
    ]
    assert canonical(ours(batch)) == expected(own)
    new = [drawn.draw(arrays.arrays(np.float32, shape, elements=floats)) for shape in shapes]
    batch.write_weights(np.concatenate([values.reshape(-1) for values in new]))
    assert canonical(ours(batch)) == expected(new)


@pytest.mark.parametrize("length", [1, 31, 32, 127, 128, 4095, 4096, 70_000])
def test_lengths_at_which_varints_grow(length):
    tokens = np.arange(length) % 250
    item = Datum(model_input=ModelInput.from_ints(tokens), loss_fn_inputs={"target_tokens": tokens})
    weights = np.linspace(-1, 1, length, dtype=np.float32)
    batch = encode_custom_batch([item, item])
    batch.write_weights(np.concatenate([weights, -weights]))
    message = ours(batch)
    assert [len(data.model_input[0].encoded_text.tokens) for data in message.data] == [4 * length] * 2
    sent = [np.frombuffer(data.loss_fn_inputs["weights"].dense, "<f4") for data in message.data]
    assert np.array_equal(sent[0], weights)
    assert np.array_equal(sent[1], -weights)
    assert all(data.loss_fn_inputs["weights"].shape == [length] for data in message.data)


def from_json(fields: dict[str, Any]) -> dict[str, Any]:
    """A chunk of the JSON form, with its bytes decoded as the protocol says."""
    return {name: base64.b64decode(value) if name in ("data", "dmel") else value for name, value in fields.items()}


@settings(max_examples=25)
@given(st.lists(datums(), min_size=1, max_size=3))
def test_the_json_form_says_the_same(data):
    config = {"beta": 0.25, "mode": "strict"}
    batch = encode_batch(data)
    body = request_as_json(batch, PassHeader("m", 3, "ppo", config, forward_only=False))
    assert set(body) == {"model_id", "seq_id", "forward_backward_input"}
    inner = body["forward_backward_input"]
    assert inner["loss_fn"] == "ppo"
    assert inner["loss_fn_config"] == config
    for item, given_item in zip(data, inner["data"], strict=True):
        assert ModelInput(chunks=tuple(map(from_json, given_item["model_input"]["chunks"]))) == item.model_input
        parsed = {name: TensorData.of(tensor) for name, tensor in given_item["loss_fn_inputs"].items()}
        assert parsed == dict(item.loss_fn_inputs)
    forward = request_as_json(batch, PassHeader("m", 3, "ppo", {}, forward_only=True))
    assert set(forward) == {"model_id", "seq_id", "forward_input"}


# Results


@st.composite
def outputs(draw: Any) -> wire.ForwardBackwardOutput:
    """A result as the protocol describes it: records that each are rectangular behind the first dimension."""
    message = wire.ForwardBackwardOutput(loss_fn_output_type=draw(st.sampled_from(["ArrayRecord", "pkg.mod:Record"])))
    message.metrics["loss:sum"] = draw(finite)
    kinds = [wire.DTYPE_FLOAT32, wire.DTYPE_INT64, wire.DTYPE_INT32, wire.DTYPE_BFLOAT16]
    sizes = {wire.DTYPE_FLOAT32: 4, wire.DTYPE_INT64: 8, wire.DTYPE_INT32: 4, wire.DTYPE_BFLOAT16: 2}
    # The name "logprobs" has one dtype in all records, the trailing shape may differ.
    kind = draw(st.sampled_from(kinds))
    for _ in range(draw(st.integers(1, 3))):
        counts = draw(st.lists(st.integers(0, 4), min_size=1, max_size=3))
        trailing = draw(st.sampled_from([(), (1,), (3,)]))
        width = int(np.prod(trailing)) * sizes[kind]
        values = draw(st.binary(min_size=sum(counts) * width, max_size=sum(counts) * width))
        offsets = np.concatenate([[0], np.cumsum(counts)]).astype("<i8") * width
        record = message.loss_fn_outputs.add(num_datums=len(counts))
        record.fields["logprobs"].CopyFrom(
            wire.BatchedTensor(data=values, offsets=offsets.tobytes(), dtype=kind, trailing_shape=trailing)
        )
    return message


def same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.shape == other.shape and one.tobytes() == other.tobytes()


@settings(max_examples=50)
@given(outputs())
def test_a_result_is_read_as_the_official_sdk_reads_it(message):
    body = message.SerializeToString()
    expected = response_conv.deserialize_forward_backward_output(body)
    result = decode_forward_backward(body)
    assert result.loss_fn_output_type == expected.loss_fn_output_type
    assert result.metrics == expected.metrics
    assert result.num_datums == len(expected.loss_fn_outputs)
    for row, official in zip(result.loss_fn_outputs, expected.loss_fn_outputs, strict=True):
        assert set(row) == set(official)
        for name, tensor in row.items():
            assert tensor.dtype == official[name].dtype
            assert list(tensor.shape) == list(official[name].shape)
            assert same_bits(tensor.to_numpy().reshape(-1), np.asarray(official[name].to_numpy()).reshape(-1))


def test_results_without_outputs_or_fields():
    empty = decode_forward_backward(wire.ForwardBackwardOutput(metrics={"loss:sum": 2.0}).SerializeToString())
    assert (empty.num_datums, empty.loss_fn_output_type, empty.metrics) == (0, "ArrayRecord", {"loss:sum": 2.0})
    stripped = wire.ForwardBackwardOutput(loss_fn_outputs=[wire.ArrayRecord(num_datums=3)])
    assert decode_forward_backward(stripped.SerializeToString()).loss_fn_outputs == [{}, {}, {}]
    assert decode_forward_backward(b"").num_datums == 0


def field(**changes: Any) -> wire.BatchedTensor:
    values = np.arange(5, dtype="<f4").tobytes()
    offsets = np.array([0, 12, 20], "<i8").tobytes()
    return wire.BatchedTensor(**{"data": values, "offsets": offsets, "dtype": wire.DTYPE_FLOAT32, **changes})


def offsets(*numbers: int) -> bytes:
    return np.array(numbers, "<i8").tobytes()


CORRUPT = {
    "offsets missing": field(offsets=b""),
    "one offset too few": field(offsets=offsets(0, 20)),
    "one offset too many": field(offsets=offsets(0, 4, 8, 20)),
    "does not start at 0": field(offsets=offsets(4, 12, 20)),
    "does not reach the end": field(offsets=offsets(0, 12, 16)),
    "beyond the end": field(offsets=offsets(0, 12, 24)),
    "negative": field(offsets=offsets(0, -4, 20)),
    "falling": field(offsets=offsets(0, 24, 20)),
    "inside an element": field(offsets=offsets(0, 10, 20)),
    "inside a row": field(offsets=offsets(0, 12, 20), trailing_shape=[2]),
    "offsets cut": field(offsets=offsets(0, 12, 20)[:-3]),
    "data cut": field(data=np.arange(5, dtype="<f4").tobytes()[:-1], offsets=offsets(0, 12, 19)),
    "no dtype": field(dtype=wire.DTYPE_UNSPECIFIED),
    "unknown dtype": field(dtype=99),
    "negative trailing shape": field(trailing_shape=[-1]),
    "zero trailing shape": field(trailing_shape=[0]),
    "huge trailing shape": field(trailing_shape=[2**62, 2**62]),
    "endless trailing shape": field(trailing_shape=[1] * 200),
}


@pytest.mark.parametrize("name", CORRUPT)
def test_a_corrupt_field_is_an_invalid_response(name):
    message = wire.ForwardBackwardOutput(loss_fn_outputs=[wire.ArrayRecord(num_datums=2)])
    message.loss_fn_outputs[0].fields["logprobs"].CopyFrom(CORRUPT[name])
    with pytest.raises(InvalidResponse):
        _ = decode_forward_backward(message.SerializeToString()).loss_fn_outputs


def test_a_record_that_declares_a_wrong_number_of_datums():
    right = wire.ArrayRecord(num_datums=2, fields={"logprobs": field()})
    wrong = [wire.ArrayRecord(num_datums=n, fields={"logprobs": field()}) for n in (0, 1, 3, -1, 2**31 - 1)]
    without_fields = [wire.ArrayRecord(num_datums=n) for n in (-1, -5, 2**31 - 1)]
    for records in [*([one] for one in wrong + without_fields), *([right, one] for one in without_fields)]:
        message = wire.ForwardBackwardOutput(loss_fn_outputs=records)
        with pytest.raises(InvalidResponse):
            _ = decode_forward_backward(message.SerializeToString()).loss_fn_outputs


def test_few_bytes_that_declare_many_datums_of_many_fields():
    fields = {f"f{number}": field() for number in range(16)}
    many = [wire.ArrayRecord(num_datums=2**20), wire.ArrayRecord(num_datums=2, fields=fields)]
    with pytest.raises(InvalidResponse, match="1048578 datums of 16 fields"):
        decode_forward_backward(wire.ForwardBackwardOutput(loss_fn_outputs=many).SerializeToString())


def part(number: int, content: bytes) -> bytes:
    """One length-delimited part of a message (protobuf encoding: wire type 2)."""
    size, length = len(content), bytearray()
    while size > 127:
        length.append(size & 127 | 128)
        size >>= 7
    return bytes([number << 3 | 2, *length, size]) + content


COUNT = 2**18
OF_MANY_PARTS = {
    "records": b"\x12\x00" * COUNT,
    "metrics": b"\x1a\x00" * COUNT,
    "fields of a record": part(2, b"\x12\x00" * COUNT),
    "a long trailing shape": part(2, part(2, part(2, part(4, b"\x01" * COUNT)))),
    "a trailing shape in parts": part(2, part(2, part(2, b"\x20\x01" * COUNT))),
    "unknown fields": b"\x78\x01" * COUNT,
    "records before a damaged end": b"\x12\x00" * COUNT + b"\x12",
    "sizes beyond the end": part(2, b"\x12\xff\xff\xff\x7f") + b"\x12\x00" * COUNT,
}


@pytest.mark.parametrize("name", OF_MANY_PARTS)
def test_a_result_of_many_parts_is_refused_before_it_is_parsed(name, monkeypatch):
    """Parsed, each of these parts needs up to a hundred bytes, and up to a microsecond."""
    parsed = []
    monkeypatch.setattr(wire, "ForwardBackwardOutput", Unparsed(parsed, wire.ForwardBackwardOutput.DESCRIPTOR))
    with pytest.raises(InvalidResponse, match="more than 65536 parts"):
        decode_forward_backward(OF_MANY_PARTS[name])
    assert parsed == []


class Unparsed:
    def __init__(self, parsed: list[bytes], descriptor: Any) -> None:
        self.FromString, self.DESCRIPTOR = parsed.append, descriptor


@pytest.mark.parametrize("kind", ["pass", "sample"])
def test_samples_of_many_parts_are_refused_and_large_results_are_not(kind):
    """A result of 1024 records, and a sample of 1024 sequences, each with all of its parts."""
    row = np.zeros(256, "<f4").tobytes()
    if kind == "pass":
        record = wire.ArrayRecord(
            num_datums=1, fields={name: field(data=row, offsets=offsets(0, 1024)) for name in ("logprobs", "losses")}
        )
        body = wire.ForwardBackwardOutput(loss_fn_outputs=[record] * 1024).SerializeToString()
        assert decode_forward_backward(body).num_datums == 1024
        return
    top = wire.TopkLogprobs(token_ids=row, logprobs=row, k=1, length=256)
    sequence = wire.SampledSequence(tokens=row, logprobs=row, topk_sampled_logprobs=top)
    assert len(decode_sample(wire.SampleResponse(sequences=[sequence] * 1024).SerializeToString()).sequences) == 1024
    with pytest.raises(InvalidResponse, match="more than 65536 parts"):
        decode_sample(b"\x0a\x00" * COUNT)


@pytest.mark.parametrize(
    "outputs",
    ["x", 1, True, [1], [None], [[1]], [{"logprobs": {}}], {"a": 1}],
)
def test_invalid_json_outputs(outputs):
    with pytest.raises(InvalidResponse):
        read_forward_backward(Result(b"", {"loss_fn_outputs": outputs, "metrics": {}}))


def test_fields_of_our_own_are_ignored_in_json():
    fields = {"metrics": {}, "loss_fn_outputs": [], "num_datums": 2**62, "packed": {}}
    output = read_forward_backward(Result(b"", fields))
    assert (output.num_datums, output.loss_fn_outputs) == (0, [])


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=60), outputs().map(lambda m: m.SerializeToString())), st.data())
def test_damaged_bytes_never_raise_anything_else(body, drawn):
    damaged = bytearray(body)
    if damaged:
        for _ in range(drawn.draw(st.integers(0, 3))):
            damaged[drawn.draw(st.integers(0, len(damaged) - 1))] = drawn.draw(st.integers(0, 255))
        damaged = damaged[: drawn.draw(st.integers(0, len(damaged)))]
    with contextlib.suppress(InvalidResponse):
        _ = decode_forward_backward(bytes(damaged)).loss_fn_outputs


def test_bytes_that_are_no_message():
    with pytest.raises(InvalidResponse):
        decode_forward_backward(b"\xff\xff\xff\xff")


# The schema


def described(descriptor: Any) -> descriptor_pb2.DescriptorProto:
    copied = descriptor_pb2.DescriptorProto()
    descriptor.CopyToProto(copied)
    for message in (copied, *copied.nested_type):
        for one in message.field:
            one.ClearField("json_name")  # follows from the name; generated code leaves it out
    return copied


MESSAGES = sorted(official_pb.DESCRIPTOR.message_types_by_name)


@pytest.mark.parametrize("name", MESSAGES)
def test_our_schema_equals_the_official_one(name):
    theirs = described(official_pb.DESCRIPTOR.message_types_by_name[name])
    assert described(getattr(wire, name).DESCRIPTOR) == theirs


def test_our_schema_has_the_same_messages_and_enums():
    mine = wire.ForwardBackwardRequest.DESCRIPTOR.file
    assert sorted(mine.message_types_by_name) == MESSAGES
    assert mine.package == official_pb.DESCRIPTOR.package
    for name, theirs in official_pb.DESCRIPTOR.enum_types_by_name.items():
        values = {value.name: value.number for value in theirs.values}
        assert {value.name: value.number for value in mine.enum_types_by_name[name].values} == values
        assert {key: getattr(wire, key) for key in values} == values
