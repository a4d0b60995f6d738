"""When and how often a request is sent again."""

import asyncio
import math
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import tenacity

from tinkex_py.errors import ConfigError, ConnectionFailed, InvalidResponse, TimeoutExceeded, TransportError
from tinkex_py.transport.answer import HttpAnswer, raise_for_status, retry_after
from tinkex_py.types.seconds import is_seconds

__all__ = ["RetryPolicy", "is_retryable_status", "retry_after", "send_with_retry", "usable_wait"]

_RETRYABLE_FAILURES = (ConnectionFailed, TimeoutExceeded, InvalidResponse)
_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425, 429})
_CONFLICT = 409
# Seconds; a service that asks for less, or for no wait at all, would be asked at network speed.
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


def is_retryable_status(status: int) -> bool:
    """Whether a later attempt may succeed: 408, 425, 429 and everything from 500 on."""
    return status in _RETRYABLE_CLIENT_ERRORS or status >= 500


async def send_with_retry(
    policy: RetryPolicy,
    send: Callable[[int], Awaitable[HttpAnswer]],
    *,
    retry_statuses: Callable[[int], bool] = is_retryable_status,
) -> HttpAnswer:
    """Send until there is a final answer or the policy is exhausted.

    Args:
        policy: how long to keep trying.
        send: does one exchange; gets the number of the attempt, from 1.
        retry_statuses: which statuses are worth another attempt. A service's `x-should-retry` header wins over it,
            except for 409, which is never sent again.

    Returns:
        A 2xx answer.

    Raises:
        APIStatusError: the last answer was another status; `attempts` tells how often the request was sent.
        ConnectionFailed: the last attempt got no answer.
        TimeoutExceeded: the last attempt, or the whole, took too long.
        InvalidResponse: the last answer could not be understood.
    """
    last_moment = asyncio.get_running_loop().time() + policy.deadline
    attempts = 0

    async def attempt() -> HttpAnswer:
        nonlocal attempts
        attempts += 1
        scope = asyncio.timeout_at(last_moment if math.isfinite(last_moment) else None)
        try:
            async with scope:
                return await send(attempts)
        except TimeoutError as error:
            if isinstance(error, TransportError) or not scope.expired():
                raise
            raise TimeoutExceeded(
                f"no answer within the retry deadline of {policy.deadline:g} s ({attempts} attempt(s))"
            ) from error

    def is_worth_another_attempt(answer: HttpAnswer) -> bool:
        return _should_retry(answer, retry_statuses)

    retrying = tenacity.AsyncRetrying(
        retry=tenacity.retry_if_exception_type(_RETRYABLE_FAILURES)
        | tenacity.retry_if_result(is_worth_another_attempt),
        wait=_Wait(policy),
        stop=_stop(policy),
        sleep=asyncio.sleep,
        retry_error_callback=_last_outcome,
    )
    try:
        answer: HttpAnswer = await retrying(attempt)
    except TransportError as error:
        error.attempts = attempts
        raise
    raise_for_status(answer, attempts)
    return answer


def _should_retry(answer: HttpAnswer, retry_statuses: Callable[[int], bool]) -> bool:
    if answer.is_success or answer.status == _CONFLICT:
        return False
    told = answer.headers.get("x-should-retry", "").strip().lower()
    if told in ("true", "false"):
        return told == "true"
    return retry_statuses(answer.status)


class _Wait(tenacity.wait.wait_base):
    """What the service asks for, else exponential growth with full jitter."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._own = tenacity.wait_random_exponential(multiplier=policy.initial_wait, max=policy.max_wait)

    def __call__(self, retry_state: tenacity.RetryCallState) -> float:
        outcome = retry_state.outcome
        if outcome is not None and not outcome.failed:
            asked_for = usable_wait(retry_after(outcome.result().headers))
            if asked_for is not None:
                return asked_for
        return self._own(retry_state)


def usable_wait(asked_for: float | None) -> float | None:
    """The wait (seconds) that a service asks for; None where it asks for none, or for so little that it is none."""
    return None if asked_for is None or asked_for < _LEAST_ASKED_FOR else asked_for


def _stop(policy: RetryPolicy) -> tenacity.stop.stop_base:
    stop: tenacity.stop.stop_base = tenacity.stop_before_delay(policy.deadline)
    if policy.max_attempts is not None:
        stop |= tenacity.stop_after_attempt(policy.max_attempts)
    return stop


def _last_outcome(retry_state: tenacity.RetryCallState) -> Any:
    assert retry_state.outcome is not None
    return retry_state.outcome.result()
