"""Random pipelines on one pool, with failures, timeouts and cancellations.

Every permit and thread comes back, and every start event has exactly one end.
"""

import asyncio
import itertools
import math
import random
import threading
from collections import Counter
from typing import Any

import pytest
import torch

from tests.losses.support import LIMIT, packed, recorded, spec, until
from tinkex_py import Pipeline, TinkexError
from tinkex_py.losses.worker_pool import WorkerPool

BOUND = 3


class Terms:
    """Terms that take a random while, and fail now and then."""

    def __init__(self, draw: random.Random) -> None:
        self.draw = draw
        self.numbers = itertools.count()
        self.lock = threading.Lock()
        self.running = 0
        self.peak = 0

    def sync(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        with self.lock:
            self.running += 1
            self.peak = max(self.peak, self.running)
        threading.Event().wait(self.draw.random() * 0.002)
        with self.lock:
            self.running -= 1
        return self._result(logprobs)

    async def coroutine(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(self.draw.random() * 0.004)
        return self._result(logprobs)

    def undetected(self, data: Any, logprobs: torch.Tensor) -> Any:
        return self.coroutine(data, logprobs)

    async def stubborn(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            try:
                await asyncio.sleep(self.draw.random() * 0.01)
            except asyncio.CancelledError:
                continue
        return logprobs.sum()

    def _result(self, logprobs: torch.Tensor) -> torch.Tensor:
        ending = self.draw.random()
        if ending < 0.1:
            raise ValueError("now and then")
        if ending < 0.15:
            raise asyncio.CancelledError
        return logprobs.pow(2).sum() * (math.nan if ending < 0.2 else 1.0)


def random_pipeline(terms: Terms, draw: random.Random) -> Pipeline:
    kinds = (terms.sync, terms.sync, terms.coroutine, terms.undetected, terms.stubborn)
    specs = [
        spec(
            draw.choice(kinds),
            f"{next(terms.numbers)}",
            draw.choice([0.0, 0.5]),
            timeout=draw.choice([None, 0.002, 0.02]),
            on_error=draw.choice(["raise", "skip"]),
        )
        for _ in range(draw.randint(0, 6))
    ]
    return Pipeline(
        draw.choice((terms.sync, terms.coroutine)),
        specs,
        max_concurrency=draw.randint(1, 4),
        max_threads=draw.choice([None, 1, 2]),
        parallel=draw.random() < 0.8,
        track_grad_norms=draw.random() < 0.5,
        timeout=draw.choice([None, 0.05]),
    )


async def step(pipeline: Pipeline, workers: WorkerPool, size: int, limit: float | None) -> None:
    async with asyncio.timeout(limit):
        await pipeline.evaluate([], packed([torch.full((size,), -0.5).numpy()]), workers=workers)


@pytest.mark.asyncio
@pytest.mark.parametrize("seed", range(3))
async def test_row_94_every_permit_and_thread_comes_back_and_every_start_has_one_end(seed: int):
    draw = random.Random(seed)
    terms, workers = Terms(draw), WorkerPool(BOUND)
    with recorded() as events:
        await run_steps(terms, workers, draw)
    await until(lambda: not workers.limiter.holders() and not workers.abandoned())
    assert terms.peak <= BOUND
    assert workers.abandoned() == []
    workers.close()
    assert asyncio.all_tasks() == {asyncio.current_task()}
    phases: dict[str, list[str]] = {}
    for event in events:
        if event.name.startswith("tinkex.regularizer.compute."):
            phases.setdefault(event.metadata["regularizer_name"], []).append(event.name.rsplit(".", 1)[1])
    assert phases
    assert all(own in (["start", "stop"], ["start", "exception"]) for own in phases.values())
    whole = Counter(event.name for event in events)
    ends = whole["tinkex.custom_loss.stop"] + whole["tinkex.custom_loss.exception"]
    assert whole["tinkex.custom_loss.start"] == ends > 0


async def run_steps(terms: Terms, workers: WorkerPool, draw: random.Random) -> None:
    loop = asyncio.get_running_loop()
    for _ in range(10):
        steps = [
            asyncio.ensure_future(
                step(random_pipeline(terms, draw), workers, draw.choice([5, 5_000]), draw.choice([None, 0.004, 0.02]))
            )
            for _ in range(draw.randint(1, 8))
        ]
        for started in steps:
            if draw.random() < 0.15:
                loop.call_later(draw.random() * 0.01, started.cancel)
        async with asyncio.timeout(10 * LIMIT):
            ends = await asyncio.gather(*steps, return_exceptions=True)
        for end in ends:
            assert end is None or isinstance(end, TinkexError | TimeoutError | asyncio.CancelledError), end
