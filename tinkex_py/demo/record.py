"""The files of one run: a line per step, and a picture."""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib import import_module
from pathlib import Path
from typing import Any

from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.losses import CustomLossOutput


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


def append_step(folder: Path, step: int, output: CustomLossOutput, extra: Mapping[str, Any]) -> None:
    """Adds one line to steps.jsonl; the service's own logprobs are left out."""
    row = {"step": step, **output.model_dump(mode="json", exclude={"service_output"}), **extra}
    with (folder / "steps.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def require_matplotlib() -> None:
    """Raises MissingExtra now rather than after the training.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError as error:
        raise MissingExtra("matplotlib", "demo") from error


def plot(folder: Path, outputs: Sequence[CustomLossOutput]) -> Path:
    """Draws loss and contributions over the steps, and the gradient norms."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(9, 8), layout="constrained")
    FigureCanvasAgg(figure)
    loss, contributions, norms = figure.subplots(3, 1, sharex=True)
    steps = range(1, len(outputs) + 1)
    loss.plot(steps, [output.loss_total for output in outputs], label="total", linewidth=2)
    loss.plot(steps, [output.base_loss.value for output in outputs], label="base (NLL)", linestyle="--")
    loss.set_ylabel("loss")
    for name in outputs[0].regularizers:
        values = [output.regularizers[name].contribution for output in outputs]
        contributions.plot(steps, values, label=name)
        norms.plot(steps, [output.regularizers[name].grad_norm_weighted for output in outputs], label=name)
    contributions.set_ylabel("weight x value")
    norms.plot(steps, [output.base_loss.grad_norm for output in outputs], label="base", linestyle="--")
    norms.plot(steps, [output.total_grad_norm for output in outputs], label="total", linewidth=2, color="black")
    norms.set_ylabel("gradient norm")
    norms.set_yscale("log")
    largest = max(output.total_grad_norm or 0.0 for output in outputs)
    if largest > 0:  # a norm that starts at zero would squeeze all others into one line
        norms.set_ylim(bottom=largest * 1e-5)
    norms.set_xlabel("step")
    for axes in (loss, contributions, norms):
        axes.grid(alpha=0.3)
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1.0), fontsize="small")
    loss.set_title("loss_total = base_loss + sum(weight x regularizer)")
    path = folder / "loss.png"
    figure.savefig(path, dpi=120)
    return path
