"""Terms in threads and worker processes, for `subject_process`. Each run returns the longest gap of the event loop."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, Literal

import numpy as np
import torch

from benchmarks.composed import base_loss, l2
from benchmarks.event_loop import watched_loop
from benchmarks.ways import logprobs_of
from tinkex_py import Datum, Pipeline, RegularizerSpec

Work = Callable[[], Awaitable[object]]
Place = Literal["thread", "process"]
LENGTH = 1000


def spins(_data: Any, logprobs: torch.Tensor, rounds: int) -> torch.Tensor:
    """Holds Python's lock: a loop that no library helps."""
    total = 0
    for number in range(rounds):
        total += number % 7
    return logprobs.sum() * (total % 2)


@asynccontextmanager
async def pure_python(place: Place, terms: int, rounds: int) -> AsyncGenerator[Work]:
    """Terms of pure Python at the same time."""
    specs = [
        RegularizerSpec(spins, 0.01, f"spins{number}", options={"rounds": rounds}, runs_in=place)
        for number in range(terms)
    ]
    async with _watched(Pipeline(base_loss, specs, timeout=None), [], logprobs_of(16)) as work:
        yield work


@asynccontextmanager
async def one_term(place: Place, tokens: int, datums: bool) -> AsyncGenerator[Work]:
    """One cheap term, with or without datums of a thousand tokens, targets and weights each."""
    data = [_datum() for _ in range(tokens // LENGTH)] if datums else []
    pipeline = Pipeline(base_loss, [RegularizerSpec(l2, 0.01, runs_in=place)])
    async with _watched(pipeline, data, logprobs_of(tokens)) as work:
        yield work


def _datum() -> Datum:
    return Datum.from_tokens([0], np.arange(LENGTH))


@asynccontextmanager
async def _watched(pipeline: Pipeline, data: list[Datum], logprobs: torch.Tensor) -> AsyncGenerator[Work]:
    async def work() -> float:
        with watched_loop() as gap:
            await pipeline.compute(data, logprobs)
        return gap.worst

    yield work
