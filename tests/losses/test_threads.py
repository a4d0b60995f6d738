"""Bounded threads that may outlive their term, and nothing hangs or leaks because of it."""

import asyncio
import contextvars
import gc
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from tests.losses.support import (
    LIMIT,
    Gate,
    async_l2,
    async_nll,
    guide_logprobs,
    l1,
    packed,
    recorded,
    spec,
    until,
)
from tinkex_py import ClientClosed, Pipeline, RegularizerError, RegularizerTimeout
from tinkex_py.losses.worker_pool import WorkerPool, usable_cpu_count

pytestmark = pytest.mark.asyncio

VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("VARIABLE", default="unset")
SHORT = 0.02  # seconds; a timeout that is meant to expire


def skipping(gate: Any, count: int, timeout: float = SHORT) -> list[Any]:
    return [spec(gate, f"slow{index}", timeout=timeout, on_error="skip") for index in range(count)]


@pytest.mark.parametrize(("max_concurrency", "max_threads", "bound"), [(2, None, 2), (2, 8, 2), (8, 2, 2), (1, 4, 1)])
async def test_six_terms_that_outlive_their_timeouts(max_concurrency: int, max_threads: int | None, bound: int):
    gate = Gate()
    with gate.opening():
        pipeline = Pipeline(async_nll, skipping(gate, 6), max_concurrency=max_concurrency, max_threads=max_threads)
        async with asyncio.timeout(LIMIT):
            output = await pipeline.compute([], guide_logprobs())
        assert output.skipped == {f"slow{index}": "RegularizerTimeout" for index in range(6)}
        assert output.abandoned_threads == gate.running == gate.peak <= bound
        assert max_threads is None or gate.peak == bound


@pytest.mark.parametrize(("max_concurrency", "max_threads"), [(3, 2), (2, 8)])
async def test_the_bound_holds_across_steps(max_concurrency: int, max_threads: int):
    gate = Gate()
    pipeline = Pipeline(async_nll, skipping(gate, 6), max_concurrency=max_concurrency, max_threads=max_threads)
    with gate.opening():
        for _ in range(3):
            async with asyncio.timeout(LIMIT):
                output = await pipeline.compute([], guide_logprobs())
            assert output.abandoned_threads == 2
            assert len(output.skipped) == 6
        assert (gate.calls, gate.running, gate.peak) == (2, 2, 2)
    await until(lambda: gate.running == 0)
    gate.calls = 0
    output = await pipeline.compute([], guide_logprobs())  # an open gate: everything works again
    assert (output.skipped, output.abandoned_threads, gate.calls) == ({}, 0, 6)


@pytest.mark.parametrize("waiting", [async_l2, l1])
async def test_an_abandoned_term_that_ends_makes_room(waiting: Any):
    gate = Gate()
    with gate.opening(), recorded("tinkex.regularizer.abandoned") as events:
        specs = [*skipping(gate, 1), spec(waiting, "queued", timeout=LIMIT)]
        pipeline = Pipeline(async_nll, specs, max_concurrency=1, max_threads=1)
        computing = asyncio.ensure_future(pipeline.compute([], guide_logprobs()))
        await until(lambda: len(events) == 1)
        gate.opened.set()
        output = await computing
    assert list(output.regularizers) == ["queued"]
    assert output.skipped == {"slow0": "RegularizerTimeout"}


async def test_the_bound_holds_across_pipelines_that_share_threads():
    gate = Gate()
    workers = WorkerPool(2)
    logprobs = [np.array([-0.5, -1.0])]
    try:
        with gate.opening():
            pipelines = [Pipeline(async_nll, skipping(gate, 3)) for _ in range(3)]
            async with asyncio.timeout(LIMIT):
                losses = await asyncio.gather(*(p.evaluate([], packed(logprobs), workers=workers) for p in pipelines))
            assert [len(loss.output.skipped) for loss in losses] == [3, 3, 3]
            assert (gate.peak, gate.running, gate.calls) == (2, 2, 2)
        await until(lambda: gate.running == 0)
    finally:
        workers.close()


async def test_the_bound_is_the_smaller_limit_also_on_shared_threads():
    gate = Gate()
    workers = WorkerPool(4)
    try:
        with gate.opening():
            pipeline = Pipeline(async_nll, skipping(gate, 4), max_concurrency=2)
            async with asyncio.timeout(LIMIT):
                await pipeline.evaluate([], packed([np.zeros(2)]), workers=workers)
            assert gate.peak == 2
        await until(lambda: gate.running == 0)
    finally:
        workers.close()


@pytest.mark.parametrize("parallel", [True, False])
async def test_row_119_a_queued_sync_term_times_out_and_names_the_holders(parallel: bool):
    gate = Gate()
    with gate.opening():
        specs = [*skipping(gate, 1), spec(l1, "queued", timeout=2 * SHORT)]
        pipeline = Pipeline(async_nll, specs, max_threads=1, parallel=parallel)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(RegularizerTimeout) as caught:
                await pipeline.compute([], guide_logprobs())
        assert caught.value.name == "queued"
        assert "slow0" in str(caught.value)
        assert isinstance(caught.value, TimeoutError)


