"""What a custom loss reports. Every output goes to JSON and back unchanged."""

from pydantic import BaseModel, ConfigDict, Field

from tinkex_py.types import ForwardBackwardOutput

MetricValue = bool | int | float


class LossReport(BaseModel):
    """Common to all outputs: frozen; NaN and infinity in metrics are written as strings, so that it stays JSON."""

    model_config = ConfigDict(frozen=True, ser_json_inf_nan="strings")


class BaseLossOutput(LossReport):
    """The base loss.

    Attributes:
        value: the loss.
        metrics: what the base loss reported beside it.
        grad_norm: L2 norm of d(base_loss)/d(logprobs); None unless norms are tracked.
    """

    value: float
    metrics: dict[str, MetricValue] = Field(default_factory=dict)
    grad_norm: float | None = None


class RegularizerOutput(LossReport):
    """One regularizer.

    Attributes:
        name: unique within the pipeline.
        value: the raw loss.
        weight: the weight that was used.
        contribution: `weight * value`, what it adds to the total; signed.
        custom_metrics: what the term reported beside its loss.
        grad_norm: L2 norm of d(term)/d(logprobs), unweighted; None unless norms are tracked.
        grad_norm_weighted: `weight * grad_norm`.
        differentiable: False if the loss does not depend on the logprobs: it counts, but trains nothing.
    """

    name: str
    value: float
    weight: float
    contribution: float
    custom_metrics: dict[str, MetricValue] = Field(default_factory=dict)
    grad_norm: float | None = None
    grad_norm_weighted: float | None = None
    differentiable: bool = True


class CustomLossOutput(LossReport):
    """A composed loss: `loss_total = base_loss + sum(weight_i * regularizer_i)`.

    Attributes:
        loss_total: the total, summed in double precision.
        base_loss: the base loss.
        regularizers: by name, in spec order; skipped and disabled ones are not in it.
        regularizer_total: sum of all contributions.
        total_grad_norm: L2 norm of the whole gradient (not the sum of norms); None unless norms are tracked.
        skipped: name -> class of the error, for terms with `on_error="skip"` that failed.
        abandoned_threads: worker threads of this pipeline's terms that still run although their timeout is over.
        service_output: the service's own result of the backward pass; None when computed offline.
    """

    loss_total: float
    base_loss: BaseLossOutput
    regularizers: dict[str, RegularizerOutput] = Field(default_factory=dict)
    regularizer_total: float = 0.0
    total_grad_norm: float | None = None
    skipped: dict[str, str] = Field(default_factory=dict)
    abandoned_threads: int = 0
    service_output: ForwardBackwardOutput | None = None
