"""Waits for what the service has not finished yet: a future is a request id that is asked for until it is done."""

import asyncio
import json
import random
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Generic, TypeVar, cast

from tinkex_py import telemetry
from tinkex_py.errors import (
    APIStatusError,
    BillingRequired,
    InvalidResponse,
    RequestFailed,
    RequestFailedCategory,
    ResultLost,
    TimeoutExceeded,
    TinkexError,
    TransportError,
)
from tinkex_py.transport.answer import HttpAnswer, raise_for_status
from tinkex_py.transport.billing import BillingPause
from tinkex_py.transport.codec import PROTOBUF, Result
from tinkex_py.transport.retry import RetryPolicy, usable_wait

ACCEPT: Final = f"{PROTOBUF}, application/json"
_METADATA_ONLY: Final = "complete_metadata"
PENDING_STATUSES: Final = frozenset({"pending", "queued", "running", _METADATA_ONLY})

_CATEGORIES: Mapping[str, RequestFailedCategory] = {"user": "user", "server": "server"}
# A poll that is answered "not yet" sooner than this was not held by the service; then we pace it ourselves.
_HELD_SECONDS = 1.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_MOST_BAD_REQUESTS = 2
_LONGEST_DETAIL = 1000
_LONGEST_METADATA = 4096
_LOST_STATUSES = frozenset({404, 410})

Decoded = TypeVar("Decoded")
Poll = Callable[[int], Awaitable[HttpAnswer]]


async def wait_for_result(
    poll: Poll,
    decode: Callable[[Result], Decoded],
    *,
    request_id: str,
    request_type: str,
    retry: RetryPolicy,
    is_alive: Callable[[], Awaitable[bool]] | None = None,
    billing: BillingPause | None = None,
    on_queue_state: Callable[[Mapping[str, Any]], None] | None = None,
    on_done: Callable[[], None] | None = None,
) -> Decoded:
    """Polls until the future is done.

    Args:
        poll: asks once; gets the number of the poll, from 0.
        decode: reads the result; if it raises InvalidResponse, the result is fetched again.
        request_id: the future.
        request_type: what was asked for, for events and errors.
        retry: how long polling goes on while the service cannot be reached or answers with errors.
        is_alive: asked when a poll took too long: a service that answers this only holds polls for longer than we do.
        billing: how long the service may ask for payment; None is not at all.
        on_queue_state: gets the fields of every answer that says "not yet"; what it raises ends the waiting.
        on_done: called when the result is there.

    Raises:
        RequestFailed: the service failed the request.
        ResultLost: the service does not know the future any more.
        APIStatusError, TransportError: polling itself was refused or kept failing.
    """
    metadata = {"request_id": request_id, "request_type": request_type}
    with telemetry.lifecycle("tinkex.future", metadata):
        waiting = _Waiting(poll, decode, request_id, request_type, retry, is_alive, billing, on_queue_state)
        result = await waiting.result()
        if on_done is not None:
            on_done()
        return result


