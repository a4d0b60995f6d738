"""Submissions whose answer is lost, refused, late, or never comes."""

import asyncio
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.client.recorder import after, answering, lose_the_answer
from tinkex_py import (
    BadRequest,
    ClientClosed,
    Conflict,
    PrecedingRequestFailed,
    RetryPolicy,
    SequenceLost,
    Unprocessable,
)
from tinkex_py.errors import ResultLost

pytestmark = pytest.mark.asyncio
DATA = [datum(4, 1), datum(2, 2)]
IMPATIENT = RetryPolicy(deadline=0.5, initial_wait=0.0, max_wait=0.01)


def submissions(bench: Any, training: Any) -> list[tuple[str, int]]:
    return [
        (arrival.kind, arrival.number[1])
        for arrival in bench.recorder.arrivals
        if arrival.number and arrival.number[0] == training.model_id
    ]


@pytest.mark.parametrize("kind", ["F", "B", "optim_step"])
async def test_a_lost_answer_is_replayed_with_the_same_number_and_applied_once(http_bench, kind):
    plain, unlucky = await http_bench.train(seed=5), await http_bench.train(seed=5)
    await plain.forward_backward_custom(DATA, nll)
    await plain.optim_step()
    http_bench.recorder.faults[kind] = [lose_the_answer, lose_the_answer]
    await unlucky.forward_backward_custom(DATA, nll)
    step = await unlucky.optim_step()
    numbers = {"F": 1, "B": 2, "optim_step": 3}
    replays = [item for item in submissions(http_bench, unlucky) if item[0] == kind]
    assert replays == [(kind, numbers[kind])] * 3
    assert http_bench.kinds(unlucky) == ["F", "B", "optim_step"]  # checks the bytes of the repeats too
    after_both = [await client.forward(DATA) for client in (plain, unlucky)]
    assert after_both[0] == after_both[1]
    assert step.metrics["grad_norm"] > 0


async def test_an_answer_without_a_future_is_asked_for_again(http_bench):
    """A proxy returns 200 and JSON, but no future."""
    training = await http_bench.train()
    http_bench.recorder.faults.update({kind: [answering(200, {"all": "well"})] for kind in ("B", "optim_step")})
    await training.forward_backward(DATA)
    await training.optim_step()
    assert submissions(http_bench, training) == [("B", 1), ("B", 1), ("optim_step", 2), ("optim_step", 2)]


async def test_other_numbered_calls_are_replayed_too(http_bench):
    training = await http_bench.train()
    http_bench.recorder.faults.update(
        {
            "save_weights": [lose_the_answer],
            "save_weights_for_sampler": [lose_the_answer],
            "create_model": [lose_the_answer],
            "load_weights": [lose_the_answer],
            "asample": [lose_the_answer],
        }
    )
    saved = await training.save_state("one")
    again = await http_bench.service.create_training_client_from_state(saved.path)
    sampler = await again.save_weights_and_get_sampling_client()
    from tinkex_py import ModelInput, SamplingParams

    drawn = await sampler.sample(ModelInput.from_ints([1, 2]), sampling_params=SamplingParams(max_tokens=2, stop=[]))
    assert len(drawn.sequences[0].tokens) == 2
    assert http_bench.kinds(training) == ["save_weights"]
    assert http_bench.kinds(again) == ["save_weights_for_sampler"]
    assert not any(http_bench.recorder.faults[kind] for kind in ("save_weights", "load_weights", "asample"))


@pytest.mark.parametrize(("status", "error_class"), [(400, BadRequest), (409, Conflict), (422, Unprocessable)])
async def test_a_final_refusal_is_not_retried_and_spends_its_number(bench, status, error_class):
    training = await bench.train()
    bench.recorder.faults["B"] = [answering(status, {"detail": "seq_id was reused"}, x_should_retry="false")]
    results = await asyncio.gather(training.forward_backward(DATA), training.optim_step(), return_exceptions=True)
    assert type(results[0]) is error_class
    assert results[0].status == status
    assert "seq_id was reused" in str(results[0])
    assert isinstance(results[1], PrecedingRequestFailed)
    assert submissions(bench, training) == [("B", 1)]
    # The next request takes the next number, as the official client does.
    next_call = asyncio.create_task(training.forward_backward(DATA))
    await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 2)
    assert submissions(bench, training) == [("B", 1), ("B", 2)]
    next_call.cancel()
    await asyncio.wait([next_call])


