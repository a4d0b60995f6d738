"""The protocol, written by hand: both encodings, order, repeats, refusals, listings."""

import numpy as np
import pytest

from tinkex_py.local import LocalOptions
from tinkex_py.local.data import EncodedDatum
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
PROTOBUF = "application/x-protobuf"


def json_pass(model_id, seq_id, datum, key="forward_backward_input", loss_fn="cross_entropy", **extra):
    targets = datum.inputs["target_tokens"]
    inputs = {"target_tokens": {"data": targets.reshape(-1).tolist(), "dtype": "int64", "shape": list(targets.shape)}}
    chunks = [{"type": "encoded_text", "tokens": datum.tokens.tolist()}]
    data = [{"model_input": {"chunks": chunks}, "loss_fn_inputs": inputs}]
    return {"model_id": model_id, "seq_id": seq_id, key: {"data": data, "loss_fn": loss_fn, **extra}}


async def test_config_health_and_capabilities(client):
    config = await client.ask("client/config", {"sdk_version": "0"})
    assert config == {
        "parallel_fwdbwd_chunks": False,
        "use_pyqwest_transport": False,
        "proto_write_fwdbwd": True,
        "fwd_via_fwdbwd": True,
        "sample_use_retrieve_futures": True,
        "gradient_products": True,
    }
    assert await client.ask("client/dynamic_config", {}) == {}
    assert await client.ask("telemetry", {"events": []}) == {"status": "accepted"}
    assert (await client.http.get("/api/v1/healthz")).json() == {"status": "ok"}
    models = (await client.http.get("/api/v1/get_server_capabilities")).json()["supported_models"]
    assert models[0]["model_name"] == "tiny"
    assert models[0]["max_context_length"] == 2048


async def test_both_encodings_give_the_same_pass(client, kit):
    model_id = await client.model()
    data = [kit.datum(5, 1), kit.datum(3, 2)]
    output = await client.pass_result(kit.message(model_id, 1, data, forward_only=True))
    arrays = kit.unpack(output)
    assert [array.shape for array in arrays] == [(5,), (3,)]
    assert len(output.loss_fn_outputs) == 1
    assert list(output.metrics) == ["loss:sum"]
    # float64 sum of what came back, against the reported loss.
    assert output.metrics["loss:sum"] == pytest.approx(-float(sum(a.astype("f8").sum() for a in arrays)), rel=1e-6)
    forward = await client.done("forward", json_pass(model_id, 2, data[0], "forward_input"))
    backward = await client.done("forward_backward", json_pass(model_id, 3, data[0]))
    for answer in (forward, backward):
        entry = answer["loss_fn_outputs"][0]["logprobs"]
        assert (entry["dtype"], entry["shape"]) == ("float32", [5])
        np.testing.assert_allclose(entry["data"], arrays[0], atol=2e-5)


async def test_matrix_targets_and_mixed_shapes_on_the_wire(client, kit):
    model_id = await client.model()
    matrix = EncodedDatum(np.arange(4), {"target_tokens": np.arange(8).reshape(4, 2)})
    output = await client.pass_result(kit.message(model_id, 1, [matrix, matrix, kit.datum(3, 1)]))
    assert [array.shape for array in kit.unpack(output)] == [(4, 2), (4, 2), (3,)]
    assert [record.num_datums for record in output.loss_fn_outputs] == [2, 1]


async def test_the_loss_of_each_token_in_both_encodings(client, kit):
    """With q = 0 and A = -1 the loss of each token is exp(p)."""
    model_id = await client.model()
    data = [kit.datum(n, n, logprobs=np.zeros(n), advantages=-np.ones(n)) for n in (3, 5)]
    request_id = (await client.send_pass(kit.message(model_id, 1, data, "importance_sampling"))).json()["request_id"]
    output = wire.ForwardBackwardOutput.FromString((await client.final(request_id, accept=PROTOBUF)).content)
    logprobs, losses = kit.unpack(output), kit.unpack(output, "elementwise_loss")
    assert [array.shape for array in losses] == [(3,), (5,)]
    for p, loss in zip(logprobs, losses, strict=True):
        np.testing.assert_allclose(loss, np.exp(p), rtol=1e-5)
    assert output.metrics["loss:sum"] == pytest.approx(float(sum(loss.sum() for loss in losses)), rel=1e-5)
    assert output.metrics["tokens:sum"] == 8
    # Two chunks of one call must merge: one colon, a suffix that adds up.
    assert all(name.count(":") == 1 and name.endswith(":sum") for name in output.metrics)
    answer = (await client.final(request_id)).json()
    assert answer["metrics"] == dict(output.metrics)
    entries = [entry["elementwise_loss"] for entry in answer["loss_fn_outputs"]]
    assert [entry["shape"] for entry in entries] == [[3], [5]]
    np.testing.assert_allclose(entries[1]["data"], losses[1])


