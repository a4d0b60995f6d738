"""What `tinkex-py train` does: make the parts, train, sum up."""

import asyncio
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import numpy as np
from pydantic import BaseModel

from tinkex_py.client import AsyncServiceClient, AsyncTrainingClient
from tinkex_py.commands.work.train_config import TrainConfig
from tinkex_py.commands.work.train_parts import optimizer_of, pipeline_of
from tinkex_py.config import TinkexConfig
from tinkex_py.runs import RunFolder, TrainedRun, read_steps, train
from tinkex_py.runs.pairs import Pair, make_datum, read_pairs, shuffled_batches, with_reference
from tinkex_py.runs.progress import ProgressView
from tinkex_py.runs.records import RunStatus
from tinkex_py.types import Datum, LoraConfig


class Trained(BaseModel):
    """What a run came to.

    Attributes:
        name: of the run.
        status: "finished" or "stopped".
        reason: why it stopped.
        steps: optimizer steps made, those of earlier processes included.
        first_loss: loss_total of the first step; None without a step.
        last_loss: loss_total of the last step.
        folder: the run's files.
        checkpoint: the model as it is now, on the service.
    """

    name: str
    status: RunStatus
    reason: str | None
    steps: int
    first_loss: float | None
    last_loss: float | None
    folder: Path
    checkpoint: str


async def train_from_config(
    config: TrainConfig, folder: Path, *, stop: asyncio.Event, progress: bool | ProgressView
) -> Trained:
    """Trains, or goes on with the run that the folder holds.

    Args:
        config: what to train.
        folder: the run's files.
        stop: ends the run with a checkpoint once it is set.
        progress: see `train`.

    Raises:
        ConfigError: something in the configuration, the data or the folder cannot be used; no step was made.
        TinkexError: a step failed.
    """
    pipeline, optimizer = pipeline_of(config.loss), optimizer_of(config.optimizer)
    pairs, decisive = read_pairs(config.data.path), config.decisive()
    held_out_pairs = [] if config.data.held_out is None else read_pairs(config.data.held_out)
    with RunFolder(folder):
        pass  # somebody else's run is told before a model is loaded
    async with _service(config, folder) as service:
        data, held_out = await _datums(service, config, pairs, held_out_pairs)
        run = await train(
            service,
            partial(_fresh_model, service, config),
            partial(shuffled_batches, data, config.data.batch_size, config.training.seed or 0),
            pipeline,
            folder=folder,
            optimizer=optimizer,
            settings=config.training,
            config=decisive,
            evaluate=partial(_evaluated, held_out) if held_out else None,
            stop=stop,
            progress=progress,
        )
    return _summed_up(run)


def _service(config: TrainConfig, folder: Path) -> AsyncServiceClient:
    if config.base_url is not None:
        return AsyncServiceClient(TinkexConfig(base_url=config.base_url))
    # With its checkpoints in the run's own folder the run goes on in another process, and goes with its folder.
    return AsyncServiceClient.local(model=config.model, state_dir=folder / "service")


async def _fresh_model(service: AsyncServiceClient, config: TrainConfig) -> AsyncTrainingClient:
    lora = LoraConfig(**config.lora.model_dump(), seed=config.training.seed)
    return await service.create_lora_training_client(config.model, lora_config=lora)


async def _datums(
    service: AsyncServiceClient, config: TrainConfig, pairs: Sequence[Pair], held_out: Sequence[Pair]
) -> tuple[list[Datum], list[Datum]]:
    """The datums of both files."""
    # A fresh adapter changes nothing yet, so this is the base model, whatever the run has learnt.
    async with await _fresh_model(service, config) as base:
        tokenizer = await base.get_tokenizer()
        data = [make_datum(tokenizer, pair) for pair in pairs]
        if config.data.reference_logprobs:
            data = with_reference(data, await base.forward(data))
        return data, [make_datum(tokenizer, pair) for pair in held_out]


async def _evaluated(held_out: Sequence[Datum], training: AsyncTrainingClient, step: int) -> dict[str, float]:  # noqa: ARG001
    """The mean negative log-likelihood of the held-out answers, in nats per token."""
    output = await training.forward(held_out)
    logprobs = np.concatenate([outputs["logprobs"].to_numpy() for outputs in output.loss_fn_outputs])
    weights = np.concatenate([datum.loss_fn_inputs["weights"].to_numpy() for datum in held_out])
    return {"held_out_nll": float(-(weights * logprobs).sum() / weights.sum())}


def _summed_up(run: TrainedRun) -> Trained:
    steps = read_steps(run.folder)
    totals = [[output.loss_total for output in step.losses] for step in steps]
    means = [sum(values) / len(values) for values in totals]
    return Trained(
        name=run.info.name,
        status=run.info.status,
        reason=run.info.reason,
        steps=len(steps),
        first_loss=means[0] if means else None,
        last_loss=means[-1] if means else None,
        folder=run.folder,
        checkpoint=run.checkpoint,
    )
