"""Input that costs more than its bytes: refused before anything is built, in one pass, and off the event loop.

Bounds are counts: bytes allocated, bytes passed over, turns of the event loop. None is a time.
"""

import asyncio
import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import zstandard

from tinkex_py.errors import InvalidData
from tinkex_py.local import LocalOptions, bodies, wire_format
from tinkex_py.local.core import MAX_MESSAGE, Refused
from tinkex_py.local.custom_losses import MAX_ARGUMENTS, MAX_ELEMENTS, read_graph
from tinkex_py.transport import wire

MIB = 1024**2


@contextmanager
def allocating_at_most(limit: int) -> Iterator[None]:
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < limit


# JSON


def structure_by_hand(body: bytes) -> tuple[int, int]:
    """Depth and number of values, byte by byte."""
    deepest = depth = parts = place = 0
    in_text = False
    while place < len(body):
        character = chr(body[place])
        if in_text:
            place += character == "\\"
            in_text = character != '"'
        else:
            in_text = character == '"'
            depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(character, 0)
            deepest = max(deepest, depth)
            parts += character in "[{,:"
        place += 1
    return deepest, parts


TEXTS = ["", "\\", '"', '\\"[{', "]}", "a,b:c", "\\\\\\", "é[", '"' * 5]


@pytest.mark.parametrize("block", [1, 2, 3, 7, 1 << 20])
def test_depth_and_values_of_json_are_counted_in_blocks_of_any_size(monkeypatch, block):
    def value(level: int) -> Any:
        kind = random.integers(0, 3) if level else 0
        children = range(random.integers(0, 4))
        if kind == 1:
            return [value(level - 1) for _ in children]
        if kind == 2:
            return {TEXTS[random.integers(0, len(TEXTS))]: value(level - 1) for _ in children}
        return [1, -2.5e3, None, *TEXTS][random.integers(0, 3 + len(TEXTS))]

    random = np.random.default_rng(block)
    monkeypatch.setattr(bodies, "BLOCK", block)
    for _ in range(60):
        body = json.dumps(value(5)).encode()
        depth, parts = structure_by_hand(body)
        for limit, bound in (("MAX_JSON_DEPTH", depth), ("MAX_JSON_PARTS", parts)):
            with monkeypatch.context() as patch:
                patch.setattr(bodies, limit, bound)
                bodies.check_structure(body)
                patch.setattr(bodies, limit, bound - 1)
                if bound:
                    with pytest.raises(Refused, match=r"nested too deeply|values"):
                        bodies.check_structure(body)


ESCAPED_QUOTES = b'{"a":' + b"[]," * 70 + b'"x' + b'\\"x' * 70_000
LONG_BODIES = {
    "escaped quotes in a text that does not end": ESCAPED_QUOTES,
    "backslashes": b'{"a":' + b"[]," * 70 + b'"' + b"\\" * 200_001,
    "closed brackets": b"]" * 100_000 + b"[" * 70,
    "texts": b"[" * 70 + b'"",' * 70_000,
}


@pytest.mark.parametrize("name", LONG_BODIES)
def test_the_check_of_json_passes_over_every_byte_once(monkeypatch, name):
    passed = 0
    read = np.frombuffer

    def counting(body: bytes, dtype: Any, count: int, offset: int) -> Any:
        nonlocal passed
        passed += count
        return read(body, dtype, count, offset)

    monkeypatch.setattr(bodies.np, "frombuffer", counting)
    with pytest.raises(Refused):
        bodies.parse_json(LONG_BODIES[name])
    assert passed == len(LONG_BODIES[name])


BAD_JSON = {
    "a long number": (b'{"a": ' + b"9" * 5000 + b"}", "a number is too long"),
    "many long numbers": (b'{"a": [' + b",".join([b"9" * 5000] * 20) + b"]}", "a number is too long"),
    "a body": (b'"' + b"x" * bodies.MAX_JSON_BYTES + b'"', "larger than"),
    "numbers": (b"[" + b"0," * bodies.MAX_JSON_PARTS + b"0]", "values"),
}


@pytest.mark.parametrize("name", BAD_JSON)
def test_large_json_is_refused_before_it_is_decoded(name):
    body, reason = BAD_JSON[name]
    with pytest.raises(Refused, match=reason), allocating_at_most(len(body) + 80 * MIB):
        bodies.parse_json(body)


