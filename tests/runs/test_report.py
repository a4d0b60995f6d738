"""`tinkex-py report`: the page, the pictures, and the command."""

import io
import json
import math
import os
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread
from typer.testing import CliRunner

from tests.runs.made_up_runs import TERMS, base_loss, contribution, made_up_run, made_up_step, write_run
from tests.runs.support import run_info
from tinkex_py.cli import app
from tinkex_py.errors import ConfigError
from tinkex_py.runs.curves import Curves
from tinkex_py.runs.pictures import PALETTE_ON_LIGHT, PICTURES, drawings
from tinkex_py.runs.records import scalars
from tinkex_py.runs.report import write_report
from tinkex_py.runs.report.drawing import picture_of, smoothed
from tinkex_py.runs.report.loading import load_runs
from tinkex_py.runs.report.page import duration, moment, page_of, setting
from tinkex_py.runs.report.summary import summary_of

HARMLESS_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "div", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "figure", "img", "details", "summary"),
}


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
        self.references += [value or "" for name, value in attrs if name in ("src", "href")]
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


def pixels_of(picture: bytes) -> np.ndarray:
    """The colour of every pixel, as `paint` gives it."""
    red, green, blue = (imread(io.BytesIO(picture), format="png")[..., :3] * 255).round().astype(int).T
    return red << 16 | green << 8 | blue


def colours_in(picture: bytes) -> set[int]:
    return set(np.unique(pixels_of(picture)).tolist())


def paint(colour: str) -> int:
    return int(colour.removeprefix("#"), 16)


def test_one_run(tmp_path: Path):
    run = made_up_run(tmp_path / "my run", 30, config={"optimizer": {"lr": 5e-4}, "seed": 7}, seed=7)
    report = write_report([run], tmp_path / "out")
    assert list(report.pictures) == [picture.key for picture in PICTURES]
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"index.html"} | {f"{p.key}.png" for p in PICTURES}
    summary = report.runs[0]
    assert (summary.label, summary.steps, summary.status) == ("my run", 30, "finished")
    expected = base_loss(30) + sum(contribution(place, 30) for place in range(len(TERMS)))
    assert summary.last["loss/total"] == pytest.approx(expected, rel=1e-12)
    assert summary.step_seconds == pytest.approx(sum(1.5 + 0.5 * math.sin(step) for step in range(1, 31)))
    page = Page(report.page.read_text())
    assert ["optimizer.lr", "0.0005"] in page.rows
    assert ["seed", "7"] in page.rows
    assert any(row[0] == "my run" and f"{expected:.5g}" in row and "30 of 30" in row for row in page.rows)
    terms = {row[0]: row for row in page.rows}
    assert terms["l2"][3] == f"{contribution(0, 30):.5g}"
    expected_colours = {paint(colour) for colour in PALETTE_ON_LIGHT[: len(TERMS)]}
    for key in ("gradient_norms", "weights"):
        assert expected_colours <= colours_in(report.pictures[key].read_bytes())


def test_a_page_needs_nothing_else(tmp_path: Path):
    report = write_report([made_up_run(tmp_path / "a", 5)], tmp_path / "out")
    page = Page(report.page.read_text())
    assert page.tags <= HARMLESS_TAGS
    images = [reference for reference in page.references if not reference.startswith("#")]
    assert len(images) == len(PICTURES)
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in images)
    assert "default-src 'none'" in report.page.read_text()


def test_several_runs_are_overlaid(tmp_path: Path):
    folders = [
        made_up_run(tmp_path / "a", 30, ["l2"], config={"lr": 1e-3, "rank": 8}),
        made_up_run(tmp_path / "b", 400, ["l2"], config={"lr": 1, "rank": 8, "seed": 3}),
        made_up_run(tmp_path / "c", 1, norms=False, config={"lr": 1.0, "rank": 8, "only here": [1, 2]}),
    ]
    report = write_report(folders, tmp_path / "out")
    assert report.differing_settings == {
        "lr": {"a": 1e-3, "b": 1, "c": 1.0},
        "seed": {"b": 3},
        "only here": {"c": [1, 2]},
    }
    page = Page(report.page.read_text())
    assert ["only here", "-", "-", "[1, 2]"] in page.rows
    assert {paint(colour) for colour in PALETTE_ON_LIGHT[:3]} <= colours_in(report.pictures["times"].read_bytes())


