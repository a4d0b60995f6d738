"""FastAPI: a service client that lives as long as the application, and errors as problem details.

    app = FastAPI(lifespan=service_lifespan(AsyncServiceClient.from_env))
    add_error_handlers(app)

    @app.post("/score", responses=problem_responses(422, 429, 503))
    async def score(body: Body, service: ServiceClient) -> Score: ...

Errors of this package that an endpoint raises become answers of the type `application/problem+json` (RFC 9457):

| error | status |
| --- | --- |
| `InvalidData`, `InvalidSpec`, `DuplicateRegularizerNames` | 422, with its message |
| `RequestFailed` that blames the data (`category` "user") | 422, with its message |
| `BadRequest`, `NotFound`, `Conflict`, `Unprocessable` | 400, 404, 409, 422 |
| `PrecedingRequestFailed`, `SurrogateMismatch` | 409 |
| `RateLimited` | 429, with `Retry-After` |
| `UnsupportedFeature` | 501 |
| `Authentication`, `BillingRequired`, `PermissionDenied`: this server's own account | 502 |
| `ServerError`, other `APIStatusError`s | 502 |
| `InvalidResponse`, `SequenceLost`, other `RequestFailed`s | 502 |
| `ConnectionFailed`, `ClientClosed` | 503, with `Retry-After` |
| `TimeoutExceeded`, `RegularizerTimeout` | 504 |
| every other `TinkexError`, such as `ConfigError` or a failed term | 500 |

Where the table does not say so, the text of the answer is a fixed sentence: messages may name hosts, and terms may put
data into theirs. Log lines of the logger "tinkex_py" name the classes.
"""

import logging
import math
from collections.abc import AsyncGenerator, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from http import HTTPStatus
from typing import Annotated, Any, Final

from pydantic import BaseModel, Field

from tinkex_py import errors
from tinkex_py.client.service import AsyncServiceClient
from tinkex_py.errors import APIStatusError, ConfigError, MissingExtra, RequestFailed, TinkexError

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
_PAUSE: Final = 1.0  # seconds, where nobody said how long to wait

# The first class that fits counts; None tells the message itself.
_ANSWERS: Final[tuple[tuple[type[TinkexError], int, str | None], ...]] = (
    (errors.InvalidData, 422, None),
    (errors.InvalidSpec, 422, None),
    (errors.DuplicateRegularizerNames, 422, None),
    (errors.BadRequest, 400, "The training service refused the request."),
    (errors.NotFound, 404, "The training service does not know what was asked for."),
    (errors.Conflict, 409, "The training service says that the request contradicts an earlier one."),
    (errors.Unprocessable, 422, "The training service cannot use the request."),
    (errors.PrecedingRequestFailed, 409, "An earlier request of the same model failed; nothing was sent. Try again."),
    (errors.SurrogateMismatch, 409, "The gradients that are held do not fit this optimizer step."),
    (errors.RateLimited, 429, "There is more to do than can be done now. Try again later."),
    (errors.UnsupportedFeature, 501, "The training service cannot do this."),
    (errors.Authentication, 502, "The training service does not accept this server's account."),
    (errors.BillingRequired, 502, "The training service does not accept this server's account."),
    (errors.PermissionDenied, 502, "The training service does not accept this server's account."),
    (errors.APIStatusError, 502, "The training service answered with an error."),
    (errors.ConnectionFailed, 503, "The training service cannot be reached. Try again later."),
    (errors.ClientClosed, 503, "This server is stopping. Try again later."),
    (errors.TimeoutExceeded, 504, "The training service did not answer in time."),
    (errors.RegularizerTimeout, 504, "A term of the loss did not end in time."),
    (errors.TransportError, 502, "The answer of the training service could not be understood."),
    (errors.RequestFailed, 502, "The training service failed the request."),
    (errors.SequenceLost, 502, "It is not known whether the training service got a request; start again."),
    (errors.TinkexError, 500, "This server failed."),
)


class Problem(BaseModel):
    """What went wrong, after RFC 9457."""

    type: str = Field("about:blank", description="Kind of the problem; `about:blank` is what its status says.")
    title: str = Field(description="The status in words.")
    status: int = Field(description="The HTTP status.")
    detail: str = Field(description="What went wrong this time.")
    error: str | None = Field(None, description="Class of the error, to tell problems apart.")
    errors: list[dict[str, Any]] | None = Field(None, description="What is wrong with which field of the request.")


