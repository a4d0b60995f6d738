"""Sampling over the wire: every field, and many samples at once."""

import asyncio
import importlib
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest

from tests.client.data import datum
from tests.client.recorder import Arrival, answering, quick_config
from tests.support.scripted_server import ScriptedServer, answer, computed
from tinkex_py import (
    APIStatusError,
    AsyncServiceClient,
    DmelChunk,
    EncodedTextChunk,
    ImageAssetPointerChunk,
    ImageChunk,
    InvalidData,
    ModelInput,
    RateLimited,
    RequestFailed,
    ResultLost,
    SamplingParams,
    TensorData,
    UnsupportedFeature,
    telemetry,
)
from tinkex_py.client import AsyncSamplingClient
from tinkex_py.transport import wire

pytestmark = pytest.mark.asyncio
PROMPT = ModelInput.from_ints([5, 6, 7, 8])
ONE = SamplingParams(max_tokens=1, stop=[])


async def sampler_of(bench: Any) -> Any:
    return await bench.service.create_sampling_client(base_model="tiny")


def asked(bench: Any) -> list[dict[str, Any]]:
    return [arrival.json for arrival in bench.recorder.of("asample")]


async def test_everything_at_once_and_the_numbers_agree(bench):
    """Every kind of logprob that the embedded service tells, against each other."""
    sampler = await sampler_of(bench)
    ids = np.array([[6, 1, -1], [7, -1, 2], [8, 3, 4]])
    response = await sampler.sample(
        PROMPT,
        num_samples=3,
        sampling_params=SamplingParams(max_tokens=4, seed=7, stop=[], temperature=0.8, top_k=20, top_p=0.95),
        include_prompt_logprobs=True,
        topk_prompt_logprobs=256,
        topk_sample_logprobs=256,
        target_prompt_logprobs=ids,
    )
    assert len(response.sequences) == 3
    prompt, top, targets = response.prompt_logprobs, response.topk_prompt_logprobs, response.target_prompt_logprobs
    assert prompt is not None
    assert top is not None
    assert targets is not None
    assert prompt[0] is None
    assert top[0] is None
    table = [dict(row or []) for row in top]
    for position, token in enumerate(PROMPT.to_ints()[1:], start=1):
        assert prompt[position] == pytest.approx(table[position][token], abs=1e-5)
        for column, wanted in enumerate(ids[position - 1]):
            expected = 0.0 if wanted < 0 else table[position][int(wanted)]
            assert targets.to_numpy()[position - 1, column] == pytest.approx(expected, abs=1e-5)
    for sequence in response.sequences:
        assert sequence.logprobs is not None
        assert sequence.topk_logprobs is not None
        for token, logprob, row in zip(sequence.tokens, sequence.logprobs, sequence.topk_logprobs, strict=True):
            assert dict(row or [])[token] == pytest.approx(logprob, abs=1e-5)
    names = [sequence.sequence_id for sequence in response.sequences]
    assert all(names)
    assert len(set(names)) == 3
    assert response.prompt_cache_hit_tokens == 0


async def test_a_seed_repeats_and_sparse_targets_are_the_same(bench):
    sampler = await sampler_of(bench)
    params = SamplingParams(max_tokens=6, seed=3, stop=[])
    first, second = await asyncio.gather(*(sampler.sample(PROMPT, sampling_params=params) for _ in range(2)))
    assert first.sequences[0].tokens == second.sequences[0].tokens
    dense = np.full((3, 2), -1)
    dense[1, 0] = 9
    sparse = TensorData(data=[9], dtype="int64", shape=(3, 2), sparse_crow_indices=[0, 0, 1, 1], sparse_col_indices=[0])
    one, other = [
        await sampler.sample(PROMPT, sampling_params=ONE, target_prompt_logprobs=targets) for targets in (dense, sparse)
    ]
    assert one.target_prompt_logprobs is not None
    assert other.target_prompt_logprobs is not None
    assert one.target_prompt_logprobs.tolist() == other.target_prompt_logprobs.tolist()


async def test_compute_logprobs_is_the_forward_pass(bench):
    from tinkex_py import Datum

    training = await bench.train()
    sampler = await training.save_weights_and_get_sampling_client()
    tokens = PROMPT.to_ints()
    datum = Datum(model_input=ModelInput.from_ints(tokens[:-1]), loss_fn_inputs={"target_tokens": tokens[1:]})
    forward = await training.forward([datum])
    logprobs = await sampler.compute_logprobs(PROMPT)
    assert logprobs[0] is None
    assert logprobs[1:] == pytest.approx(forward.loss_fn_outputs[0]["logprobs"].tolist(), abs=1e-5)
    last = await sampler.sample(PROMPT, sampling_params=ONE, include_prompt_logprobs=True, prompt_logprobs_last_n=1)
    assert last.prompt_logprobs == [None, None, None, pytest.approx(logprobs[3], abs=1e-5)]


