"""The YAML file that describes a run, and the loss and optimizer that it names."""

import hashlib
import importlib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ConfigDict, JsonValue, ValidationError

from tinkex_py import portable
from tinkex_py.arguments import check_path
from tinkex_py.errors import ConfigError, InvalidSpec
from tinkex_py.portable import LossSection, NumberOrMapping, Section, made, schedule_of
from tinkex_py.runs.settings import Count, Times, TrainSettings
from tinkex_py.runs.yaml_file import read_yaml, with_overrides
from tinkex_py.types import AdamParams
from tinkex_py.values import Integer, UserPath, problems_of

if TYPE_CHECKING:
    from tinkex_py.losses import Pipeline
    from tinkex_py.losses.weights import Schedule
    from tinkex_py.runs.plan import Optimizer


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
    try:
        return portable.pipeline_of(loss, lambda reference, where: named_object(reference, f"loss.{where}"))
    except InvalidSpec as error:
        raise ConfigError(f"loss.{error}") from error


def optimizer_of(section: OptimizerSection) -> "Optimizer":
    """Creates the optimizer of a configuration.

    Raises:
        ConfigError: naming the invalid setting.
    """
    rate, settings = section.learning_rate, section.model_extra or {}
    try:
        if not isinstance(rate, dict):
            return made(AdamParams, {"learning_rate": rate, **settings}, "optimizer")
        return ScheduledAdam(made(AdamParams, settings, "optimizer"), schedule_of(rate, "optimizer.learning_rate"))
    except InvalidSpec as error:
        raise ConfigError(str(error)) from error


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
