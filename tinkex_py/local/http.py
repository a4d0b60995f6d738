"""What all routes share: routers, the running service, ordered requests, and JSON responses."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from itertools import islice
from typing import Annotated, Any, TypeVar, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.routing import request_response

from tinkex_py.local.bodies import SMALL_BODY
from tinkex_py.local.core import Core, Refused
from tinkex_py.local.results import Success
from tinkex_py.local.schemas import ErrorResponse, NumberedBody, SubmittedResponse

API = "/api/v1"
JSON_VALUE = "tinkex.json"
"""Key of the decoded body in the scope of a request."""
PROTOBUF = "application/x-protobuf"
NAMED_PROBLEMS = 8
_PIECE = 4096
Body = TypeVar("Body", bound=BaseModel)


class UnicodeJSONResponse(JSONResponse):
    """JSON that may contain lone surrogates from requests; they become question marks."""

    def render(self, content: Any) -> bytes:
        """Returns the body."""
        text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        return text.encode("utf-8", "replace")


def json_in_pieces(content: Any) -> bytes:
    """Returns JSON like `UnicodeJSONResponse`; slower, but other threads run meanwhile."""
    encoder = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    pieces = encoder.iterencode(content)
    body = bytearray()
    while text := "".join(islice(pieces, _PIECE)):
        body += text.encode("utf-8", "replace")
    return bytes(body)


class _DecodedRequest(Request):
    async def json(self) -> Any:
        """Returns the value that the middleware decoded."""
        return self.scope[JSON_VALUE]


class Route(APIRoute):
    """A route whose responses omit None.

    An endpoint that takes a Request and returns a Response is called directly, because FastAPI's resolution of
    parameters costs more than the rest of a poll.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "response_model_exclude_none": True})
        signature = inspect.signature(self.endpoint)
        taken = [parameter.annotation for parameter in signature.parameters.values()]
        if taken == [Request] and signature.return_annotation is Response:
            self.app = request_response(self.endpoint)

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        """Returns a handler of requests whose body is decoded."""
        handle = super().get_route_handler()

        async def handled(request: Request) -> Response:
            return await handle(_DecodedRequest(request.scope, request.receive))

        return handled


def api_router(route_class: type[Route] = Route) -> APIRouter:
    """Returns a router of the API, which reads bodies without a content type as JSON."""
    refusal = {"model": ErrorResponse, "description": "refused"}
    return APIRouter(
        prefix=API,
        route_class=route_class,
        responses={"4XX": refusal, "5XX": refusal},
        generate_unique_id_function=_operation_id,
        strict_content_type=False,
    )


def _operation_id(route: APIRoute) -> str:
    words: list[str] = re.findall(r"\w+", route.path.removeprefix(API))
    return "_".join([*sorted(route.methods or ()), *words]).lower()


def body_schema(model: type[BaseModel], *, or_protobuf: bool = False) -> dict[str, Any]:
    """Returns the `openapi_extra` of a route that reads its body with `read_json`."""
    content: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    if or_protobuf:
        content[PROTOBUF] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


async def core_of(request: Request) -> Core:
    """Returns the running service; Refused (503) if there is none."""
    core: Core | None = request.app.state.service.core
    if core is None:
        raise Refused(503, "the service is not running: the model is still loading, or the service was stopped")
    return core


Running = Annotated[Core, Depends(core_of)]


def read_json(request: Request, model: type[Body]) -> Body:
    """Returns the JSON body of a route that takes the request; raises what FastAPI raises for a declared body."""
    value = request.scope[JSON_VALUE]
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_input=False)]
        raise RequestValidationError(found, body=value) from None


def problems(errors: Sequence[Any]) -> str:
    """Returns which fields of a body are invalid and why, without their values."""
    named = [
        ": ".join(filter(None, [".".join(map(str, item["loc"])), item["msg"]])) for item in errors[:NAMED_PROBLEMS]
    ]
    return "; ".join([*named, *([f"and {len(errors) - len(named)} more"] if len(errors) > len(named) else [])])


async def json_digest(request: Request, core: Core) -> bytes:
    """Returns the digest of a JSON request: equal for its repeats, different for other requests."""
    pieces = _sorted_pieces(request.scope[JSON_VALUE])
    if size_of(request) <= SMALL_BODY:
        return digest_of(request, pieces)
    return await core.aside(lambda: digest_of(request, pieces))


def digest_of(request: Request, content: Iterable[bytes]) -> bytes:
    """Returns the digest of a request with this content, which must be the same for every repeat."""
    digest = hashlib.sha256(request.scope["path"].encode() + b"\0")
    for piece in content:
        digest.update(piece)
    return digest.digest()


def _sorted_pieces(value: Any) -> Iterator[bytes]:
    """A JSON value with sorted keys. No piece takes long: encoding holds the interpreter until its end."""
    if isinstance(value, dict):
        fields = cast("dict[str, Any]", value)
        yield b"{"
        for key in sorted(fields):
            yield json.dumps(key).encode()
            yield from _sorted_pieces(fields[key])
        yield b"}"
    elif isinstance(value, list):
        items = cast("list[Any]", value)
        for start in range(0, len(items), _PIECE):
            part = items[start : start + _PIECE]
            if {list, dict}.isdisjoint(map(type, part)):
                yield json.dumps(part).encode()
            else:
                for item in part:
                    yield b","
                    yield from _sorted_pieces(item)
        yield b"]"
    else:
        yield json.dumps(value).encode()


def size_of(request: Request) -> int:
    """Returns the bytes of the decompressed body."""
    return int(request.headers["content-length"])


async def in_order(request: Request, core: Core, body: NumberedBody, work: Callable[[], Success]) -> SubmittedResponse:
    """Submits the work of a JSON request to a training model; raises like `Core.in_order`."""
    digest = await json_digest(request, core)
    request_id = core.in_order(body.model_id, body.seq_id, digest, size_of(request), work)
    return SubmittedResponse(request_id=request_id, model_id=body.model_id)


def _decimal(value: Any) -> Any:
    if isinstance(value, str) and not (value.isdecimal() and len(value) <= 9):
        raise ValueError("must be a whole number from 0 to 999999999")
    return value


Whole = Annotated[int, BeforeValidator(_decimal), Field(ge=0, le=999_999_999)]
"""A number in a query."""
