"""Bodies of requests within limits: of their bytes as sent, of their bytes unpacked, and of JSON's structure."""

import re

from tinkex_py.local.core import Refused

MAX_JSON_DEPTH = 64
"""Lists and objects inside each other; the protocol's own bodies have fewer than 12."""
MAX_JSON_PARTS = 5_000_000
"""Lists, objects and texts of one body: a few bytes of JSON become up to a hundred in memory."""
# One step of unpacking cannot become more than this many times 128 KiB.
_ZSTD_STEP = 1024
_TEXT = re.compile(r'"(?:[^"\\]++|\\.)*+"', re.DOTALL)
_OTHERS = re.compile(r"[^][{}]++")


def check_size(size: int, limit: int) -> None:
    """Refuse a body of more bytes than allowed.

    Raises:
        Refused: 413.
    """
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
            check_size(size, limit)
            pieces.append(piece)
    except zstandard.ZstdError:
        raise Refused(400, "the body is no valid zstd stream") from None
    if not unpacker.eof or unpacker.unused_data or taken < len(body):
        raise Refused(400, "the body is no valid zstd stream: it ends too early, or something stands behind its end")
    return b"".join(pieces)


def check_json(body: bytes) -> None:
    """Refuse what is no JSON text, or too large a structure.

    Raises:
        Refused: 400; 413 too many parts.
    """
    # With a NUL among the first bytes the decoder would take it for UTF-16, in which brackets are other bytes.
    if b"\0" in body:
        raise Refused(400, "the body is no valid JSON: it holds a NUL byte")
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(400, "the body is no valid JSON: it is not UTF-8") from None
    check_structure(text)


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
    brackets = _OTHERS.sub("", _TEXT.sub("", text)).replace("{", "[").replace("}", "]")
    # Each round takes the innermost level away. What has no partner stays, for the decoder to find.
    levels = 0
    while levels <= MAX_JSON_DEPTH and (outer := brackets.replace("[]", "")) != brackets:
        brackets = outer
        levels += 1
    if levels + brackets.count("[") > MAX_JSON_DEPTH:
        raise Refused(400, f"the body is nested too deeply: at most {MAX_JSON_DEPTH} lists and objects")
