"""Requests that need no session, with retries and errors that tell a missing endpoint from a missing thing."""

import json as json_module
import re
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import urlencode

from tinkex_py.client.connection import Connection
from tinkex_py.errors import APIStatusError, InvalidResponse, NotFound, UnsupportedFeature
from tinkex_py.transport.http import HttpAnswer, HttpClient
from tinkex_py.transport.retry import RetryPolicy, send_with_retry

_REDIRECTIONS = (301, 302, 303, 307, 308)
_NO_SUCH_METHOD = (405, 501)
# "Not Found", "404 page not found", and, from the embedded service, "GET /path: Not Found".
_ROUTER_WORDS = re.compile(r"(404 )?(page )?(not found)?|[a-z]+ /\S*: not found")


@dataclass(frozen=True)
class RestRequests:
    """Sends requests to one service.

    Args:
        connection: the service.
        retry: how often and how long a request is repeated.
        ready: awaited before every request.
    """

    connection: Connection
    retry: RetryPolicy
    ready: Callable[[], Awaitable[None]]

    @property
    def host(self) -> str:
        """The service, as messages name it."""
        return self.connection.http.host

    @asynccontextmanager
    async def towards(self, url: str) -> AsyncGenerator[tuple[HttpClient, str], None]:
        """As `HttpClient.towards`, with the key of the moment."""
        key = await self.connection.keys.current()
        async with self.connection.http.towards(url, key=key) as found:
            yield found

    async def ask(
        self,
        method: str,
        path: str,
        feature: str,
        *,
        query: Mapping[str, object] | None = None,
        json: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        names_nothing: bool = False,
    ) -> dict[str, Any]:
        """Sends until there is a final answer, and reads it as a JSON object; an empty answer is an empty one.

        Args:
            method: HTTP method.
            path: path below the service's address.
            feature: what is asked for, for the error of a service that does not have it.
            query: parameters; those that are None are left out.
            json: body.
            headers: more headers.
            names_nothing: the path names no run, checkpoint or session, so that 404 can only mean the endpoint.

        Raises:
            UnsupportedFeature: the service does not have this endpoint.
            NotFound: it has no such run, checkpoint or session.
            APIStatusError, TransportError: it refused, or nobody answered within the retry policy.
        """
        answer = await self._send(method, path, feature, query, json, headers, names_nothing=names_nothing)
        return _object(answer)

    async def ask_where(self, path: str, feature: str) -> dict[str, Any]:
        """Like `ask` for a GET that is answered with the address of something; a redirection is read as one.

        Returns:
            `url` and, where told, `expires`.
        """

        def as_fields(answer: HttpAnswer) -> HttpAnswer:
            location = answer.headers.get("location")
            if answer.status not in _REDIRECTIONS or not location:
                return answer
            fields = {"url": location, "expires": _iso_date(answer.headers.get("expires"))}
            return replace(answer, status=200, body=json_module.dumps(fields).encode())

        answer = await self._send("GET", path, feature, read=as_fields, follow_redirects=False)
        return _object(answer)

    async def _send(
        self,
        method: str,
        path: str,
        feature: str,
        query: Mapping[str, object] | None = None,
        json: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        names_nothing: bool = False,
        read: Callable[[HttpAnswer], HttpAnswer] = lambda answer: answer,
        follow_redirects: bool = True,
    ) -> HttpAnswer:
        await self.ready()
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path

        async def send(attempt: int) -> HttpAnswer:
            answer = await self.connection.exchange(
                method, target, json=json, headers=headers or {}, attempt=attempt, follow_redirects=follow_redirects
            )
            return read(answer)

        try:
            return await send_with_retry(self.retry, send)
        except APIStatusError as error:
            if _means_no_endpoint(error, names_nothing=names_nothing):
                raise UnsupportedFeature(
                    f"{self.host} cannot do this: {feature} ({method} {path} was answered {error.status})"
                ) from error
            raise


def is_lost_success(error: NotFound) -> bool:
    """Whether a repeated DELETE found nothing any more: an earlier attempt did it and its answer was lost."""
    return error.attempts > 1


def _means_no_endpoint(error: APIStatusError, *, names_nothing: bool) -> bool:
    if error.status in _NO_SUCH_METHOD or error.code == "unsupported_feature":
        return True
    if error.status != 404:
        return False
    # Routers answer 404 with their own words; a service that looked for a thing says what it did not find.
    detail = error.body
    if isinstance(detail, dict):
        detail = cast("dict[str, object]", detail).get("detail", "")
    words = detail.strip().lower() if isinstance(detail, str) else None
    return names_nothing or (words is not None and _ROUTER_WORDS.fullmatch(words) is not None)


def _iso_date(http_date: str | None) -> str | None:
    try:
        return None if http_date is None else parsedate_to_datetime(http_date).isoformat()
    except ValueError:
        return None


def _object(answer: HttpAnswer) -> dict[str, Any]:
    fields: object = answer.json() if answer.body.strip() else {}
    if not isinstance(fields, dict):
        raise InvalidResponse(f"{answer.request} was answered with JSON that is no object")
    return cast("dict[str, Any]", fields)
