"""FastAPI: a service client for the lifetime of an application, and errors as problem details.

    app = FastAPI(lifespan=service_lifespan(AsyncServiceClient.from_env))
    add_error_handlers(app)

    @app.post("/score", responses=problem_responses(422, 429, 503))
    async def score(body: Body, service: ServiceClient) -> Score: ...

Errors of this package that an endpoint raises become responses of the type `application/problem+json` (RFC 9457). The
guide to this integration lists their statuses. Most responses have a fixed text, because messages may contain host
names, and those of terms may contain data. The logger "tinkex_py" logs the classes of errors with a status of 500 or
more.
"""

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from tinkex_py import errors
from tinkex_py.arguments import check_flag, check_function, check_kind, shown
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.errors import APIStatusError, ConfigError, InvalidData, MissingExtra, RequestFailed, TinkexError
from tinkex_py.types.base import RaisesInvalidData

try:
    from fastapi import Depends, FastAPI, Request
    from fastapi.exceptions import RequestValidationError
    from fastapi.requests import HTTPConnection
    from fastapi.responses import JSONResponse, Response
    from starlette.exceptions import HTTPException
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


class Problem(BaseModel, metaclass=RaisesInvalidData):
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


def status_of(error: TinkexError) -> int:
    """Returns the HTTP status for an error."""
    return _status_and_detail(error)[0]


def detail_of(error: TinkexError) -> str:
    """Returns the description of an error that is safe to send to the caller of the application."""
    return _status_and_detail(error)[1]


async def _error_response(request: Request, error: Exception) -> Response:
    assert isinstance(error, TinkexError)
    status, detail = _status_and_detail(error)
    if status >= 500:
        cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
        _LOGGER.error("%s %s: %s%s", request.method, request.url.path, type(error).__name__, cause)
    headers: dict[str, str] = {}
    if status in (429, 503):
        requested = error.retry_after if isinstance(error, APIStatusError) else None
        headers["Retry-After"] = str(_RETRY_AFTER if requested is None else math.ceil(requested))
    return _response(status, detail, error=type(error).__name__, headers=headers)


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
    problem = Problem(type="about:blank", title=_title(status), status=status, detail=detail, **fields)
    content = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, status, headers=headers, media_type=PROBLEM_TYPE)


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
