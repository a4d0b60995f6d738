"""Waits for many samples with one long poll, if the service supports it (protocol: `retrieve_futures`)."""

import asyncio
from collections.abc import AsyncGenerator, Mapping
from contextlib import asynccontextmanager
from typing import Any, cast

from tinkex_py.client.session import ClientSession
from tinkex_py.errors import APIStatusError, ClientClosed, InvalidResponse, TinkexError
from tinkex_py.transport.api import PollPace, is_retryable_status
from tinkex_py.transport.decoding import fields_of
from tinkex_py.transport.messages import Request, Response, request

_PATH = "/api/v1/retrieve_futures"
_ACKNOWLEDGEMENT_TIMEOUT = 5.0
_UNSUPPORTED_STATUSES = frozenset({404, 405, 501})


class SampleCompletions:
    """Reports when the samples of one sampling client are complete.

    One task polls for all of them. If the service lacks the endpoint that it announces, every sample is polled by
    itself.
    """

    def __init__(self, session: ClientSession, sampling_session_id: str) -> None:
        self._session = session
        self._target = {
            "type": "sampling_session",
            "sampling_session_id": sampling_session_id,
            "cloned_sampler_id": 0,
        }
        self._available = True
        self._waiting: dict[str, asyncio.Future[None]] = {}
        self._finished_early: set[str] = set()  # complete before the response to their submission
        self._read: list[str] = []
        self._cursor = 0
        self._pace = PollPace()
        self._poller: asyncio.Task[None] | None = None

    @asynccontextmanager
    async def awaited(self, request_id: str) -> AsyncGenerator[None]:
        """Waits until a sample is complete, or can only be polled by itself; the block reads its result.

        Raises:
            APIStatusError, TransportError: the service refused the poll, or it failed within the retry policy.
            ClientClosed: the service client was closed.
        """
        if self._is_used:
            await self._wait(request_id)
        yield
        if self._is_used:
            self._read.append(request_id)
            self._poll_in_background()

    @property
    def _is_used(self) -> bool:
        return self._available and self._session.config.sample_use_retrieve_futures

    async def _wait(self, request_id: str) -> None:
        if request_id in self._finished_early:
            self._finished_early.remove(request_id)
            return
        done = self._waiting[request_id] = asyncio.get_running_loop().create_future()
        self._poll_in_background()
        try:
            await done
        finally:
            self._waiting.pop(request_id, None)

    def _poll_in_background(self) -> None:
        if self._poller is None or self._poller.done():
            self._poller = self._session.start_task(self._poll(), "tinkex.sample_completions")

    async def _poll(self) -> None:
        failure: TinkexError = ClientClosed("the service client is closed: create a new one")
        try:
            while self._available and (self._waiting or self._read):
                await self._poll_once()
        except TinkexError as error:
            if isinstance(error, APIStatusError) and error.status in _UNSUPPORTED_STATUSES:
                self._available = False
                for request_id in list(self._waiting):
                    self._finish(request_id)
            failure = error
        finally:
            for done in self._waiting.values():
                if not done.done():
                    done.set_exception(failure)
            self._waiting.clear()

    async def _poll_once(self) -> None:
        read, waits = list(self._read), bool(self._waiting)
        started = asyncio.get_running_loop().time()
        completions, self._cursor = await self._session.api.send(
            self._next_poll(read, waits),
            _completions_of,
            held=waits,
            retry_statuses=lambda status: status in (400, 409) or is_retryable_status(status),
        )
        del self._read[: len(read)]
        for request_id in completions:
            self._finish(request_id)
        if completions:
            self._pace = PollPace()
        elif waits:
            await self._pace.wait(asyncio.get_running_loop().time() - started)

    def _next_poll(self, read: list[str], waits: bool) -> Request:
        fields: dict[str, Any] = {
            "target": self._target,
            "prev_cursor": self._cursor,
            "retrieved_request_ids": read,
        }
        if not waits:  # only an acknowledgement, which needs no long poll
            fields["timeout"] = 0.0
        timeout = self._session.settings.poll_timeout if waits else _ACKNOWLEDGEMENT_TIMEOUT
        return request("POST", _PATH, json=fields, timeout=timeout)

    def _finish(self, request_id: str) -> None:
        done = self._waiting.pop(request_id, None)
        if done is not None and not done.done():
            done.set_result(None)
        elif done is None:
            self._finished_early.add(request_id)


def _completions_of(response: Response) -> tuple[list[str], int]:
    fields = fields_of(response)
    completions: object = fields.get("completions")
    cursor: object = fields.get("cursor")
    if not isinstance(completions, list) or not isinstance(cursor, int) or isinstance(cursor, bool):
        raise InvalidResponse(f"{_PATH} returned no list `completions`, or no integer `cursor`")
    entries = cast("list[object]", completions)
    mappings = [cast("Mapping[str, object]", entry) for entry in entries if isinstance(entry, dict)]
    return [str(entry.get("request_id")) for entry in mappings], cursor
