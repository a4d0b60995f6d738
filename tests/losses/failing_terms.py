"""Terms that fail, wait, or clean up."""

import asyncio
from typing import Any

import torch

SHORT = 0.02


class OwnError(Exception):
    pass


class OwnBaseError(BaseException):
    pass


def raising(error: BaseException, is_async: bool = False) -> Any:
    def now(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        raise error

    async def later(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        await asyncio.sleep(0)
        raise error

    return later if is_async else now


async def for_ever(data: Any, logprobs: torch.Tensor) -> torch.Tensor:
    await asyncio.Event().wait()
    raise AssertionError("unreachable")


class Cleaning:
    """Waits for ever and takes a few turns of the loop to clean up when it is cancelled."""

    def __init__(self) -> None:
        self.started = asyncio.Event()
        self.cleaned = False

    async def compute(self, data: Any, logprobs: torch.Tensor) -> torch.Tensor:
        try:
            self.started.set()
            await asyncio.Event().wait()
        finally:
            for _ in range(3):
                await asyncio.sleep(0)
            self.cleaned = True
        raise AssertionError("unreachable")
