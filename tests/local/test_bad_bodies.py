"""Invalid bodies: refused with the reason; never a crash, and never a failure of the service."""

import copy
import json

import pytest

pytestmark = pytest.mark.asyncio(loop_scope="module")

CHUNKS = ("data", 0, "model_input", "chunks")
INPUTS = ("data", 0, "loss_fn_inputs")
TARGETS = (*INPUTS, "target_tokens")
VALID = {
    "data": [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]},
            "loss_fn_inputs": {
                "target_tokens": {"data": [2, 3], "dtype": "int64", "shape": [2]},
                "weights": {"data": [1.0, 1.0], "dtype": "float32"},
            },
        }
    ],
    "loss_fn": "cross_entropy",
}


def changed(path, value):
    """VALID with one value replaced."""
    body = copy.deepcopy(VALID)
    at = body
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return body


def sparse(**fields):
    tensor = {"data": [1, 2], "dtype": "int64", "shape": [3, 4]}
    tensor |= {"sparse_crow_indices": [0, 1, 1, 2], "sparse_col_indices": [0, 3], **fields}
    return changed(TARGETS, tensor)


INVALID_PASSES = [
    (None, "valid dictionary"),
    ({"data": 3, "loss_fn": "cross_entropy"}, "data: "),
    ({"data": []}, "loss_fn: Field required"),
    ({"data": [], "loss_fn": "cross_entropy"}, "has no data"),
    (changed(("data", 0, "model_input"), 3), "model_input is not a JSON object"),
    (changed(CHUNKS, 7), "chunks must be a list"),
    (changed(CHUNKS, [3]), "a chunk is not an object"),
    (changed(CHUNKS, [{}]), "none of the fields tokens"),
    (changed(CHUNKS, [{"tokens": [1.5]}]), "not whole numbers"),
    (changed(CHUNKS, [{"tokens": ["a"]}]), "not whole numbers"),
    (changed(CHUNKS, [{"tokens": [[1]]}]), "flat list"),
    (changed(INPUTS, [1]), "loss_fn_inputs is not a JSON object"),
    (changed((*TARGETS, "data"), [None]), "target_tokens contains values that are not whole numbers"),
    (changed((*TARGETS, "dtype"), []), "dtype [] is not one of"),
    (changed((*TARGETS, "dtype"), "int8"), "dtype 'int8' is not one of"),
    (changed((*TARGETS, "shape"), 2), "shape must be a list"),
    (changed((*TARGETS, "shape"), ["2"]), "shape must be a list"),
    (changed((*TARGETS, "shape"), [2.0]), "shape must be a list"),
    (changed((*TARGETS, "shape"), [7]), "do not fill the shape [7]"),
    (changed((*INPUTS, "weights", "data"), [1e300, 1.0]), "does not fit into float32"),
    (sparse(sparse_crow_indices=[0, 1, 0, 1]), "sparse indices do not fit"),
    (sparse(sparse_col_indices=[0, 9]), "sparse indices do not fit"),
    (sparse(shape=[3]), "needs a shape of two dimensions"),
    (sparse(shape=[3, 2**40]), "more columns than the vocabulary has tokens"),
]


@pytest.mark.parametrize(("inner", "named"), INVALID_PASSES)
async def test_an_invalid_pass_fails_its_future_and_the_model_goes_on(shared, inner, named):
    """A refused chunk makes the official client wait forever (protocol, "Chunking")."""
    await shared.session()
    model_id = await shared.model()
    body = {"model_id": model_id, "seq_id": 1, "forward_backward_input": inner}
    failure = await shared.done("forward_backward", body)
    assert failure["category"] == "user"
    assert named in failure["error"]
    after = {**body, "seq_id": 2, "forward_backward_input": VALID}
    assert "loss:sum" in (await shared.done("forward_backward", after))["metrics"]


