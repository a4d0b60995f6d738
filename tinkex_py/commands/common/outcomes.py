"""How a command ends: its exit code, and one line about what went wrong."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import NoReturn

import typer

from tinkex_py.errors import (
    ConfigError,
    InvalidData,
    MissingExtra,
    PipelineError,
    RegularizerError,
    TinkexError,
)

FAILED = 1
"""The service refused or failed, did not answer, or cannot do it; or a term of a loss failed."""
UNUSABLE = 2
"""What was given cannot be used: an option, an address, a key, a file, a missing extra. Nothing was done."""
STOPPED = 3
"""A signal stopped `train`, with a checkpoint to go on from."""
INTERRUPTED = 130
"""The user ended it: SIGINT, SIGTERM, or "no" to a question."""


def exit_code(error: Exception) -> int:
    """The exit code that tells of an error."""
    if isinstance(error, RegularizerError):
        return FAILED
    unusable = ConfigError | InvalidData | MissingExtra | PipelineError
    return FAILED if isinstance(error, TinkexError) and not isinstance(error, unusable) else UNUSABLE


@contextmanager
def told_in_one_line(command: str, *, extra: str = "cli") -> Generator[None]:
    """Turns errors into one line on stderr and an exit code.

    Args:
        command: name of the command, which begins the line.
        extra: what to install where a library is missing.

    Raises:
        Exit: of typer, with the code.
    """
    try:
        yield
    except BrokenPipeError:
        raise  # of the pager or `head` that stdout goes to: typer ends in silence
    except ModuleNotFoundError as error:
        end(command, MissingExtra(str(error.name).partition(".")[0], extra))
    except (TinkexError, OSError) as error:
        end(command, error)
    except KeyboardInterrupt:
        raise typer.Exit(INTERRUPTED) from None


def end(command: str, error: Exception) -> NoReturn:
    """Prints an error as one line and ends the command."""
    typer.echo(f"tinkex-py {command}: {' '.join(str(error).splitlines())}", err=True)
    raise typer.Exit(exit_code(error)) from None
