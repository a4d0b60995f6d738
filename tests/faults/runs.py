"""Short training runs, and the comparison of their weights."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import load_file

from tests.client.data import datum, nll
from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    Datum,
    RegularizerSpec,
    RetryPolicy,
    TinkexConfig,
)

ADAM = AdamParams(learning_rate=1e-2)
DATA = [datum(4, 1), datum(2, 2), datum(3, 3)]
OTHERS = [datum(3, 4), datum(5, 5)]
NO_HANG = 30.0
"""Seconds after which a waiting test fails; far above what any test takes."""

PLACES = ("F", "B", "optim_step", "retrieve_future")
QUICK = RetryPolicy(deadline=20.0, initial_wait=0.001, max_wait=0.01)


def config(url: str, **settings: Any) -> TinkexConfig:
    """Returns settings for a service on loopback: short waits, and short timeouts for what stalls."""
    defaults = {"timeout": 0.3, "poll_timeout": 0.3, "retry": QUICK, "close_timeout": 2.0, "heartbeat_interval": 600.0}
    return TinkexConfig(base_url=url, api_key="tml-faults", **{**defaults, **settings})


async def smooth(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    await asyncio.sleep(0)
    return (logprobs**2).sum()


async def new_client(service: AsyncServiceClient, seed: int = 7) -> AsyncTrainingClient:
    return await service.create_lora_training_client("tiny", rank=2, seed=seed)


async def custom_step(training: AsyncTrainingClient, data: Sequence[Datum] = DATA) -> None:
    """A custom step with a regularizer and its optimizer step, started together."""
    specs = [RegularizerSpec(fn=smooth, weight=0.5, name="smooth")]
    async with asyncio.TaskGroup() as group:
        group.create_task(training.forward_backward_custom(data, nll, regularizers=specs))
        group.create_task(training.optim_step(ADAM))


async def built_in_step(training: AsyncTrainingClient, data: Sequence[Datum] = OTHERS) -> None:
    await training.forward_backward(data)
    await training.optim_step(ADAM)


async def short_run(training: AsyncTrainingClient) -> str:
    """Runs one custom step; returns the path of the checkpoint after it."""
    await custom_step(training)
    return (await training.save_state("after")).path


async def long_run(training: AsyncTrainingClient) -> str:
    """Runs steps of every kind, one with two accumulated passes; returns the path of the checkpoint after them."""
    await custom_step(training)
    await built_in_step(training)
    await training.forward(DATA)
    await training.forward_backward_custom(OTHERS, nll)
    await custom_step(training)
    return (await training.save_state("after")).path


async def saved_run(service: AsyncServiceClient) -> str:
    """Runs one step on a new client; returns the path of a checkpoint to resume from."""
    training = await new_client(service)
    await custom_step(training)
    return (await training.save_state("start")).path


async def resumed_run(service: AsyncServiceClient, checkpoint: str) -> str:
    """Runs one more step from a checkpoint; returns the path of the checkpoint after it."""
    training = await service.create_training_client_from_state(checkpoint, with_optimizer=True)
    await custom_step(training, OTHERS)
    return (await training.save_state("after")).path


def weights(state: Path, path: str) -> dict[str, np.ndarray]:
    """Reads all tensors of a checkpoint, with those of the optimizer, from the state folder of its service."""
    run, kind, name = path.removeprefix("tinker://").split("/")
    (folder,) = (state / "runs" / run.replace(":", "~") / kind).glob(f"{name}.*")
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == 2
    return {f"{file.stem}/{key}": values for file in files for key, values in load_file(file).items()}


def assert_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """Compares tensors bit for bit."""
    assert one.keys() == other.keys()
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], err_msg=name)
