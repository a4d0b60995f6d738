"""x."""

from collections.abc import Callable
from typing import TypeVar

from tinkex_py.losses.threads import TermThreads, run_released

R = TypeVar("R")


class WorkerPool(TermThreads):
    """x."""

    async def compute(self, name: str, work: Callable[[], R]) -> R:
        """X."""
        return await run_released(self.arithmetic, name, work)
