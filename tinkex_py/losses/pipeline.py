"""Composes a training loss: `loss_total = base_loss + sum(weight_i * regularizer_i)`."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from tinkex_py import telemetry
from tinkex_py.errors import DuplicateRegularizerNames, InvalidBaseLoss, InvalidSpec, NonFiniteLoss, PipelineError
from tinkex_py.losses import gradients
from tinkex_py.losses.executor import SMALL_LOGPROBS, TermRun
from tinkex_py.losses.grad_mode import with_grad_on_while_suspended
from tinkex_py.losses.logprobs import Logprobs
from tinkex_py.losses.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.losses.spec import RegularizerSpec, Term, why_not_a_term
from tinkex_py.losses.terms import Outcome, prepare_base_loss, prepare_regularizer
from tinkex_py.losses.threads import TermThreads, run_released
from tinkex_py.types import Datum
from tinkex_py.types.seconds import is_seconds


@dataclass(frozen=True)
class CustomLoss:
    """A composed loss with its gradient.

    Attributes:
        output: what the user sees.
        gradient: d(loss_total)/d(logprobs), laid out like the logprobs' buffer.
        differentiable: False if no term at all depends on the logprobs.
    """

    output: CustomLossOutput
    gradient: torch.Tensor
    differentiable: bool


class Pipeline:
    """A base loss and weighted regularizers, evaluated together. Reusable; calls may overlap.

    Args:
        base_loss: a term: `(data, logprobs)` -> loss or `(loss, metrics)`; sync, async or an object.
        regularizers: specs with unique names.
        track_grad_norms: compute the L2 norm of every term's gradient and of the total.
        parallel: False runs one term after another, the base loss first, then in spec order.
        timeout: seconds per term, the base loss included; a spec's own timeout wins. None is no limit.
        max_concurrency: terms in flight at once.
        max_threads: sync terms in threads at once; None is the usable CPU count. Live term threads never exceed
            `min(max_threads, max_concurrency)`, abandoned ones included.

    Raises:
        InvalidBaseLoss: the base loss cannot be called.
        InvalidSpec: an element of `regularizers` is no RegularizerSpec.
        DuplicateRegularizerNames: two enabled or disabled specs share a name.
        PipelineError: an option is out of range.
    """

    def __init__(
        self,
        base_loss: Term,
        regularizers: Sequence[RegularizerSpec] = (),
        *,
        track_grad_norms: bool = False,
        parallel: bool = True,
        timeout: float | None = 30.0,
        max_concurrency: int = 32,
        max_threads: int | None = None,
    ) -> None:
        problem = why_not_a_term(base_loss, {})
        if problem is not None:
            raise InvalidBaseLoss(f"base loss: {problem}")
        self.base_loss = base_loss
        self.regularizers = checked_specs(regularizers)
        self.track_grad_norms = track_grad_norms
        self.parallel = parallel
        self.timeout = checked_timeout(timeout)
        self.max_concurrency = checked_count("max_concurrency", max_concurrency)
        self.max_threads = None if max_threads is None else checked_count("max_threads", max_threads)
        self._own_threads: TermThreads | None = None
        self._told_not_differentiable: set[str] = set()

    async def compute(self, data: Sequence[Datum], logprobs: torch.Tensor | Sequence[torch.Tensor]) -> CustomLossOutput:
        """Evaluates the loss on logprobs that are at hand.

        Args:
            data: the datums, handed to every term; may be empty.
            logprobs: one floating point tensor of any shape, or one tensor per datum. Never changed.

        Raises:
            RegularizerError: a term failed; its `name` says which.
            PipelineError: the logprobs cannot be used.
        """
        shared = Logprobs.from_tensors(logprobs, datums=datum_count(data))
        return (await self.evaluate(data, shared)).output

    async def evaluate(
        self,
        data: Sequence[Datum],
        logprobs: Logprobs,
        *,
        threads: TermThreads | None = None,
        thread_group: object = None,
    ) -> CustomLoss:
        """The loss and its gradient, as the training client needs them.

        Args:
            data: the datums, handed to every term.
            logprobs: the shared buffer.
            threads: where sync terms run; default are this pipeline's own.
            thread_group: whose live term threads count against this pipeline's bounds; default is the pipeline.
        """
        run = TermRun(
            data,
            logprobs,
            threads or self._threads(),
            self.max_concurrency,
            self.track_grad_norms,
            max_threads=self.max_threads,
            thread_group=thread_group or self,
        )
        return await with_grad_on_while_suspended(self._observed(run))

    async def _observed(self, run: TermRun) -> CustomLoss:
        specs = [spec for spec in self.regularizers if spec.enabled]
        metadata = {"regularizer_count": len(specs), "track_grad_norms": self.track_grad_norms}
        with telemetry.lifecycle("tinkex.custom_loss", metadata) as measurements:
            loss = await self._evaluate(run, specs)
            measurements["loss_total"] = loss.output.loss_total
            measurements["regularizer_total"] = loss.output.regularizer_total
            return loss

    async def _evaluate(self, run: TermRun, specs: Sequence[RegularizerSpec]) -> CustomLoss:
        terms = [prepare_base_loss(self.base_loss, self.timeout)]
        terms += [prepare_regularizer(spec, self.timeout) for spec in specs]
        outcomes = await run.all(terms, parallel=self.parallel)
        self._tell_not_differentiable(outcomes)
        if run.logprobs.buffer.numel() <= SMALL_LOGPROBS:
            return self._compose(outcomes, run)
        return await run_released(run.threads.arithmetic, "sum", lambda: self._compose(outcomes, run))

    def _compose(self, outcomes: Sequence[Outcome], run: TermRun) -> CustomLoss:
        run.logprobs.check_unchanged()
        base = outcomes[0].evaluation
        assert base is not None, "a base loss that failed has raised"
        done = [(outcome.term, outcome.evaluation) for outcome in outcomes if outcome.evaluation is not None]
        with torch.inference_mode(False), torch.no_grad():
            parts = [(1.0 if term.weight is None else term.weight, result.gradient) for term, result in done]
            gradient = gradients.weighted_sum(parts, run.logprobs.buffer)
            gradients.check_finite(gradient, "loss_total")
            total_norm = gradients.norm(gradient) if self.track_grad_norms else None
        regularizers = {outcome.term.name: report(outcome) for outcome in outcomes[1:] if outcome.evaluation}
        contributions = [output.contribution for output in regularizers.values()]
        output = CustomLossOutput(
            loss_total=total([base.value, *contributions]),
            base_loss=BaseLossOutput(value=base.value, metrics=base.metrics, grad_norm=base.grad_norm),
            regularizers=regularizers,
            regularizer_total=total(contributions),
            total_grad_norm=total_norm,
            skipped={
                outcome.term.name: telemetry.failure_reason(outcome.error) for outcome in outcomes if outcome.error
            },
            abandoned_threads=len(run.threads.abandoned()),
        )
        return CustomLoss(output, gradient, differentiable=any(result.differentiable for _, result in done))

    def _tell_not_differentiable(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            name = outcome.term.name
            if outcome.evaluation is None or outcome.evaluation.differentiable or name in self._told_not_differentiable:
                continue
            self._told_not_differentiable.add(name)
            telemetry.emit("tinkex.regularizer.not_differentiable", {}, {"regularizer_name": name})

    def _threads(self) -> TermThreads:
        if self._own_threads is None:
            self._own_threads = TermThreads(self.max_threads)
        return self._own_threads


def report(outcome: Outcome) -> RegularizerOutput:
    """What a regularizer's outcome looks like to the user."""
    evaluation, weight = outcome.evaluation, outcome.term.weight
    assert evaluation is not None
    assert weight is not None
    return RegularizerOutput(
        name=outcome.term.name,
        value=evaluation.value,
        weight=weight,
        contribution=weight * evaluation.value,
        custom_metrics=evaluation.metrics,
        grad_norm=evaluation.grad_norm,
        grad_norm_weighted=None if evaluation.grad_norm is None else weight * evaluation.grad_norm,
        differentiable=evaluation.differentiable,
    )


