"""Shows on a running SkyRL server that the gradient of a custom loss arrives as computed.

    python tests/peers/skyrl_gradients.py http://127.0.0.1:PORT [BASE_MODEL]

Or set TINKER_BASE_URL. The server needs the JAX backend, whose cross_entropy normalizes: a custom loss of any size
would have the same gradient norm. Not collected by pytest: it needs a server. Exits with 1 if a claim does not hold.

SkyRL reports the norm of the mean gradient with every optimizer step. A step with a learning rate of 0 clears the
gradient and leaves the weights, so one model serves for all norms; it has only room for a few models.
"""

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
import torch

from tinkex_py import (
    AdamParams,
    AsyncServiceClient,
    AsyncTrainingClient,
    Datum,
    ModelInput,
    SurrogateMismatch,
    TinkexConfig,
    UnsupportedFeature,
)

Surrogate = Literal["auto", "cross_entropy"]
Loss = Callable[[Sequence[Datum], torch.Tensor], torch.Tensor]
FACTORS = (0.5, 1.0, 2.0, 10.0, -1.0)
NORM = "skyrl.ai/grad_norm"
TOLERANCE = 1e-3
STAY = AdamParams(learning_rate=0.0)
# With so large an eps Adam's first step is linear in the gradient.
LINEAR = AdamParams(learning_rate=1.0, eps=1e4)


def make_data(count: int, candidates: int | None = None) -> list[Datum]:
    """Random tokens, of lengths that differ."""
    random = np.random.default_rng(7)
    data: list[Datum] = []
    for index in range(count):
        length = 5 + index % 4
        shape = (length,) if candidates is None else (length, candidates)
        tokens = ModelInput.from_ints(random.integers(0, 256, length))
        data.append(Datum(model_input=tokens, loss_fn_inputs={"target_tokens": random.integers(0, 256, shape)}))
    return data


def signed(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient has both signs, so that the sum of the weights says nothing."""
    return (logprobs * torch.cos(torch.arange(len(logprobs)))).sum()


def nll(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """A loss whose gradient SkyRL's cross_entropy scales to the same norm whatever its size."""
    return -logprobs.sum()


def mean_of_means(data: Sequence[Datum], logprobs: torch.Tensor) -> torch.Tensor:
    """What SkyRL makes of its own cross_entropy with weights of 1."""
    parts = torch.split(logprobs, [datum.model_input.length for datum in data])
    return -torch.stack([part.mean() for part in parts]).mean()


class Checks:
    """Prints claims, and counts those that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def claim(self, text: str, holds: bool) -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {text}")


async def model(service: AsyncServiceClient, base_model: str) -> AsyncTrainingClient:
    return await service.create_lora_training_client(base_model, rank=8, seed=1)


async def loss_of(training: AsyncTrainingClient, data: Sequence[Datum], loss: Loss) -> float:
    logprobs = torch.from_numpy((await training.forward(data)).packed["logprobs"].values.copy())
    return float(loss(data, logprobs))


async def norm_of(training: AsyncTrainingClient, data: Sequence[Datum], loss: Loss, surrogate: Surrogate) -> float:
    """The norm of the gradient that arrives."""
    await training.forward_backward_custom(data, loss, surrogate=surrogate)
    return (await training.optim_step(STAY)).metrics[NORM]


async def change_by_a_step(training: AsyncTrainingClient, data: Sequence[Datum], loss: Loss, factor: float) -> float:
    """How the loss changes by a step of a fresh model down the loss times a factor."""
    before = await loss_of(training, data, loss)
    await training.forward_backward_custom(data, lambda d, p: factor * loss(d, p))
    await training.optim_step(LINEAR)
    return await loss_of(training, data, loss) - before


async def show_norms(
    training: AsyncTrainingClient, data: Sequence[Datum], loss: Loss, surrogate: Surrogate
) -> dict[float, float]:
    """The norm for the loss times every factor."""
    norms = {
        factor: await norm_of(training, data, lambda d, p, factor=factor: factor * loss(d, p), surrogate)
        for factor in FACTORS
    }
    print(
        f"{loss.__name__}, surrogate={surrogate!r}: norm by factor",
        {key: float(f"{n:.6g}") for key, n in norms.items()},
    )
    return norms


async def norm_in_parts(training: AsyncTrainingClient, parts: Sequence[Sequence[Datum]]) -> float:
    """The norm of the gradients of several calls whose losses belong to one step."""
    total = sum(len(part) for part in parts)
    start = 0
    for part in parts:
        stop = start + sum(datum.model_input.length for datum in part)
        pattern = torch.cos(torch.arange(start, stop))
        await training.forward_backward_custom(
            part, lambda data, logprobs, pattern=pattern: (logprobs * pattern).sum(), sequences_per_step=total
        )
        start = stop
    return (await training.optim_step(STAY)).metrics[NORM]


async def check(base_url: str, base_model: str) -> int:
    checks = Checks()
    config = TinkexConfig(base_url=base_url, api_key=os.environ.get("TINKER_API_KEY", "tml-dummy"))
    async with AsyncServiceClient(config) as service:
        training = await model(service, base_model)
        try:
            await training.forward_backward_custom(make_data(2, candidates=3), nll)
        except UnsupportedFeature as error:
            checks.claim(f"[T, K]: {error}", holds=True)
        else:
            checks.claim("[T, K] is refused", holds=False)

        data = make_data(4)
        for loss in (nll, signed):
            await show_norms(training, data, loss, "cross_entropy")
            norms = await show_norms(training, data, loss, "auto")
            for factor, norm in norms.items():
                checks.claim(
                    f"loss x {factor}: norm {norm:.6g} is {abs(factor)} x {norms[1.0]:.6g}",
                    abs(norm / norms[1.0] - abs(factor)) <= TOLERANCE * abs(factor),
                )
            for factor in (1.0, -1.0):
                change = await change_by_a_step(await model(service, base_model), data, loss, factor)
                checks.claim(f"a step down the loss x {factor}: it changes by {change:+.6g}", change * factor < 0)

        await training.forward_backward(data)
        own = (await training.optim_step(STAY)).metrics[NORM]
        custom = await norm_of(training, data, mean_of_means, "auto")
        checks.claim(
            f"SkyRL's cross_entropy with weights of 1: norm {own:.6g}; the same as a custom loss: {custom:.6g}",
            abs(custom / own - 1) <= TOLERANCE,
        )

        data = make_data(16)
        at_once = await norm_in_parts(training, [data])
        in_parts = await norm_in_parts(training, [data[:4], data[4:]])
        checks.claim(f"16 datums: norm {at_once:.6g}; 4 + 12: {in_parts:.6g}", abs(in_parts / at_once - 1) <= TOLERANCE)

        await training.forward_backward_custom(data[:4], signed)
        await training.forward_backward_custom(data[4:], signed)
        try:
            await training.optim_step()
        except SurrogateMismatch as error:
            checks.claim(f"4 + 12 without sequences_per_step: {error}", holds=True)
        else:
            checks.claim("4 + 12 without sequences_per_step is refused", holds=False)
    return 1 if checks.failed else 0


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TINKER_BASE_URL")
    if address is None:
        sys.exit(__doc__)
    sys.exit(asyncio.run(check(address, sys.argv[2] if len(sys.argv) > 2 else "tiny-qwen3")))


if __name__ == "__main__":
    main()