@pytest.mark.parametrize("parallel", [True, False])
@pytest.mark.parametrize("waiting", [async_l2, l1])
async def test_no_term_waits_for_ever_for_the_permit_of_an_abandoned_one(waiting: Any, parallel: bool):
    gate = Gate()
    with gate.opening():
        specs = [*skipping(gate, 1), spec(waiting, "queued", timeout=2 * SHORT)]
        pipeline = Pipeline(async_nll, specs, max_concurrency=1, max_threads=2, parallel=parallel)
        async with asyncio.timeout(LIMIT):
            with pytest.raises(RegularizerTimeout) as caught:
                await pipeline.compute([], guide_logprobs())
        assert caught.value.name == "queued"
        assert "slow0" in str(caught.value)


async def test_waiting_for_a_thread_that_is_at_work_does_not_count():
    """The clock starts when the term has its thread: a healthy term ahead may take longer than this one's timeout."""
    gate = Gate()
    with gate.opening():
        specs = [spec(gate, "busy"), spec(l1, "patient", timeout=SHORT)]
        computing = asyncio.ensure_future(Pipeline(async_nll, specs, max_threads=1).compute([], guide_logprobs()))
        await until(lambda: gate.running == 1)
        await asyncio.sleep(3 * SHORT)
        assert not computing.done()
    output = await computing
    assert list(output.regularizers) == ["busy", "patient"]


