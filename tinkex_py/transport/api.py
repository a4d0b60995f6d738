"""What a request to one service needs: the current key, repetition where that helps, and the result of a future.

A future is a request id that is polled until the service is done.
"""

import asyncio
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
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
from tinkex_py.limits import Attempts, BillingPause, RetryPolicy, time_limit, with_retries
from tinkex_py.transport.auth import Auth, rejects_token
from tinkex_py.transport.decoding import Result, request_id_of
from tinkex_py.transport.encoding import PROTOBUF
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.messages import Request, Response, Secret, raise_for_status, request

Read = TypeVar("Read")
Decoded = TypeVar("Decoded")

_LIVENESS_TIMEOUT = 10.0
_CONFLICT = 409
_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425, 429})

RETRIEVE_FUTURE = "/api/v1/retrieve_future"
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

OnPending = Callable[[Mapping[str, Any]], None]
"""Gets the fields of every response that says "not yet"; what it raises ends the waiting."""


@dataclass(frozen=True)
class Sent:
    """What became of one numbered request: accepted, or refused for good. Its number is spent either way.

    Attributes:
        number: its sequence number.
        request_id: the future of an accepted one.
        refusal: the service's final refusal.
    """

    number: int
    request_id: str = ""
    refusal: APIStatusError | None = None


class ServiceApi:
    """Requests to one service.

    Args:
        http: exchanges that are answered at once.
        polls: exchanges that the service holds until a result is there; apart, so that they never keep others waiting.
        auth: gives the key.
        retry: how long to keep trying.
        poll_timeout: seconds for one poll.

    Attributes:
        billing: how long the service may ask for payment.
    """

    def __init__(
        self, http: HttpClient, polls: HttpClient, auth: Auth, *, retry: RetryPolicy, poll_timeout: float
    ) -> None:
        self.http = http
        self.auth = auth
        self.billing = BillingPause(0.0)
        self._polls = polls
        self._retry = retry
        self._poll_timeout = poll_timeout

    @property
    def host(self) -> str:
        """The service, as messages name it."""
        return self.http.host

    async def exchange(self, sent: Request, *, attempt: int = 1, over: HttpClient | None = None) -> Response:
        """One exchange with the current key; sent once more where the service rejects a token that has ended.

        Args:
            sent: the request.
            attempt: which attempt this is, for events.
            over: the HTTP client; default is the one for requests that are answered at once.

        Raises:
            TransportError: there is no usable response.
            APIStatusError: no token could be got for the key.
            ConfigError: the key has ended.
        """
        http = over or self.http
        key = await self.auth.current()
        response = await http.exchange(sent, key=key, attempt=attempt)
        if response.status == 401 and rejects_token(response):
            renewed = await self.auth.renewed(key)
            if renewed is not None:
                response = await http.exchange(sent, key=renewed, attempt=attempt)
        return response

    async def send(
        self,
        sent: Request,
        read: Callable[[Response], Read],
        *,
        retry: RetryPolicy | None = None,
        billing: BillingPause | None = None,
        retry_statuses: Callable[[int], bool] | None = None,
        key: Secret | None = None,
        held: bool = False,
        redirected: Callable[[Response], Read | None] | None = None,
    ) -> Read:
        """Sends a request until there is a final response, and reads it.

        Args:
            sent: the request.
            read: reads a 2xx response, such as `fields_of` or `request_id_of`; where it raises InvalidResponse, the
                request is sent again.
            retry: how long to keep trying; default is the configuration's policy.
            billing: how long the service may ask for payment; default is the client's.
            retry_statuses: which statuses are worth another attempt; default `is_retryable_status`.
            key: instead of the current key.
            held: whether the service may hold the request, as it holds polls.
            redirected: reads a redirection where it is what was asked for; None for any other response.

        Raises:
            APIStatusError: the last response was no success; `attempts` counts how often the request was sent.
            TransportError: there was no usable response within the retry policy.
        """
        policy = retry or self._retry
        http = self._polls if held else self.http

        async def attempt(attempts: Attempts) -> Read:
            def too_late() -> TimeoutExceeded:
                return TimeoutExceeded(
                    f"no response within the retry deadline of {policy.deadline:g} s ({attempts.number} attempt(s))"
                )

            try:
                async with time_limit(attempts.seconds_left, too_late):
                    if key is None:
                        response = await self.exchange(sent, attempt=attempts.number, over=http)
                    else:
                        response = await http.exchange(sent, key=key, attempt=attempts.number)
                place = None if redirected is None else redirected(response)
                if place is not None:
                    return place
                raise_for_status(response, attempts.number)
                return read(response)
            except TransportError as error:
                error.attempts = attempts.number
                raise

        def is_worth_another(error: BaseException) -> bool:
            if isinstance(error, APIStatusError):
                return _should_repeat(error, retry_statuses or is_retryable_status)
            return isinstance(error, TransportError)

        return await (billing or self.billing).around(lambda: with_retries(policy, attempt, is_worth_another))

    async def submit(self, number: int, sent: Request) -> Sent:
        """Sends a numbered request as `send` does, and says what became of it.

        Args:
            number: its sequence number.
            sent: the request; every repeat has the same number and bytes.

        Raises:
            APIStatusError, TransportError: it is unknown whether the number arrived.
        """
        try:
            return Sent(number, request_id=await self.send(sent, request_id_of))
        except APIStatusError as error:
            if is_retryable_status(error.status):  # every attempt ended so, and none is final
                raise
            return Sent(number, refusal=error)

    async def result(
        self,
        request_id: str,
        request_type: str,
        decode: Callable[[Result], Decoded],
        on_pending: OnPending | None = None,
    ) -> Decoded:
        """Waits for a future.

        Args:
            request_id: the future.
            request_type: what was asked for.
            decode: reads the result; where it raises InvalidResponse, the result is fetched again.
            on_pending: gets what the service says while the request is not done; what it raises ends the waiting.

        Raises:
            RequestFailed: the service failed the request, or lost it.
            APIStatusError, TransportError: polling itself was refused or kept failing.
        """
        with telemetry.lifecycle("tinkex.future", {"request_id": request_id, "request_type": request_type}):
            pending = FuturePoll(request_id, request_type, decode, self._poll_timeout, on_pending)

            async def poll(attempts: Attempts) -> Decoded:
                return await pending.poll(self._poll, self.is_alive, attempts)

            return await self.billing.around(lambda: with_retries(self._retry, poll, is_transient))

    async def _poll(self, sent: Request) -> Response:
        return await self.exchange(sent, over=self._polls)

    async def is_alive(self) -> bool:
        """Whether the service answers anything at all."""
        try:
            await self.http.exchange(request("GET", "/api/v1/healthz", timeout=_LIVENESS_TIMEOUT))
        except TransportError:
            return False
        return True


