"""Requests that need no session, with retries and errors that distinguish a missing endpoint from a missing thing."""

import json as json_module
import re
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, cast
from urllib.parse import urlencode

from tinkex_py.errors import APIStatusError, NotFound, UnsupportedFeature
from tinkex_py.limits import RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.messages import NO_HEADERS, Response, request

_REDIRECTIONS = (301, 302, 303, 307, 308)
_NO_SUCH_METHOD = (405, 501)
# "Not Found", "404 page not found", and, from the embedded service, "GET /path: Not Found".
_ROUTER_WORDS = re.compile(r"(404 )?(page )?(not found)?|[a-z]+ /\S*: not found")


@dataclass(frozen=True)
class RestRequests:
    """Sends requests to one service.

    Args:
        api: the service.
        retry: how often and how long a request is repeated.
        ready: awaited before every request.
    """

    api: ServiceApi
    retry: RetryPolicy
    ready: Callable[[], Awaitable[None]]

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
        """Sends until there is a final response, and reads it as a JSON object; an empty one has no fields.

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
            APIStatusError, TransportError: it refused, or did not answer within the retry policy.
        """
        return await self._send(method, path, feature, query, json, headers, names_nothing=names_nothing)

    async def ask_where(self, path: str, feature: str) -> dict[str, Any]:
        """Like `ask` for a GET that returns the address of something; a redirection is read as one.

        Returns:
            `url` and, where given, `expires`.
        """

        def place_of(response: Response) -> Response | None:
            location = response.headers.get("location")
            if response.status not in _REDIRECTIONS or not location:
                return None
            place = {"url": location, "expires": _iso_date(response.headers.get("expires"))}
            return replace(response, status=200, body=json_module.dumps(place).encode())

        return await self._send("GET", path, feature, redirected=place_of)

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
        redirected: Callable[[Response], Response | None] | None = None,
    ) -> dict[str, Any]:
        await self.ready()
        given = {name: value for name, value in (query or {}).items() if value is not None}
        target = f"{path}?{urlencode(given)}" if given else path
        asking = request(method, target, json=json, headers=headers or NO_HEADERS, follow_redirects=redirected is None)
        try:
            response = await self.api.send(asking, _unread, retry=self.retry, redirected=redirected)
        except APIStatusError as error:
            if _means_no_endpoint(error, names_nothing=names_nothing):
                raise UnsupportedFeature(
                    f"{self.api.host} does not support {feature} ({method} {path} returned {error.status})"
                ) from error
            raise
        return fields_of(response)


def _unread(response: Response) -> Response:
    return response


def is_lost_success(error: NotFound) -> bool:
    """Whether a repeated DELETE found nothing any more: an earlier attempt did it and its response was lost."""
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
