"""Chunks of a model input: text as token ids, images, and audio."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, cast

import numpy as np
from pydantic import Discriminator, Field, Tag, field_serializer, field_validator

from tinkex_py.errors import InvalidData
from tinkex_py.types.base import WireModel
from tinkex_py.types.tensors import Array, without_torch
from tinkex_py.values import Integer

ImageFormat = Literal["png", "jpeg"]
_BEGINNINGS: Mapping[bytes, ImageFormat] = {b"\x89PNG\r\n\x1a\n": "png", b"\xff\xd8\xff": "jpeg"}
# The header of an array in a DmelChunk: an optional marker, a dtype, and the number and sizes of its dimensions.
_CONSTANT = 254
_LAST_DTYPE = 7
_SIZE_BITS = 63


class EncodedTextChunk(WireModel):
    """Text as token ids.

    Args:
        tokens: ids, each in `[0, 2**31)`; stored as one read-only int32 buffer.
    """

    type: Literal["encoded_text"] = "encoded_text"
    tokens: Array

    def __init__(self, *, tokens: Sequence[int] | Array, type: Literal["encoded_text"] = "encoded_text") -> None:  # noqa: A002
        super().__init__(tokens=tokens, type=type)

    @field_validator("tokens", mode="before")
    @classmethod
    def _pack(cls, tokens: Any) -> Array:
        array = np.asarray(without_torch(tokens))
        if array.ndim != 1:
            raise InvalidData(f"tokens must be a flat sequence, got shape {array.shape}")
        if array.size and array.dtype.kind not in "iu":
            raise InvalidData(f"tokens must be integers, got dtype {array.dtype}")
        wrong = array[(array < 0) | (array >= 2**31)] if array.size else array
        if wrong.size:
            raise InvalidData(f"token ids must be in [0, 2**31), got {wrong[0]}")
        packed = np.array(array, dtype="<i4", order="C", copy=True)
        packed.flags.writeable = False
        return packed

    @field_serializer("tokens")
    def _serialize_tokens(self, tokens: Array) -> list[int]:
        return cast("list[int]", tokens.tolist())

    @property
    def length(self) -> int:
        """Number of tokens."""
        return int(self.tokens.size)

    def __eq__(self, other: object) -> bool:
        """Whether the tokens are equal."""
        return isinstance(other, EncodedTextChunk) and np.array_equal(self.tokens, other.tokens)

    def __hash__(self) -> int:
        """Consistent with equality."""
        return hash(self.tokens.tobytes())

    def __repr__(self) -> str:
        """Shows the length only, because the tokens are a user's text."""
        return f"EncodedTextChunk(length={self.length})"

    __str__ = __repr__


class _Picture(WireModel):
    expected_tokens: Annotated[Integer, Field(ge=1)] | None = None

    @property
    def length(self) -> int:
        """Number of tokens.

        Raises:
            InvalidData: `expected_tokens` is unknown.
        """
        if self.expected_tokens is None:
            raise InvalidData(
                f"the length of an {type(self).__name__} is unknown: pass expected_tokens, the number of tokens that "
                "the model makes of the image"
            )
        return self.expected_tokens

    def __repr__(self) -> str:
        """Shows the length only, because the image is a user's."""
        return f"{type(self).__name__}(length={self.expected_tokens})"

    __str__ = __repr__


class ImageChunk(_Picture):
    """An image.

    Args:
        data: the bytes of a PNG or JPEG file.
        format: "png" or "jpeg"; None: as the first bytes say.
        expected_tokens: number of tokens that the model makes of the image. The service counts them itself, and refuses
            another number. None: unknown; then the length of the input is unknown here.

    Raises:
        InvalidData: the format is none of the two.
    """

    data: bytes = Field(strict=True, min_length=1)
    format: ImageFormat
    type: Literal["image"] = "image"

    def __init__(
        self,
        *,
        data: bytes,
        format: ImageFormat | None = None,  # noqa: A002  (the protocol's name)
        expected_tokens: int | None = None,
        type: Literal["image"] = "image",  # noqa: A002
    ) -> None:
        given = bytes(data) if isinstance(data, bytearray | memoryview) else data
        found = _format_of(given) if format is None else format
        fields: dict[str, Any] = {"data": given, "format": found, "expected_tokens": expected_tokens, "type": type}
        super().__init__(**fields)

    @classmethod
    def of(cls, image: object, *, expected_tokens: int | None = None) -> "ImageChunk":
        """Returns the chunk of an image.

        Args:
            image: the bytes of a PNG or JPEG file; a PIL image, which becomes a PNG file; or `{"bytes": ...}`, as
                `datasets` has images that are not decoded.
            expected_tokens: number of tokens that the model makes of it; None: unknown.

        Raises:
            InvalidData: it is none of these.
        """
        if isinstance(image, Mapping):
            image = cast("Mapping[str, object]", image).get("bytes")
        elif callable(getattr(image, "save", None)):
            buffer = io.BytesIO()
            cast("Any", image).save(buffer, "PNG")
            image = buffer.getvalue()
        return cls(data=cast("bytes", image), expected_tokens=expected_tokens)

    @field_serializer("data")
    def _serialize_data(self, data: bytes) -> str:
        return base64.b64encode(data).decode()

    @property
    def stored_bytes(self) -> int:
        """Bytes in a request."""
        return len(self.data)