async def test_numbers_decide_the_order_not_arrival(client, kit):
    """optim_step (3) and forward (4) arrive before the backward passes (2, 1) that they depend on."""
    twin, model_id = await client.model(0), await client.model(1)
    first, second = kit.datum(5, 1), kit.datum(6, 2)
    adam = {"learning_rate": 0.05}
    await client.pass_result(kit.message(twin, 1, [first]))
    await client.pass_result(kit.message(twin, 2, [second]))
    await client.done("optim_step", {"model_id": twin, "seq_id": 3, "adam_params": adam})
    expected = await client.pass_result(kit.message(twin, 4, [first], forward_only=True))

    step = await client.ask("optim_step", {"model_id": model_id, "seq_id": 3, "adam_params": adam})
    last = (await client.send_pass(kit.message(model_id, 4, [first], forward_only=True))).json()
    await client.send_pass(kit.message(model_id, 2, [second]))
    core = client.service.core
    assert core.results.find(step["request_id"]).note() == "seq_id 3 waits for seq_id 1, not received yet"
    assert core.results.find(last["request_id"]).outcome is None
    await client.send_pass(kit.message(model_id, 1, [first]))
    answer = await client.final(last["request_id"], accept=PROTOBUF)
    assert wire.ForwardBackwardOutput.FromString(answer.content).metrics == expected.metrics


async def test_a_poll_without_a_result_says_why(run_service, kit):
    async with run_service(LocalOptions(hold_seconds=0.05)) as client:
        model_id = await client.model()
        later = (await client.send_pass(kit.message(model_id, 2, [kit.datum(3, 1)]))).json()["request_id"]
        poll = await client.result(later)
        assert poll.status_code == 408
        assert poll.json() == {
            "type": "try_again",
            "queue_state": "paused_capacity",
            "queue_state_reason": "seq_id 2 waits for seq_id 1, not received yet",
        }
        # What has come is not named, and a far number does not name a thousand.
        await client.ask("optim_step", {"model_id": model_id, "seq_id": 4, "adam_params": {}})
        far = await client.ask("optim_step", {"model_id": model_id, "seq_id": 2**60, "adam_params": {}})
        reason = (await client.result(far["request_id"])).json()["queue_state_reason"]
        assert reason == f"seq_id {2**60} waits for seq_id 1, 3, 5 and later ones, not received yet"
        await client.ask("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
        assert (await client.final(later)).status_code == 200
        reason = (await client.result(far["request_id"])).json()["queue_state_reason"]
        assert "waits for seq_id 3, 5, 6 and later ones" in reason


async def test_a_repeat_gets_the_first_answer_and_is_done_once(client, kit):
    model_id = await client.model()
    message = kit.message(model_id, 1, [kit.datum(4, 1)])
    first = (await client.send_pass(message)).json()["request_id"]
    assert (await client.send_pass(message)).json()["request_id"] == first
    results = [(await client.final(first, accept=PROTOBUF)).content for _ in range(3)]
    assert len(set(results)) == 1
    assert (await client.send_pass(message)).json()["request_id"] == first
    other = await client.send_pass(kit.message(model_id, 1, [kit.datum(4, 2)]))
    assert other.status_code == 400
    assert "seq_id 1" in other.json()["detail"]
    assert "other content" in other.json()["detail"]
    kind = await client.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    assert kind.status_code == 400
    step = await client.done("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.0}})
    twin = await client.model(1)
    await client.pass_result(kit.message(twin, 1, [kit.datum(4, 1)]))
    once = await client.done("optim_step", {"model_id": twin, "seq_id": 2, "adam_params": {"learning_rate": 0.0}})
    assert step["metrics"] == once["metrics"]


async def test_a_refused_number_is_spent(client, kit):
    model_id = await client.model()
    refused = await client.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {"beta1": "x"}})
    assert refused.status_code == 422
    assert "adam_params.beta1" in refused.json()["detail"]
    again = await client.post("optim_step", {"model_id": model_id, "seq_id": 1, "adam_params": {}})
    assert again.status_code == 400
    assert "spent" in again.json()["detail"]
    output = await client.pass_result(kit.message(model_id, 2, [kit.datum(3, 1)]))
    assert output.metrics["loss:sum"] > 0


