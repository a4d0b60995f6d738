"""`tinkex-py train`: reads a configuration file, builds what it names, and trains."""

import asyncio
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from pydantic import BaseModel, ConfigDict, Field, JsonValue, ValidationError

from tinkex_py.commands.common.options import AsJson, named_object
from tinkex_py.commands.common.running import FAILED, STOPPED, one_line_errors, run
from tinkex_py.errors import ConfigError
from tinkex_py.runs.settings import TrainSettings, problems_of

if TYPE_CHECKING:
    from tinkex_py.client import AsyncServiceClient, AsyncTrainingClient
    from tinkex_py.losses import Pipeline, RegularizerSpec
    from tinkex_py.losses.weights import Schedule, Weight
    from tinkex_py.runs import ProgressView, TrainedRun
    from tinkex_py.runs.pairs import Pair
    from tinkex_py.runs.plan import Evaluate, Optimizer
    from tinkex_py.types import AdamParams, Datum

_SCHEDULES = ("Constant", "Linear", "Cosine", "WarmUp", "Piecewise")
_CONTROLLERS = ("AdaptiveKL", "TargetGradientRatio", "GradNormBalance")


def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run")],
    model: Annotated[str | None, typer.Option(help="replaces the model of the file")] = None,
    runs_dir: Annotated[Path, typer.Option(help="parent of the run's folder")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="of the run; default the file's name")] = None,
    as_json: AsJson = False,
) -> None:
    """Train as a file describes it; an interrupted run resumes from its last checkpoint.

    Exit codes: 0 the run is finished (early stopping counts), 1 it failed, 2 the input is not valid, 3 a signal
    stopped it and it can be resumed. A second signal cancels it at once, without a new checkpoint, with code 1.
    """
    with one_line_errors("train"):
        described = read_config(config)
        if model is not None:
            described = described.model_copy(update={"model": model})
        folder = runs_dir / _checked_name(name or config.stem)
        stop = asyncio.Event()

        def ask_to_stop() -> None:
            typer.echo("stopping after the steps in flight, with a checkpoint; repeat to cancel at once", err=True)
            stop.set()

        try:
            trained = run(train_from_config(described, folder, stop=stop, progress=True), on_first_signal=ask_to_stop)
        except KeyboardInterrupt:
            typer.echo("tinkex-py train: cancelled; the run can be resumed from its last checkpoint", err=True)
            raise typer.Exit(FAILED) from None
        summary = _summary(trained)
        typer.echo(json.dumps(summary) if as_json else _in_words(summary))
        if stop.is_set() and trained.info.status == "stopped":
            raise typer.Exit(STOPPED)


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

    path: Path
    batch_size: Annotated[int, Field(ge=1)] = 8
    reference_logprobs: bool = False
    held_out: Path | None = None
    samples: Annotated[int, Field(ge=0)] = 0


class TermSection(Section):
    """A term.

    Attributes:
        term: class name of a ready-made term, such as `NLL`, or `module:name` of a custom one.
        options: its settings.
    """

    term: str
    options: dict[str, Any] = Field(default_factory=dict)


class RegularizerSection(TermSection):
    """A regularizer; further keys are fields of `RegularizerSpec`, such as `name` and `timeout`.

    Attributes:
        weight: a number; or `{schedule: Linear, ...}` or `{controller: AdaptiveKL, ...}` with its settings.
    """

    model_config = ConfigDict(extra="allow")

    weight: float | dict[str, Any]


class LossSection(Section):
    """The loss: `base + sum(weight * regularizer)`.

    Attributes:
        base: the base loss.
        regularizers: the other terms.
        track_grad_norms: compute gradient norms.
        combine: how the gradients are combined, see `Pipeline`.
    """

    base: TermSection = TermSection(term="NLL", options={"reduction": "token-mean"})
    regularizers: tuple[RegularizerSection, ...] = ()
    track_grad_norms: bool = False
    combine: Literal["sum", "pcgrad"] = "sum"


class OptimizerSection(Section):
    """AdamW; further keys are fields of `AdamParams`.

    Attributes:
        learning_rate: a number, or `{schedule: Linear, ...}`.
    """

    model_config = ConfigDict(extra="allow")

    learning_rate: float | dict[str, Any] = 1e-4


