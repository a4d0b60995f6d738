"""Outputs of a custom loss. Every output round-trips through JSON."""

import math
from collections.abc import Mapping, Sequence
from statistics import fmean

from pydantic import BaseModel, ConfigDict, Field

from tinkex_py.html_table import html_table
from tinkex_py.types import ForwardBackwardOutput

BASE_LOSS_NAME = "base_loss"
"""Term name of the base loss."""

TOTAL_METRIC = "total_of_step"
"""Metric of a mean that divides by the total of an optimizer step, so that its values over the calls add up."""

MetricValue = bool | int | float

# Metrics that are the denominators of means; the first that a term reports counts.
_DENOMINATORS = ("pairs", "tokens", "sequences")

_COLUMNS = ("value", "weight", "weight x value", "gradient norm", "x weight", "share", "cosine with base")
_BOUND_COLUMNS = ("bound", "violation", "feasible")


class LossReport(BaseModel):
    """Base of all outputs: frozen. NaN and infinity in metrics become strings in JSON."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class BaseLossOutput(LossReport):
    """Output of the base loss.

    Attributes:
        value: the loss.
        metrics: metrics that the base loss returned.
        grad_norm: L2 norm of d(base_loss)/d(logprobs); None unless norms are tracked.
    """

    value: float
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    grad_norm: float | None = None


class ConstraintOutput(LossReport):
    """How a regularizer with a bound stands to it. Its multiplier is `RegularizerOutput.weight`.

    At the end of a training, the multiplier is the price of the bound: how much the base loss would fall if the bound
    were looser by 1.

    Attributes:
        at_most: the bound; None if it is a lower one.
        at_least: the bound; None if it is an upper one.
        value: mean of the term over this call, also if its loss divides by the total of several calls.
        denominator: the tokens, sequences or pairs of that mean; None if the term does not report them.
        violation: `value - at_most`, or `at_least - value`.
        feasible: whether the bound holds in this call: `violation <= 0`.
    """

    at_most: float | None = None
    at_least: float | None = None
    value: float
    denominator: float | None = None
    violation: float
    feasible: bool

    @property
    def bound(self) -> float:
        """The bound."""
        bound = self.at_least if self.at_most is None else self.at_most
        assert bound is not None, "one of the two is set"
        return bound


class RegularizerOutput(LossReport):
    """Output of one regularizer.

    Attributes:
        name: unique within the pipeline.
        value: the raw loss.
        weight: the weight in this step.
        contribution: `weight * value`, which is added to the total; signed. With `at_least`, `-weight * value`.
        custom_metrics: metrics that the term returned.
        grad_norm: L2 norm of d(term)/d(logprobs), unweighted and before clipping; None unless norms are tracked.
        grad_norm_weighted: `weight * grad_norm`.
        differentiable: False if the loss does not depend on the logprobs: its gradient is zero.
        clip_scale: factor that limits the gradient to `RegularizerSpec.max_grad_norm`; 1.0 means not clipped.
        attempts: number of calls; more than one only with `RegularizerSpec.retry`.
        constraint: how the value stands to its bound; None without a bound.
    """

    name: str
    value: float
    weight: float
    contribution: float
    custom_metrics: dict[str, MetricValue] = Field(default_factory=dict)
    grad_norm: float | None = None
    grad_norm_weighted: float | None = None
    differentiable: bool = True
    clip_scale: float = 1.0
    attempts: int = 1
    constraint: ConstraintOutput | None = None


class GradientDiagnosis(LossReport):
    """Alignment of one term's gradient with the others; None if one of the two gradients is zero.

    Attributes:
        cosine_with_base: cosine with the gradient of the base loss, in [-1, 1].
        cosine_with_total: cosine with the gradient that is sent, in [-1, 1].
        share_of_total: share of this term in the sent gradient, `<own, total> / <total, total>`. The shares of all
            terms add up to 1; the share of a term that opposes the total is negative.
        conflicts: True if the term opposes the base loss: `cosine_with_base < 0`.
    """

    cosine_with_base: float | None = None
    cosine_with_total: float | None = None
    share_of_total: float | None = None
    conflicts: bool | None = None


def value_over_calls(outputs: "Sequence[BaseLossOutput | RegularizerOutput]") -> float:
    """Returns the value of a term over the calls of one optimizer step.

    The values of a mean that divides by the total of the step add up; all others are averaged.
    """
    values = [output.value for output in outputs]
    metrics = [output.metrics if isinstance(output, BaseLossOutput) else output.custom_metrics for output in outputs]
    return math.fsum(values) if all(TOTAL_METRIC in own for own in metrics) else fmean(values)


def denominator_of(metrics: Mapping[str, MetricValue], reduction: object) -> float | None:
    """Returns what the mean of a term divides by in one call, from its metrics; None if it does not report it."""
    over_datums = isinstance(reduction, str) and (reduction == "constant" or reduction.startswith("seq-"))
    found = [metrics[name] for name in (("sequences",) if over_datums else _DENOMINATORS) if name in metrics]
    return float(found[0]) if found else None


def mean_violation(calls: Sequence[ConstraintOutput]) -> float | None:
    """Returns the violation over the calls of one optimizer step: the mean weighted with their denominators.

    None if there is nothing to average. If a call has no denominator, all calls count the same.
    """
    known = [call.denominator for call in calls if call.denominator is not None]
    counts = known if len(known) == len(calls) else [1.0] * len(calls)
    total = math.fsum(counts)
    if total <= 0:
        return None
    return math.fsum(count * call.violation for count, call in zip(counts, calls, strict=True)) / total


class CustomLossOutput(LossReport):
    """Output of a composed loss: `loss_total = base_loss + sum(weight_i * regularizer_i)`.

    Attributes:
        loss_total: the total, summed in double precision.
        base_loss: output of the base loss.
        regularizers: outputs by name, in spec order, without skipped and disabled regularizers.
        regularizer_total: sum of all contributions.
        total_grad_norm: L2 norm of the total gradient (not the sum of norms); None unless norms are tracked.
        diagnosis: alignment of the gradients by term, "base_loss" first; empty unless norms are tracked.
        coefficients: factor of each term's unweighted gradient in the gradient that is sent; empty with
            `combine="sum"`, where it is the weight times `clip_scale`.
        skipped: name -> class of the error, for failed terms with `on_error="skip"`.
        abandoned_threads: number of worker threads that still run after the timeout of their term.
        service_output: result of the backward pass on the service; None when computed offline.
        logprob_difference_mean: mean difference of the logprobs of the backward pass from those of the forward pass;
            None if the service returns none with a backward pass, or executed the whole step.
        logprob_difference_largest: largest difference of a logprob.
    """

    loss_total: float
    base_loss: BaseLossOutput
    regularizers: dict[str, RegularizerOutput] = Field(default_factory=dict)
    regularizer_total: float = 0.0
    total_grad_norm: float | None = None
    diagnosis: dict[str, GradientDiagnosis] = Field(default_factory=dict)
    coefficients: dict[str, float] = Field(default_factory=dict)
    skipped: dict[str, str] = Field(default_factory=dict)
    abandoned_threads: int = 0
    service_output: ForwardBackwardOutput | None = None
    logprob_difference_mean: float | None = None
    logprob_difference_largest: float | None = None

    def _repr_html_(self) -> str:
        return output_html(self)


def output_html(output: CustomLossOutput) -> str:
    """Returns an HTML table for notebooks: a row per term, then the total."""
    base, unknown = output.base_loss, GradientDiagnosis()
    own = output.diagnosis.get(BASE_LOSS_NAME, unknown)
    is_bounded = any(term.constraint is not None for term in output.regularizers.values())
    blank = (None,) * len(_BOUND_COLUMNS) if is_bounded else ()
    rows: list[Sequence[object]] = [
        ("base loss", base.value, None, base.value, base.grad_norm, base.grad_norm, own.share_of_total, None, *blank)
    ]
    for name, term in output.regularizers.items():
        diagnosis = output.diagnosis.get(name, unknown)
        rows.append(
            (
                name,
                term.value,
                term.weight,
                term.contribution,
                term.grad_norm,
                term.grad_norm_weighted,
                diagnosis.share_of_total,
                diagnosis.cosine_with_base,
                *(blank if term.constraint is None else _bound_cells(term.constraint)),
            )
        )
    rows.append(("total", None, None, output.loss_total, None, output.total_grad_norm, None, None, *blank))
    skipped = ", ".join(f"{name} ({reason})" for name, reason in output.skipped.items())
    columns = ("term", *_COLUMNS, *(_BOUND_COLUMNS if is_bounded else ()))
    return html_table("Composed loss", columns, rows, below=f"skipped: {skipped}" if skipped else "")


def _bound_cells(constraint: ConstraintOutput) -> Sequence[object]:
    side = ">=" if constraint.at_most is None else "<="
    return f"{side} {constraint.bound:.5g}", constraint.violation, "yes" if constraint.feasible else "no"
