"""Prepared terms, their outcomes, and the composed loss."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from tenacity import AsyncRetrying

from tinkex_py import telemetry
from tinkex_py.arguments import as_integer, shown
from tinkex_py.errors import InPlaceMutation, NonFiniteLoss, PipelineError, RegularizerError
from tinkex_py.limits import RetryPolicy
from tinkex_py.losses.combiners import Matrix
from tinkex_py.losses.constraints import Constraint
from tinkex_py.losses.gradients import Combined, Evaluation, WeightedGradient, aligned
from tinkex_py.losses.options import Place
from tinkex_py.losses.output import (
    BASE_LOSS_NAME,
    BaseLossOutput,
    ConstraintOutput,
    CustomLossOutput,
    RegularizerOutput,
)
from tinkex_py.losses.spec import (
    OnError,
    PerDatum,
    RegularizerSpec,
    Term,
    crossing_to,
    is_async_term,
    reduction_of,
    term_function,
)
from tinkex_py.losses.weights import weight_at
from tinkex_py.types import ForwardBackwardOutput
from tinkex_py.unicode import plain_text


@dataclass(frozen=True)
class PreparedTerm:
    """A term that is ready to run.

    Attributes:
        name: name in errors, events and task names.
        function: called as `function(data, logprobs, **options)`.
        options: keyword arguments.
        is_async: True calls the function on the loop. False calls it in a thread; it must not return an awaitable.
            None calls it in a thread and awaits a returned awaitable on the loop.
        per_datum: whether the function receives one tensor per datum.
        timeout: seconds; infinity means no limit, None the timeout of the pipeline.
        weight: None for the base loss, which emits no events of its own.
        on_error: whether a failure fails the step.
        max_grad_norm: largest norm of the gradient; None means no limit.
        retry: policy for further calls after a failure; None means a single call.
        crossing: key and pickle of function and options, for a worker process; None runs the term in this one.
        constraint: the controller of the weight if it keeps a bound.
        reduction: setting of a term with a constraint; None if it has none.
    """

    name: str
    function: Callable[..., Any]
    options: Mapping[str, Any]
    is_async: bool | None
    per_datum: bool
    timeout: float | None = None
    weight: float | None = None
    on_error: OnError = "raise"
    max_grad_norm: float | None = None
    retry: RetryPolicy | AsyncRetrying | None = None
    crossing: tuple[bytes, bytes] | None = None
    constraint: Constraint | None = None
    reduction: object = None

    def contribution(self, value: float) -> float:
        """Returns what a value of this regularizer adds to the total."""
        assert self.weight is not None, "the base loss has no weight"
        return self.weight * value if self.constraint is None else self.constraint.sign * self.weight * value

    def constrained(self, evaluation: Evaluation) -> ConstraintOutput | None:
        """Returns how the value stands to its bound; None without a bound."""
        if self.constraint is None:
            return None
        return self.constraint.measured(evaluation.value, evaluation.metrics, self.reduction)


def prepare_base_loss(base_loss: Term, place: Place | None = None) -> PreparedTerm:
    """Prepares the base loss, which runs in a place; None detects it.

    Raises:
        InvalidSpec: it cannot run there.
    """
    is_async = is_async_term(base_loss)
    crossing = None if place is None else crossing_to(place, base_loss, {}, is_async, f"base_runs_in={place!r}")
    return PreparedTerm(
        name=BASE_LOSS_NAME,
        function=term_function(base_loss),
        options={},
        is_async=is_async if is_async or place is not None else None,
        per_datum=isinstance(base_loss, PerDatum),
        crossing=crossing,
    )


def prepare_regularizer(spec: RegularizerSpec) -> PreparedTerm:
    """Prepares a regularizer. The weight is 0 until `with_weight_at` if it is a schedule or controller."""
    retry, constraint = spec.retry, spec.weight if isinstance(spec.weight, Constraint) else None
    if isinstance(retry, int):
        retry = RetryPolicy(deadline=math.inf, max_attempts=retry, initial_wait=0.1, max_wait=5.0)
    return PreparedTerm(
        name=spec.name,
        function=term_function(spec.fn),
        options=spec.options,
        is_async=spec.awaits,
        per_datum=isinstance(spec.fn, PerDatum),
        timeout=spec.timeout,
        weight=spec.weight if isinstance(spec.weight, float) else 0.0,
        on_error=spec.on_error,
        max_grad_norm=spec.max_grad_norm,
        retry=retry,
        crossing=spec.crossing,
        constraint=constraint,
        reduction=None if constraint is None else reduction_of(spec),
    )


def with_weight_at(step: int, term: PreparedTerm, spec: RegularizerSpec) -> PreparedTerm:
    """Returns the term of a spec with its weight at a step.

    Raises:
        InvalidSpec: the schedule of the weight failed or did not return a finite number >= 0.
    """
    if isinstance(spec.weight, float):
        return term
    return replace(term, weight=weight_at(spec.weight, spec.name, step))


def checked_step(step: int) -> int:
    """Returns the step if it is an int >= 0.

    Raises:
        PipelineError: it is something else.
    """
    count = step if type(step) is int else as_integer(step)
    if count is None or count < 0:
        raise PipelineError(f"step must be an int >= 0, got {shown(step)}")
    return count


@dataclass(frozen=True)
class Outcome:
    """The result of running a term: an evaluation or an error."""

    term: PreparedTerm
    evaluation: Evaluation | None = None
    error: RegularizerError | None = None
    fatal: BaseException | None = None  # for example KeyboardInterrupt or SystemExit: raised unchanged

    @property
    def exception(self) -> BaseException:
        """The error of a failed term."""
        exception = self.error or self.fatal
        assert exception is not None, "the term did not fail"
        return exception

    @property
    def fails_step(self) -> bool:
        """Whether the step must fail. `on_error="skip"` does not apply to a change of the shared logprobs."""
        if self.error is None:
            return self.fatal is not None
        return self.term.on_error == "raise" or isinstance(self.error, InPlaceMutation)


def failed_with(term: PreparedTerm, cause: BaseException) -> RegularizerError:
    """Returns a RegularizerError that wraps the exception of a term."""
    error = RegularizerError(f"term {term.name!r} failed with {described(cause)}", name=term.name)
    error.__cause__ = cause
    return error


def described(error: BaseException) -> str:
    """Returns class and message of an exception, also if its `__str__` fails."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001  # user code: __str__ may raise anything
        message = f"<__str__ failed with {type(broken).__name__}>"
    return f"{type(error).__name__}: {plain_text(message)}"


