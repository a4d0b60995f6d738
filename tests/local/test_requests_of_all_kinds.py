"""Every form of content: sparse and matrix inputs, chunks other than text, numbers used once."""

import numpy as np
import pytest

from tinkex_py.local.data import EncodedDatum
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio(loop_scope="module")
PROTOBUF = "application/x-protobuf"


def json_csr(matrix, dtype):
    """CSR written out cell by cell."""
    values, columns, rows = [], [], [0]
    for row in matrix:
        for column, value in enumerate(row):
            if value != 0:
                values.append(value)
                columns.append(column)
        rows.append(len(values))
    return {
        "data": values,
        "dtype": dtype,
        "shape": [len(matrix), len(matrix[0])],
        "sparse_crow_indices": rows,
        "sparse_col_indices": columns,
    }


def protobuf_csr(matrix, dtype):
    fields = json_csr(matrix, "")
    kind, element = (wire.DTYPE_INT64, "<i8") if dtype == "int64" else (wire.DTYPE_FLOAT32, "<f4")
    sparse = wire.SparseCsr(
        values=np.array(fields["data"], element).tobytes(),
        crow_indices=np.array(fields["sparse_crow_indices"], "<i8").tobytes(),
        col_indices=np.array(fields["sparse_col_indices"], "<i8").tobytes(),
    )
    return wire.Tensor(sparse_csr=sparse, dtype=kind, shape=fields["shape"])


TARGETS = [[7, 0, 9], [0, 0, 0], [0, 4, 0], [3, 2, 1]]
# Another pattern than the targets': cells of either that the other does not list count as 0.
WEIGHTS = [[0.0, 0.0, 1.5], [0.25, 0.0, 0.0], [0.0, 0.0, 0.0], [-1.0, 0.5, 0.0]]


async def test_sparse_targets_and_weights_are_dense_with_zeros(shared, kit):
    await shared.session()
    model_id = await shared.model()
    dense = EncodedDatum(
        np.arange(4), {"target_tokens": np.array(TARGETS), "weights": np.array(WEIGHTS, dtype=np.float32)}
    )
    want = await shared.pass_result(kit.message(model_id, 1, [dense]))
    logprobs = kit.unpack(want)[0]
    assert logprobs.shape == (4, 3)
    expected = -sum(WEIGHTS[i][k] * float(logprobs[i, k]) for i in range(4) for k in range(3))
    assert want.metrics["loss:sum"] == pytest.approx(expected, rel=1e-5)
    message = kit.message(model_id, 2, [dense])
    message.data[0].loss_fn_inputs["target_tokens"].CopyFrom(protobuf_csr(TARGETS, "int64"))
    message.data[0].loss_fn_inputs["weights"].CopyFrom(protobuf_csr(WEIGHTS, "float32"))
    got = await shared.pass_result(message, zstd=True)
    assert got.metrics == want.metrics
    np.testing.assert_array_equal(kit.unpack(got)[0], logprobs)
    inputs = {"target_tokens": json_csr(TARGETS, "int64"), "weights": json_csr(WEIGHTS, "float32")}
    body = {"data": [{"model_input": {"chunks": [{"tokens": [0, 1, 2, 3]}]}, "loss_fn_inputs": inputs}]}
    body["loss_fn"] = "cross_entropy"
    old = await shared.done("forward_backward", {"model_id": model_id, "seq_id": 3, "forward_backward_input": body})
    assert old["metrics"] == want.metrics
    assert old["loss_fn_outputs"][0]["logprobs"]["shape"] == [4, 3]
    step = await shared.done("optim_step", {"model_id": model_id, "seq_id": 4, "adam_params": {}})
    twin = await shared.model(1)
    for number in (1, 2, 3):
        await shared.pass_result(kit.message(twin, number, [dense]))
    same = await shared.done("optim_step", {"model_id": twin, "seq_id": 4, "adam_params": {}})
    assert step["metrics"]["grad_norm"] == pytest.approx(same["metrics"]["grad_norm"], rel=1e-6)