def test_nothing_of_a_run_becomes_html(tmp_path: Path):
    evil = "<script>alert('&x')</script>"
    steps = [made_up_step(step, [evil]) for step in (1, 2)]
    info = run_info(
        name=evil,
        model=evil,
        status="failed",
        reason=evil,
        config={evil: evil, "nested": {evil: [evil]}},
        versions={evil: evil},
    )
    runs = load_runs([write_run(tmp_path / name, steps, info) for name in ("<b>bold<", "x")])
    settings = {evil: {runs[0].label: evil, runs[1].label: [evil]}}
    page = Page(page_of([summary_of(run) for run in runs], settings, drawings({evil: [evil], "b": []}), {}))
    assert page.tags <= HARMLESS_TAGS
    assert sum(evil in text for text in page.texts) >= 9
    assert "<b>bold<" in "".join(page.texts)


def test_odd_names_can_be_drawn(tmp_path: Path):
    odd = ["$x_{", "_hidden", "name\nof two lines", "模型", "long " * 50, "\\frac", "%s{}"]
    runs = {name: Curves() for name in ("_a$", "模型", "$b$")}
    for curves in runs.values():
        curves.add(1, scalars(made_up_step(1, odd)))
    names = {name: curves.names for name, curves in runs.items()}
    losses, _, stacks, *_ = drawings(names)
    weights = drawings({"_a$": names["_a$"]})[5]
    for drawing in (losses, stacks, weights):
        assert paint(PALETTE_ON_LIGHT[0]) in colours_in(picture_of(drawing, runs)) or drawing.charts[0].panel.stacked


def test_a_run_without_steps_or_norms_says_what_is_not_there(tmp_path: Path):
    write_report([made_up_run(tmp_path / "whole", 2, norms=False)], tmp_path / "out")
    empty = write_run(tmp_path / "empty", [], run_info(status="running"))
    report = write_report([empty], tmp_path / "out")
    assert report.pictures == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    assert "Nothing to show: no step was made." in "".join(Page(report.page.read_text()).texts)
    without = write_report([empty, made_up_run(tmp_path / "a", 2, norms=False)], tmp_path / "out")
    assert list(without.pictures) == ["losses", "contributions", "weights", "times"]
    assert "track_grad_norms=True" in without.page.read_text()


def test_missing_and_non_finite_values(tmp_path: Path):
    steps = [made_up_step(step, TERMS if step % 2 else ["l2"]) for step in range(1, 8)]
    broken = steps[3].losses[0].model_copy(update={"loss_total": math.nan, "total_grad_norm": math.inf})
    steps[3] = steps[3].model_copy(update={"losses": (broken,)})
    (run,) = load_runs([write_run(tmp_path / "a", steps)])
    summary = summary_of(run)
    assert summary.non_finite == {"loss/total": 1, "grad_norm/total": 1}
    assert "loss/total (1)" in page_of([summary], {}, [], {})
    assert '"loss/total":"NaN"' in summary.model_copy(update={"last": {"loss/total": math.nan}}).model_dump_json()
    losses, *_, weights, _ = drawings({"a": run.curves.names})
    assert picture_of(losses, {"a": run.curves})
    # The third term is there in every other step only: points without neighbours.
    assert paint(PALETTE_ON_LIGHT[2]) in colours_in(picture_of(weights, {"a": run.curves}))


