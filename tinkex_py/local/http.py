"""What all routes share: routers, the running service, numbered requests, pages, and JSON answers."""

import hashlib
import inspect
import json
import re
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from fastapi.routing import APIRoute
from pydantic import BaseModel, BeforeValidator, Field, ValidationError
from starlette.routing import request_response

from tinkex_py.local.core import Core, Refused
from tinkex_py.local.requests import NumberedBody
from tinkex_py.local.responses import ErrorResponse, SubmittedResponse
from tinkex_py.local.results import Success

API = "/api/v1"
PROTOBUF = "application/x-protobuf"
Body = TypeVar("Body", bound=BaseModel)


class AnyTextResponse(JSONResponse):
    """JSON of texts that came from anywhere: half a character, which has no UTF-8 form, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )


class Route(APIRoute):
    """A route whose answers leave out what is None.

    An endpoint that takes the request itself and makes the response itself is called directly: to resolve parameters
    that it does not have would cost more than all the rest of a poll.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "response_model_exclude_none": True})
        signature = inspect.signature(self.endpoint)
        taken = [parameter.annotation for parameter in signature.parameters.values()]
        if taken == [Request] and signature.return_annotation is Response:
            self.app = request_response(self.endpoint)


def api_router(prefix: str = API, route_class: type[Route] = Route) -> APIRouter:
    """A router of the API. It reads bodies without a type as JSON, and describes how it refuses."""
    refusal = {"model": ErrorResponse, "description": "refused"}
    return APIRouter(
        prefix=prefix,
        route_class=route_class,
        responses={"4XX": refusal, "5XX": refusal},
        generate_unique_id_function=_operation_id,
        strict_content_type=False,
    )


def _operation_id(route: APIRoute) -> str:
    words: list[str] = re.findall(r"\w+", route.path.removeprefix(API))
    return "_".join([*sorted(route.methods or ()), *words]).lower()


def body_schema(model: type[BaseModel], *, or_protobuf: bool = False) -> dict[str, Any]:
    """The description of a body that a route reads with `read_json`, for `openapi_extra`."""
    content: dict[str, Any] = {"application/json": {"schema": model.model_json_schema()}}
    if or_protobuf:
        content[PROTOBUF] = {"schema": {"type": "string", "format": "binary"}}
    return {"requestBody": {"required": True, "content": content}}


def core_of(request: Request) -> Core:
    """The running service.

    Raises:
        Refused: 503, there is none.
    """
    core: Core | None = request.app.state.service.core
    if core is None:
        raise Refused(503, "the service is not running: the model is still loading, or it was stopped")
    return core


async def read_json(request: Request, model: type[Body]) -> Body:
    """The JSON body of a route that takes the request itself.

    Raises:
        RequestValidationError: as where a body is declared.
    """
    try:
        value = await request.json()
    except json.JSONDecodeError as error:
        problem = {"type": "json_invalid", "loc": ("body", error.pos), "msg": "", "ctx": {"error": error.msg}}
        raise RequestValidationError([problem]) from None
    except ValueError:
        raise Refused(400, "the body is no valid JSON: a number is too long") from None
    try:
        return model.model_validate(value)
    except ValidationError as error:
        found = [{**item, "loc": ("body", *item["loc"])} for item in error.errors(include_input=False)]
        raise RequestValidationError(found, body=value) from None


def problems(errors: Sequence[Any]) -> str:
    """What is wrong with a body: its fields, but not their values."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in errors)


async def json_digest(request: Request) -> bytes:
    """Equal for repeats of a JSON request, and different for other requests under the same number."""
    return digest_of(request, json.dumps(await request.json(), sort_keys=True).encode())


def digest_of(request: Request, content: bytes) -> bytes:
    """The same of a request whose content is given in a form that is equal for every repeat."""
    return hashlib.sha256(request.scope["path"].encode() + b"\0" + content).digest()


def size_of(request: Request) -> int:
    """Bytes of the body, unpacked."""
    return int(request.headers["content-length"])


async def in_order(request: Request, body: NumberedBody, work: Callable[[], Success]) -> SubmittedResponse:
    """Hand in a JSON request's work on a training model; raises like `Core.in_order`."""
    digest = await json_digest(request)
    request_id = core_of(request).in_order(body.model_id, body.seq_id, digest, size_of(request), work)
    return SubmittedResponse(request_id=request_id, model_id=body.model_id)


def _decimal(value: Any) -> Any:
    if isinstance(value, str) and not (value.isdecimal() and len(value) <= 9):
        raise ValueError("must be a whole number from 0 to 999999999")
    return value


Whole = Annotated[int, BeforeValidator(_decimal), Field(ge=0, le=999_999_999)]
"""A number in a query."""
