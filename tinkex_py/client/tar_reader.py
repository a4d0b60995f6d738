"""Reads an untrusted tar archive once, from front to back: work is linear in its bytes, memory is bounded.

`tarfile` only decodes single headers here. Its reader follows chains of headers recursively, searches extended headers
in quadratic time, and keeps them whole in memory.
"""

import bz2
import lzma
import os
import tarfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Protocol

from tinkex_py.errors import InvalidResponse

_PIECE_BYTES = 1 << 20

_BLOCK = tarfile.BLOCKSIZE
_FILES = (tarfile.REGTYPE, tarfile.AREGTYPE, tarfile.CONTTYPE)
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME)
_MOST_EXTENSION_BYTES = 1 << 16
_MOST_RECORDS = 256
_MOST_DIGITS = 19  # of a size below 2**63

_PACKED_PIECE_BYTES = 1 << 14
_MOST_GROWTH = 100
_FREE_GROWTH = 64 << 20
_MOST_DECOMPRESSOR_BYTES = 128 << 20  # the strongest preset of xz needs 65 MiB


@dataclass(frozen=True)
class Member:
    """A file or folder of an archive; `name` is not checked, and `size` is that of the content."""

    name: str
    is_folder: bool
    size: int


class TarReader:
    """The members of one archive, in order.

    Args:
        file: the archive, compressed or not, at its beginning.
        check: called repeatedly; may raise to end the reading.
        max_bytes: the archive is refused if its files are larger together.

    Raises:
        InvalidResponse: the archive has a member that is neither file nor folder, or is larger than allowed.
        tarfile.TarError, EOFError, zlib.error, lzma.LZMAError, ValueError, OSError without errno: it is damaged.
    """

    def __init__(self, file: IO[bytes], check: Callable[[], None], max_bytes: int) -> None:
        self._stream = _opened(file, check)
        self._check = check
        self._room = self._max_bytes = max_bytes
        self._unread = 0

    def __iter__(self) -> Iterator[Member]:
        while (member := self._next()) is not None:
            self._room -= member.size
            if self._room < 0:
                raise InvalidResponse(
                    f"the files of the archive of the checkpoint have more than max_bytes={self._max_bytes} bytes; no "
                    "file was kept: if you expect so many, raise max_bytes"
                )
            self._unread = member.size
            yield member
            self._skip(self._unread + _padding(member.size))
        # The checksum of a compressed archive follows the last file.
        while isinstance(self._stream, _Unpacked) and self._stream.read(_PIECE_BYTES):
            self._check()

    def content(self) -> Iterator[bytes]:
        """Yields the content of the current member in pieces."""
        while self._unread:
            piece = self._read(min(self._unread, _PIECE_BYTES))
            self._unread -= len(piece)
            yield piece

    def _next(self) -> Member | None:
        """Returns the next member; None at the end mark."""
        path: str | None = None
        size: int | None = None
        before: set[bytes] = set()
        while (header := self._header()) is not None:
            if header.type in _FILES:
                return Member(path or header.name, False, header.size if size is None else size)
            if header.type == tarfile.DIRTYPE:
                return Member(path or header.name, True, 0)
            if header.type not in _EXTENSIONS:
                raise InvalidResponse(
                    f"the archive of the checkpoint contains {header.name!r}, a link or device or another special file "
                    f"(type {header.type!r}); no file was kept"
                )
            if header.type in before:
                raise ValueError(f"two extended headers of type {header.type!r} before one file")
            before.add(header.type)
            content = self._extension(header.size)
            if header.type == tarfile.GNUTYPE_LONGNAME:
                path = path or content.partition(b"\0")[0].decode(errors="surrogateescape")
                continue
            records = _records(content)
            if header.type == tarfile.XGLTYPE and not records.keys().isdisjoint({b"path", b"size"}):
                raise ValueError("one path or size for all files")
            if b"path" in records:
                path = records[b"path"].decode()
            if b"size" in records:
                size = _size(records[b"size"])
        if before:
            raise ValueError("an extended header without a file")
        return None

    def _header(self) -> tarfile.TarInfo | None:
        self._check()
        block = self._stream.read(_BLOCK)
        if block == bytes(_BLOCK):
            return None
        header = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        if header.size < 0:
            raise ValueError(f"a file of {header.size} bytes")
        return header

    def _extension(self, size: int) -> bytes:
        if size > _MOST_EXTENSION_BYTES:
            raise ValueError(f"an extended header of {size} bytes; at most {_MOST_EXTENSION_BYTES} are read")
        content = self._stream.read(size)
        self._skip(_padding(size))
        return content

    def _skip(self, size: int) -> None:
        if not isinstance(self._stream, _Unpacked):
            self._stream.seek(size, os.SEEK_CUR)
            return
        while size:
            size -= len(self._read(min(size, _PIECE_BYTES)))

    def _read(self, size: int) -> bytes:
        self._check()
        piece = self._stream.read(size)
        if not piece:
            raise EOFError("it is cut off within a file")
        return piece


