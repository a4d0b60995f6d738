"""From how the terms ended to what the user sees."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from tinkex_py import telemetry
from tinkex_py.errors import NonFiniteLoss, PipelineError
from tinkex_py.losses.combine import Combined, WeightedGradient
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.output import BaseLossOutput, CustomLossOutput, RegularizerOutput
from tinkex_py.losses.prepared import Outcome, PreparedTerm


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
