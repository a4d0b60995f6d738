"""Requests that need no session, with retries and a typed error for a missing endpoint; lists that span pages."""

import json as json_module
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import Any, TypeVar
from urllib.parse import urlencode

from tinkex_py.arguments import check_count
from tinkex_py.client.arguments import given
from tinkex_py.client.unsupported import means_no_endpoint
from tinkex_py.errors import APIStatusError, UnsupportedFeature
from tinkex_py.limits import RetryPolicy
from tinkex_py.transport.api import ServiceApi
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.messages import NO_HEADERS, Response, request
from tinkex_py.types.rest import Cursor

Item = TypeVar("Item")
Page = tuple[Sequence[Item], Cursor | None]

DEFAULT_PAGE_SIZE = 100
_REDIRECTIONS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class RestRequests:
    """Sends requests to one service.

    Args:
        api: the service.
        retry: the retry policy.
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
        redirected: Callable[[Response], Response | None] | None = None,
    ) -> dict[str, Any]:
        """Sends a request until there is a final response, and returns the fields of its JSON object.

        Args:
            method: HTTP method.
            path: path below the service's address.
            feature: name of the feature, for the error of a service that lacks it.
            query: parameters; those that are None are omitted.
            json: body.
            headers: more headers.
            names_nothing: the path names no run, checkpoint or session, so that 404 can only mean the endpoint.
            redirected: as for `ServiceApi.send`.

        Raises:
            UnsupportedFeature: the service does not have this endpoint.
            NotFound: there is no such run, checkpoint or session.
            APIStatusError, TransportError: the request was refused, or has no response within the retry policy.
        """
        await self.ready()
        parameters = given(**(query or {}))
        target = f"{path}?{urlencode(parameters)}" if parameters else path
        asking = request(method, target, json=json, headers=headers or NO_HEADERS, follow_redirects=redirected is None)
        try:
            response = await self.api.send(asking, lambda response: response, retry=self.retry, redirected=redirected)
        except APIStatusError as error:
            if means_no_endpoint(error, names_nothing=names_nothing):
                raise UnsupportedFeature(
                    f"{self.api.host} does not support {feature} ({method} {path} returned {error.status})"
                ) from error
            raise
        return fields_of(response)

    async def ask_where(self, path: str, feature: str) -> dict[str, Any]:
        """Sends a GET request whose response, or redirection, is a URL; returns `url` and, if given, `expires`."""
        return await self.ask("GET", path, feature, redirected=_url_of_redirection)


async def all_items(
    fetch: Callable[[int, int], Awaitable[Page[Item]]], key: Callable[[Item], str], page_size: int
) -> AsyncGenerator[Item, None]:
    """Yields every item of a list once, page by page.

    Items that are added in the meantime move others to a later page, so items that were yielded are skipped. A page
    without a new item ends the list: a service may ignore the offset.

    Args:
        fetch: requests one page by limit and offset.
        key: identifies an item.
        page_size: items per request.
    """
    page_size = check_count("page_size", page_size, least=1)
    seen: set[str] = set()
    offset = 0
    while True:
        items, cursor = await fetch(page_size, offset)
        fresh = [item for item in items if key(item) not in seen]
        for item in fresh:
            seen.add(key(item))
            yield item
        offset += len(items)
        # Without a cursor, a service that returns more than the page size returns everything at once.
        is_last = len(items) != page_size if cursor is None else offset >= cursor.total_count
        if is_last or not fresh:
            return


def _url_of_redirection(response: Response) -> Response | None:
    location = response.headers.get("location")
    if response.status not in _REDIRECTIONS or not location:
        return None
    fields = {"url": location, "expires": _iso_date(response.headers.get("expires"))}
    return replace(response, status=200, body=json_module.dumps(fields).encode())


def _iso_date(http_date: str | None) -> str | None:
    try:
        return None if http_date is None else parsedate_to_datetime(http_date).isoformat()
    except ValueError:
        return None
