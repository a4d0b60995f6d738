"""What all routes share: checking bodies, finding the running service, and JSON answers."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from functools import wraps
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinkex_py.local.core import Core, Refused

PROTOBUF = "application/x-protobuf"
Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request, Core], Awaitable[Response]]


def with_core(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """A route that needs the running service; answers 503 while there is none."""

    @wraps(endpoint)
    async def route(request: Request) -> Response:
        core: Core | None = request.app.state.service.core
        if core is None:
            raise Refused(503, "the service is not running: the model is still loading, or it was stopped")
        return await endpoint(request, core)

    return route


def parse(model: type[Body], value: Mapping[str, Any]) -> Body:
    """A checked body.

    Raises:
        Refused: 422, naming the fields but not their values.
    """
    try:
        return model.model_validate(value)
    except ValidationError as error:
        raise Refused(422, problems(error)) from None


def problems(error: ValidationError) -> str:
    """What is wrong with a body: its fields, but not their values."""
    return "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors(include_input=False))


async def read_body(request: Request) -> bytes:
    """The body, plain and whole."""
    return await request.body()


def size_of(request: Request) -> int:
    """Bytes of the body, unpacked."""
    return int(request.headers["content-length"])


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object.

    Raises:
        Refused: 400.
    """
    try:
        value: object = json.loads(await request.body())
    except ValueError as error:
        # The decoder's own text names a place, never the content.
        raise Refused(400, f"the body is no valid JSON: {_without_content(error)}") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def _without_content(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos})"
    return "a number is too long"


async def read(request: Request, model: type[Body]) -> Body:
    """Read and check a JSON body.

    Raises:
        Refused: see `read_json` and `parse`.
    """
    return parse(model, await read_json(request))


@dataclass(frozen=True)
class Page:
    """Which part of a listing is wanted; a limit below 0 is all of it."""

    limit: int
    offset: int

    def cursor(self, count: int) -> dict[str, int]:
        """The page's place among `count` entries."""
        return {"offset": self.offset, "limit": self.limit, "total_count": count}


def page_of(request: Request, limit: int) -> Page:
    """The page that a query asks for.

    Args:
        request: has `limit` and `offset` in its query, or not.
        limit: what holds if it does not.

    Raises:
        Refused: 422.
    """
    values = {"limit": request.query_params.get("limit"), "offset": request.query_params.get("offset")}
    for name, value in values.items():
        if value is not None and not (value.isdecimal() and len(value) <= 9):
            raise Refused(422, f"{name} must be a whole number from 0 to 999999999")
    return Page(int(values["limit"] or limit), int(values["offset"] or 0))


def digest(name: str, value: Mapping[str, Any] | bytes) -> bytes:
    """What tells a repeat from another request under the same number."""
    content = value if isinstance(value, bytes) else json.dumps(value, sort_keys=True).encode()
    return hashlib.sha256(name.encode() + b"\0" + content).digest()


class AnyTextResponse(JSONResponse):
    """JSON of texts that came from anywhere: half a character, which has no UTF-8 form, becomes a question mark."""

    def render(self, content: Any) -> bytes:
        """The body."""
        return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode(
            "utf-8", "replace"
        )


def answer(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer without entries that are None."""
    kept = {key: item for key, item in value.items() if item is not None}
    return AnyTextResponse(kept, status_code=status, headers=headers)
