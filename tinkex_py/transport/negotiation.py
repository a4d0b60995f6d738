"""Which encoding a service reads, found out without putting a numbered request at risk (protocol: 9.3 item 2)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from tinkex_py.errors import APIStatusError
from tinkex_py.transport.encoding import NO_DATUMS, Encoding, EncodingName, JsonEncoding, PassHeader, ProtobufEncoding
from tinkex_py.transport.messages import Request
from tinkex_py.transport.server_config import ServerConfig

# No service can have a model of this name, so a request for it cannot do anything.
NO_MODEL = "probe-nonexistent"
_PROBE = PassHeader(NO_MODEL, 1, "cross_entropy", {}, forward_only=True)
_NOT_THIS_BODY = frozenset({415, 422})

Send = Callable[[Request], Awaitable[object]]


class PassEncoding:
    """How the passes of one session are written; found out at the first use.

    Args:
        wanted: "protobuf", "json" or "auto".
        send: sends one probe; raises APIStatusError for a response that is not 2xx.

    Attributes:
        chosen: how this service reads passes over data; None before it was asked.
    """

    def __init__(self, wanted: str, config: ServerConfig, send: Send) -> None:
        self.chosen: Encoding | None = None
        self._config = config
        self._wanted = wanted
        self._send = send
        self._choosing = asyncio.Lock()

    async def choose(self) -> Encoding:
        """How this service reads passes over data.

        Raises:
            APIStatusError, TransportError: the service could not be asked.
        """
        async with self._choosing:
            self.chosen = self.chosen or await choose_encoding(self._wanted, self._config, self._send)
            return self.chosen

    def falls_back_to_json(self, error: APIStatusError) -> bool:
        """Whether a refused pass is to be written in JSON instead, and all later ones too.

        The response says that the body could not be read, so the number was not used and goes with the other form.
        """
        if self._wanted != "auto" or not refuses_protobuf(error):
            return False
        self.chosen = JsonEncoding()
        return True


async def choose_encoding(wanted: str, config: ServerConfig, send: Send) -> Encoding:
    """The encoding for one session.

    Args:
        wanted: "protobuf", "json" or "auto".
        config: what the service says about itself.
        send: sends one request; raises APIStatusError for a response that is not 2xx.
    """
    name: str = wanted
    if wanted == "auto":
        name = await _probe(send) if config.proto_write_fwdbwd is None else _name_of(config.proto_write_fwdbwd)
    return JsonEncoding() if name == "json" else ProtobufEncoding(compress=config.proto_compress_fwdbwd)


def refuses_protobuf(error: APIStatusError) -> bool:
    """Whether the response says that the body cannot be read as such; then no future was made."""
    if error.status == 415:
        return True
    return error.status == 422 and _is_about_the_body(error.body)


def _name_of(reads_protobuf: bool) -> EncodingName:
    return "protobuf" if reads_protobuf else "json"


async def _probe(send: Send) -> EncodingName:
    """Asks for a forward pass of a model that cannot exist. Inconclusive responses count as protobuf."""
    refusal = await _refusal(send, ProtobufEncoding())
    if refusal is None:
        return "protobuf"
    if refusal.status in _NOT_THIS_BODY:
        return "json"
    if refusal.status == 404 and not _speaks_of_a_model(refusal.body):
        return await _probe_json(send)
    # A service whose framework fails on bytes that are no JSON returns 500.
    return await _probe_json(send) if refusal.status >= 500 else "protobuf"


async def _probe_json(send: Send) -> EncodingName:
    refusal = await _refusal(send, JsonEncoding())
    if refusal is None:
        return "json"
    if refusal.status >= 500:
        return "protobuf"
    speaks = refusal.status in (400, 403, 404) and _speaks_of_a_model(refusal.body)
    return "json" if speaks or _is_about_a_field(refusal) else "protobuf"


async def _refusal(send: Send, encoding: Encoding) -> APIStatusError | None:
    try:
        await send(encoding.encode(NO_DATUMS, _PROBE))
    except APIStatusError as error:
        return error
    return None


def _speaks_of_a_model(body: object) -> bool:
    """Whether a JSON response is about the model that it named, and not about the address or the body."""
    return isinstance(body, dict) and "model" in str(cast("dict[str, Any]", body)).lower()


def _is_about_the_body(body: object) -> bool:
    """Whether validation failed at the body as a whole: `{"detail": [{"loc": ["body"], ...}]}`."""
    return any(place == ["body"] for place in _places(body))


def _is_about_a_field(error: APIStatusError) -> bool:
    """Whether validation failed inside of the body, which was thus read."""
    return error.status == 422 and any(len(place) > 1 and isinstance(place[1], str) for place in _places(error.body))


def _places(body: object) -> list[list[object]]:
    """Where validation failed, in FastAPI's form."""
    detail: object = cast("dict[str, Any]", body).get("detail") if isinstance(body, dict) else None
    items = cast("list[object]", detail) if isinstance(detail, list) else []
    places = [cast("Mapping[str, Any]", item).get("loc") for item in items if isinstance(item, Mapping)]
    return [cast("list[object]", place) for place in places if isinstance(place, list)]
