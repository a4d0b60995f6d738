"""The forward pass of the next custom step goes out while the terms of this one run, and no number changes."""

import asyncio
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from tests.client.data import datum, nll
from tests.client.recorder import after, answering
from tinkex_py import AdamParams, Datum, NonFiniteLoss, PrecedingRequestFailed, RegularizerSpec
from tinkex_py.losses.schedules import Linear

pytestmark = pytest.mark.asyncio
BATCHES = [[datum(5, 1), datum(3, 2)], [datum(4, 3)], [datum(6, 4), datum(2, 5)], [datum(7, 6)]]


class Terms:
    """A base loss for each step, which ends only when the forward passes of so many steps have arrived."""

    def __init__(self, bench: Any, training: Any) -> None:
        self._bench = bench
        self._training = training
        self.called: list[str] = []

    def behind(self, name: str, forwards: int, failure: Exception | None = None) -> Any:
        async def term(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
            self.called.append(name)
            async with asyncio.timeout(20):
                await self._bench.recorder.until(lambda: self._bench.kinds(self._training).count("F") >= forwards)
            if failure is not None:
                raise failure
            return nll(data, logprobs)

        return term


async def test_the_next_forward_goes_out_one_step_ahead_and_not_two(bench):
    training = await bench.train()
    terms = Terms(bench, training)
    await asyncio.gather(
        training.forward_backward_custom(BATCHES[0], terms.behind("1", 2)),
        training.forward_backward_custom(BATCHES[1], terms.behind("2", 3)),
        training.forward_backward_custom(BATCHES[2], nll),
        training.optim_step(),
    )
    assert bench.kinds(training) == ["F", "F", "B", "F", "B", "B", "optim_step"]


async def test_overlap_can_be_turned_off(bench):
    training = await bench.train()
    await asyncio.gather(*(training.forward_backward_custom(batch, nll, overlap=False) for batch in BATCHES[:3]))
    assert bench.kinds(training) == ["F", "B"] * 3


@pytest.mark.parametrize("between", ["optim_step", "forward"])
async def test_only_neighbours_overlap(bench, between):
    training = await bench.train()

    async def second_forward_would_be_seen(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        for _ in range(50):
            await asyncio.sleep(0)
        return nll(data, logprobs)

    middle = training.optim_step() if between == "optim_step" else training.forward(BATCHES[0])
    await asyncio.gather(
        training.forward_backward_custom(BATCHES[0], second_forward_would_be_seen),
        middle,
        training.forward_backward_custom(BATCHES[1], nll),
    )
    assert bench.kinds(training) == ["F", "B", "optim_step" if between == "optim_step" else "F", "F", "B"]


async def trained(bench: Any, *, overlap: bool) -> tuple[np.ndarray, list[float], list[str]]:
    training = await bench.train()
    regularizer = RegularizerSpec(fn=lambda data, logprobs: (logprobs**2).mean(), weight=Linear(0.5, 2.0, 3), name="l2")
    losses: list[float] = []
    for _ in range(3):
        *outputs, _ = await asyncio.gather(
            *(
                training.forward_backward_custom(batch, nll, regularizers=[regularizer], overlap=overlap)
                for batch in BATCHES
            ),
            training.optim_step(AdamParams(learning_rate=1e-2)),
        )
        losses += [output.loss_total for output in outputs]
    kinds = bench.kinds(training)
    after = await training.forward([item for batch in BATCHES for item in batch])
    return after.packed["logprobs"].values, losses, kinds


async def test_the_trained_weights_are_the_same_with_and_without(bench):
    with_overlap, losses, kinds = await trained(bench, overlap=True)
    without, same_losses, plain = await trained(bench, overlap=False)
    assert plain == (["F", "B"] * 4 + ["optim_step"]) * 3
    assert kinds != plain, "nothing overlapped, so nothing is shown"
    np.testing.assert_array_equal(with_overlap, without)
    assert losses == same_losses


async def test_behind_a_step_whose_term_fails_no_term_is_called(bench):
    training = await bench.train()
    terms = Terms(bench, training)
    failed, behind, update = await asyncio.gather(
        training.forward_backward_custom(BATCHES[0], terms.behind("1", 2, NonFiniteLoss("nan", name="base_loss"))),
        training.forward_backward_custom(BATCHES[1], terms.behind("2", 2)),
        training.optim_step(),
        return_exceptions=True,
    )
    assert not isinstance(failed, PrecedingRequestFailed)
    assert isinstance(failed, Exception)
    assert isinstance(behind, PrecedingRequestFailed)
    assert isinstance(update, PrecedingRequestFailed)
    assert terms.called == ["1"]
    assert training.accumulated == 0
    # The client goes on, without a gap in its numbers.
    await asyncio.gather(training.forward_backward_custom(BATCHES[1], nll), training.optim_step())
    assert bench.kinds(training) == ["F", "F", "F", "B", "optim_step"]


async def test_behind_a_step_whose_gradient_is_refused_no_term_is_called(bench):
    training = await bench.train()
    terms = Terms(bench, training)
    bench.recorder.faults["B"] = [answering(400)]
    results = await asyncio.gather(
        training.forward_backward_custom(BATCHES[0], terms.behind("1", 2)),
        training.forward_backward_custom(BATCHES[1], terms.behind("2", 2)),
        return_exceptions=True,
    )
    assert isinstance(results[1], PrecedingRequestFailed)
    assert terms.called == ["1"]


async def test_the_terms_of_a_step_start_when_the_gradient_of_the_step_before_it_was_accepted(bench):
    """Its result may come later."""
    training = await bench.train()
    terms_began = asyncio.Event()
    bench.recorder.faults["retrieve_future"] = [None, None, after(terms_began)]

    def term(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
        assert bench.kinds(training) == ["F", "F", "B"]
        loop.call_soon_threadsafe(terms_began.set)
        return nll(data, logprobs)

    loop = asyncio.get_running_loop()
    first = training.forward_backward_custom(BATCHES[0], Terms(bench, training).behind("1", 2))
    await asyncio.gather(first, training.forward_backward_custom(BATCHES[1], term))
    assert bench.kinds(training) == ["F", "F", "B", "B"]
