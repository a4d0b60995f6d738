"""One custom step of each client, for `subject_process`. What must stay unmeasured is done before the work is given."""

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any

from benchmarks import batches

Work = Callable[[], Awaitable[object]]
# A first step on so much data loads what is loaded lazily and opens the connections.
_FIRST_DATUMS = 2


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
    await training.forward_backward_custom(data[:_FIRST_DATUMS], loss)

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
        await training.forward_backward_custom(data[:_FIRST_DATUMS], base_loss, **options)

        async def step() -> None:
            await training.forward_backward_custom(data, base_loss, **options)

        yield step