class LoraSection(Section):
    """The adapters; the fields of `LoraConfig`."""

    rank: Annotated[int, Field(ge=1)] = 16
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class TrainConfig(Section):
    """A configuration file.

    Attributes:
        model: name of the base model; for the embedded service "tiny", "smollm2" or a local folder.
        data: the training data.
        base_url: a service; the key is TINKER_API_KEY. None selects the embedded service, which keeps its checkpoints
            in the run's folder.
        lora: the adapters.
        loss: the loss.
        optimizer: the optimizer.
        training: settings of the run, the fields of `TrainSettings`.
        seed: of the adapters and of the order of the data.
    """

    model: str
    data: DataSection
    base_url: str | None = None
    lora: LoraSection = LoraSection()
    loss: LossSection = LossSection()
    optimizer: OptimizerSection = OptimizerSection()
    training: TrainSettings = TrainSettings()
    seed: int | None = None

    def decisive(self) -> dict[str, JsonValue]:
        """What else decides the numbers: model, adapters, seed, and the content of the data.

        Raises:
            ConfigError: the data cannot be read.
        """
        fields = self.model_dump(mode="json", include={"model", "lora", "data", "seed"})
        # The location of the files and the evaluation may change.
        for name in ("path", "held_out", "samples"):
            del fields["data"][name]
        try:
            fields["data"]["sha256"] = hashlib.sha256(self.data.path.read_bytes()).hexdigest()
        except OSError as error:
            raise ConfigError(f"{self.data.path} cannot be read: {error.strerror}") from error
        return fields


@dataclass(frozen=True)
class ScheduledAdam:
    """AdamW whose learning rate depends on the step.

    Args:
        params: all other settings.
        learning_rate: called with the number of steps made before.
    """

    params: "AdamParams"
    learning_rate: "Schedule"

    def __call__(self, step: int) -> "AdamParams":
        """The settings of one step."""
        return self.params.model_copy(update={"learning_rate": self.learning_rate(step)})


def read_config(path: Path) -> TrainConfig:
    """Reads a configuration file; its paths become relative to the working folder.

    Raises:
        ConfigError: naming the file and the invalid key.
    """
    import yaml

    try:
        content: object = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    try:
        config = TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(f"{path}: {problems_of(error)}") from None
    data = config.data
    found = {"path": path.parent / data.path, "held_out": data.held_out and path.parent / data.held_out}
    return config.model_copy(update={"data": data.model_copy(update=found)})


async def train_from_config(
    config: TrainConfig, folder: Path, *, stop: asyncio.Event, progress: "bool | ProgressView"
) -> "TrainedRun":
    """Trains, or resumes the run that the folder holds.

    Args:
        config: what to train.
        folder: the run's files.
        stop: ends the run with a checkpoint once it is set.
        progress: see `train`.

    Raises:
        ConfigError: the configuration, the data or the folder is not valid; no step was made.
        TinkexError: a step failed.
    """
    from tinkex_py import runs
    from tinkex_py.runs.pairs import read_pairs, shuffled_batches

    pipeline, optimizer = _pipeline(config.loss), _optimizer(config.optimizer)
    pairs, decisive = read_pairs(config.data.path), config.decisive()
    held_out = [] if config.data.held_out is None else read_pairs(config.data.held_out)
    with runs.RunFolder(folder):
        pass  # fails before a model is loaded if another process trains the run
    async with _service(config, folder) as service:
        data, evaluate = await _prepared(service, config, pairs, held_out)
        return await runs.train(
            service,
            partial(_new_model, service, config),
            partial(shuffled_batches, data, config.data.batch_size, config.seed or 0),
            pipeline,
            folder=folder,
            optimizer=optimizer,
            settings=config.training,
            config=decisive,
            evaluate=evaluate,
            stop=stop,
            progress=progress,
        )


def _service(config: TrainConfig, folder: Path) -> "AsyncServiceClient":
    from tinkex_py.client import AsyncServiceClient
    from tinkex_py.config import TinkexConfig

    if config.base_url is not None:
        return AsyncServiceClient(TinkexConfig(base_url=config.base_url))
    # With the checkpoints in the run's folder, the folder can be moved and resumed elsewhere.
    return AsyncServiceClient.local(model=config.model, state_dir=folder / "service")


async def _new_model(service: "AsyncServiceClient", config: TrainConfig) -> "AsyncTrainingClient":
    from tinkex_py.types import LoraConfig

    lora = LoraConfig(**config.lora.model_dump(), seed=config.seed)
    return await service.create_lora_training_client(config.model, lora_config=lora)


