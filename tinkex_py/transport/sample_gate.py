"""Many samples at once, within what the service takes (protocol: asample, "back-pressure")."""

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack, asynccontextmanager

from tinkex_py import telemetry
from tinkex_py.errors import RateLimited
from tinkex_py.limits import ByteBudget

# After the service turned a sample away, for so many seconds ...
NARROW_SECONDS = 10.0
# ... at most so many are being submitted, and each costs so many times its bytes.
NARROW_SUBMISSIONS = 10
NARROW_COST = 20

LARGE_PROMPT_BYTES = 128 * 1024
PAUSE = 1.0
LARGE_PROMPT_PAUSE = 5.0


class SampleGate:
    """Where the samples of one client wait.

    Args:
        budget: bytes of prompts that may be under way, shared by the sampling clients of a service.
        max_in_flight: samples between submission and result.
        patience: seconds without any progress of this client after which a sample that is turned away fails.
    """

    def __init__(self, budget: ByteBudget, *, max_in_flight: int, patience: float) -> None:
        self._budget = budget
        self._in_flight = asyncio.Semaphore(max_in_flight)
        self._narrow = asyncio.Semaphore(NARROW_SUBMISSIONS)
        self._narrow_until = float("-inf")
        self._patience = patience
        self._progressed_at = float("-inf")

    @asynccontextmanager
    async def in_flight(self) -> AsyncGenerator[float]:
        """One sample, from its submission to its result. Yields when it began, on the loop's clock."""
        async with self._in_flight:
            yield asyncio.get_running_loop().time()

    @asynccontextmanager
    async def submission(self, cost: int) -> AsyncGenerator[None]:
        """One request while it is being sent.

        Args:
            cost: estimated bytes of the prompt.
        """
        async with AsyncExitStack() as stack:
            if asyncio.get_running_loop().time() < self._narrow_until:
                await stack.enter_async_context(self._narrow)
                cost *= NARROW_COST
            await stack.enter_async_context(self._budget.hold(cost))
            yield

    def progressed(self) -> None:
        """The service took a sample, or finished one."""
        self._progressed_at = asyncio.get_running_loop().time()

    async def turned_away(self, error: RateLimited, *, cost: int, since: float) -> None:
        """Waits before a sample is submitted again.

        Args:
            error: the answer.
            cost: estimated bytes of the prompt.
            since: when the sample began, on the loop's clock.

        Raises:
            RateLimited: `error`; nothing has progressed for too long.
        """
        now = asyncio.get_running_loop().time()
        self._narrow_until = now + NARROW_SECONDS
        left = max(since, self._progressed_at) + self._patience - now
        if left <= 0:
            raise error
        own = LARGE_PROMPT_PAUSE if cost > LARGE_PROMPT_BYTES else PAUSE
        pause = min(error.retry_after or own, left)
        telemetry.emit("tinkex.sampling.turned_away", {"pause": pause}, {"request_id": error.request_id})
        await asyncio.sleep(pause)
