"""What crosses between processes: code by value, data in files without a name, messages on a socket.

A file of this module exists only as descriptors and mappings, so that nothing is left behind when a process is killed.
"""

import mmap
import os
import pickle
import socket
import struct
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, cast

from tinkex_py.errors import require_modules

_ALIGNMENT = 64
_INDEX = struct.Struct("<QQ")
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


def write_file(value: object) -> int:
    """Writes an object into a new file without a name, with its arrays side by side, and returns the descriptor."""
    buffers: list[pickle.PickleBuffer] = []
    pickled = pickle.dumps(value, protocol=5, buffer_callback=buffers.append)
    raw = [buffer.raw() for buffer in buffers]
    index = pickle.dumps((pickled, [(part.nbytes, part.readonly) for part in raw]))
    descriptor = _new_file()
    try:
        _write_all(descriptor, [_INDEX.pack(len(index), 0), index])
        offset = _INDEX.size + len(index)
        for part in raw:
            padding = -offset % _ALIGNMENT
            _write_all(descriptor, [bytes(padding), part])
            offset += padding + part.nbytes
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_file(descriptor: int) -> Any:
    """Returns the object in a file, with arrays over a private mapping of it: writing into them keeps the file.

    The descriptor can be closed afterwards.
    """
    view = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY))
    length, _ = _INDEX.unpack_from(view)
    offset = _INDEX.size + length
    pickled, sizes = cast("tuple[bytes, list[tuple[int, bool]]]", pickle.loads(view[_INDEX.size : offset]))  # noqa: S301
    buffers: list[memoryview] = []
    for size, readonly in sizes:
        offset += -offset % _ALIGNMENT
        part = view[offset : offset + size]
        buffers.append(part.toreadonly() if readonly else part)
        offset += size
    return pickle.loads(pickled, buffers=buffers)  # noqa: S301


def _new_file() -> int:
    if hasattr(os, "memfd_create"):
        return os.memfd_create("tinkex", os.MFD_CLOEXEC)
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _write_all(descriptor: int, parts: Sequence[bytes | memoryview]) -> None:
    for part in parts:
        rest = memoryview(part)
        while rest.nbytes:
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
