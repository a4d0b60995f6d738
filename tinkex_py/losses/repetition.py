"""Calls an async term again after a failure, as its retry policy says."""

import inspect
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

from tenacity import AsyncRetrying, RetryCallState

from tinkex_py.errors import InPlaceMutation, InvalidTermResult

Result = TypeVar("Result")

# Calling again would fail again, or work on logprobs that are spoilt.
_NEVER_REPEATED = (InPlaceMutation, InvalidTermResult)


async def repeated(policy: AsyncRetrying, call: Callable[[], Awaitable[Result]]) -> Result:
    """The result of the first call that the policy is content with.

    The policy object is not changed, so that many terms may share it at once. Whatever it says, a cancellation and
    KeyboardInterrupt are never followed by another call.

    Raises:
        RetryError: the policy gave up; it holds the last attempt.
    """
    wanted = cast("Callable[[RetryCallState], bool | Awaitable[bool]]", policy.retry)

    async def again(state: RetryCallState) -> bool:
        failure = state.outcome.exception() if state.outcome is not None else None
        if failure is not None and (not isinstance(failure, Exception) or isinstance(failure, _NEVER_REPEATED)):
            return False
        answer = wanted(state)
        return await answer if inspect.isawaitable(answer) else answer

    return await policy.copy(retry=again)(call)
