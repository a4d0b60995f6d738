"""FastAPI: a service client for the lifetime of an application, errors as problem details, and streams of events.

    app = FastAPI(lifespan=service_lifespan(AsyncServiceClient.from_env))
    add_error_handlers(app)

    @app.post("/score", responses=problem_responses(422, 429, 503))
    async def score(body: Body, service: ServiceClient) -> Score: ...

Errors of this package that an endpoint raises become responses of the type `application/problem+json` (RFC 9457). The
guide to this integration lists their statuses. Most responses have a fixed text, because messages may contain host
names, and those of terms may contain data. The logger "tinkex_py" logs the classes of errors with a status of 500 or
more.

`EventStream` is a `StreamingResponse` for items that are computed while they are sent, and `training_events` follows a
run of `train`.
"""

import asyncio
import logging
import math
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from contextlib import AbstractAsyncContextManager, aclosing, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, Field
from pydantic_core import to_json

from tinkex_py import errors
from tinkex_py.arguments import check_choice, check_flag, check_function, check_kind, shown
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.errors import APIStatusError, ConfigError, InvalidData, MissingExtra, RequestFailed, TinkexError
from tinkex_py.runs import ProgressView, RunInfo, StepRecord, TrainedRun, scalars

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse, Response, StreamingResponse
    from fastapi.sse import ServerSentEvent, format_sse_event
    from starlette.exceptions import HTTPException
    from starlette.types import Receive, Scope, Send
except ModuleNotFoundError as error:
    raise MissingExtra("fastapi", "fastapi") from error

PROBLEM_TYPE: Final = "application/problem+json"
_LOGGER: Final = logging.getLogger("tinkex_py")
_STATE: Final = "tinkex_service"
_RETRY_AFTER: Final = 1  # seconds, if the service sent no Retry-After

_ACCOUNT: Final = "The training service rejected the credentials of this server."
# Class, status, and detail; None is the message of the error. The first base class in the table decides.
_PROBLEMS: Final[tuple[tuple[type[TinkexError], int, str | None], ...]] = (
    (errors.InvalidData, 422, None),
    (errors.InvalidSpec, 422, None),
    (errors.DuplicateRegularizerNames, 422, None),
    (errors.BadRequest, 400, "The training service rejected the request."),
    (errors.MissingEndpoint, 501, "The training service does not support this."),
    (errors.NotFound, 404, "The training service has no such resource."),
    (errors.Conflict, 409, "The request contradicts an earlier request to the training service."),
    (errors.Unprocessable, 422, "The training service cannot process the request."),
    (errors.PrecedingRequestFailed, 409, "An earlier request of the same model failed; nothing was sent. Try again."),
    (errors.SurrogateMismatch, 409, "The accumulated gradients do not match this optimizer step."),
    (errors.RateLimited, 429, "Too many requests are in progress. Try again later."),
    (errors.UnsupportedFeature, 501, "The training service does not support this."),
    (errors.Authentication, 502, _ACCOUNT),
    (errors.BillingRequired, 502, _ACCOUNT),
    (errors.PermissionDenied, 502, _ACCOUNT),
    (errors.APIStatusError, 502, "The training service returned an error."),
    (errors.ConnectionFailed, 503, "The training service is unreachable. Try again later."),
    (errors.ClientClosed, 503, "This server is shutting down. Try again later."),
    (errors.TimeoutExceeded, 504, "The training service did not respond in time."),
    (errors.RegularizerTimeout, 504, "A term of the loss exceeded its timeout."),
    (errors.TransportError, 502, "The training service returned an invalid response."),
    (errors.RequestFailed, 502, "The request failed in the training service."),
    (errors.SequenceLost, 502, "It is unknown whether the training service received a request. Start again."),
    (errors.TinkexError, 500, "Internal error."),
)


