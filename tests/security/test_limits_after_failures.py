"""Every limit of the service is filled with failures, and is empty afterwards: work that needs all of it succeeds."""

import asyncio
import threading
from contextlib import contextmanager
from typing import Any

import pytest

from tinkex_py.local import LocalOptions
from tinkex_py.local.custom_losses import LOSSES_PER_SESSION, MAX_ELEMENTS

pytestmark = pytest.mark.asyncio
LIMIT = 3
FAILURES = LIMIT + 2


@contextmanager
def busy_engine(client: Any):
    go_on = threading.Event()
    client.service.core.submit(go_on.wait)
    try:
        yield
    finally:
        go_on.set()


def model_body(client: Any, number: int, **changes: Any) -> dict[str, Any]:
    lora = {"rank": 4, "seed": 1, **changes.pop("lora", {})}
    return {
        "session_id": client.session_id,
        "model_seq_id": number,
        "base_model": "tiny",
        "lora_config": lora,
        **changes,
    }


def json_pass(model_id: str, number: int, tokens: Any) -> dict[str, Any]:
    target = {"data": [1], "dtype": "int64", "shape": [1]}
    datum = {"model_input": {"chunks": [{"tokens": tokens}]}, "loss_fn_inputs": {"target_tokens": target}}
    passed = {"data": [datum], "loss_fn": "cross_entropy"}
    return {"model_id": model_id, "seq_id": number, "forward_backward_input": passed}


async def all_models(client: Any) -> None:
    for number in range(100, 100 + LIMIT):
        assert "model_id" in await client.done("create_model", model_body(client, number))
    assert (await client.post("create_model", model_body(client, 200))).status_code == 429


async def failing_models(client: Any, **changes: Any) -> None:
    for number in range(FAILURES):
        answer = await client.done("create_model", model_body(client, number, **changes))
        assert answer["category"] == "user", answer


async def models_of_another_base(client: Any) -> None:
    with busy_engine(client):  # so that what can be told at once takes no place at all
        await failing_models(client, base_model="unknown")


async def models_of_a_large_rank(client: Any) -> None:
    with busy_engine(client):
        await failing_models(client, lora={"rank": 10**9})


async def models_of_a_lost_checkpoint(client: Any) -> None:
    for number in range(FAILURES):
        body = {**model_body(client, number), "path": "tinker://s0:train:0/weights/lost"}
        assert "there is no checkpoint" in (await client.done("load_weights", body))["error"]


async def cancelled_models(client: Any) -> None:
    for number in range(FAILURES):
        with busy_engine(client):
            submitted = await client.ask("create_model", model_body(client, number))
            await client.ask("cancel_future", {"request_id": submitted["request_id"]})
            assert "cancelled" in (await client.final(submitted["request_id"])).text


async def models_that_cannot_be_stored(client: Any) -> None:
    store = client.service.core.store
    original = store.write_run

    def broken(run: Any) -> None:
        raise OSError(28, "No space left on device")

    store.write_run = broken
    adapters = len(list(client.service.core.engine.model.network.named_parameters()))
    for number in range(FAILURES):
        answer = await client.done("create_model", model_body(client, number))
        assert answer["category"] == "server"
        assert "No space left on device" in answer["error"]
    assert len(list(client.service.core.engine.model.network.named_parameters())) == adapters
    store.write_run = original


async def requests_behind_models_that_fail(client: Any) -> None:
    """They wait for a number that never comes; the failure of their model ends them."""
    for number in range(FAILURES):
        with busy_engine(client):
            body = {**model_body(client, number), "path": "tinker://s0:train:0/weights/lost"}
            made = await client.ask("load_weights", body)
            steps = [{"model_id": made["model_id"], "seq_id": step, "adam_params": {}} for step in (5, 6)]
            waiting = [await client.ask("optim_step", step) for step in steps]
        for submitted in waiting:
            assert "is not loaded" in (await client.final(submitted["request_id"])).json()["error"]


async def all_requests_that_wait(client: Any) -> None:
    model_id = await client.model(300)
    early = [await client.ask("optim_step", {"model_id": model_id, "seq_id": 2 + step}) for step in range(LIMIT)]
    too_many = await client.post("optim_step", {"model_id": model_id, "seq_id": 2 + LIMIT})
    assert too_many.status_code == 429
    assert "metrics" in await client.done("optim_step", {"model_id": model_id, "seq_id": 1})
    for submitted in early:
        assert "metrics" in (await client.final(submitted["request_id"])).json()


async def failing_passes(client: Any) -> None:
    model_id = await client.model(301)
    for number in range(1, 1 + FAILURES):
        answer = await client.done("forward_backward", json_pass(model_id, number, [10**6]))
        assert "is not in 0.." in answer["error"]


async def passes_that_end_with_their_session(client: Any) -> None:
    for _ in range(FAILURES):
        await client.session()
        model_id = await client.model(302)
        waiting = await client.ask("optim_step", {"model_id": model_id, "seq_id": 9})
        await client.ask(f"sessions/{client.session_id}/finish", {})
        assert "is not loaded" in (await client.final(waiting["request_id"])).json()["error"]
    await client.session()


async def refused_bodies_with_far_numbers(client: Any) -> None:
    """Each uses up its number, but of those that come too early no more are kept than may wait."""
    model_id = await client.model(303)
    for number in range(10, 10 + 10 * FAILURES):
        body = {"model_id": model_id, "seq_id": number, "ttl_seconds": -1}
        assert (await client.post("save_weights", body)).status_code == 422
    assert client.service.core.sequencers[model_id].waiting <= LIMIT


def sample_body(**changes: Any) -> dict[str, Any]:
    prompt = {"chunks": [{"tokens": [1]}]}
    return {"prompt": prompt, "base_model": "tiny", "sampling_params": {"max_tokens": 2}, **changes}


