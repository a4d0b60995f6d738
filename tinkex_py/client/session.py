"""The session of one service client: what it knows about its service, from its opening to its end."""

import asyncio
import contextlib
import dataclasses
import itertools
import weakref
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any
from urllib.parse import quote

from tinkex_py import telemetry
from tinkex_py.client.ordering import Ordering
from tinkex_py.client.service_models import ServiceModels
from tinkex_py.client.surrogate import Surrogate, SurrogateChoice
from tinkex_py.client.uploaded_losses import UploadedLosses
from tinkex_py.config import TinkexConfig
from tinkex_py.errors import (
    APIStatusError,
    ClientClosed,
    ConfigError,
    NotFound,
    TransportError,
    status_error_class,
)
from tinkex_py.limits import BillingPause, ByteBudget
from tinkex_py.losses.worker_pool import WorkerPool
from tinkex_py.transport.api import ServiceApi, is_retryable_status
from tinkex_py.transport.decoding import fields_of, text_of
from tinkex_py.transport.messages import Request, Response, Secret, request
from tinkex_py.transport.negotiation import PassEncoding
from tinkex_py.transport.server_config import ServerConfig
from tinkex_py.version import __version__

# Seconds that a service may take to answer for the first time.
FIRST_CONTACT_DEADLINE = 15.0
# A session that is over answers 410 to its heartbeat.
SESSION_OVER = 410
_LONGEST_GOODBYE = 5.0
_HEARTBEAT_TIMEOUT = 10.0
_CREATE = "/api/v1/create_session"


