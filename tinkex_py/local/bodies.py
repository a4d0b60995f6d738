"""Bodies of requests: their limits are checked before anything is built from them.

Every check is one pass over the bytes, in blocks of a fixed size.
"""

import json
from typing import Any

import numpy as np
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import DecodeError
from numpy.typing import NDArray

from tinkex_py.local.core import Refused
from tinkex_py.transport import wire

MAX_JSON_BYTES = 64 * 1024**2
"""Size of a JSON body; large passes are sent in protobuf."""
MAX_JSON_DEPTH = 64
"""Nesting of lists and objects; the bodies of the protocol have fewer than 12 levels."""
MAX_JSON_PARTS = 5_000_000
"""Values of one body: a few bytes of JSON become up to a hundred in memory."""
MAX_NUMBER = 4300
"""Characters of a number: Python's default, which the process may have changed. Longer ones take quadratic time."""
SMALL_BODY = 64 * 1024
"""Bodies up to this size are read on the event loop: a thread would take longer."""
SMALL_PROTOBUF = 1024**2
"""Messages up to this size cannot become large."""
MAX_PROTOBUF_FIELDS = 500_000
"""Fields of a larger message at all levels; a pass of 1,024 datums has about 20,000."""
_FIXED = {1: 8, 5: 4}
_OPAQUE = (FieldDescriptor.TYPE_BYTES, FieldDescriptor.TYPE_STRING)
BLOCK = 1 << 20
_QUOTE, _BACKSLASH = 34, 92
# A zstd stream can grow by at most 32 KiB for each byte of a step.
_ZSTD_STEP = 1024


def _table(values: dict[str, int]) -> NDArray[np.int8]:
    table = np.zeros(256, dtype=np.int8)
    for character, value in values.items():
        table[ord(character)] = value
    return table


_LEVELS = _table({"[": 1, "{": 1, "]": -1, "}": -1})
_PARTS = _table({"[": 1, "{": 1, ",": 1, ":": 1})
_STRUCTURAL = _table(dict.fromkeys('[]{},:"', 1))


def check_size(size: int, limit: int) -> None:
    """Raises Refused (413) for a body of more than `limit` bytes."""
    if size > limit:
        raise Refused(413, f"the body is larger than {limit} bytes")


def decompressed(body: bytes, limit: int) -> bytes:
    """Returns the content of one whole zstd stream.

    Raises:
        Refused: 413, more than `limit` bytes; 400, not one whole stream; 415, zstandard is not installed.
    """
    try:
        import zstandard
    except ImportError:
        raise Refused(415, "zstd is not installed here: send the body plain, or pip install zstandard") from None
    stream = zstandard.ZstdDecompressor().decompressobj()
    pieces: list[bytes] = []
    size = taken = 0
    try:
        while taken < len(body) and not stream.eof:
            piece = stream.decompress(body[taken : taken + _ZSTD_STEP])
            taken += _ZSTD_STEP
            size += len(piece)
            check_size(size, limit)
            pieces.append(piece)
    except zstandard.ZstdError:
        raise Refused(400, "the body is not a valid zstd stream") from None
    if not stream.eof or stream.unused_data or taken < len(body):
        raise Refused(400, "the body is not a valid zstd stream: it is truncated, or followed by other bytes")
    return b"".join(pieces)


def parse_json(body: bytes) -> Any:
    """Returns the value of a JSON body.

    Raises:
        Refused: 413, too large or too many values; 400, nested too deeply or not JSON.
    """
    check_size(len(body), MAX_JSON_BYTES)
    # With a NUL among the first bytes, the decoder would read UTF-16, in which brackets are other bytes.
    if b"\0" in body:
        raise Refused(400, "the body is not valid JSON: it contains a NUL byte")
    check_structure(body)
    try:
        text = body.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise Refused(400, "the body is not valid JSON: it is not UTF-8") from None
    try:
        return json.loads(text) if len(body) <= SMALL_BODY else _BREATHING.decode(text)
    except json.JSONDecodeError as error:
        raise Refused(400, f"the body is not valid JSON: {error.msg} (character {error.pos})") from None
    except ValueError:
        raise Refused(400, "the body is not valid JSON: a number is too long") from None


def parse_pass(body: bytes) -> wire.ForwardBackwardRequest:
    """Returns the message of a pass.

    Raises:
        Refused: 413, too many fields; 400, not a message of this kind.
    """
    if len(body) > SMALL_PROTOBUF:
        _check_fields(body)
    try:
        return wire.ForwardBackwardRequest.FromString(body)
    except DecodeError:
        raise Refused(400, "the body is not a ForwardBackwardRequest in protobuf") from None