async def test_only_what_is_wanted_is_sent(bench):
    """Strict services of today refuse fields that are newer than they are."""
    sampler = await sampler_of(bench)
    await sampler.sample(PROMPT, sampling_params=SamplingParams(max_tokens=1))
    (sent,) = asked(bench)
    assert set(sent) == {
        "sampling_session_id",
        "seq_id",
        "num_samples",
        "prompt",
        "sampling_params",
        "prompt_logprobs",
        "type",
    }
    assert set(sent["sampling_params"]) == {"max_tokens", "temperature", "top_k", "top_p"}


async def test_stops(bench):
    sampler = await sampler_of(bench)
    stops = {None: None, (): [], "\n": ["\n"], ("a", "b"): ["a", "b"], (3, 4): [3, 4]}
    for stop in stops:
        given = list(stop) if isinstance(stop, tuple) else stop
        await sampler.sample(PROMPT, sampling_params=SamplingParams(max_tokens=2, stop=given))
    assert [sent["sampling_params"].get("stop") for sent in asked(bench)] == list(stops.values())


async def test_numbers_count_up_and_carry_on_after_bad_input(bench):
    sampler = await sampler_of(bench)
    await sampler.sample(PROMPT, sampling_params=ONE)
    bad: list[dict[str, Any]] = [
        {"num_samples": 0},
        {"topk_prompt_logprobs": -1},
        {"topk_sample_logprobs": 1.5},
        {"prompt_alt_tokens_k": True},
        {"prompt_logprobs_last_n": 2},
        {"prompt_logprobs_last_n": 4, "include_prompt_logprobs": True},
        {"prompt_logprobs_last_n": 0, "include_prompt_logprobs": True},
        {"target_prompt_logprobs": [[1], [2]]},
        {"target_prompt_logprobs": [1, 2, 3]},
        {"target_prompt_logprobs": [[1.5], [2.0], [3.0]]},
        {"sampling_params": {"max_tokens": 3}},
    ]
    for options in bad:
        with pytest.raises(InvalidData):
            await sampler.sample(PROMPT, **options)
    await sampler.sample(PROMPT, sampling_params=ONE)
    assert [one["seq_id"] for one in asked(bench)] == [0, 1]


async def test_what_the_service_refuses_in_its_result(bench):
    sampler = await sampler_of(bench)
    with pytest.raises(RequestFailed, match="topk_sample_logprobs=999 must be between 0 and 258"):
        await sampler.sample(PROMPT, sampling_params=ONE, topk_sample_logprobs=999)


async def test_alternatives_of_the_embedded_service(bench):
    """Greedy alternatives are the likeliest tokens, which the table of top-1 tells too."""
    sampler = await sampler_of(bench)
    greedy = SamplingParams(max_tokens=1, temperature=0.0)
    response = await sampler.sample(PROMPT, sampling_params=greedy, prompt_alt_tokens_k=2, topk_prompt_logprobs=1)
    count = PROMPT.length - 1
    assert response.prompt_alt_tokens.tokens.shape == response.prompt_alt_tokens.logprobs.shape == (count, 2)
    likeliest = [row[0][0] for row in response.topk_prompt_logprobs[1:]]
    assert response.prompt_alt_tokens.tokens.to_numpy().tolist() == [[token, token] for token in likeliest]


async def test_refused_samples_are_submitted_again(local_bench):
    """Every second submission is turned away; each comes through, with the number and bytes it had."""
    bench = local_bench()
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.sampling.turned_away")
    turned: list[bytes] = []

    async def sometimes(arrival: Arrival, serve: Any, send: Any) -> None:
        if arrival.body not in turned and len(turned) < 12:
            turned.append(arrival.body)
            await answering(429, {"detail": "busy"}, retry_after_ms="10")(arrival, serve, send)
        else:
            await serve(send)

    bench.recorder.always["asample"] = sometimes
    async with bench.service:
        sampler = await sampler_of(bench)
        responses = await asyncio.gather(*(sampler.sample(PROMPT, sampling_params=ONE) for _ in range(24)))
    assert all(len(response.sequences[0].tokens) == 1 for response in responses)
    assert len(turned) == 12
    assert len(events) == 12
    bodies = [arrival.body for arrival in bench.recorder.of("asample")]
    assert len(bodies) == 36
    assert sorted({json.loads(body)["seq_id"] for body in bodies}) == list(range(24))
    assert len(set(bodies)) == 24
    assert all(arrival.headers["x-tinker-sampling-backpressure"] == "1" for arrival in bench.recorder.of("asample"))


