"""Many terms at once, for `subject_process`. Each run returns the longest gap of the event loop, in seconds."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import torch

from benchmarks.composed import base_loss
from benchmarks.event_loop import watched_loop
from benchmarks.ways import in_fresh_thread, logprobs_of
from tinkex_py import Pipeline, RegularizerSpec

Work = Callable[[], Awaitable[object]]


def heavy(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    """Does much torch work on few tokens."""
    values = logprobs
    for _ in range(12):
        values = torch.sin(values) + torch.exp(-values.square())
    return values.sum()


@asynccontextmanager
async def waiting(terms: int, seconds: float, tokens: int, max_concurrency: int) -> AsyncGenerator[Work]:
    """Async terms that wait, as for the response of a judge model."""

    async def judge(_data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(seconds)
        return logprobs.square().mean()

    specs = [RegularizerSpec(fn=judge, weight=0.01, name=f"judge{number}") for number in range(terms)]
    pipeline = Pipeline(base_loss, specs, track_grad_norms=True, max_concurrency=max_concurrency)
    async with _watched(pipeline, tokens) as work:
        yield work


@asynccontextmanager
async def busy(terms: int, tokens: int) -> AsyncGenerator[Work]:
    """Sync terms that keep the cores busy."""
    specs = [RegularizerSpec(fn=heavy, weight=0.01, name=f"heavy{number}") for number in range(terms)]
    async with _watched(Pipeline(base_loss, specs, track_grad_norms=True), tokens) as work:
        yield work


@asynccontextmanager
async def _watched(pipeline: Pipeline, tokens: int) -> AsyncGenerator[Work]:
    logprobs = logprobs_of(tokens)

    async def work() -> float:
        with watched_loop() as gap:
            await pipeline.compute([], logprobs)
        return gap.worst

    yield work


@asynccontextmanager
async def busy_alone(terms: int, tokens: int) -> AsyncGenerator[Work]:
    """Only the torch work of the busy terms, one after another: torch itself uses all cores."""
    logprobs = logprobs_of(tokens)

    def evaluate() -> None:
        for _ in range(terms):
            _differentiate(logprobs)

    async def work() -> float:
        with watched_loop() as gap:
            await in_fresh_thread(evaluate)
        return gap.worst

    yield work


def _differentiate(logprobs: torch.Tensor) -> None:
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(heavy([], leaf), leaf)
    torch.linalg.vector_norm(gradient).item()
