"""Concurrent sampling requests: batched, with the numbers of each alone, and without starvation."""

import asyncio
import functools
from concurrent.futures import Future

import numpy as np
import pytest
import torch

from tinkex_py.errors import InvalidData
from tinkex_py.local import LocalOptions, sample_queue
from tinkex_py.local.data import SampleRequest
from tinkex_py.local.sample_queue import SampleQueue, Weights
from tinkex_py.transport import wire
from tinkex_py.types import AdamParams

PROTOBUF = "application/x-protobuf"
BASE = Weights(("base",), lambda: None)
PROMPTS = [[256, *text] for text in (b"a", b"once upon a time", b"tea", b"once")]


class Worker:
    """Runs what is handed in when the test says so, on the test's own thread."""

    def __init__(self) -> None:
        self.work = []

    def submit(self, work):
        self.work.append(work)
        return Future()

    def turn(self):
        self.work.pop(0)()

    def run(self):
        turns = 0
        while self.work:
            self.turn()
            turns += 1
        return turns


def queue_of(bench, *, max_waiting=99, max_prompt_tokens=2048):
    worker = Worker()
    return SampleQueue(bench.engine, worker, max_waiting=max_waiting, max_prompt_tokens=max_prompt_tokens), worker


def request(prompt, **fields):
    return SampleRequest(np.array(prompt, dtype=np.int64), **{"max_tokens": 20, **fields})


def identity(result):
    return result


MIXED = [
    request(PROMPTS[0], seed=1, num_samples=3, temperature=0.7),
    request(PROMPTS[1], temperature=0.0, prompt_logprobs=True, topk_sample_logprobs=2),
    request(PROMPTS[2], seed=2, top_k=3, max_tokens=5, topk_prompt_logprobs=2),
    request(PROMPTS[3], seed=3, num_samples=2, top_p=0.5, alt_tokens=3),
    request(PROMPTS[1], seed=4, max_tokens=0, prompt_logprobs=True),
]


def test_a_batch_gives_every_request_what_it_gets_alone(bench):
    batch = bench.engine.sample_batch(MIXED)
    while not bench.engine.draw(None, batch, 3):
        pass
    for got, one in zip(batch.results(), MIXED, strict=True):
        alone = bench.engine.sample(None, one)
        for mine, theirs in zip(got.sequences, alone.sequences, strict=True):
            assert mine.tokens.tolist() == theirs.tokens.tolist()
            np.testing.assert_allclose(mine.logprobs, theirs.logprobs, atol=1e-4)
        for name in ("logprobs", "topk", "targets", "alternatives"):
            assert (getattr(got.prompt, name) is None) == (getattr(alone.prompt, name) is None)
        if got.prompt.logprobs is not None:
            np.testing.assert_allclose(got.prompt.logprobs, alone.prompt.logprobs, atol=1e-4)
        if got.prompt.alternatives is not None:
            np.testing.assert_array_equal(got.prompt.alternatives.ids, alone.prompt.alternatives.ids)


def test_requests_of_the_same_weights_share_their_passes(bench, monkeypatch):
    calls = []
    original = bench.model.network.forward

    @functools.wraps(original)
    def counting(**given):
        calls.append(1)
        return original(**given)

    monkeypatch.setattr(bench.model.network, "forward", counting)
    queue, worker = queue_of(bench)
    futures = [queue.add(BASE, request(prompt, stop_tokens=frozenset()), identity) for prompt in PROMPTS]
    worker.run()
    assert all(future.done() for future in futures)
    # One pass reads all prompts, and each further token of all of them takes one.
    assert len(calls) == 20


def test_a_request_with_a_seed_gets_the_same_bits_whatever_else_is_sampled(bench):
    prompts = [list(range(5, 5 + length)) for length in (3, 20, 33)]
    seeded = [request(prompt, seed=number, num_samples=8) for number, prompt in enumerate(prompts)]

    def drawn(*requests):
        queue, worker = queue_of(bench)
        futures = [queue.add(BASE, one, identity) for one in requests]
        worker.run()
        results = [[(one.tokens.tolist(), one.logprobs.tolist()) for one in f.result().sequences] for f in futures]
        return results[-len(seeded) :]

    other = request(PROMPTS[1], num_samples=5)
    assert drawn(other, *seeded) == [result for one in seeded for result in drawn(one)]


