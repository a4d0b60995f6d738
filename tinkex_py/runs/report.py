"""`tinkex-py report`: runs as one self-contained HTML page, and its charts as PNG files drawn with matplotlib."""

import base64
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from pydantic import JsonValue

from tinkex_py.arguments import check_list, check_path
from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.runs.folder import read_run, read_steps
from tinkex_py.runs.records import Record, RunInfo, flattened, scalars
from tinkex_py.unicode import plain_text

try:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import findfont, get_font  # pyright: ignore[reportUnknownVariableType]
    from matplotlib.ticker import MaxNLocator
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name).partition(".")[0], "report") from error

PAGE_FILE = "index.html"
# M. Okabe and K. Ito, "Color Universal Design"; the yellow is darker for white paper.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A000")
STYLES = ("-", (0, (4, 2)), (0, (1, 1.5)))
MOST_POINTS_UNSMOOTHED, MOST_POINTS_MARKED = 120, 40
LONGEST_LABEL = 44  # characters
LOG_RANGE = 1e-5  # a norm near zero would squeeze the other curves into one line

Numbers = NDArray[np.float64]


class RunSummary(RunInfo):
    """A run in a few numbers, beside the content of its `run.json`.

    Attributes:
        label: its name in the report.
        folder: its files.
        steps: optimizer steps made.
        last_step_at: end of the last step, in seconds since the epoch; None if no step was made.
        step_seconds: time in steps, in seconds, without pauses.
        tokens: of all steps.
        first: numbers of the first step, under the names of `tinkex_py.runs.scalars`.
        last: numbers of the last step.
        non_finite: name -> number of NaN or infinite values, which the charts omit.
    """

    label: str
    folder: Path
    steps: int
    last_step_at: float | None
    step_seconds: float
    tokens: int
    first: dict[str, float]
    last: dict[str, float]
    non_finite: dict[str, int]


class Report(Record):
    """A report that was written.

    Attributes:
        page: the HTML page, which contains the charts.
        charts: key of the chart -> its PNG; a chart that no run has data for is omitted.
        runs: in the order of the folders.
        differing_settings: setting -> run -> value, where the runs differ.
    """

    page: Path
    charts: dict[str, Path]
    runs: list[RunSummary]
    differing_settings: dict[str, dict[str, JsonValue]]


@dataclass(frozen=True)
class Chart:
    """What is drawn over the steps, in one or several panels.

    Attributes:
        title: its heading.
        caption: explanation, and what a run needs to have data for it.
        unit: label of the y axis.
        names: pattern of names of `tinkex_py.runs.scalars`.
        log: whether the y axis is logarithmic.
        separate: whether each curve has its own unit, and therefore its own panel and scale.
    """

    title: str
    caption: str
    unit: str
    names: str
    log: bool = False
    separate: bool = False


_TRACKED = "Needs track_grad_norms=True."
_AGAINST = f"Below 0 a term acts against {{}}. {_TRACKED}"
_REPORTED = "As the service reports it. Some need TrainSettings(grad_norm=True)."
_BOUND = "Above 0 the bound does not hold; the weight is its multiplier. Needs a term with at_most or at_least."
CHARTS = {
    "losses": Chart("Losses", "The total is the base loss plus all contributions.", "loss", "loss/(total|base)"),
    "rollouts": Chart("Rollouts", "Metrics of batches that the model sampled.", "value", "rollout/.+", separate=True),
    "evaluation": Chart("Evaluation", "Results of evaluate=...", "value", "evaluation/.+", separate=True),
    "contributions": Chart("Contributions", "Weight x value of each term.", "contribution", "term/.+/contribution"),
    "gradient_norms": Chart(
        "Gradient norms",
        f"Of weight x gradient. {_TRACKED}",
        "L2 norm (log)",
        "grad_norm/.+|term/.+/grad_norm_weighted",
        log=True,
    ),
    "update_norms": Chart("Gradient norm of the weights", _REPORTED, "L2 norm (log)", "optimizer/grad_norm", log=True),
    "shares": Chart("Shares of the total gradient", f"They add up to 1. {_TRACKED}", "share", "term/.+/share_of_total"),
    "cosines_with_base": Chart(
        "Cosines with the base loss", _AGAINST.format("the base loss"), "cosine", "term/.+/cosine_with_base"
    ),
    "cosines_with_total": Chart(
        "Cosines with the total", _AGAINST.format("the total"), "cosine", "term/.+/cosine_with_total"
    ),
    "weights": Chart("Weights", "Schedules and controllers change them.", "weight", "term/.+/weight"),
    "violations": Chart("Violations of bounds", _BOUND, "violation", "term/.+/violation", separate=True),
    "times": Chart("Step time", "The time in the service's queue is part of the step.", "s", "time/.+"),
}
_LABELS = {
    "loss/base": "base loss",
    "grad_norm/base_loss": "base loss",
    "term/base_loss": "base loss",
    "time/queue": "in the queue",
}
_GREY: dict[str, dict[str, Any]] = {
    "base loss": {"color": "#6E6E6E", "linestyle": STYLES[1]},
    "in the queue": {"color": "#6E6E6E"},
}


