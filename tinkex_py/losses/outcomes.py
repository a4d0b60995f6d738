"""Terms that are ready to run, how they end, and what the user then sees."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from tenacity import AsyncRetrying

from tinkex_py import telemetry
from tinkex_py.errors import InPlaceMutation, NonFiniteLoss, PipelineError, RegularizerError
from tinkex_py.limits import RetryPolicy
from tinkex_py.losses.gradients import Combined, Evaluation, WeightedGradient
from tinkex_py.losses.output import BASE_LOSS_NAME, BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.losses.spec import OnError, PerDatum, RegularizerSpec, Term, is_async_term, term_function
from tinkex_py.losses.weights import weight_at
from tinkex_py.types import ForwardBackwardOutput


@dataclass(frozen=True)
class PreparedTerm:
    """A term, ready to run.

    Attributes:
        name: in errors, events and task names.
        function: what is called, as `function(data, logprobs, **options)`.
        options: its keyword arguments.
        is_async: True: called on the loop; False: called in a thread, must not return an awaitable; None: called
            in a thread, an awaitable it returns is awaited on the loop.
        per_datum: wants a list with one tensor per datum.
        timeout: seconds; infinity is no limit, None that of the pipeline.
        weight: None for the base loss, which has none and emits no events of its own.
        on_error: whether a failure fails the step.
        max_grad_norm: its gradient is scaled down to this norm; None leaves it.
        retry: says when to call again after a failure; None never does.
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


def prepare_base_loss(base_loss: Term) -> PreparedTerm:
    """The base loss as a term."""
    return PreparedTerm(
        name=BASE_LOSS_NAME,
        function=term_function(base_loss),
        options={},
        is_async=True if is_async_term(base_loss) else None,
        per_datum=isinstance(base_loss, PerDatum),
    )


def prepare_regularizer(spec: RegularizerSpec) -> PreparedTerm:
    """A regularizer as a term; a weight that moves is 0 until `with_weight_at` sets it."""
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
        retry=_retry_policy(spec.retry),
    )


def with_weight_at(step: int, term: PreparedTerm, spec: RegularizerSpec) -> PreparedTerm:
    """The term of a spec with the weight that it has after so many optimizer steps.

    Raises:
        InvalidSpec: the schedule of the weight failed, or gave no finite number >= 0.
    """
    if isinstance(spec.weight, float):
        return term
    return replace(term, weight=weight_at(spec.weight, spec.name, step))


def _retry_policy(retry: int | AsyncRetrying | None) -> RetryPolicy | AsyncRetrying | None:
    if not isinstance(retry, int):
        return retry
    return RetryPolicy(deadline=math.inf, max_attempts=retry, initial_wait=0.1, max_wait=5.0)


def checked_step(step: int) -> int:
    """An int >= 0."""
    if isinstance(step, bool) or not isinstance(step, int) or step < 0:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise PipelineError(f"step must be an int >= 0, got {step!r}")
    return step


@dataclass(frozen=True)
class Outcome:
    """How a term ended: with an evaluation, or with an error."""

    term: PreparedTerm
    evaluation: Evaluation | None = None
    error: RegularizerError | None = None
    fatal: BaseException | None = None  # KeyboardInterrupt, SystemExit and the like: raised unchanged

    @property
    def exception(self) -> BaseException:
        """What it failed with."""
        exception = self.error or self.fatal
        assert exception is not None, "asked for the exception of a term that did not fail"
        return exception

    @property
    def fails_step(self) -> bool:
        """Whether the step cannot go on. A change of the shared logprobs can never be skipped."""
        if self.error is None:
            return self.fatal is not None
        return self.term.on_error == "raise" or isinstance(self.error, InPlaceMutation)


def failed_with(term: PreparedTerm, cause: BaseException) -> RegularizerError:
    """The error that reports a term's own exception."""
    error = RegularizerError(f"term {term.name!r} failed with {described(cause)}", name=term.name)
    error.__cause__ = cause
    return error


