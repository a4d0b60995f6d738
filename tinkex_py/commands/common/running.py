"""Signals, exit codes, and one line per error."""

import asyncio
import signal
from collections.abc import Callable, Coroutine, Generator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, TypeVar

import typer

from tinkex_py.commands.common.printing import echo
from tinkex_py.errors import (
    ConfigError,
    InvalidData,
    MissingExtra,
    PipelineError,
    RegularizerError,
    TinkexError,
    require_modules,
)

Result = TypeVar("Result")

EMBEDDED_SERVICE = ("fastapi", "peft", "safetensors", "transformers")
"""What a command needs that runs a model in this process: modules of the extra `local`."""

FAILED = 1
"""The service refused the request, failed, did not respond or does not support it; or a term of a loss failed."""
UNUSABLE = 2
"""The input is invalid: an option, an address, a key, a file, a missing extra. Nothing was done."""
STOPPED = 3
"""A signal stopped `train`; the run can be resumed from its checkpoint."""
INTERRUPTED = 130
"""The user interrupted the command: SIGINT, SIGTERM, or "no" to a question."""

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


def exit_code(error: Exception) -> int:
    """Returns the exit code of an error."""
    if isinstance(error, RegularizerError):
        return FAILED
    unusable = ConfigError | InvalidData | MissingExtra | PipelineError
    return FAILED if isinstance(error, TinkexError) and not isinstance(error, unusable) else UNUSABLE


@contextmanager
def one_line_errors(command: str, *, extra: str = "cli", needs: Sequence[str] = ()) -> Generator[None]:
    """Turns errors into one line on stderr and an exit code.

    Args:
        command: its name.
        extra: what to install if a library is missing.
        needs: modules of the extra that the command imports; checked before it does anything.
    """
    try:
        require_modules(extra, *needs)
        yield
    except BrokenPipeError:
        raise  # typer exits silently when the reader of stdout is gone
    except ModuleNotFoundError as error:
        _end(command, MissingExtra(str(error.name).partition(".")[0], extra))
    except (TinkexError, OSError) as error:
        _end(command, error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def one_line(error: Exception) -> str:
    """Returns the message of an error in one line."""
    return " ".join(str(error).splitlines())


def _end(command: str, error: Exception) -> None:
    echo(f"tinkex-py {command}: {one_line(error)}", err=True)
    raise typer.Exit(exit_code(error)) from None


def run(work: Coroutine[Any, Any, Result], *, on_first_signal: Callable[[], object] | None = None) -> Result:
    """Runs a coroutine on a new event loop. SIGINT and SIGTERM cancel it.

    Args:
        work: the coroutine.
        on_first_signal: called by the first signal, which then does not cancel the work.

    Raises:
        KeyboardInterrupt: a signal cancelled the work.
    """
    return asyncio.run(_with_signals(work, on_first_signal))


async def _with_signals(work: Coroutine[Any, Any, Result], on_first_signal: Callable[[], object] | None) -> Result:
    task = asyncio.create_task(work)
    pending = [] if on_first_signal is None else [on_first_signal]
    cancelled = asyncio.Event()

    def handle() -> None:
        if pending:
            pending.pop()()
        else:
            cancelled.set()
            task.cancel()

    loop = asyncio.get_running_loop()
    # Windows has no signal handlers on its loops; there Ctrl-C cancels this coroutine.
    with suppress(NotImplementedError):
        for number in _SIGNALS:
            loop.add_signal_handler(number, handle)
    try:
        return await task
    except asyncio.CancelledError:
        if cancelled.is_set():
            raise KeyboardInterrupt from None
        raise
    finally:
        with suppress(NotImplementedError):
            for number in _SIGNALS:
                loop.remove_signal_handler(number)
