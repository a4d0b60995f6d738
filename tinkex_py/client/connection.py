"""What all clients of one service share: requests with retries, futures, and the session."""

import asyncio
import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tinkex_py import telemetry
from tinkex_py.client.server_execution import UploadedLosses
from tinkex_py.config import TinkexConfig
from tinkex_py.errors import APIStatusError, ClientClosed, InvalidResponse, NotFound, TransportError, status_error_class
from tinkex_py.losses.threads import TermThreads
from tinkex_py.transport.codec import PROTOBUF, Result
from tinkex_py.transport.futures import ACCEPT, wait_for_result
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.lane import Lane
from tinkex_py.transport.retry import RetryPolicy, send_with_retry
from tinkex_py.version import __version__

Decoded = TypeVar("Decoded")

DEFAULT_MAX_CHUNK_DATUMS = 1024
DEFAULT_MAX_CHUNK_BYTES = 5_000_000
# Seconds that a service may take to answer for the first time.
FIRST_CONTACT_DEADLINE = 15.0
# A session that is over answers 410 to its heartbeat.
SESSION_OVER = 410


class Connection:
    """Requests to one service, inside one session.

    Args:
        config: the settings.
        http: exchanges that are answered at once.
        polls: exchanges that the service holds until a result is there; apart, so that they never keep others waiting.
        threads: worker threads for terms, shared by the training clients.
    """

    def __init__(self, config: TinkexConfig, http: HttpClient, polls: HttpClient, threads: TermThreads) -> None:
        self.config = config
        self.http = http
        self.polls = polls
        self.threads = threads
        self.max_chunk_datums = DEFAULT_MAX_CHUNK_DATUMS
        self.max_chunk_bytes = DEFAULT_MAX_CHUNK_BYTES
        self.uploaded_losses = UploadedLosses()
        # A lane lives as long as its client, or as long as something of it is in flight.
        self.lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._session_id: str | None = None
        self._model_counter = 0
        self._sampler_counter = 0
        self._heartbeat: asyncio.Task[None] | None = None

    @property
    def session_id(self) -> str:
        """The service's id of this session."""
        assert self._session_id is not None, "open the session first"
        return self._session_id

    def next_model_number(self) -> int:
        """Number of the next model of this session, from 0."""
        self._model_counter += 1
        return self._model_counter - 1

    def next_sampler_number(self) -> int:
        """Number of the next sampling session, from 0."""
        self._sampler_counter += 1
        return self._sampler_counter - 1

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends JSON until there is a final answer, and returns it.

        Raises:
            APIStatusError, TransportError: it was refused, or nobody answered within the retry policy.
        """
        return await self._request("POST", path, json=body)

    async def get(self, path: str) -> dict[str, Any]:
        """Reads one resource; raises like `post`."""
        return await self._request("GET", path)

    async def submit(
        self,
        path: str,
        *,
        json: Mapping[str, Any] | None = None,
        protobuf: bytes | None = None,
        keep_graph: bool = False,
    ) -> str:
        """Sends work, the same bytes until there is a final answer.

        Args:
            path: endpoint.
            json: the request as JSON, or
            protobuf: as protobuf bytes.
            keep_graph: tells the embedded service that a backward pass over the same datums will follow.

        Returns:
            The future's request id.
        """
        headers = {"X-Tinkex-Keep-Graph": "1"} if keep_graph else {}
        answer = await self._request("POST", path, json=json, protobuf=protobuf, headers=headers)
        request_id = answer.get("request_id")
        if not isinstance(request_id, str | int):
            raise InvalidResponse(f"POST {path} was answered without a request_id")
        return str(request_id)

    async def result(self, request_id: str, request_type: str, decode: Callable[[Result], Decoded]) -> Decoded:
        """Waits for a future.

        Args:
            request_id: the future.
            request_type: what was asked for.
            decode: reads the result.

        Raises:
            RequestFailed: the service failed the request.
            InvalidResponse: its result cannot be read, however often it is fetched.
        """

        async def poll(iteration: int) -> Any:
            return await self.polls.exchange(
                "POST",
                "/api/v1/retrieve_future",
                json={"request_id": request_id, "allow_metadata_only": False},
                accept=ACCEPT,
                headers={"X-Tinker-Request-Type": request_type, "X-Tinker-Request-Iteration": str(iteration)},
                timeout=self.config.poll_timeout,
            )

        return await wait_for_result(
            poll, decode, request_id=request_id, request_type=request_type, retry=self.config.retry
        )

    async def fields(self, request_id: str, request_type: str) -> Mapping[str, Any]:
        """Waits for a future whose result is a JSON object."""

        def fields_of(result: Result) -> Mapping[str, Any]:
            if result.fields is None:
                raise InvalidResponse(f"the result of {request_type} must be JSON, but came as {PROTOBUF}")
            return result.fields

        return await self.result(request_id, request_type, fields_of)

    async def _request(
        self,
        method: str,
        path: str,
        *,
        json: Mapping[str, Any] | None = None,
        protobuf: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        retry: RetryPolicy | None = None,
    ) -> dict[str, Any]:
        async def send(attempt: int) -> Any:
            return await self.http.exchange(
                method,
                path,
                json=json,
                content=protobuf,
                content_type=PROTOBUF if protobuf is not None else None,
                headers=headers or {},
                attempt=attempt,
            )

        answer = await send_with_retry(retry or self.config.retry, send)
        fields: object = answer.json() if answer.body.strip() else {}
        if not isinstance(fields, dict):
            raise InvalidResponse(f"{method} {path} was answered with JSON that is no object")
        return cast("dict[str, Any]", fields)

    async def open_session(self, owner: object) -> None:
        """Asks for the service's settings and opens the session.

        Args:
            owner: the client the session belongs to; heartbeats stop when it is gone.
        """
        await self._read_client_config()
        body: dict[str, Any] = {
            "tags": list(self.config.tags),
            "user_metadata": dict(self.config.user_metadata),
            "sdk_version": __version__,
            "type": "create_session",
        }
        if self.config.project_id:
            body["project_id"] = self.config.project_id
        answer = await self.post("/api/v1/create_session", body)
        session_id = answer.get("session_id")
        if not isinstance(session_id, str):
            raise InvalidResponse("create_session was answered without a session_id")
        self._session_id = session_id
        self._heartbeat = asyncio.create_task(
            send_heartbeats(self.http, session_id, self.config.heartbeat_interval, weakref.ref(owner)),
            name="tinkex.heartbeat",
        )

    def _first_contact(self) -> RetryPolicy:
        """Shorter than the usual policy: a service that never answered is likelier named wrongly than down."""
        return dataclasses.replace(self.config.retry, deadline=min(self.config.retry.deadline, FIRST_CONTACT_DEADLINE))

    async def _read_client_config(self) -> None:
        try:
            flags = await self._request(
                "POST", "/api/v1/client/config", json={"sdk_version": __version__}, retry=self._first_contact()
            )
        except NotFound:  # services older than this endpoint work with the defaults
            return
        except APIStatusError as error:
            if error.status != 405:
                raise
            return
        self.uploaded_losses.offered = flags.get("custom_loss_server_side") is True
        self.max_chunk_datums = _positive(flags.get("fwdbwd_max_chunk_len"), DEFAULT_MAX_CHUNK_DATUMS)
        self.max_chunk_bytes = _positive(flags.get("fwdbwd_max_chunk_bytes_count"), DEFAULT_MAX_CHUNK_BYTES)

    async def close_lanes(self) -> None:
        """Ends all training clients; waits a while for what they have in flight."""
        lanes = list(self.lanes)
        for lane in lanes:
            lane.end(ClientClosed("the service client is closed; make a new one"))
        async with asyncio.TaskGroup() as group:
            for lane in lanes:
                group.create_task(lane.drain(self.config.close_timeout), name="tinkex.closing")

    async def close_session(self) -> None:
        """Ends the heartbeat and tells the service that the session is over, if it listens."""
        if self._heartbeat is not None:
            self._heartbeat.cancel()
            await asyncio.wait([self._heartbeat])
            self._heartbeat = None
        if self._session_id is not None:
            session_id, self._session_id = self._session_id, None
            # Courtesy only: a service that does not know the call, or is gone, will expire the session by itself.
            with contextlib.suppress(APIStatusError, TransportError):
                await self._request(
                    "POST",
                    f"/api/v1/sessions/{session_id}/finish",
                    json={"reason": {"type": "success"}, "detail": None},
                    retry=RetryPolicy(deadline=min(5.0, self.config.timeout), max_attempts=1),
                )


async def send_heartbeats(http: HttpClient, session_id: str, interval: float, owner: "weakref.ref[Any]") -> None:
    """Tells the service every `interval` seconds that the session lives, as long as its owner does.

    A failed heartbeat is reported as an event and tried again at the next beat. The service ends the session
    itself by answering 410.
    """
    while True:
        await asyncio.sleep(interval)
        if owner() is None:
            return
        try:
            answer = await http.exchange(
                "POST",
                "/api/v1/session_heartbeat",
                json={"session_id": session_id, "type": "session_heartbeat"},
                timeout=10.0,
            )
        except TransportError as error:
            telemetry.emit(
                "tinkex.session.heartbeat_failed",
                {},
                {"session_id": session_id, "reason": type(error).__name__},
                error,
            )
            continue
        if answer.status == SESSION_OVER:
            return
        if not answer.is_success:
            reason = status_error_class(answer.status).__name__
            telemetry.emit("tinkex.session.heartbeat_failed", {}, {"session_id": session_id, "reason": reason})


def _positive(value: object, default: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