class ImageAssetPointerChunk(_Picture):
    """An image that the service has, or can load. Binary requests cannot hold it; JSON can.

    Args:
        location: path or URL of the image, for the service.
        format: "png" or "jpeg".
        expected_tokens: as in `ImageChunk`.
    """

    location: str = Field(min_length=1)
    format: ImageFormat
    type: Literal["image_asset_pointer"] = "image_asset_pointer"

    @property
    def stored_bytes(self) -> int:
        """Bytes in a request."""
        return len(self.location)


class DmelChunk(WireModel):
    """Audio, as a serialized array of tokens of a dMel encoder.

    Args:
        dmel: the bytes of the array; its first dimension is the number of tokens.
    """

    dmel: bytes = Field(strict=True, min_length=1)
    type: Literal["dmel"] = "dmel"

    @field_serializer("dmel")
    def _serialize_dmel(self, dmel: bytes) -> str:
        return base64.b64encode(dmel).decode()

    @property
    def length(self) -> int:
        """Number of tokens.

        Raises:
            InvalidData: the bytes do not begin as those of an array.
        """
        at = 1 if self.dmel[:1] == bytes([_CONSTANT]) else 0
        if len(self.dmel) <= at or self.dmel[at] > _LAST_DTYPE:
            raise InvalidData(f"dmel must be a serialized array, got {len(self.dmel)} bytes that do not begin as one")
        dimensions, at = _size(self.dmel, at + 1)
        if not dimensions:
            raise InvalidData("dmel must be a serialized array with at least one dimension, got one without")
        return _size(self.dmel, at)[0]

    @property
    def stored_bytes(self) -> int:
        """Bytes in a request."""
        return len(self.dmel)

    def __repr__(self) -> str:
        """Shows the size only, because the audio is a user's."""
        return f"DmelChunk({len(self.dmel)} bytes)"

    __str__ = __repr__


def _kind(chunk: Any) -> str:
    """Returns the type of a chunk; mappings without one have a field that only this type has."""
    if not isinstance(chunk, Mapping):
        return str(getattr(chunk, "type", "encoded_text"))
    fields = cast("Mapping[str, Any]", chunk)
    found = next((kind for field, kind in CHUNK_FIELDS.items() if field in fields), "encoded_text")
    return str(fields.get("type") or found)


CHUNK_FIELDS: Mapping[str, str] = {
    "tokens": "encoded_text",
    "data": "image",
    "location": "image_asset_pointer",
    "dmel": "dmel",
}
"""The field that identifies a chunk without a type."""

Chunk = Annotated[
    Annotated[EncodedTextChunk, Tag("encoded_text")]
    | Annotated[ImageChunk, Tag("image")]
    | Annotated[ImageAssetPointerChunk, Tag("image_asset_pointer")]
    | Annotated[DmelChunk, Tag("dmel")],
    Discriminator(_kind),
]


def known_length(chunk: Chunk) -> int | None:
    """Returns the number of tokens of a chunk; None if it is unknown."""
    try:
        return chunk.length
    except InvalidData:
        return None


def own_chunk(chunk: Any) -> "EncodedTextChunk | ImageChunk | ImageAssetPointerChunk | DmelChunk":
    """Returns a chunk of the official SDK as one of this package.

    Raises:
        InvalidData: it has another type, or is invalid.
    """
    match getattr(chunk, "type", type(chunk).__name__):
        case "encoded_text":
            return EncodedTextChunk(tokens=chunk.tokens)
        case "image":
            return ImageChunk(data=chunk.data, format=chunk.format, expected_tokens=chunk.expected_tokens)
        case "image_asset_pointer":
            return ImageAssetPointerChunk(
                location=chunk.location, format=chunk.format, expected_tokens=chunk.expected_tokens
            )
        case "dmel":
            return DmelChunk(dmel=chunk.dmel)
        case kind:
            raise InvalidData(
                f"the input of the datum contains a chunk {kind!r}: chunks are {', '.join(CHUNK_FIELDS.values())}"
            )


def _format_of(data: object) -> ImageFormat:
    if not isinstance(data, bytes) or not data:
        got = "none" if isinstance(data, bytes) else f"a {type(data).__name__}"
        raise InvalidData(f"data must be the bytes of an image file, got {got}")
    for beginning, name in _BEGINNINGS.items():
        if data.startswith(beginning):
            return name
    raise InvalidData(
        f"data, {len(data)} bytes, is no image, neither a PNG nor a JPEG file: convert it, for example with PIL"
    )


def _size(data: bytes, at: int) -> tuple[int, int]:
    """Returns a number in base 128, and the position behind it."""
    number = 0
    for shift in range(0, _SIZE_BITS + 1, 7):
        if at >= len(data):
            raise InvalidData(f"dmel must be a serialized array, got {len(data)} bytes that end in its header")
        number |= (data[at] & 0x7F) << shift
        at += 1
        if data[at - 1] < 0x80:
            return number, at
    raise InvalidData("dmel must be a serialized array, got a header with a size of more than 63 bits")