def described(error: BaseException) -> str:
    """Class and message of an exception, whose message may itself be broken."""
    try:
        message = str(error)
    except Exception as broken:  # noqa: BLE001  # user code: __str__ may raise anything
        message = f"<its message cannot be shown: {type(broken).__name__}>"
    return f"{type(error).__name__}: {message}"


@dataclass(frozen=True)
class CustomLoss:
    """A composed loss with its gradient.

    Attributes:
        output: what the user sees.
        gradient: d(loss_total)/d(logprobs), on the device of the logprobs, laid out like their buffer.
        differentiable: False if no term at all depends on the logprobs.
    """

    output: CustomLossOutput
    gradient: torch.Tensor
    differentiable: bool

    def with_service(self, service_output: ForwardBackwardOutput) -> CustomLossOutput:
        """The output together with what the service said about the backward pass."""
        return self.output.model_copy(update={"service_output": service_output})

    def check_differentiable(self) -> None:
        """Raises PipelineError if no term depends on the logprobs."""
        if not self.differentiable:
            raise PipelineError(
                "no term depends on the logprobs, so there is nothing to train on; nothing was sent. A loss loses its "
                "path to the logprobs through detach(), numpy(), torch.no_grad() or torch.tensor(x)"
            )


def weighted_gradients(outcomes: Sequence[Outcome]) -> list[WeightedGradient]:
    """What the terms add to the gradient: scaled by their weights, and down to their largest norms."""
    return [
        WeightedGradient(
            outcome.term.name,
            (1.0 if outcome.term.weight is None else outcome.term.weight) * clip_scale(outcome.term, evaluation),
            evaluation.gradient,
            evaluation.grad_norm,
        )
        for outcome in outcomes
        if (evaluation := outcome.evaluation) is not None
    ]


def custom_loss(
    outcomes: Sequence[Outcome], combined: Combined, *, track_grad_norms: bool, abandoned_threads: int
) -> CustomLoss:
    """The result of a step.

    Args:
        outcomes: of all terms, the base loss first; it did not fail.
        combined: the gradient of the whole.
        track_grad_norms: whether norms and diagnosis are shown.
        abandoned_threads: how many threads outlived their terms.

    Raises:
        NonFiniteLoss: the total is too large for a float.
    """
    base = outcomes[0].evaluation
    assert base is not None, "a base loss that failed has raised"
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
        skipped={outcome.term.name: telemetry.failure_reason(outcome.error) for outcome in outcomes if outcome.error},
        abandoned_threads=abandoned_threads,
    )
    differentiable = base.differentiable or any(output.differentiable for output in regularizers.values())
    return CustomLoss(output, combined.gradient, differentiable)


def clip_scale(term: PreparedTerm, evaluation: Evaluation) -> float:
    """What keeps a term's gradient to its largest norm; 1.0 if it need not be clipped."""
    if term.max_grad_norm is None or not evaluation.grad_norm:
        return 1.0
    return min(1.0, term.max_grad_norm / evaluation.grad_norm)


def report(term: PreparedTerm, evaluation: Evaluation) -> RegularizerOutput:
    """What a regularizer looks like to the user."""
    weight = term.weight
    assert weight is not None
    return RegularizerOutput(
        name=term.name,
        value=evaluation.value,
        weight=weight,
        contribution=weight * evaluation.value,
        custom_metrics=evaluation.metrics,
        grad_norm=evaluation.grad_norm,
        grad_norm_weighted=None if evaluation.grad_norm is None else weight * evaluation.grad_norm,
        differentiable=evaluation.differentiable,
        clip_scale=clip_scale(term, evaluation),
        attempts=evaluation.attempts,
    )


def diagnosis_measurements(output: CustomLossOutput) -> dict[str, float | None]:
    """Alignment of the gradients, flat, for the stop event; nothing if norms are not tracked."""
    if output.total_grad_norm is None:
        return {}
    flat: dict[str, float | None] = {"total_grad_norm": output.total_grad_norm}
    for name, diagnosis in output.diagnosis.items():
        flat |= {f"{name}.{field}": value for field, value in diagnosis}
    return flat


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
