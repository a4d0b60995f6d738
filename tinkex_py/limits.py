"""Limits on time, attempts, bytes in flight, and waiting for payment.

Requests, polls, downloads and terms share one retry policy and one time limit.
"""

import asyncio
import math
import random
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TypeGuard, TypeVar

from tinkex_py import telemetry
from tinkex_py.arguments import as_integer, as_number, plain, shown
from tinkex_py.errors import APIStatusError, BillingRequired, ConfigError

Result = TypeVar("Result")

# Seconds. A shorter `retry-after` is ignored, because it would repeat the request at network speed.
_LEAST_ASKED_FOR = 0.01
# At most a tenth of the deadline.
_SHORTEST_ATTEMPT = 0.25
# Seconds (protocol: "Billing (402)").
BILLING_PAUSE = 5.0
_LEAST_BILLING_PAUSE = 0.02
_BILLING_REPORTED_EVERY = 60.0
_BILLING_FORGOTTEN_AFTER = 300.0


def running_loop() -> asyncio.AbstractEventLoop:
    """Returns the event loop of the running task.

    Raises:
        ConfigError: there is none, because another library such as trio drives the coroutine.
    """
    try:
        if asyncio.current_task() is not None:
            return asyncio.get_running_loop()
    except RuntimeError:
        pass  # no event loop runs in this thread
    raise ConfigError(
        "tinkex_py runs on asyncio only, and this call is not inside an asyncio task: start the program with "
        "asyncio.run(...), or run this part of a trio program in a thread, "
        "trio.to_thread.run_sync(asyncio.run, main())"
    )


def is_seconds(value: object) -> TypeGuard[int | float]:
    """Whether a value is a number of seconds, infinity included; False for bool, NaN and ints too large for a float."""
    number = as_number(value) if isinstance(plain(value), int | float) else None
    return number is not None and not math.isnan(number)


@asynccontextmanager
async def time_limit(seconds: float | None, expired: Callable[[], Exception]) -> AsyncGenerator[asyncio.Timeout]:
    """Limits the time of a block. Once the limit has expired, any exception of the block is replaced by its error.

    Before that, exceptions pass through unchanged, also a TimeoutError of the block and a cancellation from outside.

    Args:
        seconds: from now; None and infinity set no limit.
        expired: creates the error to raise.

    Yields:
        The running limit; its `reschedule` moves it.
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
    """How long and how often a request is repeated.

    Attributes:
        deadline: seconds from the first attempt, > 0; also ends an attempt that stalls.
        max_attempts: maximum number of attempts, >= 1; None is as many as the deadline allows.
        initial_wait: upper bound (seconds) of the random wait after the first attempt; doubles with each attempt.
        max_wait: largest upper bound (seconds) of a random wait.

    Raises:
        ConfigError: a value is out of range.
    """

    deadline: float = 300.0
    max_attempts: int | None = None
    initial_wait: float = 0.5
    max_wait: float = 30.0

    def __post_init__(self) -> None:
        if not (is_seconds(self.deadline) and self.deadline > 0):
            raise ConfigError(f"deadline must be a positive number of seconds, not {shown(self.deadline)}")
        object.__setattr__(self, "deadline", plain(self.deadline))
        attempts = as_integer(self.max_attempts)
        if self.max_attempts is not None and (attempts is None or attempts < 1):
            raise ConfigError(f"max_attempts must be an int >= 1 or None, not {shown(self.max_attempts)}")
        object.__setattr__(self, "max_attempts", attempts)
        for name in ("initial_wait", "max_wait"):
            value: float = getattr(self, name)
            if not (is_seconds(value) and value >= 0 and math.isfinite(value)):
                raise ConfigError(f"{name} must be a finite number of seconds >= 0, not {shown(value)}")
            object.__setattr__(self, name, plain(value))

    @classmethod
    def none(cls) -> "RetryPolicy":
        """A single attempt, limited only by its own timeout."""
        return cls(deadline=math.inf, max_attempts=1)


class Attempts:
    """The attempts of one request or other operation.

    Args:
        policy: how long and how often to try.

    Attributes:
        number: number of the running attempt, from 1.
    """

    def __init__(self, policy: RetryPolicy) -> None:
        self.number = 1
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self._since = self._loop.time()
        self._failures = 0

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline of the policy."""
        return self._since + self._policy.deadline - self._loop.time()

    def progressed(self) -> None:
        """Restarts the deadline, the attempts and the waits of the policy."""
        self._since = self._loop.time()
        self._failures = 0

    def next_pause(self, error: BaseException) -> float | None:
        """Returns the seconds to wait after a failed attempt; None if there is no further attempt.

        The wait is the service's `retry-after`, else random below a bound that doubles with each failure (full jitter).
        An attempt that would begin at the deadline or shortly before it does not start: its timeout would only hide the
        error of the attempt before.
        """
        self.number += 1
        self._failures += 1
        policy = self._policy
        asked_for = error.retry_after if isinstance(error, APIStatusError) else None
        if asked_for is not None and asked_for >= _LEAST_ASKED_FOR:
            pause = asked_for
        else:
            bound = min(policy.initial_wait * 2.0 ** min(self._failures - 1, 16), policy.max_wait)
            pause = random.uniform(0.0, bound)  # noqa: S311  (spreads load, hides nothing)
        is_last = policy.max_attempts is not None and self._failures >= policy.max_attempts
        shortest = min(_SHORTEST_ATTEMPT, policy.deadline / 10)
        return None if is_last or pause + shortest > self.seconds_left else pause