def test_long_draws_take_turns_with_other_work_and_other_weights(bench):
    queue, worker = queue_of(bench)
    model_id = bench.create("a")
    source = bench.checkpoint(model_id, "x", "sampler_weights")
    named = Weights(("path", "x"), lambda: source)
    order = []
    long = queue.add(BASE, request(PROMPTS[0], max_tokens=200, seed=1, stop_tokens=frozenset()), identity)
    long.add_done_callback(lambda _: order.append("long"))
    worker.turn()
    worker.submit(lambda: order.append("training"))
    short = queue.add(named, request(PROMPTS[1], max_tokens=4), identity)
    short.add_done_callback(lambda _: order.append("short"))
    late = queue.add(BASE, request(PROMPTS[2], max_tokens=4), identity)
    late.add_done_callback(lambda _: order.append("late"))
    turns = worker.run()
    assert order == ["training", "short", "late", "long"]
    assert len(long.result().sequences[0].tokens) == 200
    assert turns >= 200 / sample_queue.TOKENS_PER_TURN


def test_batches_are_bounded(bench, monkeypatch):
    sizes = []
    original = bench.engine.sample_batch
    monkeypatch.setattr(bench.engine, "sample_batch", lambda group: (sizes.append(len(group)), original(group))[1])
    queue, worker = queue_of(bench, max_prompt_tokens=40)
    # 17 padded to 17 is one, two would be 34, three 51 > 40; rows: 40 + 40 > 64.
    for _ in range(3):
        queue.add(BASE, request(PROMPTS[1], max_tokens=1), identity)
    worker.run()
    assert sizes == [2, 1]
    sizes.clear()
    for _ in range(3):
        queue.add(BASE, request(PROMPTS[0], max_tokens=1, num_samples=30), identity)
    queue.add(BASE, request(PROMPTS[0], max_tokens=1, num_samples=100), identity)
    worker.run()
    assert sizes == [2, 1, 1]


def test_a_model_without_position_ids_gets_prompts_of_one_length_only(bench, monkeypatch):
    original = bench.model.network.forward

    def no_positions(input_ids, past_key_values=None, use_cache=True, logits_to_keep=0):
        return original(
            input_ids=input_ids, past_key_values=past_key_values, use_cache=use_cache, logits_to_keep=logits_to_keep
        )

    monkeypatch.setattr(bench.model.network, "forward", no_positions)
    queue, worker = queue_of(bench)
    prompts = [*PROMPTS, PROMPTS[2], PROMPTS[0]]
    futures = [queue.add(BASE, request(prompt, seed=5), identity) for prompt in prompts]
    worker.run()
    for prompt, future in zip(prompts, futures, strict=True):
        alone = bench.engine.sample(None, request(prompt, seed=5)).sequences[0]
        assert future.result().sequences[0].tokens.tolist() == alone.tokens.tolist()


def test_a_failure_reaches_its_batch_only(bench):
    queue, worker = queue_of(bench)
    gone = Weights(("path", "gone"), lambda: bench.store.find("tinker://gone/sampler_weights/x"))
    bad = queue.add(gone, request(PROMPTS[0]), identity)
    good = queue.add(BASE, request(PROMPTS[0]), identity)
    worker.run()
    assert isinstance(bad.exception(), InvalidData)
    assert len(good.result().sequences) == 1
    with pytest.raises(InvalidData, match="the prompt is empty"):
        bench.engine.check_sample(request([]))
    assert worker.work == []


def test_alternative_draws_follow_the_distribution(bench):
    drawn = bench.engine.sample(
        None, request(PROMPTS[3], max_tokens=0, alt_tokens=258, temperature=0.5, seed=1)
    ).prompt.alternatives
    assert drawn.ids.shape == drawn.logprobs.shape == (4, 258)
    bench.engine._bank.activate(None)
    table = bench.model.network(input_ids=torch.tensor([PROMPTS[3]])).logits[0].log_softmax(-1).detach().numpy()
    np.testing.assert_allclose(drawn.logprobs, np.take_along_axis(table[:-1], drawn.ids.astype(int), 1), atol=1e-4)
    # Temperature 0.5 squares the probabilities; five standard deviations of the likeliest token's share.
    squared = np.exp(2 * table[:-1])
    shares = squared.max(1) / squared.sum(1)
    counts = (drawn.ids == table[:-1].argmax(1)[:, None]).mean(1)
    assert (np.abs(counts - shares) < 5 * np.sqrt(shares * (1 - shares) / 258) + 1e-9).all()
    again = bench.engine.sample(None, request(PROMPTS[3], max_tokens=0, alt_tokens=258, temperature=0.5, seed=1))
    np.testing.assert_array_equal(again.prompt.alternatives.ids, drawn.ids)
    greedy = bench.engine.sample(
        None, request(PROMPTS[3], max_tokens=0, alt_tokens=2, temperature=0.0)
    ).prompt.alternatives
    np.testing.assert_array_equal(greedy.ids, np.repeat(table[:-1].argmax(1)[:, None], 2, 1))
    coldest = bench.engine.sample(
        None, request(PROMPTS[3], max_tokens=0, alt_tokens=2, temperature=5e-324)
    ).prompt.alternatives
    np.testing.assert_array_equal(coldest.ids, greedy.ids)
    lone = bench.engine.sample(None, request([5], max_tokens=1, alt_tokens=2)).prompt.alternatives
    assert lone.ids.shape == (0, 2)


