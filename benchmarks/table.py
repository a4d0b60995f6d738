"""The results as a table: on screen, and in Markdown for docs/performance.md."""

from rich.console import Console
from rich.table import Table

from benchmarks.results import Report

HEAD = ("benchmark", "target", "measured", "pass/miss")
_STYLES = {"pass": "green", "miss": "bold red", "-": "dim"}


def rows_of(report: Report) -> list[tuple[str, str, str, str]]:
    """One row per result. A quick run judges nothing: its sizes are not those of the targets."""
    return [
        (
            f"({result.benchmark}) {result.what}",
            result.target_text,
            result.measured_text,
            "-" if report.quick else result.verdict,
        )
        for result in report.results
    ]


def show(report: Report, console: Console) -> None:
    """Prints the table."""
    table = Table(*HEAD)
    for name, target, measured, verdict in rows_of(report):
        table.add_row(name, target, measured, f"[{_STYLES[verdict]}]{verdict}")
    console.print(table)


def markdown(report: Report) -> str:
    """The table, and on which machine it was made."""
    lines = [f"| {' | '.join(HEAD)} |", f"|{' --- |' * len(HEAD)}"]
    lines += [f"| {' | '.join(row)} |" for row in rows_of(report)]
    machine = report.machine
    versions = ", ".join(f"{name} {version}" for name, version in machine.versions.items())
    made = (
        f"Made on {report.made:%Y-%m-%d} in {report.rounds} rounds on {machine.cores} cores of {machine.processor} "
        f"({machine.system}), with Python {machine.python}, {versions}. Before the run {machine.load:.1f} other "
        "processes wanted a core."
    )
    return "\n".join([*lines, "", made])
