"""Checkpoints, optimizers and models of services that are older than ours, or know more."""

from typing import Any

import pytest

from tests.client.data import datum
from tests.client.recorder import Arrival, answering, quick_config
from tests.support.scripted_server import ScriptedServer, answer
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    ConfigError,
    InvalidData,
    InvalidResponse,
    NotFound,
    OptimizerParams,
    RequestFailed,
)

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1)]


async def trained(bench: Any) -> tuple[Any, Any, float]:
    """A model after two steps, its checkpoint, and its loss."""
    training = await bench.train(seed=4)
    for _ in range(2):
        await training.forward_backward(DATA)
        await training.optim_step(AdamParams(learning_rate=1e-2))
    saved = await training.save_state("two-steps")
    return training, saved, (await training.forward(DATA)).metrics["loss:sum"]


async def only_into_a_model(arrival: Arrival, serve: Any, send: Any) -> None:
    """As SkyRL and TuFT: loading cannot create a model."""
    if "model_id" in arrival.json:
        await serve(send)
    else:
        detail = [{"type": "missing", "loc": ["body", "model_id"], "msg": "Field required"}]
        await answering(only_into_a_model.status, {"detail": detail})(arrival, serve, send)


only_into_a_model.status = 422


@pytest.mark.parametrize(("status", "with_optimizer"), [(400, True), (404, False), (405, True), (422, True)])
async def test_from_state_the_old_way_is_the_same(bench, status, with_optimizer, monkeypatch):
    monkeypatch.setattr(only_into_a_model, "status", status)
    training, saved, loss = await trained(bench)
    new_way = await bench.service.create_training_client_from_state(saved.path, with_optimizer=with_optimizer)
    bench.recorder.always["load_weights"] = only_into_a_model
    old_way = await bench.service.create_training_client_from_state(
        saved.path, with_optimizer=with_optimizer, user_metadata={"who": "me"}
    )
    assert old_way.model_id not in (new_way.model_id, training.model_id)
    created = bench.recorder.of("create_model")[-1].json
    assert created["lora_config"]["rank"] == 4
    assert created["user_metadata"] == {"who": "me"}
    loaded = bench.recorder.of("load_weights")[-1].json
    assert (loaded["seq_id"], loaded["optimizer"]) == (1, with_optimizer)
    losses = []
    for client in (new_way, old_way):
        assert (await client.forward(DATA)).metrics["loss:sum"] == pytest.approx(loss, rel=1e-5)
        await client.forward_backward(DATA)
        await client.optim_step(AdamParams(learning_rate=1e-2))
        losses.append((await client.forward(DATA)).metrics["loss:sum"])
    assert losses[0] == losses[1]
    # The state of the optimizer changes the step, so the comparison above can fail.
    other = await bench.service.create_training_client_from_state(saved.path, with_optimizer=not with_optimizer)
    await other.forward_backward(DATA)
    await other.optim_step(AdamParams(learning_rate=1e-2))
    assert (await other.forward(DATA)).metrics["loss:sum"] != pytest.approx(losses[0], rel=1e-6)


@pytest.mark.parametrize("old", [True, False])
async def test_a_checkpoint_that_is_not_there(bench, old):
    training = await bench.train()
    path = f"tinker://{training.model_id}/weights/missing"
    if old:
        bench.recorder.always["load_weights"] = only_into_a_model
    with pytest.raises(NotFound if old else RequestFailed, match="missing"):
        await bench.service.create_training_client_from_state(path)


async def test_invalid_weights_info_is_an_invalid_response(bench):
    _, saved, _ = await trained(bench)
    bench.recorder.always["load_weights"] = only_into_a_model
    bench.recorder.always["weights_info"] = answering(200, {"base_model": "tiny", "lora_rank": 0})
    with pytest.raises(InvalidResponse, match="rank"):
        await bench.service.create_training_client_from_state(saved.path)


async def test_a_server_error_does_not_select_the_old_way(local_bench):
    from tinkex_py import RetryPolicy, ServerError

    bench = local_bench(retry=RetryPolicy(deadline=5.0, max_attempts=2, initial_wait=0.0))
    async with bench.service:
        _, saved, _ = await trained(bench)
        bench.recorder.always["load_weights"] = answering(500)
        with pytest.raises(ServerError):
            await bench.service.create_training_client_from_state(saved.path)
        assert bench.recorder.of("weights_info") == []


async def test_optional_fields_go_only_where_they_are_wanted(bench):
    training, saved, _ = await trained(bench)
    await training.save_weights_for_sampler("sampler")
    await training.save_weights_and_get_sampling_client()
    await bench.service.create_training_client_from_state(saved.path)
    allowed = {
        "create_model": {"session_id", "model_seq_id", "base_model", "lora_config", "type"},
        "optim_step": {"model_id", "seq_id", "adam_params", "type"},
        "save_weights": {"model_id", "seq_id", "path", "type"},
        "load_weights": {"session_id", "model_seq_id", "path", "optimizer", "type"},
    }
    for kind, names in allowed.items():
        for arrival in bench.recorder.of(kind):
            assert set(arrival.json) == names, kind
    named, nameless = (arrival.json for arrival in bench.recorder.of("save_weights_for_sampler"))
    assert set(named) == {"model_id", "seq_id", "path", "type"}
    assert set(nameless) == {"model_id", "seq_id", "sampling_session_seq_id", "type"}


