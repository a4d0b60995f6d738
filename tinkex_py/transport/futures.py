"""Waits for what the service has not finished yet: a future is a request id that is polled until it is done."""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Final, Generic, TypeVar, cast

from tinkex_py import telemetry
from tinkex_py.errors import (
    APIStatusError,
    InvalidResponse,
    RequestFailed,
    RequestFailedCategory,
    ResultLost,
    TimeoutExceeded,
    TransportError,
)
from tinkex_py.retry import Attempts
from tinkex_py.transport.codec import PROTOBUF, Result
from tinkex_py.transport.request import Request, request
from tinkex_py.transport.response import Response, raise_for_status

PATH = "/api/v1/retrieve_future"
_ACCEPT: Final = f"{PROTOBUF}, application/json"
_METADATA_ONLY: Final = "complete_metadata"
PENDING_STATUSES: Final = frozenset({"pending", "queued", "running", _METADATA_ONLY})

_CATEGORIES: Mapping[str, RequestFailedCategory] = {"user": "user", "server": "server"}
# A poll that is answered "not yet" sooner than this was not held by the service; then the client paces itself.
_HELD_SECONDS = 1.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_MOST_BAD_REQUESTS = 2
_LONGEST_DETAIL = 1000
_LONGEST_METADATA = 4096
_LOST_STATUSES = frozenset({404, 410})
_TRANSIENT_STATUSES = frozenset({400, 425, 429})

Decoded = TypeVar("Decoded")
OnPending = Callable[[Mapping[str, Any]], None]
"""Gets the fields of every response that says "not yet"; what it raises ends the waiting."""


class PendingResult(Generic[Decoded]):
    """One future that is being waited for.

    Args:
        request_id: the future.
        request_type: what was asked for, for events and errors.
        decode: reads the result; if it raises InvalidResponse, the result is fetched again.
        timeout: seconds for one poll.
        on_pending: see `OnPending`.
    """

    def __init__(
        self,
        request_id: str,
        request_type: str,
        decode: Callable[[Result], Decoded],
        timeout: float,
        on_pending: OnPending | None = None,
    ) -> None:
        self._request_id = request_id
        self._request_type = request_type
        self._decode = decode
        self._timeout = timeout
        self._on_pending = on_pending
        self._polls = 0
        self._pause = _FIRST_PAUSE
        self._bad_requests = 0
        self._wants_payload = False
        self._queue_state: object = None

    async def poll(
        self,
        exchange: Callable[[Request], Awaitable[Response]],
        is_alive: Callable[[], Awaitable[bool]],
        attempts: Attempts,
    ) -> Decoded:
        """Polls until the future is done.

        Args:
            exchange: sends one poll.
            is_alive: asked when a poll took too long: a service that answers this only holds polls for longer.
            attempts: those of the retry policy; each response that says "not yet" lets them begin again.

        Raises:
            RequestFailed: the service failed the request.
            ResultLost: the service does not know the future any more.
            APIStatusError, TransportError: this poll failed; `is_transient` tells whether another may succeed.
        """
        loop = asyncio.get_running_loop()
        while True:
            started = loop.time()
            try:
                response = await exchange(self._next_poll())
            except TimeoutExceeded:
                if not await is_alive():
                    raise
                attempts.progressed()
                continue
            result = self._finished(response)
            if result is not None:
                return self._decode(result)
            attempts.progressed()
            await self._pace(loop.time() - started)

    def _next_poll(self) -> Request:
        fields: dict[str, Any] = {"request_id": self._request_id}
        if self._wants_payload:  # said only where it matters: strict older services do not know the field
            fields["allow_metadata_only"] = False
        headers = {"X-Tinker-Request-Type": self._request_type, "X-Tinker-Request-Iteration": str(self._polls)}
        self._polls += 1
        return request("POST", PATH, json=fields, accept=_ACCEPT, headers=headers, timeout=self._timeout)

    def _finished(self, response: Response) -> Result | None:
        """The result, or None if there is none yet."""
        if response.is_success and response.media_type == PROTOBUF:
            return Result(response.body, None)
        if response.status == 408:
            self._report_pending(_object_of(response))
            return None
        if response.status in _LOST_STATUSES:
            raise self._lost(response)
        if response.status in (400, 422):
            self._fail_or_poll_again(response)
        raise_for_status(response)
        fields = _unwrapped(response.json())
        if not isinstance(fields, dict):
            raise InvalidResponse(f"the result of {self._request_type} is no JSON object")
        given = cast("dict[str, Any]", fields)
        status = given.get("status")
        if status == _METADATA_ONLY and len(response.body) <= _LONGEST_METADATA:
            self._wants_payload = True
        if given.get("type") == "try_again" or (isinstance(status, str) and status in PENDING_STATUSES):
            self._report_pending(given)
            return None
        if given.get("error") is not None:
            raise self._failed(response, str(given["error"]), given.get("category"))
        return Result(b"", given)

    def _fail_or_poll_again(self, response: Response) -> None:
        """Some services answer 400 or 422 where the request itself failed; a few answer 400 by mistake, once."""
        self._bad_requests += 1
        if response.status == 422 or self._bad_requests >= _MOST_BAD_REQUESTS:
            fields = _object_of(response)
            detail = fields.get("detail") or fields.get("error") or response.body.decode(errors="replace")
            text = detail if isinstance(detail, str) else json.dumps(detail)
            raise self._failed(response, text[:_LONGEST_DETAIL], fields.get("category"))

    def _failed(self, response: Response, message: str, category: object) -> RequestFailed:
        return RequestFailed(
            f"{self._request_type} failed on the service: {response.secret.redacted_from(message)}",
            category=_CATEGORIES.get(str(category), "unknown"),
            request_id=self._request_id,
        )

    def _lost(self, response: Response) -> ResultLost:
        return ResultLost(
            f"the service has lost the result of {self._request_type} (it returned {response.status} for request "
            f"{self._request_id!r}), so it is not known whether the request took effect. A sample can be asked for "
            "again; for a training client make a new one from its last checkpoint: "
            "service.create_training_client_from_state(path, with_optimizer=True)",
            category="server",
            request_id=self._request_id,
        )

    async def _pace(self, took: float) -> None:
        if took >= _HELD_SECONDS:
            self._pause = _FIRST_PAUSE
            return
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)

    def _report_pending(self, fields: Mapping[str, Any]) -> None:
        if self._on_pending is not None:
            self._on_pending(fields)
        state = fields.get("queue_state")
        if state is None or state == self._queue_state:
            return
        self._queue_state = state
        metadata = {
            "request_id": self._request_id,
            "request_type": self._request_type,
            "queue_state": str(state),
            "queue_state_reason": fields.get("queue_state_reason"),
        }
        telemetry.emit("tinkex.future.queue_state", {}, metadata)


def is_transient(error: BaseException) -> bool:
    """Whether another poll may succeed after this failure of one."""
    if isinstance(error, APIStatusError):
        return error.status >= 500 or error.status in _TRANSIENT_STATUSES
    return isinstance(error, TransportError)


def _object_of(response: Response) -> dict[str, Any]:
    try:
        fields: object = response.json()
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
