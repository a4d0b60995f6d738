"""Long calls: consecutive numbers, at once or in order, and what it means if only a part took effect."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from tests.client.data import bad_datum, datum, nll
from tests.client.recorder import Arrival, answering
from tinkex_py import (
    BadRequest,
    PartialFailure,
    PermissionDenied,
    PrecedingRequestFailed,
    RequestFailed,
    RetryPolicy,
    SequenceLost,
)
from tinkex_py.errors import ResultLost

pytestmark = pytest.mark.asyncio
IMPATIENT = {"retry": RetryPolicy(deadline=0.4, initial_wait=0.0, max_wait=0.01)}
DATA = [datum(length, length) for length in (2, 3, 4, 5)]


def flags(**told: Any) -> Any:
    return answering(200, {"proto_write_fwdbwd": True, "fwdbwd_max_chunk_len": 1, **told})


@asynccontextmanager
async def made(local_bench: Any, settings: dict[str, Any] | None = None, **told: Any) -> AsyncIterator[Any]:
    """A bench whose service takes one datum per chunk, and a training client of it."""
    bench = local_bench(**(settings or {}))
    bench.recorder.always["config"] = flags(**told)
    async with bench.service:
        yield bench, await bench.train(seed=3)


def numbers(bench: Any, kind: str) -> list[int]:
    return [arrival.number[1] for arrival in bench.recorder.of(kind)]


class Gates:
    """Holds passes back by their number, on their way to the service."""

    def __init__(self, *held: int) -> None:
        self.gates = {number: asyncio.Event() for number in held}

    async def __call__(self, arrival: Arrival, serve: Any, send: Any) -> None:
        gate = self.gates.get(arrival.number[1])
        if gate is not None:
            await gate.wait()
        await serve(send)

    def open(self) -> None:
        for gate in self.gates.values():
            gate.set()


async def test_chunks_are_posted_at_the_same_time(local_bench):
    async with made(local_bench) as (bench, training):
        held = Gates(1)
        bench.recorder.always["B"] = held
        step = asyncio.create_task(training.forward_backward(DATA))
        update = asyncio.create_task(training.optim_step())
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 4)
        assert sorted(numbers(bench, "B")) == [1, 2, 3, 4], "the first one is held, the others were posted all the same"
        assert bench.recorder.of("optim_step") == [], "the next request waits until all of them are answered"
        held.open()
        assert (await step).num_datums == 4
        await update
        assert numbers(bench, "optim_step") == [5]


async def test_in_order_where_the_service_asks_for_it(local_bench):
    async with made(local_bench, parallel_fwdbwd_chunks=False) as (bench, training):
        held = Gates(2)
        bench.recorder.always["B"] = held
        step = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 2)
        assert numbers(bench, "B") == [1, 2]
        held.open()
        await step
        assert numbers(bench, "B") == [1, 2, 3, 4]


async def test_bytes_under_way_are_bounded(local_bench):
    async with made(local_bench, fwdbwd_dispatch_bytes_semaphore_size=1) as (bench, training):
        held = Gates(1)
        bench.recorder.always["B"] = held
        step = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
        for _ in range(50):
            await asyncio.sleep(0)
        assert numbers(bench, "B") == [1], "every chunk is larger than the budget, so each goes alone"
        held.open()
        await step
        assert numbers(bench, "B") == [1, 2, 3, 4]


async def test_chunked_and_whole_are_the_same(local_bench):
    results = []
    for told in ({}, {"fwdbwd_max_chunk_len": 1024}):
        async with made(local_bench, **told) as (_, training):
            out = await training.forward_backward_custom(DATA, nll, track_grad_norms=True)
            await training.optim_step()
            end = await training.forward(DATA)
            results.append((out.loss_total, out.total_grad_norm, end.metrics["loss:sum"]))
    assert results[0] == pytest.approx(results[1], rel=1e-5)


@pytest.mark.parametrize("parallel", [True, False])
async def test_a_refused_chunk_is_reported_and_the_others_are_sent(local_bench, parallel):
    async with made(local_bench, parallel_fwdbwd_chunks=parallel) as (bench, training):

        async def refuse_the_second(arrival: Arrival, serve: Any, send: Any) -> None:
            if arrival.number[1] == 2:
                # As a service that refuses it, and so counts the number as spent.
                bench.service._embedded.core.sequencer(training.model_id).spend(2)
                await answering(400, {"detail": "not this one"})(arrival, serve, send)
            else:
                await serve(send)

        bench.recorder.always["B"] = refuse_the_second
        step, update = await asyncio.gather(
            training.forward_backward(DATA), training.optim_step(), return_exceptions=True
        )
        assert sorted(numbers(bench, "B")) == [1, 2, 3, 4]
        assert isinstance(step, PartialFailure)
        assert isinstance(step, RequestFailed)
        assert isinstance(step.__cause__, BadRequest)
        assert step.applied == ((0, 1), (2, 3), (3, 4))
        assert step.missing == ((1, 2),)
        assert step.accumulated == 1
        for words in ("1 of 4 chunks", "not this one", "datums 0, 2, 3", "last checkpoint"):
            assert words in str(step)
        assert isinstance(update, PrecedingRequestFailed)
        assert bench.recorder.of("optim_step") == []
        # The way out: what is missing, then the step.
        bench.recorder.always.clear()
        await training.forward_backward([DATA[1]])
        await training.optim_step()


async def test_a_chunk_that_fails_on_the_service(local_bench):
    async with made(local_bench) as (bench, training):
        data = [DATA[0], bad_datum(), DATA[1]]
        step = await asyncio.gather(training.forward_backward(data), return_exceptions=True)
        assert isinstance(step[0], PartialFailure)
        assert type(step[0].__cause__) is RequestFailed
        assert (step[0].applied, step[0].missing) == (((0, 1), (2, 3)), ((1, 2),))
        assert step[0].category == "user"
        assert step[0].request_id is not None
        await training.forward_backward([DATA[2]])
        await training.optim_step()
        assert sorted(numbers(bench, "B")) == [1, 2, 3, 4]


async def test_a_chunk_whose_result_is_lost_is_not_told_as_missing(local_bench):
    """It may have taken effect: a caller who sends its datums again would add their gradient twice."""
    async with made(local_bench) as (bench, training):
        bench.recorder.faults["retrieve_future"] = [None, answering(410)]
        with pytest.raises(ResultLost):
            await training.forward_backward(DATA)
        assert sorted(numbers(bench, "B")) == [1, 2, 3, 4]


@pytest.mark.parametrize("call", ["forward", "forward_backward"])
async def test_a_chunk_that_never_reached_the_service_does_not_keep_the_others_waiting_for_ever(local_bench, call):
    """The service holds polls for longer than this test waits, so it does not get to say what it waits for."""
    async with made(local_bench, IMPATIENT) as (bench, training):

        async def refuse_the_second(arrival: Arrival, serve: Any, send: Any) -> None:
            await (answering(413)(arrival, serve, send) if arrival.number[1] == 2 else serve(send))

        bench.recorder.always.update(F=refuse_the_second, B=refuse_the_second)
        async with asyncio.timeout(10):
            with pytest.raises(SequenceLost, match=r"waits for request 2.*nothing after it was executed within 0\.4 s"):
                await getattr(training, call)(DATA)
            with pytest.raises(SequenceLost):
                await training.optim_step()


async def test_if_nothing_took_effect_the_first_failure_is_raised(local_bench):
    async with made(local_bench) as (bench, training):
        bench.recorder.always["B"] = answering(403)
        with pytest.raises(PermissionDenied):
            await training.forward_backward(DATA)
        bench.recorder.always.clear()
        other = await bench.train()
        for request in (other.forward_backward([bad_datum(), bad_datum()]), other.forward([DATA[0], bad_datum()])):
            with pytest.raises(RequestFailed) as caught:
                await request
            assert type(caught.value) is RequestFailed


async def test_a_chunk_without_an_answer_loses_the_client_after_the_others_were_sent(local_bench):
    async with made(local_bench, IMPATIENT) as (bench, training):

        async def no_first(arrival: Arrival, serve: Any, send: Any) -> None:
            await (answering(503)(arrival, serve, send) if arrival.number[1] == 1 else serve(send))

        bench.recorder.always["B"] = no_first
        with pytest.raises(SequenceLost):
            await training.forward_backward(DATA)
        assert set(numbers(bench, "B")) == {1, 2, 3, 4}
        with pytest.raises(SequenceLost):
            await training.optim_step()
