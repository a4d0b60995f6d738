"""`tinkex-py report`: the page, the files, and the command."""

import json
import math
import os
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from tests.runs.made_up_runs import TERMS, base_loss, contribution, made_up_run, made_up_step, write_run
from tests.runs.support import run_info
from tinkex_py.cli import app
from tinkex_py.errors import ConfigError
from tinkex_py.runs.report import CHARTS, duration, moment, setting, write_report

HARMLESS_TAGS = {
    *("html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "nav", "a", "p", "div", "span"),
    *("table", "thead", "tbody", "tr", "th", "td", "picture", "source", "img"),
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


def test_one_run(tmp_path: Path):
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
    terms = {row[0]: row for row in page.rows}
    assert terms["l2"][3] == f"{contribution(0, 30):.5g}"


def test_a_page_needs_nothing_else(tmp_path: Path):
    report = write_report([made_up_run(tmp_path / "a", 5)], tmp_path / "out")
    page = Page(report.page.read_text())
    assert page.tags <= HARMLESS_TAGS
    images = [reference for reference in page.references if not reference.startswith("#")]
    assert len(images) == 2 * len(CHARTS)  # for wide screens and for phones
    assert all(reference.startswith("data:image/png;base64,iVBOR") for reference in images)
    assert "default-src 'none'" in report.page.read_text()


def test_several_runs_and_their_settings(tmp_path: Path):
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
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in report.charts.values())


def test_nothing_of_a_run_becomes_html(tmp_path: Path):
    evil = "<script>alert('&x')</script>"
    steps = [made_up_step(step, [evil], norms=False) for step in (1, 2)]
    info = run_info(
        name=evil,
        model=evil,
        status="failed",
        reason=evil,
        config={evil: evil, "nested": {evil: [evil]}},
        versions={evil: evil},
    )
    folders = [write_run(tmp_path / name, steps, info) for name in ("<b>bold<", "x")]
    (folders[1] / "run.json").write_text(info.model_copy(update={"config": {evil: [evil]}}).model_dump_json())
    page = Page(write_report(folders, tmp_path / "out").page.read_text())
    assert page.tags <= HARMLESS_TAGS
    assert sum(evil in text for text in page.texts) >= 9
    assert "<b>bold<" in "".join(page.texts)


def test_a_run_without_steps_or_norms_says_what_is_not_there(tmp_path: Path):
    write_report([made_up_run(tmp_path / "whole", 2, norms=False)], tmp_path / "out")
    empty = write_run(tmp_path / "empty", [], run_info(status="running"))
    report = write_report([empty], tmp_path / "out")
    assert report.charts == {}
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["index.html"]
    assert "No run has data for this chart." in "".join(Page(report.page.read_text()).texts)
    without = write_report([empty, made_up_run(tmp_path / "a", 2, norms=False)], tmp_path / "out")
    assert list(without.charts) == ["losses", "contributions", "weights", "times"]
    assert "track_grad_norms=True" in without.page.read_text()


def test_missing_and_non_finite_values(tmp_path: Path):
    steps = [made_up_step(step, TERMS if step % 2 else ["l2"]) for step in range(1, 8)]
    broken = steps[3].losses[0].model_copy(update={"loss_total": math.nan, "total_grad_norm": math.inf})
    steps[3] = steps[3].model_copy(update={"losses": (broken,)})
    report = write_report([write_run(tmp_path / "a", steps)], tmp_path / "out")
    (summary,) = report.runs
    assert summary.non_finite == {"loss/total": 1, "grad_norm/total": 1}
    assert "loss/total (1)" in report.page.read_text()
    assert '"loss/total":"NaN"' in summary.model_copy(update={"last": {"loss/total": math.nan}}).model_dump_json()


def test_runs_of_one_name_are_told_apart(tmp_path: Path):
    folders = [write_run(tmp_path / parent / "run", []) for parent in ("x", "y")]
    assert [run.label for run in write_report([*folders, folders[0]], tmp_path / "out").runs] == ["x/run", "y/run"]


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
    with pytest.raises(ConfigError, match="at least one folder"):
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
    assert f"wrote {tmp_path / 'out' / 'index.html'} and 4 charts" in done.stdout
    assert "empty: finished, 0 steps\n" in done.stdout
    done = CliRunner().invoke(app, ["report", empty, "--json", "--out", str(tmp_path / "other")])
    told = json.loads(done.stdout)
    assert (told["charts"], told["runs"][0]["steps"]) == ({}, 0)
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
