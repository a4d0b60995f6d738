"""A step that fails sends nothing of its gradient, leaves no gap, and does not let an optim_step through."""

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.client.data import bad_datum, datum, nll
from tests.client.recorder import after, answering, chunked
from tinkex_py import (
    Datum,
    InPlaceMutation,
    InvalidData,
    InvalidSpec,
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
    UnsupportedFeature,
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


@pytest.mark.parametrize("leaves", ["timeout", "caller"])
async def test_a_term_that_suppresses_its_cancellation_leaves_the_client_usable(local_bench, leaves: str):
    started = asyncio.Event()

    async def stubborn(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        while True:
            started.set()
            try:
                await asyncio.sleep(3600)
            except:  # noqa: E722  # that is the point
                continue

    bench = local_bench()
    await bench.service.__aenter__()
    training = await bench.train()
    specs = [RegularizerSpec(fn=stubborn, weight=1.0, name="stubborn", timeout=0.05 if leaves == "timeout" else 3600)]
    step = asyncio.create_task(training.forward_backward_custom(DATA, nll, regularizers=specs, cancel_grace=0.02))
    if leaves == "caller":
        await started.wait()
        step.cancel()
    await asyncio.wait([step], timeout=30)
    assert step.done()
    assert step.cancelled() if leaves == "caller" else isinstance(step.exception(), RegularizerTimeout)
    assert bench.kinds(training) == ["F"]
    for _ in range(2):
        await asyncio.wait_for(training.forward_backward_custom(DATA, nll), 30)
    assert training.accumulated == 2
    await training.optim_step()
    assert bench.kinds(training)[1:] == ["F", "B", "F", "B", "optim_step"]
    await asyncio.wait_for(bench.service.aclose(), 30)


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


class BrokenLength(list):
    def __len__(self) -> int:
        raise RuntimeError("no length")


THREE = ModelInput.from_ints([1, 2, 3])
WITHOUT_TARGETS = Datum(model_input=THREE, loss_fn_inputs={"weights": [1.0, 1.0, 1.0]})
SHORT_TARGETS = Datum(model_input=THREE, loss_fn_inputs={"target_tokens": [2, 3]})
SPEC = RegularizerSpec(fn=nll, weight=1.0, name="a")
INVALID: list[tuple[type[Exception], str, Callable[[Any], Any]]] = [
    *((InvalidData, "", lambda training, data=data: training.forward_backward(data))
      for data in ([], ["no datum"], None, [*DATA, WITHOUT_TARGETS], [*DATA, SHORT_TARGETS])),
    *((InvalidData, "", lambda training, data=data: training.forward_backward_custom(data, nll))
      for data in ([], ["no datum"], None, [*DATA, WITHOUT_TARGETS], [*DATA, SHORT_TARGETS])),
    *((InvalidData, "'advantages'", lambda training, loss=loss: training.forward_backward(DATA, loss))
      for loss in ("importance_sampling", "ppo", "cispo", "dro", "gspo")),
    (RuntimeError, "no length", lambda training: training.forward_backward_custom(BrokenLength(DATA), nll)),
    (PipelineError, "3", lambda training: training.forward_backward_custom(DATA, 3)),
    (InvalidSpec, "", lambda training: training.forward_backward_custom(DATA, nll, regularizers=None)),
    (InvalidSpec, "", lambda training: training.forward_backward_custom(DATA, nll, regularizers=SPEC)),
    (InvalidData, "AdamParams", lambda training: training.optim_step({"learning_rate": 1.0})),
    (InvalidData, "", lambda training: training.load_state(object())),
]  # fmt: skip


async def test_invalid_requests_hold_the_optim_step_behind_them_back(bench):
    training = await bench.train()
    for error_class, words, request in INVALID:
        result, update = await asyncio.gather(request(training), training.optim_step(), return_exceptions=True)
        assert isinstance(result, error_class), result
        assert words in str(result)
        assert isinstance(update, PrecedingRequestFailed), (result, update)
    assert bench.kinds(training) == []
    await asyncio.gather(training.forward_backward(DATA), training.optim_step())
    assert bench.kinds(training) == ["B", "optim_step"]
    load, update = await asyncio.gather(training.load_state("x"), training.optim_step(), return_exceptions=True)
    assert isinstance(load, UnsupportedFeature)
    assert isinstance(update, PrecedingRequestFailed)


async def test_a_deadline_before_hand_over_ends_the_step_and_one_after_it_does_nothing(bench):
    training = await bench.train()
    step, update = await asyncio.gather(
        training.forward_backward_custom(DATA, endless, timeout=None, deadline=0.3),
        training.optim_step(),
        return_exceptions=True,
    )
    assert isinstance(step, TimeoutError)
    assert isinstance(step, TinkexError)
    assert "0.3" in str(step)
    assert isinstance(update, PrecedingRequestFailed)
    assert bench.kinds(training) == ["F"]
    # The gradient is handed over, but its response takes longer than the deadline.
    gate = asyncio.Event()
    bench.recorder.faults["B"] = [after(gate)]
    loop = asyncio.get_running_loop()
    started = loop.time()
    late = asyncio.create_task(training.forward_backward_custom(DATA, nll, deadline=1.0))
    await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
    loop.call_at(started + 1.1, gate.set)
    assert (await late).service_output.num_datums == 2
    assert bench.kinds(training) == ["F", "F", "B"]


async def test_errors_tell_what_is_accumulated_and_what_to_do(bench):
    training = await bench.train()
    await training.forward_backward(DATA)
    await training.forward_backward_custom(DATA, nll)
    assert training.accumulated == 2
    with pytest.raises(RegularizerError) as failed:
        await training.forward_backward_custom(DATA, raising)
    assert failed.value.accumulated == 2
    assert "send only the missing micro-batches again" in str(failed.value)
    assert "new client from the last checkpoint" in str(failed.value)
    for refused in (
        training.forward_backward_custom([], nll),
        training.forward_backward_custom(DATA, "no loss"),
        training.forward_backward([]),
        training.optim_step("fast"),
        training.load_state("tinker://run/weights/name"),
    ):
        with pytest.raises(TinkexError) as caught:
            await refused
        assert caught.value.accumulated == 2
        assert "micro-batches" not in str(caught.value)  # nothing was sent, so there is nothing to repeat
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
        fresh = await bench.train()  # the service waits for the numbers above for ever
        bench.recorder.faults["B"] = [None, answering(422)]
        with pytest.raises(PartialFailure):
            await fresh.forward_backward(DATA)
        assert fresh.accumulated == 1  # a part of it was taken


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
    with pytest.raises(PrecedingRequestFailed):  # while another submission is on the wire
        await queued
    gate.set()
    assert (await sent).num_datums == 2
    assert bench.kinds(training) == ["B", "B"]
    await training.optim_step()
    assert bench.kinds(training) == ["B", "B", "optim_step"]


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
