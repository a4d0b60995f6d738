"""Bodies of responses: their limits, and decompression in bounded steps, for large ones in a thread.

A few kilobytes can decompress to any number of gigabytes, and one call of a decompressor to all of them.
"""

import importlib
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from itertools import chain
from typing import Any

from tinkex_py.errors import InvalidResponse
from tinkex_py.threads import FileThread

ACCEPTED_ENCODINGS = "gzip, deflate, zstd" if find_spec("zstandard") else "gzip, deflate"
"""The header `accept-encoding`: what `body_of` can decompress in bounded steps."""

SMALL_BODY = 1 << 20
"""Bytes; larger bodies are decompressed and joined in a thread."""

FEW_JSON_VALUES = 1 << 18
"""JSON may always have this many values, so that a body of fewer bytes need not be counted."""

_SMALL_JSON = 16 << 20
_MOST_ENCODINGS = 3
_SMALL_RECEIVED = 1 << 16
_INPUT_STEP = 1 << 16
_OUTPUT_STEP = 1 << 18
# zstd expands 4 bytes to a block of 128 KiB at most, so a step yields a quarter of the limit, and 32 MiB at most.
_ZSTD_EXPANSION = (128 << 10) // 4
_ZSTD_STEPS = (16, 1024)
# RFC 9659: no content coding may need a larger window.
_ZSTD_WINDOW = 8 << 20
_GZIP, _ZLIB = 31, 15

Steps = Iterator[bytes]


class BodyTooLarge(Exception):
    """A body exceeds its limit.

    Attributes:
        limit: bytes.
    """

    def __init__(self, limit: int) -> None:
        super().__init__(limit)
        self.limit = limit


class DecodingError(Exception):
    """A body cannot be decompressed."""


def too_large(message: str) -> InvalidResponse:
    """Returns the error for a response that exceeds a limit."""
    error = InvalidResponse(
        f"{message}. If you trust the service, increase max_response_bytes of TinkexConfig, which limits results of "
        "passes and samples; other responses have at most 16 MiB"
    )
    error.is_too_large = True
    return error


def json_excess(body: bytes, limit: int) -> str:
    """Returns in what a JSON body exceeds the limits that follow from the one of its bytes, or an empty string.

    Parsed values need up to 250 bytes each, and text up to 4 bytes per character, twice.
    """
    longest, most = max(limit // 8, _SMALL_JSON), max(limit // 256, FEW_JSON_VALUES)
    if len(body) > longest:
        return f"{len(body)} bytes of JSON, more than {longest}"
    if sum(map(body.count, (b",", b"[", b"{"))) > most:
        return f"JSON of more than {most} values"
    return ""


async def body_of(parts: deque[bytes], encoding: str, limit: int) -> bytes:
    """Returns the decompressed body. Cancelling it ends its thread after at most one step.

    Args:
        parts: the body as received; emptied meanwhile, so that body and result are not both in memory.
        encoding: the header `content-encoding`.
        limit: maximum number of bytes, after each of the encodings.

    Raises:
        BodyTooLarge: the body exceeds the limit.
        DecodingError: it is damaged or incomplete, or has an encoding that was not accepted.
    """
    encodings = [name for name in map(str.strip, encoding.lower().split(",")) if name not in ("", "identity")]
    received = sum(map(len, parts))
    if not received:
        return b""
    async with FileThread("tinkex-body") as thread:
        steps = _decompressed(parts, encodings, limit, thread.check) if encodings else iter(parts)
        begun: list[bytes] = []
        if received <= _SMALL_RECEIVED:
            size = 0
            for piece in steps:
                begun.append(piece)
                size += len(piece)
                if size > SMALL_BODY:
                    break
            else:
                return b"".join(begun)
        return await thread.run(lambda: b"".join(chain(begun, steps)))


def _decompressed(parts: deque[bytes], encodings: list[str], limit: int, check: Callable[[], None]) -> Steps:
    if len(encodings) > _MOST_ENCODINGS:
        raise DecodingError(f"it has {len(encodings)} encodings, more than {_MOST_ENCODINGS}")
    steps = _taken(parts)
    for name in reversed(encodings):
        decoder = _DECODERS.get(name)
        if decoder is None:
            raise DecodingError(f"it has another encoding than the accepted ones, {ACCEPTED_ENCODINGS}")
        steps = _counted(decoder(steps, limit), limit, check)
    return steps


def _taken(parts: deque[bytes]) -> Steps:
    while parts:
        part = parts.popleft()
        for start in range(0, len(part), _INPUT_STEP):
            yield part[start : start + _INPUT_STEP]


def _counted(steps: Steps, limit: int, check: Callable[[], None]) -> Steps:
    size = 0
    for piece in steps:
        check()
        size += len(piece)
        if size > limit:
            raise BodyTooLarge(limit)
        yield piece


def _inflated(steps: Steps, _limit: int, *, form: int) -> Steps:
    decoder = zlib.decompressobj(form)
    try:
        for packed in steps:
            rest, is_pending = packed, False
            while rest or is_pending:
                if decoder.eof:  # gzip may have several members
                    decoder = zlib.decompressobj(form)
                piece = decoder.decompress(rest, _OUTPUT_STEP)
                yield piece
                rest = decoder.unused_data if decoder.eof else decoder.unconsumed_tail
                is_pending = len(piece) == _OUTPUT_STEP and not decoder.eof
    except zlib.error as error:
        raise DecodingError(str(error)) from None
    _require_end(decoder.eof)


def _from_zstd(steps: Steps, limit: int) -> Steps:
    zstandard: Any = importlib.import_module("zstandard")
    source = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    least, most = _ZSTD_STEPS
    step = min(max(limit // (4 * _ZSTD_EXPANSION), least), most)
    decoder = source.decompressobj()
    try:
        for packed in steps:
            for start in range(0, len(packed), step):
                rest = packed[start : start + step]
                while rest:
                    if decoder.eof:  # several frames
                        decoder = source.decompressobj()
                    yield decoder.decompress(rest)
                    rest = decoder.unused_data if decoder.eof else b""
    except zstandard.ZstdError as error:
        raise DecodingError(str(error)) from None
    _require_end(decoder.eof)


def _require_end(is_complete: bool) -> None:
    if not is_complete:
        raise DecodingError("it is incomplete")


_DECODERS: dict[str, Callable[[Steps, int], Steps]] = {
    "gzip": partial(_inflated, form=_GZIP),
    "x-gzip": partial(_inflated, form=_GZIP),
    "deflate": partial(_inflated, form=_ZLIB),
}
if "zstd" in ACCEPTED_ENCODINGS:
    _DECODERS["zstd"] = _from_zstd