def test_what_was_evaluated_is_joined_over_the_steps_between(tmp_path: Path):
    (run,) = load_runs([made_up_run(tmp_path / "a", 40)])  # evaluated after every fifth step
    (drawing,) = [one for one in drawings({"a": run.curves.names}) if one.picture.key == "evaluation"]
    joined = picture_of(drawing, {"a": run.curves})
    panel = replace(drawing.charts[0].panel, sparse=False)
    apart = picture_of(replace(drawing, charts=(replace(drawing.charts[0], panel=panel),)), {"a": run.curves})
    lines, dots = (np.count_nonzero(pixels_of(one) == paint(PALETTE_ON_LIGHT[0])) for one in (joined, apart))
    assert lines > 2 * dots


def test_smoothing_keeps_straight_lines_and_averages_the_rest():
    line = np.linspace(-3.0, 5.0, 400)
    assert smoothed(line) == pytest.approx(line, abs=1e-12)
    assert smoothed(np.exp(line), in_logs=True) == pytest.approx(np.exp(line), rel=1e-12)
    noise = np.where(np.arange(1000) % 2, 1.0, -1.0)
    assert np.abs(smoothed(noise)[12:-12]).max() == pytest.approx(1 / 25)
    with_gap = line.copy()
    with_gap[100:200], with_gap[300] = np.nan, np.nan
    result = smoothed(with_gap)
    assert np.isnan(result[105:195]).all()
    assert result[300] == pytest.approx(line[300])


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    folders = [made_up_run(tmp_path / parent / "run", 1) for parent in ("x", "y")]
    assert [run.label for run in load_runs([*folders, folders[0]])] == ["x/run", "y/run"]


def test_how_numbers_are_written():
    told = {0.0123: "0.0123 s", 59.9: "59.9 s", 61: "1 min 01 s", 3_700: "1 h 01 min"}
    assert {seconds: duration(seconds) for seconds in told} == told
    assert setting("a") == "a"
    assert setting([1, None, "ü"]) == '[1, null, "ü"]'
    assert moment(1e20) == "1e+20"
    assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d", moment(1.7e9))


def test_what_cannot_be_read_or_written_is_named(tmp_path: Path):
    run = write_run(tmp_path / "a", [])
    with pytest.raises(ConfigError, match="none/run.json"):
        write_report([run, tmp_path / "none"], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="rename the folder"):
        write_report([tmp_path / os.fsdecode(b"\xff")], tmp_path / "out")
    with pytest.raises(ConfigError, match="at least one"):
        write_report([], tmp_path / "out")
    with pytest.raises(ConfigError, match="run.json/inside"):
        write_report([run], run / "run.json" / "inside")


def test_the_command(tmp_path: Path):
    run = str(made_up_run(tmp_path / "a", 2, norms=False))
    empty = str(write_run(tmp_path / "empty", []))
    done = CliRunner().invoke(app, ["report", run, empty, "--out", str(tmp_path / "out")])
    assert done.exit_code == 0, done.output
    last = base_loss(2) + sum(contribution(place, 2) for place in range(3))
    assert f"a: finished, 2 steps, loss 3.0089 -> {last:.4f}" in done.stdout
    assert f"{tmp_path / 'out' / 'index.html'} and 4 pictures" in done.stdout
    assert "empty: finished, 0 steps\n" in done.stdout
    done = CliRunner().invoke(app, ["report", empty, "--json", "--out", str(tmp_path / "other")])
    told = json.loads(done.stdout)
    assert (told["pictures"], told["runs"][0]["steps"]) == ({}, 0)
    assert Path(told["page"]).is_file()


def test_the_command_fails_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done = CliRunner().invoke(app, ["report", str(tmp_path / "none")])
    assert done.exit_code == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("tinkex-py report: ")
    assert "none" in line
    monkeypatch.setitem(sys.modules, "jinja2", None)
    done = CliRunner().invoke(app, ["report", str(made_up_run(tmp_path / "a", 1))])
    assert done.exit_code == 2
    assert done.stderr == "tinkex-py report: jinja2 is not installed. Run: pip install 'tinkex-py[report]'\n"
