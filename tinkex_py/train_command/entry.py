"""From the options of the command line to an exit code."""

import asyncio
from functools import partial
from pathlib import Path

import typer

from tinkex_py.errors import ConfigError, InvalidData, MissingExtra, PipelineError, RegularizerError, TinkexError
from tinkex_py.train_command.command import Trained, train_from_config
from tinkex_py.train_command.config import read_config
from tinkex_py.train_command.signals import with_signals

FINISHED, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 3


def run_train(path: Path, *, model: str | None, runs_dir: Path, name: str | None, as_json: bool) -> int:
    """Trains, says how it went, and gives the exit code.

    Args:
        path: the configuration file.
        model: instead of the file's.
        runs_dir: where the run's folder is.
        name: of the run; None is the file's name.
        as_json: print JSON.
    """
    was_asked_to_stop = False

    def on_stop() -> None:
        nonlocal was_asked_to_stop
        was_asked_to_stop = True
        typer.echo("stopping after the steps in flight, with a checkpoint; once more ends at once", err=True)

    try:
        config = read_config(path)
        if model is not None:
            config = config.model_copy(update={"model": model})
        work = partial(train_from_config, config, runs_dir / _checked_name(name or path.stem), progress=True)
        trained = asyncio.run(with_signals(lambda stop: work(stop=stop), on_stop))
    except TinkexError as error:
        typer.echo(f"tinkex-py train: {error}", err=True)
        return BAD_INPUT if _is_bad_input(error) else FAILED
    except asyncio.CancelledError:
        typer.echo("tinkex-py train: ended at once; the run can go on from its last checkpoint", err=True)
        return FAILED
    typer.echo(trained.model_dump_json(indent=2) if as_json else _in_words(trained))
    return STOPPED if was_asked_to_stop and trained.status == "stopped" else FINISHED


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"--name must be the name of a folder, got {name!r}")
    return name


def _is_bad_input(error: TinkexError) -> bool:
    if isinstance(error, RegularizerError):
        return False
    return isinstance(error, ConfigError | InvalidData | MissingExtra | PipelineError)


def _in_words(trained: Trained) -> str:
    status = trained.status if trained.reason is None else f"{trained.status} ({trained.reason})"
    losses = "" if trained.first_loss is None else f", loss {trained.first_loss:.4f} -> {trained.last_loss:.4f}"
    return f"{status} after {trained.steps} steps{losses}, files in {trained.folder}"
