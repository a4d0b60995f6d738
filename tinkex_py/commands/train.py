"""`tinkex-py train`."""

import asyncio
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo, echo_json
from tinkex_py.commands.common.running import EMBEDDED_SERVICE, FAILED, STOPPED, one_line_errors, run
from tinkex_py.errors import ConfigError, require_modules

if TYPE_CHECKING:
    from tinkex_py.client import AsyncServiceClient, AsyncTrainingClient
    from tinkex_py.runs import ProgressView, TrainedRun
    from tinkex_py.runs.config import TrainConfig
    from tinkex_py.runs.pairs import Pair
    from tinkex_py.runs.plan import Evaluate
    from tinkex_py.types import Datum


def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run")],
    model: Annotated[str | None, typer.Option(help="replaces the model of the file")] = None,
    runs_dir: Annotated[Path, typer.Option(help="parent of the run's folder")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="name of the run; default the name of the file")] = None,
    overrides: Annotated[
        list[str],
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="replaces a setting of the file, such as optimizer.learning_rate=1e-3; can be repeated",
        ),
    ] = [],  # noqa: B006  (typer copies it)
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="resume although settings, terms or data differ from before")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Train a run that a YAML file describes; an interrupted run resumes from its last checkpoint.

    Exit codes: 0 the run is finished (early stopping included), 1 it failed, 2 the input is invalid, 3 a signal
    stopped it and it can be resumed. A second signal cancels it at once, without a new checkpoint, with code 1.
    """
    with one_line_errors("train", needs=("yaml",)):
        from tinkex_py.runs.config import read_config

        described = read_config(config, overrides)
        require_modules("local", *(EMBEDDED_SERVICE if described.base_url is None else ("transformers",)))
        if model is not None:
            described = described.model_copy(update={"model": model})
        folder = runs_dir / _checked_name(name or config.stem)
        stop = asyncio.Event()

        def ask_to_stop() -> None:
            echo("stopping: finishing the current steps and saving a checkpoint; repeat to cancel now", err=True)
            stop.set()

        try:
            trained = run(
                train_from_config(described, folder, stop=stop, progress=True, allow_changes=allow_changes),
                on_first_signal=ask_to_stop,
            )
        except KeyboardInterrupt:
            echo("tinkex-py train: cancelled; the same command resumes from the last checkpoint", err=True)
            raise typer.Exit(FAILED) from None
        summary = _summary(trained)
        echo_json(summary) if as_json else echo(_in_words(summary))
        if stop.is_set() and trained.info.status == "stopped":
            raise typer.Exit(STOPPED)


async def train_from_config(
    config: "TrainConfig",
    folder: Path,
    *,
    stop: asyncio.Event,
    progress: "bool | ProgressView",
    allow_changes: bool = False,
) -> "TrainedRun":
    """Trains, or resumes the run that the folder contains; the other arguments and errors are those of `runs.train`."""
    from tinkex_py import runs
    from tinkex_py.data import batches
    from tinkex_py.runs.config import optimizer_of, pipeline_of
    from tinkex_py.runs.pairs import read_pairs

    pipeline, optimizer = pipeline_of(config.loss), optimizer_of(config.optimizer)
    pairs, decisive = read_pairs(config.data.path), config.decisive()
    held_out = [] if config.data.held_out is None else read_pairs(config.data.held_out)
    with runs.RunFolder(folder):
        pass  # raises before a model is loaded if another process trains the run
    async with _service(config, folder) as service:
        data, evaluate = await _prepared(service, config, pairs, held_out)
        return await runs.train(
            service,
            partial(_new_model, service, config),
            batches(data, config.data.batch_size, config.seed or 0),
            pipeline,
            folder=folder,
            optimizer=optimizer,
            settings=config.training,
            config=decisive,
            evaluate=evaluate,
            stop=stop,
            progress=progress,
            allow_changes=allow_changes,
        )


def _service(config: "TrainConfig", folder: Path) -> "AsyncServiceClient":
    from tinkex_py.client import AsyncServiceClient
    from tinkex_py.config import TinkexConfig

    if config.base_url is not None:
        return AsyncServiceClient(TinkexConfig(base_url=config.base_url))
    # With the checkpoints in the run's folder, the folder can be moved and resumed elsewhere.
    return AsyncServiceClient.local(model=config.model, state_dir=folder / "service")


async def _new_model(service: "AsyncServiceClient", config: "TrainConfig") -> "AsyncTrainingClient":
    from tinkex_py.types import LoraConfig

    lora = LoraConfig(**config.lora.model_dump(), seed=config.seed)
    return await service.create_lora_training_client(config.model, lora_config=lora)


async def _prepared(
    service: "AsyncServiceClient", config: "TrainConfig", pairs: "Sequence[Pair]", held_out: "Sequence[Pair]"
) -> "tuple[list[Datum], Evaluate | None]":
    """The training data, and the evaluation hook if there is held-out data."""
    from tinkex_py.data import with_reference
    from tinkex_py.runs.pairs import make_datum, sample_answers

    # A new adapter does not change the output, so this is the base model, also when the run is resumed.
    async with await _new_model(service, config) as base:
        tokenizer = await base.get_tokenizer()
        data = [make_datum(tokenizer, pair) for pair in pairs]
        if config.data.reference_logprobs:
            data = await with_reference(base, data)
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
    """Returns facts about a run, the steps of earlier processes included."""
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


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"--name must be the name of a folder, without a path, got {name!r}")
    return name


def _in_words(summary: Mapping[str, Any]) -> str:
    status = summary["status"] if summary["reason"] is None else f"{summary['status']} ({summary['reason']})"
    losses = "" if not summary["steps"] else f", loss {summary['first_loss']:.4f} -> {summary['last_loss']:.4f}"
    return f"{status} after {summary['steps']} steps{losses}, files in {summary['folder']}"