def _padding(size: int) -> int:
    return -size % _BLOCK


def _records(content: bytes) -> dict[bytes, bytes]:
    """Reads the records of an extended header of pax: `LENGTH KEY=VALUE`, each with a line break."""
    records: dict[bytes, bytes] = {}
    start = 0
    for _ in range(_MOST_RECORDS):
        if start == len(content):
            return records
        blank = content.find(b" ", start, start + len(str(_MOST_EXTENSION_BYTES)) + 1)
        digits = content[start : max(blank, start)]
        end = start + int(digits) if digits.isdigit() else start
        key, equals, value = content[blank + 1 : end - 1].partition(b"=")
        if not blank < end <= len(content) or not equals or content[end - 1 : end] != b"\n":
            raise ValueError("an extended header with an invalid length")
        if key.startswith(b"GNU.sparse."):
            raise ValueError("a sparse file")
        records[key] = value
        start = end
    raise ValueError(f"an extended header with {_MOST_RECORDS} records or more")


def _size(text: bytes) -> int:
    if not text.isdigit() or len(text) > _MOST_DIGITS:
        raise ValueError("an extended header with an invalid size")
    return int(text)


# Compressed archives


class _Decompressor(Protocol):
    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int) -> bytes: ...


class _Gunzip:
    """Gives `zlib` the interface of the other decompressors."""

    def __init__(self) -> None:
        self._inner = zlib.decompressobj(wbits=31)
        self.needs_input = True

    @property
    def eof(self) -> bool:
        return self._inner.eof

    @property
    def unused_data(self) -> bytes:
        return self._inner.unused_data

    def decompress(self, data: bytes, max_length: int) -> bytes:
        unpacked = self._inner.decompress(self._inner.unconsumed_tail + data, max_length)
        self.needs_input = len(unpacked) < max_length
        return unpacked


def _unxz() -> _Decompressor:
    return lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_MOST_DECOMPRESSOR_BYTES)


_DECOMPRESSORS: dict[bytes, Callable[[], _Decompressor]] = {
    b"\x1f\x8b": _Gunzip,
    b"BZh": bz2.BZ2Decompressor,
    b"\xfd7zXZ\x00": _unxz,
}


class _Unpacked:
    """The content of a compressed file: one or more streams, unpacked in steps of bounded size."""

    def __init__(
        self, file: IO[bytes], size: int, start: Callable[[], _Decompressor], check: Callable[[], None]
    ) -> None:
        self._file = file
        self._check = check
        self._start = start
        self._room = _FREE_GROWTH + _MOST_GROWTH * size
        self._stream = start()
        self._waiting = b""

    def read(self, size: int) -> bytes:
        """Returns the next bytes; fewer than `size` only at the end."""
        unpacked = bytearray()
        while len(unpacked) < size and (not self._stream.eof or self._next_stream()):
            packed = self._packed() if self._stream.needs_input else b""
            unpacked += self._stream.decompress(packed, size - len(unpacked))
        self._room -= len(unpacked)
        if self._room < 0:
            raise InvalidResponse(
                f"the archive of the checkpoint is more than {_MOST_GROWTH} times larger when it is unpacked; no file "
                "was kept: report it to the service"
            )
        return bytes(unpacked)

    def _packed(self) -> bytes:
        piece, self._waiting = self._waiting or self._next_piece(), b""
        if not piece:
            raise EOFError("the compressed data is cut off")
        return piece

    def _next_piece(self) -> bytes:
        self._check()
        return self._file.read(_PACKED_PIECE_BYTES)

    def _next_stream(self) -> bool:
        """Begins the next stream; returns False at the end of the file. Zeros between streams are padding."""
        self._waiting = self._stream.unused_data.lstrip(b"\0")
        while not self._waiting and (piece := self._next_piece()):
            self._waiting = piece.lstrip(b"\0")
        if self._waiting:
            self._stream = self._start()
        return bool(self._waiting)


def _opened(file: IO[bytes], check: Callable[[], None]) -> IO[bytes] | _Unpacked:
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    beginning = file.read(8)
    file.seek(0)
    for mark, start in _DECOMPRESSORS.items():
        if beginning.startswith(mark):
            return _Unpacked(file, size, start, check)
    return file
