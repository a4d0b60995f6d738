"""Written data reads back unchanged, and any other input is a typed error.

The results that a client reads are in tests/transport: test_codec.py, test_sample_codec.py, test_any_response.py.
"""

import contextlib
import copy
import functools
import json
import pickle
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from google.protobuf.message import DecodeError
from hypothesis import HealthCheck, given, settings, strategies as st
from hypothesis.extra import numpy as arrays

from tests.losses.test_replay import rich_data, rich_logprobs, rich_pipeline
from tests.runs.support import step_record
from tests.transport.test_any_response import ANY_JSON, NAMES, OBJECTS, SCALARS, used
from tests.transport.test_codec import datums
from tinkex_py.errors import (
    ConfigError,
    InvalidData,
    InvalidResponse,
    PipelineError,
    UnsupportedFeature,
)
from tinkex_py.local import wire_format
from tinkex_py.local.data import PassResult, PromptScores, SampledTokens, SampleResult, TokenTable
from tinkex_py.losses import replay
from tinkex_py.losses.recording import JSON_NAME, TENSORS_NAME
from tinkex_py.runs import RunInfo, StepRecord, read_run, read_steps
from tinkex_py.runs.folder import RUN_FILE, STATE_FILE, STEPS_FILE, RunFolder
from tinkex_py.runs.records import RunState, SavedCheckpoint
from tinkex_py.transport import wire
from tinkex_py.transport.decoding import (
    Result,
    decode_forward_backward,
    decode_sample,
    read_forward_backward,
    read_sample,
    text_of,
)
from tinkex_py.transport.encoding import PassHeader, encode_batch, encode_request, request_as_json
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.messages import Response
from tinkex_py.types import Datum, rest as rest_types
from tinkex_py.types.response_model import ResponseModel
from tinkex_py.unicode import with_whole_texts

SERVICE_ERRORS = (InvalidData, UnsupportedFeature)
floats = st.floats(width=32, allow_nan=False)


def room() -> wire_format.DenseRoom:
    return wire_format.DenseRoom(columns=10**6, bytes=2**24)


def dense(tensor: Any) -> np.ndarray:
    """Returns a client's tensor as the service must see it."""
    return np.asarray(tensor.to_numpy()).reshape(tensor.shape)


def check_same_datums(sent: list[Datum], got: list[Any]) -> None:
    assert len(got) == len(sent)
    for datum, read in zip(sent, got, strict=True):
        assert read.tokens.tolist() == list(datum.model_input.to_ints())
        assert read.inputs.keys() == datum.loss_fn_inputs.keys()
        for name, tensor in datum.loss_fn_inputs.items():
            assert read.inputs[name].dtype == tensor.dtype
            np.testing.assert_array_equal(read.inputs[name], dense(tensor))


# Requests: written by the client, read by the service


@settings(max_examples=40)
@given(st.lists(datums(text=True), max_size=3))
def test_a_request_arrives_as_it_was_sent_in_both_forms(data):
    request = PassHeader("m", 1, "ppo", {"a": 0.5, "b": "x"}, forward_only=True)
    message = wire.ForwardBackwardRequest.FromString(b"".join(encode_request(encode_batch(data), request)))
    check_same_datums(data, wire_format.datums_from_protobuf(message.data, room()))
    assert (message.model_id, message.seq_id, message.loss_fn, message.forward_only) == ("m", 1, "ppo", True)
    text = json.dumps(request_as_json(encode_batch(data), request))
    check_same_datums(data, wire_format.datums_from_json(json.loads(text)["forward_input"]["data"], room()))


TENSOR_FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "data": st.lists(st.integers(-3, 3) | st.floats(), max_size=4) | st.lists(SCALARS, max_size=3) | ANY_JSON,
        "dtype": st.sampled_from(["int64", "float32"]) | SCALARS,
        "shape": st.lists(st.integers(-1, 4), max_size=3) | st.just([2**40, 2**40]) | SCALARS,
        "sparse_crow_indices": st.lists(st.integers(-1, 3), max_size=4) | SCALARS,
        "sparse_col_indices": st.lists(st.integers(-1, 3), max_size=4) | SCALARS,
    },
)
CHUNKS = st.fixed_dictionaries(
    {}, optional={"type": st.sampled_from(["encoded_text", "image"]) | SCALARS, "tokens": ANY_JSON, "data": SCALARS}
)
JSON_DATUMS = st.fixed_dictionaries(
    {},
    optional={
        "model_input": st.fixed_dictionaries({}, optional={"chunks": st.lists(CHUNKS, max_size=2) | ANY_JSON})
        | ANY_JSON,
        "loss_fn_inputs": st.dictionaries(st.text(max_size=3), TENSOR_FIELDS | ANY_JSON, max_size=2) | ANY_JSON,
    },
)


