"""What all clients of one service share: requests with retries, futures, and the session."""

import asyncio
import dataclasses
import weakref
from collections.abc import Callable, Mapping
from typing import Any, TypeVar, cast

from tinkex_py.client.carrier import Carrier, ServiceCarrier
from tinkex_py.client.queue import QueueWatch
from tinkex_py.client.service_models import ServiceModels
from tinkex_py.client.session import Session, session_request
from tinkex_py.client.uploaded_losses import UploadedLosses
from tinkex_py.config import TinkexConfig
from tinkex_py.errors import APIStatusError, ClientClosed, InvalidResponse, NotFound, TransportError
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.texts import REPLACED
from tinkex_py.transport.answer import HttpAnswer, Secret
from tinkex_py.transport.billing import BillingPause
from tinkex_py.transport.byte_budget import ByteBudget
from tinkex_py.transport.codec import PROTOBUF, Result
from tinkex_py.transport.dialects import Dialect, EncodedRequest, JsonDialect
from tinkex_py.transport.flags import ClientFlags
from tinkex_py.transport.futures import ACCEPT, tells_metadata_only, wait_for_result
from tinkex_py.transport.http import HttpClient
from tinkex_py.transport.keys import Keys, rejects_token
from tinkex_py.transport.lane import Lane
from tinkex_py.transport.negotiation import choose_dialect, refuses_protobuf
from tinkex_py.transport.retry import RetryPolicy, is_retryable_status, send_with_retry
from tinkex_py.version import __version__

Decoded = TypeVar("Decoded")

# Seconds that a service may take to answer for the first time.
FIRST_CONTACT_DEADLINE = 15.0
_LIVENESS_TIMEOUT = 10.0


