"""The charts of a report, drawn with matplotlib without its global state."""

import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font  # pyright: ignore[reportUnknownVariableType]
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

# M. Okabe and K. Ito, "Color Universal Design"; the yellow is darker for white paper.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A000")
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
BASE_LOSS = "base_loss"
MOST_POINTS_UNSMOOTHED, MOST_POINTS_MARKED = 120, 40
LONGEST_LABEL = 44  # characters
LOG_RANGE = 1e-5  # a norm near zero would squeeze the other curves into one line

Numbers = NDArray[np.float64]


@dataclass(frozen=True)
class RunCurves:
    """The numbers of one run.

    Attributes:
        steps: numbers of the steps.
        values: name of `tinkex_py.runs.scalars` -> value of each step; NaN where it is missing or not finite.
    """

    steps: Numbers
    values: Mapping[str, Numbers]


@dataclass(frozen=True)
class Size:
    """Size of an image: width in inches, most panels beside each other, dots per inch."""

    width: float
    columns: int
    dots: int


WIDE, NARROW = Size(10.0, 3, 110), Size(4.2, 1, 170)


@dataclass(frozen=True)
class Chart:
    """What is drawn over the steps, in one or several panels.

    Attributes:
        title: its heading.
        caption: explanation; also says what a run without it would need.
        unit: label of the y axis.
        names: of `tinkex_py.runs.scalars`; `*` stands for any term or evaluation.
        log: whether the y axis is logarithmic.
        separate: whether each curve has its own unit, and therefore its own panel and scale.
    """

    title: str
    caption: str
    unit: str
    names: tuple[str, ...]
    log: bool = False
    separate: bool = False


_NORMS = ("grad_norm/total", "grad_norm/base_loss", "term/*/grad_norm_weighted")
_TRACKED = "Needs track_grad_norms=True."
CHARTS = {
    "losses": Chart(
        "Losses", "The total is the base loss plus all contributions.", "loss", ("loss/total", "loss/base")
    ),
    "evaluation": Chart("Evaluation", "Results of evaluate=...", "value", ("evaluation/*",), separate=True),
    "contributions": Chart("Contributions", "Weight x value of each term.", "contribution", ("term/*/contribution",)),
    "gradient_norms": Chart("Gradient norms", f"Of weight x gradient. {_TRACKED}", "L2 norm (log)", _NORMS, log=True),
    "shares": Chart(
        "Shares of the total gradient", f"They add up to 1. {_TRACKED}", "share", ("term/*/share_of_total",)
    ),
    "cosines_with_base": Chart(
        "Cosines with the base loss",
        f"Below 0 a term acts against the base loss. {_TRACKED}",
        "cosine",
        ("term/*/cosine_with_base",),
    ),
    "cosines_with_total": Chart(
        "Cosines with the total",
        f"Below 0 a term acts against the total. {_TRACKED}",
        "cosine",
        ("term/*/cosine_with_total",),
    ),
    "weights": Chart("Weights", "Schedules and controllers change them.", "weight", ("term/*/weight",)),
    "times": Chart(
        "Step time", "The time in the service's queue is part of the step.", "s", ("time/step", "time/queue")
    ),
}
_LABELS = {"loss/base": "base loss", "grad_norm/base_loss": "base loss", "time/queue": "in the queue"}


def draw(chart: Chart, runs: Mapping[str, RunCurves], size: Size) -> bytes | None:
    """A chart as PNG; None if no run has data for it.

    Of one run, all curves share a panel. Of several runs, each curve has a panel, in which the runs are compared. All
    panels have the same scale, unless the units differ.

    Args:
        chart: what to draw.
        runs: label of the run -> its numbers.
        size: of the image.
    """
    names = _names(chart, runs)
    if not names:
        return None
    panels = [[name] for name in names] if chart.separate or len(runs) > 1 else [names]
    columns = min(size.columns, len(panels))
    rows = -(-len(panels) // columns)
    height = 1.0 + rows * (3.2 if rows * columns == 1 else 2.3)
    figure: Any = Figure(figsize=(size.width, height), layout="constrained", dpi=size.dots)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=not chart.separate).flatten()
    lines: dict[str, Any] = {}
    for axes, panel in zip(grid, panels, strict=False):
        axes.grid(alpha=0.25)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=10 // columns, integer=True))
        if len(panels) > 1:
            axes.set_title(_drawable(label_of(panel[0])), loc="left", fontsize="small", parse_math=False)
        for name in panel:
            lines |= _draw_curves(axes, chart, name, runs, names)
    for axes, shown in zip(grid, panels if chart.separate else [names], strict=False):  # a shared scale is set once
        _set_scale(axes, chart, [run.values[name] for run in runs.values() for name in shown if name in run.values])
    for axes in grid[len(panels) :]:
        axes.remove()
    figure.supxlabel("step", fontsize="medium")
    figure.supylabel(chart.unit, fontsize="medium")
    _add_legend(figure, chart.title, lines, characters=int(15 * size.width))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def label_of(name: str) -> str:
    """The label of a curve: its term or evaluation, or what it measures."""
    kind, _, rest = name.partition("/")
    term = rest.rpartition("/")[0] if kind == "term" else rest
    return _LABELS.get(name) or ("base loss" if term == BASE_LOSS else term)


