"""JSON as clients before 0.25 write it: nulls spelled out, defaults left out, chunks without a type, `/forward`."""

import pytest

pytestmark = pytest.mark.asyncio

IDS = [256, *b"old habits"]


async def test_the_whole_way_of_a_0_16_client(client, kit):
    """No client/config, no protobuf; from-state through weights_info, create_model and load_weights."""
    session = await client.ask(
        "create_session", {"tags": [], "user_metadata": None, "sdk_version": "0.16.1", "type": None}
    )
    session_id = session["session_id"]
    create = {
        "session_id": session_id,
        "model_seq_id": 0,
        "base_model": "tiny",
        "user_metadata": None,
        "lora_config": {"rank": 8, "seed": 1, "train_unembed": None, "train_mlp": None, "train_attn": None},
        "type": "create_model",
    }
    model_id = (await client.done("create_model", create))["model_id"]
    assert (await client.ask("get_info", {"model_id": model_id, "type": "get_info"}))["lora_rank"] == 8
    datum = {
        "model_input": {"chunks": [{"tokens": IDS[:-1], "type": None}]},
        "loss_fn_inputs": {
            "target_tokens": {"data": IDS[1:], "dtype": "int64", "shape": None},
            "weights": {"data": [1.0] * (len(IDS) - 1), "dtype": "float32", "sparse_crow_indices": None},
            "advantages": None,
        },
    }
    inner = {"data": [datum], "loss_fn": "cross_entropy", "loss_fn_config": None}
    forward = await client.done("forward", {"model_id": model_id, "seq_id": 1, "forward_input": inner})
    logprobs = forward["loss_fn_outputs"][0]["logprobs"]["data"]
    assert forward["metrics"]["loss:sum"] == pytest.approx(-sum(logprobs), rel=1e-5)
    passed = {"model_id": model_id, "seq_id": 2, "forward_backward_input": inner}
    assert (await client.done("forward_backward", passed))["metrics"] == forward["metrics"]
    step = {"model_id": model_id, "seq_id": 3, "adam_params": {}, "type": "optim_step"}
    assert (await client.done("optim_step", step))["metrics"]["grad_norm"] > 0
    saved = await client.done("save_weights", {"model_id": model_id, "path": "one", "seq_id": 4, "ttl_seconds": None})

    info = await client.ask("weights_info", {"tinker_path": saved["path"]})
    assert (info["base_model"], info["is_lora"], info["lora_rank"]) == ("tiny", True, 8)
    second = (await client.done("create_model", {**create, "model_seq_id": 1}))["model_id"]
    load = {"model_id": second, "path": saved["path"], "seq_id": 1, "optimizer": True, "type": "load_weights"}
    assert "error" not in await client.done("load_weights", load)
    again = await client.done("forward", {"model_id": second, "seq_id": 2, "forward_input": inner})
    continued = await client.done("forward", {"model_id": model_id, "seq_id": 5, "forward_input": inner})
    assert again["metrics"] == continued["metrics"]
    assert again["metrics"] != forward["metrics"]

    sampler = {"model_id": model_id, "path": "final", "seq_id": 6}
    path = (await client.done("save_weights_for_sampler", sampler))["path"]
    nameless = {"model_id": model_id, "path": None, "sampling_session_seq_id": 0, "seq_id": 7}
    snapshot = (await client.done("save_weights_for_sampler", nameless))["sampling_session_id"]
    body = {"session_id": session_id, "sampling_session_seq_id": 1, "base_model": None, "model_path": path}
    named = (await client.ask("create_sampling_session", body))["sampling_session_id"]
    ask = {
        "seq_id": 0,
        "num_samples": 1,
        "prompt": {"chunks": [{"tokens": IDS}]},
        "sampling_params": {"max_tokens": None, "seed": 4, "stop": None, "top_k": None},
        "prompt_logprobs": None,
        "topk_prompt_logprobs": None,
        "base_model": None,
        "model_path": None,
    }
    ask["sampling_params"]["max_tokens"] = 6
    drawn = [await client.done("asample", {**ask, "sampling_session_id": one}) for one in (named, snapshot)]
    direct = await client.done("asample", {**ask, "sampling_session_id": None, "seq_id": None, "model_path": path})
    assert drawn[0]["sequences"] == drawn[1]["sequences"] == direct["sequences"]
    assert "prompt_logprobs" not in drawn[0]
    assert (await client.done("unload_model", {"model_id": second, "type": "unload_model"}))["model_id"] == second


async def test_clients_that_can_take_either_encoding_get_protobuf(client, kit):
    """0.18.1 to 0.24 send both types in Accept."""
    model_id = await client.model()
    request_id = (await client.send_pass(kit.message(model_id, 1, [kit.datum(3, 1)]))).json()["request_id"]
    answer = await client.final(request_id, accept="application/x-protobuf, application/json")
    assert answer.headers["content-type"] == "application/x-protobuf"
    step = await client.ask("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": None})
    answer = await client.final(step["request_id"], accept="application/x-protobuf, application/json")
    assert answer.headers["content-type"] == "application/json"


async def test_metadata_only_polls_get_the_whole_result(client, kit):
    """`allow_metadata_only` allows, it does not ask for anything."""
    model_id = await client.model()
    request_id = (await client.send_pass(kit.message(model_id, 1, [kit.datum(3, 1)]))).json()["request_id"]
    await client.final(request_id)
    for allowed in (True, False, None):
        answer = await client.post("retrieve_future", {"request_id": request_id, "allow_metadata_only": allowed})
        assert answer.json()["metrics"]["loss:sum"] > 0
