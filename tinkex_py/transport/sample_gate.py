"""Back-pressure for many concurrent samples (protocol: asample, "back-pressure")."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from tinkex_py import telemetry
from tinkex_py.errors import RateLimited
from tinkex_py.limits import ByteBudget

# For this many seconds after the service refused a sample, the number of concurrent submissions is limited, and each
# counts as a multiple of its bytes.
_NARROW_SECONDS = 10.0
_NARROW_SUBMISSIONS = 10
_NARROW_COST = 20

_LARGE_PROMPT_BYTES = 128 * 1024
_PAUSE = 1.0
_LARGE_PROMPT_PAUSE = 5.0


class SampleGate:
    """Limits the concurrent samples of one client.

    Args:
        budget: limits the bytes of prompts in submission; shared by the sampling clients of a service.
        max_in_flight: maximum number of samples between submission and result.
        patience: seconds without progress of this client after which a refused sample fails.
    """

    def __init__(self, budget: ByteBudget, *, max_in_flight: int, patience: float) -> None:
        self._budget = budget
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._narrow = asyncio.Semaphore(_NARROW_SUBMISSIONS)
        self._narrow_until = float("-inf")
        self._patience = patience
        self._progressed_at = float("-inf")

    @asynccontextmanager
    async def in_flight(self) -> AsyncGenerator[float]:
        """Holds one sample, from its submission to its result. Yields the start time on the loop's clock."""
        async with self._in_flight:
            yield asyncio.get_running_loop().time()

    @asynccontextmanager
    async def submission(self, cost: int) -> AsyncGenerator[None]:
        """Holds one submission.

        Args:
            cost: estimated bytes of the prompt.
        """
        async with AsyncExitStack() as stack:
            if asyncio.get_running_loop().time() < self._narrow_until:
                await stack.enter_async_context(self._narrow)
                cost *= _NARROW_COST
            await stack.enter_async_context(self._budget.hold(cost))
            yield

    def progressed(self) -> None:
        """Records that the service accepted or finished a sample."""
        self._progressed_at = asyncio.get_running_loop().time()

    async def turned_away(self, error: RateLimited, *, cost: int, since: float) -> None:
        """Waits before a refused sample is submitted again.

        Args:
            error: the response.
            cost: estimated bytes of the prompt.
            since: start time of the sample on the loop's clock.

        Raises:
            RateLimited: `error`, if there was no progress for too long.
        """
        now = asyncio.get_running_loop().time()
        self._narrow_until = now + _NARROW_SECONDS
        left = max(since, self._progressed_at) + self._patience - now
        if left <= 0:
            raise error
        own = _LARGE_PROMPT_PAUSE if cost > _LARGE_PROMPT_BYTES else _PAUSE
        pause = min(error.retry_after or own, left)
        telemetry.emit("tinkex.sampling.turned_away", {"pause": pause}, {"request_id": error.request_id})
        await asyncio.sleep(pause)
