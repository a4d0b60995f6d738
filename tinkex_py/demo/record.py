"""Where a run of the demo is written to, and its picture."""

from collections.abc import Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.runs import StepRecord, scalars


def new_run_folder(runs_dir: Path) -> Path:
    """A fresh folder named after the time; a second run in the same second gets a number.

    Raises:
        ConfigError: it cannot be made.
    """
    stamp = datetime.now().astimezone().strftime("%Y-%m-%d_%H-%M-%S")
    for attempt in range(1, 1000):
        folder = runs_dir / (stamp if attempt == 1 else f"{stamp}_{attempt}")
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise ConfigError(f"the run's folder {folder} cannot be made: {error.strerror}") from error
        return folder
    raise ConfigError(f"{runs_dir / stamp} and 998 siblings exist already")


def require_matplotlib() -> None:
    """Raises MissingExtra now rather than after the training.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtra("matplotlib", "demo") from error


def plot(folder: Path, records: Sequence[StepRecord]) -> Path:
    """Draws loss and contributions over the steps, and the gradient norms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, contributions, norms = figure.subplots(3, 1, sharex=True)
    steps = [record.step for record in records]
    numbers = [scalars(record) for record in records]

    def series(name: str) -> list[float]:
        return [of_step[name] for of_step in numbers]

    loss.plot(steps, series("loss/total"), label="total", linewidth=2)
    loss.plot(steps, series("loss/base"), label="base (NLL)", linestyle="--")
    loss.set_ylabel("loss")
    for name in records[0].losses[0].regularizers:
        contributions.plot(steps, series(f"term/{name}/contribution"), label=name)
        norms.plot(steps, series(f"term/{name}/grad_norm_weighted"), label=name)
    contributions.set_ylabel("weight x value")
    totals = series("grad_norm/total")
    norms.plot(steps, series("grad_norm/base_loss"), label="base", linestyle="--")
    norms.plot(steps, totals, label="total", linewidth=2, color="black")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    if max(totals) > 0:  # a norm that starts at zero would squeeze all others into one line
        norms.set_ylim(bottom=max(totals) * 1e-5)
    norms.set_xlabel("step")
    for axes in (loss, contributions, norms):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
    loss.set_title("loss_total = base_loss + sum(weight x regularizer)")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
