"""Bodies that no well-meaning client sends: refused with the reason, never a crash, never the service's fault."""

import copy
import json

import pytest

pytestmark = pytest.mark.asyncio

GOOD_PASS = {
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
    """GOOD_PASS with one place replaced."""
    body = copy.deepcopy(GOOD_PASS)
    at = body["data"][0]
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return body


@pytest.mark.parametrize(
    ("path", "value", "named"),
    [
        (("model_input", "chunks"), 7, "chunks must be a list"),
        (("loss_fn_inputs", "target_tokens", "dtype"), [], "dtype"),
        (("loss_fn_inputs", "target_tokens", "shape"), 2, "shape must be a list"),
        (("loss_fn_inputs", "target_tokens", "shape"), {"a": 1}, "shape must be a list"),
        (("loss_fn_inputs", "target_tokens", "shape"), ["2"], "shape must be a list"),
        (("loss_fn_inputs", "target_tokens", "shape"), [2.0], "shape must be a list"),
        (("loss_fn_inputs", "weights", "data"), [1e300, 1.0], "does not fit into float32"),
    ],
)
async def test_a_malformed_tensor_is_the_users_mistake(client, path, value, named):
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "forward_backward_input": changed(path, value)}
    failure = await client.done("forward_backward", body)
    assert failure["category"] == "user"
    assert named in failure["error"]
    after = await client.done("forward_backward", {**body, "seq_id": 2, "forward_backward_input": GOOD_PASS})
    assert "loss:sum" in after["metrics"]


async def test_a_loss_that_json_cannot_hold_is_left_out_of_the_json_result(client):
    model_id = await client.model()
    endless = changed(("loss_fn_inputs", "weights", "data"), [float("inf"), 1.0])
    raw = json.dumps({"model_id": model_id, "seq_id": 1, "forward_input": endless})
    submitted = await client.http.post("/api/v1/forward", content=raw)
    answer = await client.final(submitted.json()["request_id"])
    assert answer.status_code == 200, answer.text
    assert answer.json()["metrics"] == {}
    assert len(answer.json()["loss_fn_outputs"]) == 1


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"a":' * 100_000])
async def test_a_bottomless_body_is_refused(client, body):
    answer = await client.http.post("/api/v1/create_session", content=body)
    assert answer.status_code == 400
    assert "nested" in answer.json()["detail"]


async def test_half_a_character_is_refused_and_its_number_spent(client):
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "path": "kept", "user_metadata": {"a": "\ud83d"}}
    answer = await client.http.post("/api/v1/save_weights", content=json.dumps(body))
    assert answer.status_code == 422
    assert "half a character" in answer.json()["detail"]
    assert "path" in await client.done("save_weights", {**body, "seq_id": 2, "user_metadata": {"a": "\U0001f600"}})
    session = await client.http.post("/api/v1/create_session", content=b'{"display_name": "\\ud83d"}')
    assert session.status_code == 422


async def test_a_time_to_live_beyond_the_calendar_is_refused(client):
    model_id = await client.model()
    body = {"model_id": model_id, "seq_id": 1, "path": "kept", "ttl_seconds": 10**12}
    answer = await client.post("save_weights", body)
    assert answer.status_code == 422
    assert "ttl_seconds" in answer.json()["detail"]
    assert "path" in await client.done("save_weights", {**body, "seq_id": 2, "ttl_seconds": 60})


async def test_a_request_id_of_any_length_is_unknown(client):
    model_id = await client.model()
    submitted = await client.ask("optim_step", {"model_id": model_id, "seq_id": 1})
    mark = submitted["request_id"].partition("-")[0]
    answer = await client.result(f"{mark}-{'9' * 5000}")
    assert answer.status_code == 404


async def test_numbers_that_json_has_no_form_for_are_refused(client):
    """Python's decoder takes them; an answer that had them could not be written."""
    for number in ("NaN", "Infinity", "-Infinity", "1e999"):
        answer = await client.http.post("/api/v1/create_session", content=f'{{"user_metadata": {{"a": [{number}]}}}}')
        assert answer.status_code == 422
        assert "cannot represent" in answer.json()["detail"]


async def test_half_a_character_in_the_name_of_an_input_is_told_without_it(client):
    model_id = await client.model()
    body = json.dumps({"model_id": model_id, "seq_id": 1, "forward_input": changed(("loss_fn_inputs", "\ud800"), {})})
    submitted = await client.http.post("/api/v1/forward", content=body.replace('"\\ud800": {}', '"\\ud800": 1'))
    answer = await client.final(submitted.json()["request_id"])
    assert answer.status_code == 200
    assert "data[0]: ?" in answer.json()["error"]


async def test_targets_of_a_sample_without_numbers(client):
    targets = {"dtype": "int64", "shape": [1, 1], "sparse_crow_indices": [0, 0]}
    body = {"base_model": "tiny", "prompt": {"chunks": [{"tokens": [1, 2]}]}, "target_prompt_logprobs": targets}
    answer = await client.done("asample", {**body, "sampling_params": {"max_tokens": 1}})
    assert "error" not in answer or answer["category"] == "user"


async def test_a_moment_outside_the_calendar_is_refused(client):
    cursor = {"last_created_at": "0001-01-01T00:00:00+23:59", "last_session_id": "x"}
    answer = await client.post("sessions/search", {"cursor": cursor})
    assert answer.status_code == 422
    assert "calendar" in answer.json()["detail"]
