"""What a client says about the queue in front of it; and a service that waits for a number that never comes."""

import asyncio
import logging
from typing import Any

import pytest

from tests.client.data import datum, nll
from tests.client.recorder import answering
from tinkex_py import (
    BillingRequired,
    ModelInput,
    PermissionDenied,
    QueueState,
    RequestFailed,
    ResultLost,
    SamplingParams,
    SequenceLost,
    telemetry,
)
from tinkex_py.transport.decoding import read_forward_backward

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1), datum(2, 2)]
FULL = {"type": "try_again", "queue_state": "paused_capacity", "queue_state_reason": "no machine is free"}


async def test_a_property_a_callback_and_an_event(local_bench):
    heard: list[QueueState] = []
    events: list[Any] = []
    telemetry.attach(events.append, events="tinkex.future.queue_state")
    bench = local_bench(on_queue_state=heard.append)
    async with bench.service:
        training = await bench.train()
        assert training.queue_state.state == "active"
        assert training.queue_state.source == training.model_id
        seen: list[QueueState] = []

        async def full(arrival: Any, serve: Any, send: Any) -> None:
            await answering(408, FULL)(arrival, serve, send)

        async def limited(arrival: Any, serve: Any, send: Any) -> None:
            seen.append(training.queue_state)
            await answering(200, {"type": "try_again", "queue_state": "paused_rate_limit"})(arrival, serve, send)

        async def odd(arrival: Any, serve: Any, send: Any) -> None:
            seen.append(training.queue_state)
            await answering(408, {"queue_state": "on_holiday"})(arrival, serve, send)

        bench.recorder.faults["retrieve_future"] = [full, full, limited, odd]
        await training.forward(DATA)
        assert [(one.state, one.reason) for one in seen] == [
            ("paused_capacity", "no machine is free"),
            ("paused_rate_limit", None),
        ]
        assert training.queue_state.state == "active"
        assert [(one.state, one.reason) for one in heard] == [
            ("paused_capacity", "no machine is free"),
            ("paused_rate_limit", None),
            ("unknown", None),
            ("active", None),
        ]
        assert {one.source for one in heard} == {training.model_id}
        assert [one.since for one in heard] == sorted(one.since for one in heard)
    told = [(event.metadata["queue_state"], event.metadata["queue_state_reason"]) for event in events]
    assert told == [("paused_capacity", "no machine is free"), ("paused_rate_limit", None), ("on_holiday", None)]


async def test_the_queue_state_of_a_sampling_client(local_bench):
    heard: list[QueueState] = []
    bench = local_bench(on_queue_state=heard.append)
    async with bench.service:
        sampler = await bench.service.create_sampling_client(base_model="tiny")
        assert sampler.queue_state.state == "active"
        bench.recorder.faults["retrieve_future"] = [answering(408, FULL)]
        await sampler.sample(ModelInput.from_ints([1]), sampling_params=SamplingParams(max_tokens=1))
        assert [one.state for one in heard] == ["paused_capacity", "active"]
        assert {one.source for one in heard} == {sampler.sampling_session_id}


async def test_a_callback_that_raises_is_not_called_again(local_bench, caplog):
    calls: list[QueueState] = []

    def broken(state: QueueState) -> None:
        calls.append(state)
        raise ZeroDivisionError

    bench = local_bench(on_queue_state=broken)
    async with bench.service:
        training = await bench.train()
        bench.recorder.faults["retrieve_future"] = [answering(408, FULL)]
        with caplog.at_level(logging.WARNING):
            await training.forward(DATA)
    assert len(calls) == 1
    assert "on_queue_state raised" in caplog.text


async def test_a_number_that_a_proxy_refused_ends_the_client_and_not_in_a_hang(local_bench):
    bench = local_bench(options={"hold_seconds": 0.05})
    async with bench.service:
        training = await bench.train()
        await training.forward_backward(DATA)
        await training.optim_step()
        saved = await training.save_state("before")
        bench.recorder.faults["B"] = [answering(403, {"detail": "the proxy does not let you through"})]
        with pytest.raises(PermissionDenied):
            await training.forward_backward(DATA)
        # Number 4 never came to the service, so it waits for it.
        async with asyncio.timeout(20):
            step, update = await asyncio.gather(
                training.forward_backward_custom(DATA, nll), training.optim_step(), return_exceptions=True
            )
        for error in (step, update):
            assert isinstance(error, SequenceLost), error
            assert "request 4" in str(error)
            assert "create_training_client_from_state" in str(error)
        with pytest.raises(SequenceLost):
            await training.forward(DATA)
        again = await bench.service.create_training_client_from_state(saved.path, with_optimizer=True)
        await again.forward_backward_custom(DATA, nll)
        await again.optim_step()


async def test_a_number_that_is_only_late_is_waited_for(local_bench):
    """The same words of the service, while the number is under way: chunks that arrive out of order."""
    bench = local_bench(options={"hold_seconds": 0.05})
    gate = asyncio.Event()
    bench.recorder.always["config"] = answering(200, {"proto_write_fwdbwd": True, "fwdbwd_max_chunk_len": 1})
    async with bench.service:
        training = await bench.train()
        heard: list[str | None] = []

        async def late(arrival: Any, serve: Any, send: Any) -> None:
            if arrival.number[1] == 1:
                await gate.wait()
            await serve(send)

        async def note(arrival: Any, serve: Any, send: Any) -> None:
            heard.append(training.queue_state.reason)
            gate.set()
            await serve(send)

        bench.recorder.always["B"] = late
        step = asyncio.create_task(training.forward_backward(DATA))
        await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 2)
        # Somebody asks for the second chunk's result before the first chunk has arrived.
        request_id = bench.service._embedded.core.sequencer(training.model_id).receipts[2].request_id
        polling = training._session.api.result(
            request_id, "ForwardBackward", read_forward_backward, training._queue.pending
        )
        waiting = asyncio.create_task(polling)
        bench.recorder.faults["retrieve_future"] = [None, note]
        async with asyncio.timeout(20):
            assert (await step).num_datums == 2
        await asyncio.wait([waiting])
        assert heard == ["seq_id 2 waits for seq_id 1, not received yet"]


async def test_payment_over_the_wire(local_bench):
    bench = local_bench()
    async with bench.service:
        training = await bench.train()
        unpaid = answering(402, {"detail": "no credit"}, retry_after_ms="20")
        bench.recorder.faults.update({"B": [unpaid, unpaid], "retrieve_future": [unpaid], "asample": [unpaid]})
        await training.forward_backward(DATA)
        await training.optim_step()
        sampler = await training.save_weights_and_get_sampling_client()
        await sampler.sample(ModelInput.from_ints([1]), sampling_params=SamplingParams(max_tokens=1))
        assert bench.kinds(training) == ["B", "optim_step", "save_weights_for_sampler"]
        assert len(bench.recorder.of("B")) == 3


async def test_payment_that_is_not_waited_for(local_bench):
    bench = local_bench(billing_pause=0)
    async with bench.service:
        training = await bench.train()
        bench.recorder.faults["B"] = [answering(402, {"detail": "no credit"})]
        with pytest.raises(BillingRequired, match="no credit"):
            await training.forward_backward(DATA)


async def test_a_lost_result_is_a_failed_request(bench):
    training = await bench.train()
    bench.recorder.faults["retrieve_future"] = [answering(410, {"detail": "gone"})]
    step, update = await asyncio.gather(training.forward_backward(DATA), training.optim_step(), return_exceptions=True)
    assert isinstance(step, ResultLost)
    assert isinstance(step, RequestFailed)
    assert step.request_id
    assert not isinstance(update, RequestFailed)
