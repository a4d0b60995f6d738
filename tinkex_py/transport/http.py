"""HTTP exchanges with the service: which connection, what is sent, what may run, and what failures mean."""

import asyncio
import contextlib
import contextvars
import urllib.request
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import replace
from types import MappingProxyType
from typing import Any
from urllib.parse import urlsplit

from tinkex_py.errors import ClientClosed, ConfigError, InvalidData, TimeoutExceeded, TransportError
from tinkex_py.telemetry import lifecycle, request_headers
from tinkex_py.transport.answer import HttpAnswer, Secret, raise_for_status
from tinkex_py.transport.connection_pool import ConnectionPool
from tinkex_py.transport.failures import forget_request, require_whole_body, typed_failure
from tinkex_py.transport.http_connection import (
    HttpConnection,
    connection_to_app,
    load_tls_context,
    new_connection,
    send_and_follow,
    send_once,
)
from tinkex_py.transport.request import (
    USER_AGENT,
    Content,
    HttpRequest,
    SecretText,
    checked_base_url,
    checked_key,
    describe,
    encoded_json,
    join_url,
    length_of,
    merged_headers,
    parts_of,
    same_origin,
)
from tinkex_py.transport.stream import AnswerStream
from tinkex_py.transport.tls import SharedTlsContext

__all__ = ["HttpAnswer", "HttpClient", "Secret", "raise_for_status"]

_NO_HEADERS: Mapping[str, str] = MappingProxyType({})
_SHORTEST_KEY = 8


