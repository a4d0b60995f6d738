"""The main program of a worker process: `python -m tinkex_py.processes.worker`. Started by `pool.Worker` only.

It never imports the `__main__` of the program that started it.
"""

import contextlib
import ctypes
import importlib
import os
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from typing import Any

from tinkex_py.processes.crossing import Channel, keeps_mappings, pickled_by_value, unpickled, write_file

_PR_SET_PDEATHSIG = 1
# Most functions that a worker keeps; with one more it forgets all.
MOST_LOADED = 32


def main(arguments: list[str]) -> None:
    """Answers requests until the other end closes.

    Args:
        arguments: descriptor of the socket, id of the parent process, and `module:function` that answers calls.
    """
    descriptor, parent, entry = arguments
    _die_with(int(parent))
    end = socket.socket(fileno=int(descriptor))
    end.set_inheritable(False)
    channel = Channel(end)
    module, _, name = entry.partition(":")
    evaluate = getattr(importlib.import_module(module), name)
    channel.send(("done", None))
    with contextlib.suppress(EOFError, OSError):  # the program ended
        _serve(channel, evaluate)


def _die_with(parent: int) -> None:
    """Has the kernel kill this process when its parent dies, even while it holds Python's lock."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent:  # it died before
        sys.exit(1)


def _serve(channel: Channel, evaluate: Callable[..., Any]) -> None:
    loaded: dict[bytes, Any] = {}
    while True:
        (kind, key, payload), file = channel.receive()
        answer: int | None = None
        try:
            if kind == "load":
                if len(loaded) >= MOST_LOADED:
                    loaded.clear()
                loaded[key] = unpickled(payload)
            else:
                assert file is not None, "a call comes with its data"
                answer = write_file(evaluate(loaded[key], payload, file))
            reply = ("done", keeps_mappings())
        except BaseException as error:  # noqa: BLE001  # code of a user; raised again where the call is awaited
            reply = ("failed", _crossing(error))
        finally:
            if file is not None:
                os.close(file)
        try:
            channel.send(reply, answer)
        finally:
            if answer is not None:
                os.close(answer)


def _crossing(error: BaseException) -> tuple[bytes | None, str, str]:
    """Returns an exception as bytes, or None if it cannot cross; its class and message; and its traceback."""
    text = "".join(traceback.format_exception(error))
    try:
        message = f"{type(error).__name__}: {error}"
        pickled = pickled_by_value(error.with_traceback(None))
        unpickled(pickled)
    except Exception as broken:  # noqa: BLE001  # its class may do anything
        return None, f"{type(error).__name__}, which cannot cross to another process ({type(broken).__name__})", text
    return pickled, message, text


if __name__ == "__main__":
    main(sys.argv[1:])
