"""Which dialect a service reads, found out without putting a numbered request at risk (protocol: 9.3 item 2)."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from tinkex_py.errors import APIStatusError
from tinkex_py.transport.codec import NO_DATUMS, PassRequest
from tinkex_py.transport.dialects import Dialect, DialectName, EncodedRequest, JsonDialect, ProtobufDialect
from tinkex_py.transport.flags import ClientFlags

# No service can have a model of this name, so a request for it cannot do anything.
NO_MODEL = "probe-nonexistent"
_PROBE = PassRequest(NO_MODEL, 1, "cross_entropy", {}, forward_only=True)
_NOT_THIS_BODY = frozenset({415, 422})

Send = Callable[[EncodedRequest], Awaitable[object]]


async def choose_dialect(wanted: str, flags: ClientFlags, send: Send) -> Dialect:
    """The dialect for one connection.

    Args:
        wanted: "protobuf", "json" or "auto".
        flags: what the service says about itself.
        send: sends one request; raises APIStatusError for an answer that is not 2xx.
    """
    name: str = wanted
    if wanted == "auto":
        name = await _probe(send) if flags.proto_write_fwdbwd is None else _told(flags.proto_write_fwdbwd)
    return JsonDialect() if name == "json" else ProtobufDialect(compress=flags.proto_compress_fwdbwd)


def refuses_protobuf(error: APIStatusError) -> bool:
    """Whether the answer says that the body cannot be read as such; then no future was made."""
    if error.status == 415:
        return True
    return error.status == 422 and _is_about_the_body(error.body)


def _told(reads_protobuf: bool) -> DialectName:
    return "protobuf" if reads_protobuf else "json"


async def _probe(send: Send) -> DialectName:
    """Asks for a forward pass of a model that cannot exist. Inconclusive answers count as protobuf."""
    refusal = await _refusal(send, ProtobufDialect())
    if refusal is None:
        return "protobuf"
    if refusal.status in _NOT_THIS_BODY:
        return "json"
    if refusal.status == 404 and not _speaks_of_a_model(refusal.body):
        return await _probe_json(send)
    # A service whose framework stumbles over bytes that are no JSON answers 500.
    return await _probe_json(send) if refusal.status >= 500 else "protobuf"


async def _probe_json(send: Send) -> DialectName:
    refusal = await _refusal(send, JsonDialect())
    if refusal is None or refusal.status >= 500:
        return "protobuf"
    speaks = refusal.status in (400, 403, 404) and _speaks_of_a_model(refusal.body)
    return "json" if speaks or _is_about_a_field(refusal) else "protobuf"


async def _refusal(send: Send, dialect: Dialect) -> APIStatusError | None:
    try:
        await send(dialect.encode(NO_DATUMS, _PROBE))
    except APIStatusError as error:
        return error
    return None


def _speaks_of_a_model(body: object) -> bool:
    """Whether a JSON answer is about the model that was asked for, and not about the address or the body."""
    return isinstance(body, dict) and "model" in str(cast("dict[str, Any]", body)).lower()


def _is_about_the_body(body: object) -> bool:
    """Whether validation failed at the body as a whole: `{"detail": [{"loc": ["body"], ...}]}`."""
    return any(place == ["body"] for place in _places(body))


def _is_about_a_field(error: APIStatusError) -> bool:
    """Whether validation failed inside of the body, which was thus read."""
    return error.status == 422 and any(len(place) > 1 and isinstance(place[1], str) for place in _places(error.body))


def _places(body: object) -> list[list[object]]:
    """Where validation failed, as FastAPI tells it."""
    detail: object = cast("dict[str, Any]", body).get("detail") if isinstance(body, dict) else None
    items = cast("list[object]", detail) if isinstance(detail, list) else []
    places = [cast("Mapping[str, Any]", item).get("loc") for item in items if isinstance(item, Mapping)]
    return [cast("list[object]", place) for place in places if isinstance(place, list)]