PICTURES = {
    "image": {"type": "image", "data": "aGk=", "format": "png", "expected_tokens": 3},
    "image_asset_pointer": {"type": "image_asset_pointer", "location": "x://y", "format": "jpeg"},
    "dmel": {"type": "dmel", "dmel": "aGk="},
}


@pytest.mark.parametrize("typed", [True, False])
@pytest.mark.parametrize("kind", PICTURES)
async def test_a_chunk_that_is_no_text_fails_only_its_request(shared, kit, kind, typed):
    await shared.session()
    model_id = await shared.model()
    chunk = {key: value for key, value in PICTURES[kind].items() if typed or key != "type"}
    chunks = [{"tokens": [1, 2]}, chunk]
    targets = {"data": [1, 2, 3, 4, 5], "dtype": "int64"}
    datum = {"model_input": {"chunks": chunks}, "loss_fn_inputs": {"target_tokens": targets}}
    inner = {"data": [datum], "loss_fn": "cross_entropy"}
    for path, key, number in (("forward", "forward_input", 1), ("forward_backward", "forward_backward_input", 2)):
        answer = await shared.done(path, {"model_id": model_id, "seq_id": number, key: inner})
        assert answer["category"] == "user"
        assert f"reads text only, not {kind!r} chunks" in answer["error"]
    sampled = await shared.done("asample", {"base_model": "tiny", "prompt": {"chunks": chunks}})
    assert sampled["category"] == "user"
    assert "reads text only" in sampled["error"]
    # The lane goes on, and nothing of the failed passes is left.
    step = await shared.done("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": {}})
    assert step["metrics"]["grad_norm"] == 0.0
    await shared.pass_result(kit.message(model_id, 4, [kit.datum(3, 1)]))


async def test_a_number_belongs_to_one_request_of_any_kind(shared, kit):
    """The same body again is the same future, whatever was done in between; another kind or body is refused."""
    await shared.session()
    model_id = await shared.model()
    inner = {
        "data": [{"model_input": {"chunks": [{"tokens": [1]}]}, "loss_fn_inputs": {"target_tokens": {"data": [2]}}}]
    }
    inner["loss_fn"] = "cross_entropy"
    bodies = {
        "forward": {"model_id": model_id, "seq_id": 1, "forward_input": inner},
        "forward_backward": {"model_id": model_id, "seq_id": 2, "forward_backward_input": inner},
        "optim_step": {"model_id": model_id, "seq_id": 3, "adam_params": {"learning_rate": 0.1}},
        "save_weights": {"model_id": model_id, "seq_id": 4, "path": "one"},
        "save_weights_for_sampler": {"model_id": model_id, "seq_id": 5, "path": "one"},
    }
    first = {path: (await shared.ask(path, body))["request_id"] for path, body in bodies.items()}
    assert len(set(first.values())) == 5
    results = {path: (await shared.final(request_id)).json() for path, request_id in first.items()}
    assert not any("error" in result for result in results.values())
    for path, body in bodies.items():
        assert (await shared.ask(path, body))["request_id"] == first[path]
        assert (await shared.final(first[path])).json() == results[path]
        for other, other_body in bodies.items():
            refused = await shared.post(other, {**other_body, "seq_id": body["seq_id"]})
            assert refused.status_code == (200 if other == path else 400)
            if other != path:
                assert f"seq_id {body['seq_id']} of model {model_id!r} was already used" in refused.json()["detail"]


async def test_optimizer_parameters_by_family(shared):
    await shared.session()
    model_id = await shared.model()
    body = {"model_id": model_id, "seq_id": 1, "optimizer_params": {"type": "adamw", "learning_rate": 0.5, "eps": None}}
    assert "metrics" in await shared.done("optim_step", body)
    bad = {"model_id": model_id, "seq_id": 2, "optimizer_params": {"type": "adamw", "beta1": 2.0}}
    answer = await shared.done("optim_step", bad)
    assert answer["category"] == "user"
    assert "beta1" in answer["error"]