class _Waiting(Generic[Decoded]):
    """One future that is being waited for."""

    def __init__(
        self,
        poll: Poll,
        decode: Callable[[Result], Decoded],
        request_id: str,
        request_type: str,
        retry: RetryPolicy,
        is_alive: Callable[[], Awaitable[bool]] | None,
        billing: BillingPause | None,
        on_queue_state: Callable[[Mapping[str, Any]], None] | None,
    ) -> None:
        self._poll = poll
        self._decode = decode
        self._request_id = request_id
        self._request_type = request_type
        self._retry = retry
        self._is_alive = is_alive
        self._billing = billing
        self._on_queue_state = on_queue_state
        self._loop = asyncio.get_running_loop()
        self._pause = _FIRST_PAUSE
        self._failing_since: float | None = None
        self._failures = 0
        self._bad_requests = 0
        self._queue_state: object = None

    async def result(self) -> Decoded:
        iteration = 0
        while True:
            started = self._loop.time()
            try:
                answer = await self._poll(iteration)
                result = self._finished(answer)
                if result is not None:
                    return self._decode(result)
            except (TransportError, APIStatusError) as error:
                await self._after_failure(error)
            else:
                self._failing_since, self._failures = None, 0
                await self._after_pending(self._loop.time() - started)
            iteration += 1

    def _finished(self, answer: HttpAnswer) -> Result | None:
        """The result, or None if there is none yet."""
        if answer.is_success and answer.media_type == PROTOBUF:
            return Result(answer.body, None)
        if answer.status == 408:
            self._tell_queue_state(_object_of(answer))
            return None
        if answer.status in _LOST_STATUSES:
            raise self._lost(answer)
        if answer.status in (400, 422):
            self._fail_or_ask_again(answer)
        raise_for_status(answer)
        fields = _unwrapped(answer.json())
        if not isinstance(fields, dict):
            raise InvalidResponse(f"the result of {self._request_type} is no JSON object")
        given = cast("dict[str, Any]", fields)
        status = given.get("status")
        if given.get("type") == "try_again" or (isinstance(status, str) and status in PENDING_STATUSES):
            self._tell_queue_state(given)
            return None
        if given.get("error") is not None:
            raise self._failed(answer, str(given["error"]), given.get("category"))
        return Result(b"", given)

    def _fail_or_ask_again(self, answer: HttpAnswer) -> None:
        """Some services answer 400 or 422 where the request itself failed; a few answer 400 by mistake, once."""
        self._bad_requests += 1
        if answer.status == 422 or self._bad_requests >= _MOST_BAD_REQUESTS:
            fields = _object_of(answer)
            told = fields.get("detail") or fields.get("error") or answer.body.decode(errors="replace")
            text = told if isinstance(told, str) else json.dumps(told)
            raise self._failed(answer, text[:_LONGEST_DETAIL], fields.get("category"))

    def _failed(self, answer: HttpAnswer, message: str, category: object) -> RequestFailed:
        return RequestFailed(
            f"{self._request_type} failed on the service: {answer.secret.redacted_from(message)}",
            category=_CATEGORIES.get(str(category), "unknown"),
            request_id=self._request_id,
        )

    def _lost(self, answer: HttpAnswer) -> ResultLost:
        return ResultLost(
            f"the service has lost the result of {self._request_type} (it answered {answer.status} for request "
            f"{self._request_id!r}), so it is not known whether the request took effect. A sample can be asked for "
            "again; for a training client make a new one from its last checkpoint: "
            "service.create_training_client_from_state(path, with_optimizer=True)",
            category="server",
            request_id=self._request_id,
        )

    async def _after_pending(self, took: float) -> None:
        if took >= _HELD_SECONDS:
            self._pause = _FIRST_PAUSE
            return
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    async def _after_failure(self, error: TinkexError) -> None:
        if isinstance(error, BillingRequired) and self._billing is not None:
            await self._billing.after(error)
            return
        if isinstance(error, TimeoutExceeded) and self._is_alive is not None and await self._is_alive():
            self._failing_since, self._failures = None, 0
            return
        retryable = isinstance(error, TransportError) or (
            isinstance(error, APIStatusError) and (error.status >= 500 or error.status in (400, 425, 429))
        )
        if not retryable:
            raise error
        now = self._loop.time()
        self._failing_since = now if self._failing_since is None else self._failing_since
        self._failures += 1
        attempts_left = self._retry.max_attempts is None or self._failures < self._retry.max_attempts
        # It has waited long enough, where it was too slow.
        pause = 0.0 if isinstance(error, TimeoutExceeded) else self._pause_after(error)
        # As for every request: no pause that ends after the deadline is begun.
        if now + pause - self._failing_since > self._retry.deadline or not attempts_left:
            raise error
        await asyncio.sleep(pause)

    def _pause_after(self, error: TinkexError) -> float:
        """What the service asks for, else exponential growth with full jitter."""
        asked_for = usable_wait(error.retry_after) if isinstance(error, APIStatusError) else None
        if asked_for is not None:
            return asked_for
        longest = min(self._retry.initial_wait * 2 ** min(self._failures - 1, 16), self._retry.max_wait)
        return random.uniform(0.0, longest)  # noqa: S311  (spreads load, hides nothing)

    def _tell_queue_state(self, fields: Mapping[str, Any]) -> None:
        if self._on_queue_state is not None:
            self._on_queue_state(fields)
        state = fields.get("queue_state")
        if state is None or state == self._queue_state:
            return
        self._queue_state = state
        telemetry.emit(
            "tinkex.future.queue_state",
            {},
            {
                "request_id": self._request_id,
                "request_type": self._request_type,
                "queue_state": str(state),
                "queue_state_reason": fields.get("queue_state_reason"),
            },
        )


def tells_metadata_only(answer: HttpAnswer) -> bool:
    """Whether a result is there, but was not sent along because it is large."""
    may = answer.is_success and answer.media_type != PROTOBUF and len(answer.body) <= _LONGEST_METADATA
    return may and _object_of(answer).get("status") == _METADATA_ONLY


def _object_of(answer: HttpAnswer) -> dict[str, Any]:
    try:
        fields: object = answer.json()
    except InvalidResponse:
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}


def _unwrapped(fields: object) -> object:
    """Some services nest the result as `{"status": "completed", "result": {...}}`."""
    if isinstance(fields, dict):
        given = cast("dict[str, Any]", fields)
        if given.get("status") == "completed" and isinstance(given.get("result"), dict):
            return given["result"]
    return cast("object", fields)
