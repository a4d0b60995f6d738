"""How long worker threads live, and that the loop stays free."""

import asyncio
import contextvars
import gc
import subprocess
import sys
import textwrap
import threading
import weakref
from typing import Any

import pytest
import torch

from tests.losses.support import (
    LIMIT,
    Gate,
    async_nll,
    guide_logprobs,
    l1,
    recorded,
    spec,
    until,
)
from tinkex_py import Executor, Pipeline, RegularizerError, RegularizerTimeout

pytestmark = pytest.mark.asyncio

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")
SHORT = 0.02  # seconds; a timeout that is meant to expire


async def test_workers_are_reused():
    gate = Gate()
    gate.opened.set()
    pipeline = Pipeline(gate, [spec(gate, "again")], max_threads=2)
    for _ in range(10):
        await pipeline.compute([], guide_logprobs())
    assert gate.calls == 20
    assert len(gate.threads) <= 2
    assert threading.get_ident() not in gate.threads


def term_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("tinkex-term")]


@pytest.mark.parametrize("fails", [False, True])
async def test_threads_end_with_their_pipeline(fails: bool):
    assert term_threads() == []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        if fails:
            raise ValueError("no")
        return logprobs.sum()

    pipeline = Pipeline(term)
    try:
        await pipeline.compute([], guide_logprobs())
    except RegularizerError:
        assert fails
    workers = term_threads()
    assert workers
    gone = weakref.ref(pipeline)
    del pipeline
    await until(lambda: (gc.collect(), gone() is None)[1])
    for worker in workers:
        await asyncio.to_thread(worker.join, LIMIT)
        assert not worker.is_alive()


async def test_executor_and_execute_leave_no_thread():
    await Executor.execute_all([spec(l1, "l1")], [], guide_logprobs())
    assert term_threads() == []


def _close_the_loop_under_a_worker(gate: Gate) -> BaseException | None:
    async def main() -> None:
        pipeline = Pipeline(async_nll, [spec(gate, "slow", timeout=SHORT)])
        await pipeline.compute([], guide_logprobs())

    try:
        asyncio.run(main())
    except RegularizerTimeout as error:
        return error
    return None


async def test_a_loop_that_closes_while_a_worker_runs():
    gate = Gate()
    with gate.opening():
        async with asyncio.timeout(LIMIT):
            error = await asyncio.to_thread(_close_the_loop_under_a_worker, gate)
        assert isinstance(error, RegularizerTimeout)
        assert gate.running == 1
    await until(lambda: gate.running == 0)


def _leave_a_queue_behind(pipeline: Pipeline, gate: Gate) -> None:
    """A loop that is closed while a term waits for a slot must not take that slot with it."""

    async def main() -> None:
        computing = asyncio.ensure_future(pipeline.compute([], guide_logprobs()))
        await until(lambda: gate.running == 1)
        computing.cancel()
        await asyncio.wait([computing])

    asyncio.run(main())


async def test_slots_survive_a_closed_loop():
    gate = Gate()
    pipeline = Pipeline(async_nll, [spec(gate, "a"), spec(gate, "b"), spec(gate, "c")], max_threads=1)
    with gate.opening():
        await asyncio.to_thread(_leave_a_queue_behind, pipeline, gate)
    await until(lambda: gate.running == 0)
    async with asyncio.timeout(LIMIT):
        assert len((await pipeline.compute([], guide_logprobs())).regularizers) == 3


async def test_the_process_waits_at_its_end_and_does_not_hang():
    code = """
        import asyncio, threading, torch
        from tinkex_py import Pipeline, RegularizerSpec, RegularizerTimeout
        may_end = threading.Event()
        def slow(data, logprobs):
            may_end.wait(20)
            print("ended")
            return logprobs.sum()
        async def nll(data, logprobs):
            return -logprobs.mean()
        async def main():
            spec = RegularizerSpec(fn=slow, weight=1.0, name="slow", timeout=0.02)
            try:
                await Pipeline(nll, [spec]).compute([], torch.zeros(3))
            except RegularizerTimeout:
                print("timeout")
        asyncio.run(main())
        threading.Timer(0.05, may_end.set).start()
    """
    done = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["timeout", "ended"]


async def test_torch_terms_do_not_block_the_loop():
    """While sync and async terms of a million elements run, another task keeps getting its turns."""
    size = 1_000_000
    beats, at_start, at_end = 0, [], []
    stop = asyncio.Event()

    async def heartbeat() -> None:
        nonlocal beats
        while not stop.is_set():
            beats += 1
            await asyncio.sleep(0)

    released = threading.Event()

    def heavy(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        at_start.append(beats)
        loss = sum((logprobs * k).exp().sin().sum() for k in range(1, 4))
        assert released.wait(LIMIT)  # only the loop can release it: it runs while this term does
        at_end.append(beats)
        return loss  # type: ignore[return-value]

    async def releases(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        while beats < 50:  # noqa: ASYNC110
            await asyncio.sleep(0)
        released.set()
        return logprobs.exp().sum()

    beating = asyncio.ensure_future(heartbeat())
    pipeline = Pipeline(heavy, [spec(heavy, "h", 0.5), spec(releases, "r", 0.1)], max_threads=2, track_grad_norms=True)
    with recorded("tinkex.regularizer.compute.*") as events:
        output = await pipeline.compute([], torch.full((size,), -0.5))
    stop.set()
    await beating
    assert min(at_end) > max(at_start)
    assert output.total_grad_norm > 0
    assert [event.name for event in events].count("tinkex.regularizer.compute.stop") == 2
