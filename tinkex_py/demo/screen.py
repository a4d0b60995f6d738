"""What the demo shows: a progress bar and a live table of the terms."""

from collections.abc import Generator
from contextlib import contextmanager

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from tinkex_py.losses import CustomLossOutput


class Screen:
    """Live display of a run.

    Args:
        console: where to draw.
        steps: how many there will be.
    """

    def __init__(self, console: Console, steps: int) -> None:
        self._progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._progress.add_task("training", total=steps)
        self._console = console
        self._live: Live | None = None

    @contextmanager
    def shown(self) -> Generator[None]:
        """Draws while the block runs."""
        with Live(self._progress, console=self._console, refresh_per_second=4) as live:
            self._live = live
            yield
        self._live = None
        self._console.print()

    def step(self, output: CustomLossOutput, first: CustomLossOutput) -> None:
        """Shows a finished step."""
        self._progress.advance(self._task)
        if self._live is not None:
            self._live.update(Group(terms_table(output, first), self._progress))


def terms_table(output: CustomLossOutput, first: CustomLossOutput) -> Table:
    """One row per term: value, weight, contribution and gradient norm, and the first step's contribution."""
    table = Table(title="terms of this step", title_justify="left")
    table.add_column("term", no_wrap=True)
    for heading in ("value", "weight", "contribution", "at step 1", "gradient norm"):
        table.add_column(heading, justify="right", no_wrap=True)
    base = output.base_loss
    table.add_row(
        "base (NLL)",
        _number(base.value),
        "",
        _number(base.value),
        _number(first.base_loss.value),
        _number(base.grad_norm),
    )
    for name, term in output.regularizers.items():
        before = first.regularizers.get(name)
        table.add_row(
            name,
            _number(term.value),
            f"{term.weight:g}",
            _number(term.contribution),
            _number(before.contribution if before else None),
            _number(term.grad_norm),
        )
    table.add_section()
    table.add_row(
        "total", "", "", _number(output.loss_total), _number(first.loss_total), _number(output.total_grad_norm)
    )
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"
