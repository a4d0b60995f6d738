"""The charts of a report: what is drawn, in which colours, and on which scale."""

import io
import math
from collections.abc import Iterable, Sequence

import numpy as np
import pytest
from matplotlib.image import imread

from tests.runs.made_up_runs import TERMS, made_up_step
from tinkex_py.runs.records import StepRecord, scalars
from tinkex_py.runs.report import CHARTS, PALETTE, RunCurves, draw, label_of, smoothed


def curves_of(steps: Iterable[StepRecord]) -> RunCurves:
    rows = {step.step: scalars(step) for step in steps}
    names = dict.fromkeys(name for row in rows.values() for name in row)
    values = {name: np.array([row.get(name, math.nan) for row in rows.values()]) for name in names}
    return RunCurves(np.array(list(rows), dtype=float), values)


def made_up(steps: int = 30, terms: Sequence[str] = TERMS, *, norms: bool = True) -> RunCurves:
    return curves_of(made_up_step(step, terms, norms=norms) for step in range(1, steps + 1))


def pixels(png: bytes | None) -> np.ndarray:
    """Colours by row and column, as 0xRRGGBB."""
    assert png is not None
    colours = (imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(int)
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def colours(png: bytes | None) -> set[int]:
    return set(np.unique(pixels(png)).tolist())


def paint(place: int) -> int:
    return int(PALETTE[place].removeprefix("#"), 16)


@pytest.mark.parametrize("key", CHARTS)
def test_one_run_has_a_colour_per_term_which_is_the_same_in_all_charts(key: str):
    found = colours(draw(CHARTS[key], {"a": made_up()}))
    per_term = {"contributions", "gradient_norms", "shares", "cosines_with_base", "cosines_with_total", "weights"}
    assert ({paint(place) for place in range(len(TERMS))} <= found) == (key in per_term)


def test_several_runs_are_compared_on_one_scale():
    """The same curve has the same height in both panels, though one of them shows a much larger one too."""
    steps = np.arange(1.0, 31)
    flat = RunCurves(steps, {"term/a/weight": np.full(30, 1.0), "term/b/weight": np.full(30, 1.0)})
    steep = RunCurves(steps, {"term/b/weight": np.linspace(0.0, 50.0, 30)})
    image = pixels(draw(CHARTS["weights"], {"flat": flat, "steep": steep}))
    below_the_legend, middle = 60, image.shape[1] // 2
    left, right = (
        set(np.nonzero(half[below_the_legend:] == paint(0))[0].tolist())
        for half in (image[:, :middle], image[:, middle:])
    )
    assert left
    assert left <= right


def test_more_runs_than_colours():
    steps = np.arange(1.0, 101)
    runs = {f"run {place}": RunCurves(steps, {"loss/total": np.full(100, float(place))}) for place in range(8)}
    image = pixels(draw(CHARTS["losses"], runs))
    assert {paint(place) for place in range(len(PALETTE))} <= set(np.unique(image).tolist())
    # The eighth run has the first colour again, in dashes: less of it than of a full line.
    per_row = [count for row in image if (count := np.count_nonzero(row == paint(0))) > 300]
    assert min(per_row) < 0.8 * max(per_row)


def test_a_chart_without_data_is_not_drawn():
    runs = {"a": made_up(4, norms=False), "empty": RunCurves(np.zeros(0), {})}
    missing = [key for key, chart in CHARTS.items() if draw(chart, runs, narrow=True) is None]
    assert missing == ["evaluation", "gradient_norms", "shares", "cosines_with_base", "cosines_with_total"]
    nan = RunCurves(np.ones(1), {"loss/total": np.array([math.nan])})
    assert draw(CHARTS["losses"], {"a": nan}) is None


@pytest.mark.parametrize(
    "names", [["a/value", "weight", "*", "total", "x/weight"], ["$x_1$", "_hidden", "语言模型", "x" * 300]]
)
@pytest.mark.parametrize("runs", [1, 2])
def test_names_may_hold_anything(names: list[str], runs: int):
    for key in ("gradient_norms", "weights"):
        draw(CHARTS[key], {f"$run {number}": made_up(3, names) for number in range(runs)}, narrow=True)
    assert [label_of(f"term/{name}/weight") for name in names] == names


def test_a_point_between_missing_ones_is_drawn():
    steps = [made_up_step(step, TERMS if step % 2 else ["l2"]) for step in range(1, 8)]
    assert paint(2) in colours(draw(CHARTS["weights"], {"a": curves_of(steps)}))


def test_evaluations_are_joined_over_the_steps_between():
    curves = made_up(40)  # evaluated after every fifth step
    joined = pixels(draw(CHARTS["evaluation"], {"a": curves}))
    dots = RunCurves(curves.steps, {"loss/total": curves.values["evaluation/held_out_nll"]})
    apart = pixels(draw(CHARTS["losses"], {"a": dots, "b": dots}))
    assert np.count_nonzero(joined == paint(0)) > 2 * np.count_nonzero(apart == paint(0))


@pytest.mark.parametrize("steps", [1, 2, 400])
def test_short_and_long_runs_are_drawn(steps: int):
    for key in ("losses", "gradient_norms"):
        assert draw(CHARTS[key], {"a": made_up(steps)}, narrow=True) is not None


def test_smoothing_keeps_straight_lines_and_averages_the_rest():
    line = np.linspace(-3.0, 5.0, 400)
    assert smoothed(line) == pytest.approx(line, abs=1e-12)
    noise = np.where(np.arange(1000) % 2, 1.0, -1.0)
    assert np.abs(smoothed(noise)[12:-12]).max() == pytest.approx(1 / 25)
    with_gap = line.copy()
    with_gap[100:200], with_gap[300] = np.nan, np.nan
    result = smoothed(with_gap)
    assert np.isnan(result[105:195]).all()
    assert result[300] == pytest.approx(line[300])
