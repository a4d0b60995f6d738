"""Four ways to compute the gradient of a composed loss, for `subject_process`: the pipeline, and three in plain torch.

Each writes its gradient to the file `gradient_to`, so that the benchmark can check that all are equal.
"""

import asyncio
import contextvars
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from benchmarks.composed import TERMS, WEIGHTS, base_loss, regularizers
from benchmarks.replay_service import stored_logprobs
from tinkex_py import Pipeline
from tinkex_py.losses.logprobs import Logprobs

Work = Callable[[], Awaitable[object]]
Term = Callable[[Any, torch.Tensor], torch.Tensor]
Result = TypeVar("Result")

ALL: tuple[tuple[float, Term], ...] = ((1.0, base_loss), *zip(WEIGHTS, TERMS, strict=True))


def logprobs_of(tokens: int) -> torch.Tensor:
    """Returns the same logprobs for all ways, float32 `[tokens]`."""
    return torch.from_numpy(stored_logprobs(tokens, (1,)))


def keep(gradient: torch.Tensor, gradient_to: str) -> None:
    """Writes a gradient for the check."""
    np.save(gradient_to, gradient.detach().numpy())


@asynccontextmanager
async def pipeline(tokens: int, gradient_to: str, repeat: int = 1) -> AsyncGenerator[Work]:
    """This package: value, gradient and norm of every term."""
    logprobs = logprobs_of(tokens)
    composed = Pipeline(base_loss, regularizers(), track_grad_norms=True)

    async def evaluate() -> torch.Tensor:
        return (await composed.evaluate([], Logprobs.from_tensors(logprobs))).gradient

    keep(await evaluate(), gradient_to)

    async def work() -> None:
        for _ in range(repeat):
            await evaluate()

    yield work


@asynccontextmanager
async def pipeline_on_cpus(tokens: int, gradient_to: str) -> AsyncGenerator[Work]:
    """The same, with every thread pinned to one CPU, so that the kernel moves none."""
    async with pipeline(tokens, gradient_to) as work:
        cpus = sorted(os.sched_getaffinity(0))
        for prefix, first in (("tinkex-term", 0), ("tinkex-arithmetic", 0)):
            named = [thread for thread in threading.enumerate() if thread.name.startswith(prefix)]
            for number, thread in enumerate(sorted(named, key=lambda thread: thread.name), start=first):
                assert thread.native_id is not None
                os.sched_setaffinity(thread.native_id, {cpus[number % len(cpus)]})
        yield work


@asynccontextmanager
async def fused(tokens: int, gradient_to: str) -> AsyncGenerator[Work]:
    """The minimum in torch: one total and one backward pass, without norms or values of the terms."""
    logprobs = logprobs_of(tokens)

    def evaluate() -> torch.Tensor:
        leaf = logprobs.clone().requires_grad_()
        total = torch.stack([weight * term([], leaf) for weight, term in ALL]).sum()
        (gradient,) = torch.autograd.grad(total, leaf)
        total.item()
        return gradient

    keep(evaluate(), gradient_to)

    async def work() -> None:
        evaluate()

    yield work


@asynccontextmanager
async def naive(tokens: int, gradient_to: str) -> AsyncGenerator[Work]:
    """Calls every function for its value, again for its norm, and again for the total, one after another."""
    logprobs = logprobs_of(tokens)

    def evaluate() -> torch.Tensor:
        for _, term in ALL:
            _value(term, logprobs)
        for _, term in ALL:
            _norm(term, logprobs)
        return _total(logprobs)

    keep(evaluate(), gradient_to)

    async def work() -> None:
        evaluate()

    yield work


@asynccontextmanager
async def naive_threads(tokens: int, gradient_to: str) -> AsyncGenerator[Work]:
    """The same calls, each in a new thread so that the event loop stays free; terms run concurrently."""
    logprobs = logprobs_of(tokens)

    async def evaluate() -> torch.Tensor:
        await asyncio.gather(*(in_fresh_thread(lambda term=term: _value(term, logprobs)) for _, term in ALL))
        await asyncio.gather(*(in_fresh_thread(lambda term=term: _norm(term, logprobs)) for _, term in ALL))
        return await in_fresh_thread(lambda: _total(logprobs))

    keep(await evaluate(), gradient_to)

    async def work() -> None:
        await evaluate()

    yield work


@asynccontextmanager
async def terms_alone(tokens: int, gradient_to: str, repeat: int = 1) -> AsyncGenerator[Work]:
    """Only the terms: forward, backward and norm of each, one after another."""
    logprobs = logprobs_of(tokens)

    def evaluate() -> torch.Tensor:
        total = torch.zeros_like(logprobs)
        for weight, term in ALL:
            gradient = _gradient(term, logprobs)
            torch.linalg.vector_norm(gradient).item()
            total.add_(gradient, alpha=weight)
        return total

    keep(evaluate(), gradient_to)

    async def work() -> None:
        for _ in range(repeat):
            evaluate()

    yield work


async def in_fresh_thread(call: Callable[[], Result]) -> Result:
    """Returns the result of a call that runs in its own thread."""
    loop = asyncio.get_running_loop()
    finished: asyncio.Future[Result] = loop.create_future()
    context = contextvars.copy_context()

    def run() -> None:
        result = context.run(call)
        loop.call_soon_threadsafe(finished.set_result, result)

    thread = threading.Thread(target=run)
    thread.start()
    result = await finished
    thread.join()
    return result


def _value(term: Term, logprobs: torch.Tensor) -> float:
    return term([], logprobs.clone().requires_grad_()).item()


def _gradient(term: Term, logprobs: torch.Tensor) -> torch.Tensor:
    leaf = logprobs.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(term([], leaf), leaf)
    return gradient


def _norm(term: Term, logprobs: torch.Tensor) -> float:
    return torch.linalg.vector_norm(_gradient(term, logprobs)).item()


def _total(logprobs: torch.Tensor) -> torch.Tensor:
    leaf = logprobs.clone().requires_grad_()
    total = torch.stack([weight * term([], leaf) for weight, term in ALL]).sum()
    (gradient,) = torch.autograd.grad(total, leaf)
    torch.linalg.vector_norm(gradient).item()
    total.item()
    return gradient
