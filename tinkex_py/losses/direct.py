"""Doors to parts of the pipeline: run single terms, or only look at gradients."""

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Sequence
from typing import Any, cast

import torch

from tinkex_py.errors import InvalidSpec
from tinkex_py.losses.arguments import (
    checked_count,
    checked_data,
    checked_flag,
    checked_specs,
    checked_step,
    checked_timeout,
)
from tinkex_py.losses.executor import TermRun
from tinkex_py.losses.grad_mode import with_own_grad_mode
from tinkex_py.losses.gradients import loss_and_metrics
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.output import RegularizerOutput
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.report import report
from tinkex_py.losses.spec import (
    RegularizerSpec,
    Term,
    TermResult,
    is_async_term,
    term_function,
    term_name,
    why_not_a_term,
)
from tinkex_py.losses.terms import PreparedTerm, prepare_regularizer
from tinkex_py.losses.threads import TermThreads, run_released
from tinkex_py.types import Datum

TensorOrList = torch.Tensor | Sequence[torch.Tensor]


async def execute(
    term: Term, data: Sequence[Datum], logprobs: Any, /, **options: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Calls a term, without weight, timeout, events or gradient.

    Args:
        term: function, coroutine function or object with `compute`; sync ones run in a thread.
        data: handed to the term.
        logprobs: handed to the term as it is, so that the loss keeps its graph.
        options: every keyword goes to the term.

    Returns:
        The loss with its graph and shape, and the metrics unchanged (`{}` for a bare loss).

    Raises:
        InvalidSpec: this is no term, or it cannot take the options. What the term itself raises comes out as it is.
    """
    problem = why_not_a_term(term, options)
    if problem is not None:
        raise InvalidSpec(f"execute: {problem}")
    function = term_function(term)
    if is_async_term(term):
        result = await with_own_grad_mode(function(data, logprobs, **options))
    else:
        threads = TermThreads(1)
        try:
            result = await run_released(threads.terms, "execute", lambda: function(data, logprobs, **options))
        finally:
            threads.close()
        if inspect.isawaitable(result):
            result = await with_own_grad_mode(cast("Awaitable[TermResult]", result))
    name = term_name(term) or "execute"
    return loss_and_metrics(result, name)


class Executor:
    """Runs regularizers without a base loss. Source: the guide, "Via Executor (Low-Level)"."""

    @staticmethod
    async def execute_one(
        spec: RegularizerSpec,
        data: Sequence[Datum],
        logprobs: TensorOrList,
        *,
        timeout: float | None = 30.0,
        track_grad_norms: bool = False,
        step: int = 0,
    ) -> RegularizerOutput:
        """Runs one regularizer.

        Args:
            spec: the regularizer; its own timeout wins, and its failure is raised whatever `on_error` says.
            data: handed to the term.
            logprobs: a tensor of any shape, or one tensor per datum.
            timeout: seconds, or None.
            track_grad_norms: compute the norm.
            step: optimizer steps made before, for a weight that depends on it.

        Raises:
            InvalidSpec: this is no spec.
            RegularizerError: the term failed.
        """
        (checked,) = checked_specs([spec])
        loud = dataclasses.replace(checked, on_error="raise", enabled=True)
        (output,) = await Executor.execute_all(
            [loud], data, logprobs, timeout=timeout, track_grad_norms=track_grad_norms, step=step
        )
        return output

    @staticmethod
    async def execute_all(
        regularizers: Sequence[RegularizerSpec],
        data: Sequence[Datum],
        logprobs: TensorOrList,
        *,
        parallel: bool = True,
        timeout: float | None = 30.0,
        track_grad_norms: bool = False,
        max_concurrency: int = 32,
        max_threads: int | None = None,
        step: int = 0,
    ) -> list[RegularizerOutput]:
        """Runs regularizers; outputs in spec order, without skipped and disabled ones. Options as in `Pipeline`.

        Raises:
            DuplicateRegularizerNames: two specs share a name.
            RegularizerError: a term failed.
        """
        specs = [spec for spec in checked_specs(regularizers) if spec.enabled]
        limit = checked_timeout(timeout)
        terms = [prepare_regularizer(spec, limit, step=checked_step(step)) for spec in specs]
        datums = checked_data(data)
        norms = checked_flag("track_grad_norms", track_grad_norms)
        at_once = checked_flag("parallel", parallel)
        threads = TermThreads(None if max_threads is None else checked_count("max_threads", max_threads))
        shared = Logprobs.from_tensors(logprobs, datums=len(datums))
        run = TermRun(datums, shared, threads, checked_count("max_concurrency", max_concurrency), norms)
        try:
            outcomes = await run.all(terms, parallel=at_once)
            shared.check_unchanged()
        finally:
            threads.close()
        return [report(outcome.term, outcome.evaluation) for outcome in outcomes if outcome.evaluation is not None]


class GradientTracker:
    """Gradient norms on their own. Source: the guide, "Direct Gradient Computation"."""

    @staticmethod
    async def grad_norm(loss_fn: Callable[[torch.Tensor], Any], logprobs: torch.Tensor) -> float:
        """L2 norm of d(loss_fn)/d(logprobs).

        Args:
            loss_fn: `loss_fn(logprobs)` -> tensor or `(tensor, metrics)`; sync or async.
            logprobs: a tensor of any shape.
        """

        def without_data(_data: Sequence[Datum], values: torch.Tensor) -> Any:
            return loss_fn(values)

        term = PreparedTerm(
            name="loss_fn",
            function=without_data,
            options={},
            is_async=True if is_async_term(loss_fn) else None,
            per_datum=False,
            timeout=None,
        )
        threads = TermThreads()
        try:
            run = TermRun([], Logprobs.from_tensors(logprobs), threads, 1, track_grad_norms=True)
            (outcome,) = await run.all([term], parallel=True)
        finally:
            threads.close()
        assert outcome.evaluation is not None
        return cast("float", outcome.evaluation.grad_norm)

    @staticmethod
    async def regularizer_grad_norm(spec: RegularizerSpec, data: Sequence[Datum], logprobs: TensorOrList) -> float:
        """Unweighted L2 norm of one regularizer's gradient."""
        output = await Executor.execute_one(spec, data, logprobs, track_grad_norms=True)
        return cast("float", output.grad_norm)

    @staticmethod
    async def total_grad_norm(
        base_loss: Term, regularizers: Sequence[RegularizerSpec], data: Sequence[Datum], logprobs: TensorOrList
    ) -> float:
        """L2 norm of the whole gradient; equals `CustomLossOutput.total_grad_norm`."""
        pipeline = Pipeline(base_loss, regularizers, track_grad_norms=True)
        output = await pipeline.compute(data, logprobs)
        return cast("float", output.total_grad_norm)
