"""Terms with `runs_in="process"`: the numbers of a thread, and workers that end in every case."""

import asyncio
import gc
import os
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tests.losses.support import async_nll, datum, guide_logprobs, nll, until
from tests.processes import terms
from tests.processes.support import DATA, process_spec, step_files, workers
from tinkex_py import (
    Datum,
    EncodedTextChunk,
    InPlaceMutation,
    InvalidSpec,
    ModelInput,
    Pipeline,
    PromptProvenanceSpan,
    RegularizerError,
    RegularizerSpec,
    RegularizerTimeout,
    SampledProvenanceSpan,
    TensorData,
    per_datum,
)
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.processes.pool import ProcessPool

LOCK = threading.Lock()


@pytest.fixture(scope="module")
def warm() -> Iterator[ProcessPool]:
    """A worker that is ready, for terms that leave it alive: starting one takes a second."""
    pool = WorkerPool(1, 1)
    run = Pipeline(nll, [process_spec(terms.entropy)]).evaluate(
        DATA, Logprobs.from_tensors(guide_logprobs()), workers=pool
    )
    asyncio.run(run)
    yield pool.processes
    pool.close()
    gc.collect()
    assert workers() == []


def with_workers(pipeline: Pipeline, processes: ProcessPool) -> Pipeline:
    """Has a pipeline use the workers of another, as in a client."""
    pipeline._workers().processes = processes
    return pipeline


async def output_of(spec: RegularizerSpec, processes: ProcessPool) -> Any:
    pipeline = with_workers(Pipeline(nll, [spec], track_grad_norms=True), processes)
    logprobs = guide_logprobs().requires_grad_()
    (await pipeline.loss(DATA, logprobs)).backward()
    return (await pipeline.compute(DATA, guide_logprobs())).regularizers["own"], logprobs.grad


def of_here(factor: float) -> Any:
    class Local:
        def compute(self, data: Any, logprobs: torch.Tensor) -> Any:
            return torch.softmax(logprobs * factor, 0).square().sum(), {"factor": factor}

    return Local()


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "options"),
    [
        (terms.entropy, {"scale": 0.3}),
        (per_datum(terms.parts), {}),
        (terms.scored, {}),
        (of_here(1.7), {}),
    ],
    ids=["function", "per datum", "scored", "closure"],
)
async def test_equals_a_thread_to_the_last_bit(fn: Any, options: dict[str, Any], warm: ProcessPool):
    own, gradient = await output_of(process_spec(fn, options=options, max_grad_norm=0.1), warm)
    usual, expected = await output_of(RegularizerSpec(fn, 0.5, "own", options=options, max_grad_norm=0.1), warm)
    assert torch.equal(gradient, expected)
    same = {"value", "contribution", "grad_norm", "clip_scale", "differentiable"}
    assert own.model_dump(include=same) == usual.model_dump(include=same)
    if "pid" in own.custom_metrics:
        assert own.custom_metrics.pop("pid") != usual.custom_metrics.pop("pid") == os.getpid()
        assert own.custom_metrics.pop("main") is True  # that of the worker; the program's is pytest
        usual.custom_metrics.pop("main")
    assert own.custom_metrics == usual.custom_metrics


def any_datums(first: int) -> list[Datum]:
    """Datums of all kinds, of the same sizes for every first token."""
    ids = [first, *range(1, 19)]
    sparse = TensorData(
        data=[1.5, 2.5], dtype="float32", shape=(2, 3), sparse_crow_indices=[0, 1, 2], sparse_col_indices=[2, 0]
    )
    text = ModelInput(chunks=(EncodedTextChunk(tokens=ids), EncodedTextChunk(tokens=[]), EncodedTextChunk(tokens=[7])))
    writeable = TensorData.model_construct(data=np.arange(3), dtype="int64", shape=(3,))
    return [
        datum(2),
        Datum(model_input=text, loss_fn_inputs={"target_tokens": ids, "weights": [0.25] * 19}),
        Datum(model_input=ModelInput.empty(), loss_fn_inputs={"target_tokens": [[1, 2], [3, first]]}),
        Datum(model_input=ModelInput.from_ints([1]), loss_fn_inputs={"target_tokens": sparse}),
        Datum(model_input=ModelInput.from_ints([2]), loss_fn_inputs={"target_tokens": writeable}),
        Datum(model_input=ModelInput.from_ints(ids), loss_fn_inputs={}),
        Datum(
            model_input=ModelInput.from_ints(ids),
            loss_fn_inputs={"target_tokens": ids},
            model_input_spans=[PromptProvenanceSpan(sequence_id="s", length=19)],
            loss_fn_input_spans=[SampledProvenanceSpan(sequence_id="s", length=19)],
        ),
    ]


@pytest.mark.asyncio
async def test_the_data_are_those_of_a_thread_and_a_later_step_does_not_change_them(warm: ProcessPool):
    for first in range(3):
        found: list[Any] = []
        for place in ("process", "thread"):
            spec = RegularizerSpec(terms.digest, 1.0, options={"keep": first < 2}, runs_in=place)  # type: ignore[arg-type]
            pipeline = with_workers(Pipeline(nll, [spec]), warm)
            output = await pipeline.compute(any_datums(first), guide_logprobs())
            found.append(output.regularizers["digest"].custom_metrics)
        assert found[0] == found[1]