@settings(max_examples=80)
@given(st.lists(JSON_DATUMS, max_size=2), TENSOR_FIELDS | OBJECTS)
def test_any_json_datum_is_read_or_a_typed_error_of_the_service(data, targets):
    with contextlib.suppress(*SERVICE_ERRORS):
        wire_format.datums_from_json(data, room())
    with contextlib.suppress(*SERVICE_ERRORS):
        wire_format.ids_from_json("target_prompt_logprobs", targets, room())


SPARSE = st.fixed_dictionaries(
    {
        "data": st.lists(st.integers(-3, 3), max_size=3),
        "dtype": st.just("int64"),
        "shape": st.lists(st.integers(-1, 3), min_size=1, max_size=3),
        "sparse_crow_indices": st.lists(st.integers(-1, 3), max_size=4),
        "sparse_col_indices": st.lists(st.integers(-1, 3), max_size=3),
    }
)


@settings(max_examples=80)
@given(SPARSE)
def test_any_sparse_tensor_is_read_or_a_typed_error_of_the_service(fields):
    try:
        read = wire_format.tensor_from_json("weights", fields, room())
    except InvalidData:
        return
    assert read.shape == tuple(fields["shape"])


NUMBERS = st.binary(max_size=20) | st.lists(st.integers(-1, 3), max_size=4).map(lambda v: np.array(v, "<i8").tobytes())
WIRE_TENSORS = st.fixed_dictionaries({"dtype": st.integers(0, 6), "shape": st.lists(st.integers(-1, 4), max_size=3)})


@settings(max_examples=80)
@given(WIRE_TENSORS, NUMBERS, st.none() | st.tuples(NUMBERS, NUMBERS))
def test_any_tensor_in_protobuf_is_read_or_a_typed_error_of_the_service(fields, numbers, sparse):
    if sparse is None:
        tensor = wire.Tensor(dense=numbers, **fields)
    else:
        places = wire.SparseCsr(values=numbers, crow_indices=sparse[0], col_indices=sparse[1])
        tensor = wire.Tensor(sparse_csr=places, **fields)
    with contextlib.suppress(*SERVICE_ERRORS):
        wire_format.datums_from_protobuf([wire.Datum(loss_fn_inputs={"weights": tensor})], room())


@settings(max_examples=80)
@given(datums(), st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), max_size=3), st.integers(0, 10**4))
def test_any_protobuf_datum_is_read_or_a_typed_error_of_the_service(datum, changes, end):
    body = bytearray(encode_batch([datum]).body)
    for place, value in changes:
        body[place % len(body)] = value
    damaged = bytes(body[: end % (len(body) + 1)] if end % 2 else body)
    with contextlib.suppress(DecodeError, *SERVICE_ERRORS):
        wire_format.datums_from_protobuf(wire.ForwardBackwardRequest.FromString(damaged).data, room())


# Results: written by the service, read by the client


@st.composite
def pass_results(draw: Any) -> PassResult:
    shapes = draw(st.lists(st.sampled_from([(1,), (3,), (2, 2), (4, 1)]), max_size=4))
    arrays_of = [draw(arrays.arrays(np.float32, shape, elements=floats)) for shape in shapes]
    elementwise = [array * 0.5 for array in arrays_of] if draw(st.booleans()) else None
    return PassResult(arrays_of, {"loss:sum": draw(st.floats(allow_nan=False, allow_infinity=False))}, elementwise)