@dataclass(frozen=True)
class TermGradients:
    """The gradients of the terms, and how they add up to the total.

    Attributes:
        names: of the terms that took part, the base loss first.
        gradients: d(term)/d(logprobs), unweighted; None where it is zero.
        factors: row i has the factors of all gradients in the part of term i.
    """

    names: Sequence[str]
    gradients: Sequence[torch.Tensor | None]
    factors: Matrix

    @classmethod
    def of(cls, parts: Sequence[WeightedGradient], combined: Combined) -> "TermGradients":
        """Returns the gradients that were combined."""
        scales = np.diag([part.scale for part in parts])
        factors = scales if combined.factors is None else combined.factors
        return cls([part.name for part in parts], [part.gradient for part in parts], factors)


@dataclass(frozen=True)
class CustomLoss:
    """A composed loss with its gradient.

    Attributes:
        output: the output for the user.
        gradient: d(loss_total)/d(logprobs), with the device and shape of the buffer of the logprobs.
        differentiable: False if no term depends on the logprobs.
        terms: the gradients of the terms; None unless they were requested.
    """

    output: CustomLossOutput
    gradient: torch.Tensor
    differentiable: bool
    terms: TermGradients | None = None

    def with_service(
        self, service_output: ForwardBackwardOutput, differences: tuple[float, float] | None = None
    ) -> CustomLossOutput:
        """Returns the output with the service's result of the backward pass.

        Args:
            service_output: the result.
            differences: mean and largest difference of its logprobs from those of the forward pass.
        """
        mean, largest = differences or (None, None)
        known = {"logprob_difference_mean": mean, "logprob_difference_largest": largest}
        return self.output.model_copy(update={"service_output": service_output, **known})

    def in_another_space(self, products: Matrix) -> CustomLossOutput:
        """Returns the output with norms and diagnosis from other dot products of the gradients of `terms`."""
        assert self.terms is not None, "requested"
        diagnosis, size = aligned(self.terms.names, products, self.terms.factors)
        norms = dict(zip(self.terms.names, np.sqrt(np.diag(products)).tolist(), strict=True))
        base, regularizers = self.output.base_loss, self.output.regularizers
        changed = {
            "base_loss": base.model_copy(update={"grad_norm": norms[BASE_LOSS_NAME]}),
            "regularizers": {
                name: own.model_copy(update={"grad_norm": norms[name], "grad_norm_weighted": own.weight * norms[name]})
                for name, own in regularizers.items()
            },
        }
        return self.output.model_copy(update={**changed, "total_grad_norm": size, "diagnosis": diagnosis})

    def check_differentiable(self) -> None:
        """Raises PipelineError if no term depends on the logprobs."""
        if not self.differentiable:
            raise PipelineError(
                "no term depends on the logprobs, so there is no gradient to train on, and nothing was sent. detach(), "
                "numpy(), torch.no_grad() and torch.tensor(x) cut a loss off from the logprobs: remove them from a term"
            )