FIELDS = {
    "tags": ("create_session", {"tags": ["t"] * 10**6}, "tags has a length of 1000000; at most 16384"),
    "metadata": ("create_session", {"user_metadata": {"a": "x" * 2 * MIB}}, "user_metadata: Value error, has more"),
    "numbers of metadata": ("create_session", {"user_metadata": {"a": [0.1] * 10**6}}, "has more than 1048576 bytes"),
    "a name": ("create_session", {"display_name": "x" * 10**5}, "display_name has a length of 100000"),
    "wrong items": ("create_session", {"tags": [1] * 16_000}, "and 15992 more"),
    "a rank": ("create_model", {"lora_config": {"rank": 10**400}}, "lora_config.rank"),
    "a seed": ("create_model", {"lora_config": {"seed": 10**400}}, "lora_config.seed"),
    "a number of a request": ("optim_step", {"model_id": "x", "seq_id": 2**80}, "seq_id"),
    "stops": ("asample", {"prompt": {}, "sampling_params": {"stop": ["x"] * 300}}, "has more than 256 items"),
    "a stop": ("asample", {"prompt": {}, "sampling_params": {"stop": "x" * 300}}, "at most 256 characters"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", FIELDS)
async def test_fields_have_a_size(client, name):
    path, fields, reason = FIELDS[name]
    answer = await client.post(path, fields)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert len(answer.text) < 2 * MAX_MESSAGE


@pytest.mark.asyncio
async def test_errors_do_not_repeat_a_large_request(client):
    await client.session()
    body = {"session_id": client.session_id, "model_seq_id": 0, "base_model": "x" * 16_000}
    answer = await client.done("create_model", body)
    assert answer["error"].startswith("base model 'xxx")
    assert len(answer["error"]) < MAX_MESSAGE + 10


# Protobuf

SMALL_FIELDS = {
    "datums": b"\x1a\x00" * MIB,
    "chunks": wire.ForwardBackwardRequest(data=[wire.Datum(model_input=[wire.Chunk()] * MIB)]).SerializeToString(),
    "sizes of a shape": wire.ForwardBackwardRequest(
        data=[wire.Datum(loss_fn_inputs={"x": wire.Tensor(shape=[1] * 2 * MIB)})]
    ).SerializeToString(),
}


@pytest.mark.parametrize("name", SMALL_FIELDS)
def test_protobuf_of_very_many_fields_is_refused_before_it_is_decoded(monkeypatch, name):
    monkeypatch.setattr(bodies.wire, "ForwardBackwardRequest", NotDecoded)
    with pytest.raises(Refused, match="more than 500000 fields"):
        bodies.parse_pass(SMALL_FIELDS[name])


class NotDecoded:
    DESCRIPTOR = wire.ForwardBackwardRequest.DESCRIPTOR


def test_a_large_pass_of_ordinary_datums_is_read():
    numbers = wire.Tensor(dense=bytes(8 * 2048), dtype=wire.DTYPE_INT64, shape=[2048])
    datum = wire.Datum(loss_fn_inputs={"target_tokens": numbers, "weights": numbers})
    message = wire.ForwardBackwardRequest(data=[datum] * 1024)
    assert bodies.parse_pass(message.SerializeToString()) == message


# Sparse tensors, and the types of lists


def sparse_datum(rows: int, columns: int) -> dict[str, Any]:
    places = {"sparse_crow_indices": [0] + [1] * rows, "sparse_col_indices": [0], "shape": [rows, columns]}
    inputs = {
        "target_tokens": {"data": [1], "dtype": "int64", **places},
        "weights": {"data": [1.0], "dtype": "float32", **places},
    }
    return {"model_input": {"chunks": [{"tokens": [1] * rows}]}, "loss_fn_inputs": inputs}


def sparse_message(rows: int, columns: int) -> wire.Datum:
    indices = np.array([0] + [1] * rows, "<i8").tobytes()
    sparse = wire.SparseCsr(values=bytes(8), crow_indices=indices, col_indices=bytes(8))
    tensor = wire.Tensor(sparse_csr=sparse, dtype=wire.DTYPE_INT64, shape=[rows, columns])
    return wire.Datum(loss_fn_inputs={"target_tokens": tensor})


READERS = [(wire_format.datums_from_json, sparse_datum), (wire_format.datums_from_protobuf, sparse_message)]


@pytest.mark.parametrize(("read", "datum"), READERS, ids=["json", "protobuf"])
@pytest.mark.parametrize(
    ("rows", "columns", "count", "reason"),
    [(3, 2**25, 1, "more columns than the vocabulary has tokens, 259"), (300, 259, 20, "in dense form")],
    ids=["wide", "many"],
)
def test_dense_forms_are_bounded_for_the_whole_request(read, datum, rows, columns, count, reason):
    """One datum of 300 x 259 cells has at most 12 bytes for each, 0.9 MiB; a request has room for two."""
    data = [datum(rows, columns)] * count
    read(data[:1], wire_format.DenseRoom(2**26, 2**40)) if count > 1 else None
    with pytest.raises(InvalidData, match=reason), allocating_at_most(4 * MIB):
        read(data, wire_format.DenseRoom(columns=259, bytes=2 * MIB))


def test_a_text_among_numbers_is_refused_before_numpy_gives_every_number_its_size():
    values = ["x" * MIB, *range(1000)]
    with pytest.raises(InvalidData, match="not whole numbers"), allocating_at_most(MIB):
        wire_format.input_from_json("prompt", {"chunks": [{"tokens": values}]})


@pytest.mark.asyncio
async def test_candidates_are_bounded_by_the_vocabulary(client):
    model_id = await client.model()
    wide = {"data": [0] * 3 * 300, "dtype": "int64", "shape": [3, 300]}
    datum = {"model_input": {"chunks": [{"tokens": [1, 2, 3]}]}, "loss_fn_inputs": {"target_tokens": wide}}
    for number, datums in enumerate(([datum], [sparse_datum(3, 2**25)]), 1):
        body = {"data": datums, "loss_fn": "cross_entropy"}
        fields = {"model_id": model_id, "seq_id": number, "forward_backward_input": body}
        failed = await client.done("forward_backward", fields)
        assert failed["category"] == "user"
        assert "than the vocabulary" in failed["error"]


# Samples and uploaded losses


@pytest.mark.asyncio
async def test_results_of_samples_are_bounded(client):
    body = {"prompt": {"chunks": [{"tokens": [1]}]}, "base_model": "tiny", "num_samples": 1024}
    failed = await client.done("asample", {**body, "topk_sample_logprobs": 258})
    assert "more than 16777216" in failed["error"]


def upload(*calls: dict[str, Any]) -> dict[str, Any]:
    start = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    output = {"tuple": [{"ref": "x"}, {"dict": {}}]}
    nodes = [start, *calls, {"op": "output", "name": "output", "target": "output", "args": [output]}]
    return {"name": "x", "inputs": [{"name": "logprobs", "rank": 1}], "graph": {"format": 1, "nodes": nodes}}


def call(name: str, target: str, *args: Any) -> dict[str, Any]:
    op = "call_function" if "." in target else "call_method"
    return {"op": op, "name": name, "target": target, "args": list(args)}


Z = {"ref": "z"}
BOMBS = {
    "arange of a tensor": (call("z", "torch.full", [], 4e8), call("x", "torch.arange", Z)),
    "nested index": (
        call("z", "torch.zeros", [1, 2**13]),
        call("x", "operator.getitem", Z, [[0] * 100] * 100),
    ),
    "unbind": (call("z", "torch.zeros", [2**21]), call("x", "unbind", Z)),
    "split": (call("z", "torch.zeros", [2**21]), call("x", "torch.split", Z, 1)),
    "unbind of nothing": (call("z", "torch.zeros", [2**22, 0]), call("x", "unbind", Z)),
    "chunks of nothing": (call("z", "torch.zeros", [0]), call("x", "chunk", Z, 3_000_000)),
    "split of nothing": (call("z", "torch.zeros", [2**22, 0]), call("x", "split", Z, 1)),
    "sum of nothing": (call("z", "torch.zeros", [3 * 10**8, 0]), call("x", "sum", Z, 1)),
    "product of nothing": (
        call("z", "torch.zeros", [20_000, 0]),
        call("y", "torch.zeros", [0, 20_000]),
        call("x", "torch.matmul", Z, {"ref": "y"}),
    ),
}


@pytest.mark.parametrize("name", BOMBS)
def test_an_operation_of_an_uploaded_loss_is_charged_before_it_runs(name):
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Elements(TorchDispatchMode):
        """Counts results with data, each with its own size."""

        most = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            result = func(*args, **(kwargs or {}))
            found = result if isinstance(result, tuple | list) else [result]
            real = [item for item in found if isinstance(item, torch.Tensor) and not item.is_meta]
            self.most = max(self.most, sum(item.numel() + 1024 for item in real))
            return result

    graph = read_graph(upload(*BOMBS[name]))
    with pytest.raises(InvalidData, match="more than 67108864 elements"), Elements() as elements:
        graph.compute([torch.zeros(8)])
    assert elements.most <= MAX_ELEMENTS


def test_arguments_of_an_uploaded_loss_are_bounded():
    nested = [[0] * 200] * 101
    with pytest.raises(InvalidData, match=f"more than {MAX_ARGUMENTS} arguments together"):
        read_graph(upload(call("x", "operator.getitem", {"ref": "logprobs"}, nested)))


# The event loop


def zstd(content: bytes) -> bytes:
    return zstandard.ZstdCompressor().compress(content)


async def turns_during(client: Any, path: str, body: bytes, **headers: str) -> tuple[Any, int]:
    """Sends a body; returns the response, and how many turns the event loop made meanwhile."""
    sending = asyncio.ensure_future(client.http.post(f"/api/v1/{path}", content=body, headers=headers))
    turns = 0
    while not sending.done():
        turns += 1
        await asyncio.sleep(0)
    return await sending, turns


HEAVY = {
    "json": ("create_session", b'{"x": [' + b"1234.5," * 500_000 + b"0]}", {}, 200),
    "json numbers that are long": ("create_session", b'{"x": [' + b",".join([b"9" * 4000] * 2000) + b"]}", {}, 200),
    "json of a pass": ("forward_backward", b'{"model_id": "x", "x": [' + b"1," * 500_000 + b"0]}", {}, 404),
    "zstd": ("create_session", zstd(bytes(256 * MIB)), {"Content-Encoding": "zstd"}, 413),
    "protobuf": ("forward_backward", b"\x1a\x00" * MIB, {"Content-Type": "application/x-protobuf"}, 413),
}


@pytest.mark.asyncio
@pytest.mark.parametrize("name", HEAVY)
async def test_the_event_loop_turns_while_a_large_body_is_read(client, name):
    path, body, headers, status = HEAVY[name]
    answer, turns = await turns_during(client, path, body, **headers)
    assert answer.status_code == status, answer.text
    assert turns > 100


@pytest.mark.asyncio
async def test_the_event_loop_turns_while_a_large_result_is_encoded(run_service, kit):
    async with run_service(LocalOptions()) as client:
        model_id = await client.model()
        targets = np.zeros((600, 258), dtype=np.int64)
        datum = kit.datum(600, 1)
        wide = type(datum)(tokens=datum.tokens, inputs={"target_tokens": targets})
        submitted = await client.send_pass(kit.message(model_id, 1, [wide]))
        request = {"request_id": submitted.json()["request_id"]}
        await client.final(request["request_id"], accept="application/x-protobuf")
        answer, turns = await turns_during(client, "retrieve_future", json.dumps(request).encode())
        assert len(answer.json()["loss_fn_outputs"][0]["logprobs"]["data"]) == targets.size
        assert turns > 100


@pytest.mark.asyncio
async def test_a_result_that_is_too_large_for_json_says_how_to_retrieve_it(client, kit, monkeypatch):
    from tinkex_py.local import routes_futures

    monkeypatch.setattr(routes_futures, "MAX_JSON_RESULT", 1000)
    monkeypatch.setattr(routes_futures, "SMALL_BODY", 100)
    model_id = await client.model()
    submitted = (await client.send_pass(kit.message(model_id, 1, [kit.datum(600, 1)]))).json()
    answer = await client.final(submitted["request_id"])
    assert "retrieve it with `Accept: application/x-protobuf`" in answer.json()["error"]
    whole = await client.final(submitted["request_id"], accept="application/x-protobuf")
    assert len(kit.unpack(wire.ForwardBackwardOutput.FromString(whole.content))[0]) == 600
