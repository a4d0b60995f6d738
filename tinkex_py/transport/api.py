"""Requests to one service: sends them with the current key, retries them, and polls futures.

A future is the id of a request that the service has accepted; its result is polled.
"""

import asyncio
import json
from collections.abc import Callable, Mapping
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
    TinkexError,
    TransportError,
)
from tinkex_py.limits import Attempts, BillingPause, RetryPolicy, time_limit, with_retries
from tinkex_py.transport.auth import Auth, rejects_token
from tinkex_py.transport.decoding import Result, request_id_of
from tinkex_py.transport.encoding import PROTOBUF
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.messages import Request, Response, Secret, request
from tinkex_py.transport.secrecy import cut_off

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
# A service that responds "pending" sooner than this does not hold polls; then the client pauses between them.
_HELD_SECONDS = 1.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_MOST_BAD_REQUESTS = 2
_LONGEST_DETAIL = 1000
_LONGEST_METADATA = 4096
_LOST_STATUSES = frozenset({404, 410})
_TRANSIENT_STATUSES = frozenset({400, 425, 429})

OnPending = Callable[[Mapping[str, Any]], None]
"""Called with the fields of every response that says "pending"; its exceptions end the polling."""


@dataclass(frozen=True)
class Sent:
    """The outcome of one numbered request: accepted or finally refused. Either spends the number.

    Attributes:
        number: the sequence number.
        request_id: the future, if the request was accepted.
        refusal: the final refusal, if it was not.
    """

    number: int
    request_id: str = ""
    refusal: APIStatusError | None = None


