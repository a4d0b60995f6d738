"""From how the terms ended to what the user is told."""

import math
from collections.abc import Sequence

from tinkex_py.errors import NonFiniteLoss
from tinkex_py.losses.combine import Part
from tinkex_py.losses.gradients import Evaluation
from tinkex_py.losses.output import CustomLossOutput, RegularizerOutput
from tinkex_py.losses.terms import PreparedTerm


def part_of(term: PreparedTerm, evaluation: Evaluation) -> Part:
    """What a term adds to the gradient: scaled by its weight, and down to its largest norm if it has one."""
    weight = 1.0 if term.weight is None else term.weight
    return Part(term.name, weight * clip_scale(term, evaluation), evaluation.gradient, evaluation.grad_norm)


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
    """How the gradients get along, flat, for the stop event; nothing if norms are not tracked."""
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
