"""Custom steps of each client, for `subject_process`. Unmeasured preparation happens before the work is yielded."""

import asyncio
import gc
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

from benchmarks import batches
from benchmarks.event_loop import watched_loop

Work = Callable[[], Awaitable[object]]
# A first step on this much data does the lazy imports, starts threads and opens connections.
_FIRST_DATUMS, _FIRST_LENGTH = 40, 512
# The answers of the replay service do not show what it does with weights.
SURROGATE: Literal["cross_entropy"] = "cross_entropy"


def first_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """Returns the shape of the first step's datums."""
    return (_FIRST_LENGTH, *shape[1:])


@asynccontextmanager
async def official_step(base_url: str, shape: Sequence[int], datums: int) -> AsyncGenerator[Work]:
    """The official SDK, with the cheapest negative log-likelihood that its interface allows."""
    import tinker
    import torch

    def loss(_data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {}

    service = tinker.ServiceClient(base_url=base_url)
    training = await service.create_lora_training_client(base_model="replayed", rank=8)
    data = batches.official(datums, tuple(shape))
    await training.forward_backward_custom(batches.official(_FIRST_DATUMS, first_shape(shape)), loss)

    async def step() -> None:
        await training.forward_backward_custom(data, loss)

    yield step
    service.close("success")


@asynccontextmanager
async def own_step(base_url: str, shape: Sequence[int], datums: int) -> AsyncGenerator[Work]:
    """This package, with the same loss."""
    async with _own_work(base_url, shape, datums) as work:
        yield work


@asynccontextmanager
async def own_composed_step(base_url: str, shape: Sequence[int], datums: int) -> AsyncGenerator[Work]:
    """This package, with eight regularizers and gradient norms."""
    from benchmarks.composed import regularizers

    async with _own_work(base_url, shape, datums, regularizers=regularizers(), track_grad_norms=True) as work:
        yield work


@asynccontextmanager
async def _own_work(base_url: str, shape: Sequence[int], datums: int, **options: Any) -> AsyncGenerator[Work]:
    from benchmarks.composed import base_loss
    from tinkex_py import AsyncServiceClient, TinkexConfig

    async with AsyncServiceClient(TinkexConfig(base_url=base_url)) as service:
        training = await service.create_lora_training_client("replayed", rank=8)
        data = batches.own(datums, tuple(shape))
        first = batches.own(_FIRST_DATUMS, first_shape(shape))
        await training.forward_backward_custom(first, base_loss, surrogate=SURROGATE, **options)

        async def step() -> None:
            await training.forward_backward_custom(data, base_loss, surrogate=SURROGATE, **options)

        yield step


@asynccontextmanager
async def own_together(
    base_url: str, clients: int, steps: int, datums: int, shape: Sequence[int]
) -> AsyncGenerator[Work]:
    """Many training clients at once; the work returns the longest gap of the event loop in seconds."""
    async with _own_clients(base_url, clients, datums, shape) as step:

        async def all_steps(client: int) -> None:
            for _ in range(steps):
                await step(client)

        async def work() -> float:
            with watched_loop() as gap:
                await asyncio.gather(*map(all_steps, range(clients)))
            return gap.worst

        yield work


@asynccontextmanager
async def own_together_frozen(
    base_url: str, clients: int, steps: int, datums: int, shape: Sequence[int]
) -> AsyncGenerator[Work]:
    """The same, in a process that excludes the imported libraries from garbage collection with `gc.freeze`."""
    async with own_together(base_url, clients, steps, datums, shape) as work:
        gc.collect()
        gc.freeze()
        yield work


@asynccontextmanager
async def own_one_by_one(
    base_url: str, clients: int, steps: int, datums: int, shape: Sequence[int]
) -> AsyncGenerator[Work]:
    """One client with as many steps as many clients together."""
    async with _own_clients(base_url, 1, datums, shape) as step:

        async def work() -> None:
            for _ in range(clients * steps):
                await step(0)

        yield work


@asynccontextmanager
async def _own_clients(
    base_url: str, clients: int, datums: int, shape: Sequence[int]
) -> AsyncGenerator[Callable[[int], Awaitable[None]]]:
    from benchmarks.composed import base_loss
    from tinkex_py import AdamParams, AsyncServiceClient, TinkexConfig

    async with AsyncServiceClient(TinkexConfig(base_url=base_url)) as service:
        trained = [await service.create_lora_training_client("replayed", rank=8) for _ in range(clients)]
        data = batches.own(datums, tuple(shape))

        async def step(client: int) -> None:
            training = trained[client]
            await asyncio.gather(
                training.forward_backward_custom(data, base_loss, surrogate=SURROGATE),
                training.optim_step(AdamParams()),
            )

        await step(0)
        yield step


@asynccontextmanager
async def official_together(
    base_url: str, clients: int, steps: int, datums: int, shape: Sequence[int]
) -> AsyncGenerator[Work]:
    """Many training clients of the official SDK at once."""
    import tinker
    import torch
    from tinker import types

    def loss(_data: Any, logprobs: list[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        return -torch.cat(logprobs).sum(), {}

    service = tinker.ServiceClient(base_url=base_url)
    trained = [await service.create_lora_training_client(base_model="replayed", rank=8) for _ in range(clients)]
    data = batches.official(datums, tuple(shape))

    async def all_steps(training: Any) -> None:
        for _ in range(steps):
            step, update = training.forward_backward_custom(data, loss), training.optim_step(types.AdamParams())
            await step
            await update

    async def work() -> None:
        await asyncio.gather(*map(all_steps, trained))

    yield work
    service.close("success")