async def all_samples(client: Any) -> None:
    with busy_engine(client):
        waiting = [await client.ask("asample", sample_body()) for _ in range(LIMIT)]
        assert (await client.post("asample", sample_body())).status_code == 429
    for submitted in waiting:
        assert (await client.final(submitted["request_id"])).json()["type"] == "sample"


async def invalid_samples(client: Any) -> None:
    with busy_engine(client):
        for _ in range(FAILURES):
            answer = await client.done("asample", sample_body(topk_sample_logprobs=10**9))
            assert "must be between 0 and" in answer["error"]


async def samples_of_lost_weights(client: Any) -> None:
    model_id = await client.model(304)
    body = {"model_id": model_id, "seq_id": 1, "path": "x"}
    path = (await client.done("save_weights_for_sampler", body))["path"]
    lost = [await client.ask("asample", sample_body(base_model=None, model_path=path)) for _ in range(LIMIT)]
    client.service.core.store.delete(client.service.core.store.find(path))
    for submitted in lost:
        assert (await client.final(submitted["request_id"])).status_code == 200


async def cancelled_samples(client: Any) -> None:
    with busy_engine(client):
        for _ in range(FAILURES):
            submitted = await client.ask("asample", sample_body())
            await client.ask("cancel_future", {"request_id": submitted["request_id"]})


async def results_that_failed(client: Any) -> None:
    for _ in range(3 * FAILURES):
        await client.ask("asample", sample_body(topk_sample_logprobs=10**9))


async def all_results(client: Any) -> None:
    kept = [await client.ask("asample", sample_body()) for _ in range(LIMIT)]
    for submitted in kept:
        assert (await client.final(submitted["request_id"])).json()["type"] == "sample"


def loss_body(client: Any, number: int, *calls: dict[str, Any]) -> dict[str, Any]:
    start = {"op": "placeholder", "name": "logprobs", "target": "logprobs"}
    output = {"tuple": [{"ref": calls[-1]["name"]}, {"dict": {}}]}
    nodes = [start, *calls, {"op": "output", "name": "output", "target": "output", "args": [output]}]
    inputs = [{"name": "logprobs", "rank": 1}]
    graph = {"format": 1, "nodes": nodes}
    fields = {"session_id": client.session_id, "custom_loss_seq_id": number}
    return {**fields, "name": "x", "inputs": inputs, "graph": graph}


def call(name: str, target: str, *args: Any) -> dict[str, Any]:
    op = "call_function" if "." in target else "call_method"
    return {"op": op, "name": name, "target": target, "args": list(args)}


TOTAL = call("total", "sum", {"ref": "logprobs"})
HALF = (call("half", "torch.zeros", [MAX_ELEMENTS // 2]), TOTAL)


async def refused_losses(client: Any) -> None:
    for number in range(LOSSES_PER_SESSION + FAILURES):
        answer = await client.done("create_custom_loss", loss_body(client, number, call("x", "torch.load", "file")))
        assert "not among the" in answer["error"]


async def losses_beyond_their_budget(client: Any) -> None:
    made = await client.done("create_custom_loss", loss_body(client, 1000, HALF[0], call("more", "torch.zeros", 2**40)))
    model_id = await client.model(305)
    for number in range(1, 1 + FAILURES):
        body = json_pass(model_id, number, [1])
        body["forward_backward_input"] |= {"loss_fn": "custom", "loss_fn_config": {"loss_id": made["loss_id"]}}
        assert "intermediate results" in (await client.done("forward_backward", body))["error"]


async def a_loss_that_needs_half_of_the_budget(client: Any) -> None:
    made = await client.done("create_custom_loss", loss_body(client, 2000, *HALF))
    model_id = await client.model(306)
    body = json_pass(model_id, 1, [1])
    body["forward_backward_input"] |= {"loss_fn": "custom", "loss_fn_config": {"loss_id": made["loss_id"]}}
    assert "loss:sum" in (await client.done("forward_backward", body))["metrics"]


CASES = [
    ("max_models", models_of_another_base, all_models),
    ("max_models", models_of_a_large_rank, all_models),
    ("max_models", models_of_a_lost_checkpoint, all_models),
    ("max_models", models_that_cannot_be_stored, all_models),
    ("max_models", cancelled_models, all_models),
    ("max_waiting_requests", requests_behind_models_that_fail, all_requests_that_wait),
    ("max_waiting_requests", failing_passes, all_requests_that_wait),
    ("max_waiting_requests", passes_that_end_with_their_session, all_requests_that_wait),
    ("max_waiting_requests", refused_bodies_with_far_numbers, all_requests_that_wait),
    ("max_waiting_samples", invalid_samples, all_samples),
    ("max_waiting_samples", samples_of_lost_weights, all_samples),
    ("max_waiting_samples", cancelled_samples, all_samples),
    ("max_results", results_that_failed, all_results),
    ("custom_losses", refused_losses, a_loss_that_needs_half_of_the_budget),
    ("custom_losses", losses_beyond_their_budget, a_loss_that_needs_half_of_the_budget),
]


@pytest.mark.parametrize(("limit", "fail", "use_all"), CASES, ids=[case[1].__name__ for case in CASES])
async def test_failures_give_back_what_they_took(run_service, limit, fail, use_all):
    options: dict[str, Any] = {"custom_losses": True} if limit == "custom_losses" else {limit: LIMIT}
    async with run_service(LocalOptions(**options)) as client:
        await client.session()
        await fail(client)
        await use_all(client)
        core = client.service.core
        await asyncio.wrap_future(core.submit(lambda: None))  # behind everything that the engine still does
        assert (core._queued.requests, core._held.requests, core._queued.bytes, core._held.bytes) == (0, 0, 0, 0)