@settings(max_examples=40)
@given(pass_results())
def test_a_pass_arrives_as_the_service_computed_it(result):
    reads = [decode_forward_backward(wire_format.pass_protobuf(result))]
    in_json = Result(b"", json.loads(json.dumps(wire_format.pass_json(result))))
    if all(np.isfinite(array).all() for array in result.logprobs):
        reads.append(read_forward_backward(in_json))
    else:
        # JSON cannot represent them, and a gap must not be read as a number.
        with pytest.raises(InvalidResponse):
            used(read_forward_backward(in_json))
    for read in reads:
        assert dict(read.metrics) == result.metrics
        assert len(read.loss_fn_outputs) == len(result.logprobs)
        for index, row in enumerate(read.loss_fn_outputs):
            np.testing.assert_array_equal(dense(row["logprobs"]), result.logprobs[index])
            assert ("elementwise_loss" in row) == (result.elementwise_loss is not None)
            if result.elementwise_loss is not None:
                np.testing.assert_array_equal(dense(row["elementwise_loss"]), result.elementwise_loss[index])


@st.composite
def sample_results(draw: Any) -> SampleResult:
    def table(rows: int, k: int) -> TokenTable:
        ids = draw(arrays.arrays(np.int32, (rows, k), elements=st.integers(1, 9)))
        return TokenTable(ids, draw(arrays.arrays(np.float32, (rows, k), elements=st.floats(-50, 0, width=32))))

    logs = st.floats(-50, 0, width=32)
    sequences = []
    for _ in range(draw(st.integers(1, 3))):
        count = draw(st.integers(0, 4))
        tokens = draw(arrays.arrays(np.int32, count, elements=st.integers(0, 2**31 - 1)))
        topk = table(count, 2) if draw(st.booleans()) else None
        logprobs = draw(arrays.arrays(np.float32, count, elements=logs))
        sequences.append(SampledTokens(tokens, logprobs, draw(st.booleans()), topk))
    length = draw(st.integers(2, 4))
    prompt = np.concatenate([[np.nan], draw(arrays.arrays(np.float32, length - 1, elements=logs))]).astype(np.float32)
    ids = draw(arrays.arrays(np.int32, (length - 1, 2), elements=st.integers(0, 9)))
    values = draw(arrays.arrays(np.float32, (length - 1, 2), elements=logs))
    scores = PromptScores(
        logprobs=prompt if draw(st.booleans()) else None,
        topk=table(length, 1) if draw(st.booleans()) else None,
        targets=values if draw(st.booleans()) else None,
        alternatives=TokenTable(ids, values) if draw(st.booleans()) else None,
    )
    return SampleResult(sequences, scores)


@settings(max_examples=40)
@given(sample_results())
def test_a_sample_arrives_as_the_service_drew_it_in_both_forms(result):
    in_json = read_sample(Result(b"", json.loads(json.dumps(wire_format.sample_json(result)))))
    in_bytes = decode_sample(wire_format.sample_protobuf(result))
    for read in (in_json, in_bytes):
        assert [sequence.tokens for sequence in read.sequences] == [s.tokens.tolist() for s in result.sequences]
        for got, drawn in zip(read.sequences, result.sequences, strict=True):
            assert got.stop_reason == ("stop" if drawn.stopped else "length")
            assert (got.logprobs or []) == drawn.logprobs.tolist()
        if result.prompt.logprobs is not None:
            assert read.prompt_logprobs == [None, *result.prompt.logprobs[1:].tolist()]
        assert (read.target_prompt_logprobs is None) == (result.prompt.targets is None)
        if result.prompt.targets is not None:
            np.testing.assert_array_equal(dense(read.target_prompt_logprobs), result.prompt.targets)
        if result.prompt.alternatives is not None:
            np.testing.assert_array_equal(dense(read.prompt_alt_tokens.tokens), result.prompt.alternatives.ids)
    assert in_json.topk_prompt_logprobs == in_bytes.topk_prompt_logprobs


ANSWERS = sorted(
    {value for value in vars(rest_types).values() if isinstance(value, type) and issubclass(value, ResponseModel)}
    - {ResponseModel},
    key=lambda answer: answer.__name__,
)


@settings(max_examples=80)
@given(st.data())
def test_any_rest_answer_is_read_or_an_invalid_response(data):
    answer = data.draw(st.sampled_from(ANSWERS))
    values = ANY_JSON | st.sampled_from(
        ["2026-01-01T00:00:00Z", "tinker://a/weights/b", "weights/b", "training", "local"]
    )
    fields = data.draw(st.dictionaries(st.sampled_from(sorted(answer.model_fields)), values, max_size=8))
    try:
        read = answer.read(fields)
    except InvalidResponse:
        return
    # The result serializes to JSON that reads back as the same.
    assert answer.read(json.loads(read.model_dump_json(by_alias=True))) == read