@dataclass(frozen=True)
class RunCurves:
    """The numbers of one run: name of `tinkex_py.runs.scalars` -> value of each step; NaN is omitted."""

    steps: Numbers
    values: Mapping[str, Numbers]


def write_report(folders: Sequence[Path | str], out: Path | str) -> Report:
    """Draws runs into a folder, which is created; files of an earlier report are replaced.

    Args:
        folders: of one or several runs, each with its `run.json`.
        out: folder of the page and the charts.

    Raises:
        ConfigError: a folder is not a run, or cannot be read or written; nothing is written then.
    """
    loaded, out = _load(folders), check_path("out", out, error=ConfigError)
    runs = [summary for summary, _, _ in loaded]
    curves = {summary.label: own for summary, own, _ in loaded}
    of_runs = {summary.label: own for summary, _, own in loaded}
    settings = {
        name: {label: own[name] for label, own in of_runs.items() if name in own}
        for name in dict.fromkeys(name for own in of_runs.values() for name in own)
    }
    # repr, because 1, 1.0 and True differ.
    differing = {
        name: own for name, own in settings.items() if len(own) < len(runs) or len(set(map(repr, own.values()))) > 1
    }
    wide = {key: image for key, chart in CHARTS.items() if (image := draw(chart, curves)) is not None}
    narrow = {key: draw(CHARTS[key], curves, narrow=True) for key in wide}
    page = _template().render(
        runs=runs,
        palette=PALETTE,
        settings=differing if len(runs) > 1 else settings,
        charts=CHARTS,
        wide=wide,
        narrow=narrow,
        terms={run.label: _terms(run.last) for run in runs},
        evaluations=sorted({name for run in runs for name in run.last if name.startswith("evaluation/")}),
    )
    _write(out, {f"{key}.png": content for key, content in wide.items()} | {PAGE_FILE: page.encode()})
    charts = {key: out / f"{key}.png" for key in wide}
    return Report(page=out / PAGE_FILE, charts=charts, runs=runs, differing_settings=differing)


def _load(folders: Sequence[Path | str]) -> list[tuple[RunSummary, RunCurves, dict[str, JsonValue]]]:
    check_list("folders", folders, object, error=ConfigError)
    # A folder that is named twice is read once.
    places = list(dict.fromkeys(check_path("folders", folder, error=ConfigError).resolve() for folder in folders))
    if not places:
        raise ConfigError("no run was given: name at least one folder of a run")
    depth = 1  # of the label: as many parents as distinguish the folders
    while len({place.parts[-depth:] for place in places}) < len(places):
        depth += 1
    return [_load_one(place, "/".join(place.parts[-depth:])) for place in places]


def _load_one(folder: Path, label: str) -> tuple[RunSummary, RunCurves, dict[str, JsonValue]]:
    info, records = read_run(folder), read_steps(folder)
    rows = [scalars(record) for record in records]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    finite = {name: np.where(np.isfinite(one), one, np.nan) for name, one in values.items()}
    summary = RunSummary(
        label=label,
        folder=folder,
        steps=len(records),
        last_step_at=records[-1].finished_at if records else None,
        step_seconds=sum(record.seconds for record in records),
        tokens=sum(record.tokens for record in records),
        first=rows[0] if rows else {},
        last=rows[-1] if rows else {},
        non_finite=Counter(name for row in rows for name, value in row.items() if not math.isfinite(value)),
        **info.model_dump(),
    )
    return summary, RunCurves(np.array([float(record.step) for record in records]), finite), flattened(info.config)


