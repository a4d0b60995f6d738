"""`tinkex-py report`: the charts, the page, the files, and the command."""

import importlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from tests.runs.made_up_runs import (
    BOUND,
    TERMS,
    base_loss,
    contribution,
    made_up_run,
    made_up_step,
    weight,
    write_run,
)
from tests.runs.support import run_info
from tinkex_py.cli import app
from tinkex_py.errors import ConfigError, MissingExtra
from tinkex_py.runs.records import StepRecord, scalars
from tinkex_py.runs.report import (
    CHARTS,
    PALETTE,
    RunCurves,
    draw,
    duration,
    label_of,
    moment,
    setting,
    smoothed,
    write_report,
)

HARMLESS_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "div", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "picture", "source", "img"),
}


def curves_of(steps: Sequence[StepRecord]) -> RunCurves:
    rows = [scalars(step) for step in steps]
    names = dict.fromkeys(name for row in rows for name in row)
    values = {name: np.array([row.get(name, math.nan) for row in rows]) for name in names}
    return RunCurves(np.array([float(step.step) for step in steps]), values)


def made_up(steps: int = 30, terms: Sequence[str] = TERMS, *, norms: bool = True) -> RunCurves:
    return curves_of([made_up_step(step, terms, norms=norms) for step in range(1, steps + 1)])


def constant(value: float, *names: str, steps: int = 30) -> RunCurves:
    return RunCurves(np.arange(1.0, steps + 1), {name: np.full(steps, value) for name in names})


def pixels(png: bytes | None) -> np.ndarray:
    """Colours by row and column, as 0xRRGGBB."""
    assert png is not None
    colours = (imread(io.BytesIO(png), format="png")[..., :3] * 255).round().astype(int)
    return colours[..., 0] << 16 | colours[..., 1] << 8 | colours[..., 2]


def paint(place: int) -> int:
    return int(PALETTE[place].removeprefix("#"), 16)


def painted(png: bytes | None) -> set[int]:
    """Places in the palette of the colours in an image."""
    found = pixels(png)
    return {place for place in range(len(PALETTE)) if (found == paint(place)).any()}


@pytest.mark.parametrize(("key", "terms"), [("losses", set()), ("weights", {0, 1, 2}), ("gradient_norms", {0, 1, 2})])
def test_a_term_has_the_same_colour_in_all_charts_of_one_run(key: str, terms: set[int]):
    assert painted(draw(CHARTS[key], {"a": made_up()}, narrow=True)) == terms


def test_several_runs_are_compared_on_one_scale():
    """The same curve has the same height in both panels, though one of them shows a much larger one too."""
    flat = constant(1.0, "term/a/weight", "term/b/weight")
    steep = RunCurves(flat.steps, {"term/b/weight": np.linspace(0.0, 50.0, 30)})
    image = pixels(draw(CHARTS["weights"], {"flat": flat, "steep": steep}))
    below_the_legend, middle = 60, image.shape[1] // 2
    halves = (image[below_the_legend:, :middle], image[below_the_legend:, middle:])
    left, right = (set(np.nonzero(half == paint(0))[0].tolist()) for half in halves)
    assert left
    assert left <= right


def test_more_runs_than_colours():
    runs = {f"run {place}": constant(float(place), "loss/total", steps=100) for place in range(8)}
    image = pixels(draw(CHARTS["losses"], runs))
    assert all((image == paint(place)).any() for place in range(len(PALETTE)))
    # The eighth run has the first colour again, in dashes: less of it than of a full line.
    per_row = [count for row in image if (count := np.count_nonzero(row == paint(0))) > 300]
    assert min(per_row) < 0.8 * max(per_row)


def test_a_chart_without_data_is_not_drawn():
    nan = constant(math.nan, "loss/total", "term/l2/weight")
    assert all(draw(CHARTS[key], {"a": nan, "b": nan}) is None for key in ("losses", "weights", "shares"))


@pytest.mark.parametrize(
    "names",
    [["a/value", "weight", "*", "total", "x/weight"], ["$x_1$", "_hidden", "语言模型", "a\nb", "x" * 300]],
)
def test_names_may_contain_anything(names: list[str]):
    assert draw(CHARTS["weights"], {f"$run {number}": made_up(3, names) for number in range(2)}, narrow=True)
    assert [label_of(f"term/{name}/weight") for name in names] == names