async def test_waiting_for_a_thread_never_keeps_an_async_term_out():
    gate = Gate()
    started = asyncio.Event()

    async def quick(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        started.set()
        return logprobs.sum()

    with gate.opening():
        specs = [*(spec(gate, f"sync{index}") for index in range(5)), spec(quick, "async")]
        pipeline = Pipeline(async_nll, specs, max_concurrency=2, max_threads=1)
        computing = asyncio.ensure_future(pipeline.compute([], guide_logprobs()))
        async with asyncio.timeout(LIMIT):
            await started.wait()
        assert gate.calls <= 1
    await computing
    assert gate.peak == 1


async def test_async_terms_that_fill_every_permit_do_not_deadlock_with_threads():
    """Large tensors, so that the backward of every coroutine needs a thread while it holds its permit."""
    size = 10_000
    specs = [spec(fn, f"{fn.__name__}{index}") for index in range(6) for fn in (async_l2, l1)]
    pipeline = Pipeline(async_nll, specs, max_concurrency=2, max_threads=1, track_grad_norms=True)
    async with asyncio.timeout(LIMIT):
        output = await pipeline.compute([], torch.full((size,), -0.5))
    assert len(output.regularizers) == 12
    norms = [regularizer.grad_norm for regularizer in output.regularizers.values()]
    assert norms == pytest.approx([size**0.5] * 12, rel=1e-6)


async def test_a_late_result_is_dropped():
    gate = Gate(value=1000.0)
    done = threading.Event()

    def late(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        loss = gate(data, logprobs)
        done.set()
        return loss

    pipeline = Pipeline(async_nll, [spec(late, "late", timeout=SHORT, on_error="skip")], max_threads=1)
    with gate.opening():
        with recorded("tinkex.regularizer.compute.*") as events:
            first = await pipeline.compute([], guide_logprobs())
            assert first.loss_total == first.base_loss.value
            gate.opened.set()
            await until(done.is_set)
        assert [event.name.rsplit(".", 1)[1] for event in events] == ["start", "exception"]
    second = await pipeline.compute([], guide_logprobs())
    assert second.regularizers["late"].value == pytest.approx(-4900.0, rel=1e-6)
    assert second.abandoned_threads == 0


async def test_a_late_failure_is_dropped_too():
    gate = Gate()

    def late(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        gate(data, logprobs)
        raise ValueError("too late")

    with gate.opening(), pytest.raises(RegularizerTimeout) as caught:
        await Pipeline(async_nll, [spec(late, "late", timeout=SHORT)]).compute([], guide_logprobs())
    assert caught.value.__cause__ is None
    await until(lambda: gate.running == 0)


async def test_a_late_coroutine_is_closed():
    """Nobody awaits it any more; Python would warn about it, and warnings are errors here."""
    gate = Gate()

    def late(data: Any, logprobs: torch.Tensor) -> Any:
        gate(data, logprobs)
        return async_l2(data, logprobs)

    with gate.opening(), pytest.raises(RegularizerTimeout):
        await Pipeline(async_nll, [spec(late, "late", timeout=SHORT)]).compute([], guide_logprobs())
    await until(lambda: gate.running == 0)
    for thread in [thread for thread in threading.enumerate() if thread.name.startswith("tinkex")]:
        gc.collect()
        await asyncio.to_thread(thread.join, LIMIT)
    gc.collect()


async def test_a_cancelled_queue_runs_nothing():
    gate = Gate()
    with gate.opening():
        specs = [spec(gate, f"t{index}") for index in range(5)]
        computing = asyncio.ensure_future(Pipeline(async_nll, specs, max_threads=1).compute([], guide_logprobs()))
        await until(lambda: gate.running == 1)
        computing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await computing
        assert gate.calls == 1
    await until(lambda: gate.running == 0)
    assert gate.calls == 1


@pytest.mark.parametrize("form", ["sync", "async", "undetected"])
async def test_contextvars_reach_terms_and_do_not_leak_back(form: str):
    seen: list[str] = []

    def now(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(VARIABLE.get())
        VARIABLE.set("changed by a term")
        return logprobs.sum()

    async def later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return now(data, logprobs)

    def undetected(data: Any, logprobs: torch.Tensor) -> Any:
        return later(data, logprobs)

    fn: Any = {"sync": now, "async": later, "undetected": undetected}[form]
    token = VARIABLE.set("from the caller")
    try:
        pipeline = Pipeline(fn, [spec(fn, "again")], max_threads=1, parallel=False)
        await pipeline.compute([], guide_logprobs())
        assert seen == ["from the caller"] * 2
        assert VARIABLE.get() == "from the caller"
    finally:
        VARIABLE.reset(token)
    await pipeline.compute([], guide_logprobs())
    assert seen[2:] == ["unset"] * 2


@pytest.mark.skipif(usable_cpu_count() < 2, reason="one CPU has one worker, which may use torch's threads")
async def test_a_worker_computes_alone_and_later_threads_as_usual():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    seen: list[int] = []

    def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        seen.append(torch.get_num_threads())
        return logprobs.sum()

    try:
        await Pipeline(term, max_threads=2).compute([], guide_logprobs())
        assert seen == [1]
        assert torch.get_num_threads() == 2
        with ThreadPoolExecutor(1) as later:
            assert later.submit(torch.get_num_threads).result() == 2
    finally:
        torch.set_num_threads(before)


# Work of the package itself


async def test_computations_wait_neither_for_terms_nor_for_each_other():
    gate = Gate()
    workers = WorkerPool(2)
    meet = threading.Barrier(2)
    try:
        with gate.opening():
            steps = [
                asyncio.ensure_future(Pipeline(gate).evaluate([], packed([np.zeros(2)]), workers=workers))
                for _ in range(2)
            ]
            await until(lambda: gate.running == 2)
            async with asyncio.timeout(LIMIT):
                places = await asyncio.gather(*(workers.compute("meet", lambda: meet.wait(LIMIT)) for _ in range(2)))
            assert sorted(places) == [0, 1]
            assert gate.running == 2
        await asyncio.gather(*steps)
    finally:
        workers.close()


@pytest.mark.parametrize("error", [TimeoutError("own"), asyncio.CancelledError("own"), KeyError("own"), SystemExit(3)])
async def test_a_computation_raises_its_own_exception(error: BaseException):
    def fails() -> None:
        raise error

    workers = WorkerPool(1)
    try:
        with pytest.raises(type(error)) as caught:
            await workers.compute("fails", fails)
        assert caught.value is error
    finally:
        workers.close()


async def test_a_computation_keeps_neither_its_work_nor_its_result():
    workers = WorkerPool(1)
    given = torch.zeros(3)
    made = await workers.compute("clone", given.clone)
    references = [weakref.ref(given), weakref.ref(made)]
    del given, made
    await until(lambda: [reference() for reference in references] == [None, None])
    workers.close()


async def test_a_closed_pool_takes_no_more_work():
    workers = WorkerPool(1)
    assert await workers.compute("three", lambda: 3) == 3
    workers.close()
    workers.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("tinkex-")]
    with pytest.raises(ClientClosed, match="'three' cannot run"):
        await workers.compute("three", lambda: 3)
    with pytest.raises(RegularizerError) as caught:
        await Pipeline(l1).evaluate([], packed([np.zeros(2)]), workers=workers)
    assert isinstance(caught.value.__cause__, ClientClosed)


async def test_a_backward_pass_that_outlives_its_term_is_counted_and_holds_nobody_up():
    gate = Gate()

    class Hangs(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.sum()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            gate([], gradient)
            return gradient.expand(10_000)

    async def term(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        return Hangs.apply(logprobs)  # type: ignore[no-untyped-call]

    specs = [spec(term, "hangs", timeout=SHORT, on_error="skip"), spec(l1, "l1")]
    pipeline = Pipeline(l1, specs, max_threads=1)
    with gate.opening():
        async with asyncio.timeout(LIMIT):
            output = await pipeline.compute([], torch.full((10_000,), -0.5))
        assert output.skipped == {"hangs": "RegularizerTimeout"}
        assert output.abandoned_threads == 1
        assert list(output.regularizers) == ["l1"]
    await until(lambda: gate.running == 0)