class ClientSession:
    """One session with a service.

    Args:
        settings: of the service client.
        api: sends requests.
        workers: threads for terms and for large arithmetic, shared by the training clients.
        surrogate: the service's surrogate, if that is known.

    Attributes:
        config: how the service wants to be used.
        encoding: how passes over data are written.
        surrogates: which of the service's losses carries a custom gradient.
        models: what the service says about its models.
        uploaded_losses: losses that the service has.
        pass_bytes, sample_bytes: bounds on what is being posted at once.
        model_numbers, sampler_numbers: numbers of the session's next model and sampling session, from 0.
    """

    def __init__(
        self, settings: TinkexConfig, api: ServiceApi, workers: WorkerPool, *, surrogate: Surrogate | None = None
    ) -> None:
        self.settings = settings
        self.api = api
        self.workers = workers
        self.surrogates = SurrogateChoice(api.host, surrogate)
        self.models = ServiceModels(api)
        self.uploaded_losses = UploadedLosses()
        self.model_numbers = itertools.count()
        self.sampler_numbers = itertools.count()
        # An ordering lives as long as its client, or as long as something of it is in flight.
        self.orderings: weakref.WeakSet[Ordering] = weakref.WeakSet()
        self._follow(ServerConfig())
        self._prepared = False
        self._session_id: str | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def session_id(self) -> str:
        """The service's id of this session."""
        assert self._session_id is not None, "open the session first"
        return self._session_id

    async def prepare(self) -> None:
        """Asks for the service's settings, once; every other request needs them."""
        if self._prepared:
            return
        self._follow(await self._read_config())
        self.api.auth.follow(
            exchange=self._exchange_key if self.config.pjwt_auth_enabled else None,
            source=self.config.credential_default_source,
        )
        self._prepared = True

    async def open(self, owner: object) -> None:
        """Asks for the service's settings and opens the session.

        Args:
            owner: the client the session belongs to; heartbeats stop when it is gone.
        """
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

    def start_task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Starts a task that ends with the session."""
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close_orderings(self) -> None:
        """Ends all training clients; waits a while for what they have in flight."""
        orderings = list(self.orderings)
        for ordering in orderings:
            ordering.end(ClientClosed("the service client is closed; make a new one"))
        async with asyncio.TaskGroup() as group:
            for ordering in orderings:
                group.create_task(ordering.drain(self.settings.close_timeout), name="tinkex.closing")

    async def close(self) -> None:
        """Ends the tasks of the session and tells the service that the session is over, if it listens."""
        if self._session_id is None:
            return
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        path = f"/api/v1/sessions/{quote(self._session_id, safe=':')}/finish"
        self._session_id = None
        # Courtesy only: a service that does not know the call, or is gone, will expire the session by itself.
        with contextlib.suppress(APIStatusError, TransportError, ConfigError, TimeoutError):
            async with asyncio.timeout(min(_LONGEST_GOODBYE, self.settings.timeout)):
                await self.api.exchange(request("POST", path, json={"reason": {"type": "success"}, "detail": None}))

    def _follow(self, config: ServerConfig) -> None:
        self.config = config
        self.encoding = PassEncoding(self.settings.wire, config, self._probe)
        self.pass_bytes = ByteBudget(config.fwdbwd_dispatch_bytes_semaphore_size)
        self.sample_bytes = ByteBudget(config.sample_dispatch_bytes_semaphore_size)
        longest = self.settings.billing_pause
        self.api.billing.longest = config.billing_exception_max_pause_duration_sec if longest is None else longest

    async def _read_config(self) -> ServerConfig:
        # Shorter than the usual policy: a service that never answered is likelier named wrongly than down.
        policy = self.settings.retry
        policy = dataclasses.replace(policy, deadline=min(policy.deadline, FIRST_CONTACT_DEADLINE))
        asking = request("POST", "/api/v1/client/config", json={"sdk_version": __version__})
        try:
            fields = await self.api.send(asking, fields_of, retry=policy, billing=BillingPause(0.0))
        except NotFound:
            return ServerConfig.of_an_old_service()
        except APIStatusError as error:
            if error.status != 405:
                raise
            return ServerConfig.of_an_old_service()
        return ServerConfig.read(fields)

    async def _exchange_key(self, key: Secret) -> Response:
        return await self.api.send(request("POST", "/api/v1/auth/token", json={}), _unread, key=key)

    async def _probe(self, probe: Request) -> object:
        # 500 is what some services answer to every protobuf body: a response, and no passing trouble.
        return await self.api.send(
            probe, _unread, retry_statuses=lambda status: status != 500 and is_retryable_status(status)
        )


async def send_heartbeats(
    exchange: Callable[[Request], Awaitable[Response]], session_id: str, interval: float, owner: "weakref.ref[Any]"
) -> None:
    """Tells the service every `interval` seconds that the session lives, as long as its owner does.

    A failed heartbeat is reported as an event and tried again at the next beat; the first that arrives again is
    reported too. The service ends the session itself by answering 410, which is an event too.
    """
    loop = asyncio.get_running_loop()
    failures, last_success = 0, loop.time()

    def report_failure(reason: type[Exception], error: Exception | None = None) -> None:
        telemetry.emit(
            "tinkex.session.heartbeat_failed",
            {"failures": failures, "silence": loop.time() - last_success},
            {"session_id": session_id, "reason": reason.__name__},
            error,
        )

    beat = {"session_id": session_id, "type": "session_heartbeat"}
    while True:
        await asyncio.sleep(interval)
        if owner() is None:
            return
        try:
            response = await exchange(
                request("POST", "/api/v1/session_heartbeat", json=beat, timeout=_HEARTBEAT_TIMEOUT)
            )
            if response.is_success and response.body.strip():
                response.json()  # a login page, say, was not written by the service
        except (TransportError, APIStatusError, ConfigError) as error:
            failures += 1
            report_failure(type(error), error)
            continue
        if response.status == SESSION_OVER:
            telemetry.emit("tinkex.session.over", {}, {"session_id": session_id})
            return
        if response.is_success:
            if failures:
                telemetry.emit(
                    "tinkex.session.heartbeat_recovered",
                    {"failures": failures, "silence": loop.time() - last_success},
                    {"session_id": session_id},
                )
            failures, last_success = 0, loop.time()
        else:
            failures += 1
            report_failure(status_error_class(response.status))


def _unread(response: Response) -> Response:
    return response
