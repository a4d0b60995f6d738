"""The session of one service client, from its opening to its end, and the settings of its service."""

import asyncio
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from typing import Any
from urllib.parse import quote

from tinkex_py import telemetry
from tinkex_py.client import certificates
from tinkex_py.client.certificates import Certificate
from tinkex_py.client.ordering import Ordering
from tinkex_py.client.service_models import ServiceModels
from tinkex_py.client.surrogate import Surrogate, SurrogateChoice
from tinkex_py.client.uploaded_losses import UploadedLosses
from tinkex_py.config import HOSTED_SERVICE, TinkexConfig
from tinkex_py.errors import (
    APIStatusError,
    ClientClosed,
    ConfigError,
    TransportError,
)
from tinkex_py.limits import BillingPause, ByteBudget
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.threads import in_own_thread
from tinkex_py.transport.api import ServiceApi, is_retryable_status
from tinkex_py.transport.decoding import fields_of, text_of
from tinkex_py.transport.failures import status_error
from tinkex_py.transport.messages import Request, Response, Secret, request
from tinkex_py.transport.negotiation import PassEncoding
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.version import __version__

# Seconds until the first response of a service.
FIRST_CONTACT_DEADLINE = 15.0
# Status of a heartbeat whose session has ended.
SESSION_OVER = 410
_FINISH_TIMEOUT = 5.0
_HEARTBEAT_TIMEOUT = 10.0
_NO_ENDPOINT = (404, 405)
_CREATE = "/api/v1/create_session"


class ClientSession:
    """One session with a service.

    Args:
        settings: settings of the service client.
        api: the requests to the service.
        workers: threads for terms and large arithmetic, shared by the training clients.
        surrogate: the surrogate of the service, if it is known.

    Attributes:
        config: settings that the service announces.
        encoding: the encoding of passes over data.
        surrogates: the loss of the service that carries a custom gradient.
        models: the models of the service.
        uploaded_losses: losses that were uploaded to the service.
        pass_bytes, sample_bytes: limits of the bytes in flight.
        model_numbers, sampler_numbers: numbers of the next model and sampling session, from 0.
    """

    def __init__(
        self, settings: TinkexConfig, api: ServiceApi, workers: WorkerPool, *, surrogate: Surrogate | None = None
    ) -> None:
        self.settings = settings
        self.api = api
        self.workers = workers
        self.surrogates = SurrogateChoice(api.host, surrogate, trusted=settings.base_url == HOSTED_SERVICE)
        self.models = ServiceModels(api)
        self.uploaded_losses = UploadedLosses()
        self.model_numbers = itertools.count()
        self.sampler_numbers = itertools.count()
        # An ordering exists as long as its client, or a submission of it in flight.
        self.orderings: weakref.WeakSet[Ordering] = weakref.WeakSet()
        self._follow(ServerConfig())
        self._prepared = False
        self._session_id: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def session_id(self) -> str:
        """The id of this session."""
        assert self._session_id is not None, "open the session first"
        return self._session_id

    async def prepare(self) -> None:
        """Requests the settings of the service, once; every other request needs them."""
        if self._prepared:
            return
        self._follow(await self._read_config())
        self.api.auth.follow(
            exchange=self._exchange_key if self.config.pjwt_auth_enabled else None,
            source=self.config.credential_default_source,
        )
        self._prepared = True

    async def open(self, owner: object) -> None:
        """Requests the settings of the service and opens the session; heartbeats end with `owner`."""
        await self.prepare()
        body: dict[str, Any] = {
            "tags": list(self.settings.tags),
            "user_metadata": dict(self.settings.user_metadata),
            "sdk_version": __version__,
            "type": "create_session",
        }
        if self.settings.project_id:
            body["project_id"] = self.settings.project_id
        self._session_id = await self.api.send(
            request("POST", _CREATE, json=body),
            lambda response: text_of(fields_of(response), "session_id", _CREATE),
            billing=BillingPause(0.0),
        )
        self.start_task(
            send_heartbeats(self.api.exchange, self._session_id, self.settings.heartbeat_interval, weakref.ref(owner)),
            "tinkex.heartbeat",
        )

    async def stored_certificate(self, base_model: str) -> Certificate | None:
        """Returns the stored certificate of the service for a base model, if there is one; ConfigError: unreadable."""
        key = self.settings.base_url, await self.models.version(), base_model, (await self.encoding.choose()).name
        folder = self.settings.certificates
        return await in_own_thread("tinkex-certificate", lambda: certificates.find(folder, *key))

    def start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task that `close` cancels."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close_orderings(self) -> None:
        """Ends all training clients; waits up to `close_timeout` for their submissions in flight."""
        orderings = list(self.orderings)
        for ordering in orderings:
            ordering.end(ClientClosed("the service client is closed: create a new one"))
        async with asyncio.TaskGroup() as group:
            for ordering in orderings:
                group.create_task(ordering.drain(self.settings.close_timeout), name="tinkex.closing")

    async def close(self) -> None:
        """Cancels the tasks of the session and ends it on the service."""
        if self._session_id is None:
            return
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        path = f"/api/v1/sessions/{quote(self._session_id, safe=':')}/finish"
        self._session_id = None
        # Optional: a service that has no such endpoint, or is unreachable, expires the session by itself.
        with contextlib.suppress(APIStatusError, TransportError, ConfigError, TimeoutError):
            async with asyncio.timeout(min(_FINISH_TIMEOUT, self.settings.timeout)):
                await self.api.exchange(request("POST", path, json={"reason": {"type": "success"}, "detail": None}))

    def _follow(self, config: ServerConfig) -> None:
        self.config = config
        self.encoding = PassEncoding(self.settings.wire, config, self._probe)
        self.pass_bytes = ByteBudget(config.fwdbwd_dispatch_bytes_semaphore_size)
        self.sample_bytes = ByteBudget(config.sample_dispatch_bytes_semaphore_size)
        longest = self.settings.billing_pause
        self.api.billing.longest = config.billing_exception_max_pause_duration_sec if longest is None else longest

    async def _read_config(self) -> ServerConfig:
        # Shorter than the usual deadline: without any response so far, the address is probably wrong.
        policy = self.settings.retry
        policy = dataclasses.replace(policy, deadline=min(policy.deadline, FIRST_CONTACT_DEADLINE))
        asking = request("POST", "/api/v1/client/config", json={"sdk_version": __version__})
        try:
            fields = await self.api.send(asking, fields_of, retry=policy, billing=BillingPause(0.0))
        except APIStatusError as error:
            if error.status not in _NO_ENDPOINT:
                raise
            return ServerConfig.of_an_old_service()
        return ServerConfig.read(fields)

    async def _exchange_key(self, key: Secret) -> Response:
        return await self.api.send(request("POST", "/api/v1/auth/token", json={}), lambda response: response, key=key)

    async def _probe(self, probe: Request) -> object:
        # Some services return 500 for every protobuf body, so it is a result of the probe and not retried.
        return await self.api.send(
            probe,
            lambda response: response,
            retry_statuses=lambda status: status != 500 and is_retryable_status(status),
        )


