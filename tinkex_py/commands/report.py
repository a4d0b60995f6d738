"""`tinkex-py report`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.outcomes import told_in_one_line
from tinkex_py.integrations.extras import imported

if TYPE_CHECKING:
    from tinkex_py.runs.report import Report


def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the page and the pictures")] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Draw runs into one HTML page that needs nothing else, and PNGs."""
    with told_in_one_line("report"):
        for library in ("jinja2", "matplotlib.figure"):
            imported(library, "report")
        from tinkex_py.runs.report import write_report

        written = write_report(runs, out)
        if as_json:
            typer.echo(written.model_dump_json())
        else:
            _show(written)


def _show(written: "Report") -> None:
    for run in written.runs:
        losses = [run.first.get("loss/total"), run.last.get("loss/total")]
        told = "" if None in losses else f", loss {losses[0]:.4f} -> {losses[1]:.4f}"
        typer.echo(f"{run.label}: {run.status}, {run.steps} steps{told}")
    typer.echo(f"{written.page} and {len(written.pictures)} pictures")
