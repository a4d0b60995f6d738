"""A crash in one request fails only that request, and clients never see each other's data."""

import asyncio
from typing import Any

import numpy as np
import pytest

from tests.client.data import datum, nll
from tinkex_py import AsyncServiceClient, ModelInput, RequestFailed, SamplingParams
from tinkex_py.local import wire_format
from tinkex_py.local.engine import ADAPTER_FILE, OPTIMIZER_FILE

pytestmark = pytest.mark.asyncio
CRASHES = [
    RuntimeError("out of luck"),
    MemoryError(),
    RecursionError(),
    KeyError("x"),
    SystemExit(3),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("crash", CRASHES, ids=lambda crash: type(crash).__name__)
async def test_a_crash_in_a_pass_fails_that_pass_only(client, kit, monkeypatch, crash):
    model_id, other = await client.model(0), await client.model(1)
    engine = client.service.core.engine
    original = engine._forward_backward

    def crashing(name: str, *arguments: Any) -> Any:
        if name == model_id:
            raise crash
        return original(name, *arguments)

    monkeypatch.setattr(engine, "_forward_backward", crashing)
    failed = (await client.send_pass(kit.message(model_id, 1, [kit.datum(3, 1)]))).json()["request_id"]
    fine = await client.pass_result(kit.message(other, 1, [kit.datum(3, 1)]))
    answer = (await client.final(failed)).json()
    assert answer["category"] == "server"
    assert type(crash).__name__ in answer["error"]
    monkeypatch.undo()
    # The model itself goes on too: its number is spent, its gradients are those of what worked.
    again = await client.pass_result(kit.message(model_id, 2, [kit.datum(3, 1)]))
    assert again.metrics == fine.metrics
    steps = [
        await client.done("optim_step", {"model_id": name, "seq_id": number, "adam_params": {}})
        for name, number in ((model_id, 3), (other, 2))
    ]
    assert steps[0]["metrics"] == steps[1]["metrics"]


def sample_body(tokens: list[int], **fields: Any) -> dict[str, Any]:
    settings = {"max_tokens": 4, "temperature": 0.0, "stop": []}
    return {"base_model": "tiny", "prompt": {"chunks": [{"tokens": tokens}]}, "sampling_params": settings, **fields}


async def together(client: Any, bodies: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The answers to requests that wait for the engine together, so that they share a batch."""
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    client.service.core.submit(lambda: asyncio.run_coroutine_threadsafe(gate.wait(), loop).result())
    ids = [(await client.ask("asample", body))["request_id"] for body in bodies]
    gate.set()
    return [(await client.final(request_id)).json() for request_id in ids]


@pytest.mark.parametrize("place", ["sample_batch", "draw", "finish"])
async def test_a_crash_in_a_shared_batch_fails_the_one_that_crashes(client, monkeypatch, place):
    bodies = [sample_body([token, 7]) for token in (1, 2, 3)]
    alone = [await client.done("asample", body) for body in bodies]
    engine = client.service.core.engine
    batches: list[list[int]] = []
    original = engine.sample_batch

    def watched(requests: Any) -> Any:
        batches.append([int(request.prompt[0]) for request in requests])
        if place == "sample_batch" and 2 in batches[-1]:
            raise RuntimeError("cannot even begin")
        return original(requests)

    monkeypatch.setattr(engine, "sample_batch", watched)
    if place == "draw":
        draw = engine.draw

        def crashing(source: Any, batch: Any, tokens: int) -> bool:
            if any(request.prompt[0] == 2 for request in batch._requests):
                raise RuntimeError("cannot draw")
            return draw(source, batch, tokens)

        monkeypatch.setattr(engine, "draw", crashing)
    if place == "finish":
        wanted = alone[1]["sequences"][0]["tokens"]

        def crashing_answer(result: Any) -> Any:
            if result.sequences[0].tokens.tolist() == wanted:
                raise RuntimeError("cannot be written")
            return original_answer(result)

        original_answer = wire_format.sample_protobuf
        monkeypatch.setattr(wire_format, "sample_protobuf", crashing_answer)
    answers = await together(client, bodies)
    assert batches[0] == [1, 2, 3], "they did not share a batch"
    assert answers[0] == alone[0]
    assert answers[2] == alone[2]
    assert answers[1]["category"] == "server"
    assert "RuntimeError" in answers[1]["error"]
    monkeypatch.undo()
    assert await client.done("asample", bodies[1]) == alone[1]


async def test_weights_that_cannot_be_found_fail_their_samples_and_no_others(client, monkeypatch):
    """After an unexpected error before a batch has started, no request waits forever."""
    model_id = await client.model()
    saved = await client.done("save_weights_for_sampler", {"model_id": model_id, "seq_id": 1, "path": "x"})
    store = client.service.core.store
    original = store.find

    def broken(path: str, *kinds: Any) -> Any:
        if not kinds:
            raise OSError("the disk is gone")
        return original(path, *kinds)

    monkeypatch.setattr(store, "find", broken)
    trained = {**sample_body([1]), "base_model": None, "model_path": saved["path"]}
    answers = await together(client, [trained, sample_body([1]), trained])
    assert [answer.get("category") for answer in answers] == ["server", None, "server"]
    assert "the disk is gone" in answers[0]["error"]


async def test_a_model_is_loaded_whole_or_stays_as_it_was(client, kit):
    """The optimizer's file is damaged: the weights beside it must not be in the model when the load has failed."""
    source, target = await client.model(0), await client.model(1, seed=2)
    await client.pass_result(kit.message(source, 1, [kit.datum(4, 1)]))
    await client.done("optim_step", {"model_id": source, "seq_id": 2, "adam_params": {"learning_rate": 0.1}})
    path = (await client.done("save_weights", {"model_id": source, "seq_id": 3, "path": "x"}))["path"]
    store, engine = client.service.core.store, client.service.core.engine
    info = store.find(path)
    before = {key: value.clone() for key, value in engine._models[target].adapter.weights().items()}
    good = {name: store.file(info, name).read_bytes() for name in (ADAPTER_FILE, OPTIMIZER_FILE)}
    body = {"model_id": target, "path": path, "optimizer": True}
    for number, content in enumerate((b"damaged", good[ADAPTER_FILE], good[OPTIMIZER_FILE][:-4]), 1):
        store.file(info, OPTIMIZER_FILE).write_bytes(content)
        answer = await client.done("load_weights", {**body, "seq_id": number})
        assert answer["category"] == "user"
        after = engine._models[target].adapter.weights()
        assert all(bool((after[key] == before[key]).all()) for key in before)
    store.file(info, OPTIMIZER_FILE).write_bytes(good[OPTIMIZER_FILE])
    assert (await client.done("load_weights", {**body, "seq_id": 4}))["path"] == path


async def by_itself(seed: int) -> dict[str, Any]:
    async with AsyncServiceClient.local() as service:
        return await one_client(service, seed, None)


async def one_client(service: AsyncServiceClient, seed: int, turns: "asyncio.Barrier | None") -> dict[str, Any]:
    """Trains and samples; with `turns`, step by step in turns with the others."""

    async def turn() -> None:
        if turns is not None:
            await turns.wait()

    training = await service.create_lora_training_client("tiny", rank=4, seed=seed)
    seen: dict[str, Any] = {"losses": []}
    for step in range(3):
        await turn()
        output = await training.forward_backward_custom([datum(5, 10 * seed + step)], nll)
        await turn()
        await training.optim_step()
        seen["losses"].append(output.loss_total)
    await turn()
    sampler = await training.save_weights_and_get_sampling_client()
    params = SamplingParams(max_tokens=6, temperature=0.0)
    drawn = await sampler.sample(ModelInput.from_ints([1, 2, 3]), sampling_params=params)
    seen["tokens"] = drawn.sequences[0].tokens
    seen["logprobs"] = await sampler.compute_logprobs(ModelInput.from_ints([1, 2, 3, 4]))
    final = await training.forward([datum(4, 1)])
    seen["final"] = final.loss_fn_outputs[0]["logprobs"].to_numpy()
    return seen


async def test_two_clients_never_see_each_others_adapters():
    """Two clients with sessions of their own on one service, in turns: each sees what it would see alone."""
    alone = [await by_itself(seed) for seed in (1, 2)]
    async with AsyncServiceClient.local() as shared:
        turns = asyncio.Barrier(2)
        side_by_side = await asyncio.gather(*(one_client(shared, seed, turns) for seed in (1, 2)))
    for expected, seen in zip(alone, side_by_side, strict=True):
        assert seen["losses"] == expected["losses"]
        assert seen["tokens"] == expected["tokens"]
        np.testing.assert_array_equal(seen["final"], expected["final"])
        np.testing.assert_array_equal(np.array(seen["logprobs"][1:]), np.array(expected["logprobs"][1:]))
    assert not np.array_equal(alone[0]["final"], alone[1]["final"]), "the test could not tell them apart"


async def test_a_failed_step_of_one_client_leaves_the_other_alone():
    def crashing(data: Any, logprobs: Any) -> Any:
        raise ValueError("no")

    async with asyncio.timeout(20), AsyncServiceClient.local() as service:
        first = await service.create_lora_training_client("tiny", rank=4, seed=1)
        second = await service.create_lora_training_client("tiny", rank=4, seed=1)
        await first.forward_backward([datum(4, 1)])
        results = await asyncio.gather(
            second.forward_backward_custom([datum(4, 1)], crashing),
            second.forward_backward([datum(4, 1)], loss_fn="no_such_loss"),
            first.optim_step(),
            return_exceptions=True,
        )
        assert isinstance(results[0], Exception)
        assert not isinstance(results[2], Exception)
        with pytest.raises(RequestFailed):
            await second.forward_backward([datum(4, 1)], loss_fn="no_such_loss")
        assert (await second.optim_step()).metrics["grad_norm"] == 0.0
