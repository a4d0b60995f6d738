"""Random bursts of requests on the real service keep the invariants of the lane."""

import asyncio
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch

from tests.client.data import bad_datum, datum, nll
from tests.client.recorder import answering, lose_the_answer
from tinkex_py import TinkexError

pytestmark = pytest.mark.asyncio
DATA = [datum(2, 1), datum(1, 2)]


async def failing(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    raise ValueError("term")


def nan(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    return logprobs.sum() * float("nan")


GRADIENTS: dict[str, Callable[[Any], Any]] = {
    "custom": lambda training: training.forward_backward_custom(DATA, nll),
    "custom, term fails": lambda training: training.forward_backward_custom(DATA, failing),
    "custom, NaN": lambda training: training.forward_backward_custom(DATA, nan),
    "custom, bad input": lambda training: training.forward_backward_custom([], nll),
    "built in": lambda training: training.forward_backward(DATA),
    "built in, bad input": lambda training: training.forward_backward([]),
    "built in, fails on the service": lambda training: training.forward_backward([bad_datum()]),
}
OTHERS: dict[str, Callable[[Any], Any]] = {
    "optim": lambda training: training.optim_step(),
    "forward": lambda training: training.forward(DATA),
    "save": lambda training: training.save_state("s", overwrite=True),
}
SENDS = {**dict.fromkeys(GRADIENTS, "B"), "optim": "optim_step", "forward": "F", "save": "save_weights"}


def spoil(dice: random.Random, bench: Any) -> None:
    for kind in ("F", "B", "optim_step"):
        options = [None] * 3 + [answering(503), answering(429), lose_the_answer]
        bench.recorder.faults[kind] = [dice.choice(options) for _ in range(4)]


async def run_burst(dice: random.Random, bench: Any, training: Any, *, spoiled: bool) -> None:
    names = dice.choices([*GRADIENTS, "optim", "optim", "optim", "forward", "save"], k=dice.randint(2, 7))
    if spoiled:
        spoil(dice, bench)
    before = len(bench.kinds(training))
    tasks = [asyncio.create_task({**GRADIENTS, **OTHERS}[name](training)) for name in names]
    await asyncio.sleep(0)

    async def cancel(task: asyncio.Task[Any], turns: int) -> None:
        for _ in range(turns):
            await asyncio.sleep(0)
        task.cancel()

    victims = [task for task in tasks if dice.random() < 0.2]
    cancels = [asyncio.create_task(cancel(task, dice.choice([0, 1, 5, 30, 100, 300]))) for task in victims]
    async with asyncio.timeout(30):
        results = await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*cancels)
    await training._ordering.drain(10.0)
    assert training._ordering.is_empty
    assert all(isinstance(r, TinkexError | asyncio.CancelledError) for r in results if isinstance(r, BaseException))
    bench.recorder.faults.clear()
    sent = bench.kinds(training)[before:]  # checks the numbers
    check_updates(names, sent, results)


def check_updates(names: list[str], sent: list[str], results: list[Any]) -> None:
    """Backwards and updates were sent in the order of their places, and no update behind a gradient that was not."""
    changing = [kind for kind in sent if kind in ("B", "optim_step")]
    places = [(name, result) for name, result in zip(names, results, strict=True) if SENDS[name] in ("B", "optim_step")]
    position = 0
    missing = False
    for name, result in places:
        here = position < len(changing) and changing[position] == SENDS[name]
        succeeded = not isinstance(result, BaseException)
        if succeeded:
            assert here, f"{name} succeeded, but was not sent in its place: {names} {sent}"
            assert not (missing and name == "optim"), (
                f"an update went through behind a missing gradient: {names} {sent}"
            )
        could_be_sent = succeeded or not isinstance(result, ValueError)
        if here and could_be_sent and not missing:
            position += 1
        elif name in GRADIENTS:
            missing = True


@pytest.mark.parametrize("spoiled", [False, True])
async def test_random_bursts(local_bench, spoiled):
    dice = random.Random(20_000 + spoiled)
    bench = local_bench()
    async with bench.service:
        for _ in range(3):
            training = await bench.train()
            for _ in range(5):
                await run_burst(dice, bench, training, spoiled=spoiled)
            await asyncio.gather(training.forward_backward_custom(DATA, nll), training.optim_step())
            assert bench.kinds(training)[-3:] == ["F", "B", "optim_step"]


async def test_the_check_of_bursts_can_fail():
    with pytest.raises(AssertionError, match="behind a missing gradient"):
        check_updates(["custom, NaN", "optim"], ["F", "optim_step"], [ArithmeticError(), object()])
    with pytest.raises(AssertionError, match="was not sent"):
        check_updates(["custom", "optim"], ["F", "B"], [object(), object()])
    check_updates(["custom", "optim"], ["F", "B", "optim_step"], [object(), object()])
