"""Many concurrent samples, for `subject_process`."""

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import numpy as np

Work = Callable[[], Awaitable[object]]
TOKENS = 4


@asynccontextmanager
async def own(base_url: str, samples: int, prompt_tokens: int) -> AsyncGenerator[Work]:
    """This package."""
    from tinkex_py import AsyncServiceClient, ModelInput, SamplingParams, TinkexConfig

    prompts = [ModelInput.from_ints(row) for row in _prompts(samples, prompt_tokens)]
    params = SamplingParams(max_tokens=TOKENS)
    async with AsyncServiceClient(TinkexConfig(base_url=base_url)) as service:
        sampler = await service.create_sampling_client(base_model="replayed")

        async def work() -> int:
            drawn = await asyncio.gather(*(sampler.sample(prompt, sampling_params=params) for prompt in prompts))
            return sum(len(response.sequences[0].tokens) for response in drawn)

        await work()
        yield work


@asynccontextmanager
async def official(base_url: str, samples: int, prompt_tokens: int) -> AsyncGenerator[Work]:
    """The official SDK."""
    import tinker
    from tinker import types

    prompts = [types.ModelInput.from_ints(row) for row in _prompts(samples, prompt_tokens)]
    params = types.SamplingParams(max_tokens=TOKENS)
    service = tinker.ServiceClient(base_url=base_url)
    sampler = await service.create_sampling_client(base_model="replayed")

    async def draw(prompt: types.ModelInput) -> types.SampleResponse:
        return await sampler.sample(prompt=prompt, num_samples=1, sampling_params=params)

    async def work() -> int:
        drawn = await asyncio.gather(*map(draw, prompts))
        return sum(len(response.sequences[0].tokens) for response in drawn)

    await work()
    yield work
    service.close("success")


def _prompts(samples: int, prompt_tokens: int) -> list[list[int]]:
    return np.random.default_rng(3).integers(0, 50_000, (samples, prompt_tokens)).tolist()