def service_lifespan(
    make: Callable[[], AsyncServiceClient],
) -> Callable[[FastAPI], AbstractAsyncContextManager[None]]:
    """A lifespan that enters a service client when the application starts and closes it when it stops.

    With a lifespan of your own: `async with service_lifespan(make)(app): ...`.

    Args:
        make: makes the client, on the application's event loop; such as `AsyncServiceClient.from_env`.
    """

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
    """The application's service client, for `Depends`.

    Raises:
        ConfigError: the application does not run inside `service_lifespan`.
    """
    return service_of(connection.app)


def service_of(app: FastAPI) -> AsyncServiceClient:
    """The application's service client.

    Raises:
        ConfigError: the application does not run inside `service_lifespan`.
    """
    service = getattr(app.state, _STATE, None)
    if service is None:
        raise ConfigError("the application has no service client: run it inside service_lifespan(...)")
    return service


ServiceClient = Annotated[AsyncServiceClient, Depends(get_service)]


def add_error_handlers(app: FastAPI, *, all_errors: bool = False) -> None:
    """Lets the errors of this package become answers, as the table of this module says.

    Args:
        app: the application.
        all_errors: give the application's other errors the same form: bad input (422, without repeating the input)
            and `HTTPException`.
    """
    app.add_exception_handler(TinkexError, _answer_error)
    if all_errors:
        app.add_exception_handler(RequestValidationError, _answer_bad_input)
        app.add_exception_handler(HTTPException, _answer_http_exception)


def problem_responses(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The `responses` of a path, for its page in the OpenAPI documentation.

    Args:
        statuses: of the problems that it may answer with.
    """
    return {status: _documented(HTTPStatus(status)) for status in statuses}


def status_of(error: TinkexError) -> int:
    """The HTTP status that an error becomes."""
    return _status_and_detail(error)[0]


def detail_of(error: TinkexError) -> str:
    """What may be told of an error to whoever made the request."""
    return _status_and_detail(error)[1]


async def _answer_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, TinkexError)
    status, detail = _status_and_detail(error)
    if status >= 500:
        cause = f" from {type(error.__cause__).__name__}" if error.__cause__ else ""
        _LOGGER.error("%s %s: %s%s", request.method, request.url.path, type(error).__name__, cause)
    headers: dict[str, str] = {}
    if status in (429, 503):
        asked = error.retry_after if isinstance(error, APIStatusError) else None
        headers["Retry-After"] = str(math.ceil(_PAUSE if asked is None else asked))
    return _answer(status, detail, error=type(error).__name__, headers=headers)


def _status_and_detail(error: TinkexError) -> tuple[int, str]:
    if isinstance(error, RequestFailed) and error.category == "user":
        return 422, str(error)
    kinds = type(error).__mro__
    status, detail = next((status, detail) for kind, status, detail in _ANSWERS if kind in kinds)
    return status, str(error) if detail is None else detail


async def _answer_bad_input(_request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    wrong = [{"loc": list(one["loc"]), "msg": one["msg"], "type": one["type"]} for one in error.errors()]
    return _answer(422, "The request is not as it has to be.", errors=wrong)


async def _answer_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _answer(error.status_code, str(error.detail), headers=dict(error.headers or {}))


def _answer(status: int, detail: str, *, headers: dict[str, str] | None = None, **fields: Any) -> Response:
    problem = Problem(type="about:blank", title=_title(status), status=status, detail=detail, **fields)
    content = problem.model_dump(mode="json", exclude_none=True)
    return JSONResponse(content, status, headers=headers, media_type=PROBLEM_TYPE)


def _title(status: int) -> str:
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return "Error"


def _documented(status: HTTPStatus) -> dict[str, Any]:
    detail = next((detail for _, code, detail in _ANSWERS if code == status and detail), status.description)
    example = {"type": "about:blank", "title": status.phrase, "status": int(status), "detail": detail or status.phrase}
    documented: dict[str, Any] = {
        "description": status.phrase,
        "content": {PROBLEM_TYPE: {"schema": Problem.model_json_schema(), "example": example}},
    }
    if status in (429, 503):
        wait = {"description": "Seconds to wait before the next try.", "schema": {"type": "integer"}}
        documented["headers"] = {"Retry-After": wait}
    return documented