class Connection:
    """Requests to one service, inside one session.

    Args:
        config: the settings.
        http: exchanges that are answered at once.
        polls: exchanges that the service holds until a result is there; apart, so that they never keep others waiting.
        threads: worker threads for terms, shared by the training clients.
        carrier: what carries a custom step's gradient, if that is known of the service.
    """

    def __init__(
        self,
        config: TinkexConfig,
        http: HttpClient,
        polls: HttpClient,
        threads: WorkerPool,
        *,
        carrier: Carrier | None = None,
    ) -> None:
        self.config = config
        self.http = http
        self.polls = polls
        self.threads = threads
        self.uploaded_losses = UploadedLosses()
        self.carrier = ServiceCarrier(http.host, carrier)
        self.models = ServiceModels(http.host, self.request)
        self.keys = Keys(config.secret_key, config.credential_command)
        self.billing = BillingPause(0.0)
        self._follow(ClientFlags())
        # A lane lives as long as its client, or as long as something of it is in flight.
        self.lanes: weakref.WeakSet[Lane] = weakref.WeakSet()
        self._prepared = False
        self._session: Session | None = None
        self._model_counter = 0
        self._sampler_counter = 0
        self._dialect: Dialect | None = None
        self._choosing = asyncio.Lock()

    def _follow(self, flags: ClientFlags) -> None:
        self.flags = flags
        self.pass_bytes = ByteBudget(flags.fwdbwd_dispatch_bytes_semaphore_size)
        self.sample_bytes = ByteBudget(flags.sample_dispatch_bytes_semaphore_size)
        wanted = self.config.billing_pause
        self.billing.longest = flags.billing_exception_max_pause_duration_sec if wanted is None else wanted

    @property
    def session_id(self) -> str:
        """The service's id of this session."""
        assert self._session is not None, "open the session first"
        return self._session.session_id

    def next_model_number(self) -> int:
        """Number of the next model of this session, from 0."""
        self._model_counter += 1
        return self._model_counter - 1

    def next_sampler_number(self) -> int:
        """Number of the next sampling session, from 0."""
        self._sampler_counter += 1
        return self._sampler_counter - 1

    # Requests that are answered at once

    async def exchange(self, method: str, path: str, *, over: HttpClient | None = None, **options: Any) -> HttpAnswer:
        """One exchange with the key of the moment; sent once more where the service rejects a token that has ended.

        Args:
            method: HTTP method.
            path: endpoint.
            over: the HTTP client; default is the one for requests that are answered at once.
            options: as `HttpClient.exchange` takes them.

        Raises:
            TransportError: there is no usable answer.
            APIStatusError: no token could be got for the key.
            ConfigError: the key has ended.
        """
        http = over or self.http
        key = await self.keys.current()
        answer = await http.exchange(method, path, key=key, **options)
        if rejects_token(answer):
            renewed = await self.keys.renewed(key)
            if renewed is not None:
                answer = await http.exchange(method, path, key=renewed, **options)
        return answer

    async def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """Sends JSON until there is a final answer, and returns it.

        Raises:
            APIStatusError, TransportError: it was refused, or nobody answered within the retry policy.
        """
        return await self.request("POST", path, json=body)

    async def get(self, path: str) -> dict[str, Any]:
        """Reads one resource; raises like `post`."""
        return await self.request("GET", path)

    async def submit(self, path: str, body: Mapping[str, Any]) -> str:
        """Sends work as JSON until there is a final answer.

        Returns:
            The future's request id.
        """
        return request_id_of(await self.request("POST", path, json=body, check=has_request_id(path)), path)

    async def submit_pass(self, encoded: EncodedRequest, *, keep_graph: bool = False) -> str:
        """Sends a pass over data, the same bytes until there is a final answer.

        Args:
            encoded: the request.
            keep_graph: tells the embedded service that a backward pass over the same datums will follow.

        Returns:
            The future's request id.
        """
        headers = {"X-Tinkex-Keep-Graph": "1"} if keep_graph else {}
        told = await self._send_encoded(encoded, headers=headers, check=has_request_id(encoded.path))
        return request_id_of(told, encoded.path)

    async def _send_encoded(self, encoded: EncodedRequest, **options: Any) -> dict[str, Any]:
        headers = dict(options.pop("headers", {}))
        if encoded.content_encoding is not None:
            headers["Content-Encoding"] = encoded.content_encoding
        return await self.request(
            "POST",
            encoded.path,
            content=encoded.parts,
            content_type=encoded.content_type,
            headers=headers,
            **options,
        )

    async def request(
        self,
        method: str,
        path: str,
        *,
        retry: RetryPolicy | None = None,
        retry_statuses: Callable[[int], bool] = is_retryable_status,
        billing: BillingPause | None = None,
        check: Callable[[dict[str, Any]], object] | None = None,
        **options: Any,
    ) -> dict[str, Any]:
        """Sends one request until there is a final answer; one that makes no sense is none.

        Args:
            method: HTTP method.
            path: endpoint.
            retry: how long to keep trying; default is the configuration's policy.
            retry_statuses: which statuses are worth another attempt.
            billing: how long the service may ask for payment; default is the connection's.
            check: raises InvalidResponse where an answer lacks what it must have.
            options: as `HttpClient.exchange` takes them.

        Returns:
            The answer, which must be a JSON object; an empty body is an empty one.

        Raises:
            APIStatusError, TransportError: it was refused, or nobody answered within the retry policy.
        """
        fields: dict[str, Any] = {}

        async def send(attempt: int) -> HttpAnswer:
            nonlocal fields
            answer = await self.exchange(method, path, attempt=attempt, **options)
            if answer.is_success:
                fields = _fields_of(answer, f"{method} {path}")
                if check is not None:
                    check(fields)
            return answer

        await (billing or self.billing).around(
            lambda: send_with_retry(retry or self.config.retry, send, retry_statuses=retry_statuses)
        )
        return fields

    # How passes are written

    async def dialect(self) -> Dialect:
        """How this service reads passes over data; found out at the first use.

        Raises:
            APIStatusError, TransportError: the service could not be asked.
        """
        if self._dialect is None:
            async with self._choosing:
                if self._dialect is None:
                    self._dialect = await choose_dialect(self.config.wire, self.flags, self._probe)
        return self._dialect

    def falls_back_to_json(self, error: APIStatusError) -> bool:
        """Whether a refused pass is to be written in JSON instead, and all later ones too.

        The answer says that the body could not be read, so the number was not used and goes with the other form.
        """
        if self.config.wire != "auto" or not refuses_protobuf(error):
            return False
        self._dialect = JsonDialect()
        return True

    async def _probe(self, encoded: EncodedRequest) -> object:
        return await self._send_encoded(encoded, retry_statuses=_is_passing_trouble_of_a_probe)

    # Futures

    async def result(
        self,
        request_id: str,
        request_type: str,
        decode: Callable[[Result], Decoded],
        queue: QueueWatch | None = None,
    ) -> Decoded:
        """Waits for a future.

        Args:
            request_id: the future.
            request_type: what was asked for.
            decode: reads the result.
            queue: hears what the service says about requests that it has not begun.

        Raises:
            RequestFailed: the service failed the request, or lost it.
            InvalidResponse: its result cannot be read, however often it is fetched.
        """
        body: dict[str, Any] = {"request_id": request_id}

        async def poll(iteration: int) -> HttpAnswer:
            answer = await self.exchange(
                "POST",
                "/api/v1/retrieve_future",
                over=self.polls,
                json=body,
                accept=ACCEPT,
                headers={"X-Tinker-Request-Type": request_type, "X-Tinker-Request-Iteration": str(iteration)},
                timeout=self.config.poll_timeout,
            )
            if tells_metadata_only(answer):  # said only where it matters: strict older services do not know the field
                body["allow_metadata_only"] = False
            return answer

        return await wait_for_result(
            poll,
            decode,
            request_id=request_id,
            request_type=request_type,
            retry=self.config.retry,
            is_alive=self.is_alive,
            billing=self.billing,
            on_queue_state=None if queue is None else queue.hear,
            on_done=None if queue is None else queue.hear_done,
        )

    async def fields(self, request_id: str, request_type: str, queue: QueueWatch | None = None) -> Mapping[str, Any]:
        """Waits for a future whose result is a JSON object."""

        def fields_of(result: Result) -> Mapping[str, Any]:
            if result.fields is None:
                raise InvalidResponse(f"the result of {request_type} must be JSON, but came as {PROTOBUF}")
            return result.fields

        return await self.result(request_id, request_type, fields_of, queue)

    async def is_alive(self) -> bool:
        """Whether the service answers anything at all."""
        try:
            await self.http.exchange("GET", "/api/v1/healthz", timeout=_LIVENESS_TIMEOUT)
        except TransportError:
            return False
        return True

    # The session

    async def prepare(self) -> None:
        """Asks for the service's settings, once; every other request needs them."""
        if self._prepared:
            return
        self._follow(await self._read_flags())
        self.keys.follow(
            exchange=self._exchange_key if self.flags.pjwt_auth_enabled else None,
            source=self.flags.credential_default_source,
        )
        self._prepared = True

    async def open_session(self, owner: object) -> None:
        """Asks for the service's settings and opens the session.

        Args:
            owner: the client the session belongs to; heartbeats stop when it is gone.
        """
        await self.prepare()
        path = "/api/v1/create_session"
        answer = await self.request(
            "POST",
            path,
            json=session_request(self.config),
            billing=BillingPause(0.0),
            check=lambda fields: text_of(fields, "session_id", path),
        )
        self._session = Session(text_of(answer, "session_id", path), self.exchange, self.config, owner)

    async def _read_flags(self) -> ClientFlags:
        # Shorter than the usual policy: a service that never answered is likelier named wrongly than down.
        policy = self.config.retry
        policy = dataclasses.replace(policy, deadline=min(policy.deadline, FIRST_CONTACT_DEADLINE))
        body = {"sdk_version": __version__}
        try:
            answer = await self.request(
                "POST", "/api/v1/client/config", json=body, retry=policy, billing=BillingPause(0.0)
            )
        except NotFound:
            return ClientFlags.of_an_old_service()
        except APIStatusError as error:
            if error.status != 405:
                raise
            return ClientFlags.of_an_old_service()
        return ClientFlags.read(answer)

    async def _exchange_key(self, key: Secret) -> HttpAnswer:
        async def send(attempt: int) -> HttpAnswer:
            return await self.http.exchange("POST", "/api/v1/auth/token", json={}, key=key, attempt=attempt)

        return await send_with_retry(self.config.retry, send)

    async def close_lanes(self) -> None:
        """Ends all training clients; waits a while for what they have in flight."""
        lanes = list(self.lanes)
        for lane in lanes:
            lane.end(ClientClosed("the service client is closed; make a new one"))
        async with asyncio.TaskGroup() as group:
            for lane in lanes:
                group.create_task(lane.drain(self.config.close_timeout), name="tinkex.closing")

    async def close_session(self) -> None:
        """Ends the session, if one was opened."""
        if self._session is not None:
            session, self._session = self._session, None
            await session.close()


