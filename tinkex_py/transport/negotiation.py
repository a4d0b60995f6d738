"""Detects which encoding a service accepts, without risking a numbered request (protocol: 9.3 item 2)."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, cast

from tinkex_py.errors import APIStatusError
from tinkex_py.transport.encoding import NO_DATUMS, Encoding, EncodingName, JsonEncoding, PassHeader, ProtobufEncoding
from tinkex_py.transport.messages import Request
from tinkex_py.transport.server_config import ServerConfig

# No service has a model of this name, so a request for it has no effect.
NO_MODEL = "probe-nonexistent"
_PROBE = PassHeader(NO_MODEL, 1, "cross_entropy", {}, forward_only=True)
_BODY_REFUSED = frozenset({415, 422})

Send = Callable[[Request], Awaitable[object]]


class PassEncoding:
    """The encoding of the passes of one session, chosen at the first use.

    Args:
        wanted: "protobuf", "json" or "auto".
        config: the service's own settings.
        send: sends one probe; raises APIStatusError if the response is not 2xx.

    Attributes:
        chosen: the encoding; None before the first use.
    """

    def __init__(self, wanted: str, config: ServerConfig, send: Send) -> None:
        self.chosen: Encoding | None = None
        self._config = config
        self._wanted = wanted
        self._send = send
        self._choosing = asyncio.Lock()

    async def choose(self) -> Encoding:
        """Returns the encoding, and probes the service if necessary.

        Raises:
            TransportError: the probe got no usable response.
        """
        async with self._choosing:
            self.chosen = self.chosen or await choose_encoding(self._wanted, self._config, self._send)
            return self.chosen

    def falls_back_to_json(self, error: APIStatusError) -> bool:
        """Switches to JSON if a service refused a protobuf body that it could not read; returns whether it did.

        Such a refusal does not spend the number, so the pass is sent again with it.
        """
        if self._wanted != "auto" or not refuses_protobuf(error):
            return False
        self.chosen = JsonEncoding()
        return True


async def choose_encoding(wanted: str, config: ServerConfig, send: Send) -> Encoding:
    """Returns the encoding for one session; the arguments are those of `PassEncoding`."""
    name: str = wanted
    if wanted == "auto" and config.proto_write_fwdbwd is None:
        name = await _probe(send)
    elif wanted == "auto":
        name = "protobuf" if config.proto_write_fwdbwd else "json"
    return JsonEncoding() if name == "json" else ProtobufEncoding(compress=config.proto_compress_fwdbwd)


def refuses_protobuf(error: APIStatusError) -> bool:
    """Whether the service could not read the body at all, and so created no future."""
    # `{"detail": [{"loc": ["body"], ...}]}`: validation failed for the body as a whole.
    return error.status == 415 or (error.status == 422 and ["body"] in _locations(error.body))


async def _probe(send: Send) -> EncodingName:
    # Requests a forward pass of a model that cannot exist. Inconclusive responses count as protobuf.
    refusal = await _refusal(send, ProtobufEncoding())
    if refusal is None:
        return "protobuf"
    if refusal.status in _BODY_REFUSED:
        return "json"
    if refusal.status == 404 and not _mentions_a_model(refusal.body):
        return await _probe_json(send)
    # A service whose framework fails on bytes that are not JSON returns 500.
    return await _probe_json(send) if refusal.status >= 500 else "protobuf"


async def _probe_json(send: Send) -> EncodingName:
    refusal = await _refusal(send, JsonEncoding())
    if refusal is None:
        return "json"
    if refusal.status >= 500:
        return "protobuf"
    read_the_model = refusal.status in (400, 403, 404) and _mentions_a_model(refusal.body)
    read_a_field = refusal.status == 422 and any(
        len(location) > 1 and isinstance(location[1], str) for location in _locations(refusal.body)
    )
    return "json" if read_the_model or read_a_field else "protobuf"


async def _refusal(send: Send, encoding: Encoding) -> APIStatusError | None:
    try:
        await send(encoding.encode(NO_DATUMS, _PROBE))
    except APIStatusError as error:
        return error
    return None


def _mentions_a_model(body: object) -> bool:
    # A JSON response about the model of the request, and not about the path or the body.
    return isinstance(body, dict) and "model" in str(cast("dict[str, Any]", body)).lower()


def _locations(body: object) -> list[list[object]]:
    """Returns the locations of validation errors in FastAPI's form."""
    detail: object = cast("dict[str, Any]", body).get("detail") if isinstance(body, dict) else None
    items = cast("list[object]", detail) if isinstance(detail, list) else []
    locations = [cast("Mapping[str, Any]", item).get("loc") for item in items if isinstance(item, Mapping)]
    return [cast("list[object]", location) for location in locations if isinstance(location, list)]
