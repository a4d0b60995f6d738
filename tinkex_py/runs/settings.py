"""Settings of a training run, and the state of early stopping."""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from tinkex_py.arguments import as_number, check_options
from tinkex_py.errors import ConfigError, did_you_mean
from tinkex_py.types import AdamParams, OptimizerParams
from tinkex_py.values import Integer, Number, problems_of

Count = Annotated[Integer, Field(ge=1)]
Times = Annotated[Integer, Field(ge=0)]

# Numbers that are known before the next step is sent.
_MONITORED = ("loss/", "grad_norm/", "term/", "evaluation/", "rollout/")


def _with_names(value: object) -> object:
    """Names that are no strings cannot be passed to the constructor of `Settings`."""
    return check_options("early_stop", cast("object", value)) if isinstance(value, Mapping) else value


class Settings(BaseModel):
    """Base of the settings: frozen, and an unknown setting is an error.

    Raises:
        ConfigError: a setting is invalid; the message names it and its value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {problems_of(error, type(self))}") from None


class EarlyStop(Settings):
    """Ends a run whose metric no longer improves.

    Args:
        metric: a name of `tinkex_py.runs.scalars` that begins with `loss/`, `grad_norm/`, `term/`, `evaluation/` or
            `rollout/`.
        patience: number of measurements without improvement after which the run ends, >= 1.
        better: whether lower or higher is better.
        min_change: smallest change that counts as an improvement, >= 0.
    """

    metric: str
    patience: Count = 10
    better: Literal["lower", "higher"] = "lower"
    min_change: Annotated[Number, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _can_be_monitored(self) -> Self:
        if not self.metric.startswith(_MONITORED):
            raise ValueError(f"metric must begin with one of {', '.join(_MONITORED)}, got {self.metric!r}")
        return self


class Patience(BaseModel):
    """Early-stopping state.

    Attributes:
        best: the best measurement; None before the first.
        since: number of measurements after the best one.
    """

    model_config = ConfigDict(frozen=True)

    best: float | None = None
    since: int = 0

    def after(self, rule: EarlyStop, numbers: Mapping[str, float]) -> "Patience":
        """Returns the state after a step with these numbers; a step without an evaluation changes nothing.

        Raises:
            ConfigError: the monitored number is missing.
        """
        value = numbers.get(rule.metric)
        if value is None:
            evaluated = any(name.startswith("evaluation/") for name in numbers)
            if rule.metric.startswith("evaluation/") and not evaluated:
                return self
            raise ConfigError(
                f"early_stop: no metric is named {rule.metric!r}{did_you_mean(rule.metric, numbers)}; use one of "
                f"{', '.join(sorted(numbers))}"
            )
        best = math.nan if self.best is None else self.best
        gain = best - value if rule.better == "lower" else value - best
        if gain > rule.min_change or (self.best is None and not math.isnan(value)):
            return Patience(best=value)
        return Patience(best=self.best, since=self.since + 1)

    def is_over(self, rule: EarlyStop) -> bool:
        """Returns whether the run must end."""
        return self.since >= rule.patience


class TrainSettings(Settings):
    """Settings of a run. All but `accumulate`, `execution` and `lag` may be changed when a run is resumed.

    Args:
        steps: optimizer steps; None trains until the batches end.
        accumulate: batches whose gradients one optimizer step adds up; fewer at the end of the data.
        evaluate_every: optimizer steps between two evaluations; the last of `steps` is always evaluated.
        checkpoint_every: optimizer steps between two checkpoints; None saves only at the start and at the end.
        keep_checkpoints: number of checkpoints that the service keeps; older ones are deleted.
        checkpoint_ttl: seconds after which the service may delete a checkpoint; None is never.
        resends: how often the missing part of a failed optimizer step is sent again.
        restarts: how often a run restarts from its last checkpoint before it fails.
        early_stop: ends the run early; None disables it.
        execution: where the terms run, as for `forward_backward_custom`.
        grad_norm: ask for the norm of each step's gradient, as `optim_step(..., grad_norm=True)` does, and record it
            as the metric `grad_norm`.
        lag: where `batches` is an async function, the optimizer steps by which the weights that sample a batch are
            older than those that are trained on it. From 1 on, sampling and training overlap.
    """

    steps: Count | None = None
    accumulate: Count = 1
    evaluate_every: Count = 10
    checkpoint_every: Count | None = 50
    keep_checkpoints: Count = 3
    checkpoint_ttl: Count | None = None
    resends: Times = 2
    restarts: Times = 2
    early_stop: Annotated[EarlyStop | None, BeforeValidator(_with_names)] = None
    execution: Literal["client", "auto", "server"] = "client"
    grad_norm: bool = False
    lag: Times = 0


def optimizer_settings(given: object, name: str) -> AdamParams | OptimizerParams:
    """Returns the settings of an optimizer step; a number is the learning rate of AdamW.

    Raises:
        ConfigError: it is neither; the message begins with `name`.
        InvalidData: the learning rate is out of range.
    """
    if isinstance(given, AdamParams | OptimizerParams):
        return given
    rate = as_number(given)
    if rate is None:
        raise ConfigError(
            f"{name} must be AdamParams, OptimizerParams or a learning rate, got a {type(given).__name__}"
        )
    return AdamParams(learning_rate=rate)
