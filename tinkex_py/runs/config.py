"""The YAML file that describes a run, and the loss and optimizer that it names."""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, ValidationError
from pydantic_core import PydanticCustomError

from tinkex_py.arguments import as_number, check_path
from tinkex_py.errors import ConfigError, did_you_mean
from tinkex_py.losses.options import Combine
from tinkex_py.runs.settings import Count, Times, TrainSettings
from tinkex_py.runs.yaml_file import read_yaml, with_overrides
from tinkex_py.types import AdamParams
from tinkex_py.values import Integer, UserPath, problems_of

if TYPE_CHECKING:
    from tinkex_py.losses import Pipeline, RegularizerSpec
    from tinkex_py.losses.weights import Schedule, Weight
    from tinkex_py.runs.plan import Optimizer

_SCHEDULES = ("Constant", "Linear", "Cosine", "WarmUp", "Piecewise")
_CONTROLLERS = (
    "AdaptiveKL",
    "AdaptiveEntropy",
    "TargetGradientRatio",
    "GradNormBalance",
    "DWA",
    "UncertaintyWeighting",
    "FAMO",
    "DualAscent",
    "LogDualAscent",
    "PIDMultiplier",
)


def _number_or_mapping(value: object) -> object:
    if isinstance(value, dict):
        return cast("object", value)
    number = as_number(value)
    if number is None:
        raise PydanticCustomError("weight", "must be a number, or settings such as {schedule: Linear, ...}")
    return number


NumberOrMapping = Annotated[float | dict[str, Any], BeforeValidator(_number_or_mapping)]