def test_the_last_n_also_bound_the_topk_table(bench):
    full = bench.engine.sample(None, request(PROMPTS[1], prompt_logprobs=True, topk_prompt_logprobs=2))
    part = bench.engine.sample(
        None, request(PROMPTS[1], prompt_logprobs=True, topk_prompt_logprobs=2, prompt_logprobs_last=3)
    )
    assert np.isnan(part.prompt.logprobs[:-3]).all()
    assert (part.prompt.topk.logprobs[:-3] == -99999.0).all()
    np.testing.assert_array_equal(part.prompt.topk.ids[-3:], full.prompt.topk.ids[-3:])


# Over the wire


async def trained(client, kit, model_id, number, rate=0.05):
    await client.pass_result(kit.message(model_id, number, [kit.datum(6, number)]))
    await client.done(
        "optim_step", {"model_id": model_id, "seq_id": number + 1, "adam_params": {"learning_rate": rate}}
    )


async def scores(client, sampler_id, number):
    body = {
        "sampling_session_id": sampler_id,
        "seq_id": number,
        "prompt": {"chunks": [{"tokens": [1, 2, 3, 4]}]},
        "sampling_params": {"max_tokens": 1},
        "prompt_logprobs": True,
    }
    return (await client.done("asample", body))["prompt_logprobs"][1:]


@pytest.mark.asyncio
async def test_inflight_samplers_follow_later_saves_and_snapshots_do_not(client, kit):
    model_id = await client.model()

    async def save(seq_id, number, kind):
        body = {"model_id": model_id, "seq_id": seq_id, "sampling_session_seq_id": number, "kind": kind}
        return (await client.done("save_weights_for_sampler", body))["sampling_session_id"]

    snapshot, inflight = await save(1, 0, "snapshot"), await save(2, 1, "inflight")
    start = await scores(client, snapshot, 0)
    assert await scores(client, inflight, 0) == start
    await trained(client, kit, model_id, 3)
    # Training alone moves nothing: only an inflight save does.
    assert await scores(client, inflight, 1) == start
    later = await save(5, 2, "inflight")
    moved = await scores(client, later, 0)
    assert moved != start
    assert await scores(client, inflight, 2) == moved
    assert await scores(client, snapshot, 1) == start
    live = await client.pass_result(kit.message(model_id, 6, [kit.datum(3, 1)], forward_only=True))
    assert len(kit.unpack(live)[0]) == 3
    unknown = {"model_id": model_id, "seq_id": 7, "sampling_session_seq_id": 3, "kind": "other"}
    assert "Supported: 'snapshot', 'inflight'" in (await client.done("save_weights_for_sampler", unknown))["error"]
    await client.done("unload_model", {"model_id": model_id})
    body = {"sampling_session_id": inflight, "seq_id": 9, "prompt": {"chunks": [{"tokens": [1]}]}}
    assert "inflight weights" in (await client.done("asample", body))["error"]