# Lone surrogates, which JSON can escape and UTF-8 cannot encode

SURROGATES = st.sampled_from(["\ud800", "\udfff", "a\ud83d", "\ude00b", "\ude00\ud83d"])
FORMS: list[Callable[[str], bytes]] = [
    lambda text: json.dumps(json.loads(text)).encode(),
    lambda text: text.encode("utf-8", "surrogatepass"),
    lambda text: text.encode("utf-16", "surrogatepass"),
    lambda text: text.encode("utf-16-le", "surrogatepass"),
    lambda text: text.encode("utf-32", "surrogatepass"),
]


def check_can_be_written(value: object) -> None:
    """Checks that a value can be encoded as text and as JSON in UTF-8."""
    json.dumps(value, ensure_ascii=False).encode()
    str(value).encode()


@settings(max_examples=80)
@given(
    OBJECTS,
    st.dictionaries(st.sampled_from(NAMES) | SURROGATES, SURROGATES, min_size=1, max_size=3),
    st.sampled_from(FORMS),
)
def test_lone_surrogates_of_a_service_can_be_written_everywhere(fields, broken, form):
    body = form(json.dumps({**fields, **broken, "more": [broken]}, ensure_ascii=False))
    for status in (200, 400, 429, 500):
        answer = Response(status, {"content-type": "application/json", "location": "\ud800"}, body)
        read = answer.json()
        check_can_be_written(read)
        assert read["more"] == [with_whole_texts(broken)]
        if not answer.is_success:
            error = status_error(answer)
            for part in (str(error), error.body, error.code, error.request_id):
                check_can_be_written(part)
            assert str(pickle.loads(pickle.dumps(error))) == str(error)
        for name in fields.keys() | broken.keys():
            with contextlib.suppress(InvalidResponse):
                text_of(read, name, "path").encode()


def test_complete_characters_are_unchanged():
    fields = {"\U0001f600": "\U0001f600 \ufffd é", "number": 1, "more": [None, True, 0.5, {"a": "b"}]}
    for form in FORMS:
        assert Response(200, {}, form(json.dumps(fields, ensure_ascii=False))).json() == fields


