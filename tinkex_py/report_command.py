"""What `tinkex-py report` does beside the report itself: check what is installed, and say what was written."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

import typer

from tinkex_py.errors import MissingExtra


def report(runs: Sequence[Path], out: Path, *, as_json: bool) -> None:
    """Writes the report and prints where it is.

    Raises:
        ConfigError: a folder is no run, or cannot be read or written.
        MissingExtra: a library for it is not installed.
    """
    for library in ("jinja2", "matplotlib.figure"):
        try:
            import_module(library)
        except ModuleNotFoundError as error:
            raise MissingExtra(str(error.name), "report") from error
    from tinkex_py.runs.report import write_report

    written = write_report(runs, out)
    if as_json:
        typer.echo(written.model_dump_json(indent=2))
        return
    for run in written.runs:
        losses = [run.first.get("loss/total"), run.last.get("loss/total")]
        told = "" if None in losses else f", loss {losses[0]:.4f} -> {losses[1]:.4f}"
        typer.echo(f"{run.label}: {run.status}, {run.steps} steps{told}")
    typer.echo(f"{written.page} and {len(written.pictures)} pictures")
