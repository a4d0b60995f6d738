"""Progress of a run in a terminal: a bar and a live table of the terms."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tinkex_py.runs.records import RunInfo, StepRecord, scalars


class RichProgress:
    """Live display of a run.

    Args:
        console: where it is drawn.
    """

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=None)
        self._live = Live(self._progress, console=console, refresh_per_second=4)
        self._console = console
        self._first: StepRecord | None = None

    def start(self, run: RunInfo, made: int) -> None:
        """See ProgressView."""
        self._progress.update(self._task, total=run.total_steps, completed=made)
        self._live.start()

    def doing(self, text: str) -> None:
        """See ProgressView."""
        self._progress.update(self._task, description=text)

    def step(self, record: StepRecord) -> None:
        """See ProgressView."""
        self._first = self._first or record
        self._progress.update(self._task, completed=record.step)
        self._live.update(Group(terms_table(record, self._first), self._progress))

    def finish(self, run: RunInfo) -> None:
        """See ProgressView."""
        self._progress.update(self._task, description=run.outcome)
        self._live.stop()
        self._console.print()


def terms_table(record: StepRecord, first: StepRecord) -> Table:
    """One row per term: value, weight, contribution and gradient norm, and the contribution in another step.

    Args:
        record: the step to show.
        first: the step to compare it with.
    """
    table = Table(title=f"terms of step {record.step}", title_justify="left")
    table.add_column("term", no_wrap=True)
    for heading in ("value", "weight", "contribution", f"at step {first.step}", "gradient norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    now, before = scalars(record), scalars(first)
    base = now["loss/base"]
    table.add_row(
        "base loss",
        _number(base),
        "",
        _number(base),
        _number(before["loss/base"]),
        _number(now.get("grad_norm/base_loss")),
    )
    for name in dict.fromkeys(name for output in record.losses for name in output.regularizers):
        term = f"term/{name}"
        table.add_row(
            name,
            _number(now[f"{term}/value"]),
            f"{now[f'{term}/weight']:g}",
            _number(now[f"{term}/contribution"]),
            _number(before.get(f"{term}/contribution")),
            _number(now.get(f"{term}/grad_norm")),
        )
    table.add_section()
    total, total_before = _number(now["loss/total"]), _number(before["loss/total"])
    table.add_row("total", "", "", total, total_before, _number(now.get("grad_norm/total")))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
