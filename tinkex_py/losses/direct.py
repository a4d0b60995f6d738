"""Low-level entry points: run single terms, or compute only gradient norms."""

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Unpack, cast

import torch

from tinkex_py.arguments import check_function, check_kind
from tinkex_py.errors import InvalidSpec
from tinkex_py.limits import running_loop
from tinkex_py.losses.executor import TermRun
from tinkex_py.losses.gradients import loss_and_metrics
from tinkex_py.losses.known_gradient import as_loss
from tinkex_py.losses.logprobs import Logprobs, checked_data
from tinkex_py.losses.options import DEFAULTS, TERM_DEFAULTS, PipelineOptions, checked_options, shows_options
from tinkex_py.losses.outcomes import (
    Outcome,
    PreparedTerm,
    checked_step,
    prepare_base_loss,
    prepare_regularizer,
    report,
    with_weight_at,
)
from tinkex_py.losses.output import RegularizerOutput
from tinkex_py.losses.pipeline import Pipeline
from tinkex_py.losses.spec import (
    RegularizerSpec,
    Term,
    TermResult,
    checked_specs,
    is_async_term,
    term_function,
    term_name,
    why_not_a_term,
)
from tinkex_py.losses.torch_modes import OwnModes
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.types import Datum
from tinkex_py.user_coroutines import in_own_task

TensorOrList = torch.Tensor | Sequence[torch.Tensor]


async def execute(
    term: Term, data: Sequence[Datum], logprobs: Any, /, **options: Any
) -> tuple[torch.Tensor, dict[str, Any]]:
    """Calls a term, without weight, timeout, events or gradient.

    Exceptions of the term pass through unchanged.

    Args:
        term: function, coroutine function or object with `compute`; sync terms run in a thread.
        data: the datums, passed to the term.
        logprobs: passed to the term unchanged, so that the loss keeps its graph.
        options: keyword arguments for the term.

    Returns:
        The loss with its graph and shape, and the metrics unchanged (`{}` if the term returned only a loss). Of a
            `Scored`, a loss with its gradient.

    Raises:
        InvalidSpec: `term` is not a term, or does not accept the options.
    """
    running_loop()
    problem = why_not_a_term(term, options)
    if problem is not None:
        raise InvalidSpec(f"execute: term: {problem}")
    function = term_function(term)
    name = term_name(term) or "execute"
    if is_async_term(term):
        result = function(data, logprobs, **options)
    else:
        workers = WorkerPool(1)
        try:
            result = await workers.call_unbounded("execute", lambda: function(data, logprobs, **options))
        finally:
            workers.close()
    if inspect.isawaitable(result):
        awaitable = cast("Awaitable[TermResult]", result)
        result = await in_own_task(awaitable, grace=DEFAULTS["cancel_grace"], name=name, running=OwnModes())
    return loss_and_metrics(as_loss(result, logprobs, name), name)