class Section(BaseModel):
    """A part of the file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(Section):
    """The data.

    Attributes:
        path: JSON Lines file of `{"prompt": ..., "answer": ...}`, relative to the configuration file; only the answers
            have weight.
        batch_size: datums per batch.
        reference_logprobs: put the base model's logprobs into the field `reference_logprobs` of every datum.
        held_out: another such file; the mean negative log-likelihood of its answers is the evaluation `held_out_nll`.
        samples: number of prompts of `held_out` that the model answers at each evaluation.
    """

    path: UserPath
    batch_size: Count = 8
    reference_logprobs: bool = False
    held_out: UserPath | None = None
    samples: Times = 0


class TermSection(Section):
    """A term and its settings.

    The term is the class of a ready-made one, such as `NLL`, the name of a base loss, such as `ppo`, or `module:name`
    of a custom one.
    """

    term: str
    options: dict[str, Any] = Field(default_factory=dict)


class RegularizerSection(TermSection):
    """A regularizer; further keys are fields of `RegularizerSpec`, such as `name` and `timeout`.

    The weight is a number, `{schedule: Linear, ...}` or `{controller: AdaptiveKL, ...}` with its settings. Instead of
    it, `at_most` or `at_least` is a bound.
    """

    model_config = ConfigDict(extra="allow")

    weight: NumberOrMapping | None = None


class LossSection(Section):
    """The arguments of `Pipeline`."""

    base: TermSection = TermSection(term="NLL", options={"reduction": "token-mean"})
    regularizers: tuple[RegularizerSection, ...] = ()
    track_grad_norms: bool = False
    combine: Combine = "sum"


class OptimizerSection(Section):
    """AdamW: the learning rate is a number or `{schedule: Linear, ...}`; further keys are fields of `AdamParams`."""

    model_config = ConfigDict(extra="allow")

    learning_rate: NumberOrMapping = 1e-4


class LoraSection(Section):
    """The adapters; the fields of `LoraConfig`."""

    rank: Count = 16
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class TrainConfig(Section):
    """A configuration file.

    Attributes:
        model: name of the base model; for the embedded service "tiny", "smollm2" or a local folder.
        base_url: a service; the key is TINKER_API_KEY. None selects the embedded service, which keeps its checkpoints
            in the run's folder.
        seed: of the adapters and of the order of the data.
    """

    model: str
    data: DataSection
    base_url: str | None = None
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainSettings = TrainSettings()
    seed: Integer | None = None

    def decisive(self) -> dict[str, JsonValue]:
        """Returns the other values that decide the numbers: model, adapters, seed, and the content of the data.

        Raises:
            ConfigError: the data cannot be read.
        """
        fields = self.model_dump(mode="json", include={"model", "lora", "data", "seed"})
        # The location of the files and the evaluation may change when the run is resumed.
        for name in ("path", "held_out", "samples"):
            del fields["data"][name]
        try:
            fields["data"]["sha256"] = hashlib.sha256(self.data.path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"{self.data.path} cannot be read: {error.strerror}") from error
        return fields


def read_config(path: Path | str, overrides: Sequence[str] = ()) -> TrainConfig:
    """Reads a configuration file; its paths become relative to the working folder.

    Args:
        path: the file.
        overrides: settings that replace those of the file, as `KEY=VALUE`: see `with_overrides`.

    Raises:
        ConfigError: naming the file and the invalid key.
    """
    path = check_path("config", path, error=ConfigError)
    content = with_overrides(read_yaml(path), overrides)
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as error:
        where = f"{path} with --set" if overrides else str(path)
        raise ConfigError(f"{where}: {problems_of(error, TrainConfig)}") from None
    data = config.data
    found = {"path": path.parent / data.path, "held_out": data.held_out and path.parent / data.held_out}
    return config.model_copy(update={"data": data.model_copy(update=found)})


def pipeline_of(loss: LossSection) -> "Pipeline":
    """Creates the loss of a configuration.

    Raises:
        ConfigError: naming the invalid part.
    """
    from tinkex_py.losses import Pipeline

    base, options = _term(loss.base, "loss.base")
    if options:
        raise ConfigError(f"loss.base: {loss.base.term} is a function, which takes no options here: remove options")
    specs = [_regularizer(section, f"loss.regularizers.{at}") for at, section in enumerate(loss.regularizers)]
    return Pipeline(base, specs, track_grad_norms=loss.track_grad_norms, combine=loss.combine)


def _regularizer(section: RegularizerSection, where: str) -> "RegularizerSpec":
    from tinkex_py.losses import RegularizerSpec

    fn, options = _term(section, where)
    weight = _weight(section.weight, f"{where}.weight")
    fields = {"fn": fn, "weight": weight, "options": options, **(section.model_extra or {})}
    return _made(RegularizerSpec, fields, where)


def _term(section: TermSection, where: str) -> tuple[Any, dict[str, Any]]:
    """Returns the term, and the options that its constructor did not take."""
    if ":" in section.term:
        found = named_object(section.term, f"{where}.term")
        if not isinstance(found, type):
            return found, section.options
        return _made(found, section.options, where), {}
    known = _ready_made()
    if section.term not in known:
        hint = did_you_mean(section.term, reversed(list(known)))  # of two spellings that of the class
        raise ConfigError(
            f"{where}.term: no term is named {section.term!r}{hint}; use one of {', '.join(known)}, or module:name"
        )
    cls, settings = known[section.term]
    return _made(cls, {**settings, **section.options}, where), {}


def _ready_made() -> dict[str, tuple[type[Any], Mapping[str, Any]]]:
    """Returns the ready-made terms by class and the base losses by name, with the settings of the name."""
    from tinkex_py import base_losses, regularizers
    from tinkex_py.base_losses.named import named_losses
    from tinkex_py.terms.ready_made import ReadyMadeTerm

    found: list[object] = [getattr(module, name) for module in (base_losses, regularizers) for name in dir(module)]
    terms = [cls for cls in found if isinstance(cls, type) and issubclass(cls, ReadyMadeTerm)]
    named = {name: (loss.cls, loss.settings) for name, loss in named_losses().items()}
    return {**{cls.__name__: (cls, dict[str, Any]()) for cls in terms}, **named}


def optimizer_of(section: OptimizerSection) -> "Optimizer":
    """Creates the optimizer of a configuration.

    Raises:
        ConfigError: naming the invalid setting.
    """
    rate, settings = section.learning_rate, section.model_extra or {}
    if not isinstance(rate, dict):
        return _made(AdamParams, {"learning_rate": rate, **settings}, "optimizer")
    return ScheduledAdam(_made(AdamParams, settings, "optimizer"), _schedule(rate, "optimizer.learning_rate"))


def _weight(given: float | dict[str, Any] | None, where: str) -> "Weight | None":
    from tinkex_py.losses import controllers

    if not isinstance(given, dict):
        return given
    if "controller" in given:
        return _chosen(given, "controller", controllers, _CONTROLLERS, where)
    return _schedule(given, where)


def _schedule(given: Mapping[str, Any], where: str) -> "Schedule":
    from tinkex_py.losses import schedules

    settings = dict(given)
    if isinstance(settings.get("then"), dict):  # the schedule after a warm-up
        settings["then"] = _schedule(settings["then"], f"{where}.then")
    return _chosen(settings, "schedule", schedules, _SCHEDULES, where)


def _chosen(given: Mapping[str, Any], key: str, module: object, names: tuple[str, ...], where: str) -> Any:
    name = given.get(key)
    if name not in names:
        raise ConfigError(f"{where}: {key} must be one of {', '.join(names)}, got {name!r}{did_you_mean(name, names)}")
    settings = {setting: value for setting, value in given.items() if setting != key}
    return _made(getattr(module, str(name)), settings, where)


def _made(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        hint = _hint(kind, settings)
        reason = str(error).removeprefix(f"{kind.__name__}: ")
        raise ConfigError(f"{where}: {kind.__name__}: {reason}{hint}") from error


def _hint(kind: type[Any], settings: Mapping[str, Any]) -> str:
    try:
        known = inspect.signature(kind).parameters
    except ValueError:  # some classes of C have none
        return ""
    unknown = [name for name in settings if name not in known]
    return did_you_mean(unknown[0], known) if unknown else ""


@dataclass(frozen=True)
class ScheduledAdam:
    """AdamW whose learning rate depends on the number of steps made before."""

    params: AdamParams
    learning_rate: "Schedule"

    def __call__(self, step: int) -> AdamParams:
        """Returns the settings of one step."""
        return self.params.model_copy(update={"learning_rate": self.learning_rate(step)})


def named_object(reference: str, where: str) -> object:
    """Imports `module:name`; modules of the working folder are found too.

    Raises:
        ConfigError: it cannot be imported; the message begins with `where`.
    """
    module, _, name = reference.partition(":")
    if not module or not name:
        raise ConfigError(f"{where} must be MODULE:NAME, got {reference!r}")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{where}: {reference!r} cannot be imported: {error}") from error