def smoothed(values: Numbers) -> Numbers:
    """A centred moving average over a fortieth of the points, and over fewer towards the ends; straight lines stay.

    Args:
        values: may contain NaN, which is ignored; without a value nearby, NaN stays.
    """
    places, known = np.arange(len(values)), np.isfinite(values)
    reach = np.minimum(max(2, len(values) // 80), np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    after, before = places + reach + 1, places - reach
    count = counts[after] - counts[before]
    return np.divide(sums[after] - sums[before], count, out=np.full(len(values), np.nan), where=count > 0)


def _names(chart: Chart, runs: Mapping[str, RunCurves]) -> list[str]:
    """The curves of a chart, in the order of the patterns."""
    known = dict.fromkeys(name for run in runs.values() for name in run.values if np.isfinite(run.values[name]).any())
    return [name for pattern in chart.names for name in known if _matches(name, *pattern.partition("*"))]


def _matches(name: str, before: str, star: str, after: str) -> bool:
    if not star:
        return name == before
    # Names of terms may contain slashes.
    return name.startswith(before) and name.endswith(after) and len(name) > len(before) + len(after)


def _draw_curves(
    axes: Any, chart: Chart, name: str, runs: Mapping[str, RunCurves], names: Sequence[str]
) -> dict[str, Any]:
    """Draws one curve of every run. Returns the lines of the legend by their labels."""
    lines: dict[str, Any] = {}
    for number, (run, curves) in enumerate(runs.items()):
        if name not in curves.values:
            continue
        values = curves.values[name]
        known = np.isfinite(values) if chart.separate else np.ones(len(values), dtype=bool)
        label = run if len(runs) > 1 else label_of(name)
        looks = _looks(number) if len(runs) > 1 else _term_looks(name, names)
        lines[label] = _draw_line(axes, curves.steps[known], values[known], looks, smooth=not chart.separate)
    return lines


def _draw_line(axes: Any, steps: Numbers, values: Numbers, looks: dict[str, Any], *, smooth: bool) -> Any:
    if smooth and len(steps) > MOST_POINTS_UNSMOOTHED:
        axes.plot(steps, values, color=looks["color"], linewidth=0.7, alpha=0.3)
        values = smoothed(values)
    alone = _without_neighbours(values)
    axes.plot(steps[alone], values[alone], color=looks["color"], linestyle="", marker="o", markersize=3)
    marker = "o" if len(steps) <= MOST_POINTS_MARKED else ""
    (line,) = axes.plot(steps, values, linewidth=1.5, marker=marker, markersize=3, **looks)
    return line


def _looks(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}


def _term_looks(name: str, names: Sequence[str]) -> dict[str, Any]:
    """The total is black and the base loss grey; a term has the same colour in all charts."""
    fixed = {"base loss": {"color": "#6E6E6E", "linestyle": STYLES[1]}, "in the queue": {"color": "#6E6E6E"}}
    if not name.startswith(("term/", "evaluation/")) or label_of(name) in fixed:
        return fixed.get(label_of(name), {"color": "#000000"})
    terms = [other for other in names if other.startswith(("term/", "evaluation/")) and label_of(other) not in fixed]
    return _looks(terms.index(name))


def _without_neighbours(values: Numbers) -> NDArray[np.bool_]:
    """Points between missing ones, which a line does not show."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _set_scale(axes: Any, chart: Chart, curves: Sequence[Numbers]) -> None:
    values = np.concatenate(curves)
    positive = values[values > 0]
    if chart.log and positive.size:
        axes.set_yscale("log", subs=[])  # no minor ticks, which take most of the time of drawing
        axes.set_ylim(bottom=max(positive.min() * 0.8, positive.max() * LOG_RANGE))
        return
    axes.ticklabel_format(axis="y", useOffset=False)
    low, high = axes.get_ylim()
    largest = max(abs(low), abs(high))
    if high - low < largest * 1e-6:  # else rounding errors of a constant fill the axis
        axes.set_ylim(low - largest / 10, high + largest / 10)


def _add_legend(figure: Any, title: str, lines: Mapping[str, Any], *, characters: int) -> None:
    """The title, and one legend for all panels, above them."""
    labels = [_drawable(label) for label in lines]
    rows = math.ceil(len(labels) / max(1, characters // (max(map(len, labels)) + 8)))
    legend = figure.legend(
        list(lines.values()),
        [" "] * len(lines),
        title=title,
        title_fontproperties={"weight": "bold", "size": "medium"},
        alignment="left",
        loc="outside upper left",
        ncols=math.ceil(len(labels) / rows),
        fontsize="small",
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)  # names may contain dollar signs and begin with an underscore
        text.set_text(label)


def _drawable(text: str) -> str:
    """The text in one line of bounded length, with `?` for characters that the font lacks."""
    font: Any = get_font(findfont("DejaVu Sans"))
    drawable = "".join(character if font.get_char_index(ord(character)) else "?" for character in text)
    half = LONGEST_LABEL // 2
    return drawable if len(drawable) <= LONGEST_LABEL else f"{drawable[:half]}…{drawable[-half:]}"