async def test_a_loss_that_json_cannot_hold_is_left_out_of_the_json_result(shared):
    await shared.session()
    endless = changed((*INPUTS, "weights", "data"), [float("inf"), 1.0])
    raw = json.dumps({"model_id": await shared.model(), "seq_id": 1, "forward_input": endless})
    submitted = await shared.http.post("/api/v1/forward", content=raw)
    answer = await shared.final(submitted.json()["request_id"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["metrics"] == {}
    assert len(answer.json()["loss_fn_outputs"]) == 1


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"user_metadata": {"a": "\ud83d"}}, "half a character"), ({"ttl_seconds": 10**12}, "ttl_seconds")],
)
async def test_a_refused_save_spends_its_number(shared, fields, reason):
    await shared.session()
    body = {"model_id": await shared.model(), "seq_id": 1, "path": "kept"}
    answer = await shared.http.post("/api/v1/save_weights", content=json.dumps({**body, **fields}))
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    valid = {"user_metadata": {"a": "\U0001f600"}, "ttl_seconds": 60}
    assert "path" in await shared.done("save_weights", {**body, "seq_id": 2, **valid})


@pytest.mark.parametrize(
    ("path", "body", "reason"),
    [
        ("create_session", '{"display_name": "\\ud83d"}', "half a character"),
        *[
            ("create_session", f'{{"user_metadata": {{"a": [{number}]}}}}', "cannot represent")
            for number in ("NaN", "-Infinity", "1e999")
        ],
        (
            "sessions/search",
            '{"cursor": {"last_created_at": "0001-01-01T00:00:00+23:59", "last_session_id": "x"}}',
            "calendar",
        ),
        ("sessions/search", '{"limit": 0}', "limit"),
        ("sessions/search", '{"limit": 201}', "limit"),
        ("sessions/search", '{"statuses": [{"type": "odd"}]}', "statuses.0.type"),
        ("sessions/search", '{"display_name": ""}', "display_name"),
    ],
)
async def test_values_that_cannot_be_used_are_refused(shared, path, body, reason):
    answer = await shared.http.post(f"/api/v1/{path}", content=body)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]


@pytest.mark.parametrize("content", [b"{", b"[1]", b"\xff"])
async def test_bodies_other_than_json_objects_are_refused(shared, content):
    assert (await shared.http.post("/api/v1/create_session", content=content)).status_code == 400


async def test_a_request_id_of_any_length_is_unknown(shared):
    await shared.session()
    submitted = await shared.ask("optim_step", {"model_id": await shared.model(), "seq_id": 1})
    mark = submitted["request_id"].partition("-")[0]
    assert (await shared.result(f"{mark}-{'9' * 5000}")).status_code == 404


async def test_half_a_character_in_the_name_of_an_input_is_replaced(shared):
    await shared.session()
    inner = changed((*INPUTS, "\ud800"), 1)
    body = json.dumps({"model_id": await shared.model(), "seq_id": 1, "forward_input": inner})
    submitted = await shared.http.post("/api/v1/forward", content=body)
    answer = await shared.final(submitted.json()["request_id"])
    assert answer.status_code == 200
    assert "data[0]: \ufffd is not" in answer.json()["error"]


async def test_targets_of_a_sample_without_numbers(shared):
    targets = {"dtype": "int64", "shape": [1, 1], "sparse_crow_indices": [0, 0]}
    body = {"base_model": "tiny", "prompt": {"chunks": [{"tokens": [1, 2]}]}, "target_prompt_logprobs": targets}
    answer = await shared.done("asample", {**body, "sampling_params": {"max_tokens": 1}})
    assert "error" not in answer or answer["category"] == "user"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt_logprobs_last_n": 1}, "needs prompt_logprobs"),
        ({"prompt_logprobs": True, "prompt_logprobs_last_n": 2}, "prompt_logprobs_last_n=2 must be between 1 and 1"),
        ({"prompt_alt_tokens_k": 259}, "prompt_alt_tokens_k=259 must be between 0 and 258"),
        ({"topk_sample_logprobs": 259}, "topk_sample_logprobs=259 must be between 0 and 258"),
        ({"sampling_params": {"stop": [""]}}, "stop contains an empty text"),
        ({"target_prompt_logprobs": {"data": [1.0], "dtype": "float32", "shape": [1, 1]}}, "dtype must be int64"),
        ({"target_prompt_logprobs": {"data": [999], "dtype": "int64", "shape": [1, 1]}}, "ids must be in -1..257"),
    ],
)
async def test_bad_sampling_options_fail_the_future(shared, fields, message):
    body = {"base_model": "tiny", "prompt": {"chunks": [{"tokens": [1, 2]}]}, **fields}
    answer = await shared.done("asample", body)
    assert message in answer["error"]
    assert answer["category"] == "user"