def test_points_between_missing_ones_are_drawn_and_evaluations_are_joined():
    alone = [made_up_step(step, TERMS if step % 2 else ["l2"]) for step in range(1, 8)]
    assert 2 in painted(draw(CHARTS["weights"], {"a": curves_of(alone)}, narrow=True))
    curves = made_up(40)  # evaluated after every fifth step
    joined = pixels(draw(CHARTS["evaluation"], {"a": curves}))
    dots = RunCurves(curves.steps, {"loss/total": curves.values["evaluation/held_out_nll"]})
    apart = pixels(draw(CHARTS["losses"], {"a": dots, "b": dots}))
    assert np.count_nonzero(joined == paint(0)) > 2 * np.count_nonzero(apart == paint(0))


def test_smoothing_keeps_straight_lines_and_averages_the_rest():
    line = np.linspace(-3.0, 5.0, 400)
    assert smoothed(line) == pytest.approx(line, abs=1e-12)
    noise = np.where(np.arange(1000) % 2, 1.0, -1.0)
    assert np.abs(smoothed(noise)[12:-12]).max() == pytest.approx(1 / 25)
    line[100:200], line[300] = np.nan, np.nan
    result = smoothed(line)
    assert np.isnan(result[105:195]).all()
    assert result[300] == pytest.approx((line[299] + line[301]) / 2)


