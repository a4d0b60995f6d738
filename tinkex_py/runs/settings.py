"""Settings of a training run."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinkex_py.errors import ConfigError

Count = Annotated[int, Field(ge=1, strict=True)]
Times = Annotated[int, Field(ge=0, strict=True)]

# Numbers that are known before the next step is sent.
_MONITORED = ("loss/", "grad_norm/", "term/", "evaluation/")


class Settings(BaseModel):
    """Base of the settings: frozen, and an unknown setting is an error.

    Raises:
        ConfigError: naming the setting and the value.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            raise ConfigError(f"{type(self).__name__}: {problems_of(error)}") from None


class EarlyStop(Settings):
    """Ends a run whose metric does not improve any more.

    Args:
        metric: one of the names of `tinkex_py.runs.scalars` that begin with `loss/`, `grad_norm/`, `term/` or
            `evaluation/`.
        patience: number of measurements without improvement after which the run ends, >= 1.
        better: whether lower or higher is better.
        min_change: smallest change that counts as an improvement, >= 0.
    """

    metric: str
    patience: Count = 10
    better: Literal["lower", "higher"] = "lower"
    min_change: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _can_be_monitored(self) -> Self:
        if not self.metric.startswith(_MONITORED):
            raise ValueError(f"metric must begin with one of {', '.join(_MONITORED)}, got {self.metric!r}")
        return self


class TrainSettings(Settings):
    """Settings of a run. All but `accumulate` and `execution` may be changed when a run is resumed.

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
    """

    steps: Count | None = None
    accumulate: Count = 1
    evaluate_every: Count = 10
    checkpoint_every: Count | None = 50
    keep_checkpoints: Count = 3
    checkpoint_ttl: Count | None = None
    resends: Times = 2
    restarts: Times = 2
    early_stop: EarlyStop | None = None
    execution: Literal["client", "auto", "server"] = "client"


def problems_of(error: ValidationError) -> str:
    """Describes invalid settings in one line: the name of each, and its value if that is plain."""
    problems: list[str] = []
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            problems.append(f"there is no setting {place!r}")
            continue
        given = problem["input"]
        shown = f", got {given!r}" if isinstance(given, str | bool | int | float | None) else ""
        text = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ") + shown
        problems.append(f"{place}: {text}" if place else text)
    return "; ".join(problems)
