"""What all routes share: reading bodies, finding the running service, and errors as JSON."""

import hashlib
import json
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from tinkex_py.local.core import Core, Refused

MAX_BODY_BYTES = 1024**3
PROTOBUF = "application/x-protobuf"
Body = TypeVar("Body", bound=BaseModel)
Endpoint = Callable[[Request, Core], Awaitable[Response]]


def with_core(endpoint: Endpoint) -> Callable[[Request], Awaitable[Response]]:
    """A route that needs the running service; answers 503 while there is none."""

    async def route(request: Request) -> Response:
        core: Core | None = request.app.state.service.core
        if core is None:
            raise Refused(503, "the service is not running: the model is still loading, or it was stopped")
        return await endpoint(request, core)

    return route


async def read_body(request: Request) -> bytes:
    """The body, decompressed.

    Raises:
        Refused: 413 too large, 415 unknown compression, 400 damaged.
    """
    if int(request.headers.get("content-length") or 0) > MAX_BODY_BYTES:
        raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    body = await request.body()
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding in ("identity", ""):
        return body
    if encoding != "zstd":
        raise Refused(415, f"Content-Encoding {encoding!r} is not understood; send the body plain or with zstd")
    try:
        import zstandard
    except ImportError:
        raise Refused(415, "zstd is not installed here: send the body plain, or pip install zstandard") from None
    try:
        with zstandard.ZstdDecompressor().stream_reader(body) as reader:
            plain = reader.read(MAX_BODY_BYTES + 1)
    except zstandard.ZstdError as error:
        raise Refused(400, "the body is no valid zstd stream") from error
    if len(plain) > MAX_BODY_BYTES:
        raise Refused(413, f"the body is larger than {MAX_BODY_BYTES} bytes")
    return plain


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object.

    Raises:
        Refused: 400.
    """
    raw = await read_body(request)
    try:
        value = json.loads(raw or b"{}")
    except ValueError as error:
        raise Refused(400, f"the body is no valid JSON: {error}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


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


def answer(value: Mapping[str, Any], status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A JSON answer without entries that are None."""
    kept = {key: item for key, item in value.items() if item is not None}
    return JSONResponse(kept, status_code=status, headers=headers)
