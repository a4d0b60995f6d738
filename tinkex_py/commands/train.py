"""`tinkex-py train`."""

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.outcomes import FAILED, STOPPED, told_in_one_line
from tinkex_py.commands.common.running import run_stoppable
from tinkex_py.errors import ConfigError

if TYPE_CHECKING:
    from tinkex_py.commands.work.training import Trained


def train(
    config: Annotated[Path, typer.Argument(help="YAML file that describes the run")],
    model: Annotated[str | None, typer.Option(help="instead of the file's")] = None,
    runs_dir: Annotated[Path, typer.Option(help="where the run's folder is, or is made")] = Path("runs"),
    name: Annotated[str | None, typer.Option(help="of the run; the file's name by default")] = None,
    as_json: AsJson = False,
) -> None:
    """Train as a file describes it; a run that was ended before goes on from its last checkpoint.

    Exit codes: 0 the run is finished (early stopping counts), 1 it failed, 2 something given cannot be used,
    3 it was stopped by a signal, with a checkpoint to go on from. A second signal ends it at once, without a new
    checkpoint, with 1.
    """
    with told_in_one_line("train"):
        from tinkex_py.commands.work.train_config import read_config
        from tinkex_py.commands.work.training import train_from_config

        described = read_config(config)
        if model is not None:
            described = described.model_copy(update={"model": model})
        folder = runs_dir / _checked_name(name or config.stem)
        try:
            trained, was_asked_to_stop = run_stoppable(
                lambda stop: train_from_config(described, folder, stop=stop, progress=True), _tell_stopping
            )
        except asyncio.CancelledError:
            typer.echo("tinkex-py train: ended at once; the run can go on from its last checkpoint", err=True)
            raise typer.Exit(FAILED) from None
        typer.echo(trained.model_dump_json() if as_json else _in_words(trained))
        if was_asked_to_stop and trained.status == "stopped":
            raise typer.Exit(STOPPED)


def _checked_name(name: str) -> str:
    if name in ("", ".", "..") or Path(name).name != name:
        raise ConfigError(f"--name must be the name of a folder, got {name!r}")
    return name


def _tell_stopping() -> None:
    typer.echo("stopping after the steps in flight, with a checkpoint; once more ends at once", err=True)


def _in_words(trained: "Trained") -> str:
    status = trained.status if trained.reason is None else f"{trained.status} ({trained.reason})"
    losses = "" if trained.first_loss is None else f", loss {trained.first_loss:.4f} -> {trained.last_loss:.4f}"
    return f"{status} after {trained.steps} steps{losses}, files in {trained.folder}"
