"""What is drawn of runs, for whoever draws it: the report with matplotlib, the dashboard in the browser."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

Scale = Literal["linear", "log"]

TERM = "*"
BASE_LOSS = "base_loss"

# M. Okabe and K. Ito, "Color Universal Design": told apart by colour-blind people too. The yellow is darker on white.
PALETTE_ON_LIGHT = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#B5A000")
PALETTE_ON_DARK = ("#4BA3DB", "#E69F00", "#1DBF94", "#F07830", "#8CCEF5", "#DE9CC1", "#F0E442")
MOST_COLOURS = len(PALETTE_ON_LIGHT)


@dataclass(frozen=True)
class Curve:
    """One curve, or with `*` in its name one per term.

    Attributes:
        name: of `tinkex_py.runs.records.scalars`.
        label: in the legend.
        dashed: whether it is drawn dashed.
    """

    name: str
    label: str = TERM
    dashed: bool = False


@dataclass(frozen=True)
class Panel:
    """What shares one y axis.

    Attributes:
        axis: label of the y axis, with the unit.
        curves: what is drawn.
        title: above it, if the picture has several panels.
        scale: of the y axis.
        stacked: whether the curves are areas on top of each other.
        limits: of the y axis; None takes them from the data.
        noisy: whether a long curve needs an average to be read.
        sparse: whether only some steps have a value, each name in a unit of its own: points are joined over the gaps,
            and every name has axes of its own.
    """

    axis: str
    curves: tuple[Curve, ...]
    title: str = ""
    scale: Scale = "linear"
    stacked: bool = False
    limits: tuple[float, float] | None = None
    noisy: bool = True
    sparse: bool = False


@dataclass(frozen=True)
class Picture:
    """One subject.

    Attributes:
        key: name of its file.
        title: its heading.
        caption: how to read it.
        absent: what to say when no run has any of it.
        panels: one or several.
    """

    key: str
    title: str
    caption: str
    absent: str
    panels: tuple[Panel, ...]


PICTURES = (
    Picture(
        "losses",
        "Total and base loss",
        "The total is the base loss and all contributions.",
        "no step was made",
        (Panel("loss", (Curve("loss/total", "total"), Curve("loss/base", "base loss", dashed=True))),),
    ),
    Picture(
        "evaluation",
        "Evaluation",
        "What the evaluation hook measured, after the steps in which it ran.",
        "nothing was evaluated (evaluate=...)",
        (Panel("value", (Curve("evaluation/*"),), noisy=False, sparse=True),),
    ),
    Picture(
        "contributions",
        "Contributions of the regularizers",
        "What each regularizer adds to the total: weight x value. Negative ones hang below zero.",
        "no regularizer was used",
        (Panel("weight x value", (Curve("term/*/contribution"),), stacked=True),),
    ),
    Picture(
        "gradient_norms",
        "Gradient norms",
        "L2 norm of d(term)/d(logprobs), times the weight. The total is the norm of the gradient that was sent.",
        "no gradient norms were tracked (track_grad_norms=True)",
        (
            Panel(
                "L2 norm (log scale)",
                (
                    Curve("grad_norm/total", "total"),
                    Curve("grad_norm/base_loss", "base loss", dashed=True),
                    Curve("term/*/grad_norm_weighted"),
                ),
                scale="log",
            ),
        ),
    ),
    Picture(
        "shares_and_cosines",
        "Share and cosine of every term",
        "The shares of all terms add up to 1. A term whose cosine with the base loss is below zero pulls against it.",
        "no gradient norms were tracked (track_grad_norms=True)",
        (
            Panel("share", (Curve("term/*/share_of_total"),), "share of the total gradient"),
            Panel("cosine", (Curve("term/*/cosine_with_base"),), "cosine with the base loss", limits=(-1.05, 1.05)),
            Panel("cosine", (Curve("term/*/cosine_with_total"),), "cosine with the total", limits=(-1.05, 1.05)),
        ),
    ),
    Picture(
        "weights",
        "Weights",
        "What each regularizer was multiplied by; a schedule or a controller moves it.",
        "no regularizer was used",
        (Panel("weight", (Curve("term/*/weight"),), noisy=False),),
    ),
    Picture(
        "times",
        "Step time and queue wait",
        "The wait for a turn at the service is part of the step.",
        "no step was made",
        (Panel("seconds", (Curve("time/step", "step"), Curve("time/queue", "of it in the queue", dashed=True))),),
    ),
)


@dataclass(frozen=True)
class Line:
    """One curve of one run, with its looks.

    Attributes:
        run: whose.
        name: of `tinkex_py.runs.records.scalars`.
        label: in the legend.
        colour: index into a palette; -1 is black (on dark: white), -2 is grey.
        dashed: whether it is drawn dashed, and hatched where it is an area.
    """

    run: str
    name: str
    label: str
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Chart:
    """One pair of axes.

    Attributes:
        title: above it; may be empty.
        panel: its axis, scale and limits.
        lines: what is drawn.
    """

    title: str
    panel: Panel
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Drawing:
    """A picture of certain runs.

    Attributes:
        picture: the subject.
        charts: one or several; none if no run has anything to show.
        columns: how many charts stand beside each other.
    """

    picture: Picture
    charts: tuple[Chart, ...]
    columns: int = 1


BLACK, GREY = -1, -2


def drawings(runs: Mapping[str, Iterable[str]], run_colours: Mapping[str, int] | None = None) -> list[Drawing]:
    """Lays out all pictures.

    One run has a colour per term. Of several runs each has its own colour, and each term has axes of its own; only
    what is stacked keeps a colour per term, with axes per run. What was evaluated always has axes of its own.

    Args:
        runs: name of the run -> the names of its curves.
        run_colours: the colours of several runs; by default in order.
    """
    names = {run: list(curves) for run, curves in runs.items()}
    run_colours = run_colours or {run: number for number, run in enumerate(names)}
    panels = [panel for picture in PICTURES for panel in picture.panels if not panel.sparse]
    term_colours = {term: number for number, term in enumerate(_terms(names.values(), panels))}
    return [_drawing(picture, names, run_colours, term_colours) for picture in PICTURES]


def _drawing(
    picture: Picture, runs: Mapping[str, Sequence[str]], run_colours: Mapping[str, int], term_colours: Mapping[str, int]
) -> Drawing:
    by_panel: list[list[Chart]] = []
    for panel in picture.panels:
        if panel.stacked or (len(runs) == 1 and not panel.sparse):
            charts = _a_chart_per_run(panel, runs, term_colours)
        elif any(TERM in curve.name for curve in panel.curves):
            terms = _terms(runs.values(), [panel]) if panel.sparse else term_colours
            charts = _a_chart_per_curve(panel, runs, run_colours, terms)
        else:
            charts = [Chart(panel.title, panel, _lines_of_runs(panel.curves, runs, run_colours))]
        by_panel.append([chart for chart in charts if chart.lines])
    columns = _columns([len(charts) for charts in by_panel], several_runs=len(runs) > 1)
    if len(by_panel) > 1 and len({len(charts) for charts in by_panel}) == 1:
        in_rows = [chart for row in zip(*by_panel, strict=True) for chart in row]
        return Drawing(picture, tuple(in_rows), columns)
    return Drawing(picture, tuple(chart for charts in by_panel for chart in charts), columns)


def _columns(charts_of_panels: Sequence[int], *, several_runs: bool) -> int:
    if not several_runs:
        return 1
    if len(charts_of_panels) > 1:
        return len(charts_of_panels)
    return 1 if charts_of_panels[0] <= 1 else 2 if charts_of_panels[0] <= 4 else 3


def _a_chart_per_run(panel: Panel, runs: Mapping[str, Sequence[str]], term_colours: Mapping[str, int]) -> list[Chart]:
    charts: list[Chart] = []
    for run, names in runs.items():
        lines = [
            Line(run, name, curve.label if term is None else _label_of(term), *_looks(term, curve, term_colours))
            for curve in panel.curves
            for name, term in _matching(curve, names)
        ]
        charts.append(Chart(run if len(runs) > 1 else panel.title, panel, tuple(lines)))
    return charts


def _looks(term: str | None, curve: Curve, term_colours: Mapping[str, int]) -> tuple[int, bool]:
    if term is None:
        return (GREY if curve.dashed else BLACK), curve.dashed
    if term == BASE_LOSS:
        return GREY, True
    return term_colours[term] % MOST_COLOURS, term_colours[term] >= MOST_COLOURS


def _a_chart_per_curve(
    panel: Panel, runs: Mapping[str, Sequence[str]], run_colours: Mapping[str, int], terms: Iterable[str]
) -> list[Chart]:
    before = f"{panel.title}: " if panel.title else ""
    charts: list[Chart] = []
    for name, label in _names_drawn(panel, terms):
        lines = tuple(
            Line(run, name, run, run_colours[run] % MOST_COLOURS, run_colours[run] >= MOST_COLOURS)
            for run, names in runs.items()
            if name in names
        )
        charts.append(Chart(f"{before}{label}", panel, lines))
    return charts


def _names_drawn(panel: Panel, terms: Iterable[str]) -> list[tuple[str, str]]:
    drawn: list[tuple[str, str]] = []
    for curve in panel.curves:
        if TERM in curve.name:
            drawn += [(curve.name.replace(TERM, term), _label_of(term)) for term in (BASE_LOSS, *terms)]
        else:
            drawn.append((curve.name, curve.label))
    return drawn


def _lines_of_runs(
    curves: Sequence[Curve], runs: Mapping[str, Sequence[str]], run_colours: Mapping[str, int]
) -> tuple[Line, ...]:
    return tuple(
        Line(run, curve.name, f"{run}: {curve.label}", run_colours[run] % MOST_COLOURS, curve.dashed)
        for run, names in runs.items()
        for curve in curves
        if curve.name in names
    )


def _terms(runs: Iterable[Sequence[str]], panels: Iterable[Panel]) -> list[str]:
    """What stands for `*` in the curves of some panels, but for the base loss; in order of its first occurrence."""
    curves = {curve for panel in panels for curve in panel.curves}
    found = (term for names in runs for name in names for curve in curves if (term := _term_in(curve, name)))
    return [term for term in dict.fromkeys(found) if term != BASE_LOSS]


def _matching(curve: Curve, names: Sequence[str]) -> list[tuple[str, str | None]]:
    """The names that a curve stands for, each with its term."""
    if TERM not in curve.name:
        return [(curve.name, None)] if curve.name in names else []
    return [(name, term) for name in names if (term := _term_in(curve, name))]


def _term_in(curve: Curve, name: str) -> str | None:
    """The term in a name: what is left, since names of terms may hold anything."""
    before, star, after = curve.name.partition(TERM)
    if not star or not (name.startswith(before) and name.endswith(after)):
        return None
    return name[len(before) : len(name) - len(after)] or None


def _label_of(term: str) -> str:
    return "base loss" if term == BASE_LOSS else term