@settings(max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(SURROGATES, st.floats(allow_nan=False))
def test_lone_surrogates_in_the_files_of_a_run_are_replaced(tmp_path, broken, number):
    (tmp_path / STEPS_FILE).unlink(missing_ok=True)
    run = RunInfo(
        name=broken, started_at=1.0, updated_at=2.0, status="failed", reason=broken, config={broken: [broken, 1]}
    )
    step = step_record(1, number, metrics={broken: number})
    state = RunState(
        checkpoints=[SavedCheckpoint(step=1, path=f"tinker://{broken}")], batches=1, client_step=1, pipeline={broken: 1}
    )
    whole = with_whole_texts(broken)
    with RunFolder(tmp_path) as folder:
        folder.write_run(run)
        folder.append_step(step)
        folder.write_state(state)
        found, (line,), stored = read_run(tmp_path), read_steps(tmp_path), folder.read_state()
    assert (found.name, found.reason, found.config) == (whole, whole, {whole: [whole, 1]})
    ((name, value),) = line.metrics.items()
    assert value == number
    name.encode()
    assert stored is not None
    assert stored.checkpoints[0].path == f"tinker://{whole}"


# Files


def json_of(model: type[Any]) -> st.SearchStrategy[Any]:
    return st.dictionaries(st.sampled_from(sorted(model.model_fields)), ANY_JSON, max_size=6)


NAMED = st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False), max_size=3)
RUNS = st.builds(
    RunInfo,
    name=st.text(max_size=5),
    started_at=st.floats(0, 1e10),
    updated_at=st.floats(0, 1e10),
    status=st.sampled_from(["running", "finished", "stopped", "failed"]),
    reason=st.none() | st.text(max_size=5),
    total_steps=st.none() | st.integers(0, 9),
    config=st.dictionaries(st.text(max_size=3), st.integers() | st.text(max_size=3) | st.none(), max_size=3),
    seed=st.none() | st.integers(),
)
STEPS = st.builds(step_record, st.integers(1, 9), st.floats(allow_nan=False), metrics=NAMED, evaluation=NAMED)
STATES = st.builds(
    RunState,
    checkpoints=st.lists(st.builds(SavedCheckpoint, step=st.integers(0, 9), path=st.text()), min_size=1, max_size=2),
    batches=st.integers(0, 9),
    client_step=st.integers(0, 9),
    pipeline=st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(RUNS, st.lists(STEPS, max_size=3), STATES)
def test_the_files_of_a_run_are_read_as_they_were_written(tmp_path, run, steps, state):
    with RunFolder(tmp_path) as folder:
        (tmp_path / STEPS_FILE).unlink(missing_ok=True)
        folder.write_run(run)
        for step in steps:
            folder.append_step(step)
        folder.write_state(state)
        assert folder.read_run() == run
        assert read_steps(tmp_path) == steps
        assert folder.read_state() == state


LINES = st.one_of(
    st.binary(max_size=40),
    json_of(StepRecord).map(lambda value: json.dumps(value).encode()),
    json_of(RunInfo).map(lambda value: json.dumps(value).encode()),
    st.sampled_from([b"[" * 50_000, b'{"a":' * 50_000, b"1" * 5000, b"null", b"[]", b'"\\ud800"', b"\xff"]),
    STEPS.map(lambda step: step.model_dump_json().encode()),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(LINES, LINES, st.booleans())
def test_any_files_of_a_run_are_read_or_a_config_error(tmp_path, first, second, ended):
    for name in (RUN_FILE, STATE_FILE, STEPS_FILE):
        (tmp_path / name).write_bytes(first + b"\n" + second + (b"\n" if ended else b""))
    with RunFolder(tmp_path) as folder:
        for read in (lambda: read_run(tmp_path), lambda: read_steps(tmp_path), folder.read_state, folder.read_run):
            with contextlib.suppress(ConfigError):
                read()
        with contextlib.suppress(ConfigError):
            folder.keep_steps(1)


# Recordings


def damaged(content: bytes, changes: list[tuple[int, int]], end: int) -> bytes:
    body = bytearray(content)
    for place, value in changes:
        body[place % len(body)] = value
    return bytes(body[: end % (len(body) + 1)] if end % 3 == 1 else body)


def places_in(value: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Returns the paths of all values inside a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return (
        [at, *(place for key, item in inner for place in places_in(item, (*at, key)))]
        if at
        else [place for key, item in inner for place in places_in(item, (key,))]
    )


def with_another(value: Any, place: tuple[Any, ...], other: Any) -> Any:
    copied = copy.deepcopy(value)
    inner = copied
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = other
    return copied


@pytest.mark.asyncio
async def test_any_record_is_replayed_or_a_pipeline_error(tmp_path):
    """Replaces one value of its JSON, and changes and truncates the bytes of both files."""
    await rich_pipeline().evaluate(rich_data(), rich_logprobs(), record=tmp_path / "step")
    good = {name: (tmp_path / "step" / name).read_bytes() for name in (JSON_NAME, TENSORS_NAME)}
    plain = json.loads(good[JSON_NAME])
    written: list[tuple[str, bytes]] = []
    changes = st.lists(st.tuples(st.integers(0, 10**5), st.integers(0, 255)), max_size=3)

    @settings(max_examples=40)
    @given(st.sampled_from(places_in(plain)), ANY_JSON)
    def change_a_value(place: tuple[Any, ...], other: Any) -> None:
        written.append((JSON_NAME, json.dumps(with_another(plain, place, other)).encode()))

    @settings(max_examples=40)
    @given(st.sampled_from(sorted(good)), changes, st.integers(0, 10**5))
    def change_bytes(name: str, places: list[tuple[int, int]], end: int) -> None:
        # Half of the changes go to the start of the file, which holds the header of the tensors.
        written.append((name, damaged(good[name], [(at % 400 if at % 2 else at, to) for at, to in places], end)))

    change_a_value()
    change_bytes()
    for place in places_in(plain):
        here = functools.reduce(lambda value, key: value[key], place, plain)
        if isinstance(here, int) and not isinstance(here, bool):
            written += [(JSON_NAME, json.dumps(with_another(plain, place, here + by)).encode()) for by in (-1, 1)]
    replayed = 0
    for name, content in written:
        for file, whole in good.items():
            (tmp_path / "step" / file).write_bytes(content if file == name else whole)
        try:
            await replay(tmp_path / "step", rich_pipeline())
            replayed += 1
        except PipelineError:
            continue
    assert 0 < replayed < len(written)
