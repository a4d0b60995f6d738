"""What crosses between processes: code by value, data in files without a name, messages on a socket.

A file of this module exists only as descriptors and mappings, so that nothing is left behind when a process is killed.
"""

import mmap
import os
import pickle
import socket
import struct
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any, cast

from tinkex_py.errors import require_modules

_ALIGNMENT = 64
_PADDING = memoryview(bytes(_ALIGNMENT))
_MOST_PARTS = 1024  # of one write, on Linux and macOS
_mappings: "weakref.WeakSet[mmap.mmap]" = weakref.WeakSet()
_forked = threading.Event()
if hasattr(os, "register_at_fork"):  # this module is imported on Windows, too
    os.register_at_fork(after_in_parent=_forked.set)
_INDEX = struct.Struct("<Q")
_HEADER = struct.Struct("<QI")


def pickled_by_value(value: object) -> bytes:
    """Pickles an object. Functions and classes of `__main__`, lambdas and closures cross by value.

    Raises:
        MissingExtra: cloudpickle is not installed.
        Exception: the object cannot cross; the class depends on the object.
    """
    require_modules("processes", "cloudpickle")
    import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

    return cast("Callable[[object], bytes]", cloudpickle.dumps)(value)  # pyright: ignore[reportUnknownMemberType]


def unpickled(pickled: bytes) -> Any:
    """Returns the object of `pickled_by_value`. The bytes come from this program or from one of its workers."""
    return pickle.loads(pickled)  # noqa: S301


class Column:
    """Many arrays that are written side by side, without the cost of a pickle for each.

    Attributes:
        parts: the arrays, each with its padding.
        size: bytes of all parts.
    """

    def __init__(self) -> None:
        self.parts: list[memoryview] = []
        self.size = 0

    def add(self, array: memoryview) -> int:
        """Appends an array, and returns its place in the column, in bytes."""
        place = self.size
        self.parts.append(array)
        self.size += array.nbytes
        if self.size % _ALIGNMENT:
            self.parts.append(_PADDING[self.size % _ALIGNMENT :])
            self.size += self.parts[-1].nbytes
        return place


def write_file(value: object, column: Column | None = None, *, over: int | None = None) -> int:
    """Writes an object into a file without a name, with its arrays side by side, and returns the descriptor.

    Args:
        value: the object.
        column: further arrays; see `read_file`.
        over: descriptor of a file to write over, which saves the time for new memory, and is closed if this fails. None
            makes a file.
    """
    descriptor = _new_file() if over is None else over
    try:
        buffers: list[pickle.PickleBuffer] = []
        pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
        raw = [buffer.raw() for buffer in buffers]
        index = pickle.dumps((pickled, [(part.nbytes, part.readonly) for part in raw], column.size if column else 0))
        start = Column()
        for part in (memoryview(_INDEX.pack(len(index)) + index), *raw):
            start.add(part)
        os.lseek(descriptor, 0, os.SEEK_SET)
        _write_all(descriptor, [*start.parts, *(column.parts if column else ())])
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(descriptor: int) -> tuple[Any, memoryview]:
    """Returns the object in a file, with arrays over a private mapping of it: writing into them keeps the file.

    The descriptor can be closed afterwards.

    Returns:
        The object, and the column, read-only.
    """
    mapping = mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
    _mappings.add(mapping)
    view = memoryview(mapping)
    (length,) = _INDEX.unpack_from(view)
    offset = _INDEX.size + length
    index = pickle.loads(view[_INDEX.size : offset])  # noqa: S301
    pickled, sizes, column_size = cast("tuple[bytes, list[tuple[int, bool]], int]", index)
    parts: list[memoryview] = []
    for size, readonly in [*sizes, (column_size, True)]:
        offset += -offset % _ALIGNMENT
        part = view[offset : offset + size]
        parts.append(part.toreadonly() if readonly else part)
        offset += size
    return pickle.loads(pickled, buffers=parts[:-1]), parts[-1]  # noqa: S301


def keeps_mappings() -> bool:
    """Returns whether this process, or a fork of it, may still read files of `read_file`."""
    return _forked.is_set() or bool(_mappings)


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tinkex", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, parts: Sequence[memoryview]) -> None:
    for start in range(0, len(parts), _MOST_PARTS):
        some = parts[start : start + _MOST_PARTS]
        written = os.writev(descriptor, some)
        if written < sum([part.nbytes for part in some]):  # a system call writes at most 2 GiB
            _write_rest(descriptor, some, written)


def _write_rest(descriptor: int, parts: Sequence[memoryview], written: int) -> None:
    for part in parts:
        rest = part.cast("B")[written:]
        written = max(written - part.nbytes, 0)
        while rest:
            rest = rest[os.write(descriptor, rest) :]


class Channel:
    """One end of a connection between a program and its worker. A message is an object, with or without a file.

    Args:
        end: a connected Unix socket, which the channel owns.
    """

    def __init__(self, end: socket.socket) -> None:
        self._socket = end

    def send(self, message: object, file: int | None = None) -> None:
        """Sends a message, and a duplicate of a descriptor.

        Raises:
            OSError: the other end is closed.
        """
        body = pickle.dumps(message)
        files = [] if file is None else [file]
        socket.send_fds(self._socket, [_HEADER.pack(len(body), len(files))], files)
        self._socket.sendall(body)

    def receive(self) -> tuple[Any, int | None]:
        """Waits for a message. The receiver closes the descriptor.

        Raises:
            EOFError: the other end is closed.
        """
        header, files, _, _ = socket.recv_fds(self._socket, _HEADER.size, 1)
        file = files[0] if files else None
        try:
            header += self._exactly(_HEADER.size - len(header))
            length, _ = _HEADER.unpack(header)
            return pickle.loads(self._exactly(length)), file  # noqa: S301
        except BaseException:
            if file is not None:
                os.close(file)
            raise

    def _exactly(self, count: int) -> bytes:
        received = bytearray()
        while len(received) < count:
            part = self._socket.recv(min(count - len(received), 1 << 20))
            if not part:
                raise EOFError("the other end is closed")
            received += part
        return bytes(received)

    def close(self) -> None:
        """Closes this end."""
        self._socket.close()