def draw(chart: Chart, runs: Mapping[str, RunCurves], *, narrow: bool = False) -> bytes | None:
    """Returns a chart as PNG; None if no run has data for it.

    Of one run, all curves share a panel. Of several runs, each curve has a panel, in which the runs are compared. All
    panels have the same scale, unless the units differ.

    Args:
        chart: what to draw.
        runs: label of the run -> its numbers.
        narrow: whether the image is for a phone.
    """
    names = _names(chart, runs)
    if not names:
        return None
    panels = [[name] for name in names] if chart.separate or len(runs) > 1 else [names]
    columns = 1 if narrow else min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = 4.2 if narrow else 10.0, 1.0 + rows * (3.2 if rows * columns == 1 else 2.3)  # inches
    figure: Any = Figure(figsize=(width, height), layout="constrained", dpi=170 if narrow else 110)
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
    _add_legend(figure, chart.title, lines, characters=int(15 * width))
    file = io.BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()


def label_of(name: str) -> str:
    """Returns the label of a curve: its term or evaluation, or what it measures."""
    if name.startswith("term/"):
        name = name.rpartition("/")[0]
    return _LABELS.get(name) or name.partition("/")[2]


def smoothed(values: Numbers) -> Numbers:
    """Returns a moving average over a fortieth of the points, fewer towards the ends; straight lines stay.

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
    known = dict.fromkeys(name for run in runs.values() for name in run.values if np.isfinite(run.values[name]).any())
    return [name for name in known if re.fullmatch(chart.names, name, re.DOTALL)]


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
    known = np.isfinite(np.concatenate([[np.nan], values, [np.nan]]))
    alone = known[1:-1] & ~known[:-2] & ~known[2:]  # between missing points, where a line does not show them
    marked = alone | (len(steps) <= MOST_POINTS_MARKED)
    (line,) = axes.plot(steps, values, linewidth=1.5, marker="o", markersize=3, markevery=marked, **looks)
    return line


def _looks(place: int) -> dict[str, Any]:
    return {"color": PALETTE[place % len(PALETTE)], "linestyle": STYLES[place // len(PALETTE) % len(STYLES)]}


def _term_looks(name: str, names: Sequence[str]) -> dict[str, Any]:
    """The total is black and the base loss grey; a term has the same colour in all charts."""
    own = ("term/", "evaluation/", "rollout/")
    coloured = [other for other in names if other.startswith(own) and label_of(other) not in _GREY]
    if name in coloured:
        return _looks(coloured.index(name))
    return _GREY.get(label_of(name), {"color": "#000000"})


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


def _template() -> Any:
    environment = Environment(
        autoescape=True,
        finalize=_plain,
        loader=FileSystemLoader(Path(__file__).parent),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters = cast("dict[str, Callable[..., object]]", environment.filters)  # pyright: ignore[reportUnknownMemberType]
    filters |= {"moment": moment, "duration": duration, "setting": setting, "png": _data_url}
    return environment.get_template("report.html")


def _plain(value: object) -> object:
    return plain_text(value) if type(value) is str else value  # not what is HTML already


def _terms(numbers: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Returns the numbers of one step by term, the base loss first."""
    terms: dict[str, dict[str, float]] = {"base_loss": {}}
    for name, value in numbers.items():
        if name.startswith("term/"):
            term, _, measure = name.removeprefix("term/").rpartition("/")
            terms.setdefault(term, {})[measure] = value
    for measure, name in (("value", "loss/base"), ("contribution", "loss/base"), ("grad_norm", "grad_norm/base_loss")):
        if name in numbers:
            terms["base_loss"][measure] = numbers[name]
    return terms if numbers else {}


def moment(seconds: float | None) -> str:
    """Returns a time in seconds since the epoch as local date and time."""
    if seconds is None:
        return "-"
    try:
        return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")
    except (OverflowError, ValueError, OSError):  # a wrong clock
        return str(seconds)


def duration(seconds: float) -> str:
    """Returns seconds in words: hours and minutes, minutes and seconds, or seconds."""
    if seconds < 60:
        return f"{seconds:.3g} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest:02} s"


def setting(value: JsonValue) -> str:
    """Returns a setting as JSON, texts without quotes."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _data_url(png: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(png).decode()


def _write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Replaces each file atomically, and removes the charts of an earlier report that this one does not have."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            draft = folder / f".{name}.draft"
            draft.write_bytes(content)
            draft.replace(folder / name)
        for key in CHARTS:
            if f"{key}.png" not in files:
                (folder / f"{key}.png").unlink(missing_ok=True)
    except OSError as error:
        reason = f"the report cannot be written to {folder}: {error.strerror}; choose another --out"
        raise ConfigError(reason) from error