async def test_sampling_patience_is_limited(local_bench):
    bench = local_bench(sampling_patience=0.05)
    bench.recorder.always["asample"] = answering(429, {"detail": "busy"}, retry_after_ms="20")
    async with bench.service:
        sampler = await sampler_of(bench)
        with pytest.raises(RateLimited, match="busy"):
            await sampler.sample(PROMPT, sampling_params=ONE)
        assert len(bench.recorder.of("asample")) >= 2


async def test_no_more_in_flight_than_the_service_wants(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = answering(200, {"proto_write_fwdbwd": True, "sample_max_concurrent_requests": 3})
    gate = asyncio.Event()

    async def hold(arrival: Arrival, serve: Any, send: Any) -> None:
        await gate.wait()
        await serve(send)

    bench.recorder.always["retrieve_future"] = hold
    async with bench.service:
        sampler = await sampler_of(bench)
        samples = [asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE)) for _ in range(8)]
        await bench.recorder.until(lambda: len(bench.recorder.of("retrieve_future")) == 3)
        for _ in range(50):
            await asyncio.sleep(0)
        assert len(bench.recorder.of("asample")) == 3
        gate.set()
        await asyncio.gather(*samples)
        assert len(bench.recorder.of("asample")) == 8


async def test_a_cancelled_sample_makes_room(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = answering(200, {"proto_write_fwdbwd": True, "sample_max_concurrent_requests": 1})
    async with bench.service:
        sampler = await sampler_of(bench)
        bench.recorder.always["asample"] = answering(429, {"detail": "busy"}, retry_after="30")
        stuck = asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE))
        await bench.recorder.until(lambda: len(bench.recorder.of("asample")) == 1)
        behind = asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE))
        del bench.recorder.always["asample"]
        stuck.cancel()
        await asyncio.wait([stuck])
        async with asyncio.timeout(10):
            assert len((await behind).sequences) == 1


async def test_a_lost_result_is_asked_for_under_a_new_number(local_bench):
    bench = local_bench()
    gone = answering(410, {"detail": "gone"})
    async with bench.service:
        sampler = await sampler_of(bench)
        bench.recorder.faults["retrieve_future"] = [gone, gone]
        response = await sampler.sample(PROMPT, sampling_params=ONE)
        assert len(response.sequences) == 1
        assert [one["seq_id"] for one in asked(bench)] == [0, 1, 2]
        bench.recorder.always["retrieve_future"] = gone
        with pytest.raises(ResultLost):
            await sampler.sample(PROMPT, sampling_params=ONE)
        assert len(asked(bench)) == 3 + 4