async def test_malformed_tensors_fail_the_future(client, kit):
    model_id = await client.model()
    broken = [kit.message(model_id, number, [kit.datum(3, 1)]) for number in (1, 2, 3, 4)]
    broken[0].data[0].loss_fn_inputs["target_tokens"].dense = b"123"
    broken[1].data[0].loss_fn_inputs["target_tokens"].shape[:] = [7]
    broken[2].data[0].loss_fn_inputs["target_tokens"].dtype = wire.DTYPE_BFLOAT16
    broken[3].data[0].model_input.append(wire.Chunk(image=wire.ImageChunk(data=b"x", format="png")))
    expected = [
        "3 bytes are not a whole number",
        "do not fill the shape [7]",
        "dtype 4",
        "reads text only, not 'image'",
    ]
    for message, text in zip(broken, expected, strict=True):
        answer = await client.final((await client.send_pass(message)).json()["request_id"])
        assert text in answer.json()["error"]
        assert answer.json()["category"] == "user"
    garbage = await client.http.post(
        "/api/v1/forward_backward", content=b"\xff\xff", headers={"Content-Type": PROTOBUF}
    )
    assert garbage.status_code == 400


async def test_unknown_things_are_404_and_name_themselves(client, kit):
    await client.session()
    probe = await client.send_pass(kit.message("probe-nonexistent", 1, [], forward_only=True))
    assert (probe.status_code, probe.json()) == (404, {"detail": "model 'probe-nonexistent' not found"})
    assert (await client.result("nope")).status_code == 404
    assert (await client.post("no_such_route")).json()["detail"].startswith("POST /api/v1/no_such_route")
    assert (await client.post("get_info", {"model_id": "x"})).status_code == 404
    assert (await client.post("weights_info", {"tinker_path": "tinker://a/weights/b"})).status_code == 404
    lost = await client.post("create_model", {"session_id": "gone", "model_seq_id": 0, "base_model": "tiny"})
    assert lost.status_code == 404
    sampler = await client.post(
        "create_sampling_session",
        {"session_id": client.session_id, "sampling_session_seq_id": 0, "base_model": "huge"},
    )
    assert sampler.status_code == 400
    assert "'huge' is not served here. Served: 'tiny'" in sampler.json()["detail"]


async def test_an_unknown_base_model_fails_its_creation_with_the_names_there_are(client):
    await client.session()
    body = {"session_id": client.session_id, "model_seq_id": 0, "base_model": "huge", "lora_config": {"rank": 8}}
    failed = await client.done("create_model", body)
    assert failed == {"error": "base model 'huge' is not served here. Served: 'tiny'", "category": "user"}
    body.update(model_seq_id=1, base_model="tiny", optimizer_config={"type": "dimuon"})
    assert "Supported: 'adamw'" in (await client.done("create_model", body))["error"]


async def test_create_model_is_idempotent_and_info_describes_it(client):
    model_id = await client.model(lora_config=None, train_mlp=False)
    assert model_id == f"{client.session_id}:train:0"
    assert await client.model(train_mlp=False, lora_config=None) == model_id
    info = await client.ask("get_info", {"model_id": model_id})
    assert info["model_data"]["model_name"] == "tiny"
    assert info["model_data"]["arch"] == "llama"
    assert (info["is_lora"], info["lora_rank"]) == (True, 8)


