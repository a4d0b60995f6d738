"""Progress of a run: nothing, lines, or a bar."""

import importlib
import importlib.util
import sys
from typing import Any, Protocol, TextIO, runtime_checkable

from tinkex_py.errors import ConfigError
from tinkex_py.runs.records import RunInfo, StepRecord, scalars, term_names
from tinkex_py.unicode import plain_line


@runtime_checkable
class ProgressView(Protocol):
    """Shows a run. Called on the event loop, so it must be quick."""

    def start(self, run: RunInfo, made: int) -> None:
        """The run starts, or resumes after `made` steps."""

    def doing(self, text: str) -> None:
        """The current activity of the run, or what it waits for."""

    def step(self, record: StepRecord) -> None:
        """An optimizer step was made."""

    def finish(self, run: RunInfo) -> None:
        """The run ended; nothing is shown after this."""


class NoProgress(ProgressView):
    """Shows nothing."""


class ProgressLines(ProgressView):
    """Writes one line per step, for logs and pipes; and one when the run waits or restarts."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def start(self, run: RunInfo, made: int) -> None:
        """See ProgressView."""
        self._write(f"{run.name}: " + ("started" if made == 0 else f"resumed after step {made}"))

    def doing(self, text: str) -> None:
        """See ProgressView."""
        if text.startswith(("waiting", "restarting")):
            self._write(text)

    def step(self, record: StepRecord) -> None:
        """See ProgressView."""
        self._write(f"step {record.step}  {summary(record)}  {record.seconds:.2f} s")

    def finish(self, run: RunInfo) -> None:
        """See ProgressView."""
        self._write(f"{run.name}: {run.outcome}")

    def _write(self, line: str) -> None:
        self._stream.write(plain_line(line) + "\n")
        self._stream.flush()


class ProgressBar(ProgressView):
    """A bar of the tqdm library, for notebooks; `make` creates it, as `tqdm.tqdm` does."""

    def __init__(self, make: Any) -> None:
        self._make = make
        self._bar: Any = None

    def start(self, run: RunInfo, made: int) -> None:
        """See ProgressView."""
        self._bar = self._make(total=run.total_steps, initial=made, desc=plain_line(run.name), unit="step")

    def doing(self, text: str) -> None:
        """See ProgressView."""
        self._bar.set_description(plain_line(text))

    def step(self, record: StepRecord) -> None:
        """See ProgressView."""
        self._bar.set_postfix_str(plain_line(summary(record)), refresh=False)
        self._bar.update(1)

    def finish(self, run: RunInfo) -> None:
        """See ProgressView."""
        self._bar.set_description(plain_line(run.outcome))
        self._bar.close()


def chosen_view(progress: bool | ProgressView) -> ProgressView:
    """Returns the requested view; True selects one by where this process writes to.

    Raises:
        ConfigError: it is not a view.
    """
    if isinstance(progress, ProgressView) and not isinstance(progress, type):
        return progress
    if not isinstance(progress, bool):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise ConfigError(f"progress must be True, False or a ProgressView, got a {type(progress).__name__}")
    if not progress:
        return NoProgress()
    if _in_notebook() and _has("tqdm"):
        return ProgressBar(notebook_bar())
    if sys.stderr.isatty() and _has("rich"):
        from rich.console import Console

        from tinkex_py.runs.rich_progress import RichProgress

        return RichProgress(Console(stderr=True))
    return ProgressLines(sys.stderr)


def summary(record: StepRecord) -> str:
    """Returns a step in one line: losses, value and weight of each term, metrics of rollouts, and evaluation."""
    numbers = scalars(record)
    shown = [f"loss {numbers['loss/total']:.4f}", f"base {numbers['loss/base']:.4f}"]
    for name in term_names(record):
        value, weight = numbers[f"term/{name}/value"], numbers[f"term/{name}/weight"]
        shown.append(f"{name} {value:.4f} (weight {weight:.4g})")
    shown += [f"{name} {value:.4f}" for name, value in (record.rollout | record.evaluation).items()]
    return "  ".join(shown)


def _in_notebook() -> bool:
    interactive: Any = sys.modules.get("IPython")
    shell = None if interactive is None else interactive.get_ipython()
    return type(shell).__name__ == "ZMQInteractiveShell"


def notebook_bar() -> Any:
    """Returns the bar class of tqdm for notebooks, without its monitor thread."""
    # Without ipywidgets, tqdm.auto warns and falls back to the plain bar.
    bar: Any = importlib.import_module("tqdm.auto" if _has("ipywidgets") else "tqdm").tqdm
    return type("ProgressBar", (bar,), {"monitor_interval": 0})


def _has(library: str) -> bool:
    return importlib.util.find_spec(library) is not None
