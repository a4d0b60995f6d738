"""What a configuration file may say."""

import hashlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tinkex_py.errors import ConfigError
from tinkex_py.runs.settings import TrainSettings, problems_of


class Section(BaseModel):
    """A part of the file: keys that do not exist are errors."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class DataSection(Section):
    """The data.

    Attributes:
        path: JSON Lines file of `{"prompt": ..., "answer": ...}`, relative to the configuration file; only the answers
            have weight.
        batch_size: datums per batch.
        reference_logprobs: put the base model's logprobs into the field `reference_logprobs` of every datum.
        held_out: another such file; the mean negative log-likelihood of its answers is the evaluation `held_out_nll`.
    """

    path: Path
    batch_size: Annotated[int, Field(ge=1)] = 8
    reference_logprobs: bool = False
    held_out: Path | None = None


class TermSection(Section):
    """A term.

    Attributes:
        term: a ready-made one by its class name, such as `NLL`, or `module:name` of one of your own.
        options: its settings.
    """

    term: str
    options: dict[str, Any] = Field(default_factory=dict)


class RegularizerSection(TermSection):
    """A regularizer.

    Attributes:
        weight: a number; or `{schedule: Linear, ...}` or `{controller: AdaptiveKL, ...}` with its settings.
        name: unique; default is the term's own.
        timeout: seconds.
        on_error: "skip" leaves it out of a step in which it fails.
        max_grad_norm: scales its gradient down to this norm.
    """

    weight: float | dict[str, Any]
    name: str | None = None
    timeout: float | None = None
    on_error: Literal["raise", "skip"] = "raise"
    max_grad_norm: float | None = None


class LossSection(Section):
    """The loss: `base + sum(weight * regularizer)`.

    Attributes:
        base: the base loss.
        regularizers: the others.
        track_grad_norms: compute gradient norms.
        combine: how the gradients become one, see `Pipeline`.
    """

    base: TermSection = TermSection(term="NLL", options={"reduction": "token-mean"})
    regularizers: tuple[RegularizerSection, ...] = ()
    track_grad_norms: bool = False
    combine: Literal["sum", "pcgrad"] = "sum"


class OptimizerSection(Section):
    """AdamW; the fields of `AdamParams`.

    Attributes:
        learning_rate: a number, or `{schedule: Linear, ...}`.
    """

    learning_rate: float | dict[str, Any] = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    grad_clip_norm: float = 0.0


class LoraSection(Section):
    """The adapters; the fields of `LoraConfig`. Their seed is that of the run."""

    rank: Annotated[int, Field(ge=1)] = 16
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class TrainConfig(Section):
    """A whole configuration file.

    Attributes:
        model: name of the base model; for the embedded service "tiny", "smollm2" or a local folder.
        data: what to train on.
        base_url: a service; the key is TINKER_API_KEY. None is the embedded service, which keeps its checkpoints in
            the run's folder.
        lora: the adapters.
        loss: the loss.
        optimizer: the optimizer.
        training: how the run goes, the fields of `TrainSettings`.
    """

    model: str
    data: DataSection
    base_url: str | None = None
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainSettings = TrainSettings()

    def decisive(self) -> dict[str, JsonValue]:
        """What decides the numbers and is not seen otherwise: model, adapters, and the content of the data.

        Raises:
            ConfigError: the data cannot be read.
        """
        told = self.model_dump(mode="json", include={"model", "lora", "data"})
        # Where the files lie may change, and what the run is evaluated on.
        del told["data"]["path"], told["data"]["held_out"]
        try:
            told["data"]["sha256"] = hashlib.sha256(self.data.path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"{self.data.path} cannot be read: {error.strerror}") from error
        return told


def read_config(path: Path) -> TrainConfig:
    """Reads a configuration file; paths in it become relative to where the process is.

    Raises:
        ConfigError: naming the file, and the key that cannot be used.
    """
    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is no YAML: {' '.join(str(error).split())}") from error
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_of(error)}") from None
    data = config.data
    found = {"path": path.parent / data.path, "held_out": data.held_out and path.parent / data.held_out}
    return config.model_copy(update={"data": data.model_copy(update=found)})
