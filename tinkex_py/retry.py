"""When and how often something that failed is tried again: the one policy of requests, polls, downloads and terms."""

import asyncio
import math
import random
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

import tenacity

from tinkex_py.errors import APIStatusError, ConfigError
from tinkex_py.types.seconds import is_seconds

Result = TypeVar("Result")

# Seconds. A service that asks for less, or for no pause at all, would be asked again at network speed.
_LEAST_ASKED_FOR = 0.01


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
        self.number = 0
        self._policy = policy
        self._loop = asyncio.get_running_loop()
        self.progressed()

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

    async def one() -> Result:
        attempts.number += 1
        return await attempt(attempts)

    return await tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception(is_worth_another),
        wait=attempts.pause_after,
        stop=attempts.are_over,
        sleep=asyncio.sleep,
        reraise=True,
    )(one)
