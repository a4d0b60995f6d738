"""Progress of a run in a terminal: a bar and a live table of the terms."""

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from tinkex_py.runs.records import RunInfo, StepRecord, scalars, term_names
from tinkex_py.unicode import plain_line


class RichProgress:
    """A `ProgressView` with a live display."""

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
        self._progress.update(self._task, description=plain_line(text))

    def step(self, record: StepRecord) -> None:
        """See ProgressView."""
        self._first = self._first or record
        self._progress.update(self._task, completed=record.step)
        self._live.update(Group(terms_table(record, self._first), self._progress))

    def finish(self, run: RunInfo) -> None:
        """See ProgressView."""
        self._progress.update(self._task, description=plain_line(run.outcome))
        self._live.stop()
        self._console.print()


def terms_table(record: StepRecord, first: StepRecord) -> Table:
    """Returns one row per term: its numbers in the step of `record`, and its contribution in the step `first`."""
    table = Table(title=f"terms of step {record.step}", title_justify="left")
    table.add_column("term", no_wrap=True)
    for heading in ("value", "weight", "contribution", f"at step {first.step}", "gradient norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    now, before = scalars(record), scalars(first)

    def row(title: str, value: str | None, weight: str | None, contribution: str, norm: str) -> None:
        columns = (now.get(value or ""), now.get(contribution), before.get(contribution), now.get(norm))
        numbers = ["-" if number is None else f"{number:.4f}" for number in columns]
        shown_weight = "" if weight is None else f"{now[weight]:g}"
        # As a Text, in which square brackets are no markup.
        table.add_row(Text(plain_line(title)), "" if value is None else numbers[0], shown_weight, *numbers[1:])

    row("base loss", "loss/base", None, "loss/base", "grad_norm/base_loss")
    for name in term_names(record):
        term = f"term/{name}"
        row(name, f"{term}/value", f"{term}/weight", f"{term}/contribution", f"{term}/grad_norm")
    table.add_section()
    row("total", None, None, "loss/total", "grad_norm/total")
    return table