@pytest.mark.asyncio
async def test_a_worker_that_writes_and_dies_leaves_the_step_to_the_others():
    spoils = RegularizerSpec(terms.spoils, 1.0, runs_in="process", on_error="skip")
    pipeline = Pipeline(nll, [spoils, process_spec(terms.lengths)], parallel=False)
    output = await pipeline.compute(DATA, guide_logprobs())
    assert output.skipped == {"spoils": "WorkerDied"}
    assert output.regularizers["own"].value == pytest.approx(float(guide_logprobs().sum()) + 5)
    pipeline._workers().close()


@pytest.mark.asyncio
async def test_a_file_that_no_worker_can_read_is_written_over(warm: ProcessPool):
    pipeline = with_workers(Pipeline(nll, [process_spec(terms.lengths)]), warm)
    for size in (100, 10_000, 10):
        data, logprobs = [datum(size)] * 2, torch.linspace(-3.0, -1.0, 2 * size)
        value = (await pipeline.compute(data, logprobs)).regularizers["own"].value
        assert value == pytest.approx(float(logprobs.numpy().sum()) + 2 * size, rel=1e-5)
        assert step_files() == 1


@pytest.mark.asyncio
@pytest.mark.parametrize(
    ("fn", "kind", "message"),
    [
        (terms.fails, RegularizerError, "failed with ValueError: the topology is odd"),
        (terms.writes, InPlaceMutation, "'own' modified the shared logprobs in place"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
async def test_a_failure_is_typed_and_keeps_the_worker(fn: Any, kind: type, message: str, warm: ProcessPool):
    with pytest.raises(kind, match=message) as caught:
        await with_workers(Pipeline(nll, [process_spec(fn)]), warm).compute(DATA, guide_logprobs())
    assert type(caught.value) is kind
    assert (await output_of(process_spec(terms.scored), warm))[0].value == 1.5


@pytest.mark.asyncio
async def test_the_end_of_a_worker_is_typed_and_the_next_step_works():
    first = Pipeline(nll, [])
    processes = first._workers().processes
    for fn, kind, message in (
        (terms.exits, RegularizerError, "ended with exit status 7"),
        (terms.crashes, RegularizerError, "was ended by SIGSEGV"),
        (terms.hangs, RegularizerTimeout, "within its timeout of 0.5 s"),
    ):
        pipeline = with_workers(Pipeline(nll, [process_spec(fn, timeout=0.5)]), processes)
        with pytest.raises(kind, match=message) as caught:
            await pipeline.compute(DATA, guide_logprobs())
        assert type(caught.value) is kind
    own, _ = await output_of(process_spec(terms.scored), processes)
    assert own.value == 1.5
    first._workers().close()


@pytest.mark.asyncio
@pytest.mark.parametrize("cancelled_at_start", [True, False])
async def test_cancellation_kills_at_once(cancelled_at_start: bool):
    gc.collect()
    before = len(workers())
    pipeline = Pipeline(nll, [process_spec(terms.naps, options={"seconds": 600.0}, timeout=600.0)])
    pool: Any = pipeline._workers().processes
    if not cancelled_at_start:
        await output_of(process_spec(terms.scored), pool)
    step = asyncio.ensure_future(pipeline.compute(DATA, guide_logprobs()))
    await until(lambda: len(workers()) > before and not pool._idle)
    step.cancel()
    with pytest.raises(asyncio.CancelledError):
        await step
    await until(lambda: len(workers()) == before)
    assert pipeline._workers().process_limiter.holders() == []


@pytest.mark.asyncio
async def test_the_base_loss_runs_in_a_process_too(warm: ProcessPool):
    apart = with_workers(Pipeline(terms.entropy, base_runs_in="process"), warm)
    assert apart.options["base_runs_in"] == "process"
    own = (await apart.compute(DATA, guide_logprobs())).base_loss
    usual = (await Pipeline(terms.entropy).compute(DATA, guide_logprobs())).base_loss
    assert own.value == usual.value
    assert own.metrics["pid"] != usual.metrics["pid"] == os.getpid()


@pytest.mark.parametrize(
    ("base_loss", "place", "message"),
    [
        (nll, "loop", "base_runs_in='loop' does not fit the function, which is sync"),
        (async_nll, "process", "base_runs_in='process' does not fit the function, which is async"),
        (lambda data, logprobs: LOCK, "process", "cannot cross to another process .TypeError"),
    ],
    ids=["loop", "async", "lock"],
)
def test_a_base_loss_that_cannot_run_there_is_refused(base_loss: Any, place: Any, message: str):
    with pytest.raises(InvalidSpec, match=message):
        Pipeline(base_loss, base_runs_in=place)


@pytest.mark.parametrize(
    ("fn", "settings", "message"),
    [
        (nll, {"runs_in": "loop"}, "runs_in='loop' does not fit the function, which is sync"),
        (nll, {"runs_in": "process", "is_async": True}, "which is async: it can run in the 'loop'"),
        (nll, {"runs_in": "thread", "is_async": True}, "which is async"),
        (nll, {"runs_in": "moon"}, "runs_in"),
        (nll, {"runs_in": "process", "options": {"lock": threading.Lock()}}, "lock|cross"),
    ],
)
def test_contradictions_are_refused(fn: Any, settings: dict[str, Any], message: str):
    with pytest.raises(InvalidSpec, match=message):
        RegularizerSpec(fn, 1.0, "own", **settings)


def test_what_cannot_cross_is_refused_when_the_spec_is_made():
    lock = threading.Lock()
    with pytest.raises(InvalidSpec, match="cannot cross to another process .TypeError"):
        RegularizerSpec(lambda data, logprobs: lock, 1.0, "own", runs_in="process")