async def test_a_409_is_never_retried_even_when_told_to(bench):
    training = await bench.train()
    bench.recorder.always["B"] = answering(409, x_should_retry="true")
    with pytest.raises(Conflict):
        await training.forward_backward(DATA)
    assert submissions(bench, training) == [("B", 1)]


async def test_a_refused_backward_breaks_the_update_behind_it_and_is_not_sent_again(bench):
    training = await bench.train()
    bench.recorder.faults["B"] = [answering(400)]
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, nll), training.optim_step(), return_exceptions=True
    )
    assert isinstance(step, BadRequest)
    assert isinstance(update, PrecedingRequestFailed)
    assert bench.kinds(training) == ["F", "B"]


async def test_no_answer_within_the_deadline_loses_this_client_only(local_bench):
    bench = local_bench(retry=IMPATIENT)
    async with bench.service:
        lost, other = await bench.train(), await bench.train()
        await lost.forward_backward(DATA)
        await lost.optim_step()
        saved = await lost.save_state("before")
        bench.recorder.always["B"] = answering(503)
        step, queued = await asyncio.gather(lost.forward_backward(DATA), lost.optim_step(), return_exceptions=True)
        for result in (step, queued):
            assert isinstance(result, SequenceLost)
            assert "service.create_training_client_from_state(path, with_optimizer=True)" in str(result)
        del bench.recorder.always["B"]
        for later in (
            lambda: lost.forward_backward(DATA),
            lambda: lost.forward_backward_custom(DATA, nll),
            lost.optim_step,
            lambda: lost.forward(DATA),
            lambda: lost.save_state("late"),
            lost.save_weights_and_get_sampling_client,
        ):
            with pytest.raises(SequenceLost):
                await later()
        await other.forward_backward_custom(DATA, nll)
        await other.optim_step()
        again = await bench.service.create_training_client_from_state(saved.path, with_optimizer=True)
        await again.forward_backward(DATA)
        await again.optim_step()
        assert bench.kinds(again) == ["B", "optim_step"]
        assert bench.kinds(lost) == ["B", "optim_step", "save_weights", "B"]


async def test_a_number_that_was_answered_and_never_arrived_loses_the_client(local_bench):
    """Somebody on the way makes up an answer: the service waits for the number, and nothing behind it can run."""
    bench = local_bench({"hold_seconds": 0.05})
    async with bench.service, asyncio.timeout(10):
        training = await bench.train()
        bench.recorder.faults["B"] = [answering(200, {"request_id": "made-up"})]
        with pytest.raises(ResultLost):
            await training.forward_backward(DATA)
        with pytest.raises(SequenceLost, match="waits for request 1, which a proxy answered"):
            await training.forward(DATA)
        with pytest.raises(SequenceLost):
            await training.optim_step()


async def test_closing_waits_for_a_submission_in_flight_up_to_close_timeout(local_bench):
    bench = local_bench(close_timeout=0.3)
    gate = asyncio.Event()
    loop = asyncio.get_running_loop()
    async with bench.service:
        training = await bench.train()
        bench.recorder.always["B"] = after(gate)
        step = asyncio.create_task(training.forward_backward(DATA))
        queued = asyncio.create_task(training.optim_step())
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
        started = loop.time()
        async with asyncio.timeout(10):
            await bench.service.aclose()
        assert loop.time() - started >= 0.3
        results = await asyncio.gather(step, queued, return_exceptions=True)
        assert isinstance(results[1], ClientClosed)
        assert isinstance(results[0], ClientClosed), f"the caller of a submission cut off by aclose saw {results[0]!r}"
    gate.set()


async def test_closing_lets_a_submission_in_flight_end(local_bench):
    bench = local_bench(close_timeout=20.0)
    gate = asyncio.Event()
    async with bench.service:
        training = await bench.train()
        bench.recorder.always["B"] = after(gate)
        step = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
        closing = asyncio.create_task(bench.service.aclose())
        await asyncio.wait([closing], timeout=0.2)  # it would be over by then if it did not wait
        assert not closing.done()
        gate.set()
        async with asyncio.timeout(10):
            await closing
        assert bench.recorder.of("B")[0].status == 200
        await asyncio.wait([step])
