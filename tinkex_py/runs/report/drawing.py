"""Draws the pictures of a report with matplotlib, without its global state."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font  # pyright: ignore[reportUnknownVariableType]
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from tinkex_py.runs.curves import Curves, Numbers
from tinkex_py.runs.pictures import BLACK, GREY, PALETTE_ON_LIGHT, Chart, Drawing, Line, Panel

WIDTH = 10.0  # inches
DPI = 110
TICKS = {1: 10, 2: 6, 3: 4}  # on the x axis, by the number of charts beside each other
# Above this many points, the points are drawn pale and a moving average over them.
MOST_POINTS_UNSMOOTHED = 120
MOST_POINTS_MARKED = 40
LONGEST_LABEL = 44  # characters
# A norm that starts near zero would squeeze all others into one line.
LOG_RANGE = 1e-4
SMALLEST_SPAN = 1e-6  # of an axis, as part of its largest value


def picture_of(drawing: Drawing, runs: Mapping[str, Curves]) -> bytes:
    """A PNG of one picture.

    Args:
        drawing: what goes where; with at least one chart.
        runs: name of the run -> its curves.
    """
    rows = -(-len(drawing.charts) // drawing.columns)
    height = 4.2 if rows == 1 else 1.0 + 2.6 * rows
    figure: Any = Figure(figsize=(WIDTH, height), layout="constrained", dpi=DPI)
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, drawing.columns, squeeze=False, sharex=len(runs) == 1).flatten()
    for axes, chart in zip(grid, drawing.charts, strict=False):
        axes.xaxis.set_major_locator(MaxNLocator(nbins=TICKS[drawing.columns], integer=True))
        _draw(axes, chart, runs)
    for place, chart in enumerate(drawing.charts):
        if place % drawing.columns == 0 or chart.panel != drawing.charts[place - 1].panel:
            grid[place].set_ylabel(chart.panel.axis)
    for axes in grid[len(drawing.charts) :]:
        axes.remove()
    for axes in grid[max(len(drawing.charts) - drawing.columns, 0) : len(drawing.charts)]:
        axes.set_xlabel("step")
    _add_legend(figure, drawing)
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def colour_on_paper(colour: int) -> str:
    """The colour of a line, as HTML and matplotlib write it."""
    return {BLACK: "#000000", GREY: "#6E6E6E"}.get(colour) or PALETTE_ON_LIGHT[colour]


def smoothed(values: Numbers, *, in_logs: bool = False) -> Numbers:
    """A centred moving average over a fortieth of the points, and over fewer towards the ends; straight lines stay.

    Args:
        values: may hold NaN, which counts for nothing; where nothing else is near, NaN stays.
        in_logs: average the logarithms, for a logarithmic axis.
    """
    if in_logs:
        logs = np.log(values, out=np.full(len(values), np.nan), where=values > 0)
        return np.exp(smoothed(logs))
    places, known = np.arange(len(values)), np.isfinite(values)
    reach = np.minimum(max(2, len(values) // 80), np.minimum(places, places[::-1]))
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    after, before = places + reach + 1, places - reach
    count = counts[after] - counts[before]
    return np.divide(sums[after] - sums[before], count, out=np.full(len(values), np.nan), where=count > 0)


def _draw(axes: Any, chart: Chart, runs: Mapping[str, Curves]) -> None:
    axes.grid(alpha=0.25)
    if chart.title:
        axes.set_title(_drawable(chart.title), loc="left", fontsize="small", parse_math=False)
    if chart.panel.stacked:
        _draw_stack(axes, chart.lines, runs[chart.lines[0].run])
    else:
        for line in chart.lines:
            _draw_line(axes, line, runs[line.run], chart.panel)
    _set_scales(axes, chart, runs)


def _draw_line(axes: Any, line: Line, curves: Curves, panel: Panel) -> None:
    steps, values = np.array(curves.steps()), curves.values(line.name)
    if panel.sparse:
        steps, values = steps[np.isfinite(values)], values[np.isfinite(values)]
    colour, style = colour_on_paper(line.colour), (0, (4, 2)) if line.dashed else "-"
    if panel.noisy and len(steps) > MOST_POINTS_UNSMOOTHED:
        axes.plot(steps, values, color=colour, linewidth=0.7, alpha=0.3)
        values = smoothed(values, in_logs=panel.scale == "log")
    marker = "o" if len(steps) <= MOST_POINTS_MARKED else ""
    width = 2.0 if line.colour == BLACK else 1.5
    axes.plot(steps, values, color=colour, linestyle=style, linewidth=width, marker=marker, markersize=3)
    alone = _without_neighbours(values)
    axes.plot(steps[alone], values[alone], color=colour, linestyle="", marker="o", markersize=3)


def _draw_stack(axes: Any, lines: Sequence[Line], curves: Curves) -> None:
    steps = np.array(curves.steps(), dtype=float)
    above, below = np.zeros(len(steps)), np.zeros(len(steps))
    if len(steps) == 1:  # an area needs a width
        steps = steps + np.array([-0.4, 0.4])
        above, below = np.zeros(2), np.zeros(2)
    for line in lines:
        values = np.nan_to_num(curves.values(line.name), nan=0.0)
        values = smoothed(values) if len(values) > MOST_POINTS_UNSMOOTHED else values
        looks = {"color": colour_on_paper(line.colour), "linewidth": 0.0, "alpha": 0.85}
        looks |= {"hatch": "///", "edgecolor": "white"} if line.dashed else {}
        for base, part in ((above, values.clip(min=0.0)), (below, values.clip(max=0.0))):
            if part.any():
                axes.fill_between(steps, base, base + part, **looks)
                np.add(base, part, out=base)
    axes.plot(steps, above + below, color="black", linewidth=1.0)
    axes.axhline(0.0, color="black", linewidth=0.6)


def _set_scales(axes: Any, chart: Chart, runs: Mapping[str, Curves]) -> None:
    shown = {line.run for line in chart.lines}
    steps = [step for run in shown for step in (runs[run].steps()[0], runs[run].last_step)]
    if min(steps) == max(steps):
        axes.set_xlim(steps[0] - 0.5, steps[0] + 0.5)
        axes.set_xticks(steps[:1])
    elif chart.panel.sparse:  # else the axis would begin at the first value, not at the first step
        margin = axes.margins()[0] * (max(steps) - min(steps))
        axes.set_xlim(min(steps) - margin, max(steps) + margin)
    if chart.panel.limits is not None:
        axes.set_ylim(*chart.panel.limits)
        axes.axhline(0.0, color="black", linewidth=0.6)
    values = np.concatenate([runs[line.run].values(line.name) for line in chart.lines])
    positive = values[values > 0]
    if chart.panel.scale == "log" and positive.size:
        axes.set_yscale("log")
        axes.set_ylim(bottom=max(positive.min() * 0.8, positive.max() * LOG_RANGE))
        return
    axes.ticklabel_format(axis="y", useOffset=False)
    low, high = axes.get_ylim()
    largest = max(abs(low), abs(high))
    if high - low < largest * SMALLEST_SPAN:  # else the digits that rounding left would fill the axis
        axes.set_ylim(low - largest / 10, high + largest / 10)


def _add_legend(figure: Any, drawing: Drawing) -> None:
    """The picture's title, and one legend for all charts, above them."""
    charts = drawing.charts
    looks = {(line.label, line.colour, line.dashed): chart.panel.stacked for chart in charts for line in chart.lines}
    handles: list[Any] = []
    for (_, colour, dashed), stacked in looks.items():
        paint = colour_on_paper(colour)
        if stacked:
            handles.append(Patch(facecolor=paint, edgecolor="white", alpha=0.85, hatch="///" if dashed else ""))
        else:
            handles.append(Line2D([], [], color=paint, linestyle="--" if dashed else "-", linewidth=2))
    if any(chart.panel.stacked for chart in charts):
        handles.append(Line2D([], [], color="black", linewidth=1.0))
        labels = [*(label for label, _, _ in looks), "sum"]
    else:
        labels = [label for label, _, _ in looks]
    drawable = [_drawable(label) for label in labels]
    rows = math.ceil(len(labels) / max(1, 150 // (max(map(len, drawable)) + 8)))
    legend = figure.legend(
        handles,
        [" "] * len(labels),
        title=drawing.picture.title,
        title_fontproperties={"weight": "bold", "size": "medium"},
        alignment="left",
        loc="outside upper left",
        ncols=math.ceil(len(labels) / rows),  # filled column by column, so that what belongs together stands together
        fontsize="small",
        frameon=False,
    )
    for text, label in zip(legend.get_texts(), drawable, strict=True):
        text.set_parse_math(False)  # names may hold dollar signs, and begin with an underscore
        text.set_text(label)


def _without_neighbours(values: Numbers) -> Any:
    """Which points stand alone between missing ones, so that a line would not show them."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return known[1:-1] & ~known[:-2] & ~known[2:]


def _drawable(text: str) -> str:
    """The text in one line of bounded length, with `?` for what the font lacks."""
    font: Any = get_font(findfont("DejaVu Sans"))
    drawable = "".join(character if font.get_char_index(ord(character)) else "?" for character in text)
    half = LONGEST_LABEL // 2
    return drawable if len(drawable) <= LONGEST_LABEL else f"{drawable[:half]}…{drawable[-half:]}"