async def test_save_load_and_sample_over_the_wire(client, kit):
    model_id = await client.model()
    datum = kit.datum(6, 1)
    await client.pass_result(kit.message(model_id, 1, [datum]))
    await client.done("optim_step", {"model_id": model_id, "seq_id": 2, "adam_params": {"learning_rate": 0.05}})
    saved = await client.done("save_weights", {"model_id": model_id, "seq_id": 3, "path": "one", "overwrite": False})
    assert saved["path"] == f"tinker://{model_id}/weights/one"
    taken = await client.done("save_weights", {"model_id": model_id, "seq_id": 4, "path": "one", "overwrite": False})
    assert "exists already" in taken["error"]
    expected = await client.pass_result(kit.message(model_id, 5, [datum], forward_only=True))
    body = {"session_id": client.session_id, "model_seq_id": 1, "path": saved["path"], "optimizer": True}
    loaded = await client.done("load_weights", body)
    assert loaded["model_id"] == f"{client.session_id}:train:1"
    again = await client.pass_result(kit.message(loaded["model_id"], 1, [datum], forward_only=True))
    assert again.metrics == expected.metrics
    old_way = await client.model(2)
    await client.done("load_weights", {"model_id": old_way, "seq_id": 1, "path": saved["path"], "optimizer": False})
    again = await client.pass_result(kit.message(old_way, 2, [datum], forward_only=True))
    assert again.metrics == expected.metrics

    body = {"model_id": model_id, "seq_id": 6, "sampling_session_seq_id": 0, "kind": "snapshot"}
    sampler_id = (await client.done("save_weights_for_sampler", body))["sampling_session_id"]
    described = (await client.http.get(f"/api/v1/samplers/{sampler_id}")).json()
    assert described == {"sampler_id": sampler_id, "base_model": "tiny"}
    ids = [*datum.tokens.tolist(), int(datum.inputs["target_tokens"][-1])]
    request = {
        "sampling_session_id": sampler_id,
        "seq_id": 3 * 10**18,
        "num_samples": 2,
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": ids}]},
        "sampling_params": {"max_tokens": 3, "temperature": 0.0, "stop": []},
        "prompt_logprobs": True,
    }
    submitted = await client.ask("asample", request)
    assert len(set(submitted["sample_sequence_ids"])) == 2
    assert (await client.ask("asample", request))["request_id"] == submitted["request_id"]
    answer = (await client.final(submitted["request_id"])).json()
    assert answer["prompt_logprobs"][0] is None
    np.testing.assert_allclose(answer["prompt_logprobs"][1:], kit.unpack(expected)[0], atol=1e-4)
    assert [len(sequence["tokens"]) for sequence in answer["sequences"]] == [3, 3]
    binary = await client.result(submitted["request_id"], accept=PROTOBUF)
    response = wire.SampleResponse.FromString(binary.content)
    assert np.frombuffer(response.sequences[0].tokens, "<i4").tolist() == answer["sequences"][0]["tokens"]
    assert np.isnan(np.frombuffer(response.prompt_logprobs, "<f4")[0])


async def test_listings_and_what_can_be_done_to_checkpoints(client, kit):
    model_id = await client.model()
    for number, name in enumerate(("one", "two"), start=1):
        await client.done("save_weights", {"model_id": model_id, "seq_id": number, "path": name})
    await client.done("save_weights_for_sampler", {"model_id": model_id, "seq_id": 3, "path": "one"})
    await client.done("save_weights_for_sampler", {"model_id": model_id, "seq_id": 4, "sampling_session_seq_id": 0})
    runs = (await client.http.get("/api/v1/training_runs?limit=5")).json()
    assert runs["cursor"] == {"offset": 0, "limit": 5, "total_count": 1}
    assert runs["training_runs"][0]["last_checkpoint"]["checkpoint_id"] == "weights/two"
    run = (await client.http.get(f"/api/v1/training_runs/{model_id}?access_scope=owned")).json()
    assert run == runs["training_runs"][0]
    listed = (await client.http.get(f"/api/v1/training_runs/{model_id}/checkpoints")).json()["checkpoints"]
    assert [item["checkpoint_id"] for item in listed] == ["sampler_weights/one", "weights/two", "weights/one"]
    assert listed[0]["checkpoint_type"] == "sampler"
    page = (await client.http.get("/api/v1/checkpoints?limit=1&offset=1")).json()
    assert [item["checkpoint_id"] for item in page["checkpoints"]] == ["weights/two"]
    assert (await client.http.get("/api/v1/checkpoints?limit=x")).status_code == 422
    info = await client.ask("weights_info", {"tinker_path": listed[1]["tinker_path"]})
    assert (info["base_model"], info["lora_rank"], info["train_mlp"]) == ("tiny", 8, True)
    where = f"/api/v1/training_runs/{model_id}/checkpoints/weights/two"
    assert (await client.http.put(f"{where}/ttl", json={"ttl_seconds": 3600})).status_code == 200
    changed = (await client.http.get(f"/api/v1/training_runs/{model_id}/checkpoints")).json()["checkpoints"]
    assert "expires_at" in changed[1]
    assert (await client.http.delete(where)).status_code == 200
    assert (await client.http.delete(where)).status_code == 404
    session = (await client.http.get(f"/api/v1/sessions/{client.session_id}")).json()
    assert session["training_run_ids"] == [model_id]
    assert session["sampler_ids"] == [f"{client.session_id}:sample:0"]
    assert (await client.http.get("/api/v1/sessions")).json()["sessions"] == [client.session_id]


async def test_unloading_fails_what_still_waits_for_a_missing_number(client, kit):
    model_id = await client.model()
    waiting = (await client.send_pass(kit.message(model_id, 2, [kit.datum(2, 1)]))).json()["request_id"]
    assert (await client.done("unload_model", {"model_id": model_id}))["model_id"] == model_id
    answer = (await client.final(waiting)).json()
    assert answer == {"error": f"model {model_id!r} is not loaded", "category": "user"}
    assert (await client.post("unload_model", {"model_id": model_id})).status_code == 404
    assert (await client.post("get_info", {"model_id": model_id})).status_code == 404