def weighted_gradients(outcomes: Sequence[Outcome]) -> list[WeightedGradient]:
    """Returns the gradients of the terms with their scales: weight times clipping factor."""
    return [
        WeightedGradient(
            outcome.term.name,
            (1.0 if outcome.term.weight is None else outcome.term.weight) * clip_scale(outcome.term, evaluation),
            _directed(outcome.term, evaluation.gradient),
            evaluation.grad_norm,
        )
        for outcome in outcomes
        if (evaluation := outcome.evaluation) is not None
    ]


def _directed(term: PreparedTerm, gradient: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the gradient of what is minimized: that of a value with a lower bound is reversed."""
    is_reversed = term.constraint is not None and term.constraint.sign < 0
    return -gradient if is_reversed and gradient is not None else gradient


def custom_loss(
    outcomes: Sequence[Outcome],
    combined: Combined,
    *,
    track_grad_norms: bool,
    abandoned_threads: int,
    terms: TermGradients | None = None,
) -> CustomLoss:
    """Composes the result of a step from the outcomes, the base loss first, and the total gradient.

    Raises:
        NonFiniteLoss: the total is too large for a float.
    """
    base = outcomes[0].evaluation
    assert base is not None, "a failed base loss raises earlier"
    regularizers = {
        outcome.term.name: report(outcome.term, outcome.evaluation)
        for outcome in outcomes[1:]
        if outcome.evaluation is not None
    }
    contributions = [output.contribution for output in regularizers.values()]
    output = CustomLossOutput(
        loss_total=total([base.value, *contributions]),
        base_loss=BaseLossOutput(value=base.value, metrics=base.metrics, grad_norm=base.grad_norm),
        regularizers=regularizers,
        regularizer_total=total(contributions),
        total_grad_norm=combined.norm if track_grad_norms else None,
        diagnosis=combined.diagnosis if track_grad_norms else {},
        coefficients=combined.coefficients,
        skipped={outcome.term.name: telemetry.failure_reason(outcome.error) for outcome in outcomes if outcome.error},
        abandoned_threads=abandoned_threads,
    )
    differentiable = base.differentiable or any(output.differentiable for output in regularizers.values())
    return CustomLoss(output, combined.gradient, differentiable, terms)


def clip_scale(term: PreparedTerm, evaluation: Evaluation) -> float:
    """Returns the factor that limits a term's gradient to `max_grad_norm`; 1.0 means no clipping."""
    if term.max_grad_norm is None or not evaluation.grad_norm:
        return 1.0
    return min(1.0, term.max_grad_norm / evaluation.grad_norm)


def report(term: PreparedTerm, evaluation: Evaluation) -> RegularizerOutput:
    """Returns the output of a regularizer."""
    weight = term.weight
    assert weight is not None
    return RegularizerOutput(
        name=term.name,
        value=evaluation.value,
        weight=weight,
        contribution=term.contribution(evaluation.value),
        custom_metrics=evaluation.metrics,
        grad_norm=evaluation.grad_norm,
        grad_norm_weighted=None if evaluation.grad_norm is None else weight * evaluation.grad_norm,
        differentiable=evaluation.differentiable,
        clip_scale=clip_scale(term, evaluation),
        attempts=evaluation.attempts,
        constraint=term.constrained(evaluation),
    )


def constraint_measurements(term: PreparedTerm, evaluation: Evaluation) -> dict[str, float | None]:
    """Returns how the value stands to its bound, for the stop event; empty without a bound."""
    own = term.constrained(evaluation)
    return {} if own is None else {"bound": own.bound, "violation": own.violation, "feasible": own.feasible}


def diagnosis_measurements(output: CustomLossOutput) -> dict[str, float | None]:
    """Returns the gradient alignment as flat measurements for the stop event; empty unless norms are tracked."""
    if output.total_grad_norm is None:
        return {}
    flat: dict[str, float | None] = {"total_grad_norm": output.total_grad_norm}
    for name, diagnosis in output.diagnosis.items():
        flat |= {f"{name}.{field}": value for field, value in diagnosis}
    return flat


def total(values: Sequence[float]) -> float:
    """Returns the sum in double precision.

    Raises:
        NonFiniteLoss: the sum is not finite.
    """
    try:
        result = math.fsum(values)
    except (OverflowError, ValueError):
        result = math.inf
    if not math.isfinite(result):
        raise NonFiniteLoss(
            f"the sum of the losses {list(values)} is not finite; nothing was sent. Reduce the weights or the losses",
            name="loss_total",
        )
    return result
