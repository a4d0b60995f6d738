"""What a request to one service needs: the current key, repetition where that helps, a pause where it must pay."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tinkex_py import telemetry
from tinkex_py.errors import APIStatusError, InvalidResponse, TimeoutExceeded, TransportError
from tinkex_py.retry import Attempts, RetryPolicy, with_retries
from tinkex_py.timeouts import time_limit
from tinkex_py.transport.auth import Auth, rejects_token
from tinkex_py.transport.billing import BillingPause
from tinkex_py.transport.codec import Result
from tinkex_py.transport.futures import OnPending, PendingResult, is_transient
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.request import Request, Secret, request
from tinkex_py.transport.response import Response, raise_for_status
from tinkex_py.unicode import REPLACED

Read = TypeVar("Read")
Decoded = TypeVar("Decoded")

_LIVENESS_TIMEOUT = 10.0
_CONFLICT = 409
_RETRYABLE_CLIENT_ERRORS = frozenset({408, 425, 429})


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
        if rejects_token(response):
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
            redirected: reads a redirection where it is what was asked for; None for any other response.

        Raises:
            APIStatusError: the last response was no success; `attempts` counts how often the request was sent.
            TransportError: there was no usable response within the retry policy.
        """
        policy = retry or self._retry

        async def attempt(attempts: Attempts) -> Read:
            def too_late() -> TimeoutExceeded:
                return TimeoutExceeded(
                    f"no response within the retry deadline of {policy.deadline:g} s ({attempts.number} attempt(s))"
                )

            try:
                async with time_limit(attempts.seconds_left, too_late):
                    if key is None:
                        response = await self.exchange(sent, attempt=attempts.number)
                    else:
                        response = await self.http.exchange(sent, key=key, attempt=attempts.number)
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
            pending = PendingResult(request_id, request_type, decode, self._poll_timeout, on_pending)

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


def fields_of(response: Response) -> dict[str, Any]:
    """The fields of a successful response; an empty body has none.

    Raises:
        InvalidResponse: it is no JSON object.
    """
    fields: object = response.json() if response.body.strip() else {}
    if not isinstance(fields, dict):
        raise InvalidResponse(f"{response.request} returned JSON that is no object")
    return cast("dict[str, Any]", fields)


def text_of(fields: Mapping[str, Any], name: str, path: str) -> str:
    """A text that a service must give, and that goes into later requests.

    Raises:
        InvalidResponse: there is none, or it cannot be sent.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidResponse(f"{path} returned no {name}")
    if not value.isprintable() or REPLACED in value:
        raise InvalidResponse(f"{path} returned a {name} that holds characters which cannot be sent")
    return value


def request_id_of(response: Response) -> str:
    """The future that a submission made.

    Raises:
        InvalidResponse: there is none.
    """
    fields = fields_of(response)
    given = fields.get("request_id")
    if isinstance(given, int) and not isinstance(given, bool):
        return str(given)
    return text_of(fields, "request_id", response.request)
