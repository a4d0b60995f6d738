"""The two ways to write a pass over data: protobuf with packed buffers, and JSON for services that read nothing else.

Results need no dialect: they are read by the type of the answer, whichever way the request was written.
"""

import importlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from tinkex_py.transport.codec import PROTOBUF, EncodedBatch, PassRequest, encode_request, request_as_json

JSON = "application/json"
DialectName = Literal["protobuf", "json"]

_BACKWARD_PATH = "/api/v1/forward_backward"
_FORWARD_PATH = "/api/v1/forward"


@dataclass(frozen=True, repr=False)
class EncodedRequest:
    """A request as bytes; every repeat of it sends the same.

    Attributes:
        path: endpoint.
        parts: the bytes of the body, in order.
        content_type: their media type.
        content_encoding: how they are compressed, or None.
    """

    path: str
    parts: Sequence[bytes | bytearray]
    content_type: str
    content_encoding: str | None = None

    @property
    def size(self) -> int:
        """Bytes of the body."""
        return sum(len(part) for part in self.parts)


class Dialect(Protocol):
    """One way to write a pass over data."""

    @property
    def name(self) -> DialectName:
        """Which one it is."""
        ...

    @property
    def holds_any_number(self) -> bool:
        """Whether NaN and infinity can be written."""
        ...

    @property
    def is_slow(self) -> bool:
        """Whether writing much leaves the event loop's thread; a plain copy does not."""
        ...

    def encode(self, batch: EncodedBatch, request: PassRequest) -> EncodedRequest:
        """Writes one request."""
        ...


class ProtobufDialect:
    """`ForwardBackwardRequest` messages to one endpoint.

    Args:
        compress: with zstd, where `zstandard` is installed (the extra `zstd`). Without it the body goes plain, which
            every service reads.
    """

    name: DialectName = "protobuf"
    holds_any_number = True

    def __init__(self, *, compress: bool = False) -> None:
        self._zstandard: Any = _zstandard() if compress else None
        self.is_slow = self._zstandard is not None

    def encode(self, batch: EncodedBatch, request: PassRequest) -> EncodedRequest:
        """A ForwardBackwardRequest."""
        parts = encode_request(batch, request)
        if self._zstandard is None:
            return EncodedRequest(_BACKWARD_PATH, parts, PROTOBUF)
        body = self._zstandard.ZstdCompressor().compress(b"".join(parts))
        return EncodedRequest(_BACKWARD_PATH, [body], PROTOBUF, "zstd")


class JsonDialect:
    """JSON objects; forward passes have an endpoint of their own."""

    name: DialectName = "json"
    holds_any_number = False
    is_slow = True

    def encode(self, batch: EncodedBatch, request: PassRequest) -> EncodedRequest:
        """A `forward_input` or `forward_backward_input`."""
        path = _FORWARD_PATH if request.forward_only else _BACKWARD_PATH
        return EncodedRequest(path, [_json_bytes(request_as_json(batch, request))], JSON)


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()


def _zstandard() -> Any:
    try:
        return importlib.import_module("zstandard")
    except ImportError:
        return None