def is_retryable_status(status: int) -> bool:
    """Whether a later attempt may succeed: 408, 425, 429 and everything from 500 on."""
    return status in _RETRYABLE_CLIENT_ERRORS or status >= 500


def _should_repeat(error: APIStatusError, retry_statuses: Callable[[int], bool]) -> bool:
    """A service's own `x-should-retry` wins, except for 409, which is never sent again."""
    if error.status == _CONFLICT:
        return False
    return retry_statuses(error.status) if error.should_retry is None else error.should_retry


class PollPace:
    """Pauses between polls that the service does not hold."""

    def __init__(self) -> None:
        self._pause = _FIRST_PAUSE

    async def wait(self, took: float) -> None:
        """Waits before the next poll, longer each time.

        Args:
            took: seconds that the service took to say "not yet".
        """
        if took >= _HELD_SECONDS:
            self._pause = _FIRST_PAUSE
            return
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class FuturePoll(Generic[Decoded]):
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
        self._pace = PollPace()
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
            await self._pace.wait(loop.time() - started)

    def _next_poll(self) -> Request:
        fields: dict[str, Any] = {"request_id": self._request_id}
        if self._wants_payload:  # said only where it matters: strict older services do not know the field
            fields["allow_metadata_only"] = False
        headers = {"X-Tinker-Request-Type": self._request_type, "X-Tinker-Request-Iteration": str(self._polls)}
        self._polls += 1
        return request("POST", RETRIEVE_FUTURE, json=fields, accept=_ACCEPT, headers=headers, timeout=self._timeout)

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
