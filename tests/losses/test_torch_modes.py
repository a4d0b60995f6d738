"""Rule 3 of running terms: the grad mode belongs to the thread, and every term has its own."""

import asyncio
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch

from tests.losses.support import LIMIT, guide_logprobs, l1, nll, spec
from tinkex_py import Executor, GradientTracker, Pipeline, execute

pytestmark = pytest.mark.asyncio

MODES = [torch.no_grad, torch.inference_mode]
MODE_IDS = ["no_grad", "inference_mode"]
Mode = Callable[[], AbstractContextManager[Any]]


def silencing(mode: Mode, silent: asyncio.Event, done: asyncio.Event) -> Any:
    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        with mode():
            silent.set()
            await done.wait()
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()
        return logprobs.sum()

    return term


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
@pytest.mark.parametrize("silencer_first", [True, False])
async def test_rule_3_one_coroutine_does_not_silence_another(mode: Mode, silencer_first: bool):
    silent, done = asyncio.Event(), asyncio.Event()

    async def speaks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.sum()
        await silent.wait()
        assert torch.is_grad_enabled()
        loss = loss + logprobs.pow(2).sum()
        await asyncio.sleep(0)
        loss = loss + logprobs.exp().sum()
        done.set()
        return loss

    specs = [spec(silencing(mode, silent, done), "silences"), spec(speaks, "speaks")]
    async with asyncio.timeout(LIMIT):
        output = await Pipeline(nll, specs if silencer_first else specs[::-1], track_grad_norms=True).compute(
            [], guide_logprobs()
        )
    values = guide_logprobs()
    expected = (1 + 2 * values + values.exp()).norm().item()
    assert output.regularizers["speaks"].grad_norm == pytest.approx(expected, rel=1e-6)
    assert output.regularizers["silences"].grad_norm == pytest.approx(5**0.5, rel=1e-6)


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
async def test_rule_3_a_silent_term_does_not_silence_the_rest_of_the_loop(mode: Mode):
    silent, done = asyncio.Event(), asyncio.Event()
    seen: list[tuple[bool, bool]] = []

    async def bystander() -> None:
        await silent.wait()
        seen.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        done.set()

    watching = asyncio.ensure_future(bystander())
    await Pipeline(silencing(mode, silent, done)).compute([], guide_logprobs())
    await watching
    assert seen == [(True, False)]
    assert torch.is_grad_enabled()


def on_the_spot(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    assert torch.is_grad_enabled()
    assert not torch.is_inference_mode_enabled()
    return logprobs.pow(2).sum()


async def with_pauses(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    for _ in range(3):
        await asyncio.sleep(0)
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
    return logprobs.pow(2).sum()


async def with_subtasks(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    async def part() -> torch.Tensor:
        await asyncio.sleep(0)
        return logprobs.pow(2).sum()

    (loss,) = await asyncio.gather(part())
    return loss


@pytest.mark.parametrize("term", [on_the_spot, with_pauses, with_subtasks])
@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
async def test_rule_3_the_callers_mode_does_not_leak_in(mode: Mode, term: Any):
    pipeline = Pipeline(term, [spec(term, "again", 0.5)], track_grad_norms=True)
    for size in (5, 10_000):
        with mode():
            inference = torch.is_inference_mode_enabled()
            output = await pipeline.compute([], torch.full((size,), -0.5))
            assert not torch.is_grad_enabled()
            assert torch.is_inference_mode_enabled() == inference
        assert torch.is_grad_enabled()
        assert output.base_loss.grad_norm == pytest.approx(size**0.5, rel=1e-6)  # 2 * -0.5 = -1 for each
        assert output.total_grad_norm == pytest.approx(1.5 * size**0.5, rel=1e-6)
        assert output.regularizers["again"].differentiable


@pytest.mark.parametrize("mode", MODES, ids=MODE_IDS)
async def test_rule_3_holds_behind_every_door(mode: Mode):
    logprobs = torch.full((5,), -0.5)
    leaf = logprobs.clone().requires_grad_()
    with mode():
        assert await GradientTracker.grad_norm(lambda p: p.sum(), logprobs) == pytest.approx(5**0.5, rel=1e-6)
        one = await Executor.execute_one(spec(with_pauses, "one"), [], logprobs, track_grad_norms=True)
        losses = [(await execute(term, [], leaf))[0] for term in (on_the_spot, with_pauses)]
    assert one.grad_norm == pytest.approx(5**0.5, rel=1e-6)
    for loss in losses:
        assert loss.requires_grad


async def test_rule_3_a_worker_thread_is_handed_on_with_grad_on():
    """A sync term that switches grad off for good in its thread must not silence the next one there."""

    def switches_off(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = logprobs.sum()
        torch.set_grad_enabled(False)
        return loss

    pipeline = Pipeline(switches_off, [spec(l1, "next")], max_threads=1, parallel=False, track_grad_norms=True)
    output = await pipeline.compute([], guide_logprobs())
    assert output.base_loss.grad_norm == pytest.approx(5**0.5, rel=1e-6)
    assert output.regularizers["next"].grad_norm == pytest.approx(5**0.5, rel=1e-6)


async def test_rule_3_inputs_that_were_made_in_inference_mode():
    with torch.inference_mode():
        logprobs = guide_logprobs()
    output = await Pipeline(nll, track_grad_norms=True).compute([], logprobs)
    assert output.total_grad_norm == pytest.approx(0.4472136, rel=1e-6)