def _check_fields(body: bytes) -> None:
    """Refuses a message with so many fields that its decoder would need far more memory than its bytes."""
    fields = 0
    # Ends and kinds of the messages that contain the place.
    inside: list[tuple[int, Any]] = [(len(body), wire.ForwardBackwardRequest.DESCRIPTOR)]
    place = 0
    while inside:
        end, kind = inside[-1]
        if place >= end:
            inside.pop()
            continue
        tag, place = _varint(body, place)
        number, encoding = tag >> 3, tag & 7
        size, place = _varint(body, place) if encoding in (0, 2) else (_FIXED.get(encoding, 0), place)
        field = kind.fields_by_number.get(number)
        fields += 1
        if encoding != 2:
            place += 0 if encoding == 0 else size
        elif place + size > end:
            return  # the decoder refuses it
        elif field is not None and field.message_type is not None:
            inside.append((place + size, field.message_type))
        else:
            # Packed numbers have a byte or more each.
            fields += size if field is not None and field.type not in _OPAQUE else 0
            place += size
        if fields > MAX_PROTOBUF_FIELDS:
            raise Refused(413, f"the body has more than {MAX_PROTOBUF_FIELDS} fields: send smaller passes")


def _varint(body: bytes, place: int) -> tuple[int, int]:
    """Returns a number of up to ten bytes, and the place behind it; at the end of the body, 0."""
    value = 0
    for shift in range(0, 70, 7):
        byte = body[place] if place < len(body) else 0
        place += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            break
    return value, place


def _integer(text: str) -> int:
    if len(text) > MAX_NUMBER:
        raise ValueError
    return int(text)


def _real(text: str) -> float:
    return float(text)


# Calls into Python let other threads run; the decoder alone would hold the interpreter until the end of the body.
_BREATHING = json.JSONDecoder(parse_int=_integer, parse_float=_real)


def check_structure(body: bytes) -> None:
    """Refuses JSON that would cost its decoder, or its readers, more than its length implies.

    Raises:
        Refused: 413, too many values; 400, nested too deeply.
    """
    containers = body.count(b"[") + body.count(b"{")
    most_parts = containers + body.count(b",") + body.count(b":")
    if containers <= MAX_JSON_DEPTH and most_parts <= MAX_JSON_PARTS:
        return
    depth, parts = _structure(body)
    if parts > MAX_JSON_PARTS:
        raise Refused(413, f"the body has more than {MAX_JSON_PARTS} values: send passes in protobuf, or smaller ones")
    if depth > MAX_JSON_DEPTH:
        raise Refused(400, f"the body is nested too deeply: at most {MAX_JSON_DEPTH} lists and objects")


def _structure(body: bytes) -> tuple[int, int]:
    """Returns the depth of lists and objects, and the number of values.

    Bytes that are not JSON are counted correctly up to the place where the decoder stops.
    """
    deepest = depth = parts = 0
    in_text = pending = False
    for start in range(0, len(body), BLOCK):
        block = np.frombuffer(body, np.uint8, min(BLOCK, len(body) - start), start)
        escaped, pending = _escaped(block, pending)
        places = np.flatnonzero((_STRUCTURAL[block] == 1) & ~escaped)
        marks = block[places]
        inside = (np.cumsum(marks == _QUOTE) + in_text) % 2 == 1
        outside = marks[~inside]
        if len(marks):
            in_text = bool(inside[-1])
        if len(outside):
            levels = depth + np.cumsum(_LEVELS[outside], dtype=np.int64)
            deepest, depth = max(deepest, int(levels.max())), int(levels[-1])
            parts += int(np.count_nonzero(_PARTS[outside]))
    return deepest, parts


def _escaped(block: NDArray[np.uint8], pending: bool) -> tuple[NDArray[np.bool_], bool]:
    """Returns which bytes follow an odd number of backslashes, and whether the byte after the block does.

    Args:
        block: bytes.
        pending: whether the first byte does.
    """
    places = np.arange(len(block))
    last_other = np.maximum.accumulate(np.where(block == _BACKSLASH, -1, places))
    # Backslashes that end at each byte; those before the block count as one if they are odd.
    odd = (places - last_other + (last_other == -1) * pending) % 2 == 1
    return np.concatenate([[pending], odd[:-1]]), bool(odd[-1])
