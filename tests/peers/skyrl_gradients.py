"""Shows on a running SkyRL server that the gradient of a custom loss arrives as computed.

    python tests/peers/skyrl_gradients.py http://127.0.0.1:PORT [BASE_MODEL]

Or set TINKER_BASE_URL. The server needs the JAX backend, whose cross_entropy normalizes: a custom loss of any size would
have the same gradient norm there. Not collected by pytest: it needs a server. Exits with 1 if a claim does not hold.

SkyRL reports the norm of the mean gradient with every optimizer step. Every case has a model of its own with the same
seed, so that nothing but the case differs.
"""

import asyncio
import os
import sys
from collections.abc import Sequence

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

FACTORS = (0.5, 1.0, 2.0, 10.0, -1.0)
NORM = "skyrl.ai/grad_norm"
TOLERANCE = 1e-3
# So large that Adam's first step is linear in the gradient.
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


class Checks:
    """Prints claims, and counts those that do not hold."""

    def __init__(self) -> None:
        self.failed = 0

    def claim(self, text: str, holds: bool) -> None:
        self.failed += not holds
        print(f"{'ok  ' if holds else 'FAIL'} {text}")


async def model(service: AsyncServiceClient, base_model: str) -> AsyncTrainingClient:
    return await service.create_lora_training_client(base_model, rank=8, seed=1)


async def loss_of(training: AsyncTrainingClient, data: Sequence[Datum]) -> float:
    logprobs = torch.from_numpy((await training.forward(data)).packed["logprobs"].values.copy())
    return float(signed(data, logprobs))


async def one_step(
    service: AsyncServiceClient, base_model: str, data: Sequence[Datum], factor: float, surrogate: str
) -> tuple[float, float]:
    """The gradient norm of one call with a loss times a factor, and the change of the loss by a step along it."""
    training = await model(service, base_model)
    before = await loss_of(training, data)
    await training.forward_backward_custom(data, lambda d, p: factor * signed(d, p), surrogate=surrogate)
    step = await training.optim_step(LINEAR)
    return step.metrics[NORM], await loss_of(training, data) - before


async def accumulated(service: AsyncServiceClient, base_model: str, parts: Sequence[Sequence[Datum]]) -> float:
    """The gradient norm of several calls whose losses belong to one step."""
    training = await model(service, base_model)
    total = sum(len(part) for part in parts)
    start = 0
    for part in parts:
        offset, stop = start, start + sum(datum.model_input.length for datum in part)

        def loss(data: Sequence[Datum], logprobs: torch.Tensor, offset: int = offset, stop: int = stop) -> torch.Tensor:
            return (logprobs * torch.cos(torch.arange(offset, stop))).sum()

        await training.forward_backward_custom(part, loss, sequences_per_step=total)
        start = stop
    return (await training.optim_step(LINEAR)).metrics[NORM]


async def check(base_url: str, base_model: str) -> int:
    checks = Checks()
    config = TinkexConfig(base_url=base_url, api_key=os.environ.get("TINKER_API_KEY", "tml-dummy"))
    async with AsyncServiceClient(config) as service:
        data = make_data(4)
        for surrogate in ("cross_entropy", "auto"):
            results = {factor: await one_step(service, base_model, data, factor, surrogate) for factor in FACTORS}
            print(f"surrogate={surrogate!r}: loss times")
            for factor, (norm, change) in results.items():
                print(f"  {factor:5}: gradient norm {norm:.6g}, loss changes by {change:+.6g}")
        unit = results[1.0]
        for factor, (norm, change) in results.items():
            checks.claim(
                f"loss x {factor}: norm {norm:.6g} is {abs(factor)} x {unit[0]:.6g}",
                abs(norm / unit[0] - abs(factor)) <= TOLERANCE * abs(factor),
            )
            checks.claim(f"loss x {factor}: the loss goes {'down' if factor > 0 else 'up'}", change * factor < 0)

        data = make_data(16)
        at_once = await accumulated(service, base_model, [data])
        in_parts = await accumulated(service, base_model, [data[:4], data[4:]])
        checks.claim(
            f"16 datums: norm {at_once:.6g}; 4 + 12: {in_parts:.6g}", abs(in_parts / at_once - 1) <= TOLERANCE
        )

        training = await model(service, base_model)
        await training.forward_backward_custom(data[:4], signed)
        await training.forward_backward_custom(data[4:], signed)
        try:
            await training.optim_step()
        except SurrogateMismatch as error:
            checks.claim(f"4 + 12 without sequences_per_step: {error}", holds=True)
        else:
            checks.claim("4 + 12 without sequences_per_step is refused", holds=False)
        try:
            await training.forward_backward_custom(make_data(2, candidates=3), signed)
        except UnsupportedFeature as error:
            checks.claim(f"[T, K]: {error}", holds=True)
        else:
            checks.claim("[T, K] is refused", holds=False)
    return 1 if checks.failed else 0


def main() -> None:
    address = sys.argv[1] if len(sys.argv) > 1 else os.environ.get("TINKER_BASE_URL")
    if address is None:
        sys.exit(__doc__)
    sys.exit(asyncio.run(check(address, sys.argv[2] if len(sys.argv) > 2 else "tiny-qwen3")))


if __name__ == "__main__":
    main()
