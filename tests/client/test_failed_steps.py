"""A step that fails sends nothing of its gradient, leaves no gap, and does not let an optim_step through."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.client.data import bad_datum, datum, nll
from tests.client.recorder import after, answering, chunked
from tinkex_py import (
    AdamParams,
    Datum,
    InPlaceMutation,
    InvalidData,
    InvalidTermResult,
    ModelInput,
    NonFiniteLoss,
    PartialFailure,
    PipelineError,
    PrecedingRequestFailed,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    RequestFailed,
    TinkexError,
    Unprocessable,
)

pytestmark = pytest.mark.asyncio
DATA = [datum(4, 1), datum(2, 2)]


def raising(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    raise KeyError("lost")


async def raising_async(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    raise KeyError("lost")


async def endless(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return await asyncio.get_running_loop().create_future()


def not_a_number(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - logprobs).log().sum() * 0


def infinite_gradient(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return (logprobs - logprobs.detach()).sqrt().sum()


def a_text(data: Any, logprobs: torch.Tensor) -> Any:
    return "loss"


def in_place(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        logprobs.mul_(2)
    return logprobs.sum()


def behind_autograd(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    logprobs.data[0:1] = 7
    return logprobs.sum()


TERMS: list[tuple[Callable[..., Any], type[TinkexError]]] = [
    (raising, RegularizerError),
    (raising_async, RegularizerError),
    (endless, RegularizerTimeout),
    (not_a_number, NonFiniteLoss),
    (infinite_gradient, NonFiniteLoss),
    (a_text, InvalidTermResult),
    (in_place, InPlaceMutation),
    (behind_autograd, InPlaceMutation),
]


async def test_a_failing_term_leaves_the_client_usable_and_holds_optim_step_back(bench):
    training = await bench.train()
    expected = []
    for term, error_class in TERMS:
        spec = RegularizerSpec(fn=term, weight=0.5, name="culprit", timeout=0.05 if term is endless else None)
        step, update = await asyncio.gather(
            training.forward_backward_custom(DATA, nll, regularizers=[spec]),
            training.optim_step(),
            return_exceptions=True,
        )
        assert type(step) is error_class, (term, step)
        assert step.name == ("unknown" if term is behind_autograd else "culprit")
        assert isinstance(update, PrecedingRequestFailed), (term, update)
        expected.append("F")
        assert bench.kinds(training) == expected, term
        assert training.accumulated == 0
    await training.forward_backward_custom(DATA, nll)
    await training.optim_step()
    assert bench.kinds(training) == [*expected, "F", "B", "optim_step"]


async def test_a_failing_base_loss_has_the_reserved_name(bench):
    training = await bench.train()
    with pytest.raises(RegularizerError) as caught:
        await training.forward_backward_custom(DATA, raising)
    assert caught.value.name == "base_loss"
    assert isinstance(caught.value.__cause__, KeyError)
    assert bench.kinds(training) == ["F"]


async def test_a_loss_without_a_path_to_the_logprobs_sends_nothing(bench):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, lambda data, logprobs: logprobs.detach().sum()),
        training.optim_step(),
        return_exceptions=True,
    )
    assert isinstance(step, PipelineError)
    assert "detach" in str(step)
    assert isinstance(update, PrecedingRequestFailed)
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_a_skipped_term_does_not_stop_the_step(bench):
    training = await bench.train()
    spec = RegularizerSpec(fn=raising, weight=0.5, name="shaky", on_error="skip")
    output, _ = await asyncio.gather(
        training.forward_backward_custom(DATA, nll, regularizers=[spec]), training.optim_step()
    )
    assert list(output.skipped) == ["shaky"]
    assert bench.kinds(training) == ["F", "B", "optim_step"]


async def test_a_task_group_holds_optim_step_back_too(bench):
    training = await bench.train()

    async def step_and_update(loss: Any) -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(training.forward_backward_custom(DATA, loss))
            group.create_task(training.optim_step())

    with pytest.raises(ExceptionGroup) as caught:
        await step_and_update(raising)
    assert caught.group_contains(RegularizerError)
    assert bench.kinds(training) == ["F"]
    await step_and_update(nll)
    assert bench.kinds(training) == ["F", "F", "B", "optim_step"]


async def test_a_cancelled_step_holds_optim_step_back(bench):
    training = await bench.train()
    reached = asyncio.Event()

    async def waits(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        reached.set()
        return await asyncio.get_running_loop().create_future()

    step = asyncio.create_task(training.forward_backward_custom(DATA, waits, timeout=None))
    update = asyncio.create_task(training.optim_step())
    await reached.wait()
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    with pytest.raises(PrecedingRequestFailed):
        await update
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_asyncio_timeout_around_a_step_fires_as_a_timeout(bench):
    training = await bench.train()
    with pytest.raises(TimeoutError) as caught:
        async with asyncio.timeout(0.3):
            await training.forward_backward_custom(DATA, endless, timeout=None)
    assert not isinstance(caught.value, TinkexError)
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training)[-2:] == ["F", "B"]


@pytest.mark.parametrize("custom", [False, True])
async def test_bad_data_beside_an_optim_step_sends_nothing(bench, custom):
    training = await bench.train()

    def request(data: Any) -> Any:
        return training.forward_backward_custom(data, nll) if custom else training.forward_backward(data)

    tokens = ModelInput.from_ints([1, 2, 3])
    without_targets = Datum(model_input=tokens, loss_fn_inputs={"weights": [1.0, 1.0, 1.0]})
    short = Datum(model_input=tokens, loss_fn_inputs={"target_tokens": [2, 3]})
    for bad in ([], ["no datum"], None, [*DATA, without_targets], [*DATA, short]):
        step, update = await asyncio.gather(request(bad), training.optim_step(), return_exceptions=True)
        assert isinstance(step, InvalidData), bad
        assert isinstance(update, PrecedingRequestFailed), (bad, update)
    assert bench.kinds(training) == []
    await asyncio.gather(request(DATA), training.optim_step())
    assert bench.kinds(training)[-2:] == ["B", "optim_step"]


@pytest.mark.parametrize("loss_fn", ["importance_sampling", "ppo", "cispo", "dro", "gspo"])
async def test_inputs_that_a_known_loss_lacks_send_nothing(bench, loss_fn):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward(DATA, loss_fn), training.optim_step(), return_exceptions=True
    )
    assert isinstance(step, InvalidData)
    assert "'advantages'" in str(step)
    assert isinstance(update, PrecedingRequestFailed)
    assert bench.kinds(training) == []


async def test_a_bad_base_loss_beside_an_optim_step_sends_nothing(bench):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, 3), training.optim_step(), return_exceptions=True
    )
    assert isinstance(step, PipelineError)
    assert isinstance(update, PrecedingRequestFailed)
    assert bench.kinds(training) == []


async def test_bad_adam_params_break_what_is_behind(bench):
    training = await bench.train()
    results = await asyncio.gather(
        training.optim_step({"learning_rate": 1.0}), training.forward_backward(DATA), return_exceptions=True
    )
    assert isinstance(results[0], InvalidData)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert bench.kinds(training) == []
    with pytest.raises(InvalidData):
        AdamParams(learning_rate=float("nan"))


async def test_errors_tell_what_is_accumulated_and_what_to_do(bench):
    training = await bench.train()
    await training.forward_backward(DATA)
    await training.forward_backward_custom(DATA, nll)
    assert training.accumulated == 2
    for request in (
        training.forward_backward_custom(DATA, raising),
        training.forward_backward_custom([], nll),
        training.forward_backward([]),
    ):
        with pytest.raises(TinkexError) as caught:
            await request
        assert caught.value.accumulated == 2
        assert "send only the missing micro-batches again" in str(caught.value)
        assert "new client from the last checkpoint" in str(caught.value)
    await training.optim_step()
    assert training.accumulated == 0
    with pytest.raises(TinkexError) as caught:
        await training.forward_backward_custom(DATA, raising)
    assert caught.value.accumulated == 0
    assert "micro-batches" not in str(caught.value)


async def test_what_the_service_refused_does_not_change_what_is_accumulated(local_bench):
    bench = local_bench()
    bench.recorder.always["config"] = chunked(1)
    async with bench.service:
        training = await bench.train()
        await training.forward_backward(DATA)
        bench.recorder.faults["optim_step"] = [answering(422)]
        with pytest.raises(Unprocessable) as caught:
            await training.optim_step()
        assert caught.value.accumulated == 1
        assert training.accumulated == 1  # the service still holds that gradient
        bench.recorder.faults["B"] = [answering(422)] * len(DATA)
        with pytest.raises(Unprocessable):
            await training.forward_backward(DATA)
        assert training.accumulated == 1
        bench.recorder.faults["B"] = [None, answering(422)]  # the last: others would wait for its number
        with pytest.raises(PartialFailure):
            await training.forward_backward(DATA)
        assert training.accumulated == 2  # a part of it was taken


async def test_a_request_that_the_service_fails_breaks_what_is_queued_and_lists_what_was_sent(bench):
    training = await bench.train()
    gate = asyncio.Event()
    bench.recorder.faults["B"] = [None, after(gate)]
    bad = asyncio.create_task(training.forward_backward([bad_datum()]))
    sent = asyncio.create_task(training.forward_backward(DATA))
    queued = asyncio.create_task(training.optim_step())
    with pytest.raises(RequestFailed) as caught:
        await bad
    assert caught.value.category == "user"
    assert caught.value.handed_over == (2,)
    assert caught.value.accumulated == 2
    gate.set()
    with pytest.raises(PrecedingRequestFailed):
        await queued
    assert (await sent).num_datums == 2
    assert bench.kinds(training) == ["B", "B"]
    await training.optim_step()
    assert bench.kinds(training) == ["B", "B", "optim_step"]


async def test_what_is_broken_learns_it_at_once_even_while_another_submission_is_on_the_wire(bench):
    training = await bench.train()
    gate = asyncio.Event()
    bench.recorder.faults["B"] = [None, after(gate)]
    bad = asyncio.create_task(training.forward_backward([bad_datum()]))
    sent = asyncio.create_task(training.forward_backward(DATA))
    queued = asyncio.create_task(training.optim_step())
    with pytest.raises(RequestFailed):
        await bad
    await asyncio.wait([queued], timeout=2)
    told = queued.done()
    gate.set()
    results = await asyncio.gather(sent, queued, return_exceptions=True)
    assert isinstance(results[1], PrecedingRequestFailed)
    assert told, "the broken optim_step was told only after an unrelated submission had been answered"


async def test_a_forward_that_the_service_fails_fails_its_custom_step_and_nothing_is_sent(bench):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom([bad_datum()], nll), training.optim_step(), return_exceptions=True
    )
    assert isinstance(step, RequestFailed)
    assert step.handed_over == ()
    assert isinstance(update, PrecedingRequestFailed)
    await training.forward_backward_custom(DATA, nll)
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_a_read_that_fails_breaks_nothing(bench):
    training = await bench.train()
    read, update = await asyncio.gather(training.forward([bad_datum()]), training.optim_step(), return_exceptions=True)
    assert isinstance(read, RequestFailed)
    assert not isinstance(update, BaseException)
    assert bench.kinds(training) == ["F", "optim_step"]


async def test_a_deadline_before_hand_over_ends_the_step_and_one_after_it_does_nothing(bench):
    training = await bench.train()
    with pytest.raises(TimeoutError) as caught:
        await training.forward_backward_custom(DATA, endless, timeout=None, deadline=0.3)
    assert isinstance(caught.value, TinkexError)
    assert "0.3" in str(caught.value)
    assert bench.kinds(training) == ["F"]
    # The gradient is handed over, but its answer takes longer than the deadline.
    gate = asyncio.Event()
    bench.recorder.faults["B"] = [after(gate)]
    loop = asyncio.get_running_loop()
    started = loop.time()
    step = asyncio.create_task(training.forward_backward_custom(DATA, nll, deadline=2.0))
    await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
    loop.call_at(started + 2.2, gate.set)
    assert (await step).service_output.num_datums == 2
    assert loop.time() > started + 2.2
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_a_step_deadline_holds_optim_step_back(bench):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, endless, timeout=None, deadline=0.3),
        training.optim_step(),
        return_exceptions=True,
    )
    assert isinstance(step, TimeoutError)
    assert isinstance(update, PrecedingRequestFailed)
    assert "optim_step" not in bench.kinds(training)
