"""An answer that is read piece by piece, for bodies too large to be held."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

from tinkex_py.errors import ConnectionFailed, TimeoutExceeded
from tinkex_py.transport.answer import HttpAnswer, Secret
from tinkex_py.transport.failures import typed_failure
from tinkex_py.transport.request import HttpRequest

_MOST_OF_AN_ERROR = 1 << 16


class AnswerStream:
    """Status and headers of an answer whose body has not been read yet.

    Attributes:
        status: HTTP status code.
        headers: names in lower case.
        received: bytes of the body so far.
    """

    def __init__(self, response: Any, request: HttpRequest, secret: Secret) -> None:
        self.status: int = response.status_code
        self.headers: Mapping[str, str] = {name.lower(): value for name, value in response.headers.items()}
        self.received = 0
        self._response = response
        self._request = request
        self._secret = secret

    @property
    def length(self) -> int | None:
        """Bytes of the whole body, if they are told."""
        told = self.headers.get("content-length", "")
        return int(told) if told.isdecimal() else None

    async def pieces(self) -> AsyncGenerator[bytes, None]:
        """The body as it arrives, once. Not decompressed: its bytes are those that `length` and ranges count.

        Raises:
            ConnectionFailed: the body broke off.
            TimeoutExceeded: nothing came for the request's timeout.
        """
        async with aclosing(self._response.aiter_raw()) as body:
            while (piece := await self._next(body)) is not None:
                self.received += len(piece)
                yield piece
        if self.length is not None and self.received != self.length:
            raise ConnectionFailed(
                f"{self._request.description}: the answer has {self.received} of {self.length} bytes"
            )

    async def answer(self) -> HttpAnswer:
        """The answer as a whole, with at most the first 64 KiB of its body; for errors and redirections."""
        body = bytearray()
        async with aclosing(self.pieces()) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) >= _MOST_OF_AN_ERROR:
                    break
        return HttpAnswer(
            status=self.status,
            headers=self.headers,
            body=bytes(body[:_MOST_OF_AN_ERROR]),
            request=self._request.description,
            secret=self._secret,
        )

    async def _next(self, body: Any) -> bytes | None:
        try:
            async with asyncio.timeout(self._request.timeout):
                return await anext(body, None)
        except TimeoutError as error:
            raise TimeoutExceeded(
                f"{self._request.description}: nothing more came for {self._request.timeout:g} s"
            ) from error
        except Exception as error:
            failure = typed_failure(error, self._request)
            if failure is None:
                raise
            raise failure from error