def total(values: Sequence[float]) -> float:
    """The sum in double precision.

    Raises:
        NonFiniteLoss: it is too large for a float.
    """
    try:
        result = math.fsum(values)
    except (OverflowError, ValueError):
        result = math.inf
    if not math.isfinite(result):
        raise NonFiniteLoss(f"the total of {list(values)} is not finite; nothing was sent", name="loss_total")
    return result


def checked_specs(regularizers: Sequence[RegularizerSpec]) -> tuple[RegularizerSpec, ...]:
    """The specs, if they are specs and have unique names."""
    given = cast("object", regularizers)
    if isinstance(given, RegularizerSpec) or not isinstance(given, Iterable):
        raise InvalidSpec(f"regularizers must be a list of RegularizerSpec, got a {type(given).__name__}")
    specs = tuple(regularizers)
    for index, spec in enumerate(specs):
        if not isinstance(spec, RegularizerSpec):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidSpec(f"regularizers[{index}] must be a RegularizerSpec, got a {type(spec).__name__}")
    names = [spec.name for spec in specs]
    duplicates = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if duplicates:
        raise DuplicateRegularizerNames(duplicates)
    return specs


def datum_count(data: Sequence[Datum]) -> int:
    """How many datums there are."""
    if not isinstance(data, Sequence):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"data must be a list of Datum, got a {type(data).__name__}")
    return len(data)


def checked_timeout(timeout: float | None) -> float | None:
    """Seconds > 0, or None."""
    if timeout is None:
        return None
    if not (is_seconds(timeout) and timeout > 0):
        raise PipelineError(f"timeout must be > 0 seconds or None, got {timeout!r}")
    return timeout


def checked_count(name: str, count: int) -> int:
    """An int >= 1."""
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"{name} must be an int >= 1, got {count!r}")
    return count