class ServiceApi:
    """Requests to one service.

    Args:
        http: sends requests that get a response at once.
        polls: sends polls, which the service may hold; separate, so that they never delay other requests.
        auth: returns the key.
        retry: how long and how often to try.
        poll_timeout: seconds for one poll.

    Attributes:
        billing: limits how long requests wait while the service asks for payment.
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
        """Host (and port) of the service, for messages."""
        return self.http.host

    async def exchange(self, sent: Request, *, attempt: int = 1, over: HttpClient | None = None) -> Response:
        """Sends a request once with the current key; a second time if the service rejects an expired token.

        Args:
            sent: the request.
            attempt: number of the attempt, for events.
            over: the HTTP client; by default the one for requests that get a response at once.

        Raises:
            TransportError: there is no usable response.
            APIStatusError: the key could not be exchanged for a token.
            ConfigError: the key has expired.
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
        """Sends a request until there is a final response, and parses it.

        Args:
            sent: the request.
            read: parses a 2xx response, such as `fields_of` or `request_id_of`; if it raises InvalidResponse, the
                request is repeated.
            retry: how long and how often to try; by default the policy of the configuration.
            billing: limits the waits for payment; by default the limit of the client.
            retry_statuses: whether a status is worth another attempt; by default `is_retryable_status`.
            key: replaces the current key.
            held: whether the service may hold the request, like a poll.
            redirected: parses an expected redirect, and returns None for any other response.

        Raises:
            APIStatusError: the last response was not 2xx; `attempts` counts how often the request was sent.
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
                target = None if redirected is None else redirected(response)
                if target is not None:
                    return target
                if not response.is_success:
                    raise status_error(response, attempts.number)
                return read(response)
            except TransportError as error:
                error.attempts = attempts.number
                cut_off(error)  # a response may quote the key
                raise

        def is_worth_another(error: BaseException) -> bool:
            if isinstance(error, APIStatusError):
                return _should_repeat(error, retry_statuses or is_retryable_status)
            return isinstance(error, TransportError)

        return await (billing or self.billing).around(lambda: with_retries(policy, attempt, is_worth_another))

    async def submit(self, number: int, sent: Request) -> Sent:
        """Sends a numbered request as `send` does, and returns its outcome.

        Args:
            number: the sequence number.
            sent: the request; every attempt has the same number and bytes.

        Raises:
            APIStatusError, TransportError: it is unknown whether the number arrived.
        """
        try:
            return Sent(number, request_id=await self.send(sent, request_id_of))
        except APIStatusError as error:
            if is_retryable_status(error.status):  # the last attempt, but not final
                raise
            return Sent(number, refusal=error)

    async def result(
        self,
        request_id: str,
        request_type: str,
        decode: Callable[[Result], Decoded],
        on_pending: OnPending | None = None,
    ) -> Decoded:
        """Polls a future until it is done, and returns its result.

        Args:
            request_id: the future.
            request_type: type of the request, for events and errors.
            decode: parses the result; if it raises InvalidResponse, the result is fetched again.
            on_pending: see `OnPending`.

        Raises:
            RequestFailed: the service failed the request.
            ResultLost: the service no longer knows the future.
            APIStatusError, TransportError: polling was refused, or kept failing.
        """
        with telemetry.lifecycle("tinkex.future", {"request_id": request_id, "request_type": request_type}):
            future = _Future(self, request_id, request_type, decode, on_pending)
            try:
                return await self.billing.around(lambda: with_retries(self._retry, future.poll, _is_transient))
            except TinkexError as error:
                cut_off(error)
                raise

    async def poll(self, fields: Mapping[str, Any], headers: Mapping[str, str]) -> Response:
        """Asks once for the result of a future; the service may hold the request."""
        sent = request(
            "POST", RETRIEVE_FUTURE, json=fields, accept=_ACCEPT, headers=headers, timeout=self._poll_timeout
        )
        return await self.exchange(sent, over=self._polls)

    async def is_alive(self) -> bool:
        """Whether the service responds to a health check."""
        try:
            await self.http.exchange(request("GET", "/api/v1/healthz", timeout=_LIVENESS_TIMEOUT))
        except TransportError:
            return False
        return True


def is_retryable_status(status: int) -> bool:
    """Whether a later attempt may succeed: 408, 425, 429, and 500 and above."""
    return status in _RETRYABLE_CLIENT_ERRORS or status >= 500


def _should_repeat(error: APIStatusError, retry_statuses: Callable[[int], bool]) -> bool:
    # The service's own `x-should-retry` takes precedence, except for 409, which is never repeated.
    if error.status == _CONFLICT:
        return False
    return retry_statuses(error.status) if error.should_retry is None else error.should_retry


class PollPace:
    """Pauses between polls that the service does not hold."""

    def __init__(self) -> None:
        self._pause = _FIRST_PAUSE

    async def wait(self, took: float) -> None:
        """Waits before the next poll, each time longer.

        Args:
            took: seconds that the service took to respond "pending".
        """
        if took >= _HELD_SECONDS:
            self._pause = _FIRST_PAUSE
            return
        await asyncio.sleep(self._pause)
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)


class _Future(Generic[Decoded]):
    """One future, and what its polls have returned so far. The arguments are those of `ServiceApi.result`."""

    def __init__(
        self,
        api: ServiceApi,
        request_id: str,
        request_type: str,
        decode: Callable[[Result], Decoded],
        on_pending: OnPending | None,
    ) -> None:
        self._api = api
        self._request_id = request_id
        self._request_type = request_type
        self._decode = decode
        self._on_pending = on_pending
        self._polls = 0
        self._pace = PollPace()
        self._bad_requests = 0
        self._wants_payload = False
        self._queue_state: object = None

    async def poll(self, attempts: Attempts) -> Decoded:
        """Polls until the future is done; every "pending" response restarts the attempts of the retry policy.

        Raises:
            RequestFailed, APIStatusError, TransportError: as `ServiceApi.result`; `_is_transient` says whether another
                poll may succeed.
        """
        now = asyncio.get_running_loop().time
        while True:
            started = now()
            fields: dict[str, Any] = {"request_id": self._request_id}
            if self._wants_payload:  # only if needed: strict older services reject this field
                fields["allow_metadata_only"] = False
            headers = {"X-Tinker-Request-Type": self._request_type, "X-Tinker-Request-Iteration": str(self._polls)}
            self._polls += 1
            try:
                response = await self._api.poll(fields, headers)
            except TimeoutExceeded as error:
                # A poll without any response, of a service that is alive, is only held for longer.
                if error.response_began or not await self._api.is_alive():
                    raise
                attempts.progressed()
                continue
            result = self._finished(response)
            if result is not None:
                return self._decode(result)
            attempts.progressed()
            await self._pace.wait(now() - started)

    def _finished(self, response: Response) -> Result | None:
        """Returns the result; None if the future is pending."""
        if response.is_success and response.media_type == PROTOBUF:
            return Result(response.body, None)
        if response.status == 408:
            self._report_pending(_object_of(response))
            return None
        if response.status in _LOST_STATUSES:
            raise self._lost(response)
        if response.status in (400, 422):
            self._fail_or_poll_again(response)
        if not response.is_success:
            raise status_error(response)
        fields = _unwrapped(response.json())
        if not isinstance(fields, dict):
            raise InvalidResponse(f"the result of {self._request_type} is not a JSON object")
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
        # Some services return 400 or 422 if the request itself failed; a few return a wrong 400 once.
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
            f"{self._request_id!r}), so it is unknown whether the request took effect. Request a sample again; replace "
            "a training client with service.create_training_client_from_state(path, with_optimizer=True), from its "
            "last checkpoint",
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


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, APIStatusError):
        return error.status >= 500 or error.status in _TRANSIENT_STATUSES
    if isinstance(error, InvalidResponse) and error.is_too_large:
        return False
    return isinstance(error, TransportError)


def _object_of(response: Response) -> dict[str, Any]:
    try:
        fields: object = response.json()
    except InvalidResponse:
        return {}
    return cast("dict[str, Any]", fields) if isinstance(fields, dict) else {}


def _unwrapped(fields: object) -> object:
    # Some services nest the result as `{"status": "completed", "result": {...}}`.
    if isinstance(fields, dict):
        given = cast("dict[str, Any]", fields)
        if given.get("status") == "completed" and isinstance(given.get("result"), dict):
            return given["result"]
    return cast("object", fields)
