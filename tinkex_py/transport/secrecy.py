"""Errors without the frames that hold secrets, and log lines of HTTP libraries without them.

A traceback keeps the local variables of every frame that it names, and some tools print them. The frames that send a
request hold its headers, those that read a setting hold the key. Errors leave these places without frames, and without
the errors of libraries behind them; what helps in those is part of the message.
"""

import functools
import logging
import re
import traceback
from collections.abc import Callable
from contextvars import ContextVar
from typing import ParamSpec, TypeVar

from tinkex_py.errors import TinkexError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

exchanging: ContextVar[bool] = ContextVar("tinkex_exchanging", default=False)
"""Whether the running code sends a request of this package, so that lines of HTTP libraries are about it."""

_CORES = ("httpcore", "httpcore2")
_PARTS = ("connection", "http11", "http2", "proxy", "socks")
_LOGGERS = ("httpx", "httpx2", *(f"{core}.{part}" for core in _CORES for part in _PARTS))
# Headers of responses, which may contain a signed address or an echoed key; the password of a proxy; errors that quote
# them; and queries of URLs.
_SECRET_PARTS = re.compile(r"(return_value=|auth=|exception=\w+).*|(\?)[^\s\"']+", re.DOTALL)


def cut_off(error: BaseException) -> None:
    """Removes the frames that an error has passed, and its causes, but for errors of this package without theirs.

    An error of other code, such as a user's HTTP client, gets a note with the place where it was raised.
    """
    if isinstance(error, Exception) and not isinstance(error, TinkexError) and error.__traceback__ is not None:
        (last,) = traceback.extract_tb(error.__traceback__, limit=-1)
        error.add_note(f"raised at {last.filename}, line {last.lineno}; the frames that hold keys were removed")
    cause = error.__cause__
    if isinstance(cause, TinkexError):
        cut_off(cause)
    else:
        error.__cause__ = None
    error.__traceback__ = error.__context__ = None


class CutOff:
    """A block whose errors leave it without the frames inside, and without causes. The frame around it stays."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            cut_off(error)


def hides_arguments(function: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Makes a function raise its errors without frames, which would hold its arguments."""

    @functools.wraps(function)
    def call(*args: Parameters.args, **kwargs: Parameters.kwargs) -> Result:
        try:
            return function(*args, **kwargs)
        except Exception as error:  # noqa: BLE001  (any error has a frame with the arguments)
            cut_off(error)
            failure = error
        del args, kwargs  # of this frame, which stays
        raise failure

    return call


def _hide(record: logging.LogRecord) -> bool:
    if exchanging.get():
        record.msg, record.args = _SECRET_PARTS.sub(_shown, record.getMessage()), None
    return True


def _shown(found: re.Match[str]) -> str:
    return f"{found[1] or found[2]}[hidden]"


for _logger in _LOGGERS:
    logging.getLogger(_logger).addFilter(_hide)
