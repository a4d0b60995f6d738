"""A custom step that is cancelled at any of its suspensions leaves the client in order."""

import asyncio
from collections.abc import Coroutine, Generator
from typing import Any

import pytest
import torch

from tests.client.data import datum, nll
from tests.client.recorder import chunked
from tinkex_py import PrecedingRequestFailed, RegularizerSpec

pytestmark = pytest.mark.asyncio
DATA = [datum(3, 1), datum(2, 2)]


class Cancelling:
    """Drives a coroutine and cancels the task it runs in at one of its suspensions.

    Args:
        coroutine: what to run.
        at: which suspension, from 1.
        late: cancel after what it waits for has come, before it goes on; else while it waits.
    """

    def __init__(self, coroutine: Coroutine[Any, Any, Any], at: int, *, late: bool) -> None:
        self.suspensions = 0
        self._coroutine = coroutine
        self._at = at
        self._late = late

    def __await__(self) -> Generator[Any, Any, Any]:
        task = asyncio.current_task()
        assert task is not None
        steps = self._coroutine.__await__()
        send, value = steps.send, None
        while True:
            try:
                waits_for = send(value)
            except StopIteration as done:
                return done.value
            self.suspensions += 1
            if self.suspensions == self._at:
                if self._late and waits_for is not None:
                    blocking = waits_for._asyncio_future_blocking
                    waits_for.add_done_callback(lambda _: task.cancel())
                    waits_for._asyncio_future_blocking = blocking
                else:
                    task.cancel()
            try:
                value = yield waits_for
                send = steps.send
            except BaseException as error:  # noqa: BLE001  (handed to the coroutine, whatever it is)
                send, value = steps.throw, error


async def smooth(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    return (logprobs**2).sum()


async def run_cancelled(bench: Any, training: Any, at: int, *, late: bool) -> bool:
    """One step cancelled at suspension `at` with an optim_step behind it. True if the step had that many."""
    specs = [RegularizerSpec(fn=smooth, weight=0.5, name="smooth")]
    driven = Cancelling(training.forward_backward_custom(DATA, nll, regularizers=specs), at, late=late)

    async def drive() -> Any:
        return await driven

    before = bench.kinds(training)
    step, update = asyncio.create_task(drive()), asyncio.create_task(training.optim_step())
    async with asyncio.timeout(30):
        await asyncio.wait([step, update])
    await training._ordering.drain(10.0)
    assert training._ordering.is_empty
    new = bench.kinds(training)[len(before) :]
    assert new in ([], ["F", "F"], ["F", "F", "B", "B", "optim_step"]), (at, new)
    if "B" in new:
        assert not isinstance(update.exception(), Exception), (at, update)
    else:
        assert isinstance(update.exception(), PrecedingRequestFailed), (at, update)
    reached = driven.suspensions >= at
    assert step.cancelled() == reached or (late and not step.cancelled()), (at, step)
    return reached


@pytest.mark.parametrize("late", [False, True])
async def test_cancelled_at_every_suspension(local_bench, late):
    bench = local_bench()
    bench.recorder.always["config"] = chunked(1)
    async with bench.service:
        training = await bench.train()
        at = 1
        while await run_cancelled(bench, training, at, late=late):
            at += 1
        assert at > 5
        # After all that: a step like any other, and no thread, slot or task is missing.
        await asyncio.gather(training.forward_backward_custom(DATA, nll), training.optim_step())
        assert bench.kinds(training)[-5:] == ["F", "F", "B", "B", "optim_step"]
        assert bench.service._workers.abandoned() == []
        assert training.accumulated == 0


async def test_cancelled_after_any_number_of_turns_of_the_loop(local_bench):
    """Reaches what the step's own task does not see: the exchanges, the terms and their threads."""
    bench = local_bench()
    async with bench.service:
        training = await bench.train()
        turns, completed = 1, 0  # a task that is cancelled before its first step never had a place
        while completed < 3:
            before = bench.kinds(training)
            step = asyncio.create_task(training.forward_backward_custom(DATA, nll))
            update = asyncio.create_task(training.optim_step())
            for turn in range(turns):
                # Turns without a pause would keep the interpreter from the thread of the engine.
                await asyncio.sleep(0 if turn < 60 else 0.001)
            step.cancel()
            async with asyncio.timeout(30):
                await asyncio.wait([step, update])
            await training._ordering.drain(10.0)
            assert training._ordering.is_empty
            new = bench.kinds(training)[len(before) :]
            assert new in ([], ["F"], ["F", "B", "optim_step"]), (turns, new)
            assert isinstance(update.exception(), PrecedingRequestFailed) == ("B" not in new)
            completed += not step.cancelled()
            turns += max(1, turns // 5)
        await training.forward_backward_custom(DATA, nll)
        assert bench.service._workers.abandoned() == []


async def test_a_cancelled_caller_leaves_at_once_though_its_gradient_is_under_way(bench):
    from tests.client.recorder import after

    training = await bench.train()
    gate = asyncio.Event()
    bench.recorder.faults["B"] = [after(gate)]
    step = asyncio.create_task(training.forward_backward_custom(DATA, nll))
    update = asyncio.create_task(training.optim_step())
    await bench.recorder.until(lambda: len(bench.recorder.of("B")) == 1)
    step.cancel()
    async with asyncio.timeout(5):
        await asyncio.wait([step])
    assert step.cancelled()
    assert not update.done()
    gate.set()
    async with asyncio.timeout(10):
        assert (await update).metrics["grad_norm"] > 0  # the gradient did arrive
    assert bench.kinds(training) == ["F", "B", "optim_step"]
