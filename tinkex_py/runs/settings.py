"""Settings of a training run."""

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from tinkex_py.errors import ConfigError

Count = Annotated[int, Field(ge=1, strict=True)]
Times = Annotated[int, Field(ge=0, strict=True)]

# What may be watched: the loop knows these before it goes on.
_WATCHABLE = ("loss/", "grad_norm/", "term/", "evaluation/")


class Settings(BaseModel):
    """Common to all: frozen, and a setting that does not exist is an error.

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
    """Ends a run whose number does not get better any more.

    Args:
        metric: one of the names of `tinkex_py.runs.scalars` that begin with `loss/`, `grad_norm/`, `term/` or
            `evaluation/`.
        patience: measurements without a better one after which the run ends, >= 1.
        better: whether lower or higher is better.
        min_change: by how much a measurement must be better than the best before it, >= 0, to count.
    """

    metric: str
    patience: Count = 10
    better: Literal["lower", "higher"] = "lower"
    min_change: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0

    @model_validator(mode="after")
    def _can_be_watched(self) -> Self:
        if not self.metric.startswith(_WATCHABLE):
            raise ValueError(f"metric must begin with one of {', '.join(_WATCHABLE)}, got {self.metric!r}")
        return self


class TrainSettings(Settings):
    """How a run goes. All but `accumulate`, `seed` and `execution` may be changed when a run is resumed.

    Args:
        steps: optimizer steps; None is until the batches end.
        accumulate: batches whose gradients one optimizer step adds up; fewer where the batches end.
        evaluate_every: optimizer steps between two evaluations; there is one after the last of `steps` too.
        checkpoint_every: optimizer steps between two checkpoints; None is only at the start and at the end.
        keep_checkpoints: how many of the last checkpoints the service keeps; older ones are deleted.
        checkpoint_ttl: seconds after which the service may delete a checkpoint; None is never.
        resends: how often what is missing of a failed optimizer step is sent again.
        restarts: how often a run goes back to its last checkpoint before it gives up.
        early_stop: ends the run early; None never does.
        seed: of the run, for `run.json`; data and model get theirs where they are made.
        execution: where the terms run, as `forward_backward_custom` takes it.
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
    seed: int | None = None
    execution: Literal["client", "auto", "server"] = "client"


def problems_of(error: ValidationError) -> str:
    """What is wrong with some settings, in one line; each names the setting, and the value where it is plain."""
    problems: list[str] = []
    for problem in error.errors(include_url=False):
        place = ".".join(map(str, problem["loc"]))
        if problem["type"] == "extra_forbidden":
            problems.append(f"there is no setting {place!r}")
            continue
        given = problem["input"]
        shown = f", got {given!r}" if isinstance(given, str | bool | int | float | None) else ""
        told = "is missing" if problem["type"] == "missing" else problem["msg"].removeprefix("Value error, ") + shown
        problems.append(f"{place}: {told}" if place else told)
    return "; ".join(problems)