class HttpClient:
    """Exchanges with one service, over a bounded number of connections.

    Constructing it does no I/O. It belongs to the event loop of its first exchange; close it there.

    Args:
        base_url: where the service is; a path in it is kept in front of every path.
        api_key: sent as `X-API-Key` by exchanges that are given no key of their own; never shown.
        timeout: seconds for one exchange, from having a connection slot to the last byte.
        max_connections: exchanges at a time; more wait in their order. Neither `http_client` nor `asgi_app` obeys it.
        headers: sent with every request; their values are left out of messages where they are long enough to be keys.
        http_client: a client with `httpx.AsyncClient`'s interface to use instead of our own connections. It stays
            its owner's to close. (httpx up to 0.28 loses connections of cancelled requests; httpx2 does not.)
        asgi_app: a service in this process, called directly.

    Raises:
        ConfigError: a setting cannot be used.
    """

    def __init__(
        self,
        *,
        base_url: str,
        api_key: str | SecretText | None = None,
        timeout: float = 60.0,
        max_connections: int = 16,
        headers: Mapping[str, str] = _NO_HEADERS,
        http_client: object | None = None,
        asgi_app: object | None = None,
    ) -> None:
        if http_client is not None and asgi_app is not None:
            raise ConfigError("http_client and asgi_app exclude each other: give one of them")
        if not timeout > 0:
            raise ConfigError(f"timeout must be a positive number of seconds, not {timeout!r}")
        if max_connections < 1:
            raise ConfigError(f"max_connections must be at least 1, not {max_connections!r}")
        self._base = checked_base_url(base_url)
        self._secret = checked_key(api_key)
        self._timeout = timeout
        self._headers = merged_headers(headers)
        self._secret_headers = [value for value in self._headers.values() if len(value) >= _SHORTEST_KEY]
        self._http_client = http_client
        self._asgi_app = asgi_app
        self._may_trace = True
        self._pool = ConnectionPool(self._open_connection, max_connections)
        self._tls = SharedTlsContext(load_tls_context)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._running: set[asyncio.Timeout] = set()
        self._elsewhere: set[HttpClient] = set()
        self._nothing_runs = asyncio.Event()
        self._nothing_runs.set()
        self._closed = False

    def __repr__(self) -> str:
        return f"HttpClient(base_url={self._base.geturl()!r}, closed={self._closed})"

    def __reduce__(self) -> str | tuple[Any, ...]:
        raise TypeError("an HttpClient holds connections of this process: make a new one instead of pickling it")

    @property
    def host(self) -> str:
        """Host (and port) of the service, as messages name it."""
        return self._base.netloc

    async def exchange(
        self,
        method: str,
        path: str,
        *,
        content: Content | None = None,
        json: object | None = None,
        content_type: str | None = None,
        accept: str = "application/json",
        headers: Mapping[str, str] = _NO_HEADERS,
        timeout: float | None = None,
        attempt: int = 1,
        key: Secret | None = None,
        follow_redirects: bool = True,
    ) -> HttpAnswer:
        """Send one request and read its whole answer; no retry.

        An answer that is the same to the byte as one that came before over its connection may be a copy of that: the
        connection is given up, and the request is sent once more over a fresh one.

        Args:
            method: HTTP method.
            path: path below `base_url`, with its query if it has one.
            content: body, or its parts; do not change it until this returns.
            json: a value to send as JSON instead of `content`.
            content_type: media type of the body; for `json` it is known.
            accept: media types of the answer.
            headers: more headers; they win over those of the client.
            timeout: seconds, instead of the client's.
            attempt: which attempt of the caller this is, for events.
            key: sent as `X-API-Key` instead of the client's.
            follow_redirects: within the origin of `base_url`, where it does not change the method.

        Returns:
            The answer, whatever its status.

        Raises:
            ConnectionFailed: nobody answered, or the answer broke off.
            TimeoutExceeded: the answer was not complete in time.
            InvalidResponse: the answer is not HTTP, or cannot be decompressed.
            ClientClosed: this client is closed, or belongs to another event loop.
            InvalidData: the path, a header or the body cannot be sent.
        """
        self._require_usable()
        secret = (self._secret if key is None else key).with_others(self._secret_headers)
        request = self._request(method, path, content, json, content_type, accept, headers, timeout, secret)
        metadata = {"method": request.method, "path": urlsplit(request.url).path, "attempt": attempt}
        send = send_and_follow if follow_redirects else send_once

        async def ask(*, fresh: bool) -> HttpAnswer | None:
            async with self._connection(fresh=fresh) as connection:
                with lifecycle("tinkex.http.request", metadata) as measurements:
                    sent = self._traced(request)
                    response = await self._send(lambda: send(connection, sent), sent)
                    answer = self._answer(response, request, secret)
                    measurements.update(status=answer.status, bytes=len(answer.body))
                return None if connection.is_in_doubt(response) else answer

        async with self._stoppable():
            # A DELETE that is done twice is answered otherwise the second time, so it must never be in doubt.
            answer = await ask(fresh=request.method == "DELETE") or await ask(fresh=True)
            assert answer is not None, "nothing came before the answer over a fresh connection"
            return answer

    @asynccontextmanager
    async def stream(
        self,
        path: str,
        *,
        headers: Mapping[str, str] = _NO_HEADERS,
        timeout: float | None = None,
        attempt: int = 1,
        key: Secret | None = None,
    ) -> AsyncGenerator[AnswerStream, None]:
        """Ask for something large, and read it piece by piece; no retry, and no redirection is followed.

        A service in this process is the exception: its answer is complete, and in memory, before it can be read.

        Args:
            path: path below `base_url`, with its query if it has one.
            headers: more headers; they win over those of the client.
            timeout: seconds until the answer begins, and then between two pieces, instead of the client's.
            attempt: which attempt of the caller this is, for events.
            key: sent as `X-API-Key` instead of the client's.

        Raises:
            ConnectionFailed, TimeoutExceeded, InvalidResponse, ClientClosed, InvalidData: as `exchange`.
        """
        self._require_usable()
        sent = {"Accept-Encoding": "identity", **headers}
        secret = (self._secret if key is None else key).with_others(self._secret_headers)
        request = self._request("GET", path, None, None, None, "*/*", sent, timeout, secret)
        metadata = {"method": request.method, "path": urlsplit(request.url).path, "attempt": attempt}
        # Fresh, because what is read piece by piece cannot be compared with the answers before.
        async with self._stoppable(), self._connection(fresh=True) as connection:
            with lifecycle("tinkex.http.request", metadata) as measurements:
                traced = self._traced(request)
                response = await self._send(lambda: send_once(connection, traced, stream=True), traced)
                answer = AnswerStream(response, request, secret)
                try:
                    yield answer
                finally:
                    measurements.update(status=answer.status, bytes=answer.received)
                    await response.aclose()

    @asynccontextmanager
    async def towards(self, url: str, *, key: Secret | None = None) -> AsyncGenerator[tuple["HttpClient", str], None]:
        """A client of its own for an address that the service named, and the path to ask it for.

        The key and the headers of this client go along only within the origin of `base_url`. (An `http_client` of the
        user's own sends whatever headers it has itself.)

        Args:
            url: the address.
            key: goes along instead of this client's.

        Raises:
            ConfigError: it is no http(s) address.
            ClientClosed: this client is closed.
        """
        self._require_usable()
        parts = urlsplit(url)
        base = checked_base_url(f"{parts.scheme}://{parts.netloc}")
        at_home = same_origin(base.geturl(), self._base.geturl())
        client = HttpClient(
            base_url=base.geturl(),
            api_key=(self._secret if key is None else key).reveal() if at_home else None,
            timeout=self._timeout,
            max_connections=1,
            headers=self._headers if at_home else _NO_HEADERS,
            http_client=self._http_client,
            asgi_app=self._asgi_app if at_home else None,
        )
        client._may_trace = at_home
        self._elsewhere.add(client)
        try:
            yield client, f"{parts.path}?{parts.query}" if parts.query else parts.path
        finally:
            self._elsewhere.discard(client)
            await client.aclose()

    async def aclose(self) -> None:
        """Close all connections; exchanges under way raise ClientClosed. Calling it again does nothing.

        Raises:
            ClientClosed: the client belongs to another event loop, which must close it.
        """
        if self._loop is None:
            self._closed = True
            return
        self._require_own_loop()
        self._closed = True
        for scope in self._running:
            if not scope.expired():
                scope.reschedule(self._loop.time())
        for client in list(self._elsewhere):
            await client.aclose()
        await self._nothing_runs.wait()
        await self._pool.aclose()
        await self._tls.aclose()

    # What may run

    def _require_usable(self) -> None:
        if self._closed:
            raise ClientClosed("this client is closed; make a new one")
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
        self._require_own_loop()

    def _require_own_loop(self) -> None:
        if asyncio.get_running_loop() is not self._loop:
            raise ClientClosed(
                "this client belongs to the event loop of its first request, and this is another one: "
                "make one client per event loop, and close it there"
            )

    @asynccontextmanager
    async def _stoppable(self) -> AsyncGenerator[None, None]:
        """Let `aclose` stop the block, wherever it waits."""
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._running.add(scope)
                self._nothing_runs.clear()
                try:
                    yield
                finally:
                    self._running.discard(scope)
                    if not self._running:
                        self._nothing_runs.set()
        except TimeoutError as error:
            if isinstance(error, TransportError) or not scope.expired():
                raise
            raise ClientClosed("this client was closed while the request was under way") from None

    # Connections

    def _connection(self, *, fresh: bool) -> AbstractAsyncContextManager[HttpConnection]:
        if self._http_client is not None:
            return contextlib.nullcontext(HttpConnection(self._http_client, ours=False))
        if self._asgi_app is not None:
            return contextlib.aclosing(connection_to_app(self._asgi_app))
        return self._pool.connection(fresh=fresh)

    async def _open_connection(self) -> HttpConnection:
        return new_connection(await self._tls.get(with_certificates=self._needs_certificates()))

    def _needs_certificates(self) -> bool:
        return self._base.scheme == "https" or bool(urllib.request.getproxies())

    # One exchange

    def _request(
        self,
        method: str,
        path: str,
        content: Content | None,
        json: object | None,
        content_type: str | None,
        accept: str,
        headers: Mapping[str, str],
        timeout: float | None,
        secret: Secret,
    ) -> HttpRequest:
        method = method.upper()
        description = describe(method, path, self.host)
        if json is not None:
            if content is not None:
                raise InvalidData(f"{description}: give content or json, not both")
            content, content_type = encoded_json(json, description), "application/json"
        sent = {"User-Agent": USER_AGENT, "Accept": accept}
        parts = None if content is None else parts_of(content)
        if parts is not None:
            sent["Content-Type"] = content_type or "application/octet-stream"
            # httpx would send a body from a generator in HTTP chunks; some servers refuse those.
            sent["Content-Length"] = str(length_of(parts))
        key = {"X-API-Key": secret.reveal()} if secret else {}
        return HttpRequest(
            method=method,
            url=join_url(self._base, path),
            headers=merged_headers(sent, self._headers, headers, key),
            content=parts,
            timeout=self._timeout if timeout is None else timeout,
            description=description,
        )

    def _traced(self, request: HttpRequest) -> HttpRequest:
        """The request with what observers send along, such as a trace context."""
        more = request_headers() if self._may_trace else _NO_HEADERS
        return replace(request, headers=merged_headers(more, request.headers)) if more else request

    async def _send(self, send: Callable[[], Awaitable[Any]], request: HttpRequest) -> Any:
        run = _in_fresh_context if self._asgi_app is not None else _here
        try:
            async with asyncio.timeout(request.timeout):
                return await run(send)
        except TimeoutError as error:
            raise TimeoutExceeded(f"{request.description} was not answered within {request.timeout:g} s") from error
        except Exception as error:
            failure = typed_failure(error, request)
            if failure is None:
                raise
            forget_request(error)
            raise failure from error

    def _answer(self, response: Any, request: HttpRequest, secret: Secret) -> HttpAnswer:
        answer = HttpAnswer(
            status=response.status_code,
            headers={name.lower(): value for name, value in response.headers.items()},
            body=response.content,
            request=request.description,
            secret=secret,
        )
        if self._asgi_app is not None:
            require_whole_body(answer, request)
        return answer


async def _here(send: Callable[[], Awaitable[Any]]) -> Any:
    return await send()


async def _in_fresh_context(send: Callable[[], Awaitable[Any]]) -> Any:
    """Run the service in this process as if it were another one: the caller's contextvars do not reach it."""
    failures: list[Exception] = []

    async def outcome() -> Any:
        try:
            return await send()
        except Exception as error:  # noqa: BLE001  (raised below, outside of the task group, which would wrap it)
            failures.append(error)

    async with asyncio.TaskGroup() as group:
        task = group.create_task(outcome(), context=contextvars.Context(), name="tinkex.http.in_process")
    if failures:
        raise failures[0]
    return task.result()