async def _prepared(
    service: "AsyncServiceClient", config: TrainConfig, pairs: "Sequence[Pair]", held_out: "Sequence[Pair]"
) -> "tuple[list[Datum], Evaluate | None]":
    """The training data, and the evaluation hook if there is held-out data."""
    from tinkex_py.runs.pairs import make_datum, sample_answers, with_reference

    # A new adapter changes nothing, so this is the base model, also where the run is resumed.
    async with await _new_model(service, config) as base:
        tokenizer = await base.get_tokenizer()
        data = [make_datum(tokenizer, pair) for pair in pairs]
        if config.data.reference_logprobs:
            data = with_reference(data, await base.forward(data))
    held_out_data = [make_datum(tokenizer, pair) for pair in held_out]
    prompts = [pair.prompt for pair in held_out[: config.data.samples]]

    async def evaluate(training: "AsyncTrainingClient", _: int) -> dict[str, float | str]:
        samples = await sample_answers(training, tokenizer, prompts) if prompts else {}
        return {"held_out_nll": await _mean_nll(training, held_out_data), **samples}

    return data, evaluate if held_out else None


async def _mean_nll(training: "AsyncTrainingClient", data: "Sequence[Datum]") -> float:
    """Mean negative log-likelihood of the answers, in nats per token."""
    import numpy as np

    output = await training.forward(data)
    logprobs = np.concatenate([outputs["logprobs"].to_numpy() for outputs in output.loss_fn_outputs])
    weights = np.concatenate([datum.loss_fn_inputs["weights"].to_numpy() for datum in data])
    return float(-(weights * logprobs).sum() / weights.sum())


def _summary(run: "TrainedRun") -> dict[str, Any]:
    """Facts about a run, the steps of earlier processes included."""
    from tinkex_py.runs import read_steps, scalars

    steps = read_steps(run.folder)
    first, last = (scalars(steps[at])["loss/total"] if steps else None for at in (0, -1))
    return {
        **run.info.model_dump(include={"name", "status", "reason"}),
        "steps": len(steps),
        "first_loss": first,
        "last_loss": last,
        "folder": str(run.folder),
        "checkpoint": run.checkpoint,
    }


def _pipeline(loss: LossSection) -> "Pipeline":
    from tinkex_py.losses import Pipeline

    base, options = _term(loss.base, "loss.base")
    if options:
        raise ConfigError(f"loss.base: {loss.base.term} is a function; a base loss that is a function takes no options")
    specs = [_regularizer(section, f"loss.regularizers.{at}") for at, section in enumerate(loss.regularizers)]
    return Pipeline(base, specs, track_grad_norms=loss.track_grad_norms, combine=loss.combine)


def _regularizer(section: RegularizerSection, where: str) -> "RegularizerSpec":
    from tinkex_py.losses import RegularizerSpec

    fn, options = _term(section, where)
    weight = _weight(section.weight, f"{where}.weight")
    fields = {"fn": fn, "weight": weight, "options": options, **(section.model_extra or {})}
    return _made(RegularizerSpec, fields, where)


def _term(section: TermSection, where: str) -> tuple[Any, dict[str, Any]]:
    """The term, and those options that its constructor did not take."""
    from tinkex_py import base_losses, regularizers

    if ":" in section.term:
        found = named_object(section.term, f"{where}.term")
        if not isinstance(found, type):
            return found, section.options
        return _made(found, section.options, where), {}
    for module in (base_losses, regularizers):
        if section.term in dir(module):
            return _made(getattr(module, section.term), section.options, where), {}
    names = ", ".join([*dir(base_losses), *dir(regularizers)])
    raise ConfigError(f"{where}.term: there is no {section.term!r}; there are {names}, and module:name")


def _optimizer(section: OptimizerSection) -> "Optimizer":
    from tinkex_py.types import AdamParams

    rate, settings = section.learning_rate, section.model_extra or {}
    if not isinstance(rate, dict):
        return _made(AdamParams, {"learning_rate": rate, **settings}, "optimizer")
    return ScheduledAdam(_made(AdamParams, settings, "optimizer"), _schedule(rate, "optimizer.learning_rate"))


def _weight(given: float | dict[str, Any], where: str) -> "Weight":
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
        raise ConfigError(f"{where}: {key} must be one of {', '.join(names)}, got {name!r}")
    settings = {setting: value for setting, value in given.items() if setting != key}
    return _made(getattr(module, str(name)), settings, where)


def _made(kind: type[Any], settings: Mapping[str, Any], where: str) -> Any:
    try:
        return kind(**settings)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {kind.__name__}: {error}") from error


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"--name must be the name of a folder, got {name!r}")
    return name


def _in_words(summary: Mapping[str, Any]) -> str:
    status = summary["status"] if summary["reason"] is None else f"{summary['status']} ({summary['reason']})"
    losses = "" if not summary["steps"] else f", loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
    return f"{status} after {summary['steps']} steps{losses}, files in {summary['folder']}"