class Executor:
    """Runs regularizers without a base loss. Source: the regularizers guide, "Via Executor (Low-Level)"."""

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
            spec: the regularizer; its own timeout takes precedence. A failure is raised even with `on_error="skip"`.
            data: the datums, passed to the term.
            logprobs: a tensor of any shape, or one tensor per datum.
            timeout: seconds; None means no limit.
            track_grad_norms: whether to compute the gradient norm.
            step: number of previous optimizer steps, for a weight that depends on it.

        Raises:
            InvalidSpec: `spec` is not a RegularizerSpec.
            RegularizerError: the term failed.
        """
        checked = check_kind("spec", spec, RegularizerSpec, error=InvalidSpec)
        loud = dataclasses.replace(checked, on_error="raise", enabled=True)
        (output,) = await Executor.execute_all(
            [loud], data, logprobs, timeout=timeout, track_grad_norms=track_grad_norms, step=step
        )
        return output

    @staticmethod
    @shows_options(PipelineOptions, TERM_DEFAULTS)
    async def execute_all(
        regularizers: Sequence[RegularizerSpec],
        data: Sequence[Datum],
        logprobs: TensorOrList,
        *,
        step: int = 0,
        **options: Unpack[PipelineOptions],
    ) -> list[RegularizerOutput]:
        """Runs regularizers.

        Args:
            regularizers: specs with unique names.
            data: the datums, passed to the terms.
            logprobs: a tensor of any shape, or one tensor per datum.
            step: number of previous optimizer steps, for weights that depend on it.
            **options: see `PipelineOptions`, without `combine`.

        Returns:
            Outputs in spec order, without skipped and disabled regularizers.

        Raises:
            DuplicateRegularizerNames: two specs have the same name.
            RegularizerError: a term failed.
            PipelineError: an option is out of range.
            TypeError: an option does not exist.
        """
        checked = checked_options(options, of="Executor.execute_all()", defaults=TERM_DEFAULTS)
        specs = [spec for spec in checked_specs(regularizers) if spec.enabled]
        terms = [with_weight_at(checked_step(step), prepare_regularizer(spec), spec) for spec in specs]
        outcomes = await _run(terms, data, logprobs, checked)
        return [report(outcome.term, outcome.evaluation) for outcome in outcomes if outcome.evaluation is not None]


async def _run(
    terms: Sequence[PreparedTerm], data: Sequence[Datum], logprobs: TensorOrList, options: Mapping[str, Any]
) -> list[Outcome]:
    running_loop()
    data = checked_data(data)
    shared = Logprobs.from_tensors(logprobs, data)
    workers = WorkerPool(options["max_threads"])
    limits = options["max_concurrency"], options["track_grad_norms"]
    run = TermRun(data, shared, workers, *limits, timeout=options["timeout"], cancel_grace=options["cancel_grace"])
    try:
        outcomes = await run.all(terms, parallel=options["parallel"])
        shared.check_unchanged()
    finally:
        workers.close()
    return outcomes


class GradientTracker:
    """Computes gradient norms. Source: the regularizers guide, "Direct Gradient Computation"."""

    @staticmethod
    async def grad_norm(loss_fn: Callable[[torch.Tensor], Any], logprobs: torch.Tensor) -> float:
        """Returns the L2 norm of d(loss_fn)/d(logprobs).

        Args:
            loss_fn: `loss_fn(logprobs)` -> tensor or `(tensor, metrics)`; sync or async.
            logprobs: a tensor of any shape.

        Raises:
            InvalidData: `loss_fn` is not a function.
            RegularizerError: `loss_fn` failed.
        """
        check_function("loss_fn", loss_fn)

        def without_data(_data: Sequence[Datum], values: torch.Tensor) -> Any:
            return loss_fn(values)

        term = dataclasses.replace(prepare_base_loss(without_data), name="loss_fn")
        options = {**TERM_DEFAULTS, "track_grad_norms": True, "timeout": None}
        (outcome,) = await _run([term], [], logprobs, options)
        assert outcome.evaluation is not None, "a failed term raises"
        return cast("float", outcome.evaluation.grad_norm)

    @staticmethod
    async def regularizer_grad_norm(spec: RegularizerSpec, data: Sequence[Datum], logprobs: TensorOrList) -> float:
        """Returns the L2 norm of one regularizer's gradient, unweighted."""
        output = await Executor.execute_one(spec, data, logprobs, track_grad_norms=True)
        return cast("float", output.grad_norm)

    @staticmethod
    async def total_grad_norm(
        base_loss: Term, regularizers: Sequence[RegularizerSpec], data: Sequence[Datum], logprobs: TensorOrList
    ) -> float:
        """Returns the L2 norm of the total gradient; equals `CustomLossOutput.total_grad_norm`."""
        pipeline = Pipeline(base_loss, regularizers, track_grad_norms=True)
        output = await pipeline.compute(data, logprobs)
        return cast("float", output.total_grad_norm)
