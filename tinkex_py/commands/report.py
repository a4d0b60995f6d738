"""`tinkex-py report`."""

from pathlib import Path
from typing import Annotated

import typer

from tinkex_py.commands.common.options import AsJson
from tinkex_py.commands.common.printing import echo, echo_json
from tinkex_py.commands.common.running import one_line_errors


def report(
    runs: Annotated[list[Path], typer.Argument(help="folders of runs", show_default=False)],
    out: Annotated[Path, typer.Option(help="folder for the page and the charts")] = Path("report"),
    as_json: AsJson = False,
) -> None:
    """Write a report of runs: one self-contained HTML page, and a PNG file of each chart."""
    with one_line_errors("report", extra="report", needs=("jinja2", "matplotlib")):
        from tinkex_py.runs.report import write_report

        written = write_report(runs, out)
        if as_json:
            echo_json(written)
            return
        for run in written.runs:
            losses = [run.first.get("loss/total"), run.last.get("loss/total")]
            change = "" if None in losses else f", loss {losses[0]:.4f} -> {losses[1]:.4f}"
            echo(f"{run.label}: {run.outcome}, {run.steps} steps{change}")
        echo(f"wrote {written.page} and {len(written.charts)} charts")