async def send_heartbeats(
    exchange: Callable[[Request], Awaitable[Response]], session_id: str, interval: float, owner: "weakref.ref[Any]"
) -> None:
    """Sends a heartbeat every `interval` seconds until the owner is garbage-collected or the session ends (410).

    Emits an event for every failure, for the first success after failures, and for the end of the session.
    """
    loop = asyncio.get_running_loop()
    failures, last_success = 0, loop.time()

    def report(event: str, reason: Mapping[str, str], error: Exception | None = None) -> None:
        measurements = {"failures": failures, "silence": loop.time() - last_success}
        telemetry.emit(event, measurements, {"session_id": session_id, **reason}, error)

    fields = {"session_id": session_id, "type": "session_heartbeat"}
    heartbeat = request("POST", "/api/v1/session_heartbeat", json=fields, timeout=_HEARTBEAT_TIMEOUT)
    while True:
        await asyncio.sleep(interval)
        if owner() is None:
            return
        try:
            response = await exchange(heartbeat)
            if response.status == SESSION_OVER:
                telemetry.emit("tinkex.session.over", {}, {"session_id": session_id})
                return
            if not response.is_success:
                raise status_error(response)
            if response.body.strip():
                response.json()  # raises for a page that a proxy returned, such as a login form
        except (TransportError, APIStatusError, ConfigError) as error:
            failures += 1
            report("tinkex.session.heartbeat_failed", {"reason": type(error).__name__}, error)
            continue
        if failures:
            report("tinkex.session.heartbeat_recovered", {})
        failures, last_success = 0, loop.time()