class Problem(BaseModel):
    """Problem details after RFC 9457."""

    type: str = Field("about:blank", description="Type of the problem; `about:blank` means that of the status.")
    title: str = Field(description="The phrase of the status.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="Description of this occurrence.")
    error: str | None = Field(None, description="Class of the error.")
    errors: list[dict[str, Any]] | None = Field(None, description="The invalid fields of the request.")


def service_lifespan(
    make: Callable[[], AsyncServiceClient],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """Returns a lifespan that enters a service client when the application starts and closes it when it stops.

    Inside your own lifespan: `async with service_lifespan(make)(app): ...`.

    Args:
        make: creates the client, on the event loop of the application; for example `AsyncServiceClient.from_env`.
    """
    check_function("make", make)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncGenerator[None, None]:
        async with make() as service:
            setattr(app.state, _STATE, service)
            try:
                yield
            finally:
                delattr(app.state, _STATE)

    return lifespan


def get_service(connection: HTTPConnection) -> AsyncServiceClient:
    """Returns the service client of the application, for `Depends`.

    Raises:
        ConfigError: the application does not run inside `service_lifespan`.
    """
    return service_of(check_kind("connection", connection, HTTPConnection).app)


def service_of(app: FastAPI) -> AsyncServiceClient:
    """Returns the service client of the application.

    Raises:
        ConfigError: the application does not run inside `service_lifespan`.
    """
    service = getattr(check_kind("app", app, FastAPI).state, _STATE, None)
    if service is None:
        raise ConfigError("the application has no service client: pass lifespan=service_lifespan(...) to FastAPI")
    return service


ServiceClient = Annotated[AsyncServiceClient, Depends(get_service)]


def add_error_handlers(app: FastAPI, *, all_errors: bool = False) -> None:
    """Converts the errors of this package to responses, following the table of the guide.

    Args:
        app: the application.
        all_errors: also convert invalid input (422, without the input itself) and `HTTPException`.
    """
    check_kind("app", app, FastAPI)
    check_flag("all_errors", all_errors)
    app.add_exception_handler(TinkexError, _error_response)
    if all_errors:
        app.add_exception_handler(RequestValidationError, _invalid_input_response)
        app.add_exception_handler(HTTPException, _http_exception_response)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Returns the `responses` of a path operation for its OpenAPI documentation.

    Args:
        statuses: the statuses of the problems that it may return.
    """
    for status in statuses:
        if not isinstance(status, int) or status not in set(HTTPStatus):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"statuses must be HTTP statuses, got {shown(status)}")
    return {status: _documented(HTTPStatus(status)) for status in statuses}


class EventStream(StreamingResponse):
    """Sends the items of an async generator while it computes them, as events of a stream.

    The last event is `end`, with the data `{}`. If the generator raises after its first item, it is `problem` instead,
    with problem details. An error before the first item is an error of the endpoint: the response is not a stream.
    When the client disconnects, the generator is cancelled where it waits. It is closed in every case.

    Args:
        items: the generator. An item is a pydantic model or a JSON value, which becomes the data of an event
            `message`; or a `fastapi.sse.ServerSentEvent`, which can name its event. NaN and infinities become null.
        form: "events" for server-sent events, which `EventSource` of a browser reads; "lines" for JSON Lines, each
            with `event`, `data` and, if the event has one, `id`.

    Raises:
        InvalidData: `items` is not an async generator, or there is no such form.
    """

    def __init__(self, items: AsyncGenerator[Any, None], form: Literal["events", "lines"] = "events") -> None:
        if not isinstance(items, AsyncGenerator):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise InvalidData(f"items must be an async generator, got a {type(items).__name__}: call the function")
        check_choice("form", form, _FORMS)
        media_type, self._encoded = _FORMS[form]
        super().__init__(items, media_type=media_type, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._items = items

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the stream until it ends or the client disconnects."""
        async with asyncio.TaskGroup() as group:
            sending = group.create_task(self._send_all(scope, send), name="tinkex.stream")
            leaving = group.create_task(_when_disconnected(receive, sending.cancel), name="tinkex.stream-client")
            sending.add_done_callback(lambda _: leaving.cancel())
        if not sending.cancelled() and (failure := sending.result()) is not None:
            raise failure
        if self.background is not None:
            await self.background()

    async def _send_all(self, scope: Scope, send: Send) -> Exception | None:
        """Returns an error that the server must handle: one before the first item, or one that is not of this package.

        Returned instead of raised, because a task group would wrap it.
        """
        failure: Exception | None = None
        is_started = is_over = False
        async with aclosing(self._items):
            while not is_over:
                try:
                    chunk = self._encoded(_event(await anext(self._items)))
                except StopAsyncIteration:
                    is_over, chunk = True, self._encoded(ServerSentEvent(event="end", data={}))
                except Exception as error:  # noqa: BLE001  # any error of the generator ends the stream
                    if not is_started:
                        return error
                    failure = None if isinstance(error, TinkexError) else error
                    is_over, chunk = True, self._encoded(_problem_event(scope, error))
                try:
                    if not is_started:
                        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                        is_started = True
                    await send({"type": "http.response.body", "body": chunk, "more_body": not is_over})
                except OSError:  # from some servers, when the client has disconnected
                    is_over = True
        return failure


async def training_events(
    start: Callable[[ProgressView], Coroutine[Any, Any, TrainedRun]],
) -> AsyncGenerator[ServerSentEvent, None]:
    """Yields the progress of a run as events, for `EventStream`; closing the generator cancels the run.

    A cancelled run keeps its folder: the same call of `train` resumes it from its last checkpoint.

    - `start`: `name`, `made` (steps made before, in a run that resumes) and `total_steps`.
    - `doing`: `text`, the current activity, or what the run waits for.
    - `step`: `step` and `metrics`, as `tinkex_py.runs.scalars` returns them; its id is the step.
    - `run`: `status`, `reason`, `steps` and `checkpoint` of the run that ended.

    Args:
        start: starts the run with a progress view, such as `lambda view: train(..., progress=view)`.

    Raises:
        InvalidData: `start` is not a function that returns a coroutine.
        TinkexError: the run failed.
    """
    check_function("start", start)
    view = _ProgressEvents()
    starting = start(view)
    if not isinstance(starting, Coroutine):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidData(f"start must return a coroutine, such as that of train(...), got a {type(starting).__name__}")
    run = asyncio.create_task(starting, name="tinkex.streamed-run")
    run.add_done_callback(view.end)
    try:
        while (event := await view.events.get()) is not None:
            yield event
        trained = await run
    finally:
        run.cancel()
        await asyncio.wait([run])
    facts = {"steps": trained.steps, "checkpoint": trained.checkpoint}
    yield ServerSentEvent(event="run", data={"status": trained.info.status, "reason": trained.info.reason, **facts})


class _ProgressEvents(ProgressView):
    """Queues the progress of a run as events; None is their end."""

    def __init__(self) -> None:
        self.events: asyncio.Queue[ServerSentEvent | None] = asyncio.Queue()

    def start(self, run: RunInfo, made: int) -> None:
        self._put("start", {"name": run.name, "made": made, "total_steps": run.total_steps})

    def doing(self, text: str) -> None:
        self._put("doing", {"text": text})

    def step(self, record: StepRecord) -> None:
        self._put("step", {"step": record.step, "metrics": scalars(record)}, id=str(record.step))

    def end(self, run: asyncio.Task[TrainedRun]) -> None:
        if not run.cancelled():
            run.exception()  # retrieved here, because the generator may be closed before it awaits the run
        self.events.put_nowait(None)

    def _put(self, name: str, data: Mapping[str, Any], *, id: str | None = None) -> None:  # noqa: A002
        self.events.put_nowait(ServerSentEvent(event=name, data=data, id=id))


def status_of(error: TinkexError) -> int:
    """Returns the HTTP status for an error."""
    return _status_and_detail(error)[0]


def detail_of(error: TinkexError) -> str:
    """Returns the description of an error that is safe to send to the caller of the application."""
    return _status_and_detail(error)[1]


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, TinkexError)
    status, detail = _status_and_detail(error)
    _log(request.scope, error, status)
    headers: dict[str, str] = {}
    if status in (429, 503):
        requested = error.retry_after if isinstance(error, APIStatusError) else None
        headers["Retry-After"] = str(_RETRY_AFTER if requested is None else math.ceil(requested))
    return _response(status, detail, error=type(error).__name__, headers=headers)


def _log(scope: Mapping[str, Any], error: TinkexError, status: int) -> None:
    if status >= 500:
        cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
        _LOGGER.error("%s %s: %s%s", scope["method"], scope["path"], type(error).__name__, cause)


def _status_and_detail(error: TinkexError) -> tuple[int, str]:
    check_kind("error", error, TinkexError)
    if isinstance(error, RequestFailed) and error.category == "user":
        return 422, str(error)
    kinds = type(error).__mro__
    status, detail = next((status, detail) for kind, status, detail in _PROBLEMS if kind in kinds)
    return status, str(error) if detail is None else detail


async def _invalid_input_response(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    invalid = [{"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
    return _response(422, "The request is invalid.", errors=invalid)


async def _http_exception_response(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _response(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _response(status: int, detail: str, *, headers: dict[str, str] | None = None, **fields: Any) -> Response:
    return JSONResponse(_problem(status, detail, **fields), status, headers=headers, media_type=PROBLEM_TYPE)


def _problem(status: int, detail: str, **fields: Any) -> dict[str, Any]:
    problem = Problem(type="about:blank", title=_title(status), status=status, detail=detail, **fields)
    return problem.model_dump(mode="json", exclude_none=True)


def _problem_event(scope: Scope, error: Exception) -> ServerSentEvent:
    status, detail, name = 500, "Internal error.", None
    if isinstance(error, TinkexError):
        (status, detail), name = _status_and_detail(error), type(error).__name__
        _log(scope, error, status)
    return ServerSentEvent(event="problem", data=_problem(status, detail, error=name))


def _event(item: Any) -> ServerSentEvent:
    return item if isinstance(item, ServerSentEvent) else ServerSentEvent(data=item)


def _server_sent(event: ServerSentEvent) -> bytes:
    data = event.raw_data or to_json(event.data, inf_nan_mode="null").decode()
    return format_sse_event(data_str=data, event=event.event, id=event.id, retry=event.retry, comment=event.comment)


def _json_line(event: ServerSentEvent) -> bytes:
    data = event.raw_data or event.data
    named = {} if event.id is None else {"id": event.id}
    return to_json({"event": event.event or "message", **named, "data": data}, inf_nan_mode="null") + b"\n"


_FORMS: Final[Mapping[str, tuple[str, Callable[[ServerSentEvent], bytes]]]] = {
    "events": ("text/event-stream", _server_sent),
    "lines": ("application/jsonl", _json_line),
}


async def _when_disconnected(receive: Receive, react: Callable[[], object]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    react()


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _documented(status: HTTPStatus) -> dict[str, Any]:
    detail = next((detail for _, code, detail in _PROBLEMS if code == status and detail), status.description)
    example = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail or status.phrase}
    documented: dict[str, Any] = {
        "description": status.phrase,
        "content": {PROBLEM_TYPE: {"schema": Problem.model_json_schema(), "example": example}},
    }
    if status in (429, 503):
        wait = {"description": "Seconds to wait before the next attempt.", "schema": {"type": "integer"}}
        documented["headers"] = {"Retry-After": wait}
    return documented