async def test_options_of_saving(bench):
    training = await bench.train()
    first = await training.save_state("name", ttl_seconds=3600, user_metadata={"a": "b"})
    again = await training.save_state("name", overwrite=True)
    assert first.path == again.path
    await training.save_weights_for_sampler("s", ttl_seconds=7200, user_metadata={"c": "d"})
    await training.save_weights_and_get_sampling_client(inflight=True)
    sent = [arrival.json for arrival in bench.recorder.of("save_weights", "save_weights_for_sampler")]
    assert (sent[0]["ttl_seconds"], sent[0]["user_metadata"]) == (3600, {"a": "b"})
    assert sent[1]["overwrite"] is True
    assert (sent[2]["ttl_seconds"], sent[2]["user_metadata"]) == (7200, {"c": "d"})
    assert sent[3]["kind"] == "inflight"
    with pytest.raises(InvalidData, match="inflight"):
        await training.save_weights_and_get_sampling_client("name", inflight=True)


async def test_all_of_adam_arrives(bench):
    training = await bench.train()
    await training.forward_backward(DATA)
    params = AdamParams(learning_rate=0.1, beta1=0.8, beta2=0.9, eps=1e-6, weight_decay=0.01, grad_clip_norm=1.0)
    await training.optim_step(params)
    assert bench.recorder.of("optim_step")[0].json["adam_params"] == {
        "learning_rate": 0.1,
        "beta1": 0.8,
        "beta2": 0.9,
        "eps": 1e-6,
        "weight_decay": 0.01,
        "grad_clip_norm": 1.0,
    }
    await training.optim_step()  # what is off is not sent
    sent = bench.recorder.of("optim_step")[1].json["adam_params"]
    assert sent == {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-12}


async def test_a_result_that_is_held_back_because_it_is_large_is_asked_for(bench):
    training = await bench.train()
    bench.recorder.faults["retrieve_future"] = [
        answering(200, {"status": "complete_metadata", "response_payload_size": 10**6})
    ]
    before = len(bench.recorder.of("retrieve_future"))
    assert (await training.forward(DATA)).num_datums == 1
    polls = [set(arrival.json) for arrival in bench.recorder.of("retrieve_future")[before:]]
    assert polls == [{"request_id"}, {"request_id", "allow_metadata_only"}]


def optimizing_server(server: ScriptedServer) -> AsyncServiceClient:
    """A service with another family of optimizers, which the embedded one does not have."""
    done = answer(json={"request_id": "1"})
    for path in ("create_model", "load_weights", "optim_step"):
        server.script(f"/api/v1/{path}", done)
    server.script("/api/v1/client/config", answer(json={"proto_write_fwdbwd": True}))
    server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
    server.script("/api/v1/sessions/s/finish", answer(json={}))
    server.script("/api/v1/retrieve_future", answer(json={"model_id": "s:train:0", "metrics": {"norm": 2.0}}))
    return AsyncServiceClient(quick_config(server.url))


async def test_another_family_of_optimizers():
    family = {"type": "dimuon", "version": 1}
    async with ScriptedServer() as server, optimizing_server(server) as service:
        training = await service.create_lora_training_client("m", optimizer_config=family)
        result = await training.optim_step(OptimizerParams(type="dimuon", learning_rate=1e-3, beta1=0.9))
        assert result.metrics == {"norm": 2.0}
        await service.create_training_client_from_state(
            "tinker://s/weights/x", optimizer_config=family, weights_access_token="access-PLANTED"
        )
        with pytest.raises(ConfigError, match="optimizer_config"):
            await service.create_training_client_from_state("tinker://a/b/c", with_optimizer=True, optimizer_config={})
        sent = {request.path.rsplit("/", 1)[-1]: request.json() for request in server.requests if request.body}
    assert sent["create_model"]["optimizer_config"] == family
    assert sent["optim_step"]["optimizer_params"] == {
        "type": "dimuon",
        "learning_rate": 1e-3,
        "beta1": 0.9,
        "grad_clip_norm": 0.0,
    }
    assert "adam_params" not in sent["optim_step"]
    assert sent["load_weights"]["optimizer_config"] == family
    assert sent["load_weights"]["weights_access_token"] == "access-PLANTED"


async def test_an_optimizer_that_the_service_does_not_have(bench):
    training = await bench.train()
    await training.forward_backward(DATA)
    with pytest.raises(RequestFailed, match="dimuon"):
        await training.optim_step(OptimizerParams(type="dimuon", learning_rate=1e-3))
    with pytest.raises(RequestFailed, match="dimuon"):
        await bench.train(optimizer_config={"type": "dimuon", "version": 1})


@pytest.mark.parametrize("fields", [{"type": ""}, {"type": "x", "learning_rate": -1.0}, {"type": "x"}])
async def test_optimizer_params_are_checked(fields):
    with pytest.raises(InvalidData):
        OptimizerParams(**{"learning_rate": 1.0, **fields} if fields != {"type": "x"} else fields)


async def test_a_field_that_cannot_be_sent_takes_no_number(bench):
    training = await bench.train()
    with pytest.raises(InvalidData):
        await training.optim_step(OptimizerParams(type="x", learning_rate=1.0, odd=object()))
    await training.forward_backward(DATA)
    assert bench.kinds(training) == ["B"]