def _fields_of(answer: HttpAnswer, request: str) -> dict[str, Any]:
    """The fields of a successful answer; an empty body has none."""
    fields: object = answer.json() if answer.body.strip() else {}
    if not isinstance(fields, dict):
        raise InvalidResponse(f"{request} was answered with JSON that is no object")
    return cast("dict[str, Any]", fields)


def _is_passing_trouble_of_a_probe(status: int) -> bool:
    # 500 is what some services answer to every protobuf body: an answer, and no passing trouble.
    return status != 500 and is_retryable_status(status)


def text_of(fields: Mapping[str, Any], name: str, path: str) -> str:
    """A text that a service must tell, and that goes into later requests.

    Raises:
        InvalidResponse: there is none, or it cannot be sent.
    """
    value = fields.get(name)
    if not isinstance(value, str) or not value:
        raise InvalidResponse(f"{path} was answered without a {name}")
    if not value.isprintable() or REPLACED in value:
        raise InvalidResponse(f"{path} was answered with a {name} that holds characters which cannot be sent")
    return value


def has_request_id(path: str) -> Callable[[dict[str, Any]], str]:
    """A check for `Connection.request`: the answer tells a future."""
    return lambda fields: request_id_of(fields, path)


def request_id_of(fields: Mapping[str, Any], path: str) -> str:
    """The future that a submission made.

    Raises:
        InvalidResponse: none was told.
    """
    told = fields.get("request_id")
    if isinstance(told, int) and not isinstance(told, bool):
        return str(told)
    return text_of(fields, "request_id", path)