async def test_no_retries_where_the_service_wants_none(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = answering(200, {"proto_write_fwdbwd": True, "sample_no_retries": True})
    async with bench.service:
        sampler = await sampler_of(bench)
        bench.recorder.faults["retrieve_future"] = [answering(410)]
        with pytest.raises(ResultLost):
            await sampler.sample(PROMPT, sampling_params=ONE)


# Services of other kinds, scripted


def sampling_server(server: ScriptedServer, submit: Any, *results: Any) -> AsyncServiceClient:
    server.script("/api/v1/client/config", answer(404))
    server.script("/api/v1/create_session", answer(json={"session_id": "s"}))
    server.script("/api/v1/sessions/s/finish", answer(404))
    server.script("/api/v1/create_sampling_session", answer(json={"sampling_session_id": "draw"}))
    server.script("/api/v1/asample", submit)
    server.script("/api/v1/retrieve_future", *results)
    return AsyncServiceClient(quick_config(server.url))


@asynccontextmanager
async def scripted_sampler(submit: Any, *results: Any) -> AsyncIterator[tuple[ScriptedServer, AsyncSamplingClient]]:
    """A sampling client of a service with these responses."""
    async with ScriptedServer() as server, sampling_server(server, submit, *results) as service:
        yield server, await service.create_sampling_client(base_model="tiny")


async def test_a_service_that_answers_with_a_future_of_the_sampling_session():
    """As hatchery."""
    opened = answer(json={"type": "create_sampling_session", "sampling_session_id": "later"})
    drawn = answer(json={"type": "sample", "sequences": [{"tokens": [1], "logprobs": [-0.5], "stop_reason": "length"}]})
    async with ScriptedServer() as server:
        service = sampling_server(server, answer(json={"request_id": "2"}), opened, drawn)
        server.script("/api/v1/create_sampling_session", answer(json={"request_id": "1", "model_id": "m"}))
        async with service:
            sampler = await service.create_sampling_client(base_model="m")
            assert sampler.sampling_session_id == "later"
            assert list((await sampler.sample(PROMPT, sampling_params=ONE)).sequences[0].tokens) == [1]
        polls = [request.json()["request_id"] for request in server.requests_to("/api/v1/retrieve_future")]
    assert polls == ["1", "2"]


async def test_an_old_service_answers_json_without_names_and_with_a_number_as_id():
    """As SkyRL: 200 without sample_sequence_ids, results in JSON."""
    result = {
        "type": "sample",
        "sequences": [{"tokens": [1, 2], "logprobs": [-0.5, -1.0], "stop_reason": "length"}] * 2,
        "prompt_logprobs": [None, -1.0, -2.0, -3.0],
        "topk_prompt_logprobs": [None, [[6, -1.0]], [[7, -2.0]], [[8, -3.0]]],
        "prompt_cache_hit_tokens": 4,
        "something_new": True,
    }
    async with scripted_sampler(answer(202, json={"request_id": 17}), answer(json=result)) as (_, sampler):
        response = await sampler.sample(PROMPT, num_samples=2, include_prompt_logprobs=True, topk_prompt_logprobs=1)
    assert [one.sequence_id for one in response.sequences] == ["17:0", "17:1"]
    assert response.sequences[0].logprobs == [-0.5, -1.0]
    assert response.topk_prompt_logprobs == [None, [(6, -1.0)], [(7, -2.0)], [(8, -3.0)]]
    assert response.prompt_cache_hit_tokens == 4


async def test_alternative_draws_and_names():
    """Nobody runs these on one machine yet: the answer is made by hand."""
    message = wire.SampleResponse(sequences=[wire.SampledSequence(tokens=np.array([3], "<i4").tobytes())])
    message.prompt_alt_tokens.tokens.CopyFrom(
        wire.Tensor(dense=np.arange(6, dtype="<i4").tobytes(), dtype=wire.DTYPE_INT32, shape=[3, 2])
    )
    message.prompt_alt_tokens.logprobs.CopyFrom(
        wire.Tensor(dense=np.full(6, -0.5, "<f4").tobytes(), dtype=wire.DTYPE_FLOAT32, shape=[3, 2])
    )
    result = answer(200, message.SerializeToString(), headers={"content-type": "application/x-protobuf"})
    submit = answer(json={"request_id": "r", "sample_sequence_ids": ["name"]})
    async with scripted_sampler(submit, result) as (server, sampler):
        response = await sampler.sample(PROMPT, prompt_alt_tokens_k=2)
        assert server.requests_to("/api/v1/asample")[0].json()["prompt_alt_tokens_k"] == 2
    assert response.sequences[0].sequence_id == "name"
    assert response.prompt_alt_tokens is not None
    assert response.prompt_alt_tokens.tokens.tolist() == [[0, 1], [2, 3], [4, 5]]
    assert response.prompt_alt_tokens.logprobs.tolist() == [[-0.5, -0.5]] * 3


@pytest.mark.parametrize(
    "options",
    [
        {"include_prompt_logprobs": True},
        {"topk_prompt_logprobs": 1},
        {"topk_sample_logprobs": 1},
        {"target_prompt_logprobs": [[1], [2], [3]]},
        {"prompt_alt_tokens_k": 1},
    ],
)
async def test_a_service_that_ignores_what_was_asked_for(options):
    """SkyRL does so: silence is not taken for an answer."""
    result = {"sequences": [{"tokens": [1], "logprobs": [-0.5], "stop_reason": "stop"}]}
    async with scripted_sampler(answer(json={"request_id": "1"}), answer(json=result)) as (_, sampler):
        with pytest.raises(UnsupportedFeature, match="it omitted"):
            await sampler.sample(PROMPT, **options)


async def test_a_prompt_costs_more_bytes_after_a_429():
    """At most ten at a time are submitted for a while, whatever the budget."""
    away = answer(429, json={"detail": "busy"}, headers={"retry-after-ms": "5"})
    release = asyncio.Event()
    seen: list[int] = []

    async with ScriptedServer() as server:

        def submit(request: Any) -> Any:
            number = request.json()["seq_id"]
            first = number not in seen
            seen.append(number)
            if first:
                return away
            from tests.support.scripted_server import held

            return held(release, answer(json={"request_id": str(number)}))

        result = answer(json={"sequences": [{"tokens": [1], "stop_reason": "stop"}]})
        service = sampling_server(server, computed(submit), result)
        async with service:
            sampler = await sampler_of(type("Bench", (), {"service": service}))
            samples = [asyncio.create_task(sampler.sample(PROMPT, sampling_params=ONE)) for _ in range(14)]
            await server.until(lambda: len(seen) == 24)
            for _ in range(50):
                await asyncio.sleep(0)
            assert len(seen) == 24, "14 were turned away, then 10 of them go on"
            release.set()
            await asyncio.gather(*samples)


async def test_a_score_left_out_for_the_first_token_is_none():
    """As SkyRL's JAX backend: N - 1 prompt logprobs."""
    result = {
        "sequences": [{"tokens": [1], "logprobs": [-0.5], "stop_reason": "length"}],
        "prompt_logprobs": [-float(number) for number in range(1, PROMPT.length)],
    }
    async with scripted_sampler(answer(json={"request_id": "1"}), answer(json=result)) as (_, sampler):
        assert await sampler.compute_logprobs(PROMPT) == [None, -1.0, -2.0, -3.0]


@pytest.mark.parametrize(
    "refusal",
    [
        answer(400, json={"detail": "topk_prompt_logprobs is not supported by the JAX backend"}),
        answer(json={"error": "topk_prompt_logprobs is not supported by the JAX backend", "category": "user"}),
    ],
)
async def test_a_refusal_that_says_what_the_service_lacks(refusal):
    async with scripted_sampler(answer(json={"request_id": "1"}), *[refusal] * 4) as (server, sampler):
        host = server.url.removeprefix("http://")
        with pytest.raises(UnsupportedFeature, match=f"^{host} does not support sampling with .*topk_prompt_logprobs"):
            await sampler.sample(PROMPT, include_prompt_logprobs=True, topk_prompt_logprobs=2)


async def test_a_service_without_sampling(bench):
    """As TuFT in its hf mode."""
    words = "Capability disabled: model tiny does not have the 'sampling' capability enabled on this server"
    training = await bench.train()
    bench.recorder.always["save_weights_for_sampler"] = answering(400, {"detail": words})
    bench.recorder.always["create_sampling_session"] = answering(400, {"detail": words})
    for wanted in (
        training.save_weights_and_get_sampling_client(),
        training.save_weights_for_sampler("s"),
        bench.service.create_sampling_client(base_model="tiny"),
    ):
        with pytest.raises(UnsupportedFeature, match="does not support .*'sampling' capability"):
            await wanted


async def test_training_goes_on_after_a_refusal_whose_number_was_not_counted(bench):
    """As TuFT in its hf mode, which fails the request before it looks at the number. The service here has no gaps."""

    async def refused(arrival: Arrival, serve: Any, send: Any) -> None:
        if arrival.json["request_id"] == "refused":
            words = "Capability disabled: model tiny does not have the 'sampling' capability enabled on this server"
            await answering(200, {"error": words, "category": "user"})(arrival, serve, send)
        else:
            await serve(send)

    training = await bench.train()
    bench.recorder.always["save_weights_for_sampler"] = answering(200, {"request_id": "refused"})
    bench.recorder.always["retrieve_future"] = refused
    for _ in range(2):
        with pytest.raises(UnsupportedFeature, match="does not support save_weights_for_sampler"):
            await training.save_weights_and_get_sampling_client()
    assert (await training.forward([datum(3, 1)])).metrics["loss:sum"] > 0
    await training.forward_backward([datum(3, 1)])
    await training.optim_step()


async def test_a_prompt_with_an_image_is_that_of_the_official_sdk():
    """In JSON; and a client that records stability information says so in each request."""
    types: Any = importlib.import_module("tinker.types")
    png = b"\x89PNG\r\n\x1a\n" + bytes(range(256))
    chunks = (
        EncodedTextChunk(tokens=[1, 2]),
        ImageChunk(data=png, expected_tokens=3),
        ImageChunk(data=png),
        ImageAssetPointerChunk(location="x", format="jpeg"),
        DmelChunk(dmel=bytes([0, 1, 1])),
    )
    same = [
        getattr(types, type(chunk).__name__)(**{name: list(v) if name == "tokens" else v for name, v in chunk})
        for chunk in chunks
    ]
    theirs = types.ModelInput(chunks=same).model_dump(mode="json", exclude_none=True)
    refused = answer(400, json={"detail": "no"})
    async with ScriptedServer() as server, sampling_server(server, refused, refused) as service:
        sampler = await service.create_sampling_client(base_model="tiny", record_stability_info=True)
        with pytest.raises(APIStatusError):
            await sampler.sample(ModelInput(chunks=chunks))
        sent = server.requests_to("/api/v1/asample")[0].json()
    assert sent["prompt"] == theirs
    assert sent["record_stability_info"] is True
