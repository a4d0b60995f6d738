"""Bodies of requests, read within limits: of their bytes as sent, of their bytes unpacked, and of JSON's structure."""

import json
import re
from typing import Any

from starlette.requests import Request

from tinkex_py.local.core import Refused
from tinkex_py.local.options import LocalOptions

MAX_JSON_DEPTH = 64
"""Lists and objects inside each other; the protocol's own bodies have fewer than 12."""
MAX_JSON_PARTS = 5_000_000
"""Lists, objects and texts of one body: a few bytes of JSON become up to a hundred in memory."""
# One step of unpacking cannot become more than this many times 128 KiB.
_ZSTD_STEP = 1024
_STRUCTURE = re.compile(r'"(?:[^"\\]++|\\.)*+"|[\[{]|[\]}]', re.DOTALL)


async def read_body(request: Request) -> bytes:
    """The body, decompressed.

    Raises:
        Refused: 413 too large, 415 unknown compression, 400 damaged.
    """
    options: LocalOptions = request.app.state.service.options
    body = await _received(request, options.max_body_bytes)
    encoding = request.headers.get("content-encoding", "identity").lower()
    if encoding == "zstd":
        body = unpacked(body, options.max_body_bytes)
    elif encoding not in ("identity", ""):
        raise Refused(415, f"Content-Encoding {encoding!r} is not understood; send the body plain or with zstd")
    request.state.body_bytes = len(body)
    return body


async def read_json(request: Request) -> dict[str, Any]:
    """The body as a JSON object; an empty body is an empty object.

    Raises:
        Refused: 400; 413, too many parts; or as `read_body`.
    """
    raw = await read_body(request)
    try:
        text = raw.decode("utf-8-sig") or "{}"
        check_structure(text)
        value = json.loads(text)
    except ValueError as error:
        # The decoder's own text names a place, never the content.
        raise Refused(400, f"the body is no valid JSON: {_without_content(error)}") from None
    except RecursionError:
        raise Refused(400, "the body is nested too deeply") from None
    if not isinstance(value, dict):
        raise Refused(400, "the body must be a JSON object")
    return value  # pyright: ignore[reportUnknownVariableType]


def size_of(request: Request) -> int:
    """Bytes of the body that was read, unpacked."""
    return int(request.state.body_bytes)


async def drop_body(request: Request) -> None:
    """Take the body off the wire without keeping it.

    Raises:
        Refused: 413 too large.
    """
    limit: int = request.app.state.service.options.max_body_bytes
    received = 0
    async for piece in request.stream():
        received += len(piece)
        _check_size(received, limit)


async def _received(request: Request, limit: int) -> bytes:
    told = request.headers.get("content-length", "")
    if told.isdecimal():
        _check_size(int(told[:20]), limit)
    # What a client tells may be wrong or missing: what comes is counted.
    pieces: list[bytes] = []
    received = 0
    async for piece in request.stream():
        received += len(piece)
        _check_size(received, limit)
        pieces.append(piece)
    return b"".join(pieces)


def _check_size(size: int, limit: int) -> None:
    if size > limit:
        raise Refused(413, f"the body is larger than {limit} bytes")


def unpacked(body: bytes, limit: int) -> bytes:
    """What a zstd stream holds.

    Args:
        body: one whole stream.
        limit: how many bytes it may hold.

    Raises:
        Refused: 413 it holds more; 400 it is no whole stream; 415 zstd is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise Refused(415, "zstd is not installed here: send the body plain, or pip install zstandard") from None
    unpacker = zstandard.ZstdDecompressor().decompressobj()
    pieces: list[bytes] = []
    size = taken = 0
    try:
        while taken < len(body) and not unpacker.eof:
            piece = unpacker.decompress(body[taken : taken + _ZSTD_STEP])
            taken += _ZSTD_STEP
            size += len(piece)
            _check_size(size, limit)
            pieces.append(piece)
    except zstandard.ZstdError:
        raise Refused(400, "the body is no valid zstd stream") from None
    if not unpacker.eof or unpacker.unused_data or taken < len(body):
        raise Refused(400, "the body is no valid zstd stream: it ends too early, or something stands behind its end")
    return b"".join(pieces)


def check_structure(text: str) -> None:
    """Refuse what would cost the JSON decoder, or what comes after it, more than its length says.

    Raises:
        Refused: 413 too many parts; 400 too deep.
    """
    containers = text.count("[") + text.count("{")
    if containers + text.count('"') // 2 > MAX_JSON_PARTS:
        raise Refused(413, f"the body has more than {MAX_JSON_PARTS} lists, objects and texts")
    if containers <= MAX_JSON_DEPTH:
        return
    depth = 0
    for found in _STRUCTURE.finditer(text):
        mark = found[0]
        if mark in ("[", "{"):
            depth += 1
            if depth > MAX_JSON_DEPTH:
                raise Refused(400, f"the body is nested too deeply: at most {MAX_JSON_DEPTH} lists and objects")
        elif mark in ("]", "}"):
            depth -= 1


def _without_content(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.pos})"
    return "it is not UTF-8" if isinstance(error, UnicodeDecodeError) else "a number is too long"
