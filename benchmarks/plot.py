"""The plot of a run: every result with a target, as a share of it."""

from pathlib import Path
from typing import Any

from benchmarks.results import Report, Result

_LONGEST = 5.0
_GREEN, _RED = "#2a7f4f", "#b3362b"


def share_of_target(result: Result) -> float:
    """Returns at most 1 if the target is reached; bars end at `_LONGEST`."""
    assert result.bound is not None, "only results with a target have a share of it"
    low, high = (result.measured, result.bound) if result.target == "at most" else (result.bound, result.measured)
    if low <= 0:
        return 0.0
    return min(low / high, _LONGEST) if high > 0 else _LONGEST


def draw(report: Report, path: Path) -> None:
    """Writes the plot as PNG."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    judged = [result for result in report.results if result.bound is not None][::-1]
    shares = [share_of_target(result) for result in judged]
    figure: Any = plt.figure(figsize=(11, 1.2 + 0.28 * len(judged)), layout="constrained")
    axes = figure.add_subplot()
    colours = [_GREEN if result.passed else _RED for result in judged]
    axes.barh([f"({result.benchmark}) {result.what}" for result in judged], shares, color=colours)
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("measured / target (shorter is better; the line is the target)")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlim(0, max([1.2, *shares]) * 1.05)
    figure.savefig(path, dpi=110)
    plt.close(figure)
