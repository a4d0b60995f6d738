"""Sampling over HTTP: sessions, forms of stop, optional tables."""

import math

import numpy as np
import pytest
import torch

from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
PROTOBUF = "application/x-protobuf"


async def test_forms_of_stop(client):
    """With a seed all forms draw the same tokens up to where they stop."""
    await client.session()
    free = await draw(client, stop=[])
    assert free["stop_reason"] == "length"
    token = free["tokens"][4]
    until = free["tokens"][: free["tokens"].index(token) + 1]
    stopped = await draw(client, stop=[token])
    assert (stopped["tokens"], stopped["stop_reason"]) == (until, "stop")
    assert stopped["logprobs"] == free["logprobs"][: len(until)]
    byte = next(token for token in free["tokens"] if token < 128)
    until = free["tokens"][: free["tokens"].index(byte) + 1]
    for stop in (chr(byte), [chr(byte)], [chr(byte), "never seen"]):
        assert (await draw(client, stop=stop))["tokens"] == until
    missing = await draw(client)
    assert missing["tokens"] == free["tokens"] or missing["tokens"][-1] == 257


async def draw(client, **params):
    body = {
        "base_model": "tiny",
        "prompt": {"chunks": [{"tokens": [256, 72]}]},
        "sampling_params": {"max_tokens": 30, "seed": 5, **params},
    }
    return (await client.done("asample", body))["sequences"][0]


async def test_end_of_text_stops_unless_switched_off(client):
    """The network is nudged to end at once: its end token gets all the weight."""
    head = client.service.core.engine.model.network.lm_head
    bias = torch.zeros(258)
    bias[257] = 1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    stopped = await draw(client)
    assert (stopped["tokens"], stopped["stop_reason"]) == ([257], "stop")
    endless = await draw(client, stop=[])
    assert (endless["tokens"], endless["stop_reason"]) == ([257] * 30, "length")


async def test_sampling_sessions_on_the_base_and_on_named_weights(client, kit):
    model_id = await client.model()
    await client.pass_result(kit.message(model_id, 1, [kit.datum(6, 1)]))
    await client.done("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.05}})
    save = {"model_id": model_id, "seq_id": 3, "path": "final", "kind": "snapshot"}
    path = (await client.done("save_weights_for_sampler", save))["path"]
    assert path == f"tinker://{model_id}/sampler_weights/final"
    scores = {}
    for number, weights in enumerate(({"base_model": "tiny"}, {"model_path": path})):
        body = {"session_id": client.session_id, "sampling_session_seq_id": number, **weights}
        sampler_id = (await client.ask("create_sampling_session", body))["sampling_session_id"]
        assert (await client.ask("create_sampling_session", body))["sampling_session_id"] == sampler_id
        described = (await client.http.get(f"/api/v1/samplers/{sampler_id}")).json()
        assert described["base_model"] == "tiny"
        assert described.get("model_path") == weights.get("model_path")
        request = {
            "sampling_session_id": sampler_id,
            "seq_id": 0,
            "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
            "sampling_params": {"max_tokens": 1},
            "prompt_logprobs": True,
        }
        scores[number] = (await client.done("asample", request))["prompt_logprobs"]
        other = await client.post("asample", {**request, "num_samples": 2})
        assert other.status_code == 400
        assert "seq_id number 0" in other.json()["detail"]
    assert scores[0][1:] != scores[1][1:]
    clash = {"session_id": client.session_id, "sampling_session_seq_id": 1, "base_model": "tiny"}
    assert (await client.post("create_sampling_session", clash)).status_code == 400
    for bad, status in (
        ({"model_path": f"tinker://{model_id}/sampler_weights/none"}, 404),
        ({}, 400),
    ):
        body = {"session_id": client.session_id, "sampling_session_seq_id": 9, **bad}
        assert (await client.post("create_sampling_session", body)).status_code == status
    assert (await client.http.get("/api/v1/samplers/unknown")).status_code == 404


async def test_optional_tables_in_both_encodings(client):
    body = {
        "base_model": "tiny",
        "prompt": {"chunks": [{"tokens": [5, 6]}, {"tokens": [7]}]},
        "sampling_params": {"max_tokens": 2, "temperature": 0, "stop": []},
        "prompt_logprobs": True,
        "topk_prompt_logprobs": 2,
        "topk_sample_logprobs": 1,
        "target_prompt_logprobs": {
            "data": [6, 7],
            "dtype": "int64",
            "shape": [2, 3],
            "sparse_crow_indices": [0, 1, 2],
            "sparse_col_indices": [0, 2],
        },
    }
    request_id = (await client.ask("asample", body))["request_id"]
    answer = (await client.final(request_id)).json()
    response = wire.SampleResponse.FromString((await client.final(request_id, accept=PROTOBUF)).content)
    scores = np.frombuffer(response.prompt_logprobs, "<f4")
    # The prompt is 5, 6, 7; asking for 6 at position 1 and for 7 at position 2 gives the prompt's own scores.
    targets = np.frombuffer(response.target_prompt_logprobs.dense, "<f4").reshape(2, 3)
    np.testing.assert_allclose(targets, [[scores[1], 0, 0], [0, 0, scores[2]]], atol=1e-6)
    assert list(response.target_prompt_logprobs.shape) == [2, 3]
    table = response.topk_prompt_logprobs
    assert (table.k, table.length) == (2, 3)
    assert np.frombuffer(table.token_ids, "<i4")[:2].tolist() == [0, 0]
    assert answer["topk_prompt_logprobs"][0] is None
    likeliest = np.frombuffer(table.logprobs, "<f4").reshape(3, 2)[1:]
    assert (likeliest[:, 0] >= likeliest[:, 1]).all()
    assert (likeliest[:, 0] >= scores[1:]).all()
    assert answer["topk_prompt_logprobs"][1][0][1] == pytest.approx(float(likeliest[0, 0]))
    drawn = response.sequences[0]
    greedy = np.frombuffer(drawn.topk_sampled_logprobs.token_ids, "<i4")
    np.testing.assert_array_equal(greedy, np.frombuffer(drawn.tokens, "<i4"))
    assert all(math.isfinite(value) for value in np.frombuffer(drawn.logprobs, "<f4"))


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
async def test_bad_sampling_options_fail_the_future(client, fields, message):
    body = {"base_model": "tiny", "prompt": {"chunks": [{"tokens": [1, 2]}]}, **fields}
    answer = await client.done("asample", body)
    assert message in answer["error"]
    assert answer["category"] == "user"
