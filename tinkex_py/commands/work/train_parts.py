"""Makes what a configuration file names: terms, weights, the pipeline and the optimizer."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from tinkex_py import base_losses, regularizers as ready_made
from tinkex_py.commands.common.importing import named_object
from tinkex_py.commands.work.train_config import LossSection, OptimizerSection, RegularizerSection, TermSection
from tinkex_py.errors import ConfigError, InvalidData, InvalidSpec
from tinkex_py.losses import Pipeline, RegularizerSpec, controllers, schedules
from tinkex_py.losses.weights import Schedule, Weight, WeightController
from tinkex_py.runs.description import Optimizer
from tinkex_py.types import AdamParams

_SCHEDULES = ("Constant", "Linear", "Cosine", "WarmUp", "Piecewise")
_CONTROLLERS = ("AdaptiveKL", "TargetGradientRatio", "GradNormBalance")


@dataclass(frozen=True)
class ScheduledAdam:
    """AdamW whose learning rate depends on the step.

    Args:
        params: all other settings.
        learning_rate: gives it, from the number of steps made before.
    """

    params: AdamParams
    learning_rate: Schedule

    def __call__(self, step: int) -> AdamParams:
        """The settings of one step."""
        return self.params.model_copy(update={"learning_rate": self.learning_rate(step)})


def pipeline_of(loss: LossSection) -> Pipeline:
    """The loss of a configuration file.

    Raises:
        ConfigError: naming the part that cannot be used.
    """
    base, options = _term(loss.base, "loss.base")
    if options:
        raise ConfigError(f"loss.base: {loss.base.term} is a function, which takes no options as a base loss")
    specs = [_regularizer(section, f"loss.regularizers.{at}") for at, section in enumerate(loss.regularizers)]
    return Pipeline(base, specs, track_grad_norms=loss.track_grad_norms, combine=loss.combine)


def optimizer_of(section: OptimizerSection) -> Optimizer:
    """The optimizer of a configuration file.

    Raises:
        ConfigError: naming the setting that cannot be used.
    """
    settings = section.model_dump()
    rate = settings.pop("learning_rate")
    try:
        if not isinstance(rate, dict):
            return AdamParams(learning_rate=rate, **settings)
        schedule = _schedule(cast("dict[str, Any]", rate), "optimizer.learning_rate")
        return ScheduledAdam(AdamParams(**settings), schedule)
    except InvalidData as error:
        raise ConfigError(f"optimizer: {error}") from error


def _regularizer(section: RegularizerSection, where: str) -> RegularizerSpec:
    fn, options = _term(section, where)
    try:
        return RegularizerSpec(
            fn=fn,
            weight=_weight(section.weight, f"{where}.weight"),
            name=cast("str", section.name),  # None asks for the term's own
            timeout=section.timeout,
            options=options,
            on_error=section.on_error,
            max_grad_norm=section.max_grad_norm,
        )
    except InvalidSpec as error:
        raise ConfigError(f"{where}: {error}") from error


def _term(section: TermSection, where: str) -> tuple[Any, dict[str, Any]]:
    """The term, and the options that it has not taken in itself."""
    if ":" in section.term:
        found = named_object(section.term, f"{where}.term")
        if not isinstance(found, type):
            return found, section.options
    else:
        found = _by_name(section.term, where)
    return _made(cast("type[Any]", found), section.options, where), {}


def _by_name(name: str, where: str) -> type[Any]:
    names = [*dir(base_losses), *dir(ready_made)]
    if name not in names:
        raise ConfigError(f"{where}.term: there is no {name!r}; there are {', '.join(names)}, and module:name")
    return getattr(base_losses if name in dir(base_losses) else ready_made, name)


def _weight(given: "float | dict[str, Any]", where: str) -> Weight:
    if not isinstance(given, dict):
        return given
    if "controller" in given:
        return cast("WeightController", _chosen(given, "controller", controllers, _CONTROLLERS, where))
    return _schedule(given, where)


def _schedule(given: Mapping[str, Any], where: str) -> Schedule:
    settings = dict(given)
    if isinstance(settings.get("then"), dict):  # what follows a warm-up
        settings["then"] = _schedule(settings["then"], f"{where}.then")
    return cast("Schedule", _chosen(settings, "schedule", schedules, _SCHEDULES, where))


def _chosen(given: Mapping[str, Any], key: str, module: object, names: tuple[str, ...], where: str) -> object:
    name = given.get(key)
    if name not in names:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(names)}, got {name!r}")
    settings = {setting: value for setting, value in given.items() if setting != key}
    return _made(getattr(module, str(name)), settings, where)


def _made(made: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    try:
        return made(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {made.__name__}: {error}") from error