async def with_retries(
    policy: RetryPolicy,
    attempt: Callable[[Attempts], Awaitable[Result]],
    is_worth_another: Callable[[BaseException], bool],
) -> Result:
    """Repeats an operation until an attempt succeeds or the policy is exhausted; then raises the last error unchanged.

    Args:
        policy: how long and how often to try.
        attempt: makes one attempt.
        is_worth_another: whether another attempt may succeed after this error; if not, the error is raised at once.
    """
    attempts = Attempts(policy)
    while True:
        try:
            return await attempt(attempts)
        except Exception as error:
            pause = attempts.next_pause(error) if is_worth_another(error) else None
            if pause is None:
                raise
        await asyncio.sleep(pause)


class ByteBudget:
    """Limits the bytes in flight. Waiters are served in order of arrival.

    A request that is larger than the whole budget waits until nothing else is in flight.

    Args:
        limit: the budget in bytes.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def held(self) -> int:
        """Bytes in flight."""
        return self._held

    @asynccontextmanager
    async def hold(self, count: int) -> AsyncGenerator[None]:
        """Holds `count` bytes of the budget while the block runs."""
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
    """Pauses the requests of one client while the service asks for payment (402); all of them share the clock.

    Args:
        longest: seconds after the first response 402 at which requests stop waiting, also in a pause that the service
            asked for; 0 never waits.
    """

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self._since = -math.inf
        self._last = -math.inf
        self._reported = -math.inf

    async def around(self, send: Callable[[], Awaitable[Result]]) -> Result:
        """Repeats a request while the service asks for payment.

        Raises:
            BillingRequired: the pause lasted longer than `longest`.
        """
        since = math.inf
        while True:
            try:
                return await send()
            except BillingRequired as error:
                since = min(since, asyncio.get_running_loop().time())
                await self._pause(error, since)

    async def _pause(self, error: BillingRequired, since: float) -> None:
        """Waits before the next attempt of a request that was first refused at `since`; or raises its error."""
        now = asyncio.get_running_loop().time()
        if now - self._last > _BILLING_FORGOTTEN_AFTER:
            self._since = now
        self._last = now
        left = min(since, self._since) + self.longest - now
        if left <= 0:
            raise error
        if now - self._reported >= _BILLING_REPORTED_EVERY:
            self._reported = now
            telemetry.emit("tinkex.billing.paused", {"paused": now - self._since}, {"request_id": error.request_id})
        # Without a minimum, a service that asks for no pause would get requests at network speed.
        pause = BILLING_PAUSE if not error.retry_after else max(error.retry_after, _LEAST_BILLING_PAUSE)
        await asyncio.sleep(min(pause, left))
