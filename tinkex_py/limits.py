"""Limits: of time, of attempts, of bytes under way, and of waiting for payment.

Requests, polls, downloads and terms share the one retry policy and the one way to bound a block in time.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

import tenacity

from tinkex_py import telemetry
from tinkex_py.errors import APIStatusError, BillingRequired, ConfigError

Result = TypeVar("Result")

# Seconds. A service that asks for less, or for no pause at all, would be asked again at network speed.
_LEAST_ASKED_FOR = 0.01
# Seconds, as the protocol has them ("Billing (402)").
BILLING_PAUSE = 5.0
_LEAST_BILLING_PAUSE = 0.02
_BILLING_REPORTED_EVERY = 60.0
_BILLING_FORGOTTEN_AFTER = 300.0


def is_seconds(value: object) -> TypeGuard[int | float]:
    """True for an int or float that a clock can count, infinity included: no bool, no NaN, no int beyond all floats."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        number = float(value)
    except OverflowError:
        return False
    return not math.isnan(number)


@asynccontextmanager
async def time_limit(seconds: float | None, expired: Callable[[], Exception]) -> AsyncGenerator[asyncio.Timeout]:
    """Bounds a block; whatever ends it once this limit has expired becomes the limit's own error.

    A TimeoutError of something inside, and a cancellation from outside, pass through unchanged.

    Args:
        seconds: from now; None and infinity set no limit.
        expired: makes the error to raise.

    Yields:
        The running limit, whose `reschedule` moves it.
    """
    scope = asyncio.timeout(None if seconds is None or math.isinf(seconds) else seconds)
    try:
        async with scope:
            yield scope
    except Exception as error:
        if not scope.expired():
            raise
        raise expired() from (None if type(error) is TimeoutError else error)


@dataclass(frozen=True, kw_only=True)
class RetryPolicy:
    """How long to keep trying.

    Attributes:
        deadline: seconds from the first attempt; bounds every attempt too, even one that stalls.
        max_attempts: at most so many attempts; None for as many as the deadline allows.
        initial_wait: the wait after the first attempt is random between 0 and this (seconds), then doubles.
        max_wait: the random wait grows up to this (seconds).

    Raises:
        ConfigError: a value is out of range.
    """

    deadline: float = 300.0
    max_attempts: int | None = None
    initial_wait: float = 0.5
    max_wait: float = 30.0

    def __post_init__(self) -> None:
        if not (is_seconds(self.deadline) and self.deadline > 0):
            raise ConfigError(f"deadline must be a positive number of seconds, not {self.deadline!r}")
        attempts = self.max_attempts
        if attempts is not None and (isinstance(attempts, bool) or not isinstance(attempts, int) or attempts < 1):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConfigError(f"max_attempts must be an int >= 1 or None, not {attempts!r}")
        for name in ("initial_wait", "max_wait"):
            value: float = getattr(self, name)
            if not (is_seconds(value) and value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of seconds >= 0, not {value!r}")

    @classmethod
    def none(cls) -> "RetryPolicy":
        """One attempt, bounded by its own timeout only."""
        return cls(deadline=math.inf, max_attempts=1)


class Attempts:
    """The attempts at one thing.

    Args:
        policy: how long to keep trying.

    Attributes:
        number: of the running attempt, from 1.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.number = 1
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._failures = 0

    @property
    def seconds_left(self) -> float:
        """Until the deadline of the policy."""
        return self._since + self._policy.deadline - self._loop.time()

    def progressed(self) -> None:
        """Lets the policy's time, attempts and waits begin again."""
        self._since = self._loop.time()
        self._failures = 0

    def pause_after(self, state: tenacity.RetryCallState) -> float:
        """What the service asks for, else random below a bound that doubles with each failure (full jitter)."""
        self.number += 1
        self._failures += 1
        error = state.outcome.exception() if state.outcome is not None else None
        asked_for = error.retry_after if isinstance(error, APIStatusError) else None
        if asked_for is not None and asked_for >= _LEAST_ASKED_FOR:
            return asked_for
        bound = min(self._policy.initial_wait * 2.0 ** min(self._failures - 1, 16), self._policy.max_wait)
        return random.uniform(0.0, bound)  # noqa: S311  (spreads load, hides nothing)

    def are_over(self, state: tenacity.RetryCallState) -> bool:
        """Whether there is no further attempt: no pause that ends after the deadline is begun."""
        limit = self._policy.max_attempts
        return (limit is not None and self._failures >= limit) or state.upcoming_sleep > self.seconds_left


async def with_retries(
    policy: RetryPolicy,
    attempt: Callable[[Attempts], Awaitable[Result]],
    is_worth_another: Callable[[BaseException], bool],
) -> Result:
    """Tries until an attempt succeeds, fails for good, or the policy is exhausted; then raises its error unchanged.

    Args:
        policy: how long to keep trying.
        attempt: does it once.
        is_worth_another: whether another attempt may succeed after this error.
    """
    attempts = Attempts(policy)
    try:  # most first attempts succeed, and tenacity's own work costs a tenth of a request
        return await attempt(attempts)
    except Exception as error:
        if not is_worth_another(error):
            raise
        failures = [error]
    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_worth_another),
        wait=attempts.pause_after,
        stop=attempts.are_over,
        sleep=asyncio.sleep,
        reraise=True,
    )
    async for one in retrying:
        with one:
            if failures:
                raise failures.pop()
            return await attempt(attempts)
    raise AssertionError("the last attempt returned or raised")


class ByteBudget:
    """At most so many bytes at a time; more wait, in the order they came.

    What is larger than the whole budget goes alone.

    Args:
        limit: the budget in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held(self) -> int:
        """Bytes that are under way."""
        return self._held

    @asynccontextmanager
    async def hold(self, count: int) -> AsyncGenerator[None]:
        """Holds so many bytes of the budget while the block runs."""
        await self._take(count)
        try:
            yield
        finally:
            self._give_back(count)

    async def _take(self, count: int) -> None:
        if not self._waiting and self._fits(count):
            self._held += count
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((count, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # the turn came in the same moment
                self._give_back(count)
            else:
                self._waiting.remove((count, turn))
                self._admit()
            raise

    def _give_back(self, count: int) -> None:
        self._held -= count
        self._admit()

    def _admit(self) -> None:
        while self._waiting and self._fits(self._waiting[0][0]):
            count, turn = self._waiting.popleft()
            self._held += count
            turn.set_result(None)

    def _fits(self, count: int) -> bool:
        return self._held == 0 or self._held + count <= self._limit


class BillingPause:
    """The pauses of one connection; all its requests share the clock.

    Args:
        longest: seconds after the first response 402 at which requests stop waiting; 0 never waits.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._since = -math.inf
        self._last = -math.inf
        self._reported = -math.inf

    async def around(self, send: Callable[[], Awaitable[Result]]) -> Result:
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
        if now - self._last > _BILLING_FORGOTTEN_AFTER:
            self._since = now
        self._last = now
        if now - self._since >= self.longest:
            raise error
        if now - self._reported >= _BILLING_REPORTED_EVERY:
            self._reported = now
            telemetry.emit("tinkex.billing.paused", {"paused": now - self._since}, {"request_id": error.request_id})
        # A service that asks for no pause at all would be asked at network speed.
        await asyncio.sleep(BILLING_PAUSE if not error.retry_after else max(error.retry_after, _LEAST_BILLING_PAUSE))