@pytest.mark.asyncio
async def test_a_full_queue_answers_429_and_keeps_the_number_free(run_service, kit):
    async with run_service(LocalOptions(max_waiting_samples=1)) as client:
        await client.session()
        body = {"session_id": client.session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
        sampler_id = (await client.ask("create_sampling_session", body))["sampling_session_id"]

        def draw(number):
            return {
                "sampling_session_id": sampler_id,
                "seq_id": number,
                "prompt": {"chunks": [{"tokens": [1]}]},
                "sampling_params": {"max_tokens": 2},
            }

        # The engine's thread is kept busy, so that nothing that waits can start.
        core = client.service.core
        held, go = asyncio.Event(), asyncio.Event()
        loop = asyncio.get_running_loop()

        def hold():
            loop.call_soon_threadsafe(held.set)
            asyncio.run_coroutine_threadsafe(go.wait(), loop).result()

        core.submit(hold)
        await held.wait()
        try:
            first = await client.ask("asample", draw(0))
            refused = await client.post("asample", draw(1))
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert "retry in a second" in refused.json()["detail"]
            assert (await client.ask("asample", draw(0)))["request_id"] == first["request_id"]
            cancelled = first["request_id"]
            assert await client.ask("cancel_future", {"request_id": cancelled}) == {}
        finally:
            go.set()
        assert "cancelled before it was started" in (await client.final(cancelled)).json()["error"]
        second = await client.ask("asample", draw(1))
        assert len((await client.final(second["request_id"])).json()["sequences"]) == 1


@pytest.mark.asyncio
async def test_many_requests_at_once_each_get_their_own(client):
    def body(index):
        return {
            "base_model": "tiny",
            "prompt": {"chunks": [{"tokens": [256, *range(index + 1)]}]},
            "sampling_params": {"max_tokens": 3 + index, "seed": index, "stop": []},
            "num_samples": 1 + index % 3,
        }

    results = await asyncio.gather(*(client.done("asample", body(index)) for index in range(12)))
    for index, result in enumerate(results):
        assert [len(sequence["tokens"]) for sequence in result["sequences"]] == [3 + index] * (1 + index % 3)
        alone = await client.done("asample", body(index))
        tokens, expected = ([one["tokens"] for one in answer["sequences"]] for answer in (result, alone))
        assert tokens == expected


@pytest.mark.asyncio
async def test_alternatives_and_joined_clients_over_the_wire(client):
    await client.session()
    body = {"session_id": client.session_id, "sampling_session_seq_id": 0, "base_model": "tiny"}
    sampler_id = (await client.ask("create_sampling_session", body))["sampling_session_id"]
    for counter in (1, 2):
        answer = await client.ask("join_sampling_session", {"sampling_session_id": sampler_id})
        assert answer["client_counter"] == counter
    assert (await client.post("join_sampling_session", {"sampling_session_id": "x"})).status_code == 404
    ask = {
        "sampling_session_id": sampler_id,
        "seq_id": 10**9,
        "prompt": {"chunks": [{"tokens": [1, 2, 3]}]},
        "sampling_params": {"max_tokens": 1},
        "prompt_alt_tokens_k": 4,
        "target_prompt_logprobs": {"data": [2, 3], "dtype": "int64", "shape": [2, 1]},
        "topk_sample_logprobs": 2,
    }
    request_id = (await client.ask("asample", ask))["request_id"]
    fields = (await client.final(request_id)).json()
    message = wire.SampleResponse.FromString((await client.final(request_id, accept=PROTOBUF)).content)
    drawn = message.prompt_alt_tokens
    assert list(drawn.tokens.shape) == list(drawn.logprobs.shape) == [2, 4]
    assert np.frombuffer(drawn.tokens.dense, "<i4").tolist() == fields["prompt_alt_tokens"]["tokens"]["data"]
    np.testing.assert_allclose(
        np.frombuffer(drawn.logprobs.dense, "<f4"), fields["prompt_alt_tokens"]["logprobs"]["data"]
    )
    assert fields["target_prompt_logprobs"]["shape"] == [2, 1]
    table = fields["sequences"][0]["topk_sampled_logprobs"]
    assert [len(row) for row in table] == [2]
    assert table[0][0][1] >= table[0][1][1]


def test_sampling_while_training_uses_the_saved_weights(bench, kit):
    """Between two turns the model trains on; what is drawn stays that of the checkpoint."""
    model_id = bench.create("a")
    bench.passed(model_id, [kit.datum(5, 1)])
    bench.engine.optim_step(model_id, AdamParams(learning_rate=0.05))
    source = bench.checkpoint(model_id, "x", "sampler_weights")
    expected = bench.engine.sample(source, request(PROMPTS[1], max_tokens=60, seed=1)).sequences[0].tokens.tolist()
    queue, worker = queue_of(bench)
    future = queue.add(Weights(("path", "x"), lambda: source), request(PROMPTS[1], max_tokens=60, seed=1), identity)
    while worker.work:
        worker.turn()
        bench.passed(model_id, [kit.datum(5, 2)])
        bench.engine.optim_step(model_id, AdamParams(learning_rate=0.05))
    assert future.result().sequences[0].tokens.tolist() == expected
