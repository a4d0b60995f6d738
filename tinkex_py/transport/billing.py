"""What a client does when the service asks for payment: wait a while, say so, and in the end give up."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from typing import TypeVar

from tinkex_py import telemetry
from tinkex_py.errors import BillingRequired

# Seconds, as the protocol has them ("Billing (402)").
PAUSE = 5.0
LEAST_PAUSE = 0.02
TOLD_EVERY = 60.0
FORGOTTEN_AFTER = 300.0

Answer = TypeVar("Answer")


class BillingPause:
    """The pauses of one connection; all its requests share the clock.

    Args:
        longest: seconds after the first answer 402 at which requests stop waiting; 0 never waits.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._since = -math.inf
        self._last = -math.inf
        self._told = -math.inf

    async def around(self, send: Callable[[], Awaitable[Answer]]) -> Answer:
        """Sends again as long as the service asks for payment and the pause may go on.

        Raises:
            BillingRequired: it went on for too long.
        """
        while True:
            try:
                return await send()
            except BillingRequired as error:
                await self.after(error)

    async def after(self, error: BillingRequired) -> None:
        """Waits before the next attempt.

        Raises:
            BillingRequired: `error`, if the pause has lasted too long.
        """
        now = asyncio.get_running_loop().time()
        if now - self._last > FORGOTTEN_AFTER:
            self._since = now
        self._last = now
        if now - self._since >= self.longest:
            raise error
        if now - self._told >= TOLD_EVERY:
            self._told = now
            telemetry.emit("tinkex.billing.paused", {"paused": now - self._since}, {"request_id": error.request_id})
        # A service that asks for no pause at all would be asked at network speed.
        await asyncio.sleep(PAUSE if not error.retry_after else max(error.retry_after, LEAST_PAUSE))