async def test_what_the_embedded_service_does_not_offer_is_said(client):
    model_id = await client.model()
    muon = {"type": "dimuon", "learning_rate": 0.1}
    step = await client.done("optim_step", {"model_id": model_id, "seq_id": 1, "optimizer_params": muon})
    assert "'dimuon' is not supported" in step["error"]
    nameless = await client.done("save_weights", {"model_id": model_id, "seq_id": 2})
    assert "needs a name" in nameless["error"]
    neither = await client.done("save_weights_for_sampler", {"model_id": model_id, "seq_id": 3})
    assert "needs a name in `path`, or sampling_session_seq_id" in neither["error"]
    assert (await client.post("load_weights", {"path": "x"})).status_code == 422


async def test_a_cancelled_future_is_forgotten(client, kit):
    model_id = await client.model()
    request_id = (await client.send_pass(kit.message(model_id, 1, [kit.datum(2, 1)]))).json()["request_id"]
    await client.final(request_id)
    assert await client.ask("cancel_future", {"request_id": request_id}) == {}
    assert (await client.result(request_id)).status_code == 410


async def test_a_finished_session_frees_its_models_and_ends_heartbeats(client, kit):
    model_id = await client.model()
    assert (await client.post("session_heartbeat", {"session_id": client.session_id})).status_code == 200
    finish = f"sessions/{client.session_id}/finish"
    for _ in range(2):
        assert (await client.post(finish, {"reason": {"type": "success"}, "detail": None})).status_code == 200
    assert (await client.post("session_heartbeat", {"session_id": client.session_id})).status_code == 410
    gone = await client.send_pass(kit.message(model_id, 1, [kit.datum(2, 1)]))
    assert gone.status_code == 404
    assert "create a new training client from its last checkpoint" in gone.json()["detail"]


async def test_a_restart_reports_what_is_lost(run_service, kit, tmp_path):
    options = LocalOptions(state_dir=tmp_path)
    async with run_service(options) as client:
        model_id = await client.model()
        path = (await client.done("save_weights", {"model_id": model_id, "seq_id": 1, "path": "x"}))["path"]
        old = (await client.ask("save_weights", {"model_id": model_id, "seq_id": 2, "path": "y"}))["request_id"]
        await client.final(old)
        session_id = client.session_id
    async with run_service(options) as client:
        assert (await client.post("session_heartbeat", {"session_id": session_id})).status_code == 200
        gone = await client.send_pass(kit.message(model_id, 3, [kit.datum(2, 1)]))
        assert gone.status_code == 404
        assert "unsaved weights and gradients are gone" in gone.json()["detail"]
        assert (await client.result(old)).status_code == 404
        await client.session()
        body = {"session_id": client.session_id, "model_seq_id": 0, "path": path, "optimizer": True}
        assert "error" not in await client.done("load_weights", body)


async def test_forgotten_results_are_410_not_404(run_service, kit):
    async with run_service(LocalOptions(max_results=2)) as client:
        model_id = await client.model()
        ids = []
        for number in range(1, 5):
            submitted = await client.send_pass(kit.message(model_id, number, [kit.datum(2, 1)]))
            ids.append(submitted.json()["request_id"])
            await client.final(ids[-1])
        assert (await client.result(ids[0])).status_code == 410
        assert (await client.result(ids[-1])).status_code == 200


async def test_results_that_were_fetched_are_kept_by_bytes(run_service, kit):
    async with run_service(LocalOptions(max_result_bytes=0)) as client:
        model_id = await client.model()
        fetched = (await client.send_pass(kit.message(model_id, 1, [kit.datum(2, 1)]))).json()["request_id"]
        waiting = (await client.send_pass(kit.message(model_id, 2, [kit.datum(2, 1)]))).json()["request_id"]
        for _ in range(2):
            assert (await client.final(fetched)).status_code == 200
        await client.send_pass(kit.message(model_id, 3, [kit.datum(2, 1)]))
        assert (await client.result(fetched)).status_code == 410
        assert (await client.final(waiting)).status_code == 200


async def test_keep_graph_header_saves_the_second_pass(client, kit):
    model_id = await client.model()
    engine = client.service.core.engine
    forward = kit.message(model_id, 1, [kit.datum(5, 1)], forward_only=True)
    await client.pass_result(forward, **{"X-Tinkex-Keep-Graph": "1"})
    before = engine.passes_run
    await client.pass_result(kit.message(model_id, 2, [kit.datum(5, 1, weights=[0.5] * 5)]))
    assert engine.passes_run == before