class Page(HTMLParser):
    """The tags, texts and references of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self.references: list[str] = []
        self.rows: list[list[str]] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.references += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._in_cell = False

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data.strip()


def test_one_run_on_a_page_that_loads_nothing(tmp_path: Path):
    run = made_up_run(tmp_path / "my run", 30, config={"optimizer": {"lr": 5e-4}, "seed": 7}, seed=7)
    report = write_report([run], tmp_path / "out")
    assert list(report.charts) == list(CHARTS)
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html"} | {f"{key}.png" for key in CHARTS}
    summary = report.runs[0]
    assert (summary.label, summary.steps, summary.status) == ("my run", 30, "finished")
    expected = base_loss(30) + sum(contribution(place, 30) for place in range(len(TERMS)))
    assert summary.last["loss/total"] == pytest.approx(expected, rel=1e-12)
    assert summary.step_seconds == pytest.approx(sum(1.5 + 0.5 * math.sin(step) for step in range(1, 31)))
    page = Page(report.page.read_text())
    assert ["optimizer.lr", "0.0005"] in page.rows
    assert ["seed", "7"] in page.rows
    assert any(row[0] == "my run" and f"{expected:.5g}" in row and "30 of 30" in row for row in page.rows)
    rows = {row[0]: row for row in page.rows}
    assert rows["l2"][3:7] == ["-", "-", "-", f"{contribution(0, 30):.5g}"]
    violation = contribution(1, 30) / weight(1, 30) - BOUND
    assert rows["kl_to_base"][3:6] == [f"{BOUND:.5g}", f"{violation:.5g}", "yes" if violation <= 0 else "no"]
    assert page.tags <= HARMLESS_TAGS
    images = [reference for reference in page.references if not reference.startswith("#")]
    assert len(images) == 2 * len(CHARTS)  # for wide screens and for phones
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in images)
    assert "default-src 'none'" in report.page.read_text()


def test_several_runs_and_their_settings(tmp_path: Path):
    folders = [
        made_up_run(tmp_path / "a", 3, ["l2"], norms=False, config={"lr": 1e-3, "rank": 8}),
        made_up_run(tmp_path / "b", 130, ["l2"], norms=False, config={"lr": 1, "rank": 8, "seed": 3}),
        made_up_run(tmp_path / "c", 1, ["l2"], norms=False, config={"lr": 1.0, "rank": 8, "only here": [1, 2]}),
    ]
    report = write_report([*folders, folders[0]], tmp_path / "out")
    assert report.differing_settings == {
        "lr": {"a": 1e-3, "b": 1, "c": 1.0},
        "seed": {"b": 3},
        "only here": {"c": [1, 2]},
    }
    assert ["only here", "-", "-", "[1, 2]"] in Page(report.page.read_text()).rows


def test_names_and_settings_of_a_run_are_escaped(tmp_path: Path):
    evil = "<script>alert('&x')</script>"
    steps = [made_up_step(step, [evil], norms=False) for step in (1, 2)]
    texts = {"name": evil, "model": evil, "status": "failed", "reason": evil, "versions": {evil: evil}}
    first = run_info(**texts, config={evil: evil, "nested": {evil: [evil]}})
    second = run_info(**texts, config={evil: [evil]})
    folders = [write_run(tmp_path / "<b>bold<", steps, first), write_run(tmp_path / "x", steps, second)]
    page = Page(write_report(folders, tmp_path / "out").page.read_text())
    assert page.tags <= HARMLESS_TAGS
    assert sum(evil in text for text in page.texts) >= 9
    assert "<b>bold<" in "".join(page.texts)


def test_a_run_without_steps_or_norms(tmp_path: Path):
    whole = made_up_run(tmp_path / "whole", 2, norms=False)
    write_report([whole], tmp_path / "out")
    empty = write_run(tmp_path / "empty", [], run_info(status="running"))
    report = write_report([empty], tmp_path / "out")
    assert report.charts == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    assert "No run has data for this chart." in "".join(Page(report.page.read_text()).texts)
    without = write_report([empty, whole], tmp_path / "out")
    assert list(without.charts) == ["losses", "rollouts", "contributions", "weights", "violations", "times"]
    assert "track_grad_norms=True" in without.page.read_text()


def test_non_finite_values_are_counted(tmp_path: Path):
    steps = [made_up_step(step, norms=False) for step in range(1, 4)]
    broken = steps[1].losses[0].model_copy(update={"loss_total": math.nan, "total_grad_norm": math.inf})
    steps[1] = steps[1].model_copy(update={"losses": (broken,)})
    report = write_report([write_run(tmp_path / "a", steps)], tmp_path / "out")
    (summary,) = report.runs
    assert summary.non_finite == {"loss/total": 1, "grad_norm/total": 1}
    assert "loss/total (1)" in report.page.read_text()
    assert '"loss/total":"NaN"' in summary.model_copy(update={"last": {"loss/total": math.nan}}).model_dump_json()


def test_runs_with_the_same_name_get_their_parents_names(tmp_path: Path):
    folders = [write_run(tmp_path / parent / "run", []) for parent in ("x", "y")]
    assert [run.label for run in write_report([*folders, folders[0]], tmp_path / "out").runs] == ["x/run", "y/run"]


def test_how_numbers_are_written():
    expected = {0.0123: "0.0123 s", 59.9: "59.9 s", 61: "1 min 01 s", 3_700: "1 h 01 min"}
    assert {seconds: duration(seconds) for seconds in expected} == expected
    assert (setting("a"), setting([1, None, "ü"])) == ("a", '[1, null, "ü"]')
    assert moment(1e20) == "1e+20"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", moment(1.7e9))


def test_the_error_names_the_file(tmp_path: Path):
    run = write_run(tmp_path / "a", [])
    cases = [
        ([run, tmp_path / "none"], tmp_path / "out", "none/run.json"),
        ([tmp_path / os.fsdecode(b"\xff")], tmp_path / "out", "folders must be the path of a file or folder"),
        ([], tmp_path / "out", "at least one folder"),
        ([run], run / "run.json" / "inside", "run.json/inside"),
    ]
    for folders, out, words in cases:
        with pytest.raises(ConfigError, match=words):
            write_report(folders, out)
    assert not (tmp_path / "out").exists()


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    run, empty = made_up_run(tmp_path / "a", 2, norms=False), write_run(tmp_path / "empty", [])
    command = CliRunner()
    done = command.invoke(app, ["report", str(run), str(empty), "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    last = base_loss(2) + sum(contribution(place, 2) for place in range(3))
    assert f"a: finished, 2 steps, loss 3.0089 -> {last:.4f}" in done.stdout
    assert f"wrote {tmp_path / 'out' / 'index.html'} and 6 charts" in done.stdout
    assert "empty: finished, 0 steps\n" in done.stdout
    done = command.invoke(app, ["report", str(empty), "--json", "--out", str(tmp_path / "other")])
    written = json.loads(done.stdout)
    assert (written["charts"], written["runs"][0]["steps"]) == ({}, 0)
    assert Path(written["page"]).is_file()

    done = command.invoke(app, ["report", str(tmp_path / "none")])
    assert (done.exit_code, done.stderr.count("\n")) == (2, 1)
    assert done.stderr.startswith(f"tinkex-py report: '{tmp_path / 'none'}")
    monkeypatch.delitem(sys.modules, "tinkex_py.runs.report")
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.raises(MissingExtra, match=r"^jinja2 is not installed\. Run: pip install 'tinkex-py\[report\]'$"):
        importlib.import_module("tinkex_py.runs.report")
    done = command.invoke(app, ["report", str(run)])
    assert done.exit_code == 2
    assert done.stderr == "tinkex-py report: jinja2 is not installed. Run: pip install 'tinkex-py[report]'\n"
