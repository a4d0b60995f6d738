"""Terms in worker processes, seen from the worker: evaluates one as a worker thread of the program would."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
import torch

from tinkex_py.errors import InPlaceMutation, InvalidTermResult
from tinkex_py.losses.crossed_datums import CrossedDatums
from tinkex_py.losses.executor import TermRun
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.outcomes import PreparedTerm
from tinkex_py.losses.process_terms import CrossedTensor, Job, StepData
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.processes.crossing import read_file
from tinkex_py.types import Datum

_WORKERS = WorkerPool(1)


def evaluate_job(
    loaded: tuple[Callable[..., Any], Mapping[str, Any]], job: Job, file: int
) -> tuple[Evaluation, CrossedTensor | None]:
    """Evaluates a term.

    Args:
        loaded: its function and options.
        job: how.
        file: descriptor of the data of the step.
    """
    if torch.get_num_threads() != job.torch_threads:
        torch.set_num_threads(job.torch_threads)
    torch.set_default_dtype(job.default_dtype)
    read, column = read_file(file)
    step = cast("StepData", read)
    own = step.buffer.bits
    original = own.copy()
    logprobs = Logprobs(
        step.buffer.tensor(),
        lambda: np.array_equal(own, original),
        shapes=step.shapes,
        packable=step.packable,
        guarded=step.guarded,
    )
    function, options = loaded
    term = PreparedTerm(
        job.name, function, options, False, job.per_datum, weight=job.weight, max_grad_norm=job.max_grad_norm
    )
    return evaluated_alone(term, CrossedDatums(step.layouts, column), logprobs, track_grad_norms=job.track_grad_norms)


def evaluated_alone(
    term: PreparedTerm, data: Sequence[Datum], logprobs: Logprobs, *, track_grad_norms: bool = False
) -> tuple[Evaluation, CrossedTensor | None]:
    """Evaluates a sync term in this thread, which nothing else uses. The gradient is apart, as it crosses.

    Raises:
        InvalidTermResult: it returned no loss.
        InPlaceMutation: it wrote into the logprobs.
    """
    run = TermRun(data, logprobs, _WORKERS, 1, track_grad_norms)
    evaluation = run.evaluate_here(term, logprobs.leaf(term.name, packed=not term.per_datum))
    if inspect.isawaitable(evaluation):
        raise InvalidTermResult(
            f"term {term.name!r} returned an awaitable, and only sync functions run here: make fn sync", name=term.name
        )
    try:
        logprobs.check_unchanged()
    except InPlaceMutation:
        raise InPlaceMutation(
            f"term {term.name!r} modified the shared logprobs in place: use a copy, logprobs.clone()", name=term.name
        ) from None
    gradient = evaluation.gradient
    return replace(evaluation, gradient=None), None if gradient is None else CrossedTensor.of(gradient)
